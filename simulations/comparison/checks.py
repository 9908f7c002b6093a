"""Checks before a comparison, for faults that all its scenarios would have."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.common.errors import FedLoraError
from fedlora.models import pick_device

from ..checks import check
from .grid import Grid


def check_scenarios(grid: Grid, devices: Sequence[str] = ()) -> None:
    """Check that at least one scenario can be run. A fault of a single scenario is left to its cells.

    Args:
        grid: the comparison.
        devices: the devices on which cells will run; empty: those of their configs.

    Raises:
        FedLoraError: no scenario can be run; the error is that of the first one.
    """
    for device in devices:
        pick_device(device, "--slots")
    first = {cell.scenario: cell.configs[0] for cell in reversed(grid.cells)}
    faults: list[FedLoraError] = []
    for scenario in grid.scenarios:
        try:
            check(first[scenario])
        except FedLoraError as error:
            faults.append(error)
    if len(faults) == len(grid.scenarios):
        raise faults[0]
