"""The final table of each scenario, as cells of text, and as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..comparison.ranking import Ranking, Row, lower_is_better
from .figures.series import client_metric, client_scores, entries, is_personal

_COSTLESS = frozenset({"base", "local", "centralised"})


@dataclass(frozen=True)
class Table:
    """Cells of text under column titles.

    Args:
        title: title of the table.
        columns: titles of the columns.
        rows: rows with a text for each column.
        plain: for each row, whether it is a baseline's.
        left: indexes of the columns that are aligned left, since they have words.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    plain: tuple[bool, ...] = ()
    left: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Record:
    """One row of a final table, in numbers; the columns of final.csv."""

    scenario: str
    label: str
    role: str
    rank: int | None
    lr: float | None
    edge: str
    mean: float | None
    sd: float | None
    seeds: int
    difference: float | None
    pairs: int
    interval_low: float | None
    interval_high: float | None
    p: float | None
    p_holm: float | None
    worst_client: float | None
    megabytes_up: float | None
    megabytes_down: float | None
    seconds: float | None
    notes: str


def records(ranking: Ranking) -> list[Record]:
    """A scenario's rows in numbers."""
    cells = [cell for row in ranking.rows for cell in row.choice.cells.values()]
    metric = client_metric(cells, ranking.metric)
    return [_record(ranking, row, metric) for row in ranking.rows]


def final(ranking: Ranking, rows: Sequence[Record], title: str) -> Table:
    """A scenario's rows in text; columns without any value are left out."""
    arrow = "↓" if lower_is_better(ranking.metric) else "↑"
    worst = client_metric((cell for row in ranking.rows for cell in row.choice.cells.values()), ranking.metric)
    several = any(row.n > 1 for row in ranking.rows)
    kinds: list[tuple[str, Callable[[Record], str]]] = [
        ("rank", lambda r: "" if r.rank is None else str(r.rank)),
        ("strategy", lambda r: r.label),
        ("learning rate", _rate),
        (f"{ranking.metric} {arrow}" + (" (mean ± sd)" if several else ""), _mean),
        ("seeds", lambda r: str(r.seeds)),
        (f"−\u00a0{ranking.reference}", lambda r: "" if r.difference is None else f"{r.difference:+.4f}"),
        ("95 %", lambda r: "" if r.interval_low is None else f"{r.interval_low:+.3f} … {r.interval_high:+.3f}"),
        ("p (Holm)", lambda r: p_text(r.p_holm)),
        (f"worst client's {worst}", lambda r: "" if r.worst_client is None else f"{r.worst_client:.4f}"),
        ("MB up", lambda r: _megabytes(r.megabytes_up)),
        ("MB down", lambda r: _megabytes(r.megabytes_down)),
        (
            "seconds",
            lambda r: "" if r.seconds is None else f"{r.seconds:.0f}" if r.seconds >= 10 else f"{r.seconds:.1f}",
        ),
        ("notes", lambda r: r.notes),
    ]
    texts = [(title, [text(row) for row in rows]) for title, text in kinds]
    kept = [(title, column) for title, column in texts if any(column)]
    return Table(
        title,
        tuple(title for title, _ in kept),
        tuple(zip(*(column for _, column in kept), strict=True)),
        tuple(row.role != "strategy" for row in rows),
        frozenset(i for i, (title, _) in enumerate(kept) if title in {"strategy", "notes"}),
    )


