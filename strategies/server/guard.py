"""Limits for a single client that hold in every run: for its weight in the mean, and for the size of its update.

These limits do not affect honest clients. They keep out updates that would ruin the model, and numbers of examples that
would give one client all the weight. Robust rules (`robust.py`) go further, and are for runs in which attacks are
expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, fill_missing, norm, stack
from fedlora.adapters.flat import OWN
from fedlora.adapters.sketched_sum import Sketch, size, sketched
from fedlora.exchange import Broadcast, ClientUpdate, sketches

# If all clients diverge after a round, a client that moved so many times as far as the others' median is the suspect.
_SUSPECT = 2.0
_LARGEST = {"fp16": torch.finfo(torch.float16).max}  # bf16 and fp32 have the same range
_FP32 = torch.finfo(torch.float32).max


def weights(examples: Mapping[int, int], most: float) -> dict[int, int]:
    """The number of examples with which each client counts: at most `most` times the mean of the other clients'.

    The largest numbers are cut to one bound b. As few of them are cut as `b <= most * mean of the others` allows.

    Args:
        examples: client id -> number of examples that the client says it has.
        most: `federation.max-share`, at least 1; 0: no bound.
    """
    claims, others = sorted(examples.values()), len(examples) - 1
    for cut in range(len(claims) if most and others else 0):  # cut: number of claims above the bound
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


def moved(update: ClientUpdate, sent: Broadcast, bases: Mapping[str, Tensor] | None = None) -> float:
    """The distance between a client's reply and what it was sent, in the Frobenius norm, by Gram matrices in fp64.

    It is the norm of the change of `s B A` over all modules, where factors that were not sent back count as unchanged.
    If a client keeps personal factors, it is the norm of the change of the factors that it sent. The change of tensors
    trained in full is added. The result is infinite if a product is too large for fp64.

    Of sketches it is an estimate, since they are linear: for each module the largest of what the sketches of the
    difference say, as if only one of them might be forged. See `adapters.sketched_sum.size`.

    Args:
        update: a client's reply.
        sent: its broadcast, as the client received it.
        bases: the Q of the second question, if the reply answers that.
    """
    if sent.plan.sketch is not None:
        return _sketches_moved(update.adapter, sent, sent.plan.sketch, bases)
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


def _sketches_moved(reply: AdapterState, sent: Broadcast, sketch: Sketch, bases: Mapping[str, Tensor] | None) -> float:
    total, second = 0.0, bases is not None
    for module, start in sent.plan.sent_back(sent.adapter).lora.items():
        shape = sketches.shape_of(start)
        names = (sketch.second if second else sketch.first)(shape)
        mine = {name: reply.tensors[sketches.name_of(module, name)].double() for name in names}
        sizes: list[float] = []
        if {"A", "B"} <= mine.keys():
            ends = LoraFactors(A=mine.pop("A"), B=mine.pop("B"), scaling=1.0)
            sizes.append(norm(stack([ends, _wide(start)], [1.0, -1.0])))
        if bool(start.B.any()):
            begun = sketched(start, {name: names[name] for name in mine}, sketch, (bases or {}).get(module))
            mine = {name: tensor - begun[name] for name, tensor in mine.items()}
        sizes.append(size(mine, sketch, shape))
        total += max(sizes) ** 2
    for name, tensor in reply.tensors.items():
        if name in sent.adapter.tensors:
            total += _square(tensor.double() - sent.adapter.tensors[name].double())
    return math.sqrt(total) if math.isfinite(total) else math.inf


def excess(client: int, moves: Mapping[int, float], bound: float) -> str:
    """The reason to ignore a client's update, if it moves more than `bound` times the others' median; otherwise empty.

    Args:
        client: the client, one of `moves`.
        moves: client id -> result of `moved`, for all replies so far.
        bound: `federation.max-move`; 0: no limit.
    """
    others = [move for other, move in moves.items() if other != client and math.isfinite(move)]
    middle = median_low(others) if others else 0.0
    if not bound or not middle or moves[client] <= bound * middle:
        return ""
    return (
        f"its update moved the model by {moves[client]:.3g}, {moves[client] / middle:.3g} times the median of the "
        f"others ({middle:.3g}), and is ignored (federation.max-move = {bound:g})"
    )


def overflow(update: ClientUpdate, move: float, dtype: str) -> str:
    """The reason to ignore an update, if its values or its size are too large for the compute dtype; otherwise empty.

    Args:
        update: an update whose values are finite in fp32.
        move: the result of `moved`.
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
    """The client that moved farthest, if it moved more than twice as far as the others' median; otherwise None."""
    if len(moves) < 2:
        return None
    client = max(moves, key=lambda one: (moves[one], -one))
    others = [move for other, move in moves.items() if other != client]
    return client if moves[client] > _SUSPECT * median_low(others) else None


def _wide(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(A=factors.down.double(), B=factors.B.double(), scaling=factors.scaling)


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())
