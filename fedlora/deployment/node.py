"""A node of a federation: Flower's own programs, started with safe settings and watched.

TLS and node authentication are on unless `insecure` is asked for.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
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
from .watched import Programs, fresh_secret, own_folder, socket_folder, superexec_options

_REFUSED = "[code: 2004]"  # Flower's answer to a key that is unknown, or whose node is still online
_SIGNED_IN_VAIN = "Finished server process"  # the only output of Flower's node if the server answers with 401
_RETRY_SECONDS = 5.0
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

    If the server is not there yet, the node waits for it.

    Args:
        server: address of the server, HOST:PORT.
        ca: certificate of the authority that signed the server's.
        key: the node's private key, whose public key is registered on the server.
        node_config: the node's own config: rank, data, partition-id, device and so on.
        state: folder for logs, Flower's own files, and the clients' state between rounds.
        worker: whether one resident process with the base model answers all messages; otherwise, each message loads the
            base model anew.
        insecure: use neither TLS nor node authentication.
        trusted_entities: YAML file of Ed25519 keys with one of which an app must be signed. Flower's hub signs apps,
            but the runs of `fedlora run` are not signed. None: any app is accepted.
        metrics_port: port of this machine for Prometheus's /metrics; None: no such page.
        patience: seconds to try again while the server refuses the key. After a node was killed, the server takes it
            for online for up to a minute.

    Raises:
        ConfigError: a file is missing, or `state` is in use.
        RunError: the server cannot be trusted, its clock and this one differ too much, it refuses the key, or Flower's
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
        asks = {"server": server} | (
            {"ca": str(ca), "key": str(key)} if ca and key else {}
        )  # for asking whether a run has ended
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
            with suppress(NotThere):  # Flower's node does not say that it ended because of its clock
                check_clock(exactly_ahead(check_server(server, ca), server, ca), server)
            if _SIGNED_IN_VAIN in reason:
                raise RunError(
                    f"the server at {server} no longer accepts what this node signs: its key is no longer registered "
                    f"there, or one of the clocks was changed; register the key (fedlora register {key}.pub), and "
                    "start the node again"
                )
            if _REFUSED not in reason:
                raise RunError(f"Flower's node ended: {ended}: {reason}")
            if time.monotonic() - began > patience:  # the key was accepted before
                refused_until = time.monotonic() + patience
            if time.monotonic() > refused_until:
                raise RunError(
                    f"the server at {server} refuses this node's key: {reason}; register it there "
                    f"(fedlora register {key}.pub), and start each key's node once"
                )
            _log.warning("node: refused; the key is not registered, or its node was online a moment ago; trying again")
            time.sleep(_RETRY_SECONDS)


def data_file(path: Path) -> str:
    """The absolute path of a node's data file, or of its folder of images, for its config.

    Raises:
        DataError: there is no such file or folder.
    """
    whole = path.expanduser().resolve()
    if not whole.exists():
        raise DataError(f"--data {path}: no such file or folder")
    return str(whole)


def _wait_for(server: str, ca: Path | None) -> float:
    """Wait until a server is there, and return what `check_server` returns; an untrusted server is an error at once."""
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
    """The config keys of a node's resident worker, which the first message starts; it is stopped at the block's end."""
    if not wanted or os.name != "posix":
        yield {}
        return
    with socket_folder() as folder:
        try:
            yield {"worker": str(folder / "worker.sock"), "node-pid": os.getpid()}
        finally:
            processes.stop_recorded(folder / "worker.pid", "worker")
