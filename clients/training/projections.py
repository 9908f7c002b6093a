"""What keeps a client's factors in a part of the space: projections after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor

from fedlora.adapters.lowrank import of_matrix
from fedlora.exchange import Plan
from fedlora.models.adapted import AdaptedModel, merge_folds
from fedlora.models.trainable import Pair
from fedlora.models.weights import weight_of

# The leading singular directions of a model's weights, by number and module: U [d_out, k] and V' [k, d_in].
_LEADING: WeakKeyDictionary[PeftModel, dict[tuple[int, str], tuple[Tensor, Tensor]]] = WeakKeyDictionary()

COMPLEMENT = "complement"


def projection(model: AdaptedModel, pairs: Sequence[Pair], plan: Plan) -> Callable[[], None]:
    """What is to be called before the first step of a round and after each: it changes the trained factors in place.

    Args:
        model: gives the weights.
        pairs: the factors of each module.
        plan: a term "complement" of value k keeps the update away from the k leading singular directions of the weight,
            on both sides (Comp-LoRA). Without such a term, nothing is done.
    """
    counts = [int(term.value) for term in plan.terms if term.name == COMPLEMENT]
    if not counts:
        return lambda: None
    sides = [(pair, *_leading(model, pair.module, max(counts))) for pair in pairs]

    def project() -> None:
        for pair, u, vh in sides:
            if pair.A.requires_grad:
                pair.A.data.sub_(pair.A.data @ vh.T @ vh)
            if pair.B.requires_grad:
                pair.B.data.sub_(u @ (u.T @ pair.B.data))

    return project


def _leading(model: AdaptedModel, module: str, count: int) -> tuple[Tensor, Tensor]:
    """The directions of the base model's own weight, whatever folds are merged into it."""
    known = _LEADING.setdefault(model.model, {})
    if (count, module) not in known:
        run, folds = model.merged
        merge_folds(model, None, ())
        for name, layer in model.layers.items():
            u, _, vh = of_matrix(weight_of(layer), count)
            known[count, name] = u.to(model.base.device, torch.float32), vh.to(model.base.device, torch.float32)
        merge_folds(model, run, folds)
    return known[count, module]
