"""raFLoRA: FlexLoRA whose mean counts each component over the clients whose rank reaches it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedlora.adapters import LoraFactors, stack, svd_each, to_fp32
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, Strategy
from ..tools.components import balanced, strongest
from ..tools.replies import ModuleReplies, gather


@dataclass(frozen=True)
class RaFlora(Strategy):
    """`U S V' = sum_j sum_k n_k s_k b_kj a_kj' / sum_k n_k`, both inner sums over the clients with r_k > j.

    Experimental: Wu et al. 2026, "Preventing Rank Collapse in Federated Low-Rank Adaptation with Client Heterogeneity"
    (raFLoRA), https://arxiv.org/abs/2602.13486, is known here from its abstract and notes. `b_kj` and `a_kj` are column
    j of B_k and row j of A_k. The paper splits the rows into blocks that end at the ranks of the clients; the weights
    of a block's rows are the same. A client starts from the leading components at its own rank and scaling, as in
    FlexLoRA, where one weight for each client makes the components beyond small ranks shrink by a constant factor in
    every round. With equal ranks both are the same. The sum is not the mean of the clients' updates.
    Not confirmed: what the paper does with a block that no reply of the round reaches. Here the server's own components
    stay in its place.
    Memory: the factors of all replies. Cost: O(d R^2 + R^3), where R is the sum of the r_k.
    """

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The r_j leading components.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        return super().broadcast(balanced(state, client), client, number)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The components of the sum, strongest first. A module or tensor in no reply keeps its value."""
        parts, dense = gather(updates, number)
        held = state.adapter.lora
        stacks = {name: _by_reach(part, held[name]) for name, part in parts.items()}
        largest = max((held[name].rank for name in parts), default=0)
        svds = svd_each(stacks, largest).items()
        return state.updated({name: strongest(svd, held[name], stacks[name].A.dtype) for name, svd in svds}, dense)


def _by_reach(part: ModuleReplies, held: LoraFactors) -> LoraFactors:
    """The factors of all clients, stacked, each row weighted over the clients that have it.

    Args:
        part: one module's replies.
        held: the server's factors before the round, whose rows beyond all replies' ranks are added.
    """
    top = max(f.rank for f in part.factors)
    reach = [sum(p for f, p in zip(part.factors, part.shares, strict=True) if f.rank > row) for row in range(top)]
    weighted: list[LoraFactors] = []
    for f, share in zip(part.factors, part.shares, strict=True):
        A = to_fp32(f.A)
        weighted.append(replace(f, A=A.new_tensor([share / total for total in reach[: f.rank]])[:, None] * A))
    return stack([*weighted, LoraFactors(A=held.A[top:], B=held.B[:, top:], scaling=held.scaling)])
