"""The README.md of an exported adapter: how it was trained, what was measured, and its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from fedlora import config as configuration
from fedlora.common.assets import hub_name, known
from fedlora.config import Config
from fedlora.results.record import cut_share
from fedlora.tasks.base import Task
from fedlora.tasks.registry import task_of


@dataclass(frozen=True)
class Card:
    """The contents of a card.

    Attributes:
        config: the run's configuration.
        about: content of the checkpoint's fedlora.json.
        result: content of the run's result.json, or empty.
        facts: facts about the export: `rank`, `client`, `ranks`, `relative-error`, `merged`.
        paper: citation of the strategy's paper, from the docstring of its class.
        name: name of the exported folder.
        imports: a module that must be imported before transformers knows the model's kind; empty for most.
    """

    config: Config
    about: Mapping[str, Any]
    result: Mapping[str, Any]
    facts: Mapping[str, Any]
    paper: str
    name: str
    imports: str = ""


def citation(docstring: str) -> str:
    """The first paper that a strategy's docstring names, with its link; empty if it names none.

    Example:
        >>> citation('Means. Guo et al. 2024, "Selective Aggregation", https://arxiv.org/abs/2410.01463. More.')
        'Guo et al. 2024, "Selective Aggregation", https://arxiv.org/abs/2410.01463'
    """
    text = " ".join(docstring.split())
    link = r"(?:https://arxiv\.org/abs/\d+\.\d+|https://openreview\.net/forum\?id=\w+)"
    whole = re.search(rf'[A-Z][\w-]+(?: et al\.)? \d{{4}},? "[^"]+",?(?: \(\w+\),?)? {link}', text)
    short = whole or re.search(link, text)
    return short.group(0) if short else ""


def render(card: Card) -> str:
    """The card as Markdown with YAML front matter."""
    parts = [
        f"---\n{yaml.safe_dump(_front(card), sort_keys=False)}---\n",
        f"# {card.name}\n",
        _what(card),
        "## Training\n",
        _list(_training(card)),
        *(["## Metrics\n", _metrics(card)] if card.result.get("rounds") else []),
        *(["## How it was made\n", _list(_made(card))] if card.result else []),
        "## Limits\n",
        _list(_limits(card)),
    ]
    return "\n".join(parts)


def class_names(about: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a run's classes, in the order of their numbers; empty if they have only numbers."""
    return tuple(about.get("classes") or result.get("classes") or ())


def base_name(name: str) -> str:
    """A base model's hub id, or the last part of a local path."""
    local = name.startswith((".", "/", "~")) or name.endswith(".gguf")
    return Path(name).name if local else hub_name(name)


def _weights(name: str) -> str:
    """A base model's name, with the origin of its weights if they differ from those of that name on the hub."""
    asset = known().get(name)
    words = asset.weights if asset else "dequantized from GGUF" if name.endswith(".gguf") else ""
    return base_name(name) + (f", {words}" if words else "")


def _front(card: Card) -> dict[str, Any]:
    merged = bool(card.facts.get("merged"))
    return {
        "base_model": base_name(card.config.model.name),
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": task_of(card.config.model).pipeline,
        "tags": ["lora", "federated-learning", "fedlora", card.config.strategy.name],
    }


