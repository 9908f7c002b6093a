"""Metrics against loops written from their definitions, and against scikit-learn."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedlora.common.errors import DataError
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.scores import Predictions, calibration_error, scores


def predictions(seed: int, n: int = 40, examples: int = 7, classes: int = 3) -> Predictions:
    g = torch.Generator().manual_seed(seed)
    return Predictions(
        rows=torch.randint(0, examples, (n,), generator=g),
        targets=torch.randint(0, classes, (n,), generator=g),
        predicted=torch.randint(0, classes, (n,), generator=g),
        probabilities=torch.rand(n, generator=g),
        losses=torch.rand(n, generator=g) * 3,
    )


def loop_calibration(probabilities: list[float], correct: list[bool]) -> float:
    total = 0.0
    for m in range(1, 16):
        inside = [i for i, p in enumerate(probabilities) if (m - 1) / 15 < p <= m / 15 or (m == 1 and p == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            confidence = sum(probabilities[i] for i in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(accuracy - confidence)
    return total


def loop_f1(predicted: list[int], targets: list[int]) -> float:
    each = []
    for label in set(predicted) | set(targets):
        hits = sum(p == t == label for p, t in zip(predicted, targets, strict=True))
        each.append(2 * hits / (predicted.count(label) + targets.count(label)))
    return sum(each) / len(each)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_calibration_error_is_equation_3(seed, n):
    made = predictions(seed, n)
    correct = made.predicted == made.targets
    expected = loop_calibration(made.probabilities.tolist(), correct.tolist())
    assert calibration_error(made.probabilities, correct) == pytest.approx(expected, abs=1e-9)


def test_confidence_on_an_edge_belongs_to_the_lower_bin():
    probabilities = torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64)
    correct = torch.tensor([True, False, False])
    assert calibration_error(probabilities, correct) == pytest.approx(0.2 / 3)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_macro_f1_is_the_mean_of_the_classes(seed, n):
    made = predictions(seed, n)
    got = scores(Classification(3), made)
    assert got.keys() == {"loss", "accuracy", "calibration-error", "macro-f1"}
    assert got["macro-f1"] == pytest.approx(loop_f1(made.predicted.tolist(), made.targets.tolist()))
    assert got["macro-f1"] == pytest.approx(f1_score(made.targets, made.predicted, average="macro"))
    assert got["loss"] == pytest.approx(sum(made.losses.tolist()) / n)


@given(st.integers(0, 10_000))
def test_exact_match_wants_every_token_of_an_example(seed):
    made = predictions(seed, classes=2)
    got = scores(CausalLM(), made)
    assert got.keys() == {"loss", "accuracy", "calibration-error", "perplexity", "exact-match"}
    whole = [
        all(p == t for p, t, r in zip(made.predicted, made.targets, made.rows, strict=True) if r == row)
        for row in made.rows.unique()
    ]
    assert got["exact-match"] == pytest.approx(sum(whole) / len(whole))
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))


@pytest.mark.parametrize("task", [CausalLM(), Classification(3)])
def test_scores_of_some_examples_see_those_alone(task):
    made = replace(predictions(3), more={"ranks": torch.arange(40)})
    keep = [i for i, row in enumerate(made.rows.tolist()) if row in (1, 4)]
    columns = (made.rows, made.targets, made.predicted, made.probabilities, made.losses)
    alone = Predictions(*(column[keep] for column in columns))
    assert scores(task, made, torch.tensor([4, 1])) == scores(task, alone)
    assert made.of(torch.tensor([4, 1])).more["ranks"].tolist() == keep


def test_no_labelled_position_is_one_sentence():
    with pytest.raises(DataError, match="no labelled token"):
        scores(CausalLM(), predictions(1), torch.tensor([99]))
