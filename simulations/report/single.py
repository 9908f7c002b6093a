"""The report of one run: its rounds, clients, costs and adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from fedlora.results.display import share

from . import facts
from .by_value import section as by_value
from .figures import membership as pictured
from .figures import one_run, timing
from .figures.one_run import heldout, own
from .figures.series import Entry, start
from .figures.style import styles
from .page import Page, Section
from .read import audit, flat
from .samples import section as sampled
from .tables import Table


def page(run: Mapping[str, Any], folder: Path, samples: int) -> Page:
    """The contents of a run's page.

    Args:
        run: the content of result.json.
        folder: the run's folder.
        samples: largest number of images of each client that are shown.
    """
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
    if "privacy" in run and (spent := [entry["privacy"] for entry in rounds if "privacy" in entry]):
        summary.append(
            f"Privacy: epsilon {spent[-1]['epsilon']:.2f} at delta {run['privacy']['delta']:g}, by "
            f"{run['privacy']['mechanism']}. The adapter is covered by this; losses, norms and other numbers on this "
            "page are not."
        )
    pictures = [*(picture for found in made.values() for picture in found), *timing.of_run(run, name, style)]
    sections = [Section("Rounds", [_table(run)], pictures, absent)]
    if found := by_value(run):
        sections.append(found)
    if found := sampled(run, samples):
        sections.append(found)
    if audited := audit(folder):
        figures = [pictured.curves(audited), pictured.losses(audited[0])]
        sections.append(Section("Membership inference", [_attacks(audited)], figures))
    return Page(
        title=f"Federated run: {config.get('run.name', name)}",
        summary=summary,
        warnings=warnings,
        sections=sections,
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
        ("sketch loss", lambda e: share(e.get("sketch-loss"))),
        ("drift", lambda e: _number(e.get("drift"), 2)),
        ("effective rank", lambda e: _number(e.get("effective-rank"), 1)),
        ("epsilon", lambda e: _number(_private(e).get("epsilon"), 2)),
        ("clip", lambda e: _number(_private(e).get("clip"), 3)),
        ("clipped", lambda e: _number(_private(e).get("clipped"), 2)),
        ("signal over noise", lambda e: _number(_middle(_private(e).get("signal-to-noise")), 2)),
        ("hours", lambda e: _number(e["time"] / 3600 if "time" in e else None, 2)),
        ("seconds", lambda e: _number(e.get("seconds", {}).get("round"), 1)),
    ]
    rows = [*start(run), *run["rounds"]]
    columns = [(title, [text(entry) for entry in rows]) for title, text in kinds]
    kept = [(title, texts) for title, texts in columns if any(texts)]
    return Table(
        "Numbers of each round",
        tuple(title for title, _ in kept),
        tuple(zip(*(texts for _, texts in kept), strict=True)),
    )


def _attacks(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A table of what attacks on the audited runs find."""
    titles = ("run", "epsilon", "score", "AUC", "95 % interval", "found at 1 % false alarms", "advantage")
    rows = [
        (
            str(run["run"]),
            _number(run["privacy"].get("epsilon"), 2) or "no limit",
            name,
            _number(attack["auc"], 3),
            " to ".join(_number(end, 3) for end in attack["auc-interval"]),
            share(attack["caught"]),
            _number(attack["advantage"], 3),
        )
        for run in runs
        for name, attack in run["attacks"].items()
    ]
    return Table(
        "Attacks; an AUC of 0.5 and an advantage of 0 are guessing", titles, tuple(rows), left=frozenset({0, 2})
    )


def _private(entry: Entry) -> Mapping[str, Any]:
    return entry.get("privacy", {})


def _middle(of_modules: Mapping[str, float] | None) -> float | None:
    """The median over the modules."""
    return median(of_modules.values()) if of_modules else None


def _mega(count: float | None) -> float | None:
    return None if count is None else count / 1e6


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"
