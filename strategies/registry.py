"""Strategies by name, imported only when one is asked for: this module loads no torch.

A strategy is a frozen dataclass that extends `base.Strategy`; its fields, each with a default, are its options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import StrategyError
from fedlora.common.registry import Option, Registry
from fedlora.config import client_rank, rank_pattern

if TYPE_CHECKING:
    from fedlora.adapters.kinds.base import AdapterKind
    from fedlora.config import Config, LoraConfig
    from fedlora.exchange import ClientInfo

    from .allocations.base import Allocation
    from .base import Strategy
    from .initializers.base import Initializer

NAMES: dict[str, str] = {
    "fedavg": "fedlora.strategies.methods.fedavg:FedAvg",
    "flora": "fedlora.strategies.methods.flora:Flora",
    "lora-fair": "fedlora.strategies.methods.lora_fair:LoraFair",
    "fedavg-zeropad": "fedlora.strategies.methods.fedavg_zeropad:FedAvgZeropad",
    "rblora": "fedlora.strategies.methods.rblora:RbLora",
    "hetlora": "fedlora.strategies.methods.hetlora:HetLora",
    "flexlora": "fedlora.strategies.methods.flexlora:FlexLora",
    "fedex": "fedlora.strategies.methods.fedex:FedEx",
    "florist": "fedlora.strategies.methods.florist:Florist",
    "ffa": "fedlora.strategies.methods.ffa:Ffa",
    "rolora": "fedlora.strategies.methods.rolora:RoLora",
    "fedsvd": "fedlora.strategies.methods.fedsvd:FedSvd",
    "fedsa": "fedlora.strategies.methods.fedsa:FedSa",
    "fedsb": "fedlora.strategies.methods.fedsb:FedSb",
    "flasc": "fedlora.strategies.methods.flasc:Flasc",
    "abmll": "fedlora.strategies.methods.abmll:Abmll",
    "fedrot": "fedlora.strategies.methods.fedrot:FedRot",
    "raflora": "fedlora.strategies.methods.raflora:RaFlora",
    "frlora": "fedlora.strategies.methods.frlora:FrLora",
    "fed-plora": "fedlora.strategies.methods.fed_plora:FedPLora",
    "fslora": "fedlora.strategies.methods.fslora:FsLora",
    "lora-a2": "fedlora.strategies.methods.lora_a2:LoraA2",
}


STRATEGIES = Registry(
    noun="strategy",
    key="strategy.name",
    options_key="strategy.options",
    base="fedlora.strategies.base:Strategy",
    method="aggregate",
    names=NAMES,
    error=StrategyError,
)


def load(name: str, **options: Option) -> Strategy:
    """A strategy with its options set.

    Args:
        name: one of `NAMES`, or your own class as "your_package.module:Class".
        options: values for the class's fields; the others keep their defaults.

    Raises:
        StrategyError: no such strategy, it cannot be imported, or an option has a wrong name, type or value.

    Example:
        >>> load("lora-fair", similarity="cosine", lam=0.01)
        LoraFair(similarity='cosine', lam=0.01)
    """
    return STRATEGIES.load(name, **options)


def configured(config: Config) -> Strategy:
    """The strategy that a run's config names, inside the wrappers that it asks for.

    From the outside in: `Private` has the privacy stages' places on the server, `Robust` filters the replies, `Restart`
    folds what the optimizer made and drops its moments, `ServerOptimizer` takes the strategy's change of the adapter
    for a gradient, `SampledLayers` narrows the round to some layers, `Routed` averages an adapter kind's experts by
    their tokens, `RestOfWorld` sends each client the mean of the others' parts, and `PersonalParts` leaves the kind's
    personal parts on the clients. `FedDyn` or `Scaffold` takes the place of `ServerOptimizer` and `Restart`.
    """
    strategy: Strategy = STRATEGIES.make(config.strategy.name, config.strategy.options)
    if strategy.replaces_folds and config.anchor.base_update == "merge":
        options = config.strategy.options
        raise StrategyError(
            f"anchor.base-update = merge: strategy.name = {config.strategy.name}"
            f"{f' with strategy.options = {options!r}' if options else ''} takes folds back that it sent a round "
            "before, which clients that merge folds cannot do; set anchor.base-update = anchor"
            f"{', or leave out strategy.options' if options else ''}"
        )
    kind = _kind(config)
    if kind.kept:
        from .wrappers.personal_parts import PersonalParts

        strategy = PersonalParts(strategy, parts=kind.kept)
    if kind.others:
        from .wrappers.rest_of_world import RestOfWorld, names_of

        strategy = RestOfWorld(strategy, others=names_of(kind.others, kind.name))
    if kind.counted and strategy.linear:
        from .wrappers.routed import Routed

        experts = frozenset(f"{kind.name}_{part}" for part in kind.routed)
        strategy = Routed(strategy, counted=f"{kind.name}_{kind.counted}", experts=experts)
    if config.train.layers_per_round:
        from .wrappers.sampled_layers import SampledLayers

        strategy = SampledLayers(strategy, count=config.train.layers_per_round)
    chosen: Any = config.strategy  # its choices are the wrappers' Literals
    if chosen.correction != "none":
        _check_correction(config)
    if chosen.correction == "feddyn":
        from .wrappers.feddyn import FedDyn

        strategy = FedDyn(strategy, alpha=chosen.correction_weight, clients=config.federation.clients)
    if chosen.correction == "scaffold":
        from .wrappers.scaffold import Scaffold

        _check_scaffold(config)
        strategy = Scaffold(strategy, clients=config.federation.clients)
    if chosen.server_optimizer != "none":
        from .wrappers.server_optimizer import ServerOptimizer

        with naming_others():
            strategy = ServerOptimizer(
                strategy,
                kind=chosen.server_optimizer,
                lr=chosen.server_lr,
                beta1=chosen.server_beta1,
                beta2=chosen.server_beta2,
                tau=chosen.server_tau,
            )
    if chosen.restart_every:
        from .wrappers.restart import Restart

        strategy = Restart(strategy, every=chosen.restart_every)
    if chosen.robust != "none":
        from .wrappers.robust import Robust

        strategy = Robust(
            strategy,
            rule=chosen.robust,
            bound=chosen.robust_bound,
            trim=chosen.robust_trim,
            byzantine=chosen.robust_byzantine,
            keep=chosen.robust_keep,
        )
    if config.privacy.stages:
        from fedlora.exchange.stages import stages

        from .wrappers.private import Private

        with naming_others():
            strategy = Private(strategy, stages=stages(config.privacy))
    _check_warmup(strategy, config)
    return strategy


def _check_correction(config: Config) -> None:
    """Raises StrategyError if something else changes what the correction has added up over rounds."""
    chosen = config.strategy
    others = {
        "strategy.server-optimizer": chosen.server_optimizer != "none",
        "strategy.restart-every": chosen.restart_every > 0,
        "train.layers-per-round": config.train.layers_per_round > 0,
        "privacy.stages": bool(config.privacy.stages),
    }
    for key, is_set in others.items():
        if is_set:
            raise StrategyError(
                f"strategy.correction = {chosen.correction} adds up changes over rounds, which {key} changes again; "
                "leave out one of them"
            )


def _check_scaffold(config: Config) -> None:
    """Raises StrategyError if the server could not tell from the replies what clients remember of their gradients."""
    if config.train.optimizer != "sgd":
        raise StrategyError(
            "strategy.correction = scaffold takes what a client's steps add up to, over their rates, for its mean "
            f"gradient, which is so for plain SGD alone, and train.optimizer = {config.train.optimizer}; set "
            "train.optimizer = sgd, or strategy.correction = feddyn"
        )
    if config.strategy.robust != "none":
        raise StrategyError(
            f"strategy.correction = scaffold adds up what each client sends, and strategy.robust = "
            f"{config.strategy.robust} takes some of it away; leave out one of them"
        )
    if config.wire.dtype != "fp32":
        raise StrategyError(
            "strategy.correction = scaffold needs the same c on the server and on clients, and wire.dtype = "
            f"{config.wire.dtype} rounds it on the way; set wire.dtype = fp32"
        )


def _check_warmup(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if the warm-up of a link would be a single step, at the whole rate, or none."""
    train = config.train
    if train.warmup != "link" or not (train.steps and train.warmup_fraction):
        return
    from fedlora.adapters import AdapterState
    from fedlora.exchange import ClientInfo

    span = strategy.broadcast(strategy.init(AdapterState()), ClientInfo(client_id=0, rank=1), 1).plan.span
    steps = (span or config.federation.rounds) * train.steps
    if round(train.warmup_fraction * steps) < 2:
        least = f"train.warmup-fraction to {2 / steps:.2g} or more" if steps > 1 else "train.steps to 2 or more"
        raise StrategyError(
            f"train.warmup = link: an adapter is trained for {steps} steps here before the next one begins, and "
            f"train.warmup-fraction = {train.warmup_fraction:g} of them is less than two steps, so that the learning "
            f"rate would not rise; set {least}, or train.warmup = run"
        )


