"""Privacy of rows: gradients against one row at a time, sensitivity by construction, the noise, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.clients.training import cohort, trainer
from fedlora.clients.training.private import ClippedSum, RowPrivacy
from fedlora.common import accountant
from fedlora.common.errors import ConfigError
from fedlora.common.noise import Noise
from fedlora.config import LoraConfig, TrainConfig
from fedlora.data import Example
from fedlora.exchange import Plan
from fedlora.exchange.privacy import mechanism
from fedlora.models import adapted
from fedlora.models.per_example import check_rows, row_gradients
from fedlora.models.stacked import stacked
from fedlora.simulations.checks import check
from fedlora.tasks.base import Batch
from fedlora.tasks.checked import mean_loss, row_losses
from tests.clients.training.test_cohort import labelled, random_adapter, sentences
from tests.device import bound, model_config
from tests.federation import run_locally, tiny
from tests.tiny import save_gpt2, save_llama

LLAMA = LoraConfig(target_modules="q_proj,v_proj,down_proj")
BERT = LoraConfig(target_modules="query,value,output.dense")
CONFIG = TrainConfig(
    steps=3, batch_size=4, lr=1e-2, optimizer="sgd", schedule="constant", warmup_fraction=0.0, clip=0.0
)
KEY = bytes(32)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def bench_of(folder, lora: LoraConfig, **model):
    return adapted.adapted_model(replace(model_config(folder), **model), lora)


def bert(folder):
    return bench_of(folder, BERT, task="classification", labels=2)


def values(trained, bench) -> dict[str, Tensor]:
    """The gradients that the parameters have, under the names of `row_gradients`."""
    named = {
        f"{p.module}.{w}": t for p in trained.pairs for w, t in (("A", p.A), ("B", p.B), ("R", p.core)) if t is not None
    }
    named |= dict(bench.tensors)
    return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}


def one_at_a_time(bench, trained, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    """The oracle: a batch of one row, whose loss is the mean of its own, and an ordinary backward pass."""
    rows = []
    for example in examples:
        for parameter in trained.parameters:
            parameter.grad = None
        mean_loss(bench.task, bench.model, bench.task.collate([example], bench.base.pad_id)).backward()
        rows.append(values(trained, bench))
    return rows


def at_once(bench, examples: Sequence[Example], stack=None) -> dict[str, Tensor]:
    batch: Batch = bench.task.collate(list(examples), bench.base.pad_id)
    length = int(bench.task.tokens(batch).max())
    with row_gradients(bench, stack) as rows:
        rows.begin(len(examples), length)
        row_losses(bench.task, bench.model, batch, len(examples)).sum().backward()
        return {name: gradient.clone() for name, gradient in rows.found.items()}


def assert_rows(found: dict[str, Tensor], expected: Sequence[dict[str, Tensor]], tolerance: float = 1e-6) -> None:
    """Each row's norm, over all tensors, and each of its tensors as a share of the largest norm."""
    assert set(found) == set(expected[0])
    norms = [math.sqrt(sum(float(t.double().square().sum()) for t in row.values())) for row in expected]
    for place, row in enumerate(expected):
        own = {name: gradient[place] for name, gradient in found.items()}
        norm = math.sqrt(sum(float(t.double().square().sum()) for t in own.values()))
        assert norm == pytest.approx(norms[place], rel=bound(tolerance))
        for name, tensor in row.items():
            assert float((own[name] - tensor).norm()) <= bound(5 * tolerance) * max(norms), name


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_of_rows_are_those_of_one_row_at_a_time(tiny_llama, quantization):
    """Rows of unequal lengths; a base in 4 bits has no gradient at all."""
    bench = bench_of(tiny_llama, LLAMA, quantization=quantization)
    check_rows(bench)
    trained = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0), "AB")
    data = sentences(5, 1)
    assert_rows(at_once(bench, data), one_at_a_time(bench, trained, data))


@pytest.mark.parametrize("trained", ["A", "B"])
def test_only_what_is_trained_counts(tiny_llama, trained):
    bench = bench_of(tiny_llama, LLAMA)
    parameters = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0), trained)
    found = at_once(bench, sentences(4, 1))
    assert {name.rpartition(".")[2] for name in found} == {trained}
    assert_rows(found, one_at_a_time(bench, parameters, sentences(4, 1)))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_core_alone_counts(tiny_llama, quantization):
    bench = bench_of(tiny_llama, LLAMA, quantization=quantization)
    bench.model.eval()
    trained = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0, core=True), "R")
    found = at_once(bench, sentences(5, 1))
    assert {name.rpartition(".")[2] for name in found} == {"R"}
    assert_rows(found, one_at_a_time(bench, trained, sentences(5, 1)))


