"""Single values from a peer. Each is checked, and a wrong value refuses the message with a `WireError`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from flwr.app import MetricRecord, RecordDict

from fedlora.common.errors import WireError
from fedlora.config import LONGEST_CLASS

METRICS_RECORD = "metrics"
MOST_CLASSES = 4096
MOST_EDGES = 16  # between a client and the server
EDGE = r"[\w.-]{1,64}"  # the name of an edge
_Item = TypeVar("_Item")
_LARGEST_METRIC = 1e305  # a mean of such numbers is finite
_LARGEST_INT = 2**64 - 1  # Flower's node ids
LONGEST_SHOWN = 120  # largest number of characters of a peer's text that an error shows


class Fields:
    """The values of a message's head by key. Each is checked when it is read.

    Args:
        head: the head as it arrived.
        who: the sender, with which every error message begins.
    """

    def __init__(self, head: Mapping[str, Any], who: str) -> None:
        self.head, self.who = head, who

    def integer(self, key: str, most: int = _LARGEST_INT) -> int:
        """A whole number from 0 to `most`."""
        value = self.head.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise self._refused(key, value, f"an integer from 0 to {most}")
        return value

    def positive(self, key: str, most: int) -> int:
        """A whole number from 1 to `most`."""
        value = self.integer(key, most)
        if value < 1:
            raise self._refused(key, value, "at least 1")
        return value

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.head.get(key)
        if type(value) is not bool:
            raise self._refused(key, value, "true or false")
        return value

    def text(self, key: str) -> str:
        """A string of any length."""
        value = self.head.get(key)
        if not isinstance(value, str):
            raise self._refused(key, value, "text")
        return value

    def one_of(self, key: str, known: tuple[str, ...]) -> str:
        """One of these strings."""
        value = self.text(key)
        if value not in known:
            raise self._refused(key, value, " or ".join(known))
        return value

    def name(self, key: str) -> str:
        """A short word, or a class as package.module:Class."""
        value = self.text(key)
        if not re.fullmatch(r"[\w.:-]{1,200}", value):
            raise self._refused(key, value, "a name of at most 200 letters")
        return value

    def letters(self, key: str, known: str) -> frozenset[str]:
        """A set of these letters."""
        value = frozenset(self.text(key))
        if not value <= set(known):
            raise self._refused(key, self.head[key], f"letters of {known}")
        return value

    def items(self, key: str, kind: type[_Item]) -> list[_Item]:
        """A list of values of one type."""
        value = self.head.get(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._refused(key, value, f"a list of {kind.__name__}")
        return value

    def numbers(self, key: str) -> list[float]:
        """A list of finite numbers."""
        value = self.items(key, float)
        if not all(map(math.isfinite, value)):
            raise self._refused(key, value, "finite numbers")
        return value

    def class_names(self) -> tuple[str, ...]:
        """The names of a client's classes."""
        names = self.items("class-names", str)
        if len(names) > MOST_CLASSES or not all(n.isprintable() and 0 < len(n) <= LONGEST_CLASS for n in names):
            expected = f"at most {MOST_CLASSES} names of at most {LONGEST_CLASS} characters"
            raise self._refused("class-names", names, expected)
        return tuple(names)

    def edges(self) -> tuple[str, ...]:
        """The names of the edges through which a client is reached."""
        names = self.items("edges", str)
        if len(names) > MOST_EDGES or not all(re.fullmatch(EDGE, name) for name in names):
            raise self._refused("edges", names, f"at most {MOST_EDGES} names of at most 64 letters")
        return tuple(names)

    def run_key(self) -> str:
        """The run's key, letters and digits only, since it names a folder on the client."""
        key = self.text("run")
        if not re.fullmatch(r"[0-9a-z]{0,32}", key):
            raise WireError(f"{self.who} sent the run key {short(key)}, expected at most 32 letters and digits")
        return key

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.head.get(key)
        if type(value) is not float or not math.isfinite(value):
            raise self._refused(key, value, "a finite number")
        return value

    def session(self, key: str = "session") -> str:
        """The name of one try of a round with a secure sum: 32 hexadecimal digits."""
        value = self.text(key)
        if not re.fullmatch(r"[0-9a-f]{32}", value):
            raise self._refused(key, value, "32 hexadecimal digits")
        return value

    def octets(self, key: str, count: int) -> bytes:
        """So many bytes."""
        value = self.head.get(key)
        if not isinstance(value, bytes) or len(value) != count:
            raise self._refused(key, value, f"{count} bytes")
        return value

    def octets_up_to(self, key: str, most: int) -> bytes:
        """At most so many bytes."""
        value = self.head.get(key)
        if not isinstance(value, bytes) or len(value) > most:
            raise self._refused(key, value, f"at most {most} bytes")
        return value

    def expect(self, what: str, got: object, expected: object) -> None:
        """Raise WireError unless `got` equals `expected`."""
        expect(self.who, what, got, expected)

    def expect_names(self, what: str, got: list[str], expected: Mapping[str, object]) -> None:
        """Raise WireError unless `got` has exactly the expected names, each once, in any order."""
        if len(got) != len(expected) or set(got) != set(expected):
            lacks, has = sorted(set(expected) - set(got))[:3], sorted(set(got) - set(expected))[:3]
            raise WireError(
                f"{self.who} sent other {what} than it was sent: {len(got)} instead of {len(expected)}, without "
                f"{short(lacks)}, with {short(has)}"
            )

    def _refused(self, key: str, value: object, expected: str) -> WireError:
        return WireError(f"{self.who} sent {key} {short(value)}, expected {expected}")


def expect(who: str, what: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(f"{who} sent {what} {short(got)}, expected {expected}")


def metrics_record(metrics: Mapping[str, float], known: frozenset[str]) -> MetricRecord:
    unknown = sorted(set(metrics) - known)
    if unknown:
        raise WireError(f"metric {unknown[0]!r} cannot be sent; clients send only {', '.join(sorted(known))}")
    return MetricRecord({name: float(value) for name, value in metrics.items()})


def read_metrics(record: RecordDict, who: str, known: Set[str]) -> dict[str, float]:
    """The metrics of a message: for each name, which must be known, one finite number."""
    sent = record.metric_records.get(METRICS_RECORD)
    if sent is None:
        raise WireError(f"{who}: the message has no {METRICS_RECORD!r} record")
    metrics: dict[str, float] = {}
    for name, value in sent.items():
        if name not in known:
            raise WireError(f"{who} sent metric {short(name)}, expected only {', '.join(sorted(known))}")
        if isinstance(value, list) or not -_LARGEST_METRIC <= value <= _LARGEST_METRIC:
            raise WireError(f"{who}: metric {name!r} is {short(value)}, expected one finite number")
        metrics[name] = value
    return metrics


def require(metrics: Mapping[str, float], names: Set[str], who: str) -> None:
    """Raise WireError unless the metrics of all these names were sent."""
    if lacking := sorted(names - metrics.keys()):
        raise WireError(f"{who} left out metric {lacking[0]!r}, expected {', '.join(sorted(names))}")


def short(value: object) -> str:
    """A peer's value for an error message: at most a line long, and without control characters."""
    try:
        return cut(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} that is too long to show"


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 3]}..."
