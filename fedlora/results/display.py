"""Shows a run in a terminal: a bar for the round and each client, a line for each finished round, and a final table."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedlora.config import client_rank

from .record import cut_share

if TYPE_CHECKING:  # these import heavy libraries, but every command imports this file
    from fedlora.config import Config
    from fedlora.data.shown import Shown
    from fedlora.data.stats import ClientStatistics

    from .status import RunStatus

_QUIET_SECONDS = 10.0  # after so long without output, a run prints a line about its progress
_MOST_ALIKE = 3  # largest number of clients that are shown with the same reason
_NUMBER = re.compile(r"-?\d+")
_MOST_CLIENTS = 40  # largest number of clients that fedlora status shows one by one
# What columns of the table of rounds mean.
_COLUMNS = MappingProxyType(
    {
        "loss": "loss, accuracy: on held-out rows.",
        "train": "train: mean training loss of the clients.",
        "error": "error: distance of the aggregate from the exact mean of the updates.",
        "sketch": "sketch: what their sketched sum lost of it, estimated.",
        "drift": "drift: 0 if all clients' updates are equal, 1 if they have nothing in common.",
        "rank": "rank: effective rank of the mean update.",
    }
)


class ConsoleLog(logging.Handler):
    """The product's log lines in the console, dimmed, never wrapped."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), style="dim", soft_wrap=True, markup=False)