def test_a_core_beside_which_a_is_trained_is_refused(tiny_llama):
    bench = bench_of(tiny_llama, LLAMA)
    adapted.install(bench, random_adapter(bench, LLAMA, 3, 0, core=True), "AR")
    with pytest.raises(ConfigError, match="trains A beside a core R"), row_gradients(bench):
        pass


def test_a_classifiers_head_counts_too(tiny_bert):
    bench = bert(tiny_bert)
    check_rows(bench)
    trained = adapted.install(bench, random_adapter(bench, BERT, 3, 0), "AB")
    found = at_once(bench, labelled(5, 1))
    assert set(bench.tensors) <= set(found)
    bench.model.eval()
    assert_rows(at_once(bench, labelled(5, 1)), one_at_a_time(bench, trained, labelled(5, 1)))


def test_layers_with_weights_the_other_way_round(tmp_path):
    lora = LoraConfig(target_modules="c_attn,c_proj")
    bench = bench_of(save_gpt2(tmp_path / "gpt2"), lora)
    bench.model.eval()
    trained = adapted.install(bench, random_adapter(bench, lora, 2, 0), "AB")
    assert_rows(at_once(bench, sentences(4, 1)), one_at_a_time(bench, trained, sentences(4, 1)))


def test_gradient_checkpointing_changes_nothing(tiny_llama):
    bench = bench_of(tiny_llama, LLAMA, gradient_checkpointing=True)
    bench.model.train()
    trained = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0), "AB")
    assert_rows(at_once(bench, sentences(4, 1)), one_at_a_time(bench, trained, sentences(4, 1)))


@pytest.mark.parametrize("factors", ["AB", "R"])
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_in_a_batch_of_clients_each_row_is_its_clients(tiny_llama, tiny_bert, task, quantization, factors):
    """Three clients of unequal ranks and scalings, two rows of each."""
    lora = BERT if task == "classification" else LLAMA
    folder = tiny_bert if task == "classification" else tiny_llama
    bench = bench_of(folder, lora, task=task, quantization=quantization)
    bench.model.eval()
    adapters = [random_adapter(bench, lora, rank, seed, core=factors == "R") for seed, rank in enumerate((4, 1, 2))]
    make = labelled if task == "classification" else sentences
    data = [make(2, seed) for seed in range(3)]
    expected = []
    for adapter, rows in zip(adapters, data, strict=True):
        trained = adapted.install(bench, adapter, factors)
        expected.append(one_at_a_time(bench, trained, rows))
    with stacked(bench, adapters, frozenset(factors)) as stack:
        found = at_once(bench, [example for rows in data for example in rows], stack)
    for seat, rows in enumerate(expected):
        mine = {}
        for name, gradient in found.items():
            own = gradient[2 * seat : 2 * seat + 2]
            for axis, size in enumerate(rows[0][name].shape, start=1):
                assert float(own.narrow(axis, size, own.shape[axis] - size).abs().sum()) == 0.0  # ranks that it lacks
                own = own.narrow(axis, 0, size)
            mine[name] = own
        assert_rows(mine, rows)


def trained_by(
    bench, start: AdapterState, data: Sequence[Example], privacy: RowPrivacy | None, config=CONFIG, factors: str = "AB"
):
    parameters = adapted.install(bench, start, factors)
    more = {"pad_id": bench.base.pad_id, "number": 1, "rounds": 2, "seed": 5}
    if privacy is None:
        return trainer.train(bench.task, bench.model, parameters, data, config, **more), adapted.read(bench)
    with row_gradients(bench) as rows:
        heads = [*bench.tensors]
        result = trainer.train(
            bench.task, bench.model, parameters, data, config, privacy=privacy, rows=rows, heads=heads, **more
        )
    return result, adapted.read(bench)


def apart(left: AdapterState, right: AdapterState) -> float:
    mine, theirs = OWN.put(left), OWN.put(right)
    assert mine.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).norm()) for name, tensor in mine.items())


@pytest.mark.parametrize("most", [12, 5], ids=["whole", "in parts"])
def test_without_noise_and_clip_it_is_plain_training(tiny_llama, most):
    """All rows in every step, each with one loss, so that the mean of the rows' means is the mean of all losses."""
    bench = bench_of(tiny_llama, LLAMA, task="classification", labels=2)
    start, data = random_adapter(bench, LLAMA, 3, 0), labelled(12, 1)
    _, plain = trained_by(bench, start, data, None, replace(CONFIG, batch_size=12))
    privacy = RowPrivacy(clip=1e9, noise_multiplier=0.0, rate=1.0, expected=12)
    result, private = trained_by(bench, start, data, privacy, replace(CONFIG, batch_size=most))
    assert apart(plain, start) > 1e-3
    assert apart(plain, private) < bound(1e-6)
    assert result.tokens == 3 * sum(example.size for example in data)


