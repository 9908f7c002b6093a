"""Strategies by name, imported only when one is asked for: this module loads no torch.

A strategy is a frozen dataclass that extends `base.Strategy`; its fields, each with a default, are its
options. The round loop sets the field `seed`, where a class has one, to the run's seed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import isabstract
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fedlora.common.errors import StrategyError, suggest
from fedlora.config import client_rank, rank_pattern

if TYPE_CHECKING:
    from fedlora.config import Config
    from fedlora.exchange import ClientInfo

    from .base import Strategy

Option = bool | int | float | str

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
}


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
    cls = resolve(name)
    known = {f.name: f for f in fields(cls) if f.init}
    hints = get_type_hints(cls)
    for option in options:
        if option not in known:
            hint = suggest(option, known) if known else "; it has no options"
            raise StrategyError(f"strategy.options: {name} has no option {option!r}{hint}")
    checked = {option: _check(name, option, value, hints[option]) for option, value in options.items()}
    try:
        return cls(**checked)
    except (TypeError, ValueError) as error:
        raise StrategyError(f"strategy.options: {name} refuses {checked}: {error}") from error


def resolve(name: str) -> type[Any]:
    """The class that a name stands for; see `load` for names and errors."""
    target = NAMES.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise StrategyError(
            f"strategy.name: unknown strategy {name!r} (your own is named package.module:Class){suggest(name, NAMES)}"
        )
    try:
        module = import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise StrategyError(
            f"strategy.name = {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
            "install it, or start in the folder that holds it"
        ) from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise StrategyError(f"strategy.name = {name!r}: module {module_name!r} has no class {class_name!r}")
    from .base import Strategy

    if not (isinstance(cls, type) and issubclass(cls, Strategy) and is_dataclass(cls)) or isabstract(cls):
        raise StrategyError(
            f"strategy.name = {name!r}: {class_name} is no strategy; write a frozen dataclass that extends "
            "fedlora.strategies.base.Strategy and has a method aggregate"
        )
    return cls


def configured(config: Config) -> Strategy:
    """The strategy that a run's config names, inside the wrappers that it asks for.

    The run's seed and its anchor settings go to a strategy that has fields `seed`, `max_rank` or `compact`.
    From the outside in: `Robust` filters the replies, `Restart` folds what the optimizer made and drops its moments,
    `ServerOptimizer` takes the strategy's change of the adapter for a gradient.
    """
    run_wide: dict[str, Option] = {
        "seed": config.run.seed,
        "max_rank": config.anchor.max_rank,
        "compact": config.anchor.base_update == "anchor",
        "prune_gamma": config.lora.prune_gamma,
    }
    known = {f.name for f in fields(resolve(config.strategy.name))}
    options = {name: value for name, value in run_wide.items() if name in known}
    strategy = load(config.strategy.name, **(options | parse_options(config.strategy.options)))
    chosen: Any = config.strategy  # its choices are the wrappers' Literals
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

        strategy = Restart(
            strategy,
            every=chosen.restart_every,
            seed=config.run.seed,
            max_rank=config.anchor.max_rank,
            compact=config.anchor.base_update == "anchor",
        )
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
    return strategy


def check_ranks(config: Config) -> None:
    """Raises StrategyError before anything is loaded, if the strategy cannot serve a simulation's clients."""
    check(configured(config), simulated(config))


def check(strategy: Strategy, clients: Sequence[ClientInfo]) -> None:
    """Raises StrategyError if the strategy cannot serve these clients; it names strategies that can."""
    with naming_others():
        strategy.check(clients)


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


def parse_options(text: str) -> dict[str, Option]:
    """`strategy.options`: "similarity=cosine, lam=0.01" as {"similarity": "cosine", "lam": 0.01}.

    A value is read as a TOML bool, number or string, or else as plain text; it holds no comma.

    Raises:
        StrategyError: a part is not name=value, or a name occurs twice.
    """
    options: dict[str, Option] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name or not value:
            raise StrategyError(f"strategy.options: got {item!r}, expected name=value, such as lam=0.01")
        name = name.replace("-", "_")
        if name in options:
            raise StrategyError(f"strategy.options: {name} is given twice in {text!r}; leave one")
        options[name] = _scalar(value)
    return options


@contextmanager
def naming_others() -> Iterator[None]:
    """Adds to an error about what a strategy lacks the names of those that have it; see `StrategyError.needs`."""
    try:
        yield
    except StrategyError as error:
        if not error.needs:
            raise
        *names, last = sorted(name for name in NAMES if getattr(resolve(name), error.needs))
        listed = f"{', '.join(names)} or {last}" if names else last
        raise StrategyError(f"{error}, or use strategy.name = {listed}") from None


def _scalar(text: str) -> Option:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, Option) else text


def _check(name: str, option: str, value: Option, expected: Any) -> Option:
    """The value in its field's type; types other than scalars and Literal are left to the class."""
    if get_origin(expected) is Literal:
        choices = [str(choice) for choice in get_args(expected)]
        if value not in get_args(expected):
            raise StrategyError(f"strategy.options: {name}'s {option} = {value!r}{suggest(str(value), choices)}")
        return value
    if expected is float and type(value) is int:
        return float(value)
    if expected is str and type(value) in (int, float):
        return str(value)
    if expected in (bool, int, float, str) and type(value) is not expected:
        raise StrategyError(
            f"strategy.options: {name}'s {option} = {value!r} is {type(value).__name__}, expected {expected.__name__}"
        )
    return value
