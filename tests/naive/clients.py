"""Clients of a made-up federation: random starts, random training, and a base that folds are added to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, delta, initial
from fedlora.adapters.folds import Folds, concatenate
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.initializers.from_weights import Bound, FromWeights
from fedlora.strategies.initializers.registry import INITIALIZERS, asks_clients
from fedlora.strategies.wrappers.wrapper import Wrapper

# finds a client's rows by its number, of which the twins of most methods know nothing
BY_CLIENT = {"fslora", "lora-a2"}
# what these do in a module depends on the client or on other modules; each has a test of its own against plain loops
OWN_TWIN = BY_CLIENT | {"flasc"}
# d_out != d_in both ways, a square one as small as the ranks, and one that any stack outgrows
SHAPES = {"layers.0.q": (6, 9), "layers.0.v": (8, 5), "layers.1.q": (4, 4), "layers.1.v": (3, 2)}


@dataclass(frozen=True)
class Run(Wrapper):
    """A strategy in a run of this seed and these limits of the folds, which the state carries."""

    seed: int = 0
    max_rank: int = 0
    compact: bool = True

    def init(self, adapter: AdapterState) -> ServerState:
        state = self.inner.init(adapter)
        return replace(state, seed=self.seed, folds=Folds(max_rank=self.max_rank, compact=self.compact))

    def aggregate(self, state: ServerState, updates: Iterable[ClientUpdate], number: int) -> ServerState:
        return self.inner.aggregate(state, updates, number)


def start(clients: Sequence[ClientInfo], seed: int = 0, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> AdapterState:
    """The seeded adapter at each module's largest rank, with a dense head."""
    generator = torch.Generator().manual_seed(seed)
    largest = {name: max(clients, key=lambda client: client.rank_of(name)) for name in shapes}
    fresh = initial(
        shapes,
        {name: client.rank_of(name) for name, client in largest.items()},
        {name: client.scaling_of(name) for name, client in largest.items()},
        generator,
    )
    return AdapterState(lora=fresh.lora, tensors={"head.weight": torch.randn(2, 3, generator=generator)})


def train(broadcast: Broadcast, client: ClientInfo, seed: int, size: float = 0.3) -> ClientUpdate:
    """Random training: what is trainable moves, and what is not uploaded comes back empty."""
    generator = torch.Generator().manual_seed(1000 * seed + client.client_id)
    if broadcast.job == "gradient":
        return _gradient(broadcast, client, generator)

    def move(tensor: Tensor, factor: str) -> Tensor:
        if factor in broadcast.plan.train:
            tensor = tensor + size * torch.randn(tensor.shape, generator=generator)
        return tensor if factor in broadcast.plan.send else torch.empty(0, 0)

    lora = {
        name: LoraFactors(
            A=move(f.A, "A"),
            B=move(f.B, "B"),
            scaling=f.scaling,
            R=None if f.R is None or "R" not in broadcast.plan.send else move(f.R, "R"),
        )
        for name, f in sorted(broadcast.adapter.lora.items())
    }
    dense = {
        name: tensor + torch.randn(tensor.shape, generator=generator)
        for name, tensor in broadcast.adapter.tensors.items()
    }
    return ClientUpdate(
        client_id=client.client_id,
        adapter=AdapterState(lora=lora, tensors=dense),
        num_examples=client.num_examples,
        base_version=broadcast.base_version,
        start=broadcast.adapter,
    )


def asked(strategy: Strategy, state: ServerState, client: ClientInfo) -> Broadcast:
    """What a client is asked in round 0, by the initializer that the strategy needs."""
    return INITIALIZERS.load(strategy.starts_with).ask(state.adapter, client)


def begin(strategy: Strategy, state: ServerState, replies: Sequence[ClientUpdate], **options: float) -> ServerState:
    """The state before round 1, from the replies of round 0, or from the base model's weights."""
    made = INITIALIZERS.load(strategy.starts_with, **options)
    return strategy.begin(state, replies, Bound(made, weight) if isinstance(made, FromWeights) else made)


def weight(module: str) -> Tensor:
    """The base model's weight of one of `SHAPES`."""
    generator = torch.Generator().manual_seed(list(SHAPES).index(module))
    return torch.randn(SHAPES[module], generator=generator)


def started(strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], seed: int = 0) -> ServerState:
    """The state before round 1, after the start that the strategy needs."""
    if not strategy.starts_with:
        return state
    asking = clients if asks_clients(strategy) else ()
    return begin(strategy, state, [train(asked(strategy, state, client), client, seed) for client in asking])


def _gradient(broadcast: Broadcast, client: ClientInfo, generator: torch.Generator) -> ClientUpdate:
    """A random gradient by its leading factors, of the ranks that the server asked for."""
    lora = {
        name: LoraFactors(
            A=torch.randn(f.A.shape, generator=generator), B=torch.randn(f.B.shape, generator=generator), scaling=1.0
        )
        for name, f in sorted(broadcast.adapter.lora.items())
    }
    return ClientUpdate(
        client_id=client.client_id,
        adapter=AdapterState(lora=lora),
        num_examples=client.num_examples,
        start=broadcast.adapter,
    )


def whole(sent: Broadcast, reply: ClientUpdate) -> AdapterState:
    """What the client ended with: its reply, with the factors that it did not send as it was sent them.

    Not for factors that a client trains and keeps to itself.
    """
    lora = {
        name: LoraFactors(
            A=f.A if "A" in sent.plan.send else sent.adapter.lora[name].A,
            B=f.B if "B" in sent.plan.send else sent.adapter.lora[name].B,
            scaling=f.scaling,
            R=f.R if "R" in sent.plan.send else sent.adapter.lora[name].R,
        )
        for name, f in reply.adapter.lora.items()
    }
    return AdapterState(lora=lora, tensors=reply.adapter.tensors)


@dataclass
class HeldBase:
    """The folds that one client holds, brought up to date as a real client does: by concatenation alone."""

    version: int = 0
    folds: AdapterState = field(default_factory=AdapterState)

    def apply(self, broadcast: Broadcast) -> None:
        if broadcast.folds_from == 0:
            self.folds = concatenate(broadcast.folds)
        else:
            assert broadcast.folds_from == self.version
            self.folds = concatenate((self.folds, *broadcast.folds))
        self.version = broadcast.base_version

    def weights(self, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The client's effective frozen weights."""
        return {
            name: weight + delta(self.folds.lora[name]) if name in self.folds.lora else weight
            for name, weight in base.items()
        }


def dense_deltas(adapter: AdapterState) -> dict[str, Tensor]:
    """Every module's update as a matrix, in fp64."""
    return {name: f.scaling * (f.B.double() @ f.down.double()) for name, f in sorted(adapter.lora.items())}