@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_a_step_is_the_clipped_sum_over_a_fixed_number(tiny_llama, clip):
    """Against the oracle's rows, drawn with the same key: `start - lr (sum min(1, C/|g|) g) / expected`."""
    bench = bench_of(tiny_llama, LLAMA)
    start, data = random_adapter(bench, LLAMA, 3, 0), sentences(20, 1)
    privacy = RowPrivacy(clip=clip, noise_multiplier=0.0, rate=0.3, expected=6.0, noise=Noise(KEY))
    _, got = trained_by(bench, start, data, privacy, replace(CONFIG, steps=1))
    trained = adapted.install(bench, start, "AB")
    chosen = [data[i] for i in Noise(KEY).chosen(20, 0.3)]
    rows = one_at_a_time(bench, trained, chosen)
    norms = [math.sqrt(sum(float(t.square().sum()) for t in row.values())) for row in rows]
    for pair in trained.pairs:
        for which, parameter in (("A", pair.A), ("B", pair.B)):
            step = sum(min(1.0, clip / n) * row[f"{pair.module}.{which}"] for n, row in zip(norms, rows, strict=True))
            end = (parameter.detach() - CONFIG.lr * step / 6.0).cpu()
            torch.testing.assert_close(getattr(got.lora[pair.module], which), end, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_without_one_row_the_sum_differs_by_at_most_the_clip(tiny_llama, clip):
    """Neighbouring data: all rows of a step, and all but one, whichever that is."""
    bench = bench_of(tiny_llama, LLAMA)
    trained = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0), "AB")
    data = sentences(6, 1)
    privacy = RowPrivacy(clip=clip, noise_multiplier=0.0, rate=1.0, expected=1.0)

    def sum_of(examples: Sequence[Example]) -> Tensor:
        total = ClippedSum(privacy, trained, ())
        total.add(at_once(bench, examples), 0, len(examples))
        total.finish()
        return torch.cat([p.grad.double().flatten() for p in trained.parameters if p.grad is not None])

    whole = sum_of(data)
    differences = [float((whole - sum_of([*data[:i], *data[i + 1 :]])).norm()) for i in range(6)]
    assert max(differences) <= clip * (1 + 1e-4)
    assert max(differences) > clip / 100


def test_a_row_whose_gradient_is_not_finite_counts_as_nothing():
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    trained = adapted.Trainable([], [weight])
    total = ClippedSum(RowPrivacy(1.0, 0.0, 1.0, 1.0), trained, ["head"])
    rows = torch.ones(3, 2, 3)
    rows[1, 0, 0] = float("nan")
    rows[2, 0, 0] = float("inf")
    total.add({"head": rows}, 0, 3)
    total.finish()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, rows[0] / rows[0].norm())


def test_the_noise_of_a_step_has_the_deviation_that_is_accounted_for(tiny_llama):
    """Also where no row was drawn: N(0, (z C / expected)^2) in every number that is trained."""
    bench = bench_of(tiny_llama, LLAMA)
    trained = adapted.install(bench, random_adapter(bench, LLAMA, 3, 0), "AB")
    total = ClippedSum(RowPrivacy(clip=0.5, noise_multiplier=1.5, rate=0.1, expected=4.0), trained, ())
    drawn = []
    for _ in range(20):
        total.finish()
        drawn += [p.grad.flatten() for p in trained.parameters if p.grad is not None]
    noise = torch.cat(drawn).cpu().double() / (1.5 * 0.5 / 4.0)
    assert len(noise) == 20 * sum(p.numel() for p in trained.parameters)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], len(noise))
    assert low < float(noise.square().sum()) < high


