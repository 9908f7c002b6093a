"""Several clients in one batch: to each what it gets alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, initial
from fedlora.adapters.flat import OWN
from fedlora.clients.training import cohort, terms, trainer
from fedlora.common.errors import AdapterError
from fedlora.config import LoraConfig, TrainConfig
from fedlora.data import Example
from fedlora.exchange import Plan, Term
from fedlora.models import adapted, fresh_head, injection
from fedlora.models.stacked import NotStackable, stacked
from tests.device import bound, model_config, on_device
from tests.tiny import save_bert, save_gpt2

CONFIG = TrainConfig(steps=10, batch_size=2, lr=1e-3)
RANKS = (4, 1, 3, 2)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def sentences(count: int, seed: int, longest: int = 12) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(5, longest, (1,), generator=g))
        ids = torch.randint(5, 200, (length,), generator=g).tolist()
        made.append(Example({"input_ids": ids, "labels": [-100] * 3 + ids[3:]}))
    return made


def labelled(count: int, seed: int) -> list[Example]:
    return [
        Example({"input_ids": e["input_ids"], "labels": int(e["input_ids"][1] % 2)}) for e in sentences(count, seed)
    ]


def random_adapter(bench: adapted.AdaptedModel, lora: LoraConfig, rank: int, seed: int, core: bool = False):
    """Factors as in the middle of a run: B is not zero, and each client has its own scaling."""
    g = torch.Generator().manual_seed(seed)
    shapes = injection.shapes(bench.config, lora)
    start = initial(shapes.lora, lambda name: rank, lambda name: 1.0 + seed, g)
    factors = {
        name: LoraFactors(A=f.A, B=torch.randn(f.B.shape, generator=g) * 0.1, scaling=f.scaling)
        for name, f in start.lora.items()
    }
    dense = fresh_head(shapes.tensors, seed)
    if core:
        factors = {n: replace(f, R=torch.randn(rank, rank, generator=g) * 0.1) for n, f in factors.items()}
    return AdapterState(lora=factors, tensors=dense)


def both(
    bench: adapted.AdaptedModel,
    adapters: list[AdapterState],
    data: list[list[Example]],
    config: TrainConfig,
    *,
    trainable: str = "AB",
    anchor: tuple[AdapterState, ...] = (),
    prune: tuple[Term, ...] = (),
) -> tuple[list[Any], list[Any]]:
    """(adapter, result) of each client: trained alone, and together."""
    alone, plan = [], Plan(train=frozenset(trainable), terms=prune)
    for seed, (start, examples) in enumerate(zip(adapters, data, strict=True)):
        trained = adapted.install(bench, start, trainable, folds=anchor)

        result = trainer.train(
            bench.task,
            bench.model,
            trained,
            examples,
            config,
            pad_id=bench.base.pad_id,
            number=2,
            rounds=3,
            seed=seed,
            penalty=terms.penalty(trained.pairs, plan),
        )
        alone.append((adapted.read(bench), result))
    members = [cohort.Member(a, d, seed) for seed, (a, d) in enumerate(zip(adapters, data, strict=True))]
    together = cohort.train(bench, members, config, plan=plan, folds=anchor, number=2, rounds=3)
    return alone, together


def tensors(adapter: AdapterState) -> dict[str, torch.Tensor]:
    return OWN.put(adapter)


def change(adapter: AdapterState, start: AdapterState) -> torch.Tensor:
    before = tensors(start)
    return torch.cat([(value - before[name]).flatten().double() for name, value in sorted(tensors(adapter).items())])


def check(
    adapters: list[AdapterState],
    alone: list[Any],
    together: list[Any],
    dtype: torch.dtype = torch.float32,
    on_cpu: float = 1e-5,
) -> None:
    for start, (one, result), (other, same) in zip(adapters, alone, together, strict=True):
        assert {n: t.shape for n, t in tensors(one).items()} == {n: t.shape for n, t in tensors(other).items()}
        moved = change(one, start)
        assert float(moved.norm()) > 1e-3
        assert float((change(other, start) - moved).norm() / moved.norm()) <= bound(on_cpu, dtype)
        assert (same.steps, same.tokens) == (result.steps, result.tokens)
        assert same.loss == pytest.approx(result.loss, rel=bound(1e-5, dtype))
        assert same.last_loss == pytest.approx(result.last_loss, rel=bound(1e-4, dtype))


CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "weight-decay": {"weight_decay": 0.1, "schedule": "linear"},
    "accumulate": {"accumulate": 3},
    "no-clip-constant": {"clip": 0.0, "schedule": "constant", "warmup_fraction": 0.0},
    "proximal": {"prox_mu": 0.5},
    "proximal-update": {"prox_mu": 0.5, "prox_of": "update"},
    "by-epochs": {"steps": 0, "epochs": 1.5},  # each client its own number of steps and its own schedule
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_each_client_gets_what_it_gets_alone(tiny_llama, case, quantization):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama, quantization=quantization), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [
        sentences(count, seed, longest) for seed, (count, longest) in enumerate([(9, 12), (3, 7), (14, 30), (1, 6)])
    ]
    check(adapters, *both(bench, adapters, data, replace(CONFIG, **CASES[case])))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_bf16_it_is_the_same_up_to_its_rounding(tiny_llama, quantization):
    """With plain gradient steps: AdamW makes whole steps of gradients that are nothing but rounding."""
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama, quantization, compute_dtype="bf16"), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [sentences(8, seed, 8 + 5 * seed) for seed in range(4)]
    alone, together = both(bench, adapters, data, replace(CONFIG, optimizer="sgd", lr=0.1))
    check(adapters, alone, together, torch.bfloat16)


@pytest.mark.parametrize("trainable", ["A", "B", "R", "BR"])
def test_factors_that_are_frozen_stay_and_cores_are_trained(tiny_llama, trainable):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    core = "R" in trainable
    adapters = [random_adapter(bench, lora, rank, seed, core) for seed, rank in enumerate(RANKS)]
    data = [sentences(8, seed) for seed in range(4)]
    alone, together = both(bench, adapters, data, CONFIG, trainable=trainable)
    check(adapters, alone, together)
    for start, (got, _) in zip(adapters, together, strict=True):
        for name, factors in start.lora.items():
            for part in {"A", "B"} - set(trainable):
                assert torch.equal(getattr(factors, part), getattr(got.lora[name], part))


def test_the_anchor_serves_all(tiny_llama):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama, quantization="nf4"), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    folds = tuple(random_adapter(bench, lora, 5, seed) for seed in (11, 12))
    data = [sentences(8, seed) for seed in range(4)]
    alone, together = both(bench, adapters, data, CONFIG, anchor=folds)
    check(adapters, alone, together)
    bare, _ = both(bench, adapters, data, CONFIG)
    assert abs(bare[0][1].loss - alone[0][1].loss) > 1e-3, "the anchor matters in this test"


@pytest.mark.parametrize("term", [Term("tail", 0.5, 0.5), Term("prior", 0.5)], ids=["tail", "prior"])
def test_a_plans_term_is_each_clients_own(tiny_llama, term):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [sentences(8, seed) for seed in range(4)]
    alone, together = both(bench, adapters, data, CONFIG, prune=(term,))
    check(adapters, alone, together)
    plain, _ = both(bench, adapters, data, CONFIG)
    assert float((change(plain[0][0], adapters[0]) - change(alone[0][0], adapters[0])).norm()) > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_dropout_is_drawn_per_client(tiny_llama, rate):
    lora = LoraConfig(target_modules="q_proj,down_proj", dropout=rate)
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    data = [sentences(8, seed, 8 + 5 * seed) for seed in range(4)]
    check(adapters, *both(bench, adapters, data, CONFIG))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_classifiers_heads_are_stacked_and_the_bases_own_dropout_is_per_client(tmp_path, attention):
    lora = LoraConfig(target_modules="query,value")
    folder = save_bert(tmp_path / "bert")
    model = model_config(folder, task="classification")
    bench = adapted.adapted_model(model, lora)
    bench.model.set_attn_implementation(attention)
    rates = {m.p for m in bench.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert max(rates) > 0
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    assert adapters[0].tensors
    data = [labelled(8, seed) for seed in range(4)]
    check(adapters, *both(bench, adapters, data, CONFIG))


def test_gpt2_is_served_too(tmp_path):
    lora = LoraConfig(target_modules="c_attn")
    bench = adapted.adapted_model(model_config(save_gpt2(tmp_path / "gpt2")), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    check(adapters, *both(bench, adapters, [sentences(8, seed) for seed in range(4)], CONFIG))


def test_one_client_that_diverges_fails_alone(tiny_llama):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    bad = dict(adapters[1].lora)
    name = next(iter(bad))
    bad[name] = replace(bad[name], A=bad[name].A * float("nan"))
    spoiled = [adapters[0], AdapterState(lora=bad), *adapters[2:]]
    data = [sentences(8, seed) for seed in range(4)]
    members = [cohort.Member(a, d, seed) for seed, (a, d) in enumerate(zip(spoiled, data, strict=True))]
    ends = cohort.train(bench, members, CONFIG, plan=Plan(), number=2, rounds=3)
    assert isinstance(ends[1], AdapterError)
    assert "training diverged: loss nan at step 1 of round 2" in str(ends[1])
    alone, _ = both(bench, adapters, data, CONFIG)
    good = [0, 2, 3]
    check([adapters[i] for i in good], [alone[i] for i in good], [ends[i] for i in good])


def test_padding_never_receives_a_value_and_the_model_is_as_before(tiny_llama):
    lora = LoraConfig(target_modules="q_proj,down_proj")
    bench = adapted.adapted_model(model_config(tiny_llama), lora)
    adapters = [random_adapter(bench, lora, rank, seed) for seed, rank in enumerate(RANKS)]
    before = dict(bench.model.named_modules())
    with stacked(bench, adapters, frozenset("AB")) as stack:
        ids = on_device(torch.randint(5, 200, (8, 6)))
        stack.begin(*ids.shape)
        logits = bench.model(input_ids=ids).logits
        logits.square().sum().backward()
        for layer in stack._layers.values():
            for number, rank in enumerate(layer.ranks):
                for whole in (layer.A, layer.B):
                    assert whole.grad is not None
                    assert float(whole.detach()[number, rank:].abs().sum()) == 0.0
                    assert float(whole.grad[number, rank:].abs().sum()) == 0.0
                    assert float(whole.grad[number, :rank].abs().sum()) > 0.0
        with pytest.raises(NotStackable, match="3 rows of a batch of 8"):
            stack.check(torch.zeros(3, 6))
    after = dict(bench.model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    for start, rows, part in zip(adapters, ids.chunk(4), logits.detach().chunk(4), strict=True):
        adapted.install(bench, start)
        torch.testing.assert_close(bench.model(input_ids=rows).logits.detach(), part, rtol=1e-4, atol=bound(1e-5))
