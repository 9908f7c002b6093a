"""The record of a run: result.json, TensorBoard events and the adapter. It is complete after every round."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from fedlora.adapters import AdapterState
from fedlora.common.errors import RunError
from fedlora.common.files import write_json
from fedlora.config import Config
from fedlora.exchange import ClientInfo

from .environment import code_version, device_facts, peak_memory_bytes, versions
from .run_folder import _HOLDER, CLIENTS, SCHEMA, check_changes, folder_of, stored, taken

if TYPE_CHECKING:
    from fedlora.tasks.by_value import Scored

MOST_LISTED = 1000  # with more clients, they are listed beside result.json
_log = logging.getLogger("fedlora")


class RunRecord:
    """One run's folder, `<run.dir>/<run.name>/<run.id or time>/`, and the files in it.

    Attributes:
        folder: the run's folder; no other process writes there until `finish`.
        key: the run's key, which stays the same when the run is resumed.
        data: the content of result.json.
    """

    def __init__(self, config: Config, *, simulated: bool = False) -> None:
        """Begin a record, or open that of `run.id` again if `run.resume` is set.

        Args:
            config: the run's configuration.
            simulated: whether the clients are simulated in this process, so that their rows are those of its user.

        Raises:
            RunError: the folder exists already, cannot be made, has no run to resume, or is in use by another process.
            ConfigError: the run to resume has a config that differs in a key that must not change.
        """
        self._config = config
        self.folder = folder_of(config)
        self._resumes = config.run.resume
        self._replayed: int | None = None
        self._events: Any = None
        self._told = False
        if self._resumes:
            found = stored(self.folder)
            check_changes(found, config)
            if "clients-in" in found:
                del found["clients"]
        else:
            found = {}
            self._make_folder()
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(taken(self.folder)) from None
        with suppress(OSError):
            (self.folder / _HOLDER).write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
        self._began = time.perf_counter() - found.get("seconds", 0.0)
        self._peak: Mapping[str, int] = found.get("peak-memory-bytes", {})
        self.data: dict[str, Any] = found or self._fresh(config)
        whole = config.to_flat() | {"run.resume": False, "run.from-round": -1}
        self.data |= {"status": "running", "config": whole}
        self.data["simulated"] = simulated and found.get("simulated", not self._resumes)
        self.data.pop("error", None)
        self.key: str = self.data["key"]
        self._write()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, mode=0o700)  # an adapter can reveal rows
        except FileExistsError:
            raise RunError(
                f"{self.folder} exists already; choose another run.name or run.id, or continue that run: "
                f"fedlora run --resume {self.folder}"
            ) from None
        except OSError as error:
            raise RunError(f"run.dir: cannot write to {self.folder}: {error}; choose another run.dir") from None

    @staticmethod
    def _fresh(config: Config) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "status": "running",
            "key": secrets.token_hex(8),
            "started": _now(),
            "config": {},
            "versions": versions(),
            "code": code_version(),
            "device": device_facts(config),
            "rounds": [],
        }

    def go_on(self, done: int | None) -> None:
        """If the run is resumed, drop the records of rounds after `done`, which are played again.

        Args:
            done: the last round in the server's saved state; None without a saved state.

        Raises:
            RunError: rounds were complete, but the server's saved state is gone.
        """
        if not self._resumes:
            return
        rounds = self.data["rounds"]
        if (
            done is None and len(rounds) > 1
        ):  # a round is recorded before its state is saved, so that only the first round may lack a state
            raise RunError(
                f"{self.folder}: {len(rounds)} rounds are recorded, but there is no saved state in "
                f"{self.folder / 'state'}; this run cannot be resumed, start a new one"
            )
        self.data["rounds"] = [entry for entry in rounds if done is not None and entry["round"] <= done]
        self._replayed = 0 if done is None else done + 1
        facts = {"versions": versions(), "code": code_version(), "device": device_facts(self._config)}
        changed = {name: value for name, value in facts.items() if value != self.data.get(name)}
        self.data.setdefault("resumed", []).append({"time": _now(), "after-round": done, **changed})
        self._write()
        if self.data["rounds"] or "baseline" in self.data:
            self._tell()
        _log.info("resumed after %s", "nothing: no round was complete" if done is None else f"round {done}")

    def start(
        self,
        clients: Sequence[ClientInfo],
        fingerprint: str,
        facts: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        """Record the clients and the base model.

        Args:
            clients: all clients that are known.
            fingerprint: the base model's fingerprint.
            facts: further texts about the base model, by name.
            classes: names of the classes, in the order of their numbers; empty if they have only numbers.

        Raises:
            RunError: the run to resume had another base model.
        """
        if self.data.get("base", fingerprint) != fingerprint:
            raise RunError(
                f"{self.folder}: its rounds were on base model {self.data['base']!r}, but model.name = "
                f"{self._config.model.name} is now {fingerprint!r}; put the earlier model back, or start a new run"
            )
        self.data["base"] = fingerprint
        for what, words in (facts or {}).items():
            self.data[what] = words
            _log.info("%s: %s", what, words)
        if classes:
            self.data["classes"] = list(classes)
        if len(clients) <= MOST_LISTED:
            self.data["clients"] = [_about(client) for client in clients]
        else:
            self.data["clients-in"] = CLIENTS
            self._list(CLIENTS, "w", map(_about, clients))
        self._write()

    def joined(self, client: ClientInfo, number: int) -> None:
        """Record a client that came, or came back on another node, after the run had begun."""
        about = _about(client) | {"joined-in-round": number}
        if "clients-in" in self.data:
            return self._list(CLIENTS, "a", [about])
        others = [other for other in self.data["clients"] if other["client-id"] != client.client_id]
        others.append(about)
        self.data["clients"] = sorted(others, key=lambda about: about["client-id"])
        self._write()

    def _list(self, name: str, mode: Literal["w", "a"], clients: Iterable[Mapping[str, Any]]) -> None:
        """Write clients to a file of their own, one in a line: result.json is written anew several times a round."""
        path = self.folder / name
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(about) + "\n" for about in clients)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error}") from error

    def _tell(self) -> None:
        """Log the folder of the results, once there are some."""
        if not self._told:
            self._told = True
            _log.info("results: %s", self.folder)

    def baseline(self, found: Scored) -> None:
        """Record the held-out metrics before round 1."""
        self.data["baseline"] = found.metrics
        if found.by:
            self.data["baseline-by"] = found.by
        self._scalars("heldout", found.metrics, 0)
        self._by_value(found.by, 0)
        self._write()
        self._tell()

    def round(self, entry: Mapping[str, Any]) -> None:
        """Record a complete round."""
        self.data["rounds"].append(dict(entry))
        number = entry["round"]
        self._scalars("heldout", entry.get("heldout", {}), number)
        self._by_value(entry.get("heldout-by", {}), number)
        self._scalars("client-test", entry.get("client-test", {}).get("mean", {}), number)
        self._scalars("seconds", entry["seconds"], number)
        spent = entry.get("privacy") or {}
        self._scalars("privacy", {name: value for name, value in spent.items() if isinstance(value, float)}, number)
        single = {name: value for name, value in entry.items() if isinstance(value, int | float) and name != "round"}
        self._scalars("round", single, number)
        self._write()
        self._tell()

    @property
    def excluded(self) -> frozenset[int]:
        """The clients that were excluded from the rest of the run."""
        return frozenset(int(client) for client in self.data.get("excluded", {}))

    def exclude(self, client: int, reason: str, undone: int | None) -> None:
        """Record that a client is excluded from the rest of the run, and the round whose result was dropped, if any."""
        self.data.setdefault("excluded", {})[str(client)] = reason
        for entry in self.data["rounds"]:
            if entry["round"] == undone:
                entry["taken-back"] = reason
        self._write()

    def promises(self, facts: Mapping[str, Any]) -> None:
        """Record the mechanism of the run's privacy; a resumed run goes on counting."""
        so_far = {"releases": 0, "participations": {}, "rows": {}} | self.data.get("privacy", {})
        self.data["privacy"] = so_far | dict(facts)
        self._write()

    def spends(self, clients: Mapping[int, int]) -> None:
        """Record, before a round is played, that it asks these clients: what is spent stays spent if it is undone.

        Args:
            clients: client id -> number of its examples.
        """
        privacy = self.data["privacy"]
        privacy["releases"] += 1
        for client, examples in clients.items():
            privacy["participations"][str(client)] = privacy["participations"].get(str(client), 0) + 1
            privacy["rows"][str(client)] = examples
        self._write()

    def save_adapter(self, adapter: AdapterState) -> None:
        """Write the PEFT checkpoint of the global adapter.

        Raises:
            RunError: the checkpoint cannot be written.
        """
        from safetensors import SafetensorError

        from fedlora.models.peft_files import save_checkpoint

        about = {"config": self.data["config"], "base": self.data.get("base")}
        if "classes" in self.data:
            about["classes"] = self.data["classes"]
        folder = self.folder / "adapter"
        try:
            save_checkpoint(adapter, folder, self._config.model, about)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder}: the adapter cannot be written: {error}") from error

    def finish(self, status: str, error: str | None = None) -> None:
        """Record how the run ended: completed, interrupted or failed. After an error, a failure to write is logged."""
        self.data["status"] = status
        if error:
            self.data["error"] = error
        try:
            if self._events:
                self._events.close()
            self._write()
        except (OSError, RunError) as last:
            if status == "completed":
                raise
            _log.warning("%s", last)
        finally:
            self._lock.release()

    def _by_value(self, by: Mapping[str, Any], step: int) -> None:
        for value, metrics in by.get("values", {}).items():
            self._scalars(f"heldout-by/{value}", {name: one for name, one in metrics.items() if name != "rows"}, step)

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._replayed)
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", value, step)

    def _write(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self._began, 3)
        peak = peak_memory_bytes()
        self.data["peak-memory-bytes"] = {name: max(size, self._peak.get(name, 0)) for name, size in peak.items()}
        path = self.folder / "result.json"
        try:
            write_json(path, self.data)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error}") from error


def _about(client: ClientInfo) -> dict[str, Any]:
    return {
        "client-id": client.client_id,
        "rank": client.rank,
        "alpha": client.alpha,
        "num-examples": client.num_examples,
        **({"edges": list(client.edges)} if client.edges else {}),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def cut_share(result: Mapping[str, Any]) -> float:
    """The share of the training rows that were longer than `data.max-length`, from the last round's record."""
    return next((e["train-cut"] for e in reversed(result.get("rounds", [])) if e.get("train-cut") is not None), 0.0)
