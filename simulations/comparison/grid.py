"""The grid of a comparison: strategies × learning rates × seeds × scenarios, with all cells checked before any runs."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.common.errors import ConfigError, StrategyError, suggest
from fedlora.config import Config, Scalar, client_rank, clients_per_round, flatten, parse, parse_overrides, read_toml
from fedlora.tasks.by_value import plain
from fedlora.tasks.registry import check_task

from ...strategies.configured import check_ranks, configured
from .ranking import lower_is_better

SCHEMA = 1  # version of the files of a comparison
BASELINES = ("base", "local", "centralised")
RACES = ("none", "rates", "arms")
_KEYS = {
    "name": "a name for the comparison's folder and title, such as 'sentiment'",
    "config": "the preset or TOML file from which every cell starts",
    "strategies": "a list of strategies, such as ['flora', 'lora-fair']",
    "learning-rates": "a list of highest learning rates, the same for every strategy",
    "seeds": "a list of seeds; ranks and tests need at least two",
    "baselines": f"a list out of {', '.join(BASELINES)}",
    "metric": "the metric by which strategies are ranked, one of the task's, such as accuracy or loss; with "
    "evaluate.by also accuracy-mean-by or accuracy-worst-by, over the values of that column",
    "reference": "the strategy that the others are compared with",
    "race": f"one of {', '.join(RACES)}: whether rates, and strategies too, drop out after a seed",
    "settings": "a table of configuration keys for every cell",
    "scenarios": "a table with a table of configuration keys for each scenario",
    "variants": "a table with a table of configuration keys for each strategy, or own name with its strategy.name",
}
# Keys that the grid sets for each cell -> where to set them instead.
_OWN = {"run.seed": "seeds", "train.lr": "learning-rates", "run.dir": "--out", "run.name": "name", "run.id": "name"}
# Keys that say where and how a run works, but not what it computes. A cell accepts lost clients, whatever its grid has.
PLACES = frozenset(
    {"run.dir", "run.name", "run.id", "run.resume", "run.threads", "model.device", "federation.lost-clients"}
)
_OWN |= {"run.resume": "name", "data.parts": "baselines"}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        scenario: name of the scenario.
        label: name of the strategy, variant or baseline.
        role: "strategy" or "baseline".
        lr: highest learning rate; None if nothing is trained.
        seed: the run's seed.
        configs: the configs of the cell's runs: one; for the baseline "local" one for each client; for the baseline
            "base" one, which is not run.
    """

    scenario: str
    label: str
    role: str
    lr: float | None
    seed: int
    configs: tuple[Config, ...]

    @property
    def path(self) -> str:
        """The path of the cell's file in the comparison's folder, without a suffix."""
        rate = "" if self.lr is None else f"lr{_short(self.lr)}-"
        return f"{self.scenario}/{self.label}/{rate}seed{self.seed}"

    def keys(self, run: int = 0) -> dict[str, Scalar]:
        """The flat keys that decide a run's result."""
        return {key: value for key, value in self.configs[run].to_flat().items() if key not in PLACES}


@dataclass(frozen=True)
class Grid:
    """A comparison.

    Attributes:
        name: name of the comparison.
        metric: the metric by which strategies are ranked.
        reference: the strategy with which the others are compared.
        rates: learning rates, in ascending order.
        seeds: the seeds of all strategies.
        labels: strategies and variants, in the order of the file.
        baselines: names of the baselines.
        race: which cells the results of others leave out; see `race.py`.
        scenarios: name of a scenario -> its configuration keys.
        variants: name of a variant -> its configuration keys.
        cells: all cells, in the order in which they are run.
    """

    name: str
    metric: str
    reference: str
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    labels: tuple[str, ...]
    baselines: tuple[str, ...]
    scenarios: Mapping[str, Mapping[str, Scalar]]
    race: str = "none"
    variants: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The content of grid.json."""
        return {
            "name": self.name,
            "metric": self.metric,
            "reference": self.reference,
            "learning-rates": list(self.rates),
            "seeds": list(self.seeds),
            "strategies": list(self.labels),
            "baselines": list(self.baselines),
            "race": self.race,
            "scenarios": {label: dict(keys) for label, keys in self.scenarios.items()},
            "cells": len(self.cells),
        }


def load(path: Path, find: Callable[[str], Path], overrides: Sequence[str] = ()) -> Grid:
    """Read a comparison from its TOML file, with every cell's config parsed and checked.

    Args:
        path: path of the file; `config` in it may be a path relative to its folder.
        find: function from the name of a preset or a path to the path of its file.
        overrides: changes for every cell, as `key=value`.

    Raises:
        ConfigError: a key of the file or of a configuration is unknown or wrong, a list is missing or empty, or a key
            that the grid sets itself (such as train.lr) is among the settings.
        StrategyError: a strategy does not exist, or cannot serve the clients of a scenario.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r} in a comparison{suggest(key, _KEYS)}")
    name = _one(path, table, "name", str, path.stem.removeprefix("compare-"))
    base = _one(path, table, "config", str, "")
    if not base:
        raise ConfigError(f"{path}: config is missing, expected {_KEYS['config']}")
    beside = path.parent / base
    try:
        shared = parse(read_toml(beside if beside.is_file() else find(base)), where=base)
    except ConfigError as error:
        raise ConfigError(f"{path}: config: {error}") from None
    shared = parse(_settings(path, "settings", table.get("settings", {})), shared, where=f"{path}: settings")
    given = parse_overrides(overrides)
    shared = parse(_settings(path, "-c", given), shared, where="-c")
    variants = _tables(path, table, "variants")
    labels = tuple(dict.fromkeys((*_list(path, table, "strategies", str, [*variants]), *variants)))
    grid = Grid(
        name=_folder_name(path, "name", name),
        metric=_one(path, table, "metric", str, "accuracy"),
        reference=_one(path, table, "reference", str, "fedavg" if "fedavg" in labels else labels[0]),
        rates=tuple(sorted(dict.fromkeys(map(float, _list(path, table, "learning-rates", float))))),
        seeds=tuple(dict.fromkeys(_list(path, table, "seeds", int))),
        labels=tuple(_folder_name(path, "strategies", label) for label in labels),
        baselines=tuple(dict.fromkeys(_list(path, table, "baselines", str, [*BASELINES], empty=True))),
        scenarios=_tables(path, table, "scenarios") or {"default": {}},
        race=_one(path, table, "race", str, "none"),
        variants=variants,
    )
    _check(path, grid)
    return replace(grid, cells=tuple(_cells(path, grid, shared)))


