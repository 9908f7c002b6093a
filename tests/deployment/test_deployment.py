"""What is checked before any of Flower's programs starts, and the examples beside the guide."""

import http.client
import os
import re
import select
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import typer
import yaml

from fedlora.cli import main
from fedlora.common import processes
from fedlora.common.errors import ConfigError, DataError, RunError
from fedlora.deployment import certificates, connection, flower_programs, watched
from fedlora.deployment import node as nodes_program
from fedlora.deployment import server as servers_program

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def certs(tmp_path):
    certificates.make(tmp_path / "certs", nodes=["north"])
    return tmp_path / "certs"


@pytest.mark.parametrize("server", ["fed.example.org", "http://fed:9092", "fed:", ":9092", "fed:99999"])
def test_an_address_is_host_and_port(server, certs):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        connection.check_server(server, certs / "ca.crt")


def test_the_file_of_trusted_entities_goes_to_flowers_node(tmp_path, certs, monkeypatch):
    asked: list[list[str]] = []

    def program(self, command, more=None):
        asked.append([*command])
        raise RunError("enough")

    monkeypatch.setattr(watched.Programs, "start", program)
    monkeypatch.setattr(nodes_program, "_wait_for", lambda *_: 0.0)
    trusted, ca, key = tmp_path / "trusted.yaml", certs / "ca.crt", certs / "north"

    def join():
        nodes_program.join("127.0.0.1:9", ca, key, node_config={}, state=tmp_path / "state", trusted_entities=trusted)

    with pytest.raises(ConfigError, match=r"--trusted-entities .*trusted\.yaml: no such file"):
        join()
    trusted.write_text("fpk_1: ssh-ed25519 AAAA\n")
    with pytest.raises(RunError, match="enough"):
        join()
    place = asked[0].index("--trusted-entities")
    assert asked[0][place + 1] == str(trusted)


def test_a_missing_file_is_named(tmp_path, certs):
    (certs / "server.pem").unlink()
    with pytest.raises(ConfigError, match=r"--certs .*server\.pem: no such file"):
        servers_program.serve(certs, host="127.0.0.1", port=9092, state=tmp_path / "state")
    with pytest.raises(ConfigError, match="--certs: expected the folder"):
        servers_program.serve(None, host="127.0.0.1", port=9092, state=tmp_path / "state")
    for ca, key, says in [
        (None, certs / "north", r"--ca: expected ca\.crt, or --insecure"),
        (certs / "ca.crt", None, "--key: expected"),
        (certs / "ca.crt", certs / "nobody", "--key .*nobody: no such file"),
    ]:
        with pytest.raises(ConfigError, match=says):
            nodes_program.join("127.0.0.1:9092", ca, key, node_config={}, state=tmp_path / "state")
    with pytest.raises(DataError, match=r"--data .*rows\.jsonl: no such file"):
        nodes_program.data_file(tmp_path / "rows.jsonl")
    assert not (tmp_path / "state").exists()


