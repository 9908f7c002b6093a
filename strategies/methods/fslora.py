"""FSLoRA: in each round, a client trains a random subset of the server's rows of A and columns of B."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import LoraFactors, to_fp32
from fedlora.adapters.means import Means
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.replies import arrivals


@dataclass(frozen=True)
class FsLora(Strategy):
    """Client k trains `dW = s R/r_k B[:, S_k] A[S_k]`, with r_k of the R rows; `A += sum_k p_k scatter(dA_k)`, B alike.

    Fang et al. 2025, "Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative Fine-Tuning of
    LLMs" (FSLoRA), https://arxiv.org/abs/2501.19389. S_k is a random subset of the server's R rows, drawn anew in each
    round for each client and module by the run's seed. Over these draws, the mean of what a client is sent is the
    server's own update. The server adds the clients' changes back at their places. A row that a client was not sent
    counts as unchanged by that client, so that a row moves by the share of the clients that trained it. Where all ranks
    are R, this is `fedavg`.

    Experimental: the paper is known here from its abstract and from the authors' code, as far as that could be read.
    That its sketch is one for A and B of a module, and drawn once for a round, is not confirmed. The server is the
    authors' with plain averaging; they offer Adam too, for which there is `strategy.server-optimizer`. Differences: R
    is the largest of the clients' ranks; clients count by their examples; and the factor s R/r_k stands in A, where it
    differs from the client's own scaling. With one `lora.alpha` for all clients, it is the client's own scaling.
    Memory: one reply, filled up to the server's rank. Cost: O(K d R).
    """

    steady: ClassVar[bool] = True
    own_rows: ClassVar[bool] = True

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The drawn rows of A and columns of B. They differ from round to round, unless the client has all of them.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        held = state.adapter.lora
        lora = dict[str, LoraFactors]()
        for name, f in held.items():
            rows = drawn(state.seed, number, client.client_id, name, (f.rank, client.rank_of(name)))
            lora[name] = replace(f, A=f.rank / len(rows) * f.A[rows], B=f.B[:, rows])
        sent = super().broadcast(replace(state, adapter=replace(state.adapter, lora=lora)), client, number)
        return replace(sent, steady=all(f.rank == held[name].rank for name, f in lora.items()))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The means of A and of B, with the server's rows where a client has none. What no reply contains is kept."""
        means_a, means_b, dense = Means(), Means(), Means()
        for update in arrivals(updates, number):
            whole: dict[str, tuple[Tensor, Tensor]] = {}
            for name, f in update.adapter.lora.items():
                before = state.adapter.lora[name]
                rows = torch.tensor(drawn(state.seed, number, update.client_id, name, (before.rank, f.rank)))
                ratio = f.scaling * f.rank / (before.scaling * before.rank)
                A, B = to_fp32(f.A), to_fp32(f.B)
                whole[name] = (before.A.to(A).index_copy(0, rows, ratio * A), before.B.to(B).index_copy(1, rows, B))
            means_a.add({name: a for name, (a, _) in whole.items()}, update.num_examples, update.client_id)
            means_b.add({name: b for name, (_, b) in whole.items()}, update.num_examples, update.client_id)
            dense.add(update.adapter.tensors, update.num_examples, update.client_id)
        lora = {
            name: replace(state.adapter.lora[name], A=a, B=means_b.values[name]) for name, a in means_a.values.items()
        }
        return state.updated(lora, dense.values)


def drawn(seed: int, number: int, client_id: int, module: str, ranks: tuple[int, int]) -> list[int]:
    """The rows of a module that a client trains in a round, in order.

    Args:
        seed: of the run.
        number: of the round.
        client_id: of the client.
        module: name of the module.
        ranks: of the server's factors, and of the client's: the number of rows, or all if there are no more.
    """
    every, count = ranks
    return sorted(random.Random(f"{seed}/rows/{number}/{client_id}/{module}").sample(range(every), min(count, every)))