def _cells(path: Path, grid: Grid, shared: Config) -> Iterable[Cell]:
    """All cells, by scenario and seed, with baselines last, so that cells with the same data and model are together."""
    for scenario, keys in grid.scenarios.items():
        setting = parse(keys, shared, where=f"{path}: scenarios.{scenario}")
        arms = {label: _arm(path, grid, scenario, label, setting) for label in grid.labels}
        for seed in grid.seeds:
            for label, arm in arms.items():
                for lr in grid.rates:
                    yield Cell(scenario, label, "strategy", lr, seed, (_at(arm, lr, seed),))
            for baseline in grid.baselines:
                for lr in grid.rates if baseline != "base" else (None,):
                    configs = tuple(_at(arm, lr, seed) for arm in _baseline(baseline, setting))
                    yield Cell(scenario, baseline, "baseline", lr, seed, configs)


def _arm(path: Path, grid: Grid, scenario: str, label: str, setting: Config) -> Config:
    """The config of a strategy or a variant in a scenario, after a check that it can serve the clients."""
    where = f"{path}: variants.{label}" if label in grid.variants else f"{path}: strategies"
    arm = parse({"strategy.name": label, **grid.variants.get(label, {})}, setting, where=where)
    try:
        check_ranks(arm)
        personal = configured(arm).personal
    except StrategyError as error:
        raise StrategyError(f"{where}: {label!r} in scenario {scenario!r}: {error}") from None
    task = check_task(arm)
    metric = plain(grid.metric)
    if metric not in task.metrics:
        raise ConfigError(
            f"{path}: metric = {grid.metric!r} is not known for model.task = {arm.model.task!r}"
            f"{suggest(grid.metric, task.metrics)}"
        )
    if metric != grid.metric and not arm.evaluate.by:
        raise ConfigError(
            f"{path}: metric = {grid.metric!r} is over the values of a column, and evaluate.by names none; set it "
            "under [settings], such as evaluate.by = 'domain'"
        )
    if (metric in task.lower) != lower_is_better(grid.metric):
        raise ConfigError(
            f"{path}: metric = {grid.metric!r} of model.task = {arm.model.task!r} is better when it is "
            f"{'lower' if metric in task.lower else 'higher'}, but a comparison would rank by the opposite; give "
            "it another name or sign"
        )
    if not (arm.data.heldout_fraction > 0 and arm.data.test_fraction > 0):
        raise ConfigError(
            f"{path}: data.heldout-fraction is {arm.data.heldout_fraction} and data.test-fraction "
            f"{arm.data.test_fraction}, so that no rows are left to test the chosen learning rate on; set both under "
            "[settings], such as 0.2 and 0.5"
        )
    # With personal factors, the server has no whole model that it could evaluate between rounds.
    return parse({"evaluate.server": False}, arm) if personal else arm


