"""Privacy stages: what happens to values at the four places where they could tell of somebody's rows.

A stage is one class with a method for each place; a method that is not written changes nothing. `privacy.stages` names
the stages of a run, in their order; each node and the server make them from the same config.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fedlora.adapters import AdapterState
from fedlora.common.errors import ConfigError
from fedlora.common.registry import Option, Registry
from fedlora.config import PrivacyConfig

from .messages import Broadcast, ClientUpdate


class Stage(ABC):  # noqa: B024 - each place may be left as it is
    """A frozen dataclass whose fields are its options, all with defaults.

    Attributes:
        linear: True if the stage is sound only where the result is a weighted mean of what was uploaded; a strategy
            that is not linear is then refused.
    """

    linear: ClassVar[bool] = False

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:  # noqa: B027
        """On the client, after every pass of an optimizer step: change the gradients in place, before penalties and
        clipping. Most optimizers take one pass in a step, sharpness-aware ones two."""

    def leaving(self, adapter: AdapterState, sent: Broadcast, seed: int) -> AdapterState:
        """On the client: what leaves it, before it is coded for the wire.

        Args:
            adapter: as trained, with all of its factors.
            sent: what the training started from.
            seed: of this client and round.
        """
        return adapter

    def arriving(self, updates: Iterable[ClientUpdate], number: int) -> Iterator[ClientUpdate]:
        """On the server: the replies that the strategy sees, in the order of client ids.

        Args:
            updates: as they were decoded; to be consumed once, as they arrive.
            number: of the round.
        """
        yield from updates

    def aggregated(self, before: AdapterState, after: AdapterState, number: int) -> AdapterState:
        """On the server: the shared adapter that the next round starts from.

        Args:
            before: what this round started from.
            after: what the strategy made of the replies.
            number: of the round.
        """
        return after


@dataclass(frozen=True)
class Unchanged(Stage):
    """Changes nothing, anywhere."""


STAGES = Registry(
    noun="privacy stage",
    key="privacy.stages",
    options_key="privacy.stages-options",
    base="fedlora.exchange.stages:Stage",
    method="leaving",
    names={"unchanged": "fedlora.exchange.stages:Unchanged"},
)


def stages(privacy: PrivacyConfig) -> tuple[Stage, ...]:
    """The stages that `privacy.stages` names, in order, with their options.

    Raises:
        ConfigError: there is no such stage, or it has no such option.
    """
    names = [name for name in (part.strip() for part in privacy.stages.split(",")) if name]
    options: dict[str, dict[str, Option]] = {_short(name): {} for name in names}
    for key, value in STAGES.parse(privacy.stages_options).items():
        stage, _, option = key.partition(".")
        if stage not in options or not option:
            raise ConfigError(
                f"privacy.stages-options: {key!r} is no option of a stage in privacy.stages = {privacy.stages!r}; "
                "expected stage.name=value, a stage of your own being called by its class's name"
            )
        options[stage][option] = value
    return tuple(STAGES.load(name, **options[_short(name)]) for name in names)


def _short(name: str) -> str:
    """What a stage is called among the options: its class's name, or its own, as an option's name is written."""
    return name.rpartition(":")[2].replace("-", "_")
