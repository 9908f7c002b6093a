"""Sampled layers: in each round, all clients train the adapters of the same few layers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedlora.adapters.layers import layer_of
from fedlora.common.errors import StrategyError
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate

from ..base import ServerState, trained_in_turn
from ..tools.narrowing import narrowed
from .wrapper import Wrapper, innermost


@dataclass(frozen=True)
class SampledLayers(Wrapper):
    """Each round draws `count` layers by (seed, round), the same for all clients; other layers keep what they have.

    Around `fedavg` this is the sampling of Pan et al. 2024, "LISA: Layerwise Importance Sampling for Memory-Efficient
    Large Language Model Fine-Tuning", https://arxiv.org/abs/2403.17919, for adapters: LISA trains whole layers, and
    always the embeddings and the head. Around `flora` with rank 1 it is the schedule of XGBLoRA (Zhang et al. 2024,
    https://arxiv.org/abs/2410.19694): boosters of rank 1 on few layers, added up in the anchor, each started anew. The
    other layers take part in the forward pass as they were sent. They are neither trained nor uploaded, and not even
    sent as long as their B is 0. Tensors trained in full are trained in every round.

    Args:
        inner: a strategy for factors A and B that trains B in every round: a layer whose B is 0 gives A no gradient.
        count: number of layers in each round, at least 1; all, if the model has no more. A layer is a number in the
            modules' names, such as 3 in layers.3.self_attn.q_proj. A module without a number is a layer of its own.
    """

    count: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise StrategyError(f"train.layers-per-round = {self.count}, expected at least 1, or 0 for all layers")

    @property
    def any_kind(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def check(self, clients: Sequence[ClientInfo]) -> None:
        """Check the inner strategy's clients, and that every round trains B.

        Raises:
            StrategyError: the inner strategy refuses the clients, or has rounds without B.
        """
        super().check(clients)
        for number, factors in enumerate(trained_in_turn(self.inner), start=1):
            if "B" not in factors:
                raise StrategyError(
                    f"train.layers-per-round = {self.count}: {type(innermost(self.inner)).__name__} trains A alone in "
                    f"round {number}, where a layer that was never drawn has B = 0 and A no gradient; set "
                    "train.layers-per-round = 0"
                )

    def broadcast(self, state: ServerState, client: ClientInfo, number: int) -> Broadcast:
        """The inner strategy's message, for the round's layers alone."""
        sent = self.inner.broadcast(state, client, number)
        return narrowed(sent, sampled(sent.adapter.lora, self.count, state.seed, number))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        """As the inner strategy, which leaves modules that no reply contains as they are."""
        return self.inner.aggregate(state, updates, number)


def sampled(modules: Iterable[str], count: int, seed: int, number: int) -> frozenset[str]:
    """The modules of the layers that a round draws.

    Args:
        modules: all of them.
        count: number of layers to draw.
        seed: of the run.
        number: of the round.
    """
    layers: dict[str, list[str]] = {}
    for module in sorted(modules):
        layer = layer_of(module)
        layers.setdefault(module if layer is None else str(layer), []).append(module)
    drawn = random.Random(f"{seed}/layers/{number}").sample(sorted(layers), min(count, len(layers)))
    return frozenset(module for layer in drawn for module in layers[layer])
