"""What a run's section privacy means for one client: its mechanism, and the epsilon that this has spent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora.common import accountant
from fedlora.config import Config, steps_per_round

# The statistics that clients can clip and noise.
WITH_NOISE = frozenset({"gradient"})


@dataclass(frozen=True)
class Mechanism:
    """Gaussian noise on clipped sums, some releases in each round.

    Args:
        level: whom it protects, "client" or "example".
        noise_multiplier: standard deviation of the noise over the norm at which is clipped.
        rate: probability with which one row is in a release (Poisson sampling); 1 at the level of clients.
        per_round: number of releases in a round: of sums at the level of clients, else the client's optimizer steps.
        delta: of the guarantee.
    """

    level: str
    noise_multiplier: float
    rate: float
    per_round: int
    delta: float

    def epsilon(self, rounds: int) -> float:
        """What is spent after so many rounds.

        Raises:
            ConfigError: the accountant's library is not installed.
        """
        return accountant.epsilon(self.noise_multiplier, self.rate, rounds * self.per_round, self.delta)


def mechanism(config: Config, num_examples: int, releases: int = 1) -> Mechanism | None:
    """The mechanism of a run for a client with so many training rows; None without `privacy.level`.

    With `privacy.epsilon`, the noise is what all rounds of the run may have, for a client that takes part in each; with
    `privacy.start = noise`, round 0 is one of them.
    A rate is rounded up to two digits, which can only raise epsilon, so that clients with about as many rows share
    one computation.

    Args:
        config: of the run.
        num_examples: of the client.
        releases: number of sums with noise in a round, at the level of clients.

    Raises:
        ConfigError: the accountant's library is not installed, or no noise gives this epsilon.
    """
    privacy, train = config.privacy, config.train
    if privacy.level == "none":
        return None
    rate, per_round = 1.0, releases
    if privacy.level == "example":
        rate = sampling_rate(config, num_examples)
        digit = 10.0 ** (math.floor(math.log10(rate)) - 1)
        rate, per_round = min(1.0, math.ceil(rate / digit - 1e-9) * digit), steps_per_round(train, num_examples)
    noise = privacy.noise_multiplier or accountant.noise_for(
        privacy.epsilon, privacy.delta, rate, (config.federation.rounds + starts_with_noise(config)) * per_round
    )
    return Mechanism(privacy.level, noise, rate, per_round, privacy.delta)


def starts_with_noise(config: Config) -> bool:
    """Whether clients may be asked in a round 0 for a statistic of `WITH_NOISE`, which costs as much as a round."""
    return config.privacy.level == "example" and config.privacy.start == "noise"


def sampling_rate(config: Config, num_examples: int) -> float:
    """The probability with which one row of a client is in a step: the expected batch over the number of rows."""
    return min(1.0, config.train.batch_size * config.train.accumulate / num_examples)