def _what(card: Card) -> str:
    base, facts = base_name(card.config.model.name), card.facts
    kind = "The merged weights (fp32) of a LoRA adapter and its base" if facts.get("merged") else "A LoRA adapter for"
    lines = [f"{kind} {base}, trained by federated learning."]
    if "client" in facts:
        own = facts.get("personal")
        how = f"its own factors {own} with the shared ones" if own else "the global adapter, cut to its rank"
        lines.append(f"This is the adapter of client {facts['client']}: {how}.")
    ranks = facts.get("ranks", [])
    if ranks:
        spread = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines.append(
            f"Rank: {spread}. Relative error (Frobenius norm, all modules) against the trained adapter: "
            f"{facts['relative-error']:.3g}."
        )
    if facts.get("untied"):
        lines.append(
            f"Of the weights that modules of the base share, these are separate: {', '.join(facts['untied'])}."
        )
    own = f"import {card.imports}  # transformers does not know this kind of model by itself\n" if card.imports else ""
    if facts.get("merged"):
        code = f'{own}from transformers import {_auto(card)}\n\nmodel = {_auto(card)}.from_pretrained("{card.name}")'
    else:
        classes = _labels(card) if task_of(card.config.model).classes else ""
        asset = known().get(card.config.model.name)
        made = asset is not None and asset.archive == "made"
        where = f"# in place of {base!r}: the folder that `fedlora fetch {base}` prints\n" if made else ""
        code = (
            f"{own}from peft import PeftModel\nfrom transformers import {_auto(card)}\n\n{where}"
            f'base = {_auto(card)}.from_pretrained("{base}"{classes})\n'
            f'model = PeftModel.from_pretrained(base, "{card.name}")'
        )
    return "\n".join(lines) + f"\n\n```python\n{code}\n```\n"


def _labels(card: Card) -> str:
    """The arguments with which a classifier's base model must be read."""
    names = dict(enumerate(class_names(card.about, card.result)))
    if len(names) != card.config.model.labels:
        return f", num_labels={card.config.model.labels}"
    return f", id2label={names!r}, label2id={ {name: number for number, name in names.items()}!r}"


def _auto(card: Card) -> str:
    return task_of(card.config.model).auto_class().__name__


def _training(card: Card) -> list[tuple[str, str]]:
    config = card.config
    ranks = sorted({configuration.client_rank(config.lora, j) for j in range(config.federation.clients)})
    recorded = card.result.get("clients", [])
    if recorded:
        ranks = sorted({int(client["rank"]) for client in recorded})
    rows = sum(int(client["num-examples"]) for client in recorded)
    source = Path(config.data.source).name if "/" in config.data.source else config.data.source
    rounds = sum(1 for entry in card.result.get("rounds", []) if entry.get("round", 0) > 0)
    partition = config.data.partition
    if partition in ("natural", "numbered"):
        own = config.data.partition_by == "auto"
        partition += ", by the data's own column" if own else f", by {config.data.partition_by}"
    elif partition == "dirichlet":
        partition += f", alpha {config.data.dirichlet_alpha:g}"
    names = class_names(card.about, card.result)
    classes = [("Classes", ", ".join(f"{number} {name}" for number, name in enumerate(names)))] if names else []
    cut = cut_share(card.result)
    texts = task_of(config.model).unit == "tokens"
    shorter = f"; {cut:.1%} of the rows that were trained on are longer and were cut" if cut else ""
    longest = [("Largest number of tokens", f"{config.data.max_length}{shorter}")] if texts else []
    return [
        ("Base", f"{_weights(config.model.name)}, fingerprint {card.about.get('base', 'unknown')}"),
        ("Quantization of the base in training", config.model.quantization),
        ("Task", ", ".join([config.model.task, *_options(task_of(config.model))])),
        ("Strategy", config.strategy.name + (f" ({card.paper})" if card.paper else "")),
        ("Strategy options", config.strategy.options or "defaults"),
        ("Clients", str(len(recorded) or config.federation.clients)),
        ("Ranks of the clients", ", ".join(map(str, ranks))),
        ("Target modules", config.lora.target_modules),
        ("Rounds", f"{rounds or config.federation.rounds}"),
        ("Data", source + (f", {rows} training rows" if rows else "")),
        *classes,
        *longest,
        ("Partition", partition),
        ("Optimizer", f"{config.train.optimizer}, lr {config.train.lr:g}, batch {config.train.batch_size}"),
        ("Seed", str(config.run.seed)),
    ]


def _options(task: Task) -> list[str]:
    """A task's options, such as the template of prompts, without the number of labels."""
    return [f"{field.name} {getattr(task, field.name)!r}" for field in fields(task) if field.name != "labels"]


