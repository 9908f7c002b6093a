"""Chain of LoRA: after every E rounds the adapter becomes a fold, and a new adapter starts."""

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
    """After every E rounds the inner strategy's adapter becomes a fold, and a new one starts, with random A and B = 0.

    Xia et al. 2024, "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning",
    https://arxiv.org/abs/2401.04151. The folds are the links of the paper's chain; here they are kept as frozen factors
    beside the base model instead of being merged into it. A sum of links of rank r can have any rank. For the inner
    strategy, each link is a new run: its memory is dropped, since for instance an optimizer's momenta belong to rows
    that no longer exist. Only tensors trained in full keep their values. With E = 1 and an exact inner strategy, the
    result is that of FLoRA.
    The paper's warm-up of the learning rate at each link is `train.warmup = link`, for which the plan says how old the
    adapter is; the client's optimizer begins anew in every round.
    Memory and download: one more fold of the inner adapter's rank after every E rounds, until folds are combined.

    Args:
        inner: a strategy without personal factors that starts as LoRA does.
        every: the number E of rounds, at least 1.
    """

    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise StrategyError(f"strategy.restart-every = {self.every}, expected at least 1")
        name = type(innermost(self.inner)).__name__
        if self.inner.personal:
            raise StrategyError(
                f"strategy.restart-every = {self.every} folds the whole adapter, but {name} leaves "
                f"{' and '.join(sorted(self.inner.personal))} on the clients; set strategy.restart-every = 0"
            )
        if self.inner.starts_with:
            raise StrategyError(
                f"strategy.restart-every = {self.every} draws a new A, but {name} needs one made from statistics; "
                "set strategy.restart-every = 0"
            )
        if self.every > 1 and self.inner.replaces_folds:
            raise StrategyError(
                f"strategy.restart-every = {self.every}: {name} takes back folds of the round before, but the "
                "folds of restarts cannot be taken back; set strategy.restart-every = 0, or leave out strategy.options"
            )

    @property
    def any_kind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @property
    def steady(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """The check of the inner strategy; in addition, the first round after each new start must train B.

        Raises:
            StrategyError: the inner strategy refuses the clients, or would train A alone while B = 0.
        """
        super().check(clients)
        empty = self.init(AdapterState())
        for link in range(1, 5):  # strategies that train A and B in turn have short periods
            self.broadcast(empty, clients[0], link * self.every + 1)

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, with the folds that the client lacks; a new A is sent as it was drawn.

        Raises:
            StrategyError: the inner strategy trains A alone in the round after a new start.
        """
        inside = replace(state, folds=state.folds.emptied())
        sent = self.inner.broadcast(inside, client, number)
        if (number - 1) % self.every == 0:
            if "B" not in sent.plan.train:
                raise StrategyError(
                    f"strategy.restart-every = {self.every}: round {number} starts from B = 0, where A has no "
                    f"gradient, and {type(innermost(self.inner)).__name__} would train A alone; set another "
                    "strategy.restart-every (an even one, if A and B are trained in turn)"
                )
            # If clients send no A back, the server takes its own A at its own scaling for theirs.
            if "A" in sent.plan.send:
                sent = self.inner.broadcast(restarts.unscaled(inside, client), client, number)
        plan = sent.plan
        if not plan.span:  # an inner strategy that starts anew in every round says so itself
            plan = replace(plan, begun=number - (number - 1) % self.every, span=self.every)
        folds_from, folds = state.folds.since(client.known_base_version)
        return replace(
            sent, plan=plan, base_version=state.folds.version, folds=folds, folds_from=folds_from, steady=False
        )

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """The inner strategy's next state; after every E rounds its whole update becomes a fold.

        The inner strategy does not see the folds, and so cannot change them. Folds that it makes itself are added.
        """
        new, folds = self.inner.aggregate(replace(state, folds=state.folds.emptied()), updates, number), state.folds
        if number % self.every:
            for fold in new.folds.parts:
                folds = folds.push(fold)
            return replace(new, folds=folds)
        link = {name: stack([f]) for name, f in self.inner.global_adapter(new).lora.items() if f.B.any()}
        fresh = restarts.restart(new.adapter, state.seed, number + 1)
        begun = self.inner.init(AdapterState(lora=fresh.lora, tensors=new.adapter.tensors))
        if link:
            folds = folds.push(AdapterState(lora=link))
        return replace(begun, folds=folds, seed=state.seed)
