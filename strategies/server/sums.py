"""A round whose replies are sketches: their sums, the second question, and what is recovered of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.adapters.means import Means
from fedlora.adapters.sketched_sum import Recovered, Sketch, basis_of, loss, recover, seed_of
from fedlora.config import Config
from fedlora.exchange import ClientUpdate, sketches

from ..base import Strategy
from ..tools.replies import SummedModule, SummedUpdate
from .collect import TrainRound

_WIDTH = 64  # unless the config says more
_SUM = -1  # the client id of a sum


def sketch_of(config: Config, strategy: Strategy, adapter: AdapterState, number: int) -> Sketch | None:
    """How clients sketch their updates in a round; None where they send factors.

    Args:
        config: the run's.
        strategy: the innermost one.
        adapter: the server's, before the round.
        number: of the round; in round 0 clients measure a statistic, which is no update.
    """
    if config.wire.sum == "none" or strategy.linear or not number:
        return None
    rank = max((f.rank for f in adapter.lora.values()), default=0) if strategy.needs_means else 0
    width = config.wire.sketch_width or _WIDTH
    sketch = Sketch(width, config.wire.sketch_passes, seed_of(config.run.seed, number), rank)
    if all(sketch.whole(sketches.shape_of(f)) for f in adapter.lora.values()):
        return replace(sketch, passes=1)  # there is nothing to ask again
    return sketch


class Sums:
    """The weighted means of what clients sent, with memory for one reply, whatever their number.

    Sketches are added up in fp64: the ideal is recovered from them by small decompositions.

    Attributes:
        ranks: client id -> the rank of each module that it sent.
        examples: client id -> the examples with which it counts.
    """

    def __init__(self) -> None:
        self.ranks: dict[int, Mapping[str, int]] = {}
        self.examples: dict[int, int] = {}
        self._sketches, self._dense = Means(), Means()

    def add(self, update: ClientUpdate, members: Iterable[ClientUpdate]) -> None:
        """Count one reply.

        Args:
            update: its adapter has sketches and tensors trained in full.
            members: the clients' replies that it stands for; `start` of each says its ranks.
        """
        client, weight = update.client_id, update.num_examples
        mine = {name: tensor.double() for name, tensor in update.adapter.tensors.items() if sketches.is_sketch(name)}
        self._sketches.add(mine, weight, client)
        dense = {name: tensor for name, tensor in update.adapter.tensors.items() if not sketches.is_sketch(name)}
        self._dense.add(dense, weight, client)
        for one in members:
            self.examples[one.client_id] = one.num_examples
            self.ranks[one.client_id] = {n: f.rank for n, f in one.start.lora.items()} if one.start else {}

    def by_module(self) -> dict[str, dict[str, Tensor]]:
        """The mean sketches of each module, by their names."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, mean in self._sketches.values.items():
            module, _, part = name.rpartition("|")
            found.setdefault(module, {})[part] = mean
        return found

    @property
    def dense(self) -> dict[str, Tensor]:
        """The means of the tensors that are trained in full."""
        return self._dense.values

    def of_ranks(self, module: str) -> dict[int, float]:
        """Rank -> the share of the clients that have it in this module."""
        found: dict[int, float] = {}
        total = sum(self.examples.values())
        for client, ranks in self.ranks.items():
            found[ranks[module]] = found.get(ranks[module], 0.0) + self.examples[client] / total
        return found


def summed(this: TrainRound, sketch: Sketch, run: str, arrived: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    """The sum of a round's replies as one reply; none if nobody counts.

    Args:
        this: the round; gets its `sketch_loss`.
        sketch: how clients sketched their updates.
        run: key of the run.
        arrived: the replies to the round's broadcasts.
    """
    found = total(sketch, arrived, lambda clients, bases: this.again(clients, bases, run), this.members)
    if found is not None:
        update, this.sketch_loss = found
        yield update


def total(
    sketch: Sketch,
    arrived: Iterable[ClientUpdate],
    again: Callable[[Collection[int], Mapping[str, Tensor]], Iterable[ClientUpdate]],
    members: Callable[[ClientUpdate], Iterable[ClientUpdate]] = lambda update: [update],
) -> tuple[SummedUpdate, float] | None:
    """The sum of replies for a strategy with `of_ideal`, and an estimate of what is lost; None without a reply.

    In two passes, only clients that answer the second question count, and they count in all sums: in the ideal, in
    means and in shares of ranks. The bases may span more than their updates, which does no harm.

    Args:
        sketch: how clients sketched their updates.
        arrived: the replies, which are read as they arrive.
        again: asks these clients the second question, with Q by module.
        members: the clients' replies that a reply stands for; of a secure sum there are several.
    """
    sums, bases, first = Sums(), dict[str, Tensor](), dict[str, dict[str, Tensor]]()
    for update in arrived:
        sums.add(update, members(update))
    if sketch.passes == 2 and sums.examples:
        first = sums.by_module()
        bases = {module: basis_of(parts["Y"], sketch).float() for module, parts in first.items()}
        asked, sums = sums.examples, Sums()
        for update in again(asked, bases):
            sums.add(update, [update])
    if not sums.examples:
        return None
    lora, modules, found = dict[str, LoraFactors](), dict[str, SummedModule](), dict[str, Recovered]()
    for module, parts in sums.by_module().items():
        found[module] = recover({**first.get(module, {}), **parts}, sketch, bases.get(module))
        lora[module] = found[module].factors
        of_ranks, mean = sums.of_ranks(module), None
        if sketch.rank:
            most = max(of_ranks)  # rows beyond it are zeros, as no client has them
            mean = LoraFactors(A=parts["A"][:most].float(), B=parts["B"][:, :most].float(), scaling=1.0)
        modules[module] = SummedModule(of_ranks, mean)
    update = SummedUpdate(
        client_id=_SUM,
        adapter=AdapterState(lora=lora, tensors=sums.dense),
        num_examples=sum(sums.examples.values()),
        modules=modules,
    )
    return update, loss(found)
