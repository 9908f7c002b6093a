"""Exports a run's adapter as a PEFT checkpoint of a chosen rank, or as a merged model, with a model card."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import AdapterState, compress, delta, relative_error, svd_each
from fedlora.adapters import leading as leading_factors
from fedlora.adapters.kinds.base import MAGNITUDE
from fedlora.common.errors import AdapterError, ModelError
from fedlora.config import Config, parse
from fedlora.exchange import ClientInfo
from fedlora.models import BaseModel, at_hand, load_base, resolve, untie
from fedlora.models.adapted import adapted_model, forget, install
from fedlora.models.base.read import quiet
from fedlora.models.intruders import BaseSpectra, without_intruders
from fedlora.models.mixer import MlpMixerConfig
from fedlora.models.peft_files import is_magnitude, save_checkpoint
from fedlora.results.run_folder import stored
from fedlora.results.runs import adapter_folder
from fedlora.tasks.registry import task_of

from .model_card import Card, class_names, render

Transformation = Callable[[AdapterState], AdapterState]
_log = logging.getLogger("fedlora")


@dataclass(frozen=True)
class Source:
    """The adapter to export, and what is known of its run.

    Attributes:
        adapter: folder of the PEFT checkpoint.
        about: content of the checkpoint's fedlora.json.
        config: the run's configuration.
        result: content of the run's result.json; empty if the checkpoint was moved away from its run.
    """

    adapter: Path
    about: Mapping[str, Any]
    config: Config
    result: Mapping[str, Any]

    @property
    def run(self) -> Path:
        """The folder that contains the checkpoint, which is the run's folder unless the checkpoint was moved."""
        return self.adapter.parent


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: the folder that was written.
        error: `|exported - trained|_F / |trained|_F` over all modules; None if the rank did not change.
        ranks: the smallest and the largest rank of a module.
        intruders: if intruders were scaled, `lambda`, and their number over all modules `before` and `after`; else
            empty.
    """

    folder: Path
    error: float | None
    ranks: tuple[int, int]
    intruders: Mapping[str, float] = field(default_factory=dict)


def find(path: Path) -> Source:
    """The checkpoint of a run, or in any other folder.

    Raises:
        AdapterError: there is no checkpoint, or FedLoRA did not write it.
        RunError: the run's record is damaged.
    """
    folder = adapter_folder(path)
    try:
        about = json.loads((folder / "fedlora.json").read_text(encoding="utf-8"))
        config = parse(about["config"], where=str(folder / "fedlora.json"))
    except FileNotFoundError:
        raise AdapterError(f"{folder}: no fedlora.json, which says what the adapter was trained on") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{folder / 'fedlora.json'}: cannot be read: {error}") from None
    record = folder.parent / "result.json"
    result = stored(folder.parent) if folder.name == "adapter" and record.is_file() else {}
    return Source(folder, about, config, result)


def at_rank(adapter: AdapterState, rank: int) -> AdapterState:
    """The adapter with the best approximation of every module's update of at most this rank."""
    return replace(adapter, lora=compress(adapter.lora, rank))


def for_client(adapter: AdapterState, client: ClientInfo) -> AdapterState:
    """The adapter with the best approximation of every module's update of a client's own ranks."""
    lora = {name: leading_factors(svd, client.rank_of(name)) for name, svd in svd_each(adapter.lora).items()}
    return replace(adapter, lora=lora)


