"""Gradients of whole weights with noise: clipped rows against single ones, the noise's size, and a run of fedsb."""

from __future__ import annotations

import math

import pytest
import torch

from fedlora.common import accountant
from fedlora.common.errors import StrategyError
from fedlora.common.noise import Noise
from fedlora.config import parse, steps_per_round
from fedlora.data import encode, prepare
from fedlora.exchange.privacy import mechanism
from fedlora.models import adapted
from fedlora.models.weights import weight_of
from fedlora.simulations.checks import check
from fedlora.tasks.registry import task_of
from tests.federation import run_locally, tiny

from fedlora.clients.statistics.gradients import LeadingDirections, noised_gradients  # isort: skip
from fedlora.clients.training.private import RowPrivacy  # isort: skip

EVERYTHING = RowPrivacy(clip=1e9, noise_multiplier=0.0, rate=1.0, expected=12.0)


@pytest.fixture(params=["none", "nf4"])
def bench(request, tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, model__quantization=request.param, lora__dropout=0.0)
    model = adapted.adapted_model(config.model, config.lora)
    adapted.install(model, adapted.untouched(model, {}))
    examples = encode(prepare(config).client(0), model.base.tokenizer, config.data, task_of(config.model))[:12]
    return model, examples


def dense(model, example) -> dict[str, torch.Tensor]:
    """One row's gradient by each weight, from a matrix of zeros that is added to it."""
    batch = model.task.collate([example], model.base.pad_id)
    shifts = {name: torch.zeros_like(weight_of(layer), dtype=torch.float32) for name, layer in model.layers.items()}
    handles = []
    for name, layer in model.layers.items():
        shift = shifts[name].requires_grad_()
        add = lambda _, given, output, shift=shift: output + given[0].float() @ shift.T  # noqa: E731
        handles.append(layer.register_forward_hook(add))
    model.model.eval()
    model.task.losses(model.model, batch)[0].mean().backward()
    for handle in handles:
        handle.remove()
    return {name: shift.grad for name, shift in shifts.items() if shift.grad is not None}


def test_rows_are_clipped_as_one_at_a_time(bench):
    model, examples = bench
    alone = [dense(model, example) for example in examples]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in row.values())) for row in alone]
    clip = sorted(norms)[5]
    for limit in (1e9, clip):
        privacy = RowPrivacy(clip=limit, noise_multiplier=0.0, rate=1.0, expected=12.0)
        found = noised_gradients(model, examples, 5, privacy, 1)
        for name in found:
            mean = sum(min(1, limit / n) * row[name] for n, row in zip(norms, alone, strict=True)) / 12
            assert (found[name] - mean).norm() <= 1e-5 * mean.norm()


def test_one_row_more_moves_the_sum_by_at_most_the_clip(bench):
    model, examples = bench
    privacy = RowPrivacy(clip=0.1, noise_multiplier=0.0, rate=1.0, expected=1.0)
    with_it, without = (noised_gradients(model, rows, 12, privacy, 1) for rows in (examples, examples[1:]))
    moved = math.sqrt(sum(float((with_it[name] - without[name]).square().sum()) for name in with_it))
    assert 0.0999 <= moved <= 0.1 + 1e-6


def test_the_noise_is_that_of_so_many_releases(bench):
    model, examples = bench
    quiet = RowPrivacy(clip=0.5, noise_multiplier=0.0, rate=1.0, expected=12.0)
    loud = RowPrivacy(clip=0.5, noise_multiplier=3.0, rate=1.0, expected=12.0, noise=Noise(b"k" * 32))
    one, two = (noised_gradients(model, examples, 12, each, 4) for each in (quiet, loud))
    drawn = torch.cat([(two[name] - one[name]).flatten() for name in one])
    assert float(drawn.std()) == pytest.approx(3.0 * 0.5 * 2 / (12 * 4), rel=0.02)


def test_what_is_sent_are_its_leading_directions(bench, monkeypatch):
    model, examples = bench
    asked = adapted.untouched(model, {})
    found = noised_gradients(model, examples, 12, EVERYTHING, 1)
    config = parse({"train.batch-size": 12}).train
    answer, result = LeadingDirections().measure_with_noise(
        model, asked, examples, config, privacy=EVERYTHING, releases=1
    )
    for name, factors in answer.lora.items():
        u, s, vh = torch.linalg.svd(found[name].double())
        best = (u[:, : factors.rank] * s[: factors.rank]) @ vh[: factors.rank]
        assert ((factors.B @ factors.A).double() - best).norm() <= 1e-5 * s.norm()
    assert (result.loss, result.tokens) == (0.0, 0)


def test_fedsb_learns_with_a_noised_start_and_pays_a_round_for_it(tmp_path, tiny_llama):
    keys = {"strategy__name": "fedsb", "privacy__level": "example", "privacy__epsilon": 6.0, "privacy__delta": 1e-3}
    config = tiny(tmp_path, tiny_llama, **keys, privacy__start="noise")
    _, result = run_locally(config)
    rounds = [entry["round"] for entry in result["rounds"]]
    assert rounds == [0, 1, 2]
    spent = [entry["privacy"]["epsilon"] for entry in result["rounds"]]
    rows = max(client["num-examples"] for client in result["clients"])
    made = mechanism(config, rows)
    assert made is not None
    per_round = steps_per_round(config.train, rows)
    assert spent[-1] == pytest.approx(
        accountant.epsilon(made.noise_multiplier, made.rate, 3 * per_round, 1e-3), rel=0.1
    )
    assert 5.5 < spent[-1] <= 6.0
    with pytest.raises(StrategyError, match=r"set lora.init = lora-xs, or privacy.start = noise"):
        check(parse({"privacy.start": "refuse"}, config))


def test_other_statistics_stay_refused(tmp_path, tiny_llama):
    config = tiny(
        tmp_path, tiny_llama, lora__init="eva", privacy__level="example", privacy__epsilon=6.0, privacy__start="noise"
    )
    with pytest.raises(StrategyError, match="without noise"):
        check(config)
