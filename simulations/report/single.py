"""The report of one run: its rounds, clients, costs and adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlora.results.display import share

from . import facts
from .figures import one_run
from .figures.one_run import heldout, own
from .figures.series import Entry
from .figures.style import styles
from .page import Page, Section
from .read import flat
from .tables import Table


def page(run: Mapping[str, Any], folder: Path) -> Page:
    """The contents of a run's page."""
    config = flat(run.get("config", {}))
    name = str(config.get("strategy.name", "run"))
    style = styles([name])[name]
    rounds = run["rounds"]
    made = {
        "metrics": one_run.metrics(run, style),
        **{words: one_run.lines(run, style, kind) for words, kind in one_run.KINDS.items()},
        "the clients' training losses": one_run.clients(run),
        "cost": one_run.cost(rounds),
        "the adapter's spectrum": one_run.spectrum(folder, name, style),
    }
    lacking = [words for words, found in made.items() if not found]
    absent = [f"Not shown, since this run has no numbers for them: {', '.join(lacking)}."] if lacking else []
    summary = [
        f"{name} on {config.get('model.name', 'a model')}, data {config.get('data.source', 'unknown')}: "
        f"{len(rounds)} of {config.get('federation.rounds', len(rounds))} rounds, "
        f"{len(run.get('clients', []))} clients, {run.get('seconds', 0.0):.0f} s in all; "
        f"{run.get('status', 'unknown')}.",
        "Held-out rows are rows that no client trained on. One run has one seed, and does not rank strategies.",
    ]
    warnings = [f"The run is {run.get('status')}: {run.get('error', 'it has not finished')}."] * (
        run.get("status") != "completed"
    )
    if run.get("code", {}).get("dirty"):
        warnings.append("The code had changes that are in no commit.")
    failed = sum(len(entry.get("failures") or ()) for entry in rounds)
    if failed:
        warnings.append(f"{failed} clients' answers were not counted; the round table says in which rounds.")
    pictures = [picture for found in made.values() for picture in found]
    return Page(
        title=f"Federated run: {config.get('run.name', name)}",
        summary=summary,
        warnings=warnings,
        sections=[Section("Rounds", [_table(run)], pictures, absent)],
        settings=[
            Table(
                "Config",
                ("key", "value"),
                tuple((k, str(v)) for k, v in sorted(config.items())),
                left=frozenset({0, 1}),
            ),
            facts.origin([run]),
        ],
    )


def _table(run: Mapping[str, Any]) -> Table:
    """A table of the rounds' numbers; columns without a value are left out."""
    start = [{"round": 0, "heldout": run["baseline"]}] if "baseline" in run else []
    kinds: list[tuple[str, Callable[[Entry], str]]] = [
        ("round", lambda e: str(e["round"])),
        ("loss", lambda e: _number(heldout(e).get("loss"))),
        ("accuracy", lambda e: _number(heldout(e).get("accuracy"))),
        ("clients' loss", lambda e: _number(own(e).get("loss"))),
        ("train loss", lambda e: _number(e.get("train-loss"))),
        ("clients", lambda e: str(len(e["clients"])) if "clients" in e else ""),
        ("failures", lambda e: str(len(e["failures"])) if e.get("failures") else ""),
        ("MB up", lambda e: _number(_mega(e.get("upload-bytes")), 1)),
        ("MB down", lambda e: _number(_mega(e.get("download-bytes")), 1)),
        ("error", lambda e: share(e.get("aggregation-error"))),
        ("drift", lambda e: _number(e.get("drift"), 2)),
        ("effective rank", lambda e: _number(e.get("effective-rank"), 1)),
        ("seconds", lambda e: _number(e.get("seconds", {}).get("round"), 1)),
    ]
    rows = [*start, *run["rounds"]]
    columns = [(title, [text(entry) for entry in rows]) for title, text in kinds]
    kept = [(title, texts) for title, texts in columns if any(texts)]
    return Table(
        "Rounds",
        tuple(title for title, _ in kept),
        tuple(zip(*(texts for _, texts in kept), strict=True)),
    )


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"