def with_fewer_intruders(
    source: Source, trained: AdapterState, lam: float, cut: Transformation, *, merge: bool
) -> tuple[AdapterState, dict[str, float]]:
    """The adapter with its intruder dimensions scaled, and then cut; see `fedlora.models.intruders`.

    Args:
        source: the adapter's source, which names the base model.
        trained: the trained adapter, with an update for every adapted module.
        lam: with 0 the intruders are removed, with 1 nothing changes.
        cut: function that is applied afterwards, such as a reduction to a lower rank.
        merge: True if the adapter will be merged; intruders are then those of the full-precision base model in fp32.

    Returns:
        The changed adapter; and `lambda` with the number of intruders over all modules `before` and `after`. Some may
        be left with lambda = 0, since weaker directions become leading ones, and a cut restores a little of the others.

    Raises:
        ModelError: the base model is not the one on which the adapter was trained.
        AdapterError: the adapter does not fit the base model.
    """
    plain = replace(source.config.model, quantization="none", compute_dtype="fp32", device="cpu")
    factors = replace(source.config.lora, kind="lora", kind_options="")  # as which every kind is saved
    model = adapted_model(plain if merge else source.config.model, factors)
    check_base(source, model.base)
    changed = cut(without_intruders(model, trained, lam))
    spectra, found = BaseSpectra(model), {"lambda": lam}
    for when, state in (("before", trained), ("after", changed)):
        install(model, state)
        found[when] = sum(spectra.counts().values())
    forget()
    return changed, found


def write_adapter(
    source: Source,
    trained: AdapterState,
    out: Path,
    change: Transformation,
    facts: Mapping[str, Any],
    *,
    paper: str = "",
) -> Exported:
    """Write a PEFT checkpoint with a model card. After an error, nothing is left.

    Args:
        source: the adapter's source.
        trained: the trained adapter, before `change`.
        out: the folder to write; it must be new or empty.
        change: function that is applied to the adapter, such as a reduction to a lower rank.
        facts: options of the export by name, for fedlora.json and the card.
        paper: citation of the strategy's paper, for the card.

    Raises:
        AdapterError: `out` is not empty.
    """
    changed = change(trained)
    error = relative_error(changed.lora, trained.lora)
    small = compress(changed.lora)
    ranks = [factors.rank for factors in small.values()]
    facts = {**facts, "relative-error": error, "ranks": sorted(set(ranks))}
    with _new_folder(out) as part:
        save_checkpoint(replace(changed, lora=small), part, source.config.model, {**source.about, "export": facts})
        if task_of(source.config.model).classes and at_hand(source.config.model.name):
            _name_classes(part, _base_config(source), source)
        _write_card(part, Card(source.config, source.about, source.result, facts, paper, out.name))
    return Exported(out, error, (min(ranks), max(ranks)), facts.get("intruders", {}))


def write_merged(
    source: Source,
    trained: AdapterState,
    out: Path,
    change: Transformation,
    facts: Mapping[str, Any],
    *,
    paper: str = "",
) -> Exported:
    """Write the full-precision base model with the adapter added to its weights, as a transformers folder in fp32.

    The arguments are those of `write_adapter`.

    Raises:
        ModelError: the base model is not the one on which the adapter was trained.
        AdapterError: `out` is not empty, or the adapter does not fit the base model.
    """
    config = replace(source.config.model, quantization="none", compute_dtype="fp32", device="cpu")
    changed = change(trained)
    error = relative_error(changed.lora, trained.lora)
    ranks = [factors.rank for factors in compress(changed.lora).values()]
    facts = {**facts, "relative-error": error, "ranks": sorted(set(ranks)), "merged": True}
    with _new_folder(out) as part:
        base = load_base(replace(config, gradient_checkpointing=False))
        check_base(source, base)
        untied = merge(base, changed)
        if untied:
            facts = {**facts, "untied": untied}
        with quiet():
            base.model.save_pretrained(part)
            base.tokenizer.save_pretrained(part)
        if task_of(source.config.model).classes:
            _name_classes(part, part / "config.json", source)
        (part / "fedlora.json").write_text(json.dumps({**source.about, "export": facts}, indent=2) + "\n")
        _write_card(part, Card(source.config, source.about, source.result, facts, paper, out.name))
    return Exported(out, error, (min(ranks), max(ranks)), facts.get("intruders", {}))


