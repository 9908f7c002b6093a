"""Evaluates adapters on the tasks of EleutherAI's lm-evaluation-harness, by its Python API (an optional extra)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.common.errors import ConfigError, suggest
from fedlora.config import Config
from fedlora.models import load_base
from fedlora.models.peft_files import check_factors
from fedlora.tasks.registry import task_of

from .evaluate import load, titles

_INSTALL = "pip install 'fedlora[lm-eval]'"


def scores(
    adapters: Sequence[Path], config: Config, tasks: Sequence[str], path: Path | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of the unchanged base model and of each adapter on each task, computed by the harness.

    Args:
        adapters: folders of PEFT checkpoints of one base model, at least one.
        config: the configuration, with the base model and the batch size.
        tasks: names of tasks that the harness knows, or that files in `path` define.
        path: folder with a user's own task files.
        limit: largest number of rows of each task; None: all rows.

    Returns:
        Label of the base model or an adapter -> "task metric" -> value.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, or the model is a classifier.
        AdapterError: an adapter is no PEFT checkpoint.
    """
    for adapter in adapters:
        check_factors(adapter)
    api = _api()
    if task_of(config.model).pipeline != "text-generation":
        raise ConfigError("--lm-eval: its tasks need a model that generates text, model.task = causal-lm; leave it out")
    manager = api.tasks.TaskManager(include_path=str(path) if path else None)
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known:
            hint = suggest(task, known) if len(known) < 20 else "; name the folder of its file with --lm-eval-path"
            raise ConfigError(f"--lm-eval {task}: the harness knows no such task{hint}")
    base = load_base(config.model)
    model = load(base, adapters, config)
    model.eval()
    subject = api.models.huggingface.HFLM(
        pretrained=model, tokenizer=base.tokenizer, batch_size=config.evaluate.batch_size
    )

    def measured() -> dict[str, float]:
        found = api.simple_evaluate(model=subject, tasks=list(tasks), task_manager=manager, limit=limit)
        return flat(found["results"])

    with model.disable_adapter():
        result = {"untouched base": measured()}
    for index, title in enumerate(titles(adapters)):
        model.set_adapter(f"adapter{index}")
        result[title] = measured()
    return result


def flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's results as "task metric" -> value, without standard errors, names and names of default filters."""
    found: dict[str, float] = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            counts = isinstance(value, int | float) and "," in key and not metric.endswith("_stderr")
            if counts:
                found[f"{task} {metric}" + ("" if chosen == "none" else f" {chosen}")] = float(value)
    return found


def _api() -> Any:
    """The harness's package, after an import of the parts that are used here."""
    try:
        for part in ("lm_eval.tasks", "lm_eval.models.huggingface"):
            importlib.import_module(part)
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise ConfigError(f"--lm-eval needs lm-evaluation-harness ({error}); install it: {_INSTALL}") from None