def _baseline(name: str, setting: Config) -> Iterable[Config]:
    """The configs of a baseline's runs: plain training, as federations of one client.

    - base: nothing is trained.
    - local: each client trains alone, at its own rank and on its own rows, in every round.
    - centralised: one client has all rows and the largest rank, and trains on as many examples in a round as the whole
      federation does.
    """
    clients = setting.federation.clients
    ranks = [client_rank(setting.lora, client) for client in range(clients)]
    alone: dict[str, Scalar] = {
        "strategy.name": "fedavg",
        "strategy.options": "",
        "strategy.server-optimizer": "none",
        "strategy.restart-every": 0,
        "strategy.robust": "none",
        "train.prox-mu": 0.0,
        "train.layers-per-round": 0,
        "federation.clients": 1,
        "federation.min-clients": 1,
        "federation.fraction": 1.0,
        "wire.dtype": "fp32",
        "wire.upload-dtype": "fp32",
    }
    if name == "local":
        for client, rank in enumerate(ranks):
            # Only the final model is scored, so that evaluations after earlier rounds would be useless.
            last = {"evaluate.every": setting.federation.rounds}
            yield parse(alone | last | {"lora.ranks": str(rank), "data.parts": f"{client} of {clients}"}, setting)
        return
    chosen = clients_per_round(clients, setting.federation.fraction)
    everything = "+".join(map(str, range(clients)))
    steps, epochs = setting.train.steps * chosen, setting.train.epochs * chosen / clients
    yield parse(
        alone
        | {
            "lora.ranks": str(max(ranks)),
            "data.parts": f"{everything} of {clients}",
            "train.steps": steps,
            "train.epochs": epochs,
        },
        setting,
    )


def _at(config: Config, lr: float | None, seed: int) -> Config:
    keys: dict[str, Scalar] = {"run.seed": seed}
    return parse(keys if lr is None else keys | {"train.lr": lr}, config)


def _check(path: Path, grid: Grid) -> None:
    for baseline in grid.baselines:
        if baseline not in BASELINES:
            raise ConfigError(f"{path}: baselines: {baseline!r}{suggest(baseline, BASELINES)}")
    if both := set(grid.labels) & set(BASELINES):
        raise ConfigError(f"{path}: {both.pop()!r} is a baseline's name; give the variant another")
    if grid.race not in RACES:
        raise ConfigError(f"{path}: race = {grid.race!r}{suggest(grid.race, RACES)}")
    if grid.reference not in grid.labels:
        raise ConfigError(
            f"{path}: reference = {grid.reference!r} is none of the strategies{suggest(grid.reference, grid.labels)}"
        )
    if not all(0 < rate < math.inf for rate in grid.rates):
        raise ConfigError(f"{path}: learning-rates = {list(grid.rates)}, expected numbers above 0")
    if min(grid.seeds) < 0:
        raise ConfigError(f"{path}: seeds = {list(grid.seeds)}, expected numbers from 0")


def _settings(path: Path, where: str, table: Any) -> dict[str, Scalar]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path}: {where} is {type(table).__name__}, expected a table of configuration keys")
    flat = flatten(table)
    for key in flat:
        if key in _OWN:
            raise ConfigError(f"{path}: {where} sets {key}, which the comparison sets itself; use {_OWN[key]!r}")
    return flat


def _tables(path: Path, table: Mapping[str, Any], key: str) -> dict[str, dict[str, Scalar]]:
    found = table.get(key, {})
    if not isinstance(found, Mapping) or not all(isinstance(value, Mapping) for value in found.values()):
        raise ConfigError(f"{path}: {key}: expected {_KEYS[key]}, such as [{key}.half]")
    return {_folder_name(path, key, label): _settings(path, f"{key}.{label}", t) for label, t in found.items()}


def _list(path: Path, table: Mapping[str, Any], key: str, of: type, default: Any = None, *, empty: bool = False) -> Any:
    found = table.get(key, default)
    fits = (int, float) if of is float else of
    if not isinstance(found, list) or not all(isinstance(v, fits) and not isinstance(v, bool) for v in found):
        got = "nothing" if found is None else repr(found)
        raise ConfigError(f"{path}: {key}: got {got}, expected {_KEYS[key]}")
    if not found and not empty:
        raise ConfigError(f"{path}: {key} is empty, so that there is nothing to compare; expected {_KEYS[key]}")
    return found


def _one(path: Path, table: Mapping[str, Any], key: str, of: type, default: Any) -> Any:
    found = table.get(key, default)
    if not isinstance(found, of):
        raise ConfigError(f"{path}: {key} = {found!r}, expected {_KEYS[key]}")
    return found


def _folder_name(path: Path, key: str, name: str) -> str:
    if not name or not all(sign.isalnum() or sign in "-_." for sign in name) or name.startswith("."):
        own = "; name it under [variants], with its strategy.name" if key == "strategies" and ":" in name else ""
        raise ConfigError(f"{path}: {key}: {name!r} names a folder; use letters, digits, '-', '_' and '.'{own}")
    return name


def _short(rate: float) -> str:
    """A number as a text with the fewest digits that identify it."""
    return f"{rate:g}" if float(f"{rate:g}") == rate else repr(rate)
