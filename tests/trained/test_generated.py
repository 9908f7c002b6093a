"""`fedlora generate`: adapters in one gauge, and a generator that learns them."""

from __future__ import annotations

import json

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import adapted, load_base, peft_files
from fedlora.trained.export import at_rank
from fedlora.trained.generated import Canon, Generator, cosine, generate
from fedlora.trained.task_vectors import task_vector
from tests.federation import run_locally, tiny, write_labels

SHAPES = {"layers.0.q": (12, 9), "layers.0.v": (7, 9), "layers.1.q": (12, 9)}


def toy(seed: int, rank: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        name: LoraFactors(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), 0.7)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return AdapterState(lora=lora, tensors={"head.weight": torch.randn(2, 5, generator=g)})


def test_a_vector_is_the_update_whatever_its_factors():
    one = toy(0)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))
    other = AdapterState(
        lora={n: LoraFactors(torch.linalg.inv(mix) @ f.A, f.B @ mix, f.scaling) for n, f in one.lora.items()},
        tensors=one.tensors,
    )
    canon = Canon.of([one, other], 4)
    torch.testing.assert_close(canon.vector(one), canon.vector(other), rtol=1e-4, atol=1e-4)
    back = canon.adapter(canon.vector(one))
    for name, factors in one.lora.items():
        torch.testing.assert_close(delta(back.lora[name]), delta(factors), rtol=1e-4, atol=1e-4)
    assert torch.equal(back.tensors["head.weight"], one.tensors["head.weight"])
    cut = Canon.of([one], 2)
    best = at_rank(one, 2)
    assert cosine(cut.adapter(cut.vector(one)), best) == pytest.approx(1.0, abs=1e-5)


def test_three_toy_adapters_are_learned_by_heart_each_under_its_task():
    """Whatever z is drawn, the generated update is the one of the task that it is asked for."""
    states = [toy(seed) for seed in (1, 2, 3)]
    canon = Canon.of(states, 3)
    vectors = torch.stack([canon.vector(state) for state in states])
    conditions = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    generator = Generator(vectors, conditions, seed=0)
    before = [cosine(canon.adapter(generator.draw(c)), s) for c, s in zip(conditions, states, strict=True)]
    generator.fit(vectors, conditions, 2000)
    for condition, state in zip(conditions, states, strict=True):
        for _ in range(3):
            assert cosine(canon.adapter(generator.draw(condition)), state) > 0.99
    assert max(before) < 0.9
    others = [cosine(states[0], state) for state in states[1:]]
    assert max(others) < 0.5


def test_the_same_seed_generates_the_same():
    states = [toy(seed) for seed in (1, 2)]
    canon = Canon.of(states, 3)
    vectors = torch.stack([canon.vector(state) for state in states])
    conditions = torch.eye(2)

    def drawn(seed: int) -> torch.Tensor:
        generator = Generator(vectors, conditions, seed)
        generator.fit(vectors, conditions, 20)
        return generator.draw(conditions[0])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """Adapters and heads of two domains."""
    folder = tmp_path_factory.mktemp("domains")
    rows = write_labels(folder / "labels.jsonl")
    made = []
    for part in (0, 1):
        config = tiny(folder, tiny_bert, run__id=f"part{part}", data__parts=f"{part} of 2", **of(rows))
        made.append((config, run_locally(config)[0]))
    yield rows, made
    adapted.forget()


def of(rows):
    return {
        "model__task": "classification",
        "data__source": str(rows),
        "data__partition": "natural",
        "data__partition_by": "domain",
        "federation__clients": 1,
        "lora__target_modules": "query,value",
        "lora__ranks": "2",
        "train__lr": 2e-2,
    }


def test_the_vector_of_a_task_is_the_mean_hidden_state_at_the_last_tokens(trained):
    config = trained[1][0][0]
    base = load_base(config.model)
    found = task_vector(base, config, 5)
    from fedlora.data import encode, prepare
    from fedlora.tasks.registry import task_of

    split = prepare(config)
    rows = split.rows.select(split.parts[0][:5])
    total = torch.zeros_like(found)
    for example in encode(rows, base.tokenizer, config.data, task_of(config.model)):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            total += base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].float()
    torch.testing.assert_close(found, total / 5, rtol=1e-4, atol=1e-4)
    other = task_vector(base, trained[1][1][0], 5)
    assert not torch.allclose(found, other)


def test_the_command_writes_a_checkpoint_that_is_like_the_adapter_of_its_task(
    trained, tmp_path, tiny_bert, command, monkeypatch
):
    rows, made = trained
    monkeypatch.chdir(tmp_path)
    keys = [word for key, value in {
        "model.name": tiny_bert, "model.task": "classification", "model.quantization": "none", "data.source": rows,
        "data.partition": "natural", "data.partition-by": "domain", "federation.clients": 1, "data.parts": "1 of 2",
        "data.max-length": 64,
    }.items() for word in ("-c", f"{key}={value}")]  # fmt: skip
    words = [word for _, folder in made for word in ("--adapter", folder)]
    code, said, error = command("generate", "made", "quickstart", *keys, *words, "--rank", 2)
    assert (code, error) == (0, "")
    assert "cosine of the updates" in said
    about = json.loads((tmp_path / "made" / "fedlora.json").read_text())
    likeness = [each["cosine"] for each in about["made"]["from"]]
    assert likeness[1] > 0.9
    assert likeness[0] < likeness[1] - 0.2
    state = peft_files.read_adapter(tmp_path / "made")
    assert max(factors.rank for factors in state.lora.values()) <= 2
    assert state.tensors
    assert command("evaluate", "--adapter", "made")[0] == 0


def test_what_does_not_fit_is_refused(trained, tmp_path, tiny_llama):
    _, made = trained
    config, folder = made[0]
    with pytest.raises(ConfigError, match="1 adapter, expected at least 2"):
        generate([folder], config, tmp_path / "out")
    with pytest.raises(ConfigError, match="--rank is 0, expected at least 1"):
        generate([folder, made[1][1]], config, tmp_path / "out", rank=0)
    with pytest.raises(ConfigError, match=r"the new task has model\.task = causal-lm"):
        generate([folder, made[1][1]], tiny(tmp_path, tiny_llama), tmp_path / "out")
    with pytest.raises(AdapterError, match="other modules or tensors"):
        Canon.of([toy(0), AdapterState(lora={"q": toy(0).lora["layers.0.q"]})], 2)
    assert not (tmp_path / "out").exists()
