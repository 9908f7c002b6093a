"""Nodes of a real server behind the proxy of the guide: they train, come and go, and cannot reach its control."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from urllib.request import urlopen

import pytest

from fedlora.common.processes import free_port
from tests.deployment.programs import begun, called, kept_running, make_site, write_run
from tests.deployment.test_deployment import EXAMPLES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed"),
]


def test_nodes_behind_a_proxy_train_and_cannot_control(tmp_path, tiny_llama):
    site = make_site(tmp_path)
    folder, environment = site
    near, port, metrics = environment["PORT"], free_port(), free_port()
    environment["PROXY"] = f"127.0.0.1:{port}"
    text = (EXAMPLES / "nginx.conf").read_text(encoding="utf-8")
    (folder / "nginx.conf").write_text(text.replace("listen 9093", f"listen {port}").replace(":9092;", f":{near};"))

    def play(number: str) -> dict:
        run = write_run(site, tiny_llama, number)
        done = called(f"fedlora run {number}.toml --server $SERVER --ca certs/ca.crt", site)
        assert done.returncode == 0, done.stderr + done.stdout
        return json.loads((run / "result.json").read_text())

    def nodes() -> str:
        shown = called("fedlora nodes --server $SERVER --ca certs/ca.crt", site)
        assert shown.returncode == 0, shown.stderr
        return shown.stdout

    for command in ("certs certs --server-name fed.example.org", "key keys/north", "key keys/later"):
        assert called(f"fedlora {command}", site).returncode == 0
    joins = "fedlora node --server $PROXY --ca certs/ca.crt --partition-id 0"
    with ExitStack() as stack:
        serves = f"fedlora server --certs certs --port $PORT --state state/server --metrics-port {metrics}"
        stack.enter_context(begun(serves, site, "server: listening on"))
        proxy = subprocess.Popen(["nginx", "-p", str(folder), "-c", "nginx.conf"], env=environment)
        stack.callback(proxy.wait, 30)
        stack.callback(proxy.terminate)

        assert (
            "registered as north"
            in called("fedlora register keys/north.pub --server $SERVER --ca certs/ca.crt", site).stdout
        )
        with kept_running(f"{joins} --key keys/north --state state/north", site, "node: started for the server"):
            assert list(play("first")["rounds"][0]["clients"]) == ["0"]
            assert "online" in nodes()
            told = urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=10).read().decode()
            assert "\nfedlora_round 1.0" in told
            assert 'fedlora_events_total{event="run-ended"} 1.0' in told
            for command in ("nodes", "register keys/later.pub", "unregister north"):
                refused = called(f"fedlora {command} --server $PROXY --ca certs/ca.crt", site)
                assert refused.returncode == 1
                assert "refuses this (403 Forbidden); a proxy before it may keep this to" in refused.stderr
            refused = called("fedlora run first.toml --server $PROXY --ca certs/ca.crt", site)
            assert refused.returncode == 1
            assert "403" in refused.stderr

        # the key is replaced: the new one has the node's name, and its client; the old one is out for good
        done = called("fedlora register keys/later.pub --replaces north --server $SERVER --ca certs/ca.crt", site)
        assert "later.pub: registered as north, node" in done.stdout, done.stderr
        again = called("fedlora register keys/north.pub --server $SERVER --ca certs/ca.crt", site)
        assert again.returncode == 1
        assert "this key was unregistered, and Flower never accepts it again" in again.stderr
        with kept_running(f"{joins} --key keys/later --state state/later", site, "node: started for the server"):
            assert list(play("second")["rounds"][0]["clients"]) == ["0"]
        assert json.loads((folder / "state" / "server" / "client-keys.json").read_text()) == {"0": "north"}

        shown = nodes()
        assert shown.count("north") == 2
        assert "unregistered" in shown
        assert called("fedlora unregister north --server $SERVER --ca certs/ca.crt", site).returncode == 0
        assert nodes().count("unregistered") == 2
