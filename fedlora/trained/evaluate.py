"""Evaluates adapters on rows: checkpoints together with their base model, or an adapter in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn

from fedlora.adapters import AdapterState
from fedlora.common.errors import AdapterError, ModelError
from fedlora.config import Config, label_names, parse
from fedlora.data import Example, encode, form_of, load_rows, prepare, usable_rows
from fedlora.data.classes import numbered
from fedlora.data.places import with_places
from fedlora.data.values import rows_by_value
from fedlora.models import BaseModel, adapted, check_length, load_base, longest
from fedlora.models.injection import ties_may_be_adapted
from fedlora.models.parts import with_parts
from fedlora.models.peft_files import described, has_magnitudes, is_own, read_parts
from fedlora.tasks.by_value import Scored, scored
from fedlora.tasks.predict import evaluate, predict
from fedlora.tasks.registry import task_of
from fedlora.tasks.scores import Predictions

from .mixed import BASE, predict_many

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset


def compare_with_base(
    adapters: Sequence[Path],
    config: Config,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    *,
    whole: bool = False,
) -> dict[str, Scored]:
    """The metrics of the base model alone and with each adapter, on held-out rows or on a whole source, in one pass.

    Args:
        adapters: folders of checkpoints, at least one; all are PEFT's, or all have parts that no factors stand for.
        config: the configuration of model and data.
        on_batch: called after each batch with (number of rows done, number of all rows), where a row counts once for
            each adapter and once for the base model.
        whole: whether all rows of `data.source` are used, and not the held-out rows alone. Unless `data.label-names`
            names the classes, they are then numbered as in the run of the first adapter.

    Returns:
        Label of the base model or an adapter -> its metrics by name, and by value of `evaluate.by`.

    Raises:
        DataError: the held-out rows have no such column.
        ModelError: an adapter was trained on another base model.
        AdapterError: a checkpoint does not fit the model.
    """
    own = [adapter for adapter in adapters if is_own(adapter)]
    if own and len(own) < len(adapters):
        other = next(adapter for adapter in adapters if adapter not in own)
        raise AdapterError(
            f"{own[0]} has no LoRA factors, and {other} has: they cannot be evaluated in one pass; evaluate each by "
            "itself"
        )
    base = load_base(config.model, seed=config.run.seed)
    check_length(longest(base.model), config)
    task = task_of(config.model)
    rows, column = _all_rows(adapters[0], config) if whole else prepare(config).heldout, config.evaluate.by
    examples = encode(rows, base.tokenizer, config.data, task)
    groups: dict[str, np.ndarray] = {}
    if column:
        usable = usable_rows(rows, base.tokenizer, config.data, task)
        groups = rows_by_value(rows.select(usable), column, config.data)
    size = config.evaluate.batch_size
    if own:
        found = _one_by_one(base, own, config, examples, on_batch)
    else:
        model, names = load(base, adapters, config), [BASE, *map(_name, range(len(adapters)))]
        found = predict_many(task, model, names, examples, batch_size=size, pad_id=base.pad_id, on_batch=on_batch)
    labels = ["untouched base" + (f" with {base.head.partition(':')[0]}" if base.head else ""), *titles(adapters)]
    return {
        label: scored(task, predictions, column, groups)
        for label, predictions in zip(labels, found.values(), strict=True)
    }


def _all_rows(adapter: Path, config: Config) -> Dataset:
    names = label_names(config.data) or tuple(described(adapter).get("classes") or ())
    return numbered(load_rows(config.data), config.data, names)


def _one_by_one(
    base: BaseModel,
    adapters: Sequence[Path],
    config: Config,
    examples: Sequence[Example],
    on_batch: Callable[[int, int], None],
) -> dict[str, Predictions]:
    """The predictions of the base alone, and with each adapter that has parts instead of factors.

    Raises:
        ModelError: an adapter was trained on another base model.
        AdapterError: a checkpoint does not fit the model, or does not say of which kind it is.
    """
    task, size, total = task_of(config.model), config.evaluate.batch_size, (1 + len(adapters)) * len(examples)
    models: dict[str, Callable[[], nn.Module]] = {BASE: lambda: base.model}
    for number, adapter in enumerate(adapters):
        _check_base(adapter, base, config)
        models[_name(number)] = partial(_with_parts, adapter, config)
    found: dict[str, Predictions] = {}
    for number, (name, made) in enumerate(models.items()):

        def count(done: int, _: int, before: int = number * len(examples)) -> None:
            on_batch(before + done, total)

        found[name] = predict(task, made(), examples, size, base.pad_id, on_batch=count)
    return found


def _with_parts(adapter: Path, config: Config) -> nn.Module:
    """The base model with an adapter that has parts instead of factors."""
    trained = described(adapter).get("config")
    if not trained:
        raise AdapterError(f"{adapter}: fedlora.json is missing or empty, which says of which kind the adapter is")
    lora = parse(trained, where=str(adapter / "fedlora.json")).lora
    model = adapted.adapted_model(config.model, lora)
    adapted.merge_folds(model, None, ())
    adapted.install(model, read_parts(adapter))
    return model.model


def _check_base(adapter: Path, base: BaseModel, config: Config) -> None:
    """Raise ModelError if the adapter was trained on another base model."""
    trained_on = described(adapter).get("base")
    if trained_on not in (None, base.fingerprint):
        raise ModelError(
            f"{adapter} was trained on base {trained_on}, but model.name = {config.model.name!r} is "
            f"{base.fingerprint}; set model.name to the base model of the adapter"
        )


def load(base: BaseModel, adapters: Sequence[Path], config: Config) -> PeftModel:
    """The base model with these checkpoints as PEFT's adapters "adapter0", "adapter1" ….

    Raises:
        ModelError: an adapter was trained on another base model.
        AdapterError: a checkpoint does not fit the model.
    """
    for adapter in adapters:
        _check_base(adapter, base, config)
    model: PeftModel | None = None
    for index, adapter in enumerate(adapters):
        try:
            with ties_may_be_adapted():
                if model is None:
                    model = PeftModel.from_pretrained(base.model, str(adapter), adapter_name=_name(index))
                else:
                    model.load_adapter(str(adapter), adapter_name=_name(index))
        except (OSError, SafetensorError, TypeError) as error:
            raise AdapterError(f"{adapter}: the adapter cannot be read: {str(error).splitlines()[0]}") from error
        except (RuntimeError, ValueError, KeyError) as error:
            raise AdapterError(f"{adapter} does not fit {config.model.name}: {str(error).splitlines()[0]}") from error
    assert model is not None
    return model


def titles(adapters: Sequence[Path]) -> list[str]:
    """The label of each adapter in a table.

    A single adapter is "with the adapter"; of several, the label is the part of the path that differs from the others.
    """
    if len(adapters) == 1:
        return ["with the adapter"]
    parts = [adapter.parts for adapter in adapters]
    head = _common(parts)
    tail = _common([part[::-1][: len(part) - head] for part in parts])
    return [
        str(Path(*own)) if (own := part[head : len(part) - tail]) else str(path)
        for part, path in zip(parts, adapters, strict=True)
    ]


def _common(paths: Sequence[Sequence[str]]) -> int:
    """The number of first parts that are equal in all paths."""
    count = 0
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _name(index: int) -> str:
    return f"adapter{index}"


def score(adapter: AdapterState, rows: Dataset, config: Config, classes: tuple[str, ...] = ()) -> dict[str, float]:
    """The metrics of an adapter in memory, on any rows.

    Args:
        adapter: the whole trained adapter, for the unchanged base model, as pairs of factors, or as parts that no
            factors stand for.
        rows: rows with the columns that `config.data` names.
        config: the configuration of the run that trained the adapter.
        classes: names of that run's classes, in their order; empty if they have only numbers.

    Raises:
        DataError: rows cannot be used.
    """
    model = placed(adapter, config)
    form_of(rows.column_names, config.data, model.task)
    examples = encode(with_places(numbered(rows, config.data, classes)), model.base.tokenizer, config.data, model.task)
    return evaluate(model.task, model.model, examples, config.evaluate.batch_size, model.base.pad_id)


def placed(adapter: AdapterState, config: Config) -> adapted.AdaptedModel:
    """The process's one model with this adapter on its unchanged base; arguments as in `score`."""
    dora = has_magnitudes(adapter)
    own = dora or not adapter.lora  # which only its own kind can install
    model = adapted.adapted_model(
        config.model, config.lora if own else replace(config.lora, kind="lora", kind_options="")
    )
    adapted.merge_folds(model, None, ())  # a run may have left its folds in the weights
    adapted.install(model, with_parts(model, adapter) if dora else adapter)
    return model