def test_a_server_that_is_not_there_and_one_without_tls(certs):
    with pytest.raises(RunError, match="no server answers at"):
        connection.check_server(f"127.0.0.1:{processes.free_port()}", certs / "ca.crt")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(RunError, match="does not speak TLS"):
            connection.check_server(address, certs / "ca.crt")
        with pytest.raises(ConfigError, match="holds no certificate in PEM format"):
            connection.check_server(address, certs / "north")
        connection.check_server(address, None)
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{server.server_port}: Address already in use"):
            servers_program.serve(certs, host="127.0.0.1", port=server.server_port, state=certs / "state")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy():
    """A proxy on this machine that tunnels for who knows its password: `(port, the targets that were asked for)`."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            asked.append(self.path)
            if self.headers["Proxy-Authorization"] != "Basic bWU6YSBzZWNyZXQ=":
                return self.send_error(407)
            host, port = self.path.rsplit(":", 1)
            self.send_response_only(200)
            self.end_headers()
            with socket.create_connection((host, int(port))) as there:
                ends = {self.connection: there, there: self.connection}
                while ready := select.select([*ends], [], [], 5)[0]:
                    for one in ready:
                        if not (data := one.recv(65536)):
                            return None
                        ends[one].sendall(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_is_reached_through_the_proxy_of_the_environment(certs, proxy, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    port, asked = proxy
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server.pem", certs / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:a%20secret@127.0.0.1:{port}")
        connection.check_server(address, certs / "ca.crt")
        assert asked == [address]
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        connection.check_server(address, certs / "ca.crt")
        assert asked == [address]
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        with pytest.raises(RunError, match=r"no server answers at .*407"):
            connection.check_server(address, certs / "ca.crt")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def clock():
    """A server on this machine, plain HTTP, whose clock is so many seconds ahead: `(address, ahead)`."""
    ahead = [0.0]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(200)
            self.send_header("Date", self.date_time_string(time.time() + ahead[0]))
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", ahead
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("there", "says"),
    [
        (-3600, "clock is 3[56]\\d\\d s ahead of that of the server"),
        (-10, r"clock is [\d.]+ s ahead of"),
        (-5.4, r"clock is 5\.[34] s ahead of"),
        (305.6, r"clock is 30[56] s behind that of"),
        (400, r"clock is [34]\d\d s behind that of the server"),
        (-10 * 365 * 86400, r"clock is 36\d\d days ahead of"),
    ],
)
def test_a_clock_that_is_off_is_named_before_flowers_node_starts(tmp_path, monkeypatch, clock, there, says):
    address, ahead = clock
    ahead[0] = there
    monkeypatch.setattr(nodes_program, "Programs", lambda *_: pytest.fail("Flower's node was started"))
    with pytest.raises(RunError, match=f"{says}.*more than 5 s ahead or 305 s behind; set the clock"):
        nodes_program.join(address, None, None, node_config={}, state=tmp_path / "state", insecure=True)


@pytest.mark.parametrize("there", [0, 3, -3, 200, -4.6, 304.4])
def test_clocks_may_differ_a_little(clock, there):
    address, ahead = clock
    ahead[0] = there
    off = connection.check_server(address, None)
    assert abs(off + there) <= 2.0
    connection.check_clock(connection.exactly_ahead(off, address, None), address)


def test_a_node_whose_signature_is_refused_says_so(tmp_path, monkeypatch, clock):
    """All that Flower's node says is that it finished."""

    class Programs:
        log = tmp_path / "node.log"

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def start(self, command, more=None):
            return SimpleNamespace(poll=lambda: 0)

        def wait(self, meanwhile=None):
            return "flower-supernode", "INFO: Finished server process [42]"

    monkeypatch.setattr(nodes_program, "Programs", Programs)
    with pytest.raises(RunError, match="no longer accepts what this node signs: its key is no longer registered"):
        nodes_program.join(clock[0], None, None, node_config={}, state=tmp_path / "state", insecure=True)


def test_an_expired_certificate_is_named_at_once(tmp_path, monkeypatch):
    certificates.make(tmp_path / "old", nodes=["north"], days=0, authority_days=0)
    old = tmp_path / "old"
    says = r"old/ca\.crt: the certificate expired on \d{4}-.* UTC, but this machine's clock says .*; make new ones"
    with pytest.raises(ConfigError, match=says):
        servers_program.serve(old, host="127.0.0.1", port=9092, state=tmp_path / "state")
    with pytest.raises(ConfigError, match=says):
        nodes_program.join("127.0.0.1:9", old / "ca.crt", old / "north", node_config={}, state=tmp_path / "state")
    with pytest.raises(ConfigError, match=says), connection.connected("127.0.0.1:9", old / "ca.crt", insecure=False):
        pass
    assert not (tmp_path / "state").exists()
    certificates.make(tmp_path / "new", nodes=["north"])
    connection.check_dates(tmp_path / "new" / "server.pem")

    class Early(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2001, 1, 1, tzinfo=tz)

    monkeypatch.setattr(connection, "datetime", Early)
    with pytest.raises(ConfigError, match=r"server\.pem: the certificate is not valid before 20.*set the clock"):
        connection.check_dates(tmp_path / "new" / "server.pem")