class RunDisplay:
    """A listener for `fedlora.common.events` that shows a run.

    On a terminal it shows bars. Elsewhere it prints plain lines, some of them about the progress within long rounds.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds: TaskID | None = None
        self._clients: dict[int, TaskID] = {}
        self._evaluation: TaskID | None = None
        self._alike: Counter[str] = Counter()

    def _line(self, text: str, style: str | None = None) -> None:
        self._said = time.monotonic()
        self._console.print(text, style=style, soft_wrap=True)

    def _stand(self, text: str, after: float = _QUIET_SECONDS) -> None:
        """If no bars are shown, print this line, unless another was printed in the last `after` seconds."""
        if not self._console.is_terminal and time.monotonic() - self._said >= after:
            self._line(text, "dim")

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rest_alike()
        self._progress.stop()

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        """One event."""
        handle = getattr(self, "_on_" + kind.replace("-", "_"), None)
        if handle:
            handle(**facts)

    def _on_round_start(self, round: int, rounds: int, clients: int) -> None:
        if self._rounds is None:
            self._rounds = self._progress.add_task("rounds", total=rounds, note="")
        self._progress.update(self._rounds, description=f"round {round}/{rounds}")
        self._stand(f"round {round} of {rounds}: {_clients(clients)} {'is' if clients == 1 else 'are'} asked", after=0)

    def _on_client_start(self, client_id: int, rank: int, round: int) -> None:
        self._clients[client_id] = self._progress.add_task(f"  client {client_id} (rank {rank})", total=None, note="")

    def _on_client_step(self, client_id: int, step: int, steps: int, loss: float, round: int) -> None:
        if client_id in self._clients:
            self._progress.update(self._clients[client_id], total=steps, completed=step, note=f"loss {loss:.3f}")
        self._stand(f"round {round}  client {client_id}  step {step} of {steps}  loss {loss:.4f}")

    def _on_client_done(
        self, client_id: int, node: int, round: int, metrics: dict[str, float], unit: str = "tokens"
    ) -> None:
        self._drop(self._clients.pop(client_id, None))
        if not self._console.is_terminal:
            learned, seen = "train loss not sent", ""  # with privacy of rows, or masked
            if "train-loss" in metrics:
                learned = f"train loss {metrics['train-loss']:.4f}"
                seen = f"{metrics['train-tokens']:.0f} {unit}, "
            self._line(
                f"round {round}  client {client_id}  {learned}  {metrics['train-steps']:.0f} steps, {seen}"
                f"{metrics['train-seconds']:.1f} s"
            )

    def _on_client_failed(self, client_id: int | None, node: int, reason: str, round: int) -> None:
        self._drop(self._clients.pop(client_id, None) if client_id is not None else None)
        kind = _NUMBER.sub("", reason)  # so that the reasons of several clients are equal
        if kind not in self._alike:
            self._rest_alike()
        self._alike[kind] += 1
        if self._alike[kind] <= _MOST_ALIKE:
            self._console.print(f"round {round}  not counted: {reason}", style="yellow", soft_wrap=True, markup=False)

    def _rest_alike(self) -> None:
        """Print how many more clients had a reason that was already shown for enough clients."""
        more = sum(max(0, count - _MOST_ALIKE) for count in self._alike.values())
        self._alike.clear()
        if more:
            self._console.print(f"  and {more} more for the same reason", style="yellow")

    def _on_evaluate_start(self, examples: int) -> None:
        self._evaluation = self._progress.add_task("  held-out rows", total=examples, note="")
        self._stand(f"evaluating {examples} held-out rows")

    def _on_evaluate_step(self, done: int, total: int) -> None:
        self._stand(f"evaluated {done} of {total} held-out rows")
        if self._evaluation is not None:
            self._progress.update(self._evaluation, completed=done)
            if done >= total:
                self._drop(self._evaluation)
                self._evaluation = None

    def _on_baseline(
        self, metrics: dict[str, float], head: str = "", by: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        words = f" with {head.partition(':')[0]}" if head else ""
        self._line(f"round 0  held-out {_metrics(metrics)}{_ends(by)}  (untouched base{words})")

    def _on_round_end(self, entry: dict[str, Any]) -> None:
        self._rest_alike()
        if self._rounds is not None:
            self._progress.advance(self._rounds)
        failed = f"  {len(entry['failures'])} failed" if entry["failures"] else ""
        ends = _ends(entry.get("heldout-by", {}))
        heldout = f"held-out {_metrics(entry['heldout'])}{ends}  " if "heldout" in entry else ""
        lost = f"sketch loses {share(loss)}  " if (loss := entry.get("sketch-loss")) is not None else ""
        spent = entry.get("privacy")
        private = f"epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g}  " if spent else ""
        self._line(
            f"round {entry['round']}  {heldout}{private}{_clients(len(entry['clients']))}{failed}  "
            f"up {_megabytes(entry['upload-bytes'])}  down {_megabytes(entry['download-bytes'])}  "
            f"{lost}{entry['seconds']['round']:.0f} s"
        )

    def _drop(self, task: TaskID | None) -> None:
        if task is not None:
            self._progress.remove_task(task)


def _clients(number: int) -> str:
    return f"{number} client" if number == 1 else f"{number} clients"


def result_table(folder: Path) -> Table:
    """A table of a run's rounds, from its result.json; columns without a value are left out."""
    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    rows = [{"round": "0", **_scores(data["baseline"])}] if "baseline" in data else []
    for entry in data["rounds"]:
        rows.append(
            {
                "round": str(entry["round"]),
                **_scores(entry.get("heldout", {})),
                "client loss": _number(entry.get("client-test", {}).get("mean", {}).get("loss")),
                "train": _number(entry["train-loss"]),
                "clients": str(len(entry["clients"])),
                "up MB": f"{entry['upload-bytes'] / 1e6:.1f}",
                "down MB": f"{entry['download-bytes'] / 1e6:.1f}",
                "codec": share(entry["codec-error"]),
                "error": share(entry["aggregation-error"]),
                "sketch": share(entry.get("sketch-loss")),
                "drift": "" if entry["drift"] is None else f"{entry['drift']:.2f}",
                "rank": "" if entry["effective-rank"] is None else f"{entry['effective-rank']:.1f}",
                "epsilon": _number(entry.get("privacy", {}).get("epsilon"))[:-2],
            }
        )
    titles = [title for title in (rows[-1] if rows else ()) if any(row.get(title) for row in rows)]
    table = Table(
        title=f"{data['config']['strategy.name']} on {data['config']['model.name']}: {data['status']}",
        caption=" ".join(words for title, words in _COLUMNS.items() if title in titles),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # ten columns fit a terminal of 80
        pad_edge=False,
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*[row.get(title, "") for title in titles])
    return table


