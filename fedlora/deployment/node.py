"""A node of a federation: Flower's own programs, started with safe settings and watched.

TLS and node authentication are on unless `insecure` is asked for.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fedlora.common import processes
from fedlora.common.errors import DataError, RunError
from fedlora.common.processes import free_port
from fedlora.config import Scalar

from . import certificates, flower_programs, metrics
from .connection import NotThere, check_clock, check_dates, check_server, exactly_ahead, given, host_and_port
from .watched import Programs, fresh_secret, own_folder, superexec_options

_REFUSED = "[code: 2004]"  # Flower's answer to a key that it does not know, and to one whose node is still online
_SIGNED_IN_VAIN = "Finished server process"  # all that Flower's node says when the server answers it with 401
_RETRY_SECONDS = 5.0
_LONGEST_FOLDER = 70  # characters
_log = logging.getLogger("fedlora")


def join(
    server: str,
    ca: Path | None,
    key: Path | None,
    *,
    node_config: Mapping[str, Scalar],
    state: Path,
    worker: bool = True,
    insecure: bool = False,
    trusted_entities: Path | None = None,
    metrics_port: int | None = None,
    patience: float = 90.0,
) -> None:
    """Run one node until it is told to stop (Ctrl-C, SIGTERM), which raises KeyboardInterrupt.

    A server that is not there yet is waited for.

    Args:
        server: HOST:PORT.
        ca: certificate of the authority that signed the server's.
        key: private key whose public half was registered.
        node_config: what the ClientApp learns of its node: rank, data, partition-id, device and so on.
        state: folder for logs, Flower's own files, and what this client keeps between rounds.
        worker: messages are answered by one resident process that holds the base model; else each loads it anew.
        insecure: neither TLS nor node authentication.
        trusted_entities: a YAML file of the Ed25519 keys whose signature an app must bear; Flower's hub signs apps,
            and a run that `fedlora run` hands in bears none. None for any app.
        metrics_port: of this machine, where Prometheus asks for /metrics; None for none.
        patience: seconds to try again while the server refuses the key. A node that was killed stays online for
            the server for up to a minute.

    Raises:
        ConfigError: a file is missing, or `state` is in use.
        RunError: the server cannot be trusted, its clock and this one do not agree, it refuses the key, or Flower's
            program ended.
    """
    trust = ["--insecure"]
    if not insecure:
        ca, key = given(ca, "--ca", "ca.crt"), given(key, "--key", "the private key of this node")
        certificates.check_private(key)
        check_dates(ca)
        trust = ["--root-certificates", str(ca), "--auth-supernode-private-key", str(key)]
    else:
        ca = None
    if trusted_entities is not None:
        file = given(trusted_entities, "--trusted-entities", "a YAML file of key ids and Ed25519 public keys")
        trust += ["--trusted-entities", str(file)]
    host_and_port(server)
    with own_folder(state) as home, processes.stopped_by_signals(), ExitStack() as stack:
        of_worker = stack.enter_context(_worker(worker))
        stack.enter_context(metrics.served(metrics_port, home / "events.jsonl", metrics.of_node(home)))
        settings = home / "node.toml"
        asks = {"server": server} | ({"ca": str(ca), "key": str(key)} if ca and key else {})  # whether a run goes on
        known = {**node_config, "state": str(home), **of_worker, **asks}
        settings.write_text("".join(f"{name} = {flower_programs.toml(known[name])}\n" for name in known), "utf-8")
        secret = fresh_secret(home)
        check_clock(exactly_ahead(_wait_for(server, ca), server, ca), server)
        refused_until = time.monotonic() + patience
        while True:
            port = free_port()
            command = ["flower-supernode", *trust, "--superlink", server, "--node-config", str(settings)]
            command += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
            command += ["--superexec-auth-secret-file", str(secret)]
            with Programs(home, "node") as programs:
                began = time.monotonic()
                supernode = programs.start(command)
                if _listens(supernode, port):
                    near = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
                    programs.start(["flower-superexec", *near, *superexec_options(secret)])
                    _log.info("node: started for the server at %s, state in %s", server, home)
                ended, reason = programs.wait()
            with suppress(NotThere):  # Flower's node does not say that it ended for its clock
                check_clock(exactly_ahead(check_server(server, ca), server, ca), server)
            if _SIGNED_IN_VAIN in reason:
                raise RunError(
                    f"the server at {server} does not take any more what this node signs: its key is no longer "
                    "registered there, or one of the clocks was set meanwhile; register the key (fedlora register "
                    f"{key}.pub), and start the node again"
                )
            if _REFUSED not in reason:
                raise RunError(f"Flower's node ended: {ended}: {reason}")
            if time.monotonic() - began > patience:  # it had been accepted before
                refused_until = time.monotonic() + patience
            if time.monotonic() > refused_until:
                raise RunError(
                    f"the server at {server} refuses this node's key: {reason}; register it there "
                    f"(fedlora register {key}.pub), and start each key's node once"
                )
            _log.warning("node: refused; the key is not registered, or its node was online a moment ago; trying again")
            time.sleep(_RETRY_SECONDS)


def data_file(path: Path) -> str:
    """A node's own rows, as its node config names them.

    Raises:
        DataError: there is no such file.
    """
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise DataError(f"--data {path}: no such file")
    return str(whole)


def _wait_for(server: str, ca: Path | None) -> float:
    """What `check_server` returns, once somebody listens there; a server that cannot be trusted is an error at once."""
    told = False
    while True:
        try:
            return check_server(server, ca)
        except NotThere as error:
            if not told:
                _log.info("node: %s; waiting for it", error)
            told = True
            time.sleep(_RETRY_SECONDS)


def _listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether a port opens before the process ends."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.1)
    return False


@contextmanager
def _worker(wanted: bool) -> Iterator[dict[str, Scalar]]:
    """What a node's config says of its resident worker, which the first message starts; stopped at the block's end."""
    if not wanted or os.name != "posix":
        yield {}
        return
    # A socket's path may have no more than about 100 characters: it lies in no folder of the user's choice.
    short = None if len(tempfile.gettempdir()) <= _LONGEST_FOLDER else "/tmp"
    with tempfile.TemporaryDirectory(prefix="fedlora-", dir=short, ignore_cleanup_errors=True) as folder:
        try:
            yield {"worker": str(Path(folder) / "worker.sock"), "node-pid": os.getpid()}
        finally:
            processes.stop_recorded(Path(folder) / "worker.pid", "worker")