def test_a_server_that_tells_no_time_is_taken():
    assert connection._ahead("", 0.0, 1.0) == connection._ahead("soon", 0.0, 1.0) == 0.0


def test_a_certificate_of_another_time_asks_for_the_clock(certs, monkeypatch):
    error = ssl.SSLCertVerificationError(1, "no")
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(http.client.HTTPSConnection, "request", refuse)
    with pytest.raises(
        RunError, match=r"is not yet valid; this machine's clock says \d{4}-.* UTC: set it if it is wrong"
    ):
        connection.check_server("127.0.0.1:1", certs / "ca.crt")


def test_what_flower_says_is_found_in_its_log():
    ended = (
        "\x1b[92mINFO \x1b[0m: Starting Flower SuperNode\n\x1b[91mERROR \x1b[0m:     Exit Code: 305\n"
        "Failed to initialize the connection to the SuperLink.\n[code: 2004] Failed to activate SuperNode.\n"
        "The SuperNode could not establish a connection to the SuperLink.\n\n"
        "For more information, visit: <x>\nINFO: Shutting down\n"
    )
    assert flower_programs.reason_of(ended) == (
        "Failed to initialize the connection to the SuperLink. [code: 2004] Failed to activate SuperNode."
    )
    assert flower_programs.reason_of("a line\nthe last\n\n") == "the last"


@pytest.mark.skipif(os.name != "posix", reason="no Unix sockets")
def test_a_workers_socket_has_a_path_that_the_system_takes(tmp_path, monkeypatch):
    far = tmp_path / ("x" * 90)
    far.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    with nodes_program._worker(True) as settings:
        socket = Path(str(settings["worker"]))
        assert len(str(socket)) < 100
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        assert settings["node-pid"] == os.getpid()
    assert not socket.parent.exists()
    with nodes_program._worker(False) as settings:
        assert settings == {}


def commands(text: str) -> list[str]:
    """Every `fedlora …` command of a text, continued lines joined."""
    joined = text.replace("\\\n", " ").replace("…", " ")
    return re.findall(
        r"^\s*(?:exec |ExecStart=)?(?:\S*/)?(fedlora (?:certs|server|register|node|run) .+)$", joined, re.M
    )


@pytest.mark.parametrize(
    "path", [ROOT / "docs" / "deployment.md", *sorted(EXAMPLES.glob("*.s*"))], ids=lambda path: path.name
)
def test_every_command_shown_has_the_options_it_uses(path):
    found = commands(path.read_text(encoding="utf-8"))
    assert found
    group = typer.main.get_command(main.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    for line in found:
        name, *rest = shlex.split(line)[1:]
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in rest if re.match(r"--?[a-z]", word)} <= known, line


def test_the_containers_commands_have_the_options_they_use():
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))["services"]
    group = typer.main.get_command(main.app)
    for service in services.values():
        name, *rest = service["command"]
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in rest if re.match(r"--?[a-z]", word)} <= known, name
    assert {services[name]["command"][0] for name in services} == {"certs", "server", "register", "node", "run"}


def test_the_image_is_made_of_what_is_there():
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = project["tool"]["setuptools"]["package-dir"].values()
    assert {"fedlora", *(folder.split("/")[0] for folder in folders)} <= {*sources}
    assert "metrics" in project["project"]["optional-dependencies"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd's own check is not installed")
@pytest.mark.parametrize("name", ["fedlora-server.service", "fedlora-node@.service"])
def test_systemd_takes_the_units_and_finds_them_hardened(tmp_path, name):
    unit = tmp_path / name
    here = Path(sys.executable).with_name("fedlora")
    unit.write_text((EXAMPLES / name).read_text(encoding="utf-8").replace("/opt/fedlora/bin/fedlora", str(here)))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, "")
    found = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]  # tenths; 0 is the best
    rated = subprocess.run(found, capture_output=True, text=True, check=False)
    assert rated.returncode == 0, rated.stdout


def test_the_slurm_script_is_a_script():
    subprocess.run(["bash", "-n", str(EXAMPLES / "nodes.sbatch")], check=True)
