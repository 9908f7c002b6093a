"""What clients are asked for in round 0, before round 1: a statistic, in the shapes of what the server sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.means import Means
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Plan

from ..base import slice_adapter_for
from .replies import arrivals


def question(statistic: str, adapter: AdapterState, client: ClientInfo) -> Broadcast:
    """A question whose answer has a pair of factors for each module, at the client's ranks, such as directions.

    Args:
        statistic: name of the statistic.
        adapter: LoRA's own start, of which only the shapes are used, and a classifier's head.
        client: the client that gets the message.
    """
    sliced = slice_adapter_for(adapter, client)
    lora = {
        name: LoraFactors(A=torch.zeros_like(f.A), B=torch.zeros_like(f.B), scaling=1.0)
        for name, f in sliced.lora.items()
    }
    return Broadcast(round=0, adapter=replace(sliced, lora=lora), plan=Plan(train=frozenset()), job=statistic)


def question_for_tensors(
    statistic: str, adapter: AdapterState, shapes: Mapping[str, tuple[int, ...]], start: AdapterState | None = None
) -> Broadcast:
    """A question whose answer is tensors by name.

    Args:
        statistic: name of the statistic.
        adapter: LoRA's own start, whose head, where there is one, is part of the model that the client measures.
        shapes: name -> shape of the tensors that the client sends back.
        start: an adapter from which the client trains while it measures; None: it measures the base model.
    """
    tensors = {**adapter.tensors, **{name: torch.zeros(shape) for name, shape in shapes.items()}}
    lora = start.lora if start else {}
    plan = Plan(train=frozenset(), modules=frozenset())
    return Broadcast(round=0, adapter=AdapterState(lora=lora, tensors=tensors), plan=plan, job=statistic)


def means_of(replies: Iterable[ClientUpdate]) -> dict[str, Tensor]:
    """The means of the answers' tensors over clients, weighted by examples; read as they arrive."""
    means = Means()
    for reply in arrivals(replies, 0):
        means.add(reply.adapter.tensors, reply.num_examples, reply.client_id)
    return means.values


def measured(tensors: Mapping[str, Tensor], ending: str) -> dict[str, Tensor]:
    """The tensors whose names end with `.<ending>`, by what stands before that."""
    end = f".{ending}"
    return {name.removesuffix(end): value for name, value in tensors.items() if name.endswith(end)}
