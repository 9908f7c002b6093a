"""Updates that began from an older version of the model, as if they had begun from the present one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.exchange import ClientUpdate
from fedlora.exchange.sketches import is_sketch


def rebased(
    update: ClientUpdate, begun: AdapterState, present: AdapterState, share: float, *, anew: bool
) -> ClientUpdate:
    """A client's change since its own start, times `share`, from the present start.

    Of every factor and tensor X that the client sent, with the value `s` at its start and `c` at the present one, this
    is `c + share (X - s)`. Means of such factors are those of FedBuff (Nguyen et al. 2022, arXiv 2106.06639, Algorithm
    1): the present value plus the mean of the clients' damped changes.

    Where each round begins with an update of zero beside the folds, the change is the product `B A` itself, whatever
    the start's A was, and B alone is damped. Added to the folds of the present version, it is what it was beside those
    of its own version. Sketches of products are damped likewise, since they are linear.

    Args:
        update: a reply.
        begun: what the client was sent.
        present: what the client would be sent now.
        share: the damping, in (0, 1].
        anew: whether each round begins with an update of zero.
    """

    def moved(value: Tensor, start: Tensor, now: Tensor) -> Tensor:
        return now + share * (value - start) if value.numel() else value

    lora = {
        name: _damped(f, share) if anew else _moved(f, begun.lora[name], present.lora[name], moved)
        for name, f in update.adapter.lora.items()
    }
    tensors = {
        name: share * t if is_sketch(name) else moved(t, begun.tensors[name], present.tensors[name])
        for name, t in update.adapter.tensors.items()
    }
    return replace(update, adapter=AdapterState(lora=lora, tensors=tensors), start=update.start if anew else present)


def _damped(f: LoraFactors, share: float) -> LoraFactors:
    return replace(f, B=f.B * share)


def _moved(
    f: LoraFactors, begun: LoraFactors, now: LoraFactors, moved: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> LoraFactors:
    R = f.R
    if R is not None and begun.R is not None and now.R is not None:
        R = moved(R, begun.R, now.R)
    return replace(f, A=moved(f.A, begun.A, now.A), B=moved(f.B, begun.B, now.B), R=R)
