"""Device traces: how fast each client's device trains, how fast its network is, and when it is there."""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedlora.common.errors import ConfigError
from fedlora.common.registry import Registry

DAY = 86400.0
_COLUMNS = ("client", "tokens-per-second", "down", "up", "from", "to")


@dataclass(frozen=True)
class Device:
    """A client's device.

    Args:
        speed: tokens that it trains on in a second.
        down, up: bytes that it receives and sends in a second.
        wakes: second of the day at which it is there.
        awake: for so many seconds of each day it is there.
    """

    speed: float
    down: float
    up: float
    wakes: float = 0.0
    awake: float = DAY

    def there(self, time: float) -> bool:
        """Whether it is there at a time."""
        return (time - self.wakes) % DAY < self.awake

    def after(self, time: float, seconds: float) -> float:
        """The time at which it has worked for so many seconds from a time on; it works only while it is there."""
        if self.awake >= DAY:
            return time + seconds
        since = (time - self.wakes) % DAY
        if since >= self.awake:
            time, since = time + DAY - since, 0.0
        if seconds <= (left := self.awake - since):
            return time + seconds
        days = math.ceil((seconds - left) / self.awake)  # the last of them has the end of the work
        return time + left + days * (DAY - self.awake) + (seconds - left)


class Traces(ABC):
    """The devices of all clients. A subclass is a frozen dataclass whose fields are its options."""

    @abstractmethod
    def device(self, client: int) -> Device | None:
        """A client's device; None: each training takes one second, whatever it is."""

    def check(self, clients: int) -> None:  # noqa: B027 - most have a device for every client
        """Check, before the run, that each of so many clients has a device.

        Raises:
            ConfigError: one has none.
        """

    def awake(self, client: int, time: float) -> bool:
        """Whether a client's device is there at a time."""
        device = self.device(client)
        return device is None or device.there(time)

    def arrives(self, client: int, asked: float, down: int, tokens: int, up: int) -> float:
        """The time at which a client's answer arrives.

        Args:
            client: number of the client.
            asked: the time of the question.
            down: bytes of the question.
            tokens: tokens that the client trains on.
            up: bytes of the answer.
        """
        device = self.device(client)
        if device is None:
            return asked + 1.0
        return device.after(asked, down / device.down + tokens / device.speed + up / device.up)


@dataclass(frozen=True)
class Equal(Traces):
    """Each training takes one second, on every device."""

    def device(self, client: int) -> Device | None:
        return None


@dataclass(frozen=True)
class LogNormal(Traces):
    """Speeds and networks are log-normal: few devices are very fast or very slow.

    Args:
        speed: median of the tokens that a device trains on in a second.
        speed_sigma: standard deviation of the natural logarithm of a device's speed; at 1, one device in six has less
            than 37 % of the median, and one in six more than 270 %.
        network: median of the bytes that a device sends or receives in a second.
        network_sigma: the same of the network's.
        seed: seed of the devices, which are the same in all runs with it.
    """

    speed: float = 1000.0
    speed_sigma: float = 1.0
    network: float = 1.25e6
    network_sigma: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.speed, self.network) <= 0 or min(self.speed_sigma, self.network_sigma) < 0:
            raise ConfigError(
                "federation.traces-options: speed and network: expected numbers above 0; sigmas: 0 or more"
            )

    def device(self, client: int) -> Device | None:
        draw = np.random.default_rng([self.seed, client])
        speed = self.speed * math.exp(self.speed_sigma * draw.standard_normal())
        down, up = (self.network * math.exp(self.network_sigma * draw.standard_normal()) for _ in range(2))
        return self._placed(Device(speed, down, up), draw)

    def _placed(self, device: Device, draw: np.random.Generator) -> Device:
        return device


@dataclass(frozen=True)
class Diurnal(LogNormal):
    """Log-normal devices that are there for a part of each day, such as phones that train while they are charged.

    Args:
        speed: as of `lognormal`.
        speed_sigma: as of `lognormal`.
        network: as of `lognormal`.
        network_sigma: as of `lognormal`.
        seed: as of `lognormal`.
        hours: hours of each day in which a device is there.
        spread: standard deviation, in hours, of the time at which devices wake, around one time for all: with a small
            one, all are there in the same hours.
    """

    hours: float = 8.0
    spread: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.hours <= 24 or self.spread < 0:
            raise ConfigError("federation.traces-options: hours: expected above 0, at most 24; spread: 0 or more")

    def _placed(self, device: Device, draw: np.random.Generator) -> Device:
        wakes = (self.spread * 3600 * draw.standard_normal()) % DAY
        return Device(device.speed, device.down, device.up, wakes, self.hours * 3600)


@dataclass(frozen=True)
class FromFile(Traces):
    """Devices from a CSV file with the columns client, tokens-per-second, down, up (bytes in a second), from and to.

    The last two, which may be left out, are the hours of the day in which a device is there, such as 22 and 6.

    Args:
        path: the file.
    """

    path: str = ""

    names: ClassVar[tuple[str, ...]] = _COLUMNS

    def device(self, client: int) -> Device | None:
        if client not in self._devices:
            raise ConfigError(f"federation.traces: {self.path} has no row for client {client}; give each client one")
        return self._devices[client]

    def check(self, clients: int) -> None:
        for client in range(clients):
            self.device(client)

    @cached_property
    def _devices(self) -> Mapping[int, Device]:
        try:
            with Path(self.path).expanduser().open(newline="", encoding="utf-8") as file:
                rows = [*csv.DictReader(file)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"federation.traces: {self.path} cannot be read: {error}") from None
        found: dict[int, Device] = {}
        for line, row in enumerate(rows, 2):
            client, device = self._row(row, line)
            if client in found:
                raise ConfigError(f"federation.traces: {self.path}, line {line}: client {client} has a row already")
            found[client] = device
        return found

    def _row(self, row: Mapping[str, str], line: int) -> tuple[int, Device]:
        try:
            speed, down, up = (float(row[name]) for name in _COLUMNS[1:4])
            begins, ends = (float(row.get(name) or default) for name, default in (("from", 0), ("to", 24)))
            client = int(row["client"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"federation.traces: {self.path}, line {line}: expected numbers in the columns "
                f"{', '.join(_COLUMNS[:4])}, and if there are any in from and to"
            ) from None
        if not all(0 < each < math.inf for each in (speed, down, up)) or not (0 <= begins <= 24 and 0 <= ends <= 24):
            raise ConfigError(
                f"federation.traces: {self.path}, line {line}: expected finite speeds above 0, and hours from 0 to 24"
            )
        awake = (ends - begins) % 24 or 24.0
        return client, Device(speed, down, up, begins * 3600, awake * 3600)


TRACES = Registry(
    noun="device trace",
    key="federation.traces",
    options_key="federation.traces-options",
    base=f"{__name__}:Traces",
    method="device",
    names={
        "equal": f"{__name__}:Equal",
        "lognormal": f"{__name__}:LogNormal",
        "diurnal": f"{__name__}:Diurnal",
    },
)


def traces_of(name: str, options: str) -> Traces:
    """The traces that `federation.traces` names: equal, lognormal, diurnal, a CSV file, or package.module:Class.

    Raises:
        ConfigError: there are none, an option is wrong, or the file cannot be read.
    """
    if name.endswith(".csv"):
        if options:
            raise ConfigError(f"federation.traces-options = {options!r}: a file has no options; remove them")
        return FromFile(name)
    return TRACES.make(name, options)
