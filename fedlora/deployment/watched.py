"""A federation on real machines: Flower's own server and node programs, started with safe settings and watched.

TLS and node authentication are on unless `insecure` is asked for. Apps run under a SuperExec of our own that shares
a secret with its SuperLink or SuperNode: Flower's Runtime API, which hands out the apps, lies on the same port as
everything else, and without that secret it answers whoever reaches it.
"""

from __future__ import annotations

import base64
import getpass
import http.client
import logging
import os
import platform
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from filelock import FileLock, Timeout
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedlora.common import processes
from fedlora.common.errors import ConfigError, DataError, RunError
from fedlora.common.processes import free_port
from fedlora.common.rotation import Log
from fedlora.config import Config, Scalar
from fedlora.results.run_folder import stamp

from . import certificates, flower_programs, metrics, superlink_data
from .flower_programs import Connection

_NAME = "federation"
_REFUSED = "[code: 2004]"  # Flower's answer to a key that it does not know, and to one whose node is still online
_SIGNED_IN_VAIN = "Finished server process"  # all that Flower's node says when the server answers it with 401
_BEHIND_SECONDS = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
_ASK_SECONDS = 10.0  # for the first answer of a server
_RETRY_SECONDS = 5.0
_LOOK_SECONDS = 30.0  # between looks at the database's size and room
_SUPERLINK = "flower-superlink"
_QUICK_SECONDS, _MOST_QUICK = 30.0, 3  # a SuperLink that ends so soon, so often, will not stay
_OF_TIME = (9, 10)  # OpenSSL: a certificate is not yet valid, or not any more
_COARSE_SECONDS = 2.0  # what a clock that tells whole seconds leaves open, with room
_UNITS = ((86400, "days"), (3600, "h"), (1, "s"))
_LONGEST_FOLDER = 70  # characters
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "localhost"}  # where this machine reaches a server that listens everywhere
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
        certs: folder that holds `ca.crt`, `server.pem` and `server.key`.
        host: address to listen on; 0.0.0.0 for every interface.
        port: the one port that nodes and `fedlora run` talk to.
        state: folder for logs, the database and Flower's own files.
        database: registered keys and runs; `superlink.db` in `state` when left out.
        insecure: neither TLS nor node authentication.
        metrics_port: of this machine, where Prometheus asks for /metrics; None for none.

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
    with _own_folder(state) as home, processes.stopped_by_signals(), ExitStack() as stack:
        programs = stack.enter_context(_Programs(home, "server"))
        database = (database or home / "superlink.db").expanduser().resolve()
        superlink_data.prepare(database)
        watched = metrics.of_server(database, files[1] if files else None)
        stack.enter_context(metrics.served(metrics_port, home / "audit.jsonl", watched))
        secret = _secret(home)
        command = [_SUPERLINK, *tls, "--host", host, "--port", str(port)]
        command += ["--database", str(database)]
        command += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        command += [] if insecure else ["--enable-supernode-auth"]
        context = None if insecure else trusting(files[0])
        url = f"http{'' if insecure else 's'}://{near}"
        flower_programs.wait_until_healthy(programs.start(command), url, programs.log, context)
        # ServerApps are started by it, and keep there which key each client id belongs to.
        known = {"FEDLORA_DATABASE": str(database), "FEDLORA_AUDIT": str(home / "audit.jsonl")}
        known |= {} if insecure else {"FEDLORA_CLIENT_KEYS": str(home / "client-keys.json")}
        programs.start(["flower-superexec", *trust, "--runtime-api-address", near, *_superexec(secret)], known)
        _log.info("server: listening on %s:%d, state in %s", host, port, home)
        quick = 0
        while True:
            began = time.monotonic()
            ended, reason = programs.wait(lambda: superlink_data.look_after(database))
            quick = quick + 1 if time.monotonic() - began < _QUICK_SECONDS else 0
            if ended != _SUPERLINK or quick == _MOST_QUICK:
                raise RunError(f"Flower's server ended: {ended}: {superlink_data.full(database) or reason}")
            # Runs and messages are in its database; ServerApps, which are processes of the SuperExec, go on.
            _log.warning("server: Flower's SuperLink ended (%s); starting it again", reason)
            flower_programs.wait_until_healthy(programs.start(command), url, programs.log, context)


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
    _split(server)
    with _own_folder(state) as home, processes.stopped_by_signals(), ExitStack() as stack:
        of_worker = stack.enter_context(_worker(worker))
        stack.enter_context(metrics.served(metrics_port, home / "events.jsonl", metrics.of_node(home)))
        settings = home / "node.toml"
        asks = {"server": server} | ({"ca": str(ca), "key": str(key)} if ca and key else {})  # whether a run goes on
        known = {**node_config, "state": str(home), **of_worker, **asks}
        settings.write_text("".join(f"{name} = {flower_programs.toml(known[name])}\n" for name in known), "utf-8")
        secret = _secret(home)
        check_clock(_exactly(_wait_for(server, ca), server, ca), server)
        refused_until = time.monotonic() + patience
        while True:
            port = free_port()
            command = ["flower-supernode", *trust, "--superlink", server, "--node-config", str(settings)]
            command += ["--host", "127.0.0.1", "--port", str(port), "--isolation", "process"]
            command += ["--superexec-auth-secret-file", str(secret)]
            with _Programs(home, "node") as programs:
                began = time.monotonic()
                supernode = programs.start(command)
                if _listens(supernode, port):
                    near = ["--insecure", "--runtime-api-address", f"127.0.0.1:{port}"]
                    programs.start(["flower-superexec", *near, *_superexec(secret)])
                    _log.info("node: started for the server at %s, state in %s", server, home)
                ended, reason = programs.wait()
            with suppress(_NotThere):  # Flower's node does not say that it ended for its clock
                check_clock(_exactly(check_server(server, ca), server, ca), server)
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