def markdown(tables: Sequence[Table]) -> str:
    """All tables as Markdown."""
    parts: list[str] = []
    for table in tables:
        words = [":---" if i in table.left else "---:" for i in range(len(table.columns))]
        lines = [table.columns, words, *table.rows]
        parts.append(f"### {table.title}\n\n" + "\n".join("| " + " | ".join(_bar(line)) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """All tables as LaTeX; they need the package booktabs."""
    parts: list[str] = ["% \\usepackage{booktabs}"]
    for table in tables:
        form = "".join("l" if i in table.left else "r" for i in range(len(table.columns)))
        lines: list[str] = []
        for i, row in enumerate(table.rows):
            if i and table.plain and table.plain[i] and not table.plain[i - 1]:
                lines.append("\\midrule")
            lines.append(" & ".join(map(_tex, row)) + " \\\\")
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\caption{{{_tex(table.title)}}}\n\\begin{{tabular}}{{{form}}}\n\\toprule\n"
            f"{' & '.join(map(_tex, table.columns))} \\\\\n\\midrule\n" + "\n".join(lines) + "\n\\bottomrule\n"
            "\\end{tabular}\n\\end{table}"
        )
    return "\n\n".join(parts) + "\n"


def to_csv(rows: Sequence[Record]) -> str:
    """All scenarios' rows in numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = list(Record.__dataclass_fields__)
    writer.writerow(names)
    writer.writerows(["" if getattr(row, name) is None else getattr(row, name) for name in names] for row in rows)
    return buffer.getvalue()


def p_text(p: float | None) -> str:
    """A p-value as text."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _record(ranking: Ranking, row: Row, metric: str | None) -> Record:
    cells = list(row.choice.cells.values())
    pick = max if metric and lower_is_better(metric) else min
    by_seed = [client_scores(cell, metric) for cell in cells] if metric else []
    worst = [pick(found.values()) for found in by_seed if found]
    sends = row.label not in _COSTLESS
    seconds = [cell["seconds"] for cell in cells if cell.get("seconds") is not None]
    return Record(
        scenario=ranking.scenario,
        label=row.label,
        role=row.role,
        rank=row.rank,
        lr=row.choice.lr,
        edge=row.choice.edge,
        mean=row.mean,
        sd=row.sd,
        seeds=row.n,
        difference=row.difference,
        pairs=row.pairs,
        interval_low=row.interval[0] if row.interval else None,
        interval_high=row.interval[1] if row.interval else None,
        p=row.p,
        p_holm=row.p_holm,
        worst_client=fmean(worst) if worst else None,
        megabytes_up=_total(cells, "upload-bytes") if sends else None,
        megabytes_down=_total(cells, "download-bytes") if sends else None,
        seconds=fmean(seconds) if seconds else None,
        notes=_notes(ranking, row, cells),
    )


def _total(cells: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Megabytes of a whole run, mean over seeds."""
    totals = [sum(entry.get(key, 0) for entry in entries(cell)) / 1e6 for cell in cells if entries(cell)]
    return fmean(totals) if totals else None


def _notes(ranking: Ranking, row: Row, cells: Sequence[Mapping[str, Any]]) -> str:
    notes: list[str] = []
    if row.label == ranking.reference:
        notes.append("reference")
    if row.label == "base":
        notes.append("untrained")
    elif row.role == "strategy" and any(is_personal(cell) for cell in cells):
        notes.append("personal")
    if row.choice.failures:
        notes.append(f"{len(row.choice.failures)} cells failed")
    return "; ".join(notes)


def _mean(row: Record) -> str:
    if row.mean is None:
        return "failed"
    return f"{row.mean:.4f}" if row.sd is None else f"{row.mean:.4f} ± {row.sd:.4f}"


def _rate(row: Record) -> str:
    mark = {"lowest": " ↓", "highest": " ↑"}.get(row.edge, "")
    return "" if row.lr is None else f"{row.lr:g}{mark}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _bar(row: Sequence[str]) -> list[str]:
    return [text.replace("|", "\\|") for text in row]


def _tex(text: str) -> str:
    plain = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    signs = {
        "\u00a0": "~",
        "±": r"$\pm$",
        "−": r"$-$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "<": "$<$",
        ">": "$>$",
        "≤": r"$\leq$",
    }
    return "".join(plain.get(c) or signs.get(c) or (f"\\{c}" if c in "&%$#_{}" else c) for c in text)
