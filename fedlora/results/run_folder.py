"""The folder of a run's results, and the keys that a resumed run may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedlora.common.errors import ConfigError, RunError
from fedlora.config import Config, Scalar, parse, parse_overrides

from . import journal
from .runs import run_folder

CLIENTS = "clients.jsonl"  # beside result.json, in a run of many clients
SCHEMA = 1


# The keys that a resumed run may change. All others decide what the run computes or measures.
_MAY_CHANGE = frozenset(
    {
        "federation.rounds",
        "federation.min-clients",
        "federation.round-timeout",
        "federation.wait-timeout",
        "federation.max-rank",
        "federation.max-hosted",
        "run.keep",
        "run.threads",
        "model.device",
        "model.gradient-checkpointing",
        "evaluate.every",
        "evaluate.by",
        "evaluate.intruders",
        "evaluate.batch-size",
    }
)


_WHERE = frozenset({"run.dir", "run.name", "run.id", "run.resume", "run.from-round", "run.by"})


_PATHS = frozenset({"model.name", "data.source"})


def stamp(config: Config) -> Config:
    """The config with the time as `run.id`, if it has none, and with a number after it if this folder exists."""
    if config.run.id:
        return config
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    place = Path(config.run.dir).expanduser() / config.run.name
    names = chain([now], (f"{now}-{number}" for number in count(2)))
    name = next(name for name in names if not (place / name).exists())
    return replace(config, run=replace(config.run, id=name))


def folder_of(config: Config) -> Path:
    """The folder for a run's results."""
    run = stamp(config).run
    return Path(run.dir).expanduser().resolve() / run.name / run.id


def resumed(folder: Path, overrides: Sequence[str] = (), from_round: int = -1) -> Config:
    """The config that continues the run in this folder: the run's own, with `key=value` overrides.

    Args:
        folder: the run's folder.
        overrides: the changes, each as `key=value`.
        from_round: the round after which to continue, with the server's state of that time; -1: after the last round.

    Raises:
        RunError: there is no run in this folder, the run is complete, or a process still works on it.
        ConfigError: an override is wrong, or would change what the run computes.
    """
    folder = run_folder(folder)
    data = stored(folder)
    if is_taken(folder):
        raise RunError(taken(folder))
    config = parse(parse_overrides(overrides), parse(data["config"], where=str(folder / "result.json")), where="-c")
    here = replace(config.run, dir=str(folder.parent.parent), name=folder.parent.name, id=folder.name, resume=True)
    config = replace(config, run=replace(here, from_round=from_round))
    check_changes(data, config)
    return config


def stored(folder: Path) -> dict[str, Any]:
    """The result.json of a run; with its clients, where they are listed in a file beside it.

    Raises:
        RunError: there is no such file, or it is not the record of a run.
    """
    path = folder / "result.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: no run here, result.json is missing; give a folder runs/<name>/<time>") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not _is_record(data):
        raise RunError(f"{path}: not the record of a run that this version can read; start a new run")
    if "clients-in" in data:
        data["clients"] = _listed(folder / CLIENTS)
    return data


def _listed(path: Path) -> list[dict[str, Any]]:
    """The clients in a file with one in a line, in the order of their ids; a later line about a client counts."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [about for _, about in sorted({int(about["client-id"]): about for about in found}.items())]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: the clients of this run cannot be read: {error}") from None


def _is_record(data: Any) -> bool:
    """Whether this has everything that a record of this version always has."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return False
    kinds = {"key": str, "status": str, "config": dict, "rounds": list}
    if not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        return False
    parts = {"round": int, "clients": dict, "failures": dict, "seconds": dict}
    return isinstance(data["config"].get("federation.rounds"), int) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in parts.items())
        for entry in data["rounds"]
    )


def check_changes(data: Mapping[str, Any], config: Config) -> None:
    """Check that this config may continue a recorded run.

    Raises:
        RunError: the run is complete.
        ConfigError: a key has changed that decides what the run computes.
    """
    before, now = data["config"], config.to_flat()
    rounds = before.get("federation.rounds", 0)
    if config.federation.rounds < rounds:
        raise ConfigError(
            f"federation.rounds = {config.federation.rounds}: a run that is resumed may have more rounds than its "
            f"{rounds}, but not fewer"
        )
    if config.federation.rounds > rounds and config.privacy.level != "none" and config.privacy.epsilon:
        raise ConfigError(
            f"federation.rounds = {config.federation.rounds}: the noise of this run's first {rounds} rounds was "
            f"computed so that {rounds} rounds spend privacy.epsilon = {config.privacy.epsilon:g}, and more rounds "
            "would spend more; leave it unchanged, or start a new run"
        )
    goes_back = 0 <= config.run.from_round < rounds
    if data["status"] == "completed" and config.federation.rounds == rounds and not goes_back:
        raise RunError(
            f"{folder_of(config)}: all {rounds} rounds are complete; for more rounds set a larger federation.rounds, "
            "or go back with --from-round"
        )
    for key in sorted(now.keys() - _MAY_CHANGE - _WHERE):
        if key in before and not _same(key, before[key], now[key]):
            raise ConfigError(
                f"{key} = {now[key]!r}: the run to resume has {before[key]!r}, and would become another run; leave it "
                "unchanged, or start a new run"
            )


def _same(key: str, before: Scalar, now: Scalar) -> bool:
    """Whether two values mean the same; paths may differ, since Flower's engine makes them absolute."""
    if key not in _PATHS or before == now:
        return before == now
    short, long = sorted((Path(str(before)).parts, Path(str(now)).parts), key=len)
    return bool(short) and long[-len(short) :] == short


_HOLDER = ".pid"  # file beside the lock, with the process that has it and the machine


@contextmanager
def nothing_left(config: Config) -> Iterator[None]:
    """Remove a run's folder that was made within the block, if the block fails before a round has begun."""
    folder = folder_of(config)
    new = [path for path in (folder, folder.parent, folder.parent.parent) if not path.exists()]
    try:
        yield
    except BaseException:
        if folder in new and not _holds_results(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for empty in new[1:]:
                with suppress(OSError):  # another run is there
                    empty.rmdir()
        raise


def _holds_results(folder: Path) -> bool:
    """Whether a round has begun, or the base model was evaluated."""
    try:
        data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        data = {}
    begun = any(event["event"] == "round-start" for event in journal.read(folder / journal.NAME))
    return begun or bool(data.get("rounds")) or "baseline" in data


def is_taken(folder: Path) -> bool:
    """Whether a process works on the run in this folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # no such folder, or not ours to lock
        return False


def taken(folder: Path) -> str:
    """The message that a process works on the run in this folder, and what to do about it."""
    try:
        pid, _, machine = (folder / _HOLDER).read_text(encoding="utf-8").partition(" ")
    except OSError:
        pid, machine = "", ""
    where = f"process {pid} on {machine}" if pid.isdigit() else "another process"
    how = f" (kill {pid})" if pid.isdigit() else ""
    return f"{folder}: {where} still works on this run; wait for it, or stop it{how}"


def ended_by(folder: Path, error: Exception) -> bool:
    """Whether the run in this folder ended with this error, which engines in other processes quote in their own."""
    try:
        said = stored(folder).get("error")
    except RunError:
        return False
    return bool(said) and said in str(error)
