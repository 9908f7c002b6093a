"""`fedlora recycle`: inputs found from adapters, and one adapter that learns from them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from fedlora.adapters import norm
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import adapted, peft_files
from fedlora.trained.export import find
from fedlora.trained.inverted import Classifier, Inverted, invert, unlikeness
from fedlora.trained.recycled import episode, nearest_prototype, prototypes, prototypical_loss, recycle
from tests.federation import run_locally, tiny, write_labels

FEW = {"rows": 6, "tokens": 4, "inversion_steps": 40, "steps": 30, "shots": 2, "rank": 2}


def toy(apart: float, seed: int = 0, size: int = 5) -> Inverted:
    """Rows of three classes around corners that lie `apart`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(8)
    points = apart * torch.eye(3, size)[labels] + 0.1 * torch.randn(len(labels), size, generator=generator)
    return Inverted(points, labels, len(labels))


def test_the_prototypical_loss_is_that_of_loops_and_0_where_classes_are_apart():
    for apart in (0.0, 0.3, 1.0):
        support, labels, queries, truth = episode([toy(apart)], 4, torch.Generator().manual_seed(1))
        total = 0.0
        for query, label in zip(queries.tolist(), truth.tolist(), strict=True):
            scores = []
            for each in range(3):
                rows = [row for row, own in zip(support.tolist(), labels.tolist(), strict=True) if own == each]
                center = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                scores.append(-sum((q - p) ** 2 for q, p in zip(query, center, strict=True)))
            total -= scores[label] - math.log(sum(map(math.exp, scores)))
        assert float(prototypical_loss(support, labels, queries, truth)) == pytest.approx(total / len(truth), rel=1e-5)
    losses = [
        float(prototypical_loss(*episode([toy(apart)], 4, torch.Generator().manual_seed(1))))
        for apart in (0.0, 1.0, 3.0, 6.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0.9
    assert losses[-1] < 1e-6


def test_an_episode_has_each_class_and_nothing_twice():
    found = [toy(1.0, seed) for seed in (0, 1)]
    generator = torch.Generator().manual_seed(0)
    pairs = set()
    for _ in range(20):
        support, labels, queries, truth = episode(found, 4, generator)
        assert torch.bincount(labels).tolist() == torch.bincount(truth).tolist() == [4, 4, 4]
        assert len(torch.cat([support, queries]).unique(dim=0)) == 24
        pairs.add(tuple(any(torch.equal(rows[0], row) for row in found[0].inputs) for rows in (support, queries)))
    assert len(pairs) == 4


def test_the_head_gives_the_probabilities_of_the_distances():
    made = toy(0.5)
    points = prototypes(made.inputs, made.labels)
    weight, bias = nearest_prototype(points)
    expected = (-torch.cdist(made.inputs, points).square()).softmax(dim=1)
    torch.testing.assert_close((made.inputs @ weight.T + bias).softmax(dim=1), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """Runs of two clients, each on its own domain."""
    folder = tmp_path_factory.mktemp("domains")
    rows = write_labels(folder / "labels.jsonl")
    made = []
    for part in (0, 1):
        config = tiny(
            folder,
            tiny_bert,
            run__id=f"part{part}",
            data__parts=f"{part} of 2",
            model__task="classification",
            data__source=str(rows),
            data__partition="natural",
            data__partition_by="domain",
            federation__clients=1,
            lora__target_modules="query,value",
            lora__ranks="2",
            train__lr=2e-2,
        )
        made.append((config, run_locally(config)[0]))
    yield rows, made
    adapted.forget()


def test_found_inputs_get_the_classes_that_were_asked_for(trained):
    config, folder = trained[1][0]
    model = adapted.adapted_model(config.model, config.lora)
    adapted.install(model, peft_files.read_adapter(folder / "adapter"))
    model.model.eval()
    classifier = Classifier(model)

    def found(steps: int) -> Inverted:
        generator = torch.Generator().manual_seed(0)
        return invert(classifier, classes=2, rows=8, tokens=5, steps=steps, generator=generator)

    made, blind = found(60), found(0)
    assert len(made.labels) == made.tried == 16
    assert len(blind.labels) < 16
    with torch.no_grad():
        logits, hidden = classifier(made.inputs)
        torch.testing.assert_close(logits, classifier.head(hidden))
    assert torch.equal(logits.argmax(dim=1), made.labels)
    free = (made.inputs - classifier.mean) / classifier.spread
    assert float(unlikeness(free)) < 0.5


def test_embeddings_of_real_tokens_are_read_as_the_tokens_themselves(trained):
    """With the tokenizer's own first and last tokens around them."""
    from tokenizers.processors import TemplateProcessing

    config, folder = trained[1][0]
    model = adapted.adapted_model(config.model, config.lora)
    adapted.install(model, peft_files.read_adapter(folder / "adapter"))
    tokenizer = model.base.tokenizer
    whole: Any = tokenizer.backend_tokenizer
    before = whole.post_processor
    whole.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("[CLS]", "[SEP]")]
    )
    try:
        classifier = Classifier(model)
        ids = tokenizer("ash good elm", return_tensors="pt")["input_ids"].to(model.base.device)
    finally:
        whole.post_processor = before
    table = model.model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        logits, _ = classifier(classifier.framed(table(ids[:, 1:-1]).float()))
        expected = model.model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected.float())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_loss_falls_and_the_result_is_a_classifier(trained, tmp_path, tiny_bert, quantization):
    folders = [folder for _, folder in trained[1]]
    if quantization == "nf4":
        folders = []
        for index, (config, folder) in enumerate(trained[1]):
            state = peft_files.read_adapter(folder / "adapter")
            about = json.loads((folder / "adapter" / "fedlora.json").read_text())
            about["config"] |= {"model.quantization": "nf4"}
            peft_files.save_checkpoint(state, tmp_path / f"nf4-{index}", config.model, about)
            folders.append(tmp_path / f"nf4-{index}")
    done = recycle(folders, tmp_path / "out", accept_inversion=True, **FEW)
    assert all(8 <= kept <= done.tried == 12 for kept in done.kept.values())
    assert done.last < done.first
    assert find(tmp_path / "out").config.model.quantization == quantization
    state = peft_files.read_adapter(tmp_path / "out")
    assert {factors.rank for factors in state.lora.values()} == {2}
    assert all(norm(factors) > 0 for factors in state.lora.values())
    again = recycle(folders, tmp_path / "again", accept_inversion=True, **FEW)
    assert again.last == done.last


