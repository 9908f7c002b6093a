"""Ranks by their worth: within the budget, the best of all, in proportion to scores."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import count_numbers
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientInfo
from fedlora.strategies.allocations.base import check_growth
from fedlora.strategies.tools.budget import most_worth

SHAPES = {"a": (8, 8), "b": (8, 8), "c": (24, 8), "d": (8, 8)}


def in_proportion(scores):
    return lambda module, rank: scores[module] / (rank + 1)


def test_equal_scores_give_equal_ranks():
    client = ClientInfo(client_id=0, rank=6)
    assert most_worth(client, SHAPES, in_proportion(dict.fromkeys(SHAPES, 0.3)), 2.0) == dict.fromkeys(SHAPES, 6)


def test_ranks_are_in_proportion_to_scores():
    shapes = dict.fromkeys("abcd", (8, 8))
    found = most_worth(ClientInfo(client_id=0, rank=10), shapes, in_proportion({"a": 4, "b": 3, "c": 2, "d": 1}), 4.0)
    assert found == {"a": 16, "b": 12, "c": 8, "d": 4}
    capped = most_worth(ClientInfo(client_id=0, rank=10), shapes, in_proportion({"a": 9, "b": 1, "c": 0, "d": 0}), 1.5)
    assert capped["a"] == 15
    assert sum(capped.values()) == 40 - max(0, 40 - 15 * 2 - capped["c"] - capped["d"])


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 9),
    growth=st.floats(1, 4),
    scores=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    pattern=st.integers(1, 5),
)
def test_nobody_exceeds_the_budget(rank, growth, scores, pattern):
    client = ClientInfo(client_id=0, rank=rank, rank_pattern={"c": pattern})
    own = {module: client.rank_of(module) for module in SHAPES}
    found = most_worth(client, SHAPES, in_proportion(dict(zip(SHAPES, scores, strict=True))), growth)
    assert found.keys() == SHAPES.keys()
    assert min(found.values()) >= 1
    assert count_numbers(found, SHAPES) <= count_numbers(own, SHAPES)
    assert sum(found.values()) <= sum(own.values())
    assert all(found[module] <= max(1, growth * own[module]) for module in SHAPES)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 3))
def test_modules_of_one_shape_get_the_best_ranks_of_all(seed, rank):
    """Against every other way to spread them."""
    import random

    rng = random.Random(seed)
    shapes = dict.fromkeys("abc", (5, 5))
    values = {name: sorted((rng.random() for _ in range(2 * rank)), reverse=True) for name in shapes}
    found = most_worth(ClientInfo(client_id=0, rank=rank), shapes, lambda m, r: values[m][r], 2.0)
    total = lambda ranks: sum(sum(values[name][:r]) for name, r in ranks.items())  # noqa: E731
    best = max(
        total(dict(zip(shapes, ranks, strict=True)))
        for ranks in itertools.product(range(1, 2 * rank + 1), repeat=3)
        if sum(ranks) <= 3 * rank
    )
    assert total(found) == pytest.approx(best)


def test_growth_below_1_is_refused():
    with pytest.raises(ConfigError, match=r"eva's growth = 0\.5, expected a number of at least 1"):
        check_growth("eva", 0.5)
