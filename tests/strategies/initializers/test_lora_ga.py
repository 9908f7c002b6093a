"""LoRA-GA: the start's first step follows the mean gradient, and the run starts at the base model."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, delta, initial
from fedlora.common.errors import ConfigError, StrategyError
from fedlora.exchange import ClientUpdate
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.initializers.lora_ga import LoraGa
from tests.federation import run_locally, tiny

SHAPES = {"wide": (9, 14), "tall": (15, 8)}
RANK, SCALING = 2, 1.5


def replies(count: int, seed: int = 0) -> list[ClientUpdate]:
    """Gradients of rank r: what a client sends is then the whole of it."""
    g = torch.Generator().manual_seed(seed)
    return [
        ClientUpdate(
            client_id=k,
            adapter=AdapterState(
                lora={
                    n: LoraFactors(torch.randn(RANK, i, generator=g), torch.randn(o, RANK, generator=g), 1.0)
                    for n, (o, i) in SHAPES.items()
                }
            ),
            num_examples=k + 1,
        )
        for k in range(count)
    ]


def fresh() -> AdapterState:
    return initial(SHAPES, lambda _: RANK, lambda _: SCALING, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("clients", [2, 3, 5])
def test_the_first_sgd_step_is_along_the_best_part_of_the_mean_gradient(clients):
    """dW = s (B dA + dB A) with dA = -s B'G and dB = -s G A': proportional to G's truncation at rank 2r."""
    sent = replies(clients)
    start = LoraGa().start(fresh(), sent)
    total = sum(update.num_examples for update in sent)
    for name in SHAPES:
        G = sum(u.num_examples / total * delta(u.adapter.lora[name]).double() for u in sent)
        f = start.adapter.lora[name]
        A, B = f.A.double(), f.B.double()
        step = -(f.scaling**2) * (B @ B.T @ G + G @ A.T @ A)
        u, s, vh = torch.linalg.svd(G)
        best = -(u[:, : 2 * RANK] * s[: 2 * RANK]) @ vh[: 2 * RANK]
        torch.testing.assert_close(step / step.norm(), best / best.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clients", [1, 3])
def test_the_fold_takes_the_start_away_and_both_factors_are_scaled(clients):
    start = LoraGa(gamma=4.0).start(fresh(), replies(clients))
    (fold,) = start.folds
    for name, (d_out, _) in SHAPES.items():
        f = start.adapter.lora[name]
        torch.testing.assert_close(delta(f) + delta(fold.lora[name]), torch.zeros(SHAPES[name]))
        c = d_out**0.25 / 2
        torch.testing.assert_close(f.A @ f.A.T, c**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(f.B.T @ f.B, c**2 * torch.eye(RANK), rtol=1e-4, atol=1e-5)


def test_a_module_without_a_gradient_starts_as_lora_does():
    sent = [ClientUpdate(0, AdapterState(lora={"wide": update.adapter.lora["wide"]}), 1) for update in replies(1)]
    start = LoraGa().start(fresh(), sent)
    assert torch.equal(start.adapter.lora["tall"].A, fresh().lora["tall"].A)
    assert not start.adapter.lora["tall"].B.any()
    assert [*start.folds[0].lora] == ["wide"]


@pytest.mark.parametrize(
    ("strategy", "quantization"), [("fedavg", "none"), ("fedavg", "nf4"), ("flora", "nf4"), ("ffa", "none")]
)
def test_a_run_starts_at_the_base_model_and_learns(tmp_path, tiny_llama, strategy, quantization):
    keys = {"lora__ranks": "", "lora__rank": 2, "train__lr": 2e-3, "train__steps": 6, "lora__init": "lora-ga"}
    config = tiny(tmp_path, tiny_llama, strategy__name=strategy, model__quantization=quantization, **keys)
    _, result = run_locally(config)
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    first = result["rounds"][0]
    assert not first["failures"]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    still = tiny(tmp_path, tiny_llama, run__id="still", **keys | {"train__lr": 1e-12}, strategy__name="fedavg")
    _, unmoved = run_locally(still)
    assert unmoved["rounds"][-1]["heldout"]["loss"] == pytest.approx(unmoved["baseline"]["loss"], abs=1e-4)


def test_what_does_not_fit_is_refused_before_the_run(tmp_path, tiny_llama):
    with pytest.raises(StrategyError, match=r"lora\.init = lora-ga needs one rank, got ranks 4, 2, 2, 1"):
        check_ranks(tiny(tmp_path, tiny_llama, lora__init="lora-ga", strategy__name="flora"))
    keys = {"lora__ranks": "", "lora__rank": 2, "lora__init": "lora-ga", "strategy__name": "fedavg"}
    check_ranks(tiny(tmp_path, tiny_llama, strategy__robust="multi-krum", federation__clients=6, **keys))
    with pytest.raises(StrategyError, match=r"lora-ga starts from what clients measure.*strategy\.robust = norm-bound"):
        check_ranks(tiny(tmp_path, tiny_llama, strategy__robust="median", **keys))
    with pytest.raises(ConfigError, match=r"lora-ga's gamma = -1\.0, expected a number above 0"):
        LoraGa(gamma=-1.0)