def test_two_trainings_never_have_the_same_noise(tiny_llama):
    """The run's seed decides nothing: whoever knows it could subtract the noise."""
    bench = bench_of(tiny_llama, LLAMA)
    start, data = random_adapter(bench, LLAMA, 3, 0), sentences(8, 1)
    (_, one), (_, two) = (
        trained_by(bench, start, data, RowPrivacy(clip=1.0, noise_multiplier=1.0, rate=0.5, expected=4.0))
        for _ in range(2)
    )
    assert apart(one, two) > 1e-3


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
@pytest.mark.parametrize(("optimizer", "factors"), [("sgd", "AB"), ("adamw", "AB"), ("adamw", "R")])
def test_clients_in_one_batch_are_as_private_as_alone(tiny_llama, task, optimizer, factors):
    """With the same keys: unequal ranks, numbers of rows, and draws, among them steps in which a client has no row."""
    lora, bench = LLAMA, bench_of(tiny_llama, LLAMA, task=task)
    make = labelled if task == "classification" else sentences
    adapters = [random_adapter(bench, lora, rank, seed, core=factors == "R") for seed, rank in enumerate((4, 1, 2))]
    data, config = [make(n, n) for n in (9, 3, 5)], replace(CONFIG, optimizer=optimizer, batch_size=2, steps=6)

    def private(seat: int) -> RowPrivacy:
        n = len(data[seat])
        return RowPrivacy(0.5, 0.3, 2 / n * (0.3 if seat == 1 else 1.0), 2.0, Noise(bytes([seat]) * 32))

    alone = [trained_by(bench, adapters[i], data[i], private(i), config, factors)[1] for i in range(3)]
    members = [cohort.Member(adapters[i], data[i], 5, privacy=private(i)) for i in range(3)]
    together = cohort.train(bench, members, config, plan=Plan(train=frozenset(factors)), number=1, rounds=2)
    for (adapter, _), own in zip(together, alone, strict=True):
        assert apart(adapter, own) < bound(2e-5)


KEYS = {"privacy__level": "example", "privacy__epsilon": 30.0, "privacy__delta": 1e-3, "strategy__name": "ffa"}
GIVEN = {"privacy__level": "example", "privacy__noise_multiplier": 1.0, "privacy__delta": 1e-3, "strategy__name": "ffa"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train__clients_at_once": "auto"},
        {"strategy__name": "flora"},
        {"strategy__name": "fedsb", "lora__init": "lora-xs"},
    ],
    ids=str,
)
def test_a_run_counts_what_each_client_spends(tmp_path, tiny_llama, more):
    """Every strategy makes what it makes of private uploads; nothing that depends on rows is sent beside them."""
    config = tiny(tmp_path, tiny_llama, **{**GIVEN, **more})
    _, result = run_locally(config)
    made = {about["num-examples"]: mechanism(config, about["num-examples"]) for about in result["clients"]}
    for number, entry in enumerate(result["rounds"], start=1):
        spent = max(m.epsilon(number) for m in made.values() if m)
        assert entry["privacy"] == {"epsilon": spent, "delta": 1e-3}
        assert not any(
            "loss" in name or name in ("train-tokens", "train-cut") for c in entry["clients"].values() for name in c
        )
        assert entry["train-loss"] is None
    assert "DP-SGD on each client" in result["privacy"]["mechanism"]


def test_the_noise_is_that_of_the_clients_own_rows(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, **KEYS)
    made = mechanism(config, 11)
    assert made is not None
    assert (made.rate, made.per_round) == (0.19, 3)  # 2 of 11 rows, rounded up
    assert made.noise_multiplier == accountant.noise_for(30.0, 1e-3, 0.19, 6)
    assert made.epsilon(2) <= 30.0 < made.epsilon(3)
    own = RowPrivacy.of(config, 11)
    assert own is not None
    assert (own.rate, own.expected, own.clip) == (2 / 11, pytest.approx(2.0), 1.0)
    assert RowPrivacy.of(tiny(tmp_path, tiny_llama), 11) is None


def test_a_run_learns_under_little_noise(tmp_path, tiny_llama):
    keys = {"lora__ranks": "", "lora__rank": 2, "train__lr": 2e-2, "train__steps": 6, "strategy__name": "fedavg"}
    _, result = run_locally(
        tiny(tmp_path, tiny_llama, privacy__level="example", privacy__noise_multiplier=0.05, **keys)
    )
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"train__optimizer": "sam"},
            r"train\.optimizer = sam takes 2 gradients .*set train\.optimizer = adamw or sgd",
        ),
    ],
)
def test_what_the_mechanism_does_not_cover_is_refused(tmp_path, tiny_llama, keys, message):
    with pytest.raises(ConfigError, match=message):
        check(tiny(tmp_path, tiny_llama, **KEYS, **keys))


def test_an_adapted_output_layer_is_refused(tmp_path):
    bench = bench_of(
        save_llama(tmp_path / "untied", tie_word_embeddings=False), replace(LLAMA, target_modules="lm_head")
    )
    with pytest.raises(ConfigError, match=r"the output layer has an adapter.*leave the output layer out"):
        check_rows(bench)


def test_a_layer_that_sees_other_rows_is_refused():
    from fedlora.models.per_example import RowGradients

    rows = RowGradients()
    rows.begin(4, 7)
    with pytest.raises(ConfigError, match=r"a layer got 5 rows of a batch of 4 examples"):
        rows.by_row(torch.zeros(5, 3), 4)
