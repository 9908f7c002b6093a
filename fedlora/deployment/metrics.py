"""The page /metrics of a server or a node, for Prometheus, with numbers from its event log and about its disk."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509

from fedlora.common.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Numbers of the last round: name in the log -> name and meaning of the gauge.
_OF_A_ROUND = {
    "round": ("fedlora_round", "The last round that has ended."),
    "clients": ("fedlora_round_clients", "Clients that counted in the last round."),
    "failures": ("fedlora_round_failures", "Clients that did not count in the last round."),
    "train-loss": ("fedlora_train_loss", "Mean training loss of the clients in the last round, in nats."),
    "upload-bytes": ("fedlora_upload_bytes", "Bytes that clients sent in the last round."),
    "download-bytes": ("fedlora_download_bytes", "Bytes that clients received in the last round."),
}
Gauge = tuple[str, str, Callable[[], float | None]]


class EventLog:
    """A collector for `prometheus_client` that counts the events in a log of JSON lines.

    Args:
        path: path of the log, which other processes write, and which may be rotated.
        gauges: further gauges, each with a name, a meaning, and a function for its value (None if it is unknown).
    """

    def __init__(self, path: Path, gauges: Iterable[Gauge] = ()) -> None:
        self._path, self._gauges = path, tuple(gauges)
        self._counts: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._round: dict[str, float] = {}
        self._place = (0, 0)  # inode of the file, and number of its bytes that were read

    def collect(self) -> Iterator[Metric]:
        """The metrics for Prometheus."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self._read()
        events = CounterMetricFamily("fedlora_events", "Events since this process began, by kind.", labels=["event"])
        meaning = "Time of the last event of each kind."
        times = GaugeMetricFamily("fedlora_last_event_timestamp_seconds", meaning, labels=["event"])
        for event, count in sorted(self._counts.items()):
            events.add_metric([event], count)
            times.add_metric([event], self._last[event])
        yield events
        yield times
        for name, (gauge, meaning) in {**_OF_A_ROUND, **_held_out(self._round)}.items():
            if name in self._round:
                yield GaugeMetricFamily(gauge, meaning, value=self._round[name])
        for gauge, meaning, ask in self._gauges:
            if (value := ask()) is not None:
                yield GaugeMetricFamily(gauge, meaning, value=value)

    def _read(self) -> None:
        """Count the lines that are new since the last call; if the file was rotated, those of the new file."""
        try:
            with self._path.open("rb") as file:
                inode = self._path.stat().st_ino
                file.seek(self._place[1] if self._place[0] == inode else 0)
                while (line := file.readline()).endswith(b"\n"):
                    self._count(line)
                    self._place = (inode, file.tell())
        except OSError:
            return  # there is no log yet

    def _count(self, line: bytes) -> None:
        try:
            event: dict[str, Any] = json.loads(line)
            kind, time = str(event["event"]), datetime.fromisoformat(event["time"]).timestamp()
        except (ValueError, TypeError, KeyError):
            return
        self._counts[kind] += 1
        self._last[kind] = time
        if kind == "round-end":
            values = {**event, **{f"heldout {name}": value for name, value in (event.get("heldout") or {}).items()}}
            self._round = {name: float(value) for name, value in values.items() if type(value) in (int, float)}


@contextmanager
def served(port: int | None, log: Path, gauges: Iterable[Gauge] = ()) -> Iterator[None]:
    """Within the block, serve http://127.0.0.1:`port`/metrics, unless `port` is None.

    Raises:
        ConfigError: prometheus_client is not installed, or the port is taken.
    """
    if port is None:
        yield
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise ConfigError(
            "--metrics-port needs prometheus_client; install it: pip install 'fedlora[metrics]'"
        ) from None
    registry = CollectorRegistry()
    registry.register(EventLog(log, gauges))
    try:
        server, thread = start_http_server(port, "127.0.0.1", registry)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen there: {error.strerror}; choose another") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_server(database: Path, certificate: Path | None) -> list[Gauge]:
    """Gauges of a server besides those of its log: size of its database, free disk, and end of its certificate."""
    found: list[Gauge] = [
        ("fedlora_database_bytes", "Size of the SuperLink's database.", lambda: _size(database)),
        *_disk(database.parent),
    ]
    if certificate is not None:
        until = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc.replace(tzinfo=UTC)
        meaning = "Time at which the server's certificate expires."
        found.append(("fedlora_certificate_expiry_timestamp_seconds", meaning, until.timestamp))
    return found


def of_node(state: Path) -> list[Gauge]:
    """Gauges of a node besides those of its log: free disk."""
    return _disk(state)


def _disk(folder: Path) -> list[Gauge]:
    return [
        ("fedlora_disk_free_bytes", "Free bytes on the state folder's disk.", lambda: shutil.disk_usage(folder).free)
    ]


def _size(path: Path) -> float | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _held_out(values: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    names = [name for name in values if name.startswith("heldout ")]
    return {
        name: (f"fedlora_{name.replace(' ', '_').replace('-', '_')}", "On held-out rows, after the last round.")
        for name in names
    }
