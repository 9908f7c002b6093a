"""Chain of LoRA: every so many rounds the adapter is folded into the base, and a fresh one starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedlora.adapters import AdapterState, stack
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState
from ..tools import restarts
from .wrapper import Wrapper, innermost


@dataclass(frozen=True)
class Restart(Wrapper):
    """After every E-th round the inner strategy's adapter becomes a fold, and the next one starts: A random, B = 0.

    Xia et al. 2024, "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
    https://arxiv.org/abs/2401.04151, with the server's adapter as the link of the chain, kept as frozen factors
    beside the base instead of merged into it. The sum of links of rank r has any rank. For the inner strategy a link
    is a run of its own: what it remembers (the momenta of an optimizer, which belong to rows that are gone) is
    dropped at the restart, tensors trained in full go on. With E = 1 and an inner strategy that loses nothing, it
    does what FLoRA does.
    Memory and download: one fold of the inner adapter's rank more every E rounds, until folds are compacted.

    Args:
        inner: a strategy without personal factors, that starts as LoRA does.
        every: E, at least 1.
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise StrategyError(f"strategy.restart-every = {self.every}, expected at least 1")
        name = type(innermost(self.inner)).__name__
        if self.inner.personal:
            raise StrategyError(
                f"strategy.restart-every = {self.every} folds the whole adapter, and {name} leaves "
                f"{' and '.join(sorted(self.inner.personal))} on the clients; set strategy.restart-every = 0"
            )
        if self.inner.starts_with:
            raise StrategyError(
                f"strategy.restart-every = {self.every} draws a fresh A, and {name} needs one made from statistics; "
                "set strategy.restart-every = 0"
            )
        if self.every > 1 and self.inner.replaces_folds:
            raise StrategyError(
                f"strategy.restart-every = {self.every}: {name} takes folds back that it sent a round before, as its "
                "options ask for, and the links of a chain stay; set strategy.restart-every = 1, or leave out "
                "strategy.options"
            )

    @property
    def any_kind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def steady(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """As the inner strategy's; and B must be trained in the rounds that follow a restart.

        Raises:
            StrategyError: the inner strategy refuses the clients, or would train A alone while B = 0.
        """
        super().check(clients)
        empty = self.init(AdapterState())
        for link in range(1, 5):  # methods that take turns have short periods
            self.broadcast(empty, clients[0], link * self.every + 1)

    def broadcast(self, state: ServerState, client: ClientInfo, round: int) -> Broadcast:
        """What the inner strategy sends, with all folds; after a restart A is sent as it was drawn.

        Raises:
            StrategyError: the inner strategy trains A alone right after a restart.
        """
        inside = replace(state, folds=state.folds.emptied())
        sent = self.inner.broadcast(inside, client, round)
        if (round - 1) % self.every == 0:
            if "B" not in sent.plan.train:
                raise StrategyError(
                    f"strategy.restart-every = {self.every}: round {round} starts from B = 0, where A has no gradient, "
                    f"and {type(innermost(self.inner)).__name__} would train A alone; set another "
                    "strategy.restart-every (an even one, where A and B take turns)"
                )
            # A client that sends no A is taken to have the server's, at the server's scaling.
            if "A" in sent.plan.send:
                sent = self.inner.broadcast(restarts.unscaled(inside, client), client, round)
        folds_from, folds = state.folds.since(client.known_base_version)
        return replace(sent, base_version=state.folds.version, folds=folds, folds_from=folds_from, steady=False)

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], round: int) -> ServerState:
        """The inner strategy's next state; after every E-th round, all that it holds as one more fold.

        The inner strategy does not see the folds, which are not its own to change; those that it makes are added.
        """
        new, folds = self.inner.aggregate(replace(state, folds=state.folds.emptied()), updates, round), state.folds
        if round % self.every:
            for fold in new.folds.parts:
                folds = folds.push(fold)
            return replace(new, folds=folds)
        link = {name: stack([f]) for name, f in self.inner.global_adapter(new).lora.items() if f.B.any()}
        fresh = restarts.restart(new.adapter, state.seed, round + 1)
        begun = self.inner.init(AdapterState(lora=fresh.lora, tensors=new.adapter.tensors))
        if link:
            folds = folds.push(AdapterState(lora=link))
        return replace(begun, folds=folds, seed=state.seed)
