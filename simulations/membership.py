"""`fedlora audit`: membership inference against the adapter of a run whose clients' rows are on this machine."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common.errors import DataError, RunError
from fedlora.common.files import write_json
from fedlora.data import LazyExamples, prepare
from fedlora.models import load_base
from fedlora.models.peft_files import read_any
from fedlora.results.run_folder import stored
from fedlora.tasks.registry import task_of
from fedlora.trained.evaluate import placed
from fedlora.trained.membership import Attack, likelihood_ratios, losses_of

from .run import run

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from fedlora.adapters import AdapterState
    from fedlora.config import Config
    from fedlora.trained.export import Source

NAME = "audit.json"
SCHEMA = 1
LOSS, CALIBRATED, SHADOWS = "loss", "loss, compared with the base model", "loss, compared with shadow runs"
_FEWEST = 10  # rows of each group, below which no share says anything


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        folder: the run's folder.
        privacy: level, epsilon and delta of the run; empty without `privacy.level`.
        members: losses of rows that the run could train on, [n].
        others: losses of rows that no client had, [n].
        attacks: the attacks by name.
    """

    folder: Path
    privacy: Mapping[str, Any]
    members: np.ndarray
    others: np.ndarray
    attacks: Mapping[str, Attack]

    @property
    def name(self) -> str:
        """The run's name, as `fedlora status` takes it."""
        return f"{self.folder.parent.name}/{self.folder.name}"


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Rows of the clients, each beside one that no client had.

    Args:
        clients: all training examples of each client.
        others: examples that no client had.
        chosen: for each pair, the client, the place among its examples, and the place among the others; int [n, 3].
    """

    clients: Sequence[LazyExamples]
    others: LazyExamples
    chosen: np.ndarray

    def examples(self) -> list[Any]:
        """The examples of all pairs: first those of the clients, then the others."""
        return [self.clients[client][at] for client, at, _ in self.chosen] + [
            self.others[at] for _, _, at in self.chosen
        ]

    def tables(self, inside: np.ndarray) -> list[Dataset]:
        """Rows of each client, with the other row in the place of its own where `inside` is false, bool [n]."""
        from datasets import concatenate_datasets

        found: list[Dataset] = []
        for number, examples in enumerate(self.clients):
            gone = self.chosen[(self.chosen[:, 0] == number) & ~inside]
            kept = np.setdiff1d(np.arange(len(examples)), gone[:, 1])
            found.append(concatenate_datasets([examples.rows.select(kept), self.others.rows.select(gone[:, 2])]))
        return found


def audit(
    source: Source,
    rows: int = 500,
    shadows: int = 0,
    seed: int = 0,
    on_rows: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Audit:
    """Try to tell a run's training rows from other rows, by the losses of its adapter.

    The attacks take a row for a member if its score is high. The scores are: minus the loss (Yeom et al. 2018,
    https://arxiv.org/abs/1709.01604); the base model's loss minus the adapter's, so that rows that are easy for
    everybody do not look like members (Watson et al. 2022, https://arxiv.org/abs/2111.08440); and, with shadow runs,
    the likelihood ratio of `likelihood_ratios`. A shadow run repeats the run with another seed. In each pair of a
    member and another row, a fair coin decides which of the two it trains on; all other rows stay as they are.

    The other rows are the held-out rows, those that `data.client-max` cut off, and the clients' own test rows. All
    training rows of the clients are members, also those that no step has drawn.

    Args:
        source: the run's adapter, with its record.
        rows: how many members are compared with as many other rows, at most.
        shadows: number of shadow runs, an even number; 0: none.
        seed: draws the rows and the coins.
        on_rows: called with (what is scored, rows done, all rows).

    Raises:
        RunError: there is no record of the run, or shadows is odd.
        DataError: the clients' rows are not on this machine, or there are too few other rows.
    """
    if shadows % 2 or shadows < 0:
        raise RunError(f"--shadows {shadows}: half of them train on each row; give an even number")
    if not source.result:
        raise RunError(f"{source.adapter}: no record of its run beside it; give the run's folder runs/<name>/<time>")
    config, folder = source.config, source.run
    pairs = _pairs(config, source.result, rows, seed)
    examples, count = pairs.examples(), len(pairs.chosen)

    def losses(what: str, model: nn.Module, pad_id: int) -> np.ndarray:
        done = 0

        def add(more: int) -> None:
            nonlocal done
            done += more
            on_rows(what, done, len(examples))

        return losses_of(task_of(config.model), model, examples, config.evaluate.batch_size, pad_id, on_batch=add)

    def with_adapter(what: str, adapter: AdapterState) -> np.ndarray:
        model = placed(adapter, config)
        return losses(what, model.model, model.base.pad_id)

    base = load_base(config.model, seed=config.run.seed)
    before = losses("base model", base.model, base.pad_id)
    del base
    after = with_adapter("adapter", read_any(folder / "adapter"))
    scores = {LOSS: -after, CALIBRATED: before - after}
    if shadows:
        coins = _coins(count, shadows, seed)
        found = []
        for number, inside in enumerate(coins):
            trained = _shadow(config, folder, pairs.tables(inside), f"{count}-rows-{shadows}-seed-{seed}", number)
            found.append(with_adapter(f"shadow {number + 1} of {shadows}", trained))
        scores[SHADOWS] = likelihood_ratios(after, np.stack(found), np.concatenate([coins, ~coins], axis=1))
    return Audit(
        folder,
        _privacy(source.result),
        after[:count],
        after[count:],
        {name: Attack(score[:count], score[count:]) for name, score in scores.items()},
    )


def write(found: Sequence[Audit]) -> None:
    """Write audit.json into the folder of each run; in that of the first, the others stand beside it."""
    each = [_facts(one) for one in found]
    for one, facts in zip(found, each, strict=True):
        beside = each[1:] if one is found[0] else []
        write_json(one.folder / NAME, {"schema": SCHEMA, "runs": [facts, *beside]})


def _facts(found: Audit) -> dict[str, Any]:
    attacks = {
        name: {
            "auc": attack.auc,
            "auc-interval": attack.interval,
            "caught": attack.caught,
            "advantage": attack.advantage,
            "curve": [[round(float(x), 5) for x in side] for side in attack.curve],
        }
        for name, attack in found.attacks.items()
    }
    losses = {group: [round(float(loss), 5) for loss in getattr(found, group)] for group in ("members", "others")}
    return {"run": found.name, "privacy": dict(found.privacy), "losses": losses, "attacks": attacks}


def _pairs(config: Config, result: Mapping[str, Any], rows: int, seed: int) -> _Pairs:
    """Randomly chosen members, each beside another row.

    Raises:
        DataError: the clients' rows are not on this machine, or there are too few other rows.
    """
    from datasets import concatenate_datasets

    from fedlora.models import shared_tokenizer

    from ..clients.answering.rows import divided

    task, tokenizer = task_of(config.model), shared_tokenizer(config.model)
    all_rows = replace(config, data=replace(config.data, heldout_max=0, client_max=0))
    split, whole = prepare(config), prepare(all_rows)
    clients: list[LazyExamples] = []
    others = [whole.heldout, whole.test]
    for client in range(config.federation.clients):
        own = split.client(client)
        train, test = divided(own, config, client)
        cut = whole.client(client)
        others += [test, cut.select(np.arange(len(own), len(cut)))]
        clients.append(LazyExamples(train, tokenizer, config.data, task))
    for known in result.get("clients", []):
        counted = len(clients[known["client-id"]]) if known["client-id"] < len(clients) else 0
        if counted != known["num-examples"]:
            raise DataError(
                f"client {known['client-id']} trained on {known['num-examples']} rows, and data.source = "
                f"{config.data.source!r} has {counted} for it: the run's rows are not on this machine; audit a run of "
                "fedlora run on this machine"
            )
    outside = concatenate_datasets([each for each in others if len(each)] or [whole.heldout])
    free = LazyExamples(outside, tokenizer, config.data, task)
    draw = np.random.default_rng([seed, len(clients)])
    members = np.array([(number, at) for number, own in enumerate(clients) for at in range(len(own))])
    count = min(rows, len(members), len(free))
    if count < _FEWEST:
        raise DataError(
            f"the run has {len(members)} training rows, and {len(free)} rows that no client had; an audit needs "
            f"{_FEWEST} of each: raise --rows, or audit a run with a larger data.heldout-fraction"
        )
    mine = members[draw.choice(len(members), count, replace=False)]
    return _Pairs(clients, free, np.column_stack([mine, draw.choice(len(free), count, replace=False)]))


def _coins(pairs: int, shadows: int, seed: int) -> np.ndarray:
    """Whether a shadow trains on the member of a pair, bool [shadows, pairs]; half of the shadows do, for each pair."""
    half = np.repeat([True, False], shadows // 2)
    draw = np.random.default_rng([seed, shadows])
    return np.stack([draw.permutation(half) for _ in range(pairs)], axis=1)


def _shadow(config: Config, folder: Path, tables: Sequence[Dataset], name: str, number: int) -> AdapterState:
    """The adapter of a shadow run, which is run unless it is there already, in the audited run's folder."""
    own = folder / "audit" / name / str(number)
    if not (own / "result.json").is_file() or stored(own)["status"] != "completed":
        shutil.rmtree(own, ignore_errors=True)  # of a shadow run that was interrupted
        keys = {
            "run.dir": str(folder / "audit"),
            "run.name": name,
            "run.id": str(number),
            "run.seed": config.run.seed + 1 + number,
            "data.parts": "",
            "data.client-max": 0,
            "data.heldout-fraction": 0.0,
            "data.test-fraction": 0.0,
            "evaluate.server": False,
            "evaluate.clients": False,
        }
        run(config, keys, data=list(tables))
    return read_any(own / "adapter")


def _privacy(result: Mapping[str, Any]) -> dict[str, Any]:
    spent = [entry["privacy"]["epsilon"] for entry in result["rounds"] if "privacy" in entry]
    if "privacy" not in result or not spent or not math.isfinite(spent[-1]):
        return {}
    return {"level": result["privacy"]["level"], "epsilon": spent[-1], "delta": result["privacy"]["delta"]}
