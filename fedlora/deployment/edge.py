"""An edge: a node towards the server above it, and a server towards the nodes of its region.

It is two of this package's commands, `fedlora server` and `fedlora node`, run as two processes. The node's messages go
to the ServerApp of a run on the edge's own server, which asks the region's nodes (`strategies/region_app.py`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from fedlora.common import processes
from fedlora.common.errors import ConfigError, RunError
from fedlora.common.files import write_json
from fedlora.config import Config
from fedlora.exchange.fields import EDGE

from . import flower_programs, resident
from .connection import NotThere, check_server, connected
from .watched import Programs, own_folder, socket_folder

VARIABLE = "FEDLORA_EDGE"  # environment variable with the path of the file of a `Post`
_START_SECONDS, _LOOK_SECONDS = 300.0, 0.5
_MARGIN_SECONDS, _MARGIN_SHARE = 60.0, 0.1


@dataclass(frozen=True)
class Post:
    """Where an edge's node and the ServerApp of its region meet.

    Args:
        name: of the edge.
        clients: the largest number of clients in the region.
        socket: path of the Unix socket on which the ServerApp listens.
        pid: process id of the edge, with which the ServerApp ends.
    """

    name: str
    clients: int
    socket: Path
    pid: int

    @classmethod
    def mine(cls) -> Post:
        """That of the edge whose server has started this process.

        Raises:
            RunError: this process was not started by an edge's server.
        """
        file = os.environ.get(VARIABLE)
        if not file:
            raise RunError("this app belongs to an edge, and was started by another server; start it with fedlora edge")
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        return cls(found["name"], found["clients"], Path(found["socket"]), found["pid"])

    def is_held(self) -> bool:
        """Whether the edge still runs."""
        return psutil.pid_exists(self.pid) and resident.runs(psutil.Process(self.pid))


def keep(
    server: str,
    ca: Path | None,
    key: Path | None,
    *,
    name: str,
    clients: int,
    certs: Path | None,
    host: str,
    port: int,
    state: Path,
    insecure: bool = False,
) -> None:
    """Run an edge until it is told to stop (Ctrl-C, SIGTERM), which raises KeyboardInterrupt.

    Args:
        server: address of the server above, HOST:PORT.
        ca: certificate of the authority that signed that server's.
        key: the edge's private key, whose public key is registered there.
        name: of the edge, by which the server above shows its region.
        clients: the largest number of clients in the region, for which a run's first answer waits.
        certs: folder with the certificates of the edge's own server.
        host: address to listen on for the region's nodes.
        port: port to listen on.
        state: folder for logs and state, with the folders `server` and `node`.
        insecure: use neither TLS nor node authentication, on both sides.

    Raises:
        ConfigError: the name cannot be one, a file is missing, or `state` is in use.
        RunError: one of the two sides ended.
    """
    if not re.fullmatch(EDGE, name):
        raise ConfigError(f"--name {name}: expected at most 64 letters, digits, dots, dashes and underscores")
    with own_folder(state) as home, processes.stopped_by_signals(), socket_folder() as short:
        post = Post(name, clients, short / "region.sock", os.getpid())
        known = {"name": name, "clients": clients, "socket": str(post.socket), "pid": post.pid}
        write_json(home / "edge.json", known)
        near = f"127.0.0.1:{port}" if host in ("0.0.0.0", "::") else f"{host}:{port}"
        region_ca = None if insecure or certs is None else (certs / "ca.crt").expanduser().resolve()
        below = ["fedlora", "server", "--host", host, "--port", str(port), "--state", str(home / "server")]
        above = ["fedlora", "node", "--server", server, "--state", str(home / "node"), "--no-worker"]
        above += ["-c", f"worker={post.socket}", "-c", f"region={near}", "-c", f"worker-stall={10 * 365 * 86400}"]
        if insecure:
            below, above = [*below, "--insecure"], [*above, "--insecure"]
        else:
            below += _option("--certs", certs)
            above += [*_option("--ca", ca), *_option("--key", key), "-c", f"region-ca={region_ca}"]
        with Programs(home, "edge") as programs:
            own = programs.start(below, {VARIABLE: str(home / "edge.json")}, name="server")
            if _answers(own, near, region_ca):
                programs.start(above, name="node")
            ended, reason = programs.wait()
        raise RunError(f"the edge ended with its {ended}: {reason}")


def begin(config: Config, server: str, ca: Path | None, socket: Path) -> None:
    """Start a run on an edge's own server, in place of those that go on there, and wait until it listens.

    Args:
        config: the configuration of the run of the server above.
        server: address of the edge's own server.
        ca: certificate of the authority that signed its certificate; None without TLS.
        socket: path of the Unix socket on which the run's ServerApp will listen.

    Raises:
        RunError: the server cannot be reached or trusted, or the run did not begin.
    """
    socket.unlink(missing_ok=True)  # with it, the app of an earlier run ends
    with connected(server, ca, insecure=ca is None) as connection:
        for run in connection.ask("ls", connection.name, "--format", "json").get("runs", ()):
            if not str(run.get("status", "")).startswith("finished"):
                connection.ask("stop", str(run["run-id"]), connection.name, "--format", "json")
        bundle = flower_programs.write_bundle(sooner(config), connection.folder / "app", server_app="region_app")
        run_id = flower_programs.submit(bundle, connection)
        deadline = time.monotonic() + _START_SECONDS
        while not resident.is_healthy(socket):
            if time.monotonic() > deadline:
                shown = connection.run("log", str(run_id), connection.name, "--show")
                said = flower_programs.last_line(shown.stdout) or "nothing was logged"
                raise RunError(f"the run in the region did not begin within {_START_SECONDS:.0f} s: {said}")
            time.sleep(0.2)


def sooner(config: Config) -> Config:
    """The configuration with earlier deadlines, so that an edge answers before the server above waits no longer."""

    def less(seconds: float) -> float:
        return seconds - min(_MARGIN_SECONDS, _MARGIN_SHARE * seconds)

    known = config.federation
    earlier = replace(known, round_timeout=less(known.round_timeout), wait_timeout=less(known.wait_timeout))
    return replace(config, federation=earlier)


def _answers(process: subprocess.Popen[bytes], server: str, ca: Path | None) -> bool:
    """Whether a server answers before its process ends."""
    while process.poll() is None:
        try:
            check_server(server, ca)
        except NotThere:
            time.sleep(_LOOK_SECONDS)
        else:
            return True
    return False


def _option(name: str, path: Path | None) -> Sequence[str]:
    """The option with an absolute path, since the process has another working folder."""
    return [] if path is None else [name, str(path.expanduser().resolve())]
