"""Epsilon against closed forms and published numbers, the noise for an epsilon, and the random numbers themselves."""

import builtins
import math

import numpy as np
import pytest
from scipy import optimize, stats

from fedlora.common import accountant
from fedlora.common.errors import ConfigError
from fedlora.common.noise import Noise


def analytic(noise: float, count: int, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism released `count` times: Balle and Wang 2018, Theorem 8.

    `delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)` with `mu = sqrt(count) / noise`, since releases of
    Gaussian noise compose as one of their joint distance.
    """
    mu = math.sqrt(count) / noise

    def excess(eps: float) -> float:
        log_tail = eps + stats.norm.logcdf(-mu / 2 - eps / mu)
        return float(stats.norm.cdf(mu / 2 - eps / mu)) - math.exp(log_tail) - delta

    return float(optimize.bisect(excess, 0.0, 500.0, xtol=1e-10))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("noise", "count", "delta"), [(5.0, 60, 1e-5), (1.0, 1, 1e-5), (0.7, 3, 1e-6), (30.0, 200, 1e-5)]
)
def test_epsilon_of_plain_gaussian_releases_is_the_closed_form(noise, count, delta):
    exact = analytic(noise, count, delta)
    got = accountant.epsilon(noise, 1.0, count, delta)
    assert exact * (1 - 1e-6) <= got <= exact * 1.002  # never below it


def test_epsilon_with_sampling_is_the_librarys_at_its_own_width():
    """sigma 1, q 8/300, 60 steps: 1.2089 by privacy loss distributions, and below what Renyi's orders give (1.606)."""
    got = accountant.epsilon(1.0, 8 / 300, 60, 1e-4)
    assert got == pytest.approx(1.20895, rel=2e-3)
    import dp_accounting
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

    one = dp_accounting.PoissonSampledDpEvent(8 / 300, dp_accounting.GaussianDpEvent(1.0))
    renyi = RdpAccountant().compose(dp_accounting.SelfComposedDpEvent(one, 60)).get_epsilon(1e-4)
    assert got < renyi < 1.7
    assert accountant.epsilon(1.0, 8 / 300, 60, 1e-4) < accountant.epsilon(1.0, 1.0, 60, 1e-4) / 5  # amplification


def test_a_published_setting():
    """MNIST by DP-SGD in TensorFlow Privacy's tutorial: 60,000 rows, batches of 256, noise 1.12, 60 epochs, 2.92.

    The tutorial turned Renyi's divergences into epsilon by Mironov 2017, Proposition 3. The library's divergences give
    its number so too; by privacy loss distributions, the same training costs less.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.rdp import rdp_privacy_accountant as renyi

    rate, steps, delta = 256 / 60000, 60 * 60000 // 256, 1e-5
    orders = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    spent = renyi.RdpAccountant(orders=orders)
    spent.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(1.12)), steps))
    classic = min(spent._rdp + math.log(1 / delta) / (orders - 1))
    assert classic == pytest.approx(2.92, abs=0.01)
    got = accountant.epsilon(1.12, rate, steps, delta)
    assert 2.2 < got < spent.get_epsilon(delta) < classic


@pytest.mark.parametrize(("target", "rate", "count"), [(8.0, 8 / 300, 60), (1.0, 1.0, 10), (0.1, 1.0, 3)])
def test_the_noise_for_an_epsilon_spends_just_that(target, rate, count):
    noise = accountant.noise_for(target, 1e-5, rate, count)
    assert target * 0.98 < accountant.epsilon(noise, rate, count, 1e-5) <= target
    assert accountant.epsilon(noise * 0.98, rate, count, 1e-5) > target


def test_nothing_released_costs_nothing():
    assert accountant.epsilon(1.0, 0.1, 0, 1e-5) == 0.0


def test_a_missing_library_is_one_sentence(monkeypatch):
    found = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("dp_accounting"):
            raise ImportError("No module named 'dp_accounting'")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"privacy\.level needs the library dp-accounting.*fedlora\[privacy\]"):
        accountant.epsilon(1.234, 1.0, 7, 1e-5)


def test_noise_is_normal_and_of_its_deviation():
    drawn = Noise(bytes(range(32))).normal((400, 500), 3.0)
    assert drawn.shape == (400, 500)
    assert drawn.dtype == np.float32
    assert stats.kstest(drawn.ravel() / 3.0, "norm").pvalue > 1e-3
    count = drawn.size  # the variance's own deviation is 2 sigma^4 / n
    assert abs(drawn.astype(float).var() / 9 - 1) < 5 * math.sqrt(2 / count)
    assert abs(np.corrcoef(drawn.ravel()[:-1], drawn.ravel()[1:])[0, 1]) < 5 / math.sqrt(count)


def test_streams_without_a_key_are_never_the_same():
    assert not np.array_equal(Noise().normal((8,), 1.0), Noise().normal((8,), 1.0))
    stream = Noise()
    assert not np.array_equal(stream.normal((8,), 1.0), stream.normal((8,), 1.0))


def test_sampling_is_poisson():
    """Sizes of the draws are binomial, and each number comes as often as the others."""
    stream, rounds, rows, rate = Noise(bytes(32)), 4000, 30, 0.2
    draws = [stream.chosen(rows, rate) for _ in range(rounds)]
    sizes = np.bincount([len(draw) for draw in draws], minlength=rows + 1)
    expected = stats.binom.pmf(range(rows + 1), rows, rate) * rounds
    large = expected > 20
    statistic = ((sizes[large] - expected[large]) ** 2 / expected[large]).sum()
    assert statistic < stats.chi2.ppf(0.999, large.sum())
    each = np.bincount(np.concatenate([np.array(draw, int) for draw in draws]), minlength=rows)
    assert abs(each - rounds * rate).max() < 5 * math.sqrt(rounds * rate * (1 - rate))
    assert stream.chosen(5, 1.0) == [0, 1, 2, 3, 4]
