"""What exact aggregation gives, in factored form: the reference for what is too large to be formed."""

from __future__ import annotations

from collections.abc import Iterable

from fedlora.adapters import LoraFactors, stack
from fedlora.exchange import ClientUpdate


def ideal(updates: Iterable[ClientUpdate]) -> dict[str, LoraFactors]:
    """What exact aggregation gives: `sum_k p_k s_k B_k A_k` by module, as a stack.

    Args:
        updates: one round's replies with both factors. p_k = n_k / sum(n) over those that have the module.
    """
    parts: dict[str, list[LoraFactors]] = {}
    examples: dict[str, list[int]] = {}
    for update in updates:
        for name, factors in update.adapter.lora.items():
            parts.setdefault(name, []).append(factors)
            examples.setdefault(name, []).append(update.num_examples)
    return {name: stack(parts[name], [n / sum(examples[name]) for n in examples[name]]) for name in parts}
