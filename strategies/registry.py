"""Strategies by name, imported only when one is asked for: this module loads no torch.

A strategy is a frozen dataclass that extends `base.Strategy`; its fields, each with a default, are its options.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora.common.errors import StrategyError
from fedlora.common.registry import Option, Registry
from fedlora.config import client_rank, clients_per_round, rank_pattern

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

    From the outside in: `Private` has the privacy stages' places on the server, `ClientNoise` or `ProductNoise` makes
    one reply of all with noise (`privacy.level = client`), `Robust` filters the replies, `Restart`
    folds what the optimizer made and drops its moments, `ServerOptimizer` takes the strategy's change of the adapter
    for a gradient, `SampledLayers` narrows the round to some layers, `Routed` averages an adapter kind's experts by
    their tokens, `SomeGroups` has clients of smaller ranks train some of the kind's groups of parts, `RestOfWorld`
    sends each client the mean of the others' parts, and `PersonalParts` leaves the kind's personal parts on the
    clients. `FedDyn` or `Scaffold` takes the place of `ServerOptimizer` and `Restart`.
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
    if kind.groups:
        from .wrappers.some_groups import SomeGroups

        strategy = SomeGroups(strategy, kind=kind)
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
    strategy = _with_privacy(strategy, config)
    _check_warmup(strategy, config)
    _check_sum(strategy, config)
    _check_secure(strategy, config)
    _check_edges(strategy, config)
    return strategy


def _with_privacy(strategy: Strategy, config: Config) -> Strategy:
    """The strategy inside the wrappers for `privacy.level = client` and for privacy stages."""
    if config.privacy.level == "client":
        from fedlora.exchange.privacy import mechanism

        from .wrappers.client_noise import ClientNoise
        from .wrappers.product_noise import ProductNoise

        _check_client_level(config)
        in_products = ProductNoise.serves(strategy)
        made = mechanism(config, 1, ProductNoise.releases if in_products else ClientNoise.releases)
        assert made is not None
        about: dict[str, Any] = {
            "clip": config.privacy.clip,
            "noise_multiplier": made.noise_multiplier,
            "clients": clients_per_round(config.federation.clients, config.federation.fraction),
            "quantile": config.privacy.clip_quantile,
            "rate": config.privacy.clip_rate,
            "cap": config.privacy.weight_cap,
        }
        with naming_others():
            strategy = (
                ProductNoise(strategy, **about, width=config.wire.sketch_width)
                if in_products
                else ClientNoise(strategy, **about)
            )
    if config.privacy.stages:
        from fedlora.exchange.stages import stages

        from .wrappers.private import Private

        with naming_others():
            strategy = Private(strategy, stages=stages(config.privacy))
    return strategy


def _check_sum(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if sketches of the clients' updates, or their sum, are not enough for this run."""
    from .wrappers.wrapper import innermost

    inside, asked = innermost(strategy), "wire.sum = sketch"
    if config.wire.sum == "none" or inside.linear:
        return
    if not inside.of_ideal or strategy.personal:
        known = [STRATEGIES.resolve(name) for name in NAMES]
        *names, last = sorted(n for n, c in zip(NAMES, known, strict=True) if c.of_ideal)
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, and the server would "
            f"see only the mean of their updates; use strategy.name = {', '.join(names)} or {last}, or a linear one "
            "such as fedavg, which needs no sketch"
        )
    if config.strategy.robust != "none":
        raise StrategyError(
            f"{asked}: strategy.robust = {config.strategy.robust} judges each client's update, and the server would "
            "see only their sum; leave out one of them"
        )
    if config.wire.upload_dtype != "fp32":
        raise StrategyError(
            f"{asked}: wire.upload-dtype = {config.wire.upload_dtype} rounds the change of factors, which sketches do "
            "not hold; set wire.upload-dtype = fp32, and wire.sketch-width for smaller uploads"
        )
    _check_stages(config, asked)


