"""Starts made from the base model's weights: what they decompose, and that the run starts at the base model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, delta, initial
from fedlora.common.errors import ConfigError, StrategyError
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.initializers.comp_lora import CompLora
from fedlora.strategies.initializers.from_weights import Bound
from fedlora.strategies.initializers.loldu import Loldu
from fedlora.strategies.initializers.lora_xs import LoraXs
from fedlora.strategies.initializers.olora import OLora
from fedlora.strategies.initializers.orthogonal import Orthogonal
from fedlora.strategies.initializers.pissa import Pissa
from fedlora.strategies.server import saved_state
from tests.federation import run_locally, tiny

SHAPES = {"wide": (9, 14), "tall": (15, 8), "square": (10, 10)}
RANK, SCALING = 4, 1.5
WEIGHTS = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for n, (name, shape) in enumerate(SHAPES.items())
}


def fresh(rank: int = RANK) -> AdapterState:
    return initial(SHAPES, lambda _: rank, lambda _: SCALING, torch.Generator().manual_seed(0))


def started(inner, rank: int = RANK) -> tuple[dict[str, LoraFactors], tuple[AdapterState, ...]]:
    start = Bound(inner, WEIGHTS.__getitem__).start(fresh(rank), ())
    return dict(start.adapter.lora), start.folds


def test_pissa_is_the_best_approximation_of_the_weight_as_in_peft():
    lora, _ = started(Pissa())
    for name, f in lora.items():
        u, s, vh = torch.linalg.svd(WEIGHTS[name])
        best = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        torch.testing.assert_close(delta(f).double(), best, atol=1e-5, rtol=0)
        torch.testing.assert_close(f.A @ f.A.T, torch.diag(s[:RANK] / SCALING).float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(f.B.T @ f.B, torch.diag(s[:RANK] / SCALING).float(), atol=1e-4, rtol=0)


def test_olora_is_the_first_part_of_qr():
    lora, _ = started(OLora())
    for name, f in lora.items():
        q, r = torch.linalg.qr(WEIGHTS[name])
        torch.testing.assert_close((f.B @ f.A).double(), q[:, :RANK] @ r[:RANK], atol=1e-5, rtol=0)
        torch.testing.assert_close(f.B.T @ f.B, torch.eye(RANK), atol=1e-5, rtol=0)
        assert bool((f.A.diagonal() >= 0).all())


def test_loldu_is_the_first_part_of_ldu():
    lora, _ = started(Loldu())
    for name, f in lora.items():
        p, low, up = torch.linalg.lu(WEIGHTS[name])
        torch.testing.assert_close(delta(f).double(), p @ low[:, :RANK] @ up[:RANK], atol=1e-5, rtol=0)
        torch.testing.assert_close(f.A[:, :RANK].diagonal(), torch.ones(RANK))


@pytest.mark.parametrize("inner", [Pissa(), OLora(), Loldu()])
@pytest.mark.parametrize("rank", [3, 8, 12])
def test_with_any_rank_the_fold_takes_the_start_away(inner, rank):
    """At a rank of min(d_out, d_in) and above, the start is the whole weight."""
    lora, (fold,) = started(inner, rank)
    for name, f in lora.items():
        torch.testing.assert_close(delta(f) + delta(fold.lora[name]), torch.zeros(SHAPES[name]))
        if rank == 12 and not isinstance(inner, OLora):
            torch.testing.assert_close(delta(f).double(), WEIGHTS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("rank", [3, 12])
def test_lora_xs_starts_at_zero_between_the_leading_singular_directions(values, rank):
    """As U_r S_r V_r' of a dense SVD; above min(d_out, d_in), with zeros, at the run's start and after training R."""
    lora, folds = started(LoraXs(values=values), rank)
    assert not folds
    for name, f in lora.items():
        assert (f.A.shape[0], f.B.shape[1], f.scaling) == (rank, rank, 1.0)
        assert f.R is not None
        assert torch.equal(f.R, torch.zeros(rank, rank))
        u, s, vh = (part.float() for part in torch.linalg.svd(WEIGHTS[name], full_matrices=False))
        keep = min(rank, len(s))
        R = torch.randn(rank, rank, generator=torch.Generator().manual_seed(1))
        right = s[:keep, None] * vh[:keep] if values else vh[:keep]
        signs = torch.sign((f.B[:, :keep] * u[:, :keep]).sum(0))  # those of an SVD are free
        expected = (signs * u[:, :keep]) @ R[:keep, :keep] @ (signs[:, None] * right)
        torch.testing.assert_close(delta(replace(f, R=R)), expected, atol=1e-4, rtol=0)


def test_orthogonal_factors_have_a_product_of_zero():
    start = Orthogonal().start(fresh(), ())
    assert not start.folds
    for name, f in start.adapter.lora.items():
        assert float(delta(f).abs().max()) < 1e-6
        assert float(f.A.norm()) > 0.1
        assert float(f.B.norm()) > 0.1
        assert torch.equal(f.A, Orthogonal().start(fresh(), ()).adapter.lora[name].A)
    with pytest.raises(StrategyError, match=r"orthogonal needs an even rank, got 3; set lora\.rank = 4"):
        Orthogonal().check_rank(3)


def test_comp_lora_starts_outside_the_leading_directions():
    lora, folds = started(CompLora(k=3))
    assert not folds
    for name, f in lora.items():
        vh = torch.linalg.svd(WEIGHTS[name])[2]
        assert float((f.A.double() @ vh[:3].T).abs().max()) < 1e-6
        assert not f.B.any()
    with pytest.raises(ConfigError, match="comp-lora's k = 0, expected at least 1"):
        CompLora(k=0)


@pytest.mark.parametrize(
    ("init", "strategy", "quantization"),
    [
        ("pissa", "flora", "nf4"),
        ("olora", "fedavg", "none"),
        ("loldu", "fedex", "nf4"),
        ("orthogonal", "fedavg", "none"),
        ("comp-lora", "flora", "nf4"),
        ("lora-xs", "fedsb", "nf4"),
    ],
)
def test_a_run_starts_at_the_base_model_and_learns(tmp_path, tiny_llama, init, strategy, quantization):
    keys = {"lora__ranks": "", "lora__rank": 2, "train__lr": 2e-3, "train__steps": 6, "lora__init": init}
    if init == "comp-lora":
        keys |= {"lora__init_options": "k=4", "train__lr": 2e-2}
    if init == "lora-xs":  # which serves unequal ranks
        keys |= {"lora__ranks": "4,2,2,1", "train__lr": 2e-2}
    config = tiny(tmp_path, tiny_llama, strategy__name=strategy, model__quantization=quantization, **keys)
    _, result = run_locally(config)
    assert not result["rounds"][0]["failures"]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    still = tiny(tmp_path, tiny_llama, run__id="still", **keys | {"train__lr": 1e-12}, strategy__name=strategy)
    _, unmoved = run_locally(still)
    assert unmoved["rounds"][-1]["heldout"]["loss"] == pytest.approx(unmoved["baseline"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("strategy", "together"),
    [
        ("fedavg", "auto"),
        ("flora", "1"),
        ("ffa", "auto"),
        *(
            pytest.param(name, "1", marks=[pytest.mark.slow, pytest.mark.nightly])
            for name in ("flexlora", "fedex", "rolora")
        ),
    ],
)
def test_comp_lora_never_touches_the_leading_directions(tmp_path, tiny_llama, strategy, together):
    """What a federation learned is zero along them, through training, aggregation and redistribution."""
    from fedlora.models import adapted
    from fedlora.models.weights import weight_of

    keys = {"lora__ranks": "", "lora__rank": 3, "lora__init": "comp-lora", "lora__init_options": "k=5"}
    config = tiny(
        tmp_path,
        tiny_llama,
        strategy__name=strategy,
        train__lr=2e-2,
        train__clients_at_once=together,
        federation__rounds=3,
        **keys,
    )
    folder, result = run_locally(config)
    saved = saved_state.load(folder / "state", result["key"])
    assert saved is not None
    from fedlora.strategies.configured import configured

    learned = configured(config).global_adapter(saved[0]).lora
    model = adapted.adapted_model(config.model, config.lora)
    for name, f in learned.items():
        W, D = weight_of(model.layers[name]).cpu().double(), delta(f).double()
        u, s, vh = torch.linalg.svd(W)
        assert float(D.norm()) > 1e-3
        assert float((u[:, :5].T @ D).norm()) < 1e-4 * float(D.norm())
        assert float((D @ vh[:5].T).norm()) < 1e-4 * float(D.norm())
        small = D * (0.1 * float(s[4] - s[5]) / float(D.norm()))
        torch.testing.assert_close(torch.linalg.svdvals(W + small)[:5], s[:5], atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused_before_the_run(tmp_path, tiny_llama):
    for init in ("pissa", "olora", "loldu", "orthogonal"):
        with pytest.raises(StrategyError, match=rf"lora\.init = {init} needs one rank, got ranks 4, 2, 2, 1|even rank"):
            check_ranks(tiny(tmp_path, tiny_llama, lora__init=init, strategy__name="flora"))
    check_ranks(tiny(tmp_path, tiny_llama, lora__init="comp-lora", strategy__name="flora"))
    restarts = {"lora__init": "comp-lora", "strategy__restart_every": 2}
    check_ranks(tiny(tmp_path, tiny_llama, strategy__name="fedavg-zeropad", **restarts))
    for name in ("ffa", "rolora"):
        with pytest.raises(
            StrategyError, match=r"comp-lora keeps .* draws a new A, and clients do not train A in round 1"
        ):
            check_ranks(tiny(tmp_path, tiny_llama, strategy__name=name, **restarts))
