"""Connections to a server: checks whether it is there and can be trusted, compares clocks, and runs on its nodes."""

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
_ASK_SECONDS = 10.0  # longest wait for a server's first answer
_OF_TIME = (9, 10)  # OpenSSL's codes for a certificate that is not yet valid, or has expired
_COARSE_SECONDS = 2.0  # more than the uncertainty of a clock that is read in whole seconds
_UNITS = ((86400, "days"), (3600, "h"), (1, "s"))


def run(config: Config, server: str, ca: Path | None, insecure: bool = False) -> None:
    """Run a federation on the nodes that are connected to a server.

    The run's record and adapter are written on the server's machine, to `run.dir`.

    Args:
        config: the run's configuration.
        server: address of the server, HOST:PORT.
        ca: certificate of the authority that signed the server's.
        insecure: use neither TLS nor node authentication.

    Raises:
        RunError: the server cannot be reached or trusted, or the run did not complete.
    """
    config = flower_programs.absolute(stamp(config))
    config = config if config.run.by else replace(config, run=replace(config.run, by=_who()))
    with connected(server, ca, insecure) as connection:
        bundle = flower_programs.write_bundle(config, connection.folder / "app")
        flower_programs.carry_out(config, bundle, connection, log=None)


def _who() -> str:
    """The user and the machine that run this command, as user@machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        user = "?"
    return f"{user}@{platform.node()}"


def check_server(server: str, ca: Path | None) -> float:
    """Check that a server is there and has a certificate of the authority, or without `ca` that it uses plain HTTP.

    Args:
        server: address of the server, HOST:PORT.
        ca: certificate of the authority; None for a server without TLS.

    Returns:
        A lower bound for the seconds by which this machine's clock is ahead of the server's (below 0: behind); 0 if
        the server does not tell its time.

    Raises:
        NotThere: nothing answers at this address.
        RunError: the certificate does not pass, or the server uses the other of TLS and plain HTTP.
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
            f"no server answers at {server} ({error}); start the server, or check address and firewall"
        ) from None


class NotThere(RunError):
    """No server listens at this address, at least not yet."""


def _asking(host: str, port: int, context: ssl.SSLContext | None) -> http.client.HTTPConnection:
    """A connection to a server. With TLS it respects HTTPS_PROXY and NO_PROXY, as Flower's own connections do."""
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
    """Seconds by which this clock is at least ahead of one that showed `told` (in whole seconds) in this period."""
    try:
        there = parsedate_to_datetime(told).timestamp()
    except (ValueError, TypeError):
        return 0.0
    most, least = ended - there, began - there - 1.0
    return least if least > 0 else most if most < 0 else 0.0


def check_clock(ahead: float, server: str) -> None:
    """Check that the clocks agree well enough; otherwise Flower's server refuses everything that a node signs.

    Args:
        ahead: seconds by which this machine's clock is ahead of the server's.
        server: address of the server, HOST:PORT.

    Raises:
        RunError: they do not.
    """
    if -_BEHIND_SECONDS < ahead < SYSTEM_TIME_TOLERANCE:
        return
    seconds = abs(ahead)
    size = next(f"{seconds / unit:.{seconds < 20:d}f} {name}" for unit, name in _UNITS if seconds >= 2 * unit)
    raise RunError(
        f"this machine's clock is {size} {'ahead of' if ahead > 0 else 'behind'} that of the server at {server}, which "
        f"refuses nodes that are more than {SYSTEM_TIME_TOLERANCE} s ahead or {_BEHIND_SECONDS} s behind; set the "
        "clock that is wrong (NTP), and start the node again"
    )


def exactly_ahead(ahead: float, server: str, ca: Path | None) -> float:
    """`ahead`, measured more exactly if it is near a limit, since a server tells its time in whole seconds."""
    if min(abs(ahead - SYSTEM_TIME_TOLERANCE), abs(ahead + _BEHIND_SECONDS)) > _COARSE_SECONDS:
        return ahead
    found = [ahead]
    for _ in range(12):  # within a second, one of these questions comes just when the server's second changes
        time.sleep(0.09)
        found.append(check_server(server, ca))
    return max(found, key=abs)


def check_dates(certificate: Path) -> None:
    """Raise ConfigError if a certificate is not valid now, before a connection fails because of it."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError):
        return  # a file that is not a certificate is reported where it is used
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
        f"{certificate}: the certificate {what}, but this machine's clock says {now:%Y-%m-%d %H:%M} UTC; {fix}, "
        "or set the clock if it is wrong"
    )


def trusting(ca: Path) -> ssl.SSLContext:
    """Settings of a TLS client that trusts only this authority.

    Raises:
        ConfigError: the file has no certificate.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{ca}: holds no certificate in PEM format; expected the ca.crt of fedlora certs") from None


@contextmanager
def connected(server: str, ca: Path | None, insecure: bool) -> Iterator[Connection]:
    """A connection of `flwr` to a server, after a check that the server is there."""
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
    """The absolute path of a file, after a check that it exists.

    Args:
        path: the path that was given with the option; None if the option was left out.
        option: name of the option, for error messages.
        what: the file that is expected, for error messages.

    Raises:
        ConfigError: the option was left out, or there is no such file.
    """
    if path is None:
        raise ConfigError(f"{option}: expected {what}, or --insecure for neither TLS nor keys")
    whole = path.expanduser().resolve()
    if not whole.is_file():
        raise ConfigError(f"{option} {path}: no such file; expected {what}")
    return whole
