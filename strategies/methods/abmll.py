"""ABMLL's Gaussian prior on the clients' adapters, and the precision-weighted mean of these on the server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, first_ranks
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, Term

from ..base import ServerState, Strategy
from ..tools.averaging import effective_means

_PRECISION = "abmll.precision"  # module -> the precision of each of its rows


@dataclass(frozen=True)
class Abmll(Strategy):
    """Clients minimize `loss + beta KL(N(phi_k, sigma^2) || N(theta, sigma^2))`; theta is the posterior mean of theirs.

    Experimental: Zhang et al. 2025, "Amortized Bayesian Meta-Learning for Low-Rank Adaptation of Large Language
    Models" (ABMLL), https://arxiv.org/abs/2508.14285, is known here from its abstract and notes. There every task and
    the shared model have a mean and a deviation, each a LoRA adapter of its own and learned, and the loss has the
    prior's own term -log p(theta). Here the deviations are one constant, and the term is
    `beta / (2 sigma^2) |phi_k - theta|^2` over A and B in the client's own scaling: a pull towards what the client was
    sent, as in FedProx and pFedMe. `beta` is the paper's, and so small that the pull hardly shows; `sigma` and `memory`
    are ours.

    The server holds a Gaussian for each entry of A and B, with mean theta and a precision. A round's replies are one
    observation of it, of precision `tau_j = sum_k p_k` over the clients that have row j. The posterior of the last
    round, with its precision times `memory`, is the prior: `lambda = memory lambda_before + tau`, and
    `theta = (memory lambda_before theta_before + sum_k p_k phi_k) / lambda`. With `memory = 0`, theta is the mean of
    each row over the clients that have it, which for equal ranks is `fedavg`. Tensors trained in full have no prior.
    The product of means is not the mean of the products.
    Memory: one reply, since each is added to the means when it arrives.

    Args:
        beta: weight of the divergence, at least 0; with 0, clients train as in plain LoRA.
        sigma: standard deviation of a client's entries about theta, above 0.
        memory: share of its precision that a posterior keeps as the next round's prior, from 0 to below 1. With more,
            theta moves less.
    """

    beta: float = 1e-7
    sigma: float = 0.01
    memory: float = 0.0

    linear: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("beta", self.beta, 0 <= self.beta < float("inf"), "a number of at least 0"),
            ("sigma", self.sigma, 0 < self.sigma < float("inf"), "a number above 0"),
            ("memory", self.memory, 0 <= self.memory < 1, "a number from 0 to below 1"),
        ):
            if not fits:
                raise StrategyError(f"strategy.options: abmll's {name} = {value}, expected {expected}")

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The first rows of theta, and the term that pulls towards them.

        Raises:
            StrategyError: the client's rank is larger than the server's.
        """
        sent = super().broadcast(state, client, number)
        if not self.beta:
            return sent
        return replace(sent, plan=replace(sent.plan, terms=(Term("prior", self.beta / self.sigma**2),)))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The posterior means. A module, row or tensor that no reply contains keeps its value."""
        counted = _Precisions()
        means, dense = effective_means(counted.over(updates), number, zero_pad=False)
        held = state.memory.get(_PRECISION, AdapterState()).tensors
        lora, precisions = dict[str, LoraFactors](), {name: self.memory * rows for name, rows in held.items()}
        for name, factors in means.items():
            before = state.adapter.lora.get(name, factors)
            new = first_ranks(factors, factors.rank, before.scaling)
            observed = counted.rows(name, before.rank).to(new.A)
            prior = precisions[name].to(new.A) if name in precisions else torch.zeros_like(observed)
            precisions[name] = prior + observed
            share = torch.where(observed > 0, observed / precisions[name].clamp(min=1e-30), 0.0)[: new.rank]
            lora[name] = LoraFactors(
                A=torch.cat(
                    [before.A[: new.rank].to(new.A).lerp(new.A, share[:, None]), before.A[new.rank :].to(new.A)]
                ),
                B=torch.cat(
                    [before.B[:, : new.rank].to(new.B).lerp(new.B, share), before.B[:, new.rank :].to(new.B)], dim=1
                ),
                scaling=before.scaling,
            )
        after = state.updated(lora, dense)
        return (
            replace(after, memory={**state.memory, _PRECISION: AdapterState(tensors=precisions)})
            if self.memory
            else after
        )


class _Precisions:
    """The precision of a round's observation of each row: the share of the examples of those that have it."""

    def __init__(self) -> None:
        self._examples: dict[str, dict[int, int]] = {}  # module -> rank -> examples of the clients with this rank

    def over(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """The replies, counted as they go by."""
        for update in updates:
            for name, factors in update.adapter.lora.items():
                of_rank = self._examples.setdefault(name, {})
                of_rank[factors.rank] = of_rank.get(factors.rank, 0) + update.num_examples
            yield update

    def rows(self, name: str, rank: int) -> Tensor:
        """For each of the first rows of a module."""
        of_rank = self._examples[name]
        having = [sum(n for own, n in of_rank.items() if own > row) for row in range(rank)]
        return torch.tensor(having, dtype=torch.float64) / sum(of_rank.values())
