"""Certificates and keys of a federation: its own authority, the server's TLS certificate, the nodes' key pairs."""

from __future__ import annotations

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

from fedlora.errors import ConfigError

CA, CA_KEY, SERVER, SERVER_KEY = "ca.crt", "ca.key", "server.pem", "server.key"
_LOCAL_NAMES, _LOCAL_IPS = ("localhost",), ("127.0.0.1",)
_CLOCK_SKEW = timedelta(hours=1)  # a machine whose clock runs a little behind accepts a fresh certificate too
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_TAKEN = {Path(name).stem for name in (CA, SERVER)}


def make(
    folder: Path, names: Sequence[str] = (), ips: Sequence[str] = (), nodes: Sequence[str] = (), days: int = 825
) -> list[Path]:
    """Write what a federation needs to talk over TLS and to know its nodes; returns the files, in this order.

    `ca.crt`, `ca.key`: a certificate authority for this federation alone. `server.pem`, `server.key`: the server's
    certificate, signed by it. `<node>`, `<node>.pub`: a key pair for each node, in OpenSSH's format. In a folder
    that has an authority already, only nodes may be added.

    Args:
        folder: made when it is missing.
        names: DNS names under which nodes reach the server; `localhost` is always among them.
        ips: addresses under which nodes reach the server; `127.0.0.1` is always among them.
        nodes: names of the key pairs.
        days: how long the certificates hold. 825 is the longest that Apple's TLS accepts.

    Raises:
        ConfigError: a file exists already, or a name or an address is none.
    """
    _check_names(nodes)
    sans = _alternative_names(names, ips)
    known = (folder / CA).exists()
    if known and (names or ips or not nodes):
        raise ConfigError(
            f"{folder / CA} exists already, and nothing is overwritten; choose another folder, or only add nodes to it"
        )
    wanted = [] if known else [CA, CA_KEY, SERVER, SERVER_KEY]
    wanted += [name for node in nodes for name in (node, f"{node}.pub")]
    for name in wanted:
        if os.path.lexists(folder / name):
            raise ConfigError(f"{folder / name} exists already, and nothing is overwritten; choose another name")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not known:
            _write_authority_and_server(folder, sans, timedelta(days=days))
        for node in nodes:
            _write_node(folder, node)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from None
    return [folder / name for name in wanted]


def numbered(nodes: str) -> list[str]:
    """`"3"` as node0, node1, node2; `"north,south"` as these names."""
    if nodes.strip().isdigit():
        return [f"node{i}" for i in range(int(nodes))]
    return [name.strip() for name in nodes.split(",") if name.strip()]


def _write_authority_and_server(folder: Path, sans: Iterable[x509.GeneralName], lifetime: timedelta) -> None:
    key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA federation authority")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedLoRA server")])
    identity = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    ca = (
        _certificate(authority, authority, key, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identity, critical=False)
        .sign(key, hashes.SHA384())
    )
    certificate = (
        _certificate(server, authority, server_key, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server_key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identity), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write(folder / CA, ca.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / CA_KEY, _private(key, serialization.PrivateFormat.PKCS8), 0o600)
    _write(folder / SERVER, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _write(folder / SERVER_KEY, _private(server_key, serialization.PrivateFormat.PKCS8), 0o600)


def _write_node(folder: Path, name: str) -> None:
    """A key pair of the kind that Flower's node authentication asks for."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / name, _private(key, serialization.PrivateFormat.OpenSSH), 0o600)
    _write(folder / f"{name}.pub", public + f" {name}\n".encode(), 0o644)


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
    """Never over an existing file, and never readable for others first."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)


def _check_names(nodes: Sequence[str]) -> None:
    for name in nodes:
        if not _NAME.fullmatch(name) or name in {CA, CA_KEY, SERVER, SERVER_KEY, *_TAKEN} or name.endswith(".pub"):
            raise ConfigError(
                f"--nodes: {name!r} is no name for a node's key, expected letters, digits, - and _, such as north"
            )
    if len({*nodes}) < len(nodes):
        raise ConfigError(f"--nodes: {', '.join(nodes)} names a node twice")


def _alternative_names(names: Sequence[str], ips: Sequence[str]) -> list[x509.GeneralName]:
    """What the certificate is good for, each once: names first, then addresses."""
    found: dict[x509.GeneralName, None] = {}
    for name in (*names, *_LOCAL_NAMES):
        if not re.fullmatch(r"(\*\.)?" + _NAME.pattern, name) or name.replace(".", "").isdigit():
            raise ConfigError(f"--server-name: {name!r} is no DNS name; give an address as --ip")
        found[x509.DNSName(name)] = None
    for ip in (*ips, *_LOCAL_IPS):
        try:
            found[x509.IPAddress(ipaddress.ip_address(ip))] = None
        except ValueError:
            raise ConfigError(f"--ip: {ip!r} is no IP address, expected such as 10.0.0.7") from None
    return list(found)
