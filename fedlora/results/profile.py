"""Shows how the time of a round is spent: a table by section, and a trace for a browser.

The code marks its sections with `torch.profiler.record_function`, which costs almost nothing without a profiler. LoRA
layers run too often for that, and are marked by hooks only while a profiler runs.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from fedlora.config import Config
    from fedlora.models.adapted import AdaptedModel

TRACE, TABLE = "profile.json.gz", "profile-table.json"
# A trace grows by about ten thousand events with each batch. After this many batches, the round is no longer watched.
MOST_BATCHES = 64
_PREFIX = "fedlora/"
_ROUND, _EVALUATE, _FORWARD, _BACKWARD = "round", "evaluate", "forward", "backward"
_ADAPTER, _BASE, _ADAPTER_BACKWARD = "adapter", "base", "adapter-backward"
_CODEC = "codec"
# Section -> its row in the table, in this order. Time counts for the innermost section, except within an evaluation.
ROWS = {
    _FORWARD: "base model, forward and loss",
    _BACKWARD: "base model, backward",
    _ADAPTER: "adapters, forward",
    _ADAPTER_BACKWARD: "adapters, backward",
    "optimizer": "optimizer",
    "data": "data: tokens and batches",
    _CODEC: "messages: coding and checks",
    "clients": "clients, everything else",
    "aggregation": "aggregation",
    "diagnose": "diagnosis",
    _EVALUATE: "evaluation",
    "save": "saving the adapter",
    "checkpoint": "saving the server's state",
    _ROUND: "everything else",
}
_SAME_ROW = {_BASE: _FORWARD}
_BATCHES = frozenset({"client-step", "evaluate-step", "client-evaluated"})
_NODE = "autograd::engine::evaluate_function"


@dataclass(frozen=True)
class Profile:
    """The result of a profile.

    Attributes:
        covers: text about what was watched, such as "round 1".
        seconds: wall time of what was watched, in seconds.
        sections: seconds of each section, in the order of `ROWS`; their sum is `seconds`.
        split: True if the adapters' backward pass has a section of its own; False if it is part of the base model's.
        device: the device that computed.
    """

    covers: str
    seconds: float
    sections: dict[str, float]
    split: bool
    device: str


class Profiler:
    """A listener for `fedlora.common.events` that profiles the first round; see `profiled`.

    Attributes:
        folder: the run's folder.
        profile: the result; None until the end, or if no round began.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.profile: Profile | None = None
        self.folder = folder
        self._config = config
        self._open: ExitStack | None = None
        self._torch: Any = None
        self._covers, self._batches = "", 0

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        """One event."""
        if self._torch is None:
            if kind == "round-start" and facts["round"]:
                self._start(facts["round"])
        elif self._open is not None:
            self._batches += kind in _BATCHES
            if kind == "round-end":
                self.stop()
            elif self._batches >= MOST_BATCHES:
                self._covers += f", up to the {MOST_BATCHES}th batch"
                self.stop()

    def _start(self, number: int) -> None:
        from torch import profiler

        from fedlora.models.adapted import adapted_model

        model = adapted_model(self._config.model, self._config.lora)
        self._covers = f"round {number}"
        self._open = ExitStack()
        self._open.enter_context(_layers_marked(model))
        self._torch = self._open.enter_context(profiler.profile(activities=profiler.supported_activities()))
        self._open.enter_context(profiler.record_function(_PREFIX + _ROUND))
        self._device = str(model.base.device)

    def stop(self) -> None:
        """Stop profiling."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def write(self) -> None:
        """Write both files, if a round was profiled."""
        if self._torch is None:
            return
        self._torch.export_chrome_trace(str(self.folder / TRACE))
        split = (
            not self._config.model.gradient_checkpointing
        )  # checkpointing repeats the forward pass within the backward pass
        sections = by_section(operations(self.folder / TRACE), split)
        self.profile = Profile(self._covers, sum(sections.values()), sections, split, self._device)
        (self.folder / TABLE).write_text(json.dumps(asdict(self.profile), indent=2) + "\n", encoding="utf-8")


@contextmanager
def profiled(config: Config, folder: Path) -> Iterator[Profiler]:
    """Within the block, profile the first round in this process, and write the result to the folder.

    A round 0 for statistics is not profiled. If the block ends with an error after the profiled round, the result is
    written too.

    Args:
        config: the run's configuration.
        folder: the run's folder, for `profile.json.gz` (the trace) and `profile-table.json`.
    """
    from fedlora.common.events import listen

    watcher = Profiler(config, folder)
    try:
        with listen(watcher):
            yield watcher
    except BaseException:
        whole = watcher._open is None
        watcher.stop()
        if whole:
            watcher.write()
        raise
    watcher.stop()
    watcher.write()


class Operation(NamedTuple):
    """One operation or one section of a trace, with times in microseconds.

    Attributes:
        number: torch's sequence number of the operation in the forward pass; None without one.
        backward: whether the operation is a node of the backward graph.
    """

    start: float
    length: float
    name: str
    thread: int
    number: int | None
    backward: bool


def operations(trace: Path) -> list[Operation]:
    """The operations of a trace that ran on the CPU; those of a GPU are left out."""

    def kept(found: dict[str, Any]) -> Any:  # a trace is large, so that what is not needed is dropped while it is read
        if "ph" not in found:
            return found
        if found.get("cat") not in ("cpu_op", "user_annotation") or "dur" not in found:
            return None
        more = found["args"]
        number, backward = more.get("Sequence number"), bool(more.get("Fwd thread id"))
        return Operation(found["ts"], found["dur"], sys.intern(found["name"]), found["tid"], number, backward)

    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return [event for event in json.load(file, object_hook=kept)["traceEvents"] if event is not None]


def by_section(trace: Sequence[Operation], split: bool) -> dict[str, float]:
    """Seconds of wall time in each section; their sum is the time of the profiled round.

    A node of the backward graph has the sequence number of the operation that made it. The adapters' backward pass
    consists of the nodes that were made within a LoRA layer, but outside the base layer in it.

    Args:
        trace: the operations of one round.
        split: whether the adapters' backward pass gets a section of its own.
    """
    ordered = sorted(trace, key=lambda one: (one.start, -one.length))
    whole = next(one for one in ordered if one.name == _PREFIX + _ROUND)
    end = whole.start + whole.length
    seconds = dict.fromkeys(ROWS, 0.0)
    open_sections: list[tuple[float, str]] = []
    of_adapter: dict[int, bool] = {}
    nodes: list[Operation] = []
    for one in ordered:
        if one.name.startswith(_NODE):
            nodes.append(one)
        if one.thread != whole.thread:
            continue
        while open_sections and open_sections[-1][0] <= one.start:
            open_sections.pop()
        inner = open_sections[-1][1] if open_sections else ""
        if one.name.startswith(_PREFIX):
            row = _EVALUATE if inner == _EVALUATE else one.name.removeprefix(_PREFIX)
            ended = min(one.start + one.length, end)
            seconds[_SAME_ROW.get(row, row)] += (ended - one.start) / 1e6
            if inner:
                seconds[_SAME_ROW.get(inner, inner)] -= (ended - one.start) / 1e6
            open_sections.append((ended, row))
        elif one.number is not None and not one.backward:
            of_adapter[one.number] = inner == _ADAPTER  # the last operation with a number is the one that made the node
    if split:
        share = _of_adapters(nodes, of_adapter)
        seconds[_ADAPTER_BACKWARD] += share
        seconds[_BACKWARD] -= share
    return seconds


def _of_adapters(nodes: Sequence[Operation], of_adapter: Mapping[int, bool]) -> float:
    """Seconds of the backward nodes that were made within adapters.

    A node without a number, which adds up the gradient of a parameter, belongs to the node before it.
    """
    total, ours = 0.0, False
    for node in nodes:
        ours = ours if node.number is None else of_adapter.get(node.number, False)
        total += node.length / 1e6 if ours else 0.0
    return total


def table(profile: Profile) -> Table:
    """A table of the sections that took time, for a terminal."""
    notes = [
        "The profiler slows the run down, most of all many small operations. Trust the shares more than the seconds."
    ]
    if not profile.split:
        notes.append("The adapters' backward pass is in the base model's: gradient checkpointing mixes the two.")
    if profile.device != "cpu":
        notes.append("Seconds are those of the CPU; the times of the GPU are in the trace.")
    shown = Table(
        title=f"where the time went: {profile.covers}, {profile.seconds:.2f} s",
        caption=" ".join(notes),
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("section")
    shown.add_column("seconds", justify="right")
    shown.add_column("share", justify="right")
    for section, seconds in profile.sections.items():
        if seconds > 0:
            shown.add_row(ROWS[section], f"{seconds:.3f}", f"{seconds / profile.seconds:.1%}")
    shown.add_row("together", f"{profile.seconds:.3f}", "100.0%", style="bold")
    return shown


def show(watcher: Profiler, console: Console) -> None:
    """Print the result, and where its files are."""
    if watcher.profile is None:
        console.print("no profile: this run had no round to play")
        return
    console.print(table(watcher.profile))
    console.print(f"trace:   {watcher.folder / TRACE} (open it at https://ui.perfetto.dev)", soft_wrap=True)


@contextmanager
def _layers_marked(model: AdaptedModel) -> Iterator[None]:
    """Within the block, mark each LoRA layer as a section "adapter", and the base layer in it as a section "base"."""
    handles: list[Any] = []
    for layer in model.layers.values():
        handles += _hooks(layer, _ADAPTER) + _hooks(layer.get_base_layer(), _BASE)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, section: str) -> list[Any]:
    from torch.profiler import record_function

    marks: list[Any] = []

    def before(module: nn.Module, inputs: Any) -> None:
        marks.append(record_function(_PREFIX + section))
        marks[-1].__enter__()

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        marks.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
