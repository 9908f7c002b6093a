"""The check of rows before a run: which rows cannot be used and why, how long rows are, and which are cut."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedlora.common.errors import DataError
from fedlora.config import DataConfig

from .forms import RowReader, left_out
from .places import places

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_MANY = 0.05  # share of the rows; if more rows are cut, there is a warning
_MEASURED = 2000
_ENOUGH = 256  # number of rows whose tokens are counted before a run
_AT_ONCE = 256  # number of rows that are encoded at a time, since all examples of images may not fit in memory
_TOKENS = "tokens"
_log = logging.getLogger("fedlora")
_CUTS = {
    "turns": "lose earlier turns",
    "system": "lose earlier turns and their system prompt",
    "inside": "lose a part of the last question or answer, which are longer together",
    "end": "lose their end",
}


@dataclass(frozen=True)
class Checked:
    """The result of a check of rows.

    Args:
        rows: number of rows.
        faults: faults of rows, with the places of the rows. Each fault would end a run, or exclude a client.
        left_out: a sentence about the rows that have nothing to predict; empty if there are none.
        classes: for classification, name or number of each of the model's classes -> number of its rows, which may be
            0; else empty.
        names: the names that the rows give the classes; empty if they have only numbers.
        usable: number of rows that can become examples.
        measured: number of usable rows whose tokens were counted.
        median, most, longest: number of tokens of the median row, of the longest of the shortest 95 %, and of the
            longest row.
        cut: kind of cut (`Example.cut`) -> number of measured rows that are cut in this way.
        unit: what the numbers of tokens count; pixels for images.
    """

    rows: int
    faults: tuple[str, ...]
    left_out: str
    classes: Mapping[str, int]
    names: tuple[str, ...] = ()
    usable: int = 0
    measured: int = 0
    median: int = 0
    most: int = 0
    longest: int = 0
    cut: Mapping[str, int] | None = None
    unit: str = _TOKENS

    @property
    def cut_share(self) -> float:
        return sum((self.cut or {}).values()) / max(1, self.measured)


def check_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    data: DataConfig,
    task: RowReader,
    measured: int = _MEASURED,
) -> Checked:
    """Check rows as a run would.

    Args:
        rows: all or some rows of the source.
        tokenizer: the model's tokenizer; None: no tokens are counted.
        data: the run's section data.
        task: the run's task.
        measured: largest number of rows whose tokens are counted; they are evenly spaced.

    Raises:
        DataError: a column is missing, or the form does not fit the task.
    """
    idle, wrong = task.unusable(rows, tokenizer, data)
    usable = [at for at in range(len(rows)) if at not in idle and at not in wrong]
    faults: list[str] = []
    classes: dict[str, int] = {}
    names: tuple[str, ...] = ()
    try:
        task.check_rows(rows.select(usable), data)
        names = task.class_names(rows, data)
        classes = _classes(rows.select(usable), names, data, task.classes) if task.classes else {}
    except DataError as error:
        faults.append(str(error).removeprefix(f"{data.source}: "))
    sizes: list[int] = []
    cut: Counter[str] = Counter()
    if tokenizer is not None and not faults:
        chosen = [usable[at] for at in np.linspace(0, len(usable) - 1, min(measured, len(usable))).astype(int)]
        for start in range(0, len(chosen), _AT_ONCE):
            some = chosen[start : start + _AT_ONCE]
            examples, unread = task.encode(rows.select(some), tokenizer, data)
            wrong |= {some[at]: why for at, why in unread.items()}
            sizes += [example.whole for example in examples if example is not None]
            cut.update(example.cut for example in examples if example is not None and example.cut)
    lengths = np.array(sizes, dtype=np.int64)
    found = Checked(
        rows=len(rows),
        faults=(*_grouped(rows, wrong, data), *faults),
        left_out=left_out(rows, idle, data).removeprefix(f"{data.source}: ") if idle else "",
        classes=classes,
        names=names,
        usable=len(usable) - len(wrong.keys() & {*usable}),
    )
    if not len(lengths):
        return found
    middle, most = (int(value) for value in np.quantile(lengths, (0.5, 0.95), method="higher"))
    longest = int(lengths.max())
    return replace(
        found, measured=len(lengths), median=middle, most=most, longest=longest, cut=dict(cut), unit=task.unit
    )


def too_long(found: Checked, data: DataConfig) -> str:
    """A warning if many rows are longer than `data.max-length`; otherwise empty."""
    if found.cut_share <= _MANY:
        return ""
    return (
        f"{found.cut_share:.0%} of the rows are longer than data.max-length = {data.max_length} tokens and are "
        f"cut; with data.max-length = {found.most}, 95 % of the rows would stay whole"
    )


def warn_of_lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig, task: RowReader) -> None:
    """Log the warning of `too_long`, judged by some evenly spaced rows."""
    if task.unit != _TOKENS:
        return
    some = rows.select(range(0, len(rows), max(1, len(rows) // _ENOUGH)))
    if said := too_long(check_rows(some, tokenizer, data, task), data):
        _log.warning("%s", said)


def lines(found: Checked, data: DataConfig) -> list[str]:
    """The result of a check as lines to print, without the faults."""
    said = [f"rows: {found.left_out}"] if found.left_out else []
    if found.classes:
        said.append("classes: " + ", ".join(f"{name} ({count})" for name, count in found.classes.items()))
    if found.names and not data.label_names and list(found.names) == sorted(found.names):
        said.append(
            f"classes are numbered in alphabetical order; data.label-names = {', '.join(found.names)!r} gives them the "
            "same numbers in every file"
        )
    if not found.measured:
        return said
    of = "" if found.measured == found.usable else f" of {found.measured} rows that were measured"
    if found.unit != _TOKENS:
        return [*said, f"{found.unit}{of}: {found.median} in each image, as the model sees it"]
    said.append(
        f"tokens{of}: median {found.median}, 95 % within {found.most}, longest {found.longest}; "
        f"data.max-length = {data.max_length}"
    )
    kinds = "; ".join(f"{count} {_CUTS[kind]}" for kind, count in sorted((found.cut or {}).items()))
    said.append(f"cut{of}: {kinds or 'none'}")
    return [*said, *filter(None, [too_long(found, data)])]


def report(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig, task: RowReader, model: str
) -> tuple[list[str], str]:
    """The result of `check_rows` as lines to print, and a sentence about rows that a run cannot use, or "".

    Without a tokenizer, a line says that no tokens were counted.
    """
    found = check_rows(rows, tokenizer, data, task)
    said = lines(found, data)
    if tokenizer is None:
        said.append(f"{task.unit}: not counted, since model.name = {model} is not on this machine yet")
    return said, f"{data.source}: {'; '.join(found.faults)}" if found.faults else ""


def _grouped(rows: Dataset, wrong: Mapping[int, str], data: DataConfig) -> list[str]:
    kinds: dict[str, list[int]] = {}
    for at, why in sorted(wrong.items()):
        kinds.setdefault(why, []).append(at)
    return [f"{places(rows, at, data)}: {why}" for why, at in kinds.items()]


def _classes(rows: Dataset, names: Sequence[str], data: DataConfig, classes: int) -> dict[str, int]:
    """The number of rows of each of the model's classes."""
    column = data.label_column
    counts = Counter(int(cell) for cell in rows.select_columns([column])[:][column])
    called = [names[place] if place < len(names) else str(place) for place in range(classes)]
    return {name: counts.get(place, 0) for place, name in enumerate(called)}
