"""`fedlora merge`: adapters of similar tasks, weighted by their texts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedlora.adapters import delta
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import adapted, peft_files
from fedlora.models.base.read import quiet
from fedlora.trained.embedding import embed
from fedlora.trained.merged import merge_by_text, weighted_sum, weights
from tests.federation import run_locally, tiny

TEXTS = ["names of trees in a forest", "letters and numbers", "the prices of ships"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tiny_llama):
    """Three runs of unequal ranks, on one base."""
    made = []
    for seed, ranks in enumerate(("4,2", "3", "1,2")):
        config = tiny(
            tmp_path_factory.mktemp("expert"),
            tiny_llama,
            run__seed=seed,
            lora__ranks=ranks,
            train__lr=2e-2,
            strategy__name="flora",
            evaluate__server=False,
        )
        made.append(run_locally(config)[0])
    yield made
    adapted.forget()


def test_one_alone_is_the_expert_itself(experts, tmp_path, tiny_bert):
    states = [peft_files.read_adapter(folder / "adapter") for folder in experts]
    found = merge_by_text(experts, TEXTS, TEXTS[1], tmp_path / "out", top=1, encoder=str(tiny_bert))
    assert [(expert.text, expert.weight) for expert in found] == [(TEXTS[1], 1.0), *[(e.text, 0.0) for e in found[1:]]]
    assert found[0].cosine == pytest.approx(1.0)
    alone = weighted_sum(states, [0.0, 1.0, 0.0])
    for name, factors in states[1].lora.items():
        assert torch.equal(delta(alone.lora[name]), delta(factors))
    written = peft_files.read_adapter(tmp_path / "out")
    for name, factors in states[1].lora.items():
        torch.testing.assert_close(delta(written.lora[name]), delta(factors), rtol=1e-4, atol=1e-6)


def test_the_merged_update_is_the_weighted_sum_and_plain_peft_reads_it(experts, tmp_path, tiny_bert, tiny_llama):
    out = tmp_path / "out"
    found = {
        e.adapter.parent: e
        for e in merge_by_text(experts, TEXTS, "ash and elm", out, top=2, temperature=0.3, encoder=str(tiny_bert))
    }
    shares = [found[folder.resolve()].weight for folder in experts]
    assert sorted(shares)[0] == 0.0
    assert sum(shares) == pytest.approx(1.0)
    states = [peft_files.read_adapter(folder / "adapter") for folder in experts]
    written = peft_files.read_adapter(out)
    for name in written.lora:
        expected = sum(share * delta(state.lora[name]).double() for share, state in zip(shares, states, strict=True))
        torch.testing.assert_close(delta(written.lora[name]).double(), expected, rtol=1e-4, atol=1e-6)
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, str(out))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    torch.testing.assert_close(
        layer.get_delta_weight("default"), delta(written.lora["model.layers.0.self_attn.q_proj"]), rtol=1e-4, atol=1e-6
    )
    about = json.loads((out / "fedlora.json").read_text())
    assert [each["weight"] for each in about["made"]["from"]] == pytest.approx(shares)


def test_a_rank_keeps_the_best_approximation(experts, tmp_path, tiny_bert):
    whole, two = tmp_path / "whole", tmp_path / "two"
    for out, rank in ((whole, 0), (two, 2)):
        merge_by_text(experts, TEXTS, "anything", out, rank=rank, encoder=str(tiny_bert))
    sums, cut = peft_files.read_adapter(whole), peft_files.read_adapter(two)
    for name, factors in sums.lora.items():
        u, s, vh = torch.linalg.svd(delta(factors).double())
        best = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
        torch.testing.assert_close(delta(cut.lora[name]).double(), best, rtol=1e-4, atol=1e-6)
        assert factors.rank > 2 >= cut.lora[name].rank


def test_weights_are_a_softmax_over_the_nearest():
    found = weights([0.1, 0.7, 0.5, 0.6], 2, 0.1)
    assert found[0] == found[2] == 0.0
    assert found[1] / found[3] == pytest.approx(math.exp(1.0))
    assert sum(weights([0.1, 0.7, 0.5], 9, 1.0)) == pytest.approx(1.0)
    assert weights([0.5, 0.5, 0.4], 1, 0.1) == [1.0, 0.0, 0.0]


def test_texts_are_the_means_over_their_tokens_whatever_stands_beside_them(tiny_bert):
    alone, beside = embed(["ash"], str(tiny_bert)), embed(["ash", "a much longer text about birches"], str(tiny_bert))
    torch.testing.assert_close(alone[0], beside[0])
    assert beside.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_the_command_prints_who_weighs_what_and_a_run_starts_from_it(
    experts, tmp_path, tiny_bert, tiny_llama, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = [
        word for folder, text in zip(experts, TEXTS, strict=True) for word in ("--adapter", folder, "--text", text)
    ]
    code, said, _ = command("merge", "start", *words, "--for", TEXTS[2], "--encoder", tiny_bert, "--top", 2)
    assert code == 0
    rows = [line for line in said.splitlines() if any(text in line for text in TEXTS) and "│" in line]
    assert "1.0000" in rows[0]
    assert rows[-1].rstrip("│ ").endswith("0.0000")
    _, result = run_locally(
        tiny(tmp_path, tiny_llama, lora__init="given", lora__init_options="adapter=start", train__lr=0.0)
    )
    assert result["rounds"][0]["heldout"]["loss"] != result["baseline"]["loss"]
    assert command("export", "start", "card")[0] == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "not trained, but merged from trained adapters" in card
    code, _, error = command("merge", "start", *words, "--for", "x", "--encoder", tiny_bert)
    assert code == 1
    assert "exists already and is not empty" in error


def test_without_texts_the_record_says_what_the_task_was(experts, tmp_path, tiny_bert):
    found = merge_by_text(experts, [], "anything", tmp_path / "out", encoder=str(tiny_bert))
    assert {expert.text for expert in found} == {"tiny: causal lm on rows"}


def test_what_does_not_fit_is_refused(experts, tmp_path, tiny_bert, tiny_llama):
    def merge(adapters=experts, texts=TEXTS, task="x", **options):
        return merge_by_text(adapters, texts, task, tmp_path / "out", encoder=str(tiny_bert), **options)

    with pytest.raises(ConfigError, match="3 adapters and 2 texts"):
        merge(texts=TEXTS[:2])
    with pytest.raises(ConfigError, match="a text that describes a task is empty"):
        merge(task=" ")
    with pytest.raises(ConfigError, match=r"the temperature is 0\.0, expected a number above 0"):
        merge(temperature=0.0)
    with pytest.raises(ConfigError, match="the number of adapters to merge is 0"):
        merge(top=0)
    with pytest.raises(AdapterError, match="named twice"):
        merge(adapters=[experts[0], experts[0]], texts=[])
    other = tmp_path / "other"
    about = json.loads((experts[0] / "adapter" / "fedlora.json").read_text())
    state = peft_files.read_adapter(experts[0] / "adapter")
    model = tiny(tmp_path, tiny_llama).model
    peft_files.save_checkpoint(state, other, model, about | {"base": "another"})
    with pytest.raises(AdapterError, match=r"other: the base model is another, and that of"):
        merge(adapters=[experts[0], other], texts=[])
    heads = [replace(state, tensors={"head": torch.zeros(size)}) for size in (2, 3)]
    with pytest.raises(AdapterError, match="tensors trained in full"):
        weighted_sum(heads, [0.5, 0.5])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_packaged_encoder_tells_tasks_apart():
    new, *others = embed(
        ["ratings of novels", "reviews of books and films", "weather forecasts for sailors", "python programs"]
    )
    cosines = [float(new @ other) for other in others]
    assert cosines[0] == max(cosines)
    assert cosines[0] > 0.3 + max(cosines[1:])
