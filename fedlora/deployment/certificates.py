"""Certificates and keys of a federation: its own authority, the server's TLS certificate, the nodes' key pairs."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.common.errors import ConfigError

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"
_LOCAL_NAMES, _LOCAL_IPS = ("localhost",), ("127.0.0.1",)
_CLOCK_SKEW = timedelta(hours=1)  # a machine whose clock runs a little behind accepts a fresh certificate too
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_TAKEN = {Path(name).stem for name in (CA, SERVER)}


def make(
    folder: Path,
    names: Sequence[str] = (),
    ips: Sequence[str] = (),
    nodes: Sequence[str] = (),
    *,
    days: int = 825,
    authority_days: int = 3650,
) -> list[Path]:
    """Write the certificates and keys of a federation; return the files, in this order.

    `ca.crt`, `ca.key`: a certificate authority for this federation alone. `server.pem`, `server.key`: the server's
    certificate, signed by the authority, and its key. `<node>`, `<node>.pub`: a key pair for each node, in OpenSSH's
    format. In a folder that already has an authority, only key pairs may be added.

    Args:
        folder: folder for the files; made if it is missing.
        names: DNS names under which nodes reach the server; `localhost` is always included.
        ips: addresses under which nodes reach the server; `127.0.0.1` is always included.
        nodes: names of the nodes' key pairs.
        days: days for which the server's certificate is valid; 825 is the largest number that Apple's TLS accepts.
        authority_days: days for which the authority's certificate is valid, during which it can sign several server
            certificates.

    Raises:
        ConfigError: a file exists already, or a name or an address is not valid.
    """
    _check_names(nodes)
    sans = _alternative_names(names, ips)
    known = (folder / CA).exists()
    if known and (names or ips or not nodes):
        raise ConfigError(
            f"{folder / CA} exists already and is not overwritten; choose another folder, or only add nodes to this one"
        )
    wanted = [] if known else [CA, CA_KEY, SERVER, SERVER_KEY]
    wanted += [name for node in nodes for name in (node, f"{node}.pub")]
    _check_free(folder / name for name in wanted)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not known:
            _write_authority_and_server(folder, sans, timedelta(days=days), timedelta(days=authority_days))
        for node in nodes:
            _write_node(folder, node)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from None
    return [folder / name for name in wanted]


def renew(folder: Path, names: Sequence[str] = (), ips: Sequence[str] = (), days: int = 825) -> list[Path]:
    """Write a new certificate and key of the server, signed by the authority that nodes know; return the files.

    The earlier files become `server.pem.old` and `server.key.old`. Nodes keep their `ca.crt`.

    Args:
        folder: folder with `ca.crt` and `ca.key`.
        names: DNS names of the server. If `names` and `ips` are left out, those of the earlier certificate are used.
        ips: addresses of the server.
        days: days for which the new certificate is valid.

    Raises:
        ConfigError: the authority is missing or damaged, or expires before the new certificate would.
    """
    for name in (CA, CA_KEY):
        if not (folder / name).is_file():
            raise ConfigError(f"--renew: {folder / name} is not here; put back what `fedlora certs` wrote, then renew")
    check_private(folder / CA_KEY)
    try:
        authority = x509.load_pem_x509_certificate((folder / CA).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--renew: {folder / CA} and {CA_KEY} cannot be read: {error}") from None
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise ConfigError(f"--renew: {folder / CA_KEY} is not the key of {CA}; put back what `fedlora certs` wrote")
    if authority.not_valid_after_utc < datetime.now(UTC) + timedelta(days=days):
        raise ConfigError(
            f"--renew: the authority {folder / CA} is valid until {authority.not_valid_after_utc:%Y-%m-%d}, less than "
            f"{days} days; make a new folder, and give every node its ca.crt"
        )
    sans = _alternative_names(names, ips) if names or ips else _names_of(folder / SERVER)
    own = ec.generate_private_key(ec.SECP384R1())
    certificate = _server(authority.subject, key, own, sans, timedelta(days=days))
    try:
        for name, content, mode in (
            (SERVER_KEY, _private(own, serialization.PrivateFormat.PKCS8), 0o600),
            (SERVER, certificate.public_bytes(serialization.Encoding.PEM), 0o644),
        ):
            new = folder / f".{name}.new"
            new.unlink(missing_ok=True)
            _write(new, content, mode)
            if (folder / name).exists():
                (folder / name).replace(folder / f"{name}.old")
            new.replace(folder / name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from None
    return [folder / SERVER, folder / SERVER_KEY]


def make_key(path: Path) -> str:
    """Write a node's key pair, `path` and `path`.pub, in OpenSSH's format; return its fingerprint.

    Raises:
        ConfigError: a file exists already, or cannot be written.
    """
    _check_names([path.name])
    _check_free((path, path.with_name(f"{path.name}.pub")))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        return fingerprint(_write_node(path.parent, path.name))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from None


def fingerprint(key: object) -> str:
    """The fingerprint of a public key, as `ssh-keygen -l` shows it."""
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)  # pyright: ignore[reportAttributeAccessIssue]
    digest = hashlib.sha256(base64.b64decode(text.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def check_private(path: Path) -> None:
    """Raise ConfigError if other users of this machine may read a private key."""
    if os.name == "posix" and (mode := path.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(
            f"{path}: other users may read this private key (mode {mode:04o}); make it yours alone: chmod 600 {path}"
        )


def numbered(nodes: str) -> list[str]:
    """The names of nodes: `"3"` gives node0, node1, node2; `"north,south"` gives these names."""
    if nodes.strip().isdigit():
        return [f"node{i}" for i in range(int(nodes))]
    return [name.strip() for name in nodes.split(",") if name.strip()]


def _write_authority_and_server(
    folder: Path, sans: Iterable[x509.GeneralName], lifetime: timedelta, authority_lifetime: timedelta
) -> None:
    key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA federation authority")])
    ca = (
        _certificate(authority, authority, key, authority_lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    certificate = _server(authority, key, server_key, sans, lifetime)
    _write(folder / CA, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / CA_KEY, _private(key, serialization.PrivateFormat.PKCS8), 0o600)
    _write(folder / SERVER, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / SERVER_KEY, _private(server_key, serialization.PrivateFormat.PKCS8), 0o600)


def _server(
    authority: x509.Name,
    signing: EllipticCurvePrivateKey,
    key: EllipticCurvePrivateKey,
    sans: Iterable[x509.GeneralName],
    lifetime: timedelta,
) -> x509.Certificate:
    """The server's certificate, signed by the authority."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA server")])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
    return (
        _certificate(subject, authority, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .sign(signing, hashes.SHA384())
    )


def _names_of(certificate: Path) -> list[x509.GeneralName]:
    """The names and addresses for which a certificate is valid."""
    try:
        known = x509.load_pem_x509_certificate(certificate.read_bytes())
        return list(known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        raise ConfigError(
            f"--renew: {certificate} does not contain the server's names: {error}; give them as --server-name and --ip"
        ) from None


def _write_node(folder: Path, name: str) -> ec.EllipticCurvePublicKey:
    """Write a key pair of the kind that Flower's node authentication needs; return the public key."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / name, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    _write(folder / f"{name}.pub", public + f" {name}\n".encode(), 0o644)
    return key.public_key()


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + lifetime)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a new file, with this mode from the beginning; an existing file is an error."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _check_free(files: Iterable[Path]) -> None:
    for file in files:
        if os.path.lexists(file):
            raise ConfigError(f"{file} exists already and is not overwritten; choose another name")


def _check_names(nodes: Sequence[str]) -> None:
    for name in nodes:
        if not _NAME.fullmatch(name) or name in {CA, CA_KEY, SERVER, SERVER_KEY, *_TAKEN} or name.endswith(".pub"):
            raise ConfigError(
                f"--nodes: {name!r} cannot be a node key's name, expected letters, digits, - and _, such as north"
            )
    if len({*nodes}) < len(nodes):
        raise ConfigError(f"--nodes: {', '.join(nodes)} names a node twice")


def _alternative_names(names: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    """The names and then the addresses for which the certificate is to be valid, each once."""
    found: dict[x509.GeneralName, None] = {}
    for name in (*names, *_LOCAL_NAMES):
        if not re.fullmatch(r"(\*\.)?" + _NAME.pattern, name) or name.replace(".", "").isdigit():
            raise ConfigError(f"--server-name: {name!r} is not a DNS name; give an address as --ip")
        found[x509.DNSName(name)] = None
    for ip in (*ips, *_LOCAL_IPS):
        try:
            found[x509.IPAddress(ipaddress.ip_address(ip))] = None
        except ValueError:
            raise ConfigError(f"--ip: {ip!r} is not an IP address such as 10.0.0.7") from None
    return list(found)