def _check_of_sums(strategy: Strategy, config: Config, asked: str) -> None:
    """Raises StrategyError if the mean of the clients' replies is not enough for this run.

    Args:
        strategy: the innermost one.
        config: the run's.
        asked: the setting for which the server sees no more than that, for the message.
    """
    if strategy.of_ideal and config.wire.sum == "none":
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, unless they are "
            "sketched; set wire.sum = sketch"
        )
    if not (strategy.of_ideal or strategy.of_mean or strategy.linear):
        known = {name: STRATEGIES.resolve(name) for name in NAMES}
        sums = sorted(name for name, cls in known.items() if cls.of_mean or cls.linear)
        sketched = sorted(name for name, cls in known.items() if cls.of_ideal)
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} needs the clients' own factors, and the server would see "
            f"only their mean; use {', '.join(sums)}, or with wire.sum = sketch {', '.join(sketched)}"
        )
    kind = _kind(config)
    for wrong, why in (
        (
            config.privacy.level == "client",
            "privacy.level = client clips each client's change on the server, which sees none; set example or none",
        ),
        (
            config.strategy.robust != "none",
            f"strategy.robust = {config.strategy.robust} judges each client's update, and the server sees none",
        ),
        (
            config.strategy.correction != "none",
            f"strategy.correction = {config.strategy.correction} keeps sums of each client, and the server sees none",
        ),
        (
            bool(kind.others or kind.counted),
            f"lora.kind = {config.lora.kind} needs parts of each client by itself, and the server sees none",
        ),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")
    _check_stages(config, asked)


def _check_edges(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if edges may not add up what their clients send in this run."""
    from .wrappers.wrapper import innermost

    if config.wire.edges == "forward":
        return
    asked = "wire.edges = sum"
    for wrong, why in (
        (
            config.privacy.secure_sum,
            "privacy.secure-sum = true sums masked numbers, which edges carry as they are; set wire.edges = forward",
        ),
        (
            config.wire.sum == "sketch" and config.wire.sketch_passes == 2,
            "wire.sketch-passes = 2 asks each client a second question; set 1",
        ),
        (
            config.federation.schedule != "synchronous",
            f"federation.schedule = {config.federation.schedule} counts each update by its own age; set synchronous",
        ),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")
    _check_of_sums(innermost(strategy), config, asked)


def _check_secure(strategy: Strategy, config: Config) -> None:
    """Raises StrategyError if the mean of the clients' replies is not enough for this run."""
    from .wrappers.wrapper import innermost

    if not config.privacy.secure_sum:
        return
    inside, asked = innermost(strategy), "privacy.secure-sum = true"
    _check_of_sums(inside, config, asked)
    most = clients_per_round(config.federation.clients, config.federation.fraction)
    asks = next(filter(None, _statistics(strategy, config.lora)), "")
    for wrong, why in (
        (most < 3, f"{most} clients take part in a round, expected at least 3, since each knows its own numbers"),
        (
            inside.of_ideal and config.wire.sketch_passes == 2,
            "set wire.sketch-passes = 1: from the sums of two passes the server could compute what a client sketched "
            "that is lost between them",
        ),
        (
            config.wire.upload_dtype != "fp32",
            f"wire.upload-dtype = {config.wire.upload_dtype} has scales of each client, and sums are of whole numbers; "
            "set fp32",
        ),
        (bool(asks), f"in round 0 clients would send {asks} in the clear; choose another lora.init or lora.allocation"),
    ):
        if wrong:
            raise StrategyError(f"{asked}: {why}")


def check_summed_ranks(strategy: Strategy, clients: Sequence[ClientInfo], config: Config) -> None:
    """Raises StrategyError if the mean of the replies does not say what these clients' unequal ranks would."""
    from .wrappers.wrapper import innermost

    inside = innermost(strategy)
    unequal = len({client.all_ranks for client in clients}) > 1
    if not ((config.privacy.secure_sum or config.wire.edges == "sum") and unequal):
        return
    asked = "privacy.secure-sum = true" if config.privacy.secure_sum else "wire.edges = sum"
    ranks = sorted({client.rank for client in clients}, reverse=True)
    if _kind(config).groups:
        raise StrategyError(
            f"{asked}: clients of lora.kind = {config.lora.kind} with ranks "
            f"{', '.join(map(str, ranks))} train different parts, and a sum does not say who sent which; give all "
            "clients one rank"
        )
    if not (inside.of_mean or inside.of_ideal):
        raise StrategyError(
            f"{asked}: strategy.name = {config.strategy.name} averages a row over the clients that "
            f"have it, and a sum over ranks {', '.join(map(str, ranks))} does not say who has; give all clients one "
            "rank, or use fedavg-zeropad, or flexlora with wire.sum = sketch"
        )


def _check_stages(config: Config, asked: str) -> None:
    """Raises StrategyError if a privacy stage changes single replies on the server, which it would not see."""
    from fedlora.exchange.stages import Stage, stages

    for stage in stages(config.privacy):
        if type(stage).arriving is not Stage.arriving:
            raise StrategyError(
                f"{asked}: {type(stage).__name__} of privacy.stages changes each reply on the server, which would see "
                "only their sum; leave out one of them"
            )


def _check_client_level(config: Config) -> None:
    """Raises StrategyError if a rule needs single replies, of which there is one for all."""
    if config.strategy.robust != "none":
        raise StrategyError(
            f"strategy.robust = {config.strategy.robust} compares the clients' replies, and with privacy.level = "
            "client no client may decide whether another one counts; each is clipped to privacy.clip instead: set "
            "strategy.robust = none"
        )
    if config.wire.sum != "none" and STRATEGIES.resolve(config.strategy.name).of_ideal:
        raise StrategyError(
            f"wire.sum = {config.wire.sum}: privacy.level = client clips what each client changed, which sketches do "
            "not tell exactly; set wire.sum = none: the server makes the sketches"
        )


def check_private(strategy: Strategy, config: Config) -> None:
    """Check that nothing leaves the clients outside the mechanism of `privacy.level`.

    Args:
        strategy: inside its wrappers.
        config: of the run.

    Raises:
        StrategyError: a round 0 would send statistics without noise, or the adapter kind's parts are not clipped.
    """
    from fedlora.exchange.privacy import WITH_NOISE, starts_with_noise

    level, lora = f"privacy.level = {config.privacy.level}", config.lora
    if config.privacy.level == "none":
        return
    of_start, of_ranks = _statistics(strategy, lora)
    if of_start and not (starts_with_noise(config) and of_start in WITH_NOISE):
        fix = f"set lora.init = {'lora-xs' if strategy.cores else 'uniform'}"
        if of_start in WITH_NOISE and config.privacy.level == "example":
            fix += ", or privacy.start = noise"
        raise StrategyError(
            f"lora.init starts from statistics of the clients' rows ({of_start}), which they would send before "
            f"round 1 without noise, and {level} allows nothing without noise; {fix}"
        )
    if of_ranks:
        raise StrategyError(
            f"lora.allocation = {lora.allocation} spreads ranks by statistics of the clients' rows "
            f"({of_ranks}), which they would send before round 1 without noise, and {level} allows nothing "
            "without noise; set lora.allocation = pattern"
        )
    if not _kind(config).pairs:
        raise StrategyError(
            f"lora.kind = {lora.kind}: {level} clips LoRA's factors A and B, which this kind does not have; set "
            "lora.kind = lora"
        )


def _statistics(strategy: Strategy, lora: LoraConfig) -> tuple[str, str]:
    """Names of what clients measure in round 0 for the initializer and for the allocation; empty for nothing."""
    from .allocations.registry import ALLOCATIONS
    from .initializers.registry import initializer

    with naming_others():
        start = initializer(lora, strategy)
    allocation: Allocation = ALLOCATIONS.make(lora.allocation, lora.allocation_options)
    return start.statistic, allocation.statistic


def releases(strategy: Strategy) -> int:
    """The number of sums with noise in each round at the level of clients."""
    from .wrappers.client_noise import ClientNoise
    from .wrappers.wrapper import layers

    return next((layer.releases for layer in layers(strategy) if isinstance(layer, ClientNoise)), 1)


def multiplies_noise(strategy: Strategy) -> bool:
    """Whether there are rounds that train both A and B, so that noise on one is multiplied with noise on the other.

    Noise on products is not.
    """
    from .base import trained_in_turn
    from .wrappers.product_noise import ProductNoise
    from .wrappers.wrapper import layers

    if any(isinstance(layer, ProductNoise) for layer in layers(strategy)):
        return False
    return any(each >= {"A", "B"} for each in trained_in_turn(strategy))


def _check_correction(config: Config) -> None:
    """Raises StrategyError if something else changes what the correction has added up over rounds."""
    chosen = config.strategy
    others = {
        "strategy.server-optimizer": chosen.server_optimizer != "none",
        "strategy.restart-every": chosen.restart_every > 0,
        "train.layers-per-round": config.train.layers_per_round > 0,
        "privacy.stages": bool(config.privacy.stages),
        "privacy.level = client": config.privacy.level == "client",
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
    if not (kind.pairs or kind.groups or one_rank):
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

    lora, pattern = config.lora, rank_pattern(config.lora)
    return [
        ClientInfo(client, client_rank(lora, client), lora.alpha, rslora=lora.rslora, rank_pattern=pattern)
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
        known, needs = {name: STRATEGIES.resolve(name) for name in NAMES}, error.needs.split(" or ")
        *names, last = sorted(name for name, cls in known.items() if any(getattr(cls, need) for need in needs))
        listed = f"{', '.join(names)} or {last}" if names else last
        raise StrategyError(f"{error}, or use strategy.name = {listed}") from None
