"""What a paired t-test can find, against simulated tests."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from fedlora.simulations.comparison.power import detectable, power, seeds_needed


@pytest.mark.parametrize(("difference", "seeds"), [(0.0, 3), (1.0, 3), (1.5, 5), (0.5, 20)])
def test_it_is_the_share_of_simulated_tests_that_find_the_difference(difference, seeds):
    samples = np.random.default_rng(0).normal(difference, 1.0, (40_000, seeds))
    found = float((ttest_1samp(samples, 0.0, axis=1).pvalue < 0.05).mean())
    assert power(difference, 1.0, seeds) == pytest.approx(found, abs=0.01)


def test_what_is_detectable_is_found_in_four_of_five_cases():
    for seeds in (3, 5, 12):
        assert power(detectable(0.02, seeds), 0.02, seeds) == pytest.approx(0.8, abs=1e-4)
    assert detectable(0.02, 3) > detectable(0.02, 5) > detectable(0.02, 12)
    assert detectable(0.02, 5, level=0.05 / 10) > detectable(0.02, 5)


def test_as_many_seeds_as_a_difference_needs_and_not_one_fewer():
    needed = seeds_needed(0.01, 0.02)
    assert needed == 34  # as statistical tables have it for an effect of half a standard deviation
    assert power(0.01, 0.02, needed) >= 0.8 > power(0.01, 0.02, needed - 1)
    assert seeds_needed(1.0, 0.01) == 2
    assert seeds_needed(1e-9, 1.0, most=100) is None
