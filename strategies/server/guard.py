"""One client against the rest, by default: how much it may weigh, and how far beyond the others its update may lie.

Robust rules (`robust.py`) are chosen by whoever knows what to expect of the clients. What is here goes for every run,
and leaves honest clients alone: it keeps out updates that would end the run, and claims that would make one client the
only one that counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, fill_missing, norm, stack
from fedlora.adapters.flat import OWN
from fedlora.exchange import Broadcast, ClientUpdate

# Of a round after which every client diverged: who moved so much farther than the others may have done it.
_SUSPECT = 2.0
_LARGEST = {"fp16": torch.finfo(torch.float16).max}  # bf16 and fp32 reach equally far
_FP32 = torch.finfo(torch.float32).max


def weights(examples: Mapping[int, int], most: float) -> dict[int, int]:
    """Client id -> the examples that it counts for: at most `most` times the mean of the other clients'.

    The largest claims are cut to one bound b, the smallest cut that makes `b <= most * mean of the others` hold.

    Args:
        examples: client id -> the examples that it says it has.
        most: `federation.max-share`, at least 1; 0: no bound.
    """
    claims, others = sorted(examples.values()), len(examples) - 1
    for cut in range(len(claims) if most and others else 0):  # how many claims are above the bound
        rest = claims[: len(claims) - cut]
        if not cut:
            bound = most * (sum(claims) - claims[-1]) / others
        elif (room := others - most * (cut - 1)) > 0:
            bound = most * sum(rest) / room
        else:
            break
        if rest[-1] <= bound:
            return {client: min(n, max(1, math.floor(bound))) if cut else n for client, n in examples.items()}
    return dict(examples)


def moved(update: ClientUpdate, sent: Broadcast) -> float:
    """How far a client's reply lies from what it was sent: the Frobenius norm, by Gram matrices in fp64.

    Over all modules, of the change of `s B A`, a factor that was not sent back being as it was; of the factors
    themselves where the other one stays on the client. Tensors trained in full count with their own change. Infinite
    where a product leaves the numbers of fp64.
    """
    start, personal = sent.adapter, bool(sent.plan.keep)
    whole = fill_missing(update.adapter, start)
    total = 0.0
    for name, end in update.adapter.lora.items():
        begun = start.lora[name]
        if personal:
            pairs = [(getattr(end, part), getattr(begun, part)) for part in sent.plan.send]
            total += sum(_square(a.double() - b.double()) for a, b in pairs)
        else:
            pair = [_wide(whole.lora[name]), _wide(begun)]
            total += norm(stack(pair, [1.0, -1.0])) ** 2
    total += sum(_square(t.double() - start.tensors[name].double()) for name, t in update.adapter.tensors.items())
    return math.sqrt(total) if math.isfinite(total) else math.inf


def excess(client: int, moves: Mapping[int, float], bound: float) -> str:
    """Why this client's update is set aside: it moved more than `bound` times the median of the others; else empty.

    Args:
        client: one of `moves`.
        moves: client id -> `moved`, of all replies that are known.
        bound: `federation.max-move`; 0: none.
    """
    others = [move for other, move in moves.items() if other != client and math.isfinite(move)]
    middle = median_low(others) if others else 0.0
    if not bound or not middle or moves[client] <= bound * middle:
        return ""
    return (
        f"its update moved the model by {moves[client]:.3g}, {moves[client] / middle:.3g} times the median of the "
        f"others ({middle:.3g}); federation.max-move = {bound:g} sets it aside"
    )


def overflow(update: ClientUpdate, move: float, dtype: str) -> str:
    """Why this update cannot be computed with: a value, or the size of its product, leaves the compute dtype's numbers.

    Args:
        update: of finite values in fp32.
        move: see `moved`.
        dtype: `model.compute-dtype`.
    """
    most = _LARGEST.get(dtype, _FP32)
    tensors = OWN.put(update.adapter).values()
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    if largest <= most and move <= most:
        return ""
    return (
        f"its update is not finite in the compute dtype: it holds values up to {largest:.3g} and moves the model by "
        f"{move:.3g}, beyond {most:.3g}"
    )


def suspect(moves: Mapping[int, float]) -> int | None:
    """The client that moved farther than all others, and twice as far as their median; None where none stands out."""
    if len(moves) < 2:
        return None
    client = max(moves, key=lambda one: (moves[one], -one))
    others = [move for other, move in moves.items() if other != client]
    return client if moves[client] > _SUSPECT * median_low(others) else None


def _wide(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(A=factors.down.double(), B=factors.B.double(), scaling=factors.scaling)


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
