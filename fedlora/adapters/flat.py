"""An adapter as named tensors, and back, for messages, the server's saved state, clients' disks and PEFT files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .state import EMPTY, AdapterState, LoraFactors, is_missing


@dataclass(frozen=True)
class Layout:
    """Patterns for the names of an adapter's tensors.

    Args:
        factor: pattern for a module's factor, with {module} and {factor}.
        tensor: pattern for a tensor trained in full, with {name}.
    """

    factor: str
    tensor: str

    def of_factor(self, module: str, factor: str) -> str:
        """The name of a module's factor "A", "B" or "R"."""
        return self.factor.format(module=module, factor=factor)

    def of_tensor(self, name: str) -> str:
        """The name of a tensor trained in full."""
        return self.tensor.format(name=name)

    def put(self, adapter: AdapterState) -> dict[str, Tensor]:
        """The adapter's tensors by name. Missing factors are left out; the caller has to keep the scalings."""
        found = {
            self.of_factor(module, name): factor
            for module, factors in adapter.lora.items()
            for name, factor in (("A", factors.A), ("B", factors.B), ("R", factors.R))
            if factor is not None and not is_missing(factor)
        }
        return found | {self.of_tensor(name): tensor for name, tensor in adapter.tensors.items()}

    def get(self, tensors: Mapping[str, Tensor], scalings: Mapping[str, float]) -> AdapterState:
        """The adapter that `put` took apart.

        Args:
            tensors: the adapter's tensors by name.
            scalings: module -> scaling, for every module that has factors.
        """
        lora = {
            module: LoraFactors(
                A=tensors.get(self.of_factor(module, "A"), EMPTY),
                B=tensors.get(self.of_factor(module, "B"), EMPTY),
                scaling=float(scaling),
                R=tensors.get(self.of_factor(module, "R")),
            )
            for module, scaling in scalings.items()
        }
        factors = {self.of_factor(module, factor) for module in scalings for factor in "ABR"}
        start = self.of_tensor("")
        others = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key not in factors}
        return AdapterState(lora=lora, tensors=others)


OWN = Layout(factor="{module}|{factor}", tensor="tensors|{name}")
PEFT = Layout(factor="base_model.model.{module}.lora_{factor}.weight", tensor="base_model.model.{name}")
