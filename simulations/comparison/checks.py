"""What goes wrong in all scenarios of a comparison alike, said before its first cell."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.common.errors import FedLoraError
from fedlora.models import pick_device

from ..checks import check
from .grid import Grid


def check_scenarios(grid: Grid, devices: Sequence[str] = ()) -> None:
    """What goes wrong in all scenarios of a comparison alike; a fault of one is its own cells'.

    Args:
        grid: the comparison.
        devices: on which its cells are to be run; their own, where there are none.

    Raises:
        FedLoraError: the first one's, where none of them could be run.
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
