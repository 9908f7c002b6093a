"""A federation's server: Flower's own programs, started with safe settings and watched.

TLS and node authentication are on unless `insecure` is asked for.
"""

from __future__ import annotations

import logging
import socket
import ssl
import time
from contextlib import ExitStack
from pathlib import Path

from fedlora.common import processes
from fedlora.common.errors import ConfigError, RunError

from . import certificates, flower_programs, metrics, superlink_data
from .connection import check_dates, given, trusting
from .watched import Programs, fresh_secret, own_folder, superexec_options

_SUPERLINK = "flower-superlink"
_QUICK_SECONDS, _MOST_QUICK = 30.0, 3  # if a SuperLink ends within 30 s three times in a row, the server gives up
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "localhost"}  # this machine's address for a server that listens everywhere
# File in the folder of certificates -> option of the SuperLink.
_TLS = {
    certificates.CA: "--ssl-ca-certfile",
    certificates.SERVER: "--ssl-certfile",
    certificates.SERVER_KEY: "--ssl-keyfile",
}
_log = logging.getLogger("fedlora")


def serve(
    certs: Path | None,
    *,
    host: str,
    port: int,
    state: Path,
    database: Path | None = None,
    insecure: bool = False,
    metrics_port: int | None = None,
) -> None:
    """Run a federation's server until it is told to stop (Ctrl-C, SIGTERM), which raises KeyboardInterrupt.

    Args:
        certs: folder with `ca.crt`, `server.pem` and `server.key`.
        host: address to listen on; 0.0.0.0: all interfaces.
        port: port to listen on, for nodes and `fedlora run`.
        state: folder for logs, the database and Flower's own files.
        database: database of registered keys and runs; `superlink.db` in `state` when left out.
        insecure: use neither TLS nor node authentication.
        metrics_port: port of this machine for Prometheus's /metrics; None: no such page.

    Raises:
        ConfigError: a file is missing, or `state` is in use.
        RunError: the port is taken, or Flower's program ended.
    """
    files = [] if insecure else [_file(certs, name) for name in _TLS]
    tls = (
        ["--insecure"]
        if insecure
        else [word for pair in zip(_TLS.values(), map(str, files), strict=True) for word in pair]
    )
    trust = ["--insecure"] if insecure else ["--root-certificates", str(files[0])]
    if not insecure:
        certificates.check_private(files[2])
        _check_pair(*files[1:])
        for file in files[:2]:
            check_dates(file)
    _check_port(host, port)
    near = f"{_ANYWHERE.get(host, host)}:{port}"
    with own_folder(state) as home, processes.stopped_by_signals(), ExitStack() as stack:
        programs = stack.enter_context(Programs(home, "server"))
        database = (database or home / "superlink.db").expanduser().resolve()
        superlink_data.prepare(database)
        watched = metrics.of_server(database, files[1] if files else None)
        stack.enter_context(metrics.served(metrics_port, home / "audit.jsonl", watched))
        secret = fresh_secret(home)
        command = [_SUPERLINK, *tls, "--host", host, "--port", str(port)]
        command += ["--database", str(database)]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        command += [] if insecure else ["--enable-supernode-auth"]
        context = None if insecure else trusting(files[0])
        url = f"http{'' if insecure else 's'}://{near}"
        flower_programs.wait_until_healthy(programs.start(command), url, programs.log, context)
        # The SuperExec starts ServerApps, which write these files.
        known = {"FEDLORA_DATABASE": str(database), "FEDLORA_AUDIT": str(home / "audit.jsonl")}
        known |= {} if insecure else {"FEDLORA_CLIENT_KEYS": str(home / "client-keys.json")}
        programs.start(["flower-superexec", *trust, "--runtime-api-address", near, *superexec_options(secret)], known)
        _log.info("server: listening on %s:%d, state in %s", host, port, home)
        quick = 0
        while True:
            began = time.monotonic()
            ended, reason = programs.wait(lambda: superlink_data.look_after(database))
            quick = quick + 1 if time.monotonic() - began < _QUICK_SECONDS else 0
            if ended != _SUPERLINK or quick == _MOST_QUICK:
                raise RunError(f"Flower's server ended: {ended}: {superlink_data.full(database) or reason}")
            # Runs and messages are in the database, and ServerApps, which are processes of the SuperExec, go on.
            _log.warning("server: Flower's SuperLink ended (%s); starting it again", reason)
            flower_programs.wait_until_healthy(programs.start(command), url, programs.log, context)


def _file(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise ConfigError(
            "--certs: expected the folder that `fedlora certs` wrote, or --insecure for neither TLS nor keys"
        )
    return given(folder / name, "--certs", f"the folder with {', '.join(_TLS)}")


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--certs: {certificate} and {key.name} are not a certificate and its key in PEM format: {error}; "
            "put back what `fedlora certs` wrote"
        ) from None


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RunError(f"--port {port}: cannot listen on {host}:{port}: {error.strerror}; choose another") from None
