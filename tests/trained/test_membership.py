"""Membership inference against plain loops: areas, shares, likelihood ratios, and losses row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedlora.config import parse
from fedlora.data import encode, prepare
from fedlora.models import adapted
from fedlora.tasks.registry import task_of
from fedlora.trained.membership import Attack, likelihood_ratios, losses_of
from tests.federation import tiny


@pytest.fixture
def attack() -> Attack:
    draw = np.random.default_rng(0)
    return Attack(draw.normal(0.7, 1, 60).round(1), draw.normal(0, 1, 45).round(1))  # rounded, so that some are equal


def test_the_area_is_the_share_of_pairs_in_the_right_order(attack) -> None:
    pairs = [(m > o) + 0.5 * (m == o) for m in attack.members for o in attack.others]
    assert attack.auc == pytest.approx(np.mean(pairs))
    low, high = attack.interval
    assert low < attack.auc < high


def test_what_is_found_at_each_threshold_is_counted(attack) -> None:
    thresholds = [math.inf, *attack.members, *attack.others]
    shares = [(np.mean(attack.others >= t), np.mean(attack.members >= t)) for t in thresholds]
    assert attack.caught == pytest.approx(max(right for wrong, right in shares if wrong <= 0.01))
    assert attack.advantage == pytest.approx(max(right - wrong for wrong, right in shares))


def test_a_score_that_says_nothing_is_guessing() -> None:
    same = np.ones(20)
    assert (Attack(same, same).auc, Attack(same, same).advantage, Attack(same, same).caught) == (0.5, 0, 0)


def test_likelihood_ratios_are_those_of_two_normal_distributions() -> None:
    draw = np.random.default_rng(1)
    shadows, rows = 6, 5
    inside = np.stack([draw.permutation([True] * 3 + [False] * 3) for _ in range(rows)], axis=1)
    of_shadows, losses = draw.uniform(0.1, 3, (shadows, rows)), draw.uniform(0.1, 3, rows)
    logit = lambda loss: math.log(math.exp(-loss) / (1 - math.exp(-loss)))  # noqa: E731
    expected = np.zeros(rows)
    for group, sign in ((True, 1), (False, -1)):
        means, squares = [], []
        for row in range(rows):
            seen = [logit(of_shadows[s, row]) for s in range(shadows) if inside[s, row] == group]
            means.append(np.mean(seen))
            squares += [(each - means[-1]) ** 2 for each in seen]
        spread = math.sqrt(sum(squares) / (len(squares) - rows))
        for row in range(rows):
            expected[row] += sign * norm.logpdf(logit(losses[row]), means[row], spread)
    assert likelihood_ratios(losses, of_shadows, inside) == pytest.approx(expected)


def test_losses_of_a_batch_are_those_of_single_rows(tmp_path, tiny_llama) -> None:
    config = parse({"evaluate.batch-size": 5}, tiny(tmp_path, tiny_llama))
    model = adapted.adapted_model(config.model, config.lora)
    task, pad = task_of(config.model), model.base.pad_id
    examples = encode(prepare(config).client(0), model.base.tokenizer, config.data, task)
    together = losses_of(task, model.model, examples, 5, pad)
    alone = [losses_of(task, model.model, [each], 1, pad)[0] for each in examples]
    assert together == pytest.approx(np.array(alone), rel=1e-4)
    assert len(set(together.round(4))) > 1