def _metrics(card: Card) -> str:
    """A table with a row for each round: held-out metrics, or else means over the clients' own test rows, and bytes."""
    rounds: Sequence[Mapping[str, Any]] = card.result["rounds"]
    on_clients = not any("heldout" in entry for entry in rounds)
    rows: list[tuple[int, Mapping[str, Any], Mapping[str, Any]]] = (
        [(0, card.result["baseline"], {})] if "baseline" in card.result else []
    )
    for entry in rounds:
        found = entry.get("client-test", {}).get("mean", {}) if on_clients else entry.get("heldout", {})
        rows.append((entry["round"], found, entry))
    names = list(dict.fromkeys(name for _, metrics, _ in rows for name in metrics))
    titles = ["round", *names, "up MB", "down MB"]
    lines = [_row(titles), _row(["---:"] * len(titles))]
    for number, metrics, entry in rows:
        traffic = [f"{entry[key] / 1e6:.1f}" if key in entry else "" for key in ("upload-bytes", "download-bytes")]
        values = [f"{metrics[name]:.4f}" if metrics.get(name) is not None else "" for name in names]
        lines.append(_row([str(number), *values, *traffic]))
    where = "Means over the clients' own test rows." if on_clients else "On held-out rows; round 0 is the base alone."
    changed = card.facts.get("relative-error", 0) > 1e-4 or "client" in card.facts
    more = " They are those of the run's adapter, from which this export differs." if changed else ""
    return f"{where}{more}\n\n" + "\n".join(lines) + "\n"


def _made(card: Card) -> list[tuple[str, str]]:
    result = card.result
    code, device = result.get("code", {}), result.get("device", {})
    commit = code.get("commit") or "an installed package"
    up, down = (sum(int(e.get(k, 0)) for e in result["rounds"]) for k in ("upload-bytes", "download-bytes"))
    return [
        ("Commit", commit + (" with local changes" if code.get("dirty") else "")),
        ("Versions", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())),
        ("Device", str(device.get("device", "unknown"))),
        ("Bytes from the clients", f"{up:,}"),
        ("Bytes to the clients", f"{down:,}"),
        ("Status of the run", str(result.get("status", "unknown"))),
    ]


def _limits(card: Card) -> list[tuple[str, str]]:
    quantization, weights = card.config.model.quantization, _weights(card.config.model.name)
    limits = [("Scope", "evaluated only on rows like those on which it was trained")]
    if "made" in card.about:
        limits.insert(0, ("Origin", str(card.about["made"].get("said", ""))))
    if quantization != "none" and card.facts.get("merged"):
        text = (
            f"the adapter was trained with an {quantization} base and is merged into the full-precision one, so that "
            "its metrics differ from those above"
        )
        limits.append(("Precision", text))
    elif quantization != "none":
        limits.append(("Precision", f"trained with an {quantization} base; in another precision its metrics differ"))
    if weights != base_name(card.config.model.name):
        limits.append(("Base", f"trained with the weights of {weights}; with others its metrics differ"))
    limits.append(("Privacy", _privacy(card.result)))
    return limits


def _privacy(result: Mapping[str, Any]) -> str:
    """What the adapter may tell of the rows, by the run's record."""
    about, spent = result.get("privacy"), [entry["privacy"] for entry in result.get("rounds", []) if "privacy" in entry]
    if not about or not spent:
        return "an adapter can reveal some of the rows on which it was trained; this was not prevented"
    noise = f"noise multiplier {about['noise-multiplier']:.3g}"
    if about["least-noise-multiplier"] != about["noise-multiplier"]:
        noise = f"noise multipliers {about['least-noise-multiplier']:.3g} to {about['noise-multiplier']:.3g}"
    whom = {"client": "all rows of one client together", "example": "one row"}[about["level"]]
    return (
        f"differentially private for {whom}, with epsilon {spent[-1]['epsilon']:.3g} at delta {about['delta']:g}. "
        f"{about['mechanism'][0].upper()}{about['mechanism'][1:]}; {noise}. This holds for the adapter and not for "
        "other numbers of the run"
    )


def _list(items: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- **{name}:** {text}" for name, text in items) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
