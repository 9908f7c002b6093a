"""Replies of sketches: which tensors a client sends of its adapter where the server needs only sums (`wire.sum`).

A reply has no factors. Its tensors are the sketches of each module's update, such as "module|Y", and the tensors
trained in full, which are averaged anyway and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.sketched_sum import Shape, Sketch, sketched
from fedlora.common.errors import WireError

from .messages import Plan, SecondQuestion

BASIS = "Q"


def name_of(module: str, part: str) -> str:
    """The name of a module's sketch, which no parameter can have."""
    return f"{module}|{part}"


def is_sketch(name: str) -> bool:
    """Whether a tensor of this name is a module's sketch, and no tensor trained in full."""
    return "|" in name


def asked(plan: Plan, adapter: AdapterState, *, second: bool = False) -> AdapterState:
    """The names and shapes of a reply, as an adapter; where the plan has a sketch, of tensors without memory.

    Args:
        plan: of the broadcast.
        adapter: of the broadcast.
        second: whether the reply to the second question of a round is meant.
    """
    back, sketch = plan.sent_back(adapter), plan.sketch
    if sketch is None:
        return back
    tensors = {
        name_of(module, part): torch.empty(shape, device="meta")
        for module, factors in back.lora.items()
        for part, shape in _shapes(sketch, factors, second).items()
    }
    dense = back.tensors if second == (sketch.passes == 2) else {}
    return AdapterState(tensors={**tensors, **dense})


def made(
    plan: Plan, adapter: AdapterState, *, second: bool = False, bases: Mapping[str, Tensor] | None = None
) -> AdapterState:
    """What a client sends of its trained adapter.

    Args:
        plan: of the broadcast, with a sketch.
        adapter: as trained, with both factors of each module.
        second: whether the second question is answered.
        bases: the second question's Q by module.

    Raises:
        WireError: the plan has no sketch, or its sketch has room for smaller ranks only.
    """
    back, sketch = plan.sent_back(adapter), plan.sketch
    if sketch is None:
        raise WireError("a plan without a sketch asks for factors")
    tensors: dict[str, Tensor] = {}
    for module, factors in back.lora.items():
        if 0 < sketch.rank < factors.rank:
            raise WireError(
                f"{module}: the server asks for means of rank {sketch.rank}, but this client has rank {factors.rank}"
            )
        names = _shapes(sketch, factors, second)
        parts = sketched(factors, names, sketch, (bases or {}).get(module))
        tensors |= {name_of(module, part): tensor for part, tensor in parts.items()}
    dense = back.tensors if second == (sketch.passes == 2) else {}
    return AdapterState(tensors={**tensors, **dense})


def question(number: int, plan: Plan, bases: Mapping[str, Tensor], run: str) -> SecondQuestion:
    """The second question of a round.

    Args:
        number: of the round.
        plan: of the round's broadcasts.
        bases: Q of each module that is not sent whole, [d_out, width].
        run: key of the run.
    """
    tensors = {name_of(module, BASIS): basis.float() for module, basis in bases.items()}
    return SecondQuestion(round=number, bases=AdapterState(tensors=tensors), plan=plan, run=run)


def bases(question: SecondQuestion, adapter: AdapterState) -> dict[str, Tensor]:
    """Q of each module in a second question.

    Args:
        question: as it was received; its plan has a sketch.
        adapter: as trained.

    Raises:
        WireError: a basis is missing, or does not fit its module.
    """
    sketch, found = question.plan.sketch, dict[str, Tensor]()
    for module, factors in question.plan.sent_back(adapter).lora.items():
        if sketch is None or sketch.whole(shape_of(factors)):
            continue
        basis = question.bases.tensors.get(name_of(module, BASIS))
        wanted = (len(factors.B), sketch.width)
        if basis is None or tuple(basis.shape) != wanted:
            got = "none" if basis is None else str(tuple(basis.shape))
            raise WireError(f"{module}: the server sent a basis of shape {got}, expected {wanted}")
        found[module] = basis
    return found


def shape_of(factors: LoraFactors) -> Shape:
    """(d_out, d_in)."""
    return len(factors.B), factors.A.shape[1]


def _shapes(sketch: Sketch, factors: LoraFactors, second: bool) -> dict[str, Shape]:
    return (sketch.second if second else sketch.first)(shape_of(factors))
