"""The choice of learning rates, ranks and tests."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy.stats import sem
from scipy.stats import t as student

from fedlora.simulations.comparison.ranking import bootstrap_interval, choose, holm, lower_is_better, paired_p, rank


def _cell(label, lr, seed, validation=0.5, test=0.5, role="strategy", metric="accuracy", scenario="one", **more):
    scores = {"validation": {metric: validation}, "test": {metric: test}}
    return {
        "scenario": scenario, "label": label, "role": role, "lr": lr, "seed": seed, "status": "completed",
        "scores": scores, **more,
    }  # fmt: skip


def _failed(label, lr, seed, error="the loss is not finite"):
    return _cell(label, lr, seed) | {"status": "failed", "error": error, "scores": {}}


def _row(rankings, label):
    return next(row for row in rankings[0].rows if row.label == label)


def test_validation_chooses_the_rate_and_test_has_no_say():
    cells = [_cell("a", 0.1, s, validation=0.6, test=0.9) for s in range(2)]
    cells += [_cell("a", 0.2, s, validation=0.7, test=0.1) for s in range(2)]
    cells += [_cell("a", 0.4, s, validation=0.5, test=0.9) for s in range(2)]
    choice = choose(cells, "accuracy")
    assert choice.lr == 0.2
    assert choice.edge == ""
    assert [rate.validation for rate in choice.rates] == pytest.approx([0.6, 0.7, 0.5])


@pytest.mark.parametrize("metric", ["loss", "perplexity", "calibration-error", "loss-mean-by", "loss-worst-by"])
def test_lower_is_better_for_losses(metric):
    cells = [_cell("a", lr, 0, validation=v, metric=metric) for lr, v in ((0.1, 3.0), (0.2, 2.0), (0.4, 4.0))]
    assert choose(cells, metric).lr == 0.2
    assert lower_is_better(metric)
    assert not lower_is_better("macro-f1")


@pytest.mark.parametrize(("values", "lr", "edge"), [((3, 2, 1), 0.1, "lowest"), ((1, 2, 3), 0.4, "highest")])
def test_a_rate_at_an_end_of_the_sweep_is_flagged(values, lr, edge):
    choice = choose([_cell("a", rate, 0, v) for rate, v in zip((0.1, 0.2, 0.4), values, strict=True)], "accuracy")
    assert (choice.lr, choice.edge) == (lr, edge)


def test_one_rate_is_no_sweep_and_ties_go_to_the_smaller():
    assert choose([_cell("a", 0.1, 0)], "accuracy").edge == "no sweep"
    assert choose([_cell("a", lr, 0, 0.5) for lr in (0.4, 0.2)], "accuracy").lr == 0.2
    assert choose([_cell("base", None, 0)], "accuracy").edge == ""


def test_a_rate_that_failed_once_is_not_chosen_while_another_never_did():
    cells = [_cell("a", 0.1, s, 0.5) for s in range(3)]
    cells += [_cell("a", 0.2, 0, 0.9), _cell("a", 0.2, 1, 0.9), _failed("a", 0.2, 2)]
    choice = choose(cells, "accuracy")
    assert choice.lr == 0.1
    assert [(f.lr, f.seed, f.reason) for f in choice.failures] == [(0.2, 2, "the loss is not finite")]
    assert choose(cells[3:], "accuracy").lr == 0.2


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_metric_without_a_value_counts_as_a_failure(value):
    choice = choose([_cell("a", 0.1, 0, 0.5), _cell("a", 0.2, 0, validation=value)], "accuracy")
    assert choice.lr == 0.1
    assert "accuracy" in choice.failures[0].reason


def test_all_failed_is_a_row_without_numbers():
    rankings = rank([_failed("a", 0.1, s) for s in range(2)] + [_cell("b", 0.1, s) for s in range(2)], "accuracy", "b")
    row = _row(rankings, "a")
    assert (row.mean, row.n, row.rank, row.p_holm) == (None, 0, None, None)
    assert len(rankings[0].failures) == 2


# Holm (1979): of 0.01, 0.02, 0.03, 0.04 the multiples are 4, 3, 2, 1: 0.04, 0.06, 0.06, and 0.04 raised to 0.06.
def test_holm_against_an_example_worked_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_p_is_the_t_test_written_out():
    differences = [0.02, 0.05, 0.01, 0.04]
    t = fmean(differences) / (stdev(differences) / math.sqrt(4))
    assert paired_p(differences, 1.0) == pytest.approx(2 * student.sf(abs(t), 3))


def test_paired_p_without_variance():
    assert paired_p([0.0, 0.0, 0.0], 0.9) == 1.0
    assert paired_p([0.9 - 0.8, 0.8 - 0.7, 0.7 - 0.6], 0.9) is None  # equal but for rounding
    assert paired_p([0.1], 0.9) is None


def test_rows_have_mean_deviation_and_differences_paired_by_seed():
    tests = {"fedavg": (0.70, 0.74, 0.72), "flora": (0.76, 0.77, 0.80), "ffa": (0.60, 0.66, 0.61)}
    cells = [_cell(label, 0.1, seed, test=v) for label, values in tests.items() for seed, v in enumerate(values)]
    cells += [_cell("local", 0.1, seed, test=0.9, role="baseline") for seed in range(3)]
    rankings = rank(cells, "accuracy", "fedavg")
    assert [(row.label, row.rank) for row in rankings[0].rows] == [
        ("flora", 1), ("fedavg", 2), ("ffa", 3), ("local", None),
    ]  # fmt: skip
    flora, ffa = _row(rankings, "flora"), _row(rankings, "ffa")
    assert (flora.mean, flora.sd, flora.n) == (
        pytest.approx(fmean(tests["flora"])),
        pytest.approx(stdev(tests["flora"])),
        3,
    )
    assert flora.difference == pytest.approx(fmean([0.06, 0.03, 0.08]))
    assert flora.p == pytest.approx(paired_p([0.06, 0.03, 0.08], 1.0))
    assert [flora.p_holm, ffa.p_holm] == pytest.approx(holm([flora.p, ffa.p]))
    local, fedavg = _row(rankings, "local"), _row(rankings, "fedavg")
    assert (local.p, local.p_holm) == (None, None)
    assert local.difference == pytest.approx(0.18)
    assert (fedavg.difference, fedavg.p) == (None, None)


def test_pairs_are_the_seeds_that_both_have():
    cells = [_cell("fedavg", 0.1, s, test=0.5 + s / 10) for s in (0, 1, 2)]
    cells += [_cell("flora", 0.1, s, test=0.6 + s / 9) for s in (1, 2)]
    rankings = rank(cells, "accuracy", "fedavg")
    assert _row(rankings, "flora").pairs == 2
    assert any("flora has 2 of the 3 seeds" in note for note in rankings[0].notes)


def test_one_seed_gives_no_ranks_and_no_tests():
    rankings = rank([_cell("fedavg", 0.1, 0), _cell("flora", 0.1, 0, test=0.9)], "accuracy", "fedavg")
    assert [(row.rank, row.p, row.p_holm, row.sd) for row in rankings[0].rows] == [(None, None, None, None)] * 2
    assert rankings[0].notes[0].startswith("One seed: there are no ranks and no tests")
    assert _row(rankings, "flora").difference == pytest.approx(0.4)


def test_equal_means_share_a_rank_and_scenarios_stand_apart():
    cells = [_cell(name, 0.1, s, test=0.5, scenario=of) for of in ("x", "y") for name in ("a", "b") for s in range(2)]
    rankings = rank(cells, "accuracy", "a")
    assert [ranking.scenario for ranking in rankings] == ["x", "y"]
    assert [row.rank for row in rankings[0].rows] == [1, 1]
    assert _row(rankings, "b").p == 1.0


def test_without_the_reference_there_are_ranks_and_a_sentence():
    rankings = rank([_cell("a", 0.1, s) for s in range(2)], "accuracy", "fedavg")
    assert _row(rankings, "a").rank == 1
    assert "reference fedavg has no result" in rankings[0].notes[0]


def test_the_bootstrap_interval_holds_the_mean_and_is_near_students_for_many_seeds():
    drawn = np.random.default_rng(3).normal(0.02, 0.05, size=60)
    low, high = bootstrap_interval(drawn, 1.0)
    students = student.interval(0.95, len(drawn) - 1, loc=drawn.mean(), scale=sem(drawn))
    assert (low, high) == pytest.approx(students, abs=0.1 * (students[1] - students[0]))
    assert bootstrap_interval(drawn, 1.0) == (low, high)
    few = bootstrap_interval(drawn[:5], 1.0)
    assert few[0] < drawn[:5].mean() < few[1]
    assert few[0] >= drawn[:5].min()
    assert few[1] <= drawn[:5].max()


def test_there_is_no_bootstrap_interval_of_few_seeds_or_without_variance():
    assert bootstrap_interval([0.1, 0.2, 0.3, 0.4], 1.0) is None
    assert bootstrap_interval([0.1] * 6, 1.0) is None