def _who() -> str:
    """Who runs this command, as the machine knows them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        user = "?"
    return f"{user}@{platform.node()}"


def run(config: Config, server: str, ca: Path | None, insecure: bool = False) -> None:
    """Run a federation on the nodes that are connected to a server.

    The run's record and adapter are written by the server's machine, to `run.dir`.

    Raises:
        RunError: the server cannot be reached or trusted, or the run did not complete.
    """
    config = flower_programs.absolute(stamp(config))
    config = config if config.run.by else replace(config, run=replace(config.run, by=_who()))
    with _connection(server, ca, insecure) as connection:
        bundle = flower_programs.write_bundle(config, connection.folder / "app")
        flower_programs.carry_out(config, bundle, connection, log=None)


def check_server(server: str, ca: Path | None) -> float:
    """That a server is there, and the one that the authority vouches for; without `ca`, that it speaks plain HTTP.

    Returns:
        Seconds that this machine's clock is ahead of the server's, less what is uncertain; 0 where it does not say.

    Raises:
        RunError: it is not.
    """
    host, port = _split(server)
    context = None if ca is None else trusting(ca)
    try:
        asked = _asking(host, port, context)
        try:
            began = time.time()
            asked.request("GET", "/health")
            told = asked.getresponse().getheader("Date", "")
            return _ahead(told, began, time.time())
        finally:
            asked.close()
    except ssl.SSLCertVerificationError as error:
        fix = "use the ca.crt beside the server's own, and an address that the certificate names (fedlora certs)"
        if error.verify_code in _OF_TIME:
            fix = f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: set it if it is wrong"
        raise RunError(
            f"the certificate of the server at {server} does not pass with {ca}: {error.verify_message}; {fix}"
        ) from None
    except ssl.SSLError as error:
        raise RunError(
            f"the server at {server} does not speak TLS ({error.reason}); was it started with --insecure?"
        ) from None
    except (http.client.HTTPException, ConnectionResetError):
        raise RunError(
            f"the server at {server} does not speak plain HTTP; leave out --insecure and give --ca"
        ) from None
    except OSError as error:
        raise _NotThere(
            f"nobody answers at {server} ({error}); start the server, or check address and firewall"
        ) from None


def _asking(host: str, port: int, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    """A connection to a server; over TLS as Flower's own, through the proxy of HTTPS_PROXY, but for NO_PROXY."""
    if context is None:
        return http.client.HTTPConnection(host, port, timeout=_ASK_SECONDS)
    proxy = urllib.request.getproxies_environment().get("https")
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return http.client.HTTPSConnection(host, port, timeout=_ASK_SECONDS, context=context)
    there = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    if not there.hostname:
        raise ConfigError(f"HTTPS_PROXY: {proxy!r} names no host, expected such as http://proxy.example.org:3128")
    asked = http.client.HTTPSConnection(there.hostname, there.port or 80, timeout=_ASK_SECONDS, context=context)
    own = (
        f"{urllib.parse.unquote(there.username)}:{urllib.parse.unquote(there.password or '')}" if there.username else ""
    )
    known = {"Proxy-Authorization": f"Basic {base64.b64encode(own.encode()).decode()}"} if own else {}
    asked.set_tunnel(host, port, known)
    return asked


