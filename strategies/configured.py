"""The strategy of a run, inside the wrappers that its configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedlora.common.errors import StrategyError
from fedlora.config import clients_per_round

from .checks.clients import check, simulated
from .checks.corrections import check_correction, check_scaffold
from .checks.kinds import kind_of
from .checks.privacy import check_client_level
from .checks.sums import check_edges, check_secure, check_sum
from .registry import STRATEGIES, naming_others

if TYPE_CHECKING:
    from fedlora.config import Config

    from .base import Strategy


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
    kind = kind_of(config)
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
        check_correction(config)
    if chosen.correction == "feddyn":
        from .wrappers.feddyn import FedDyn

        strategy = FedDyn(strategy, alpha=chosen.correction_weight, clients=config.federation.clients)
    if chosen.correction == "scaffold":
        from .wrappers.scaffold import Scaffold

        check_scaffold(config)
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
    check_sum(strategy, config)
    check_secure(strategy, config)
    check_edges(strategy, config)
    return strategy


def _with_privacy(strategy: Strategy, config: Config) -> Strategy:
    """The strategy inside the wrappers for `privacy.level = client` and for privacy stages."""
    if config.privacy.level == "client":
        from fedlora.exchange.privacy import mechanism

        from .wrappers.client_noise import ClientNoise
        from .wrappers.product_noise import ProductNoise

        check_client_level(config)
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
