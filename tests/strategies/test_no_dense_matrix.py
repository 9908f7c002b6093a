"""No round forms a d_out x d_in matrix: every tensor on the way is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlora.exchange import ClientInfo
from fedlora.strategies import load
from tests.naive.clients import Run, start, train

D_OUT, D_IN = 160, 120
CLIENTS = [ClientInfo(client_id=i, rank=r, num_examples=i + 1) for i, r in enumerate((4, 2, 1))]


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that comes out of an operation."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


def test_a_dense_matrix_would_show() -> None:
    with Largest() as seen:
        _ = torch.ones(D_OUT, 2) @ torch.ones(2, D_IN)
    assert seen.numel == D_OUT * D_IN


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedavg-zeropad", {}),
        ("rblora", {}),
        ("hetlora", {}),
        ("flexlora", {}),
        ("flexlora", {"keep_tail": True}),
        ("flexlora", {"fold_tail": True}),
        ("fedex", {}),
        ("florist", {}),
        ("raflora", {}),
        ("fed-plora", {}),
        ("fslora", {}),
        ("lora-a2", {}),
    ],
)
def test_rounds_stay_factored(name: str, options: dict[str, Any]) -> None:
    strategy = Run(load(name, **options), max_rank=12)
    state = strategy.init(start(CLIENTS, shapes={"m": (D_OUT, D_IN), "n": (D_IN, D_OUT)}))
    for round in (1, 2):
        with Largest() as seen:
            sent = [strategy.broadcast(state, client, round) for client in CLIENTS]
        updates = [train(s, c, round) for s, c in zip(sent, CLIENTS, strict=True)]
        with seen:
            state = strategy.aggregate(state, updates, round)
            strategy.global_adapter(state)
        assert 0 < seen.numel < D_OUT * D_IN / 2