def values_table(title: str, by: Mapping[str, Any]) -> Table:
    """A table of the metrics by value of a column: a line for each value, and their means and worst values.

    Args:
        title: title of the table.
        by: the metrics, as `fedlora.tasks.by_value.Scored.by`.
    """
    names = list(by["mean"])
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in (by["column"], "rows", *names):
        table.add_column(heading, justify="left" if heading == by["column"] else "right", overflow="fold")
    for value, metrics in by["values"].items():
        table.add_row(escape(value), str(metrics["rows"]), *[_number(metrics[name]) for name in names])
    table.add_section()
    for word in ("mean", "worst"):
        table.add_row(word, "", *[_number(by[word][name]) for name in names])
    return table


def last_values_table(folder: Path) -> Table | None:
    """The table by value of the last evaluated round of a run; None for a run without `evaluate.by`."""
    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    evaluated = [entry for entry in data["rounds"] if "heldout-by" in entry]
    if not evaluated:
        return None
    by = evaluated[-1]["heldout-by"]
    return values_table(f"held-out rows by {by['column']}, after round {evaluated[-1]['round']}", by)


def cut_line(folder: Path) -> str:
    """The line about rows that were cut, for the end of a run; empty if none was."""
    data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    share = cut_share(data)
    if not share:
        return ""
    return (
        f"{share:.1%} of the rows that clients trained on are longer than data.max-length = "
        f"{data['config']['data.max-length']} tokens and were cut; fedlora data shows how, and proposes a length"
    )


def status_table(run: RunStatus) -> Table:
    """A table of a run's progress with a line for each client; if there are very many, for those of the last round."""
    heldout = f"; held-out {_metrics(run.heldout)}" if run.heldout else ""
    quiet = (
        "" if run.quiet_seconds is None or run.status != "running" else f"; last event {_ago(run.quiet_seconds)} ago"
    )
    table = Table(title=f"{run.status}: {run.round} of {run.rounds} rounds{heldout}{quiet}", box=box.SIMPLE_HEAD)
    titles = ("client", "rank", "round", "train loss", "test loss", "seconds", "now")
    for title in titles:
        table.add_column(title, justify="left" if title == "now" else "right", overflow="fold")
    shown = run.clients
    if len(shown) > _MOST_CLIENTS:
        shown = [client for client in run.clients if client.note or client.round == max(1, run.round)]
        table.caption = f"{len(shown)} of {len(run.clients)} clients: those of this round and the last"
    for client in shown:
        table.add_row(
            str(client.client_id),
            str(client.rank),
            str(client.round or ""),
            _number(client.train_loss),
            _number(client.test_loss),
            "" if client.seconds is None else f"{client.seconds:.1f}",
            escape(client.note),
        )
    return table