def _ahead(told: str, began: float, ended: float) -> float:
    """How far this clock is ahead of one that showed this time, in whole seconds, between `began` and `ended`."""
    try:
        there = parsedate_to_datetime(told).timestamp()
    except (ValueError, TypeError):
        return 0.0
    most, least = ended - there, began - there - 1.0
    return least if least > 0 else most if most < 0 else 0.0


def check_clock(ahead: float, server: str) -> None:
    """Raises RunError for a clock with which Flower's server refuses all that a node signs.

    Args:
        ahead: seconds that this machine's clock is ahead of the server's.
        server: HOST:PORT.
    """
    if -_BEHIND_SECONDS < ahead < SYSTEM_TIME_TOLERANCE:
        return
    seconds = abs(ahead)
    size = next(f"{seconds / unit:.{seconds < 20:d}f} {name}" for unit, name in _UNITS if seconds >= 2 * unit)
    raise RunError(
        f"this machine's clock is {size} {'ahead of' if ahead > 0 else 'behind'} that of the server at {server}, which "
        f"takes nothing from a node that is more than {SYSTEM_TIME_TOLERANCE} s ahead or {_BEHIND_SECONDS} s "
        "behind; set the clock that is wrong (NTP), and start the node again"
    )


def _exactly(ahead: float, server: str, ca: Path | None) -> float:
    """How far this clock is ahead, to some milliseconds where a second decides: a server tells whole seconds alone."""
    if min(abs(ahead - SYSTEM_TIME_TOLERANCE), abs(ahead + _BEHIND_SECONDS)) > _COARSE_SECONDS:
        return ahead
    found = [ahead]
    for _ in range(12):  # over a second, one of them asks as the server's clock ticks
        time.sleep(0.09)
        found.append(check_server(server, ca))
    return max(found, key=abs)


def check_dates(certificate: Path) -> None:
    """Raises ConfigError for a certificate that is not valid now, before any connection fails for it."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError):
        return  # what is no certificate is named where it is used
    now = datetime.now(UTC)
    if now > found.not_valid_after_utc:
        what = f"expired on {found.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    elif now < found.not_valid_before_utc:
        what = f"is not valid before {found.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
    else:
        return
    renewed = f"renew it: fedlora certs {certificate.parent} --renew"
    fix = renewed if certificate.name == certificates.SERVER else "make new ones in a new folder (fedlora certs)"
    raise ConfigError(
        f"{certificate}: the certificate {what}, and this machine's clock says {now:%Y-%m-%d %H:%M} UTC; {fix}, "
        "or set the clock if it is wrong"
    )


def trusting(ca: Path) -> ssl.SSLContext:
    """A TLS client's settings that trust this authority alone.

    Raises:
        ConfigError: the file holds no certificate.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{ca}: holds no certificate in PEM format; expected the ca.crt of fedlora certs") from None


class _NotThere(RunError):
    """Nobody listens, yet."""


# What `serve` reads from the folder of certificates, and the option that takes it.
_TLS = {
    certificates.CA: "--ssl-ca-certfile",
    certificates.SERVER: "--ssl-certfile",
    certificates.SERVER_KEY: "--ssl-keyfile",
}