def check_ranks(config: Config) -> None:
    """Raises StrategyError before anything is loaded, if the strategy cannot serve a simulation's clients."""
    check(configured(config), simulated(config), config.lora)


def check(strategy: Strategy, clients: Sequence[ClientInfo], lora: LoraConfig) -> None:
    """Raises StrategyError if the strategy cannot serve these clients or this kind of adapter; it names who can.

    Args:
        strategy: inside its wrappers.
        clients: all of the run.
        lora: names the kind.
    """
    from fedlora.adapters.kinds.registry import KINDS

    from .allocations.registry import ALLOCATIONS
    from .initializers.registry import initializer

    allocation: Allocation = ALLOCATIONS.make(lora.allocation, lora.allocation_options)
    kind = KINDS.make(lora.kind, lora.kind_options)
    with naming_others():
        start = initializer(lora, strategy)
        _check_round_0(lora, allocation, start, strategy, kind)
        if not (kind.pairs or strategy.any_kind):
            raise StrategyError(
                f"lora.kind = {lora.kind} has no factors A and B, which strategy.name and its wrappers need here; "
                "set lora.kind = lora",
                needs="any_kind",
            )
        strategy.check(clients)
    _check_complement(lora, start, strategy)
    ranks = [client.rank for client in clients]
    for rank in {rank for client in clients for rank in client.every_rank}:
        kind.check(rank)
        start.check_rank(rank)
    one_rank = len({client.all_ranks for client in clients}) == 1
    if not (start.unequal_ranks or one_rank):
        raise StrategyError(
            f"lora.init = {lora.init} needs one rank, got ranks {', '.join(map(str, ranks[:10]))}; set lora.ranks = '' "
            f"and lora.rank = {max(ranks)}, or lora.init = uniform"
        )
    if not (kind.pairs or one_rank):
        raise StrategyError(
            f"lora.kind = {lora.kind} needs one rank, got ranks {', '.join(map(str, ranks[:10]))}; "
            f"set lora.ranks = '' and lora.rank = {max(ranks)}, or lora.kind = lora"
        )


