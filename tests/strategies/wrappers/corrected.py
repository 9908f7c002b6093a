"""Runs with a correction: alone, in cohorts, resumed, and beside the same run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config import Scalar
from tests.federation import run_locally, tiny


def check_runs(
    folder: Path, model: Path, rounds: int, **keys: Scalar
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Check that cohorts learn the same, that a resumed run does to the bit, and that the correction changes something.

    Args:
        folder: for the runs.
        model: folder of a tiny model.
        rounds: of a whole run; the one that is resumed stops after two.
        keys: of all runs, with `strategy__correction`.

    Returns:
        The held-out losses by round, and the results, of the runs "1", "auto" (clients at once) and "plain" (without a
        correction).
    """
    common = {**keys, "federation__rounds": rounds}
    ends: dict[str, dict[str, Any]] = {}
    for at_once in ("1", "auto"):
        _, ends[at_once] = run_locally(
            tiny(folder, model, run__id=f"r{at_once}", train__clients_at_once=at_once, **common)
        )
    _, ends["plain"] = run_locally(tiny(folder, model, run__id="p", **{**common, "strategy__correction": "none"}))
    losses = {
        key: [entry["heldout"]["loss"] for entry in result["rounds"] if entry["round"]] for key, result in ends.items()
    }
    assert losses["1"] == pytest.approx(losses["auto"], rel=1e-4)
    assert losses["1"][-1] != pytest.approx(losses["plain"][-1], rel=1e-4)
    short = {**common, "federation__rounds": 2, "train__schedule": "constant"}
    run_locally(tiny(folder, model, run__id="two", **short))
    longer = {**short, "federation__rounds": rounds}
    _, resumed = run_locally(tiny(folder, model, run__id="two", run__resume=True, **longer))
    _, whole = run_locally(tiny(folder, model, run__id="three", **longer))
    assert resumed["rounds"][-1]["heldout"]["loss"] == whole["rounds"][-1]["heldout"]["loss"]
    return losses, ends
