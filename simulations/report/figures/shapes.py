"""Figures of the partition of the rows, and of the spectra of trained adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from ..view import View
from .drawing import Picture, axes, legend
from .series import mean_spectrum
from .style import Style

_MOST_CLIENTS = 60


def partition(view: View, cells: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Rows by client and class as bubbles, or without classes rows by client as bars; for the first seed."""
    cell = next((cell for cell in cells if cell.get("partition", {}).get("clients")), None)
    if cell is None:
        return []
    clients, exceptions = _ranks(cell["partition"]["clients"][:_MOST_CLIENTS], view, cells)
    more = len(cell["partition"]["clients"]) - len(clients)
    names = [_client(client) for client in clients]
    classes = sorted({label for client in clients for label in client.get("labels", {})}, key=_natural)
    least = f" The first {len(clients)}; {more} more are not shown." if more else ""
    if not classes:
        figure, ax = axes(height=0.24 * len(clients) + 1.0)
        ax.barh(range(len(clients)), [client["rows"] for client in clients], 0.65, color="#0072B2")
        ax.set_xlabel("rows to train on")
        ax.grid(visible=False, axis="y")
        reading = "The rows that each client trains on, and its LoRA rank."
        data: list[tuple[object, ...]] = [
            (c["client-id"], c.get("name", ""), c.get("rank", ""), "", c["rows"]) for c in clients
        ]
    else:
        data = [
            (c["client-id"], c.get("name", ""), c.get("rank", ""), label, c["labels"].get(label, 0))
            for c in clients
            for label in classes
        ]
        figure, ax = axes(width=min(8.0, 3.6 + 0.6 * len(classes)), height=0.30 * len(clients) + 1.1)
        largest = max(1, *[int(str(row[4])) for row in data])
        at = [(classes.index(str(row[3])), i // len(classes), int(str(row[4]))) for i, row in enumerate(data)]
        ax.scatter(
            [x for x, _, _ in at],
            [y for _, y, _ in at],
            s=[230 * n / largest for _, _, n in at],
            color="#0072B2",
            alpha=0.8,
        )
        ax.set_xticks(range(len(classes)), [str(label) for label in classes], rotation=0 if len(classes) < 13 else 90)
        ax.set_xlim(-0.6, len(classes) - 0.4)
        ax.set_xlabel("class")
        for part in (0.1, 0.5, 1.0):
            ax.scatter([], [], s=230 * part, color="#0072B2", alpha=0.8, label=f"{largest * part:,.0f} rows")
        with_room = {"labelspacing": 1.4}
        figure.legend(
            *ax.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8, **with_room
        )
        reading = "The area of a bubble is the number of a client's rows of a class; r is its LoRA rank."
    ax.set_yticks(range(len(clients)), names)
    ax.set_ylim(len(clients) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    return [
        Picture(
            f"partition-{view.slug}",
            "The clients' rows",
            f"{reading}{exceptions} Of seed {cell['seed']}.{least}",
            figure,
            ("client", "name", "rank", "class", "rows"),
            data,
        )
    ]


def spectra(view: View) -> list[Picture]:
    """Singular values of the final global adapters."""
    lines = {
        row.label: mean_spectrum(cell.get("spectra", {}) for cell in row.choice.cells.values())
        for row in view.strategies
    }
    found = spectrum(f"spectra-{view.slug}", lines, view.styles)
    return [found] if found else []


def spectrum(name: str, lines: Mapping[str, Sequence[float]], styles: Mapping[str, Style]) -> Picture | None:
    """Singular values by index on a logarithmic axis; None if no value is above zero."""
    largest = max((value for values in lines.values() for value in values), default=0.0)
    # Values below this share of the largest are only rounding of the fp32 factors.
    kept = {label: [value for value in values if value > 1e-7 * largest] for label, values in lines.items()}
    kept = {label: values for label, values in kept.items() if values}
    if not kept:
        return None
    figure, ax = axes(height=max(3.6, 0.185 * len(kept) + 0.5))
    for label, values in kept.items():
        style = styles[label]
        ax.plot(
            range(1, len(values) + 1),
            values,
            **style.plot,
            markevery=max(1, len(values) // 10),
            label=label,
        )
    ax.set_yscale("log")
    ax.set(xlabel="index of the singular value", ylabel="singular value of ΔW (mean over modules)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(figure, ax)
    return Picture(
        name,
        "Spectrum of the final adapter",
        "If a line falls at once, the adapter uses few directions; if it ends early, there are no further ones. "
        "At most the 32 largest values of each module are used; those below 10⁻⁷ of the largest are not drawn.",
        figure,
        ("strategy", "index", "singular-value"),
        [(label, i, value) for label, values in kept.items() for i, value in enumerate(values, 1)],
    )


def _ranks(
    clients: Sequence[Mapping[str, Any]], view: View, cells: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """The clients with the ranks that they have with most strategies, and a sentence about strategies that differ."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in view.strategies:
        own = next(
            (cell["partition"]["clients"] for cell in cells if cell["label"] == row.label and "partition" in cell), []
        )
        if own:
            found.setdefault(tuple(client.get("rank") for client in own), []).append(row.label)
    if not found:
        return list(clients), ""
    usual = max(found, key=lambda ranks: len(found[ranks]))
    told = [
        f"{', '.join(labels)} {'trains' if len(labels) == 1 else 'train'} at {_spread(ranks)}"
        for ranks, labels in found.items()
        if ranks != usual
    ]
    shown = [{**client, "rank": rank} for client, rank in zip(clients, usual, strict=False)]
    return shown, f" r is that of most strategies; {'; '.join(told)}." if told else ""


def _spread(ranks: Sequence[Any]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low} everywhere" if low == high else f"ranks {low} to {high}"


def _client(client: Mapping[str, Any]) -> str:
    name = str(client.get("name") or f"client {client['client-id']}")
    name = name if len(name) <= 24 else f"{name[:23]}…"
    return f"{name}, r = {client['rank']}" if "rank" in client else name


def _natural(label: str) -> tuple[float, str]:
    return (float(label), "") if label.replace(".", "", 1).isdigit() else (float("inf"), label)