def _check_complement(lora: LoraConfig, start: Initializer, strategy: Strategy) -> None:
    """Raises StrategyError if an A that a restart draws, and clients do not train, leaves the space they keep to."""
    from .base import trained_in_turn
    from .wrappers.restart import Restart
    from .wrappers.wrapper import layers

    if not start.terms or not any(isinstance(layer, Restart) for layer in layers(strategy)):
        return
    for number, factors in enumerate(trained_in_turn(strategy), start=1):
        if "A" not in factors:
            raise StrategyError(
                f"lora.init = {lora.init} keeps what clients train in a part of the space, strategy.restart-every "
                f"draws a new A, and clients do not train A in round {number}; set strategy.restart-every = 0, or "
                "another lora.init"
            )


def _check_round_0(
    lora: LoraConfig, allocation: Allocation, start: Initializer, strategy: Strategy, kind: AdapterKind
) -> None:
    """Raises StrategyError if the allocation cannot have its statistic in this run."""
    asks = f"lora.allocation = {lora.allocation} asks clients for a statistic before round 1"
    if not allocation.statistic:
        return
    if start.statistic not in ("", allocation.statistic):
        raise StrategyError(
            f"{asks}, {allocation.statistic}, and lora.init = {lora.init} for another, {start.statistic}; a run has "
            "one such round: set lora.allocation = pattern, or an initializer that asks for the same or for nothing"
        )
    if not kind.pairs:
        raise StrategyError(
            f"{asks}, which is measured beside LoRA's A and B, and lora.kind = {lora.kind} has none; set "
            "lora.allocation = pattern, or lora.kind = lora"
        )
    if not strategy.any_statistic:
        raise StrategyError(
            f"{asks}, which strategy.robust cannot compare entry by entry; set lora.allocation = pattern, or "
            "strategy.robust = norm-bound, krum or multi-krum"
        )