def data_table(clients: Sequence[ClientStatistics], config: Config, heldout: int, *, every: bool = False) -> Table:
    """A table of the clients' rows: a line for each client; if there are very many and not `every`, for each rank."""
    table = Table(title=f"{config.data.source}, {config.data.partition}; {heldout} held-out rows")
    words = ["mean characters"] if any(one.mean_characters for one in clients) else []  # images have none
    if every or len(clients) <= _MOST_CLIENTS:
        for title in ("client", "rank", "rows", *words, "labels"):
            table.add_column(title, justify="left" if title == "labels" else "right")
        for one in clients:
            name = f" ({one.name})" if one.name else ""
            rank = client_rank(config.lora, one.client_id)
            mean = [f"{one.mean_characters:.0f}"] if words else []
            table.add_row(f"{one.client_id}{name}", str(rank), str(one.rows), *mean, _counts(one.labels))
        return table
    by_rank: dict[int, list[ClientStatistics]] = {}
    for one in clients:
        by_rank.setdefault(client_rank(config.lora, one.client_id), []).append(one)
    table.caption = f"{len(clients)} clients; --every-client lists each"
    for title in ("rank", "clients", "rows", "of one, least", "median", "most", *words, "labels"):
        table.add_column(title, justify="left" if title == "labels" else "right")
    for rank, group in sorted(by_rank.items(), reverse=True):
        rows = [one.rows for one in group]
        characters = sum(one.mean_characters * one.rows for one in group) / max(1, sum(rows))
        labels = Counter[str]()
        for one in group:
            labels.update(one.labels)
        told = (
            rank,
            len(group),
            sum(rows),
            min(rows),
            f"{median(rows):g}",
            max(rows),
            *([f"{characters:.0f}"] if words else []),
            _counts(labels),
        )
        table.add_row(*map(str, told))
    return table


def _counts(labels: Mapping[str, int]) -> str:
    return escape("  ".join(f"{name}: {count}" for name, count in labels.items()))


def example_text(example: Shown, *, colours: bool = False) -> Text:
    """A row as the model sees it. The learned text is green, and between brackets for terminals without colours.

    Args:
        example: the row.
        colours: whether the terminal shows colours, as a picture's pixels need; without, a picture is in shades.
    """
    if not example.tokens:
        return Text(f"row {example.row}: nothing to predict, left out", style="yellow")
    if example.picture is not None:
        from .pictures import picture_text

        height, width = example.picture.shape[:2]
        text = Text(f"row {example.row}: {width} x {height} pixels", style="dim")
        text.append(f" → ⟦{example.label}⟧\n", style="not dim bold green")
        return text.append(picture_text(example.picture, colours=colours))
    cut = f" of {example.whole}" if example.whole > example.tokens else ""
    text = Text(f"row {example.row}: {example.tokens}{cut} tokens\n", style="dim")
    for piece, learned in example.parts:
        text.append(f"⟦{piece}⟧" if learned else piece, style="not dim bold green" if learned else "not dim")
    if example.label:
        text.append(f" → ⟦{example.label}⟧", style="not dim bold green")
    return text.append("\n")


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _scores(metrics: dict[str, float]) -> dict[str, str]:
    return {"loss": _number(metrics.get("loss")), "accuracy": _number(metrics.get("accuracy"))}


def _metrics(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "accuracy") if name in metrics)


def _ends(by: Mapping[str, Any]) -> str:
    """The values with the worst and the best accuracy, or loss for a task without accuracy; empty without two."""
    if len(by.get("values", {})) < 2:
        return ""
    name = "accuracy" if "accuracy" in by["mean"] else "loss"
    found = sorted((metrics[name], value) for value, metrics in by["values"].items())
    (worst, first), (best, last) = (found[0], found[-1]) if name == "accuracy" else (found[-1], found[0])
    return escape(f"  {name} by {by['column']}: worst {worst:.4f} ({first}), best {best:.4f} ({last})")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def share(value: float | None) -> str:
    """A relative error as text; since fp32 has seven digits, small errors are shown as "< 1e-7"."""
    return "" if value is None else f"{value:.1e}" if value >= 1e-7 else "< 1e-7"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


class ScoringDisplay:
    """Progress of rows that are scored: a bar on a terminal, elsewhere a line for each pass that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )

    def __enter__(self) -> ScoringDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` rows of a pass are scored."""
        if self._console.is_terminal:
            if what not in self._bars:
                self._bars[what] = self._progress.add_task(what, total=total)
            self._progress.update(self._bars[what], completed=done)
        elif done == total:
            self._console.print(f"{what}: {total} rows scored", style="dim", soft_wrap=True, markup=False)
