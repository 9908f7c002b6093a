"""An adapter moved to another base model, by rows that the source makes up (Trans-LoRA)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.common.errors import ConfigError
from fedlora.common.files import write_json
from fedlora.config import Config, largest_rank, parse, parse_overrides
from fedlora.models import adapted, injection
from fedlora.results.run_folder import stored
from fedlora.trained.embedding import ENCODER
from fedlora.trained.export import Source, check_free
from fedlora.trained.synthetic import Rows, make_rows

from . import run as simulation

_STUDENT = "student"  # name of the run's folder in the folder of the migration
_FIXED = frozenset(
    {
        "run.dir",
        "run.name",
        "run.id",
        "run.resume",
        "model.name",
        "model.task",
        "data.source",
        "data.form",
        "evaluate.server",
    }
)


@dataclass(frozen=True)
class Migrated:
    """The result of a migration.

    Attributes:
        folder: the student's run, whose adapter is the migrated one.
        made: the rows that the source made.
        before: the metrics of the bare target on held-out rows of these; `accuracy` is the share of tokens at which
            it agrees with the source.
        after: those of the target with the new adapter.
    """

    folder: Path
    made: Rows
    before: Mapping[str, float]
    after: Mapping[str, float]


def migrate(
    source: Source,
    rows: Config,
    target: str,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    count: int = 96,
    keep: float = 0.5,
    seeds: int = 5,
    encoder: str = ENCODER,
    on_done: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Migrated:
    """Train an adapter of another base model to answer as the source's base and adapter do.

    Experimental: "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning", Wang et al. 2024,
    https://arxiv.org/abs/2405.17258, is known here from notes. The source is shown five real prompts and makes up more;
    a discriminator that was trained on real and made-up ones drops those that it takes for made up; the source answers
    the rest, and the target is trained on these answers. Differences: the discriminator is a logistic regression on a
    packaged encoder's vectors instead of a LoRA adapter; the source itself makes the prompts up, where the paper lets
    the target do it; the target learns the source's greedy answers, so that the two may have different tokenizers; and
    real prompts are needed for the discriminator, which sees them on this machine alone.

    Args:
        source: the adapter.
        rows: its section data names the real rows; its seed draws what is random.
        target: the other base model, as `model.name`.
        out: folder for the rows and the student's run; it must be new or empty.
        overrides: further keys of the student's run, as `key=value`.
        count: number of prompts to make up, at least 8.
        keep: share of them that is kept, above 0 and at most 1.
        seeds: number of real prompts that the source is shown at a time, at least 1.
        encoder: what the discriminator sees of a prompt.
        on_done: called with (what is done, number done, number of all).

    Raises:
        ConfigError: a number is out of bounds, or an override is wrong.
        FedLoraError: the source cannot make rows, or the student's run fails.
    """
    if source.config.model.task != "causal-lm":
        raise ConfigError(
            f"{source.adapter}: fedlora migrate needs a language model that answers, model.task = causal-lm; this "
            f"adapter's is {source.config.model.task}"
        )
    for name, value, fits, expected in (
        ("rows", count, count >= 8, "at least 8"),
        ("keep", keep, 0 < keep <= 1, "a share above 0 and at most 1"),
        ("seeds", seeds, seeds >= 1, "at least 1"),
    ):
        if not fits:
            raise ConfigError(f"fedlora migrate: --{name} is {value}, expected {expected}")
    check_free(out)
    for key in parse_overrides(overrides):
        if key in _FIXED:
            raise ConfigError(f"-c {key}: a migration sets this key itself; leave it out")
    student = student_config(source.config, rows, target, out, overrides)
    injection.shapes(student.model, student.lora)  # what is wrong with the target, before anything is made up
    made = make_rows(source, rows, count=count, keep=keep, seeds=seeds, encoder=encoder, on_done=on_done)
    out.mkdir(parents=True, exist_ok=True)
    try:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows)
        (out / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        adapted.forget()
        simulation.in_process(student)
    except BaseException:
        shutil.rmtree(out)
        raise
    folder = out / _STUDENT
    record = stored(folder)
    done = Migrated(folder, made, record["baseline"], record["rounds"][-1]["heldout"])
    write_json(out / "migration.json", _facts(source, rows, target, done))
    return done


def student_config(source: Config, rows: Config, target: str, out: Path, overrides: Sequence[str]) -> Config:
    """The run that trains the target on the made-up rows: one client, one round of three passes, by plain LoRA.

    Of the source's run it has the rank, the modules, the quantization, the optimizer and its rate, and the lengths.
    """
    own = {
        key: value
        for key, value in source.to_flat().items()
        if key.startswith(("train.optimizer", "lora.target-modules", "lora.alpha", "lora.rslora", "lora.dropout"))
        or key
        in (
            *("model.quantization", "model.compute-dtype", "model.device", "run.threads"),
            *("train.lr", "train.batch-size", "train.clip", "train.weight-decay"),
        )
    }
    base = parse(
        {
            **own,
            "run.dir": str(out.resolve().parent),
            "run.name": out.resolve().name,
            "run.id": _STUDENT,
            "run.seed": rows.run.seed,
            "model.name": target,
            "lora.ranks": "",
            "lora.rank": largest_rank(source),
            "strategy.name": "fedavg",
            "data.source": str(out.resolve() / "rows.jsonl"),
            "data.form": "prompt",
            "data.partition": "iid",
            "data.heldout-fraction": 0.2,
            "data.heldout-max": 0,
            "data.max-length": rows.data.max_length,
            "data.system-prompt": rows.data.system_prompt,
            "federation.clients": 1,
            "federation.rounds": 1,
            "train.steps": 0,
            "train.epochs": 3.0,
        }
    )
    return parse(parse_overrides(overrides), base, where="-c")


def _facts(source: Source, rows: Config, target: str, done: Migrated) -> dict[str, Any]:
    return {
        "source": str(source.adapter),
        "source-model": source.config.model.name,
        "target-model": target,
        "real-rows": rows.data.source,
        "sampled": done.made.sampled,
        "kept": len(done.made.rows),
        "told-apart": done.made.told_apart,
        "before": dict(done.before),
        "after": dict(done.after),
    }