def check_evaluation(config: Config, strategy: Strategy) -> None:
    """Raises StrategyError if something stays on the clients, so that the server has no whole model to evaluate."""
    if strategy.personal and config.evaluate.server and not config.evaluate.clients:
        kept = _kind(config).kept
        whose = f"lora.kind = {config.lora.kind}" if kept else f"strategy.name = {config.strategy.name}"
        raise StrategyError(
            f"{whose}: {' and '.join(sorted(strategy.personal))} stays on the clients, so that only they can evaluate "
            "what is learned; set evaluate.clients = true"
        )


def check_places(clients: Sequence[ClientInfo], lora: LoraConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raises ConfigError if the adapter kind cannot work in one of the adapted layers at a client's rank.

    Args:
        clients: all of the run.
        lora: names the kind.
        shapes: module -> (d_out, d_in).
    """
    from fedlora.adapters.kinds.base import Place
    from fedlora.adapters.kinds.registry import KINDS

    kind = KINDS.make(lora.kind, lora.kind_options)
    unlike = {client.all_ranks: client for client in clients}.values()
    for module, (d_out, d_in) in shapes.items():
        for rank in {client.rank_of(module) for client in unlike}:
            kind.check_place(Place(module, d_out, d_in, rank))


def _kind(config: Config) -> AdapterKind:
    """The run's adapter kind.

    Raises:
        StrategyError: it needs the base's own weights, and the clients may change them; or its update has no factors,
            and the config asks for what needs them; or the penalty is of a product that it lacks; or it adds a term to
            the loss in each of several passes.
    """
    from fedlora.adapters.kinds.registry import KINDS

    name = config.lora.kind
    kind = KINDS.make(name, config.lora.kind_options)
    if kind.needs_weight and config.anchor.base_update == "merge":
        raise StrategyError(
            f"anchor.base-update = merge: lora.kind = {name} needs the base's own weights, into which clients would "
            "merge folds; set anchor.base-update = anchor"
        )
    if kind.adds_to_loss and config.train.accumulate > 1:
        raise StrategyError(
            f"train.accumulate = {config.train.accumulate}: lora.kind = {name} adds its own term to the loss once for "
            "each pass, which would count it so many times in a step; set train.accumulate = 1, or leave the term out "
            "(for mixlora, lora.kind-options = balance=0)"
        )
    if config.train.prox_mu and config.train.prox_of == "update" and not kind.pairs:
        raise StrategyError(
            f"train.prox-of = update: lora.kind = {name} has no factors A and B, whose product the penalty is of; "
            "set train.prox-of = factors, which takes the kind's own parts, or lora.kind = lora"
        )
    if not (kind.factored and kind.matrix) and config.evaluate.intruders:
        raise StrategyError(
            f"evaluate.intruders: the update of lora.kind = {name} has no factors, whose directions could be counted; "
            "set evaluate.intruders = false"
        )
    return kind


def simulated(config: Config) -> list[ClientInfo]:
    """The clients of a simulation, with the ranks that `lora.ranks` gives them."""
    from fedlora.exchange import ClientInfo

    return [
        ClientInfo(
            client_id=client,
            rank=client_rank(config.lora, client),
            alpha=config.lora.alpha,
            rslora=config.lora.rslora,
            rank_pattern=rank_pattern(config.lora),
        )
        for client in range(config.federation.clients)
    ]


@contextmanager
def naming_others() -> Iterator[None]:
    """Adds to an error about what a strategy lacks the names of those that have it; see `StrategyError.needs`."""
    try:
        yield
    except StrategyError as error:
        if not error.needs:
            raise
        *names, last = sorted(name for name in NAMES if getattr(STRATEGIES.resolve(name), error.needs))
        listed = f"{', '.join(names)} or {last}" if names else last
        raise StrategyError(f"{error}, or use strategy.name = {listed}") from None
