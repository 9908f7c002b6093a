"""Local training against a plain loop, and the rules of schedule, accumulation and FedProx."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fedlora.adapters import AdapterState, delta, initial
from fedlora.clients.optimizers import registry
from fedlora.clients.training import schedule as schedule_
from fedlora.clients.training import terms, trainer
from fedlora.common.errors import AdapterError, ConfigError, DivergedError
from fedlora.config import LoraConfig, TrainConfig
from fedlora.data import Example, batch_at
from fedlora.exchange import Plan, Term
from fedlora.exchange.stages import Stage
from fedlora.models import adapted, injection
from fedlora.models.trainable import Pair, Trainable
from tests.device import DEVICE, bound, model_config, on_device

LORA = LoraConfig(target_modules="q_proj,down_proj")
CONFIG = TrainConfig(steps=4, batch_size=2, lr=1e-2, schedule="constant", warmup_fraction=0.0, clip=0.0)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def examples(count: int = 9, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, 12, (1,), generator=g))
        ids = torch.randint(5, 200, (length,), generator=g).tolist()
        made.append(Example({"input_ids": ids, "labels": [-100] * 3 + ids[3:]}))
    return made


def bench_and_start(folder):
    config = model_config(folder)
    bench = adapted.adapted_model(config, LORA)
    shapes = injection.shapes(config, LORA)
    start = initial(shapes.lora, lambda name: 3, lambda name: 2.0, torch.Generator().manual_seed(0))
    return bench, start


def train(bench, start, config=CONFIG, trainable=("A", "B"), number=1, rounds=2, data=None, **keywords):
    parameters = adapted.install(bench, start, trainable)
    adapted.install_anchor(bench, ())
    result = trainer.train(
        bench.task,
        bench.model,
        parameters,
        data or examples(),
        config,
        pad_id=3,
        number=number,
        rounds=rounds,
        seed=5,
        **keywords,
    )
    return result, adapted.read(bench)


def distance(left: AdapterState, right: AdapterState) -> float:
    return max(
        max(float((f.A - right.lora[n].A).norm()), float((f.B - right.lora[n].B).norm())) for n, f in left.lora.items()
    )


def test_it_is_a_plain_adamw_loop(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    result, got = train(bench, start)

    parameters = adapted.install(bench, start, ("A", "B")).parameters
    optimizer = torch.optim.AdamW(parameters, lr=CONFIG.lr, weight_decay=0.0, foreach=False)
    data, losses = examples(), []
    bench.model.train()
    for step in range(4):
        sequences = [data[i] for i in batch_at(len(data), 2, step, 5)]
        total, count = torch.zeros((), device=DEVICE), 0
        for example in sequences:  # one by one: no padding at all
            ids, labels = (on_device(torch.tensor(example[name])) for name in ("input_ids", "labels"))
            logits = bench.model(input_ids=ids[None]).logits[0]
            for position in range(len(labels) - 1):
                if labels[position + 1] != -100:
                    total = total + F.cross_entropy(logits[position], labels[position + 1])
                    count += 1
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert distance(got, adapted.read(bench)) < 1e-4
    assert result.loss == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert result.last_loss == pytest.approx(losses[-1], rel=1e-4)
    assert result.steps == 4
    used = [data[i] for step in range(4) for i in batch_at(len(data), 2, step, 5)]
    assert result.tokens == sum(len(example["input_ids"]) for example in used)


def test_accumulation_is_one_large_batch(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    sgd = replace(CONFIG, optimizer="sgd", steps=3)
    _, large = train(bench, start, replace(sgd, batch_size=4))
    _, parts = train(bench, start, replace(sgd, batch_size=2, accumulate=2))
    assert distance(large, start) > 1e-3
    assert distance(large, parts) < bound(1e-5)


def test_rounds_continue_through_the_data_and_the_schedule(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    sgd = replace(CONFIG, optimizer="sgd", schedule="cosine", warmup_fraction=0.25, steps=3)
    _, middle = train(bench, start, sgd, number=1, rounds=2)
    _, two_rounds = train(bench, middle, sgd, number=2, rounds=2)
    _, at_once = train(bench, start, replace(sgd, steps=6), number=1, rounds=1)
    assert distance(two_rounds, at_once) < bound(1e-6)


def test_the_same_seed_gives_the_same_bits_even_with_dropout(tiny_llama):
    lora = replace(LORA, dropout=0.3)
    config = model_config(tiny_llama)
    bench = adapted.adapted_model(config, lora)
    _, start = bench_and_start(tiny_llama)
    bench = adapted.adapted_model(config, lora)
    (_, one), (_, two) = train(bench, start), train(bench, start)
    assert distance(one, two) <= bound(0.0)


def test_a_frozen_factor_stays_as_it_was(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    base = {name: layer.get_base_layer().weight.clone() for name, layer in bench.layers.items()}
    _, got = train(bench, start, trainable=("B",))
    for name, factors in got.lora.items():
        assert torch.equal(factors.A, start.lora[name].A)
        assert not torch.equal(factors.B, start.lora[name].B)
        assert torch.equal(bench.layers[name].get_base_layer().weight, base[name])


def test_clipping_bounds_the_step(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    sgd = replace(CONFIG, optimizer="sgd", lr=1.0, steps=1, clip=1e-3)
    _, got = train(bench, start, sgd)
    moved = sum(
        float((f.A - start.lora[n].A).norm() ** 2 + (f.B - start.lora[n].B).norm() ** 2) for n, f in got.lora.items()
    )
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-3)


def test_the_proximal_term_has_fedproxs_gradient():
    g = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4, generator=g)) for _ in range(2)]
    start = [torch.randn(3, 4, generator=g) for _ in range(2)]
    loss = sum((p**3).sum() for p in parameters)
    loss.backward()
    terms.add_proximal(parameters, start, 0.7)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    full = sum((p**3).sum() for p in copies) + 0.35 * sum(
        ((p - s) ** 2).sum() for p, s in zip(copies, start, strict=True)
    )
    full.backward()
    for ours, reference in zip(parameters, copies, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("cored", [False, True], ids=["pair", "core"])
@pytest.mark.parametrize("trained", ["AB", "A", "B", "ABR", "R"])
def test_the_proximal_term_on_updates_has_the_gradient_of_the_dense_one(trained, cored):
    """Against autograd through the whole matrix, from a start that training has left."""
    if "R" in trained and not cored:
        return
    g = torch.Generator().manual_seed(0)

    def parameter(factor: str, *shape: int) -> torch.nn.Parameter:
        made = torch.randn(shape, generator=g, dtype=torch.float64)
        return torch.nn.Parameter(made, requires_grad=factor in trained)

    A, B, R = parameter("A", 3, 5), parameter("B", 7, 3), parameter("R", 3, 3) if cored else None
    head = torch.nn.Parameter(torch.randn(4, generator=g, dtype=torch.float64))
    pair = Pair("m", A, B, 1.5, R)
    leaves = [p for p in (A, B, R) if p is not None and p.requires_grad]

    def update() -> torch.Tensor:
        return 1.5 * B @ (A if R is None else R @ A)

    first, first_head = update().detach(), head.detach().clone()
    add = terms.proximal(Trainable([pair], [*leaves, head]), 0.7, "update")
    with torch.no_grad():
        for each in (*leaves, head):
            each.add_(0.3 * torch.randn(each.shape, generator=g, dtype=torch.float64))
            each.grad = torch.ones_like(each)
    term = 0.35 * ((update() - first).square().sum() + (head - first_head).square().sum())
    expected = torch.autograd.grad(term, [*leaves, head])
    add()
    for each, own in zip((*leaves, head), expected, strict=True):
        torch.testing.assert_close(each.grad, 1 + own)
    assert all(p.grad is None for p in (A, B, R) if p is not None and not p.requires_grad)


def test_the_proximal_term_on_updates_is_the_same_however_they_are_divided():
    g = torch.Generator().manual_seed(0)
    A, B, Q = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (7, 3), (3, 3)))
    steps: list[torch.Tensor] = []
    for turn in (torch.eye(3).double(), torch.linalg.qr(Q).Q):
        pair = Pair("m", torch.nn.Parameter(turn.T @ A), torch.nn.Parameter(B @ turn), 2.0)
        add = terms.proximal(Trainable([pair], [pair.A, pair.B]), 0.1, "update")
        with torch.no_grad():
            pair.A.add_(turn.T @ torch.ones(3, 5).double())
        pair.A.grad, pair.B.grad = torch.zeros(3, 5).double(), torch.zeros(7, 3).double()
        add()
        steps.append(pair.B.detach() @ pair.A.grad + pair.B.grad @ pair.A.detach())
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("of", ["factors", "update"])
def test_a_strong_proximal_term_holds_the_client_back(tiny_llama, of):
    bench, start = bench_and_start(tiny_llama)
    sgd = replace(CONFIG, optimizer="sgd", lr=0.05, steps=6)
    _, free = train(bench, start, sgd)
    _, held = train(bench, start, replace(sgd, prox_mu=10.0, prox_of=of))
    if of == "factors":
        assert distance(held, start) < 0.7 * distance(free, start)
        return
    sizes = [sum(float(delta(f).norm()) ** 2 for f in end.lora.values()) for end in (held, free)]  # B starts at 0
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_schedule_warms_up_and_comes_down(schedule):
    config = TrainConfig(schedule=schedule, warmup_fraction=0.1)
    factors = [schedule_.lr_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(factors) == pytest.approx(1.0)
    assert all(f > 0 for f in factors)
    if schedule != "constant":
        assert factors[9:] == sorted(factors[9:], reverse=True)
        assert factors[-1] < 0.02


def test_epochs_count_passes_over_the_data():
    config = TrainConfig(steps=0, epochs=2.0, batch_size=4, accumulate=2)
    assert schedule_.steps_per_round(config, 33) == 9
    assert schedule_.steps_per_round(replace(config, steps=5), 33) == 5
    assert schedule_.steps_per_round(config, 1) == 1


def test_divergence_is_an_error_that_says_what_to_do(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    name = next(iter(start.lora))
    lost = {name: replace(start.lora[name], B=torch.full_like(start.lora[name].B, float("nan")))}
    with pytest.raises(
        AdapterError, match=r"loss nan at step 1 of round 1, before anything was trained: the adapter that"
    ):
        train(bench, AdapterState(lora={**start.lora, **lost}))


def test_progress_is_told_step_by_step(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    seen = []
    train(bench, start, on_step=lambda step, steps, loss: seen.append((step, steps, loss > 0)))
    assert seen == [(1, 4, True), (2, 4, True), (3, 4, True), (4, 4, True)]


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_gpu_optimizers_refuse_a_cpu(name):
    with pytest.raises(ConfigError, match=rf"train.optimizer = '{name}' needs a CUDA GPU, but the model is on cpu"):
        registry.check(TrainConfig(optimizer=name), torch.device("cpu"))


def test_the_tail_penalty_is_the_gradient_of_its_term():
    g = torch.Generator().manual_seed(0)
    factors = [(torch.randn(r, 6, generator=g), torch.randn(5, r, generator=g)) for r in (4, 3, 1)]
    mine = [tuple(torch.nn.Parameter(t.clone()) for t in pair) for pair in factors]
    theirs = [tuple(torch.nn.Parameter(t.clone()) for t in pair) for pair in factors]
    for pair in mine:
        for parameter in pair:
            parameter.grad = torch.zeros_like(parameter)
    terms.add_tail_penalty([Pair("m", a, b, 1.0) for a, b in mine], 0.3, 0.5)
    term = sum(0.3 * b[:, k:].norm() * a[k:].norm() for (a, b), k in zip(theirs, (2, 2, 1), strict=True))
    term.backward()
    for (a, b), (x, y) in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, x.grad)
        torch.testing.assert_close(b.grad, y.grad)
    zero = [(torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.zeros(3, 2)))]
    for parameter in zero[0]:
        parameter.grad = torch.zeros_like(parameter)
    terms.add_tail_penalty([Pair("m", *zero[0], 1.0)], 1.0, 0.5)
    assert all(torch.isfinite(parameter.grad).all() for parameter in zero[0])


def test_the_prior_is_the_gradient_of_a_divergence_of_gaussians_and_zero_where_training_begins():
    g = torch.Generator().manual_seed(0)
    pairs = [
        Pair("m", *(torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((r, 6), (5, r))), 1.0)
        for r in (4, 1)
    ]
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    theta, (beta, sigma) = [factor.detach().clone() for factor in factors], (0.3, 0.7)
    add = terms.penalty(pairs, Plan(terms=(Term("prior", beta / sigma**2),)))
    for moved in (0.0, 1.0):
        for factor in factors:
            factor.data.add_(moved * torch.randn(factor.shape, generator=g))
            factor.grad = torch.zeros_like(factor)
        add()
        phi = [factor.detach().clone().requires_grad_() for factor in factors]
        divergence = sum(
            torch.distributions.kl_divergence(
                torch.distributions.Normal(own, sigma), torch.distributions.Normal(shared, sigma)
            ).sum()
            for own, shared in zip(phi, theta, strict=True)
        )
        (beta * divergence).backward()
        assert (divergence.item() == 0.0) is (moved == 0.0)
        for factor, own in zip(factors, phi, strict=True):
            torch.testing.assert_close(factor.grad, own.grad)
            assert bool(factor.grad.any()) is bool(moved)  # pyright: ignore[reportOptionalMemberAccess]
    frozen = Pair(
        "m", torch.nn.Parameter(torch.ones(1, 2), requires_grad=False), torch.nn.Parameter(torch.ones(2, 1)), 1.0
    )
    terms.penalty([frozen], Plan(terms=(Term("prior", 1.0),)))()
    assert frozen.A.grad is None


def test_an_unknown_term_is_refused():
    terms.check_terms(Plan(terms=(Term("tail", 0.1, 0.5),)))
    known = "tail, prior, dynamic, control, complement"
    with pytest.raises(ConfigError, match=f"asks for the term 'twist', this client knows {known}; install"):
        terms.check_terms(Plan(terms=(Term("twist", 0.1),)))


@pytest.mark.parametrize("name", ["lora-pro", "riemannian"])
def test_optimizers_in_fp64_refuse_a_device_without_it(name):
    with pytest.raises(ConfigError, match=f"train.optimizer = '{name}' computes in fp64, which mps cannot"):
        registry.check(TrainConfig(optimizer=name), torch.device("mps"))
    registry.check(TrainConfig(optimizer=name), torch.device("cpu"))


class Spoiling(Stage):
    """Counts its calls, and multiplies gradients by a number."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def gradients(self, parameters):
        self.calls += 1
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(self.factor)


def test_every_pass_of_a_step_goes_through_stages_and_penalties(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    sam, stage, penalties = replace(CONFIG, optimizer="sam"), Spoiling(0.0), []
    result, got = train(bench, start, sam, stages=[stage], penalty=lambda: penalties.append(1))
    assert stage.calls == len(penalties) == 2 * CONFIG.steps
    assert distance(got, start) == 0, "no gradient came past the stage, not even to the first pass"
    assert result.loss > 0
    _, without = train(bench, start, sam)
    _, near = train(bench, start, replace(sam, prox_mu=10.0))
    assert distance(near, start) < distance(without, start)


def test_gradients_that_cannot_be_decomposed_are_a_divergence(tiny_llama):
    bench, start = bench_and_start(tiny_llama)
    with pytest.raises(DivergedError, match=r"training diverged: lora-rite .* step 1 of round 1 .*; lower train.lr"):
        train(bench, start, replace(CONFIG, optimizer="lora-rite"), stages=[Spoiling(float("nan"))])
