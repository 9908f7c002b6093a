"""Where replies wait for their turn, so that a round of large replies has one of them in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.exchange import ClientUpdate


@dataclass(frozen=True)
class Shelf:
    """Replies that wait.

    Args:
        folder: where their tensors lie meanwhile, one file for each client; None: they stay in memory.
    """

    folder: Path | None = None

    def put(self, update: ClientUpdate) -> Callable[[], ClientUpdate]:
        """Put a reply aside; what is returned takes it back, once."""
        if self.folder is None:
            return lambda: update
        path = self.folder / f"{update.client_id}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in OWN.put(update.adapter).items()}, path)
        scalings = {name: factors.scaling for name, factors in update.adapter.lora.items()}
        rest = replace(update, adapter=AdapterState())

        def take() -> ClientUpdate:
            found = replace(rest, adapter=OWN.get(load_file(path), scalings))
            path.unlink()
            return found

        return take

    def clear(self) -> None:
        """Remove what nobody took back, also what a server that died has left."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