class _Programs:
    """Flower's programs of one server or node: their output here and in a log file; leaving stops them all by pid."""

    def __init__(self, home: Path, name: str) -> None:
        self._home, self.log = home, home / f"{name}.log"
        self._environment = flower_programs.environment(home / "flwr")
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._readers: dict[str, threading.Thread] = {}
        self._lines = Log(self.log)

    def __enter__(self) -> _Programs:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            processes.stop_tree(process)
        for reader in self._readers.values():
            reader.join(timeout=5)

    def start(self, command: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        # The working folder is importable for the apps: it holds nothing but what is made here.
        words = [flower_programs.program(command[0]), *command[1:]]
        process = processes.start(words, self._home, {**self._environment, **(more or {})}, subprocess.PIPE)
        reader = threading.Thread(target=self._copy, args=(process,), daemon=True)
        reader.start()
        self._running[command[0]], self._readers[command[0]] = process, reader
        return process

    def _copy(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.write(line)
                print(line.decode(errors="replace"), end="", flush=True)

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> tuple[str, str]:
        """Until one of them ends: its name, and why in its own words; `meanwhile` is called now and then."""
        called = time.monotonic()
        while all(process.poll() is None for process in self._running.values()):
            time.sleep(0.2)
            if time.monotonic() - called > _LOOK_SECONDS:
                meanwhile()
                called = time.monotonic()
        ended = next(name for name, process in self._running.items() if process.poll() is not None)
        self._readers[ended].join(timeout=5)
        return ended, flower_programs.reason_of(self.log.read_text(errors="replace"))


@contextmanager
def _connection(server: str, ca: Path | None, insecure: bool) -> Iterator[Connection]:
    """A connection of `flwr` to a server that was just found there."""
    authority = None if insecure else given(ca, "--ca", "ca.crt")
    if authority:
        check_dates(authority)
    check_server(server, authority)
    with tempfile.TemporaryDirectory(prefix="fedlora-flwr-") as scratch:
        home = Path(scratch)
        (home / "flwr").mkdir()
        trust = f"root-certificates = {flower_programs.toml(str(authority))}" if authority else "insecure = true"
        text = f"[superlink.{_NAME}]\naddress = {flower_programs.toml(server)}\n{trust}\n"
        (home / "flwr" / "config.toml").write_text(text, encoding="utf-8")
        yield Connection(_NAME, flower_programs.environment(home / "flwr"), home, server)


@contextmanager
def _own_folder(state: Path) -> Iterator[Path]:
    """A state folder that no other server or node uses meanwhile."""
    home = state.expanduser().resolve()
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(home / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"--state {home}: another server or node uses this folder; give each its own") from None
    except OSError as error:
        raise ConfigError(f"--state {home}: cannot be written: {error}") from None
    try:
        yield home
    finally:
        lock.release()


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


def _superexec(secret: Path) -> list[str]:
    return ["--superexec-auth-secret-file", str(secret), "--parent-pid", str(os.getpid())]


def _secret(home: Path) -> Path:
    """A fresh secret between this server or node and its SuperExec."""
    path = home / "superexec-secret"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.urandom(32))
    return path


def _wait_for(server: str, ca: Path | None) -> float:
    """What `check_server` returns, once somebody listens there; a server that cannot be trusted is an error at once."""
    told = False
    while True:
        try:
            return check_server(server, ca)
        except _NotThere as error:
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


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:  # ssl.SSLError is one
        raise ConfigError(
            f"--certs: {certificate} and {key.name} beside it are no certificate and its key in PEM format: {error}; "
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


def _split(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"--server {server}: expected HOST:PORT, such as fed.example.org:9092")
    return host.strip("[]"), int(port)


def _file(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise ConfigError(
            "--certs: expected the folder that `fedlora certs` wrote, or --insecure for neither TLS nor keys"
        )
    return given(folder / name, "--certs", f"the folder that holds {', '.join(_TLS)}")


def given(path: Path | None, option: str, what: str) -> Path:
    """The path, absolute, of a file that exists."""
    if path is None:
        raise ConfigError(f"{option}: expected {what}, or --insecure for neither TLS nor keys")
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise ConfigError(f"{option} {path}: no such file; expected {what}")
    return whole


def data_file(path: Path) -> str:
    """A node's own rows, as its node config names them.

    Raises:
        DataError: there is no such file.
    """
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise DataError(f"--data {path}: no such file")
    return str(whole)
