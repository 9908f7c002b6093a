"""/metrics: what the log says, whatever is written, cut off or rotated meanwhile."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedlora.common.errors import ConfigError
from fedlora.common.processes import free_port
from fedlora.common.rotation import rotate
from fedlora.deployment import certificates, metrics
from fedlora.results import journal


def asked(port: int) -> dict[str, float]:
    """What Prometheus' own parser reads: name, with the event where there is one, and value."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {
        " ".join((sample.name, *sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_events_are_counted_as_they_come_also_when_the_log_is_rotated(tmp_path: Path) -> None:
    path, port = tmp_path / "audit.jsonl", free_port()
    write = journal.Journal(path)
    with metrics.served(port, path):
        assert asked(port) == {}
        write("client-answered", {"client_id": 0})
        write("client-answered", {"client_id": 1})
        entry = {
            "round": 3,
            "clients": {"0": {}, "1": {}},
            "failures": {},
            "seconds": {"round": 2.0},
            "train-loss": 1.5,
        }
        write("round-end", {"entry": {**entry, "heldout": {"loss": 2.25, "macro-f1": 0.5}}})
        with path.open("a") as file:
            file.write("no json\n[1]\n" + json.dumps({"event": "half", "time": "2026-01-01T00:00:00+00:00"}))
        found = asked(port)
        assert found["fedlora_events_total client-answered"] == 2
        assert found["fedlora_events_total round-end"] == 1
        assert not any("half" in name for name in found)  # its line is not whole yet
        assert (found["fedlora_round"], found["fedlora_round_clients"], found["fedlora_round_failures"]) == (3, 2, 0)
        assert (found["fedlora_heldout_loss"], found["fedlora_heldout_macro_f1"]) == (2.25, 0.5)
        assert found["fedlora_train_loss"] == 1.5
        with path.open("a") as file:
            file.write("\n")
        assert asked(port)["fedlora_events_total half"] == 1
        rotate(path, 1)
        write("client-answered", {"client_id": 2})
        assert asked(port)["fedlora_events_total client-answered"] == 3
    with pytest.raises(OSError, match="refused"):
        asked(port)


def test_a_server_tells_its_database_its_disk_and_its_certificate(tmp_path: Path) -> None:
    certificates.make(tmp_path / "certs")
    (tmp_path / "superlink.db").write_bytes(b"x" * 1000)
    port = free_port()
    gauges = metrics.of_server(tmp_path / "superlink.db", tmp_path / "certs" / "server.pem")
    with metrics.served(port, tmp_path / "audit.jsonl", gauges):
        found = asked(port)
        assert found["fedlora_database_bytes"] == 1000
        assert found["fedlora_disk_free_bytes"] > 0
        assert found["fedlora_certificate_expiry_timestamp_seconds"] > 1.8e9
        (tmp_path / "superlink.db").unlink()
        assert "fedlora_database_bytes" not in asked(port)


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    port = free_port()
    with (
        metrics.served(port, tmp_path / "a"),
        pytest.raises(ConfigError, match=rf"--metrics-port {port}: cannot listen there"),
        metrics.served(port, tmp_path / "b"),
    ):
        pass
