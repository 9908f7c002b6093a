"""Many adapters in one pass, against one pass each."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from fedlora.data import Example
from fedlora.models import load_base
from fedlora.tasks.base import Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.scores import scores
from fedlora.trained import mixed
from fedlora.trained.evaluate import titles
from fedlora.trained.mixed import BASE, one_by_one, predict_many, unmixable
from tests.device import DEVICE, bound, model_config

RANKS = (2, 5, 1)


def with_adapters(folder: Path, targets: list[str], quantization: str = "none", task: str = "causal-lm") -> PeftModel:
    """Three adapters of unequal ranks that change the base much, and their own heads."""
    base = load_base(model_config(folder, quantization=quantization, task=task))
    torch.manual_seed(0)
    model: PeftModel | None = None
    for index, rank in enumerate(RANKS):
        heads = list(base.heads) or None
        config = LoraConfig(r=rank, target_modules=targets, modules_to_save=heads, init_lora_weights=False)
        if model is None:
            model = get_peft_model(base.model, config, adapter_name=f"adapter{index}")
        else:
            model.add_adapter(f"adapter{index}", config)
    assert isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    return model


def examples(task: str, count: int = 7) -> list[Example]:
    g = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(5, 200, (4 + index,), generator=g).tolist()
        made.append(
            Example({"input_ids": ids, "labels": index % 2 if task == "classification" else [-100, -100, *ids[2:]]})
        )
    return made


def compare(task: Task, model: PeftModel, data: list[Example], batch_size: int, tolerance: float) -> None:
    names = [BASE, *(f"adapter{index}" for index in range(len(RANKS)))]
    told = []
    got = predict_many(
        task,
        model,
        names,
        data,
        batch_size=batch_size,
        pad_id=3,
        on_batch=lambda done, total: told.append((done, total)),
    )
    alone = one_by_one(task, model, names, data, batch_size=batch_size, pad_id=3)
    for name in names:
        mine, theirs = (p.rows.argsort(stable=True) for p in (got[name], alone[name]))
        for column in ("rows", "targets"):
            assert torch.equal(getattr(got[name], column)[mine], getattr(alone[name], column)[theirs])
        for column in ("losses", "probabilities"):
            left, right = getattr(got[name], column)[mine], getattr(alone[name], column)[theirs]
            assert torch.allclose(left, right, atol=tolerance, rtol=tolerance)
    losses = [scores(task, got[name])["loss"] for name in names]
    assert len({round(loss, 3) for loss in losses}) == len(names)  # else the test could not tell them apart
    assert told[-1] == (len(names) * len(data),) * 2


@pytest.mark.parametrize("batch_size", [1, 3, 9, 64])
def test_one_pass_equals_a_pass_each(tiny_llama, batch_size):
    model = with_adapters(tiny_llama, ["q_proj", "v_proj", "down_proj"])
    compare(CausalLM(), model, examples("causal-lm"), batch_size, bound(2e-5))


def test_one_pass_equals_a_pass_each_on_a_4_bit_base(tiny_llama):
    model = with_adapters(tiny_llama, ["q_proj", "v_proj"], "nf4")
    compare(CausalLM(), model, examples("causal-lm"), 8, 1e-3)


def test_classifiers_with_their_own_heads_are_mixed(tiny_bert):
    model = with_adapters(tiny_bert, ["query", "value"], task="classification")
    assert unmixable(Classification(), model) == ""
    compare(Classification(), model, examples("classification"), 6, bound(2e-5))


def test_a_head_that_peft_cannot_mix_takes_turns(caplog):
    config = RobertaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    base = RobertaForSequenceClassification(config).to(DEVICE)
    lora = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(base, lora, adapter_name="adapter0")
    with caplog.at_level("INFO", logger="fedlora"):
        got = predict_many(
            Classification(), model, [BASE, "adapter0"], examples("classification"), batch_size=4, pad_id=1
        )
    assert "one after another: PEFT cannot mix batches in" in caplog.text
    assert got.keys() == {BASE, "adapter0"}


def test_the_model_is_left_as_it_was(tiny_llama):
    model = with_adapters(tiny_llama, ["q_proj"])
    model.train()
    model.set_adapter("adapter1")
    for run in (predict_many, mixed.one_by_one):
        run(CausalLM(), model, [BASE, "adapter0"], examples("causal-lm"), batch_size=4, pad_id=3)
        assert model.training
        assert model.active_adapter == "adapter1"


def test_adapters_are_called_by_what_differs():
    assert titles([Path("x/adapter")]) == ["with the adapter"]
    assert titles([Path("runs/a/1/adapter"), Path("runs/b/1/adapter")]) == ["a", "b"]
    assert titles([Path("runs/a/1/adapter"), Path("runs/a/2/adapter")]) == ["1", "2"]
    assert titles([Path("a"), Path("a/b")]) == ["a", "b"]