def test_the_command_warns_and_what_it_writes_is_evaluated_and_given(
    trained, tmp_path, command, monkeypatch, tiny_bert
):
    rows, made = trained
    monkeypatch.chdir(tmp_path)
    words = [word for _, folder in made for word in ("--adapter", folder)]
    few = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, _, error = command("recycle", "one", *words, *few)
    assert code == 1
    assert "which is what federation protects" in error
    assert "add --accept-inversion if" in error
    assert not (tmp_path / "one").exists()
    code, said, error = command("recycle", "one", *words, *few, "--accept-inversion")
    assert code == 0
    assert "come close to what the clients' rows look like" in " ".join(error.split())
    assert "prototypical loss" in said
    about = json.loads((tmp_path / "one" / "fedlora.json").read_text())
    assert [each["of"] for each in about["made"]["from"]] == [12, 12]
    assert command("evaluate", "--adapter", "one")[0] == 0
    assert command("export", "one", "card")[0] == 0
    assert "may resemble the rows of their clients" in (tmp_path / "card" / "README.md").read_text()
    keys = {"lora__target_modules": "query,value", "model__task": "classification", "data__source": str(rows)}
    config = tiny(
        tmp_path,
        tiny_bert,
        **keys,
        data__partition="natural",
        data__partition_by="domain",
        federation__clients=2,
        lora__ranks="2",
        lora__init="given",
        lora__init_options="adapter=one",
        train__lr=0.0,
    )
    _, result = run_locally(config)
    assert result["rounds"][0]["heldout"]["loss"] != result["baseline"]["loss"]


def test_what_does_not_fit_is_refused(trained, tmp_path, tiny_llama, tiny_bert):
    _, made = trained
    folders = [folder for _, folder in made]

    def refused(given=folders, **numbers):
        recycle(given, tmp_path / "out", **{"accept_inversion": True, **FEW, **numbers})

    with pytest.raises(ConfigError, match="add --accept-inversion if"):
        refused(accept_inversion=False)
    with pytest.raises(ConfigError, match="1 adapter, expected at least 2"):
        refused(folders[:1])
    with pytest.raises(ConfigError, match="--tokens is 0, expected at least 1"):
        refused(tokens=0)
    with pytest.raises(ConfigError, match="--rows is 3, expected at least 4, twice --shots"):
        refused(rows=3)
    with pytest.raises(ConfigError, match="--tokens is 999, but the model has positions for at most"):
        refused(tokens=999)
    with pytest.raises(AdapterError, match="named twice"):
        refused([folders[0], folders[0]])
    with pytest.raises(AdapterError, match=r"of 4 inputs found for class \d get it, expected at least 4"):
        refused(rows=4, inversion_steps=1)
    config, folder = made[0]
    state = peft_files.read_adapter(folder / "adapter")
    about = json.loads((folder / "adapter" / "fedlora.json").read_text())
    fewer = type(state)(lora=dict([*state.lora.items()][:1]), tensors=state.tensors)
    peft_files.save_checkpoint(fewer, tmp_path / "fewer", config.model, about)
    with pytest.raises(AdapterError, match="fewer: other modules or tensors than those of"):
        refused([folder, tmp_path / "fewer"])
    llamas = [
        run_locally(tiny(tmp_path, tiny_llama, run__id=f"llama{seed}", run__seed=seed, federation__rounds=1))[0]
        for seed in (0, 1)
    ]
    with pytest.raises(ConfigError, match=r"model\.task = causal-lm, expected classification"):
        refused(llamas)
    assert not (tmp_path / "out").exists()
