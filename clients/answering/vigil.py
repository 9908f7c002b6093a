"""Ends the work on a message when its lifetime is over, or when its run has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flwr.app import Message

_ASK_SECONDS = 5.0  # between questions to the server whether the run has ended
_LOOK_SECONDS = 0.5
# Flower's error codes for a node that asks for a run: the run has ended; the run is unknown, or not for this node.
_ENDED, _UNKNOWN = 2007, 2008
_log = logging.getLogger("fedlora")


class Over(BaseException):
    """Nobody waits for this message's answer any more. As a BaseException, it is not answered like an error."""


class Vigil:
    """Keeps track of whether the server still waits for the answer to a message.

    Attributes:
        over: the reason why the server no longer waits; empty as long as it does.
    """

    def __init__(self, seconds: float) -> None:
        """Args:
        seconds: the message's remaining lifetime.
        """
        self.over = ""
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self._done = threading.Event()

    def check(self, kind: str = "", facts: Mapping[str, Any] | None = None) -> None:
        """A listener for `fedlora.common.events`, which ends a computation in this process at its next event.

        Raises:
            Over: the server no longer waits.
        """
        if self.over:
            raise Over(self.over)

    def keep(self, runs: Runs | None) -> None:
        """Watch until `end` is called; with `runs`, also ask the server from time to time whether the run has ended."""
        asked = time.monotonic()
        while not self.over and not self._done.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now >= self._deadline:
                lived = f"within the {self._seconds:.0f} s that its message lives"
                self.over = f"it was not done {lived} (federation.round-timeout)"
            elif runs is not None and now - asked > _ASK_SECONDS:
                if runs.ended():
                    self.over = "its run has ended"
                asked = time.monotonic()
        if runs is not None:
            runs.close()

    def end(self) -> None:
        """Stop watching."""
        self._done.set()


@contextmanager
def watched_over(message: Message, settings: Mapping[str, Any], node_id: int) -> Iterator[Vigil]:
    """A vigil over this message, kept by a thread that ends with the block.

    Args:
        message: the message that is answered.
        settings: the node's config; its `server`, `ca` and `key` are used to ask the server.
        node_id: Flower's number of this node.
    """
    vigil = Vigil(message.metadata.ttl)
    server = settings.get("server")
    runs = Runs(settings, node_id, message.metadata.run_id) if server else None
    thread = threading.Thread(target=vigil.keep, args=(runs,), daemon=True)
    thread.start()
    try:
        yield vigil
    finally:
        vigil.end()
        thread.join(timeout=_LOOK_SECONDS + 1.0)


class Runs:
    """Asks the server about a run in the name of this node. Flower's node itself does not ask while its app works."""

    def __init__(self, settings: Mapping[str, Any], node_id: int, run_id: int) -> None:
        self._settings, self._node_id, self._run_id = settings, node_id, run_id
        self._client: Any = None
        self._registered = False

    def ended(self) -> bool:
        """Whether the run has ended; False if the server does not answer, for instance because it is restarting."""
        import httpx
        from flwr.proto.node_pb2 import Node
        from flwr.proto.run_pb2 import GetRunRequest
        from flwr.supercore.error import FlowerError

        try:
            if self._client is None:
                self._client = self._connected()
            self._client.GetRun(GetRunRequest(node=Node(node_id=self._node_id), run_id=self._run_id))
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            return said is not None and (said.code == _ENDED or (said.code == _UNKNOWN and not self._registered))
        except (httpx.HTTPError, OSError, ValueError) as error:
            _log.debug("the server could not be asked whether the run has ended: %s", error)
        return False

    def _connected(self) -> Any:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        server, ca, key = (str(self._settings.get(name, "")) for name in ("server", "ca", "key"))
        if key:
            private = load_ssh_private_key(Path(key).read_bytes(), None)
            if not isinstance(private, ec.EllipticCurvePrivateKey):
                raise ValueError(f"{key} is not an elliptic curve key")
            public = private.public_key()
        else:
            private, public = generate_key_pairs()
        client = FleetHttpClient.from_server_address(
            server,
            not ca,
            ca or None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, public),
            ],
        )
        if not key:  # Flower's node has made its own key and shows it to nobody; register another, only to ask with it
            self._node_id = client.RegisterNode(
                RegisterNodeFleetRequest(public_key=public_key_to_bytes(public))
            ).node_id
            self._registered = True
        return client

    def close(self) -> None:
        """Close the connection, and unregister the key that was made for it."""
        if self._client is None:
            return
        import httpx
        from flwr.proto.fleet_pb2 import UnregisterNodeFleetRequest

        with suppress(httpx.HTTPError, OSError):  # a server that is gone
            if self._registered:
                self._client.UnregisterNode(UnregisterNodeFleetRequest(node_id=self._node_id))
        self._client.close()