def _write_card(folder: Path, card: Card) -> None:
    """Write README.md; it has a section on intruder dimensions if they were scaled."""
    path = folder / "config.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("model_type") == MlpMixerConfig.model_type:
        card = replace(card, imports=MlpMixerConfig.__module__)
    text, found = render(card), card.facts.get("intruders")
    if found:
        text += (
            f"\n## Intruder dimensions\n\nLeading directions of the tuned weights that are like none of the base's "
            f"were scaled by {found['lambda']:g}: {found['before']} before, {found['after']} after, over all modules.\n"
        )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _base_config(source: Source) -> Path:
    model = source.config.model
    return resolve(model.name, model.revision, weights=False) / "config.json"


def _name_classes(folder: Path, config: Path, source: Source) -> None:
    """Write config.json with the names of the classes, and so with their number, for which readers have a default.

    Args:
        folder: folder for the file.
        config: the base model's config.json, whose names are used if the rows have only numbers.
        source: the adapter's source, with the names in the run's rows.
    """
    settings = json.loads(config.read_text(encoding="utf-8"))
    known = settings.get("id2label") or {}
    own = known if len(known) == source.config.model.labels else {}
    named = dict(enumerate(class_names(source.about, source.result)))
    names = {
        str(number): named.get(number) or ("" if named else own.get(str(number), "")) or f"LABEL_{number}"
        for number in range(source.config.model.labels)
    }
    settings |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def merge(base: BaseModel, adapter: AdapterState) -> list[str]:
    """Add every module's dW to the weights of an unquantized base model, and copy the tensors trained in full into it.

    Returns:
        The modules that shared their weight with another module. They have a weight of their own now; that of the other
        module is unchanged.

    Raises:
        AdapterError: the model has no such module or tensor.
    """
    model, heads = base.model, dict(base.model.named_parameters())
    as_found = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    model.config.use_cache = True
    if "rescale_every" in as_found:  # a feature of RWKV that is switched off in training
        model.config.rescale_every = as_found["rescale_every"]
    untied: list[str] = []
    with torch.no_grad():
        for name, factors in adapter.lora.items():
            try:
                module: nn.Module = model.get_submodule(name)
            except AttributeError:
                raise AdapterError(f"{name}: the base has no such module; the adapter is for another model") from None
            other = untie(model, name)
            if other:
                _log.info("%s shares its weight with %s, and gets its own for the merge", name, other)
                untied.append(name)
            weight, update = cast("Tensor", module.weight), delta(factors)
            size = adapter.tensors.get(f"{name}.{MAGNITUDE}")
            if size is not None:  # DoRA: the rows of W + dW get these lengths
                whole = (weight.T if isinstance(module, Conv1D) else weight) + update.to(weight)
                update = (size / whole.norm(dim=1)).to(weight)[:, None] * whole - (whole - update.to(weight))
            update = update.T if isinstance(module, Conv1D) else update
            if update.shape != weight.shape:
                raise AdapterError(
                    f"{name}: the adapter's update is {tuple(update.shape)}, but the weight is {tuple(weight.shape)}"
                )
            weight.add_(update.to(weight))
        for name, tensor in adapter.tensors.items():
            if is_magnitude(name):
                continue
            if name not in heads or heads[name].shape != tensor.shape:
                raise AdapterError(f"{name}: the base has no such tensor of shape {tuple(tensor.shape)}")
            heads[name].copy_(tensor)
    return untied


def check_base(source: Source, base: BaseModel) -> None:
    """Raise ModelError if the adapter was trained on another base model."""
    trained_on = source.about.get("base")
    if trained_on not in (None, base.fingerprint):
        raise ModelError(
            f"{source.adapter} was trained on base {trained_on}, but model.name = {source.config.model.name!r} is "
            f"{base.fingerprint}; put the earlier model back"
        )


def check_free(out: Path) -> None:
    """Raise AdapterError if `out` is a file, or a folder that is not empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise AdapterError(f"{out}: exists already and is not empty; choose another folder, or remove it")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A new folder to fill in the block, which becomes `out` at its end; after an error, nothing is left."""
    check_free(out)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
