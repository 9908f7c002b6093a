"""A run that starts from an adapter that is there already, which stays beside the base as a frozen fold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.adapters import AdapterState, stack
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.exchange import ClientUpdate
from fedlora.models import injection
from fedlora.models.peft_files import described, read_adapter
from fedlora.results.runs import adapter_folder

from .base import Initializer, Start


@dataclass(frozen=True)
class Given(Initializer):
    """LoRA's own start, on a base to which a given adapter is added as a fold: `W + s_g B_g A_g + s B A`, with B = 0.

    The run starts at exactly the model of the given adapter, whatever its ranks and those of the clients, and on a
    quantized base too. What is trained is a new adapter beside the given one, which stays frozen. The run's own adapter
    is the sum of both. Tensors trained in full, such as a classification head, start from those of the given adapter.
    Download: the given adapter, once to every client.

    Args:
        adapter: a run, by its name or folder, or the folder of a PEFT checkpoint, on the server's machine.
    """

    adapter: str = ""

    def __post_init__(self) -> None:
        if not self.adapter:
            raise ConfigError(
                "lora.init = given: the adapter to start from is missing; set lora.init-options = adapter=RUN, the "
                "name or folder of a run, or the folder of a PEFT checkpoint"
            )

    def check(self, base: injection.Shapes, fingerprint: str) -> None:
        """Check that the adapter was trained on this base model, and that its modules and tensors are those of the run.

        Raises:
            AdapterError: it does not fit.
        """
        folder = adapter_folder(self.adapter)
        trained_on = described(folder).get("base")
        if trained_on not in (None, fingerprint):
            raise AdapterError(
                f"lora.init = given: {folder} was trained on base {trained_on}, but the base model of this run is "
                f"{fingerprint}; set model.name to the base model of the adapter"
            )
        held = self._read()
        for name, factors in held.lora.items():
            shape = (factors.B.shape[0], factors.A.shape[1])
            if base.lora.get(name) != shape:
                here = f"of shape {base.lora[name]}" if name in base.lora else "not adapted in this run"
                raise AdapterError(
                    f"lora.init = given: {name} of {folder} has an update of shape {shape}, but it is {here}; set "
                    "model.name and lora.target-modules as they were when the adapter was trained"
                )
        for name, tensor in held.tensors.items():
            if base.tensors.get(name) != tuple(tensor.shape):
                raise AdapterError(
                    f"lora.init = given: {folder} has {name} of shape {tuple(tensor.shape)}, but this run trains "
                    f"{base.tensors.get(name, 'no such tensor')}; set model.task and model.labels as they were when "
                    "the adapter was trained"
                )

    def start(self, adapter: AdapterState, replies: Iterable[ClientUpdate]) -> Start:
        """LoRA's own start with the given head, and the given adapter as a fold."""
        held = self._read()
        fold = AdapterState(lora={name: stack([factors]) for name, factors in held.lora.items()})
        return Start(replace(adapter, tensors={**adapter.tensors, **held.tensors}), folds=(fold,))

    def _read(self) -> AdapterState:
        return read_adapter(Path(adapter_folder(self.adapter)))
