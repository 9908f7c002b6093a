"""A server as others reach it: whether it is there and to be trusted, its clock, and runs on its nodes."""

from __future__ import annotations

import base64
import getpass
import http.client
import platform
import ssl
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedlora.common.errors import ConfigError, RunError
from fedlora.config import Config
from fedlora.results.run_folder import stamp

from . import certificates, flower_programs
from .flower_programs import Connection

_NAME = "federation"
_BEHIND_SECONDS = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
_ASK_SECONDS = 10.0  # for the first answer of a server
_OF_TIME = (9, 10)  # OpenSSL: a certificate is not yet valid, or not any more
_COARSE_SECONDS = 2.0  # what a clock that tells whole seconds leaves open, with room
_UNITS = ((86400, "days"), (3600, "h"), (1, "s"))


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


def _who() -> str:
    """Who runs this command, as the machine knows them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        user = "?"
    return f"{user}@{platform.node()}"


def check_server(server: str, ca: Path | None) -> float:
    """That a server is there, and the one that the authority vouches for; without `ca`, that it speaks plain HTTP.

    Returns:
        Seconds that this machine's clock is ahead of the server's, less what is uncertain; 0 where it does not say.

    Raises:
        RunError: it is not.
    """
    host, port = host_and_port(server)
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
        raise NotThere(
            f"nobody answers at {server} ({error}); start the server, or check address and firewall"
        ) from None


class NotThere(RunError):
    """Nobody listens, yet."""


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


def exactly_ahead(ahead: float, server: str, ca: Path | None) -> float:
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


def host_and_port(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"--server {server}: expected HOST:PORT, such as fed.example.org:9092")
    return host.strip("[]"), int(port)


def given(path: Path | None, option: str, what: str) -> Path:
    """The path, absolute, of a file that exists."""
    if path is None:
        raise ConfigError(f"{option}: expected {what}, or --insecure for neither TLS nor keys")
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise ConfigError(f"{option} {path}: no such file; expected {what}")
    return whole
