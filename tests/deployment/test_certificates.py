"""Certificates and keys: what OpenSSL and Flower accept, never readable for others, never over a file."""

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedlora.common.errors import ConfigError
from fedlora.deployment import certificates


def test_the_server_certificate_names_what_was_asked_for(tmp_path):
    certificates.make(tmp_path / "certs", ["fed.example.org"], ["10.0.0.7", "fd00::7"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "certs" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
    wanted = ["10.0.0.7", "fd00::7", "127.0.0.1"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address(ip) for ip in wanted]


def shakes_hands(certs, ca, name):
    """A TLS handshake of OpenSSL's, as a client that checks `name` against `ca`."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certs / "server.pem", certs / "server.key")
    ours, theirs = socket.socketpair()

    def serve():
        try:
            serving.wrap_socket(theirs, server_side=True).close()
        except ssl.SSLError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        asking = ssl.create_default_context(cafile=ca)
        asking.verify_flags |= ssl.VERIFY_X509_STRICT
        with asking.wrap_socket(ours, server_hostname=name):
            return True
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "fed.example.org", "10.0.0.7"])
def test_a_client_that_checks_strictly_trusts_the_server(tmp_path, name):
    certificates.make(tmp_path / "certs", ["fed.example.org"], ["10.0.0.7"])
    assert shakes_hands(tmp_path / "certs", tmp_path / "certs" / "ca.crt", name)


def test_another_authority_and_another_name_are_not_trusted(tmp_path):
    for folder in ("certs", "other"):
        certificates.make(tmp_path / folder)
    with pytest.raises(ssl.SSLCertVerificationError, match="issuer"):
        shakes_hands(tmp_path / "certs", tmp_path / "other" / "ca.crt", "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shakes_hands(tmp_path / "certs", tmp_path / "certs" / "ca.crt", "fed.example.org")


def test_node_keys_are_pairs_of_the_kind_that_flower_asks_for(tmp_path):
    certificates.make(tmp_path, nodes=["north", "south"])
    publics = []
    for name in ("north", "south"):
        private = load_ssh_private_key((tmp_path / name).read_bytes(), None)
        public = load_ssh_public_key((tmp_path / f"{name}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(private.curve, ec.SECP384R1)
        assert private.public_key() == public
        publics.append(public)
    assert publics[0] != publics[1]


def test_private_keys_are_for_their_owner_alone(tmp_path):
    files = certificates.make(tmp_path / "certs", nodes=["north"])
    modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    assert {name for name, mode in modes.items() if mode == 0o600} == {"ca.key", "server.key", "north"}
    assert {name for name, mode in modes.items() if mode & 0o077 and mode & 0o022 == 0} == {
        "ca.crt",
        "server.pem",
        "north.pub",
    }


def test_nothing_is_overwritten_and_nodes_can_be_added(tmp_path):
    before = {path: path.read_bytes() for path in certificates.make(tmp_path, nodes=["north"])}
    with pytest.raises(ConfigError, match="exists already"):
        certificates.make(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        certificates.make(tmp_path, ["fed.example.org"], nodes=["south"])
    with pytest.raises(ConfigError, match="north exists already"):
        certificates.make(tmp_path, nodes=["south", "north"])
    assert not (tmp_path / "south").exists()
    assert certificates.make(tmp_path, nodes=["south"]) == [tmp_path / "south", tmp_path / "south.pub"]
    assert {path: path.read_bytes() for path in before} == before


def test_a_stray_file_is_not_overwritten_either(tmp_path):
    (tmp_path / "server.key").write_text("mine")
    with pytest.raises(ConfigError, match=r"server\.key exists already"):
        certificates.make(tmp_path)
    assert (tmp_path / "server.key").read_text() == "mine"
    assert not (tmp_path / "ca.crt").exists()


@pytest.mark.parametrize("nodes", [["../north"], [""], ["ca"], ["server.key"], ["a", "a"], ["a.pub"], ["-a"]])
def test_a_name_that_cannot_be_a_key_is_refused(tmp_path, nodes):
    with pytest.raises(ConfigError, match="--nodes"):
        certificates.make(tmp_path / "certs", nodes=nodes)
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize(
    ("names", "ips"), [(["10.0.0.7"], []), (["a b"], []), ([], ["fed.example.org"]), ([], ["10.0.0"])]
)
def test_a_name_is_a_name_and_an_address_an_address(tmp_path, names, ips):
    with pytest.raises(ConfigError, match=r"--(server-name|ip):"):
        certificates.make(tmp_path / "certs", names, ips)


def test_a_number_or_names():
    assert certificates.numbered("3") == ["node0", "node1", "node2"]
    assert certificates.numbered("north, south") == ["north", "south"]
    assert certificates.numbered("") == []


def test_a_renewed_certificate_is_trusted_by_nodes_that_know_the_authority(tmp_path):
    certs = tmp_path / "certs"
    certificates.make(certs, ["fed.example.org"], ["10.0.0.7"], days=1)
    before = (certs / "server.pem").read_bytes(), (certs / "server.key").read_bytes()
    authority = (certs / "ca.crt").read_bytes()
    assert certificates.renew(certs) == [certs / "server.pem", certs / "server.key"]
    assert shakes_hands(certs, certs / "ca.crt", "fed.example.org")
    assert shakes_hands(certs, certs / "ca.crt", "10.0.0.7")
    after = (certs / "server.pem").read_bytes(), (certs / "server.key").read_bytes()
    assert not {*before} & {*after}
    assert ((certs / "server.pem.old").read_bytes(), (certs / "server.key.old").read_bytes()) == before
    assert (certs / "ca.crt").read_bytes() == authority
    assert (certs / "server.key").stat().st_mode & 0o777 == 0o600
    old, new = (x509.load_pem_x509_certificate(each[0]) for each in (before, after))
    assert (new.not_valid_after_utc - old.not_valid_after_utc).days >= 820
    certificates.renew(certs, names=["new.example.org"])
    assert shakes_hands(certs, certs / "ca.crt", "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shakes_hands(certs, certs / "ca.crt", "fed.example.org")


def test_what_cannot_be_renewed_is_one_sentence_and_changes_nothing(tmp_path):
    certs = tmp_path / "certs"
    certificates.make(certs)
    before = {path.name: path.read_bytes() for path in certs.iterdir()}
    with pytest.raises(ConfigError, match=r"--renew: the authority .* is valid until"):
        certificates.renew(certs, days=4000)
    certificates.make(tmp_path / "other")
    (certs / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"ca\.key is not the key of ca\.crt"):
        certificates.renew(certs)
    (certs / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match=r"other users may read this private key \(mode 0644\).*chmod 600"):
        certificates.renew(certs)
    (certs / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"--renew: .*ca\.key is not here"):
        certificates.renew(certs)
    assert {path.name: path.read_bytes() for path in certs.iterdir()} | {"ca.key": before["ca.key"]} == before


def test_a_node_makes_its_own_key(tmp_path):
    said = certificates.make_key(tmp_path / "keys" / "north")
    private = load_ssh_private_key((tmp_path / "keys" / "north").read_bytes(), None)
    public = load_ssh_public_key((tmp_path / "keys" / "north.pub").read_bytes())
    assert private.public_key() == public
    assert isinstance(public.curve, ec.SECP384R1)
    certificates.check_private(tmp_path / "keys" / "north")
    assert said == certificates.fingerprint(public)
    if shutil.which("ssh-keygen"):
        shown = subprocess.run(["ssh-keygen", "-lf", tmp_path / "keys" / "north.pub"], capture_output=True, check=True)
        assert said == shown.stdout.decode().split()[1]
    with pytest.raises(ConfigError, match="exists already and is not overwritten"):
        certificates.make_key(tmp_path / "keys" / "north")
