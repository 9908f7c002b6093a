"""Base models: found or refused with a reason, told apart by content, quantized once, frozen."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

from fedlora.common.assets import cache_dir
from fedlora.common.errors import ModelError
from fedlora.config import ModelConfig
from fedlora.models import (
    base_fingerprint,
    fingerprint,
    first_head,
    head_shapes,
    load_base,
    meta_model,
    pick_device,
    pick_dtype,
    resolve,
)
from fedlora.models.base import mended, probe
from fedlora.models.base import quantized as quantized_module
from fedlora.models.base.fingerprint import remembered_fingerprint
from fedlora.models.base.read import quiet
from tests.device import DEVICE, bound, model_config, on_device
from tests.tiny import save_llama

TOKENS = on_device(torch.arange(24).reshape(2, 12))
LINEAR = {"none": nn.Linear, "int8": Linear8bitLt, "nf4": Linear4bit}


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


def config(folder: Path, **fields: object) -> ModelConfig:
    return replace(model_config(folder), **fields)  # pyright: ignore[reportArgumentType]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.cpu()


def model_of(settings: ModelConfig) -> Any:
    return load_base(settings).model


def rewrite(folder: Path, change: str) -> None:
    """Changes one element of one tensor."""
    weights = load_file(folder / "model.safetensors")
    weights[change].view(-1)[-1] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 9])
def test_the_padding_that_a_first_pass_looks_at_fits_a_text_of_any_length(tiny_llama: Path, tokens: int) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.arange(10, 10 + tokens)[None]
    wide = probe._with_a_longer_row(model, tokenizer, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert wide["input_ids"].shape == wide["attention_mask"].shape == (2, tokens + 5)
    assert wide["attention_mask"].sum(dim=1).tolist() == [tokens, tokens + 5]
    assert wide["input_ids"][0, tokens:].tolist() == [tokenizer.pad_token_id] * 5


# --- fingerprint


def test_a_remembered_fingerprint_reads_no_weights_until_they_change(
    copy: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = remembered_fingerprint(copy)
    assert first == fingerprint(copy)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["fedlora.models.base.fingerprint"], "mmap", None)
        assert remembered_fingerprint(copy) == first
    rewrite(copy, "model.norm.weight")
    assert remembered_fingerprint(copy) == fingerprint(copy) != first


def test_fingerprint_follows_the_content_not_the_place(tiny_llama: Path, copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings |= {
        "transformers_version": "4.0.0",
        "_name_or_path": "/elsewhere",
        "dtype": "bfloat16",
        "use_cache": False,
    }
    (copy / "config.json").write_text(json.dumps(settings))
    assert fingerprint(copy) == fingerprint(tiny_llama)
    assert len(fingerprint(copy)) == 16


def test_fingerprint_sees_every_tensor(tiny_llama: Path, tmp_path: Path) -> None:
    names = list(load_file(tiny_llama / "model.safetensors"))
    prints = {fingerprint(tiny_llama)}
    for index, name in enumerate(names):
        folder = shutil.copytree(tiny_llama, tmp_path / str(index))
        rewrite(folder, name)
        prints.add(fingerprint(folder))
    assert len(prints) == len(names) + 1


def test_fingerprint_sees_large_tensors_change(copy: Path) -> None:
    large = {"matrix": torch.randn(300, 400), "vector": torch.randn(40_000), "scalar": torch.tensor(1.0)}
    prints = set()
    for name in [None, *large]:
        changed = {key: value * 1.01 if key == name else value for key, value in large.items()}
        save_file(changed, copy / "model.safetensors")
        prints.add(fingerprint(copy))
    assert len(prints) == 4


def test_fingerprint_of_shards_is_that_of_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with quiet():
        model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path) == fingerprint(tiny_llama)
    assert resolve(str(tmp_path)) == tmp_path


def test_fingerprint_sees_the_architecture(tiny_llama: Path, copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"num_key_value_heads": 4}))
    assert fingerprint(copy) != fingerprint(tiny_llama)


# --- resolve


def test_misspelt_packaged_name() -> None:
    with pytest.raises(ModelError, match=r"'smollm2-135m-instrct' is no .*; did you mean 'smollm2-135m-instruct'"):
        resolve("smollm2-135m-instrct")


def test_no_such_folder() -> None:
    with pytest.raises(ModelError, match=r"'\./nowhere': no such file or folder"):
        resolve("./nowhere")


def test_hub_out_of_reach() -> None:
    with pytest.raises(ModelError, match=r"the hub cannot be reached .*; check the network"):
        resolve("some-owner/some-model")


def test_revision_of_a_folder(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"model.revision = 'main' is only for hub ids"):
        resolve(str(tiny_llama), "main")


def test_folder_without_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        resolve(str(copy))


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model.safetensors, expected"):
        resolve(str(copy))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin: pickled weights are not loaded.*convert"):
        resolve(str(copy))


def test_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    with pytest.raises(ModelError, match=r"lacks model-1-of-2.safetensors"):
        resolve(str(copy))


def test_quantized_source_is_refused(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelError, match="already quantized; use the full-precision model"):
        resolve(str(copy))


def test_broken_gguf(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(64))
    with pytest.raises(ModelError, match=r"broken.gguf cannot be converted"):
        resolve(str(tmp_path / "broken.gguf"))
    assert not [p for p in (own_cache / "models").iterdir() if p.is_dir()]


# --- devices


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ModelError, match="'gpu' is not a device"):
        pick_device("gpu")
    with pytest.raises(ModelError, match=r"'cuda:99', but torch .* sees \d+ CUDA devices"):
        pick_device("cuda:99")


def test_dtypes() -> None:
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bf16", torch.device("cpu")) == torch.bfloat16


# --- loading


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_every_linear_is_of_its_kind_and_frozen(
    tiny_llama: Path, tiny_bert: Path, own_cache: Path, quantization: str, task: str
) -> None:
    folder = tiny_llama if task == "causal-lm" else tiny_bert
    base = load_base(config(folder, quantization=quantization, task=task, labels=3))
    kept = "lm_head" if task == "causal-lm" else ("classifier", "bert.pooler")
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear):
            assert type(module) is (nn.Linear if name.startswith(kept) else LINEAR[quantization]), name
    assert base.heads == (() if task == "causal-lm" else ("classifier",))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.model.config.use_cache is False
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id is not None
    assert base.fingerprint == fingerprint(folder)
    assert logits(base.model).shape == ((2, 12, len(base.tokenizer)) if task == "causal-lm" else (2, 3))


def test_unquantized_logits_are_those_of_transformers(tiny_llama: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).to(DEVICE)
    assert torch.equal(logits(load_base(config(tiny_llama)).model), logits(plain))


def test_tied_embeddings_are_one_tensor(tiny_llama: Path, own_cache: Path) -> None:
    for quantization in ("none", "nf4", "nf4"):
        model = model_of(config(tiny_llama, quantization=quantization))
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quantized_copy_is_bit_equal(tiny_llama: Path, own_cache: Path, quantization: str, dtype: str) -> None:
    settings, said = config(tiny_llama, quantization=quantization, compute_dtype=dtype), []
    first = load_base(settings, said.append)
    assert said == [f"quantizing {tiny_llama} to {quantization}, once"]
    second = load_base(settings, said.append)
    assert len(said) == 1
    left, right = first.model.state_dict(), second.model.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
        assert tensor.dtype == right[name].dtype, name
    assert torch.equal(logits(first.model), logits(second.model))


def test_later_loads_read_the_quantized_copy_alone(
    tiny_llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tiny_llama, quantization="nf4")
    load_base(settings)
    folders: list[Path] = []
    weights = quantized_module.read.weights

    def watched(recipe, folder, *args, **kwargs):
        folders.append(folder)
        return weights(recipe, folder, *args, **kwargs)

    monkeypatch.setattr(quantized_module.read, "weights", watched)
    load_base(settings)
    assert [folder.parent for folder in folders] == [own_cache / "quantized"]


@pytest.mark.parametrize("damage", ["cut", "lacking", "other version", "no record"])
def test_damaged_copy_is_made_anew(tiny_llama: Path, own_cache: Path, damage: str) -> None:
    settings, said = config(tiny_llama, quantization="nf4"), []
    expected = logits(load_base(settings, said.append).model)
    (saved,) = (path for path in (own_cache / "quantized").iterdir() if path.is_dir())
    weights = saved / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "lacking":
        save_file({"model.norm.weight": torch.ones(32)}, weights, metadata={"format": "pt"})
    elif damage == "other version":
        (saved / "made_by.json").write_text('{"bitsandbytes": "0.1", "transformers": "5.0"}')
    else:
        (saved / "made_by.json").unlink()
    assert torch.equal(logits(load_base(settings, said.append).model), expected)
    assert len(said) == 2
    load_base(settings, said.append)
    assert len(said) == 2


def test_each_setting_has_its_own_copy(tiny_llama: Path, tiny_bert: Path, own_cache: Path) -> None:
    for settings in (
        config(tiny_llama, quantization="nf4"),
        config(tiny_llama, quantization="nf4", compute_dtype="bf16"),
        config(tiny_llama, quantization="int8"),
        config(tiny_bert, quantization="nf4", task="classification", labels=2),
        config(tiny_bert, quantization="nf4", task="classification", labels=3),
    ):
        load_base(settings)
    assert len([path for path in (cache_dir() / "quantized").iterdir() if path.is_dir()]) == 5


def test_quantized_weights_are_close(tiny_llama: Path, own_cache: Path) -> None:
    exact = logits(load_base(config(tiny_llama)).model)
    errors = {
        quantization: float(
            (logits(load_base(config(tiny_llama, quantization=quantization)).model) - exact).norm() / exact.norm()
        )
        for quantization in ("int8", "nf4")
    }
    assert 0 < errors["int8"] < errors["nf4"] < 0.5


def test_evaluation_leaves_nf4_weights_as_they_are(
    tiny_llama: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a CPU has AVX512-BF16, bitsandbytes would repack them, and gradients would end there."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    model = model_of(config(tiny_llama, quantization="nf4"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = model.model.layers[0].mlp.up_proj.weight
    layout = packed.data.clone()
    logits(model)
    assert torch.equal(packed.data, layout)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_gradients_reach_the_input(tiny_llama: Path, own_cache: Path, quantization: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = model_of(config(tiny_llama, quantization=quantization, gradient_checkpointing=checkpointing))
        model.train()
        assert model.is_gradient_checkpointing is checkpointing
        embedded = model.get_input_embeddings()(TOKENS).requires_grad_()
        model(inputs_embeds=embedded, labels=TOKENS).loss.backward()
        grads.append(embedded.grad)
    assert grads[0].abs().min(dim=-1).values.max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=bound(1.3e-6), atol=bound(1e-5))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_head_is_fp32_and_the_same_everywhere(tiny_bert: Path, own_cache: Path, quantization: str, dtype: str) -> None:
    settings = config(tiny_bert, task="classification", labels=4, quantization=quantization, compute_dtype=dtype)
    torch.manual_seed(5)
    first = model_of(settings)
    following = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), following)  # loading takes none of the caller's random numbers
    second = model_of(settings)
    head = first.get_submodule("classifier")
    assert torch.equal(head.weight, second.get_submodule("classifier").weight)
    assert head.weight.dtype == torch.float32
    assert logits(first).dtype == torch.float32
    head.requires_grad_(True)
    first.train()
    first(input_ids=TOKENS, labels=on_device(torch.tensor([0, 3]))).loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_a_body_alone_is_no_causal_lm(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="weights that causal-lm needs, such as cls"):
        load_base(config(tiny_bert))


def test_missing_layer(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights that causal-lm needs, such as model.layers.1.self_attn.q_p"):
        load_base(config(copy))


def test_unknown_architecture(copy: Path) -> None:
    (copy / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(ModelError, match=r"cannot be loaded for model.task = 'causal-lm': .*no-such-thing"):
        load_base(config(copy))


def test_pad_token_is_made_of_the_end_token(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_base(config(copy)).tokenizer.pad_token == "<|im_end|>"


def test_nothing_is_printed(
    tiny_llama: Path,
    tiny_bert: Path,
    own_cache: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for settings in (
        config(tiny_llama, quantization="nf4"),
        config(tiny_llama, quantization="int8"),
        config(tiny_bert, task="classification"),
    ):
        logits(load_base(settings).model)
        logits(load_base(settings).model.train())
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_meta_model_has_the_names_and_shapes(tiny_llama: Path, tiny_bert: Path, task: str) -> None:
    settings = config(tiny_llama if task == "causal-lm" else tiny_bert, task=task, labels=5)
    meta, loaded = meta_model(settings), load_base(settings).model
    assert all(parameter.device.type == "meta" for parameter in meta.parameters())
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in loaded.named_parameters()}
    assert [name for name, _ in meta.named_modules()] == [name for name, _ in loaded.named_modules()]


def test_base_fingerprint_needs_no_load_and_follows_the_files(copy: Path) -> None:
    assert base_fingerprint(config(copy)) == fingerprint(copy)
    rewrite(copy, "model.norm.weight")
    assert base_fingerprint(config(copy)) == fingerprint(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"the model's files are no longer there: .*model.safetensors"):
        base_fingerprint(config(copy))


def test_seed_makes_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    with quiet():
        assert fingerprint(save_llama(tmp_path, seed=1)) != fingerprint(tiny_llama)


def test_weights_that_change_in_place_are_quantized_anew(copy: Path, own_cache: Path) -> None:
    """One element of a row that no sample of rows would hold, and the time of change set back to what it was."""
    settings = config(copy, quantization="nf4")
    before = model_of(settings)
    path, stamp = copy / "model.safetensors", (copy / "model.safetensors").stat()
    weights = load_file(path)
    weights["model.layers.0.mlp.up_proj.weight"][5] *= 30
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = model_of(settings)
    assert not torch.equal(logits(before), logits(after))
    plain = logits(model_of(config(copy)))
    assert float((logits(after) - plain).norm() / plain.norm()) < 0.5


@pytest.mark.parametrize("damage", ["short", "header", "cut"])
def test_a_damaged_file_is_named(copy: Path, own_cache: Path, damage: str) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"short": data[:5], "header": data[:8] + b"?" + data[9:], "cut": data[:-100]}[damage])
    with pytest.raises(ModelError, match=r"model.safetensors: the file is (cut off|damaged): .*; copy it again"):
        load_base(config(copy))


# --- a classifier's head


@pytest.fixture
def classifier(tiny_bert: Path, tmp_path: Path) -> Path:
    """A folder with a trained head of three classes: it has learned by far more than a fresh one could know."""
    folder = shutil.copytree(tiny_bert, tmp_path / "classifier")
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    with torch.no_grad():
        model.classifier.weight.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(7)) * 3)
        model.classifier.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    with quiet():
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_trained_head_is_kept(classifier: Path, own_cache: Path, quantization: str) -> None:
    settings = config(classifier, task="classification", labels=3, quantization=quantization)
    base = load_base(settings)
    assert base.head == "the model's own head: 3 classes, bad, so-so, good"
    if quantization == "none":
        plain = AutoModelForSequenceClassification.from_pretrained(classifier).to(DEVICE)
        torch.testing.assert_close(logits(base.model), logits(plain))
    started, words = first_head(settings, head_shapes(meta_model(settings), base.heads))
    assert words == base.head
    found = dict(base.model.named_parameters())
    assert all(torch.equal(found[name].cpu(), value) for name, value in started.items())
    assert float(started["classifier.bias"][1]) == -2.0


@pytest.mark.parametrize(
    ("labels", "head", "words"),
    [
        (3, "fresh", "a fresh head: model.head = 'fresh'"),
        (2, "keep", r"a fresh head: classifier.weight of the model's own is \(3, 32\), and model.labels = 2"),
    ],
)
def test_a_head_that_is_not_wanted_or_does_not_fit_is_fresh(
    classifier: Path, own_cache: Path, labels: int, head: str, words: str
) -> None:
    settings = config(classifier, task="classification", labels=labels, head=head)
    base = load_base(settings)
    assert re.fullmatch(words, base.head)
    weight = base.model.get_submodule("classifier").weight
    assert weight.shape == (labels, 32)
    assert 0.01 < float(weight.std()) < 0.04  # N(0, 0.02^2); the trained one's is 3
    assert not base.model.get_submodule("classifier").bias.any()
    assert first_head(settings, head_shapes(meta_model(settings), base.heads)) == ({}, base.head)


def test_a_body_gets_a_fresh_head_and_a_part_of_a_head_is_none(
    tiny_bert: Path, classifier: Path, own_cache: Path
) -> None:
    assert load_base(config(tiny_bert, task="classification")).head == "a fresh head: the model has none"
    weights = load_file(classifier / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, classifier / "model.safetensors", metadata={"format": "pt"})
    base = load_base(config(classifier, task="classification", labels=3))
    assert base.head == "a fresh head: the model's own lacks classifier.bias"


def test_weights_of_other_shapes_than_the_config_are_refused(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"intermediate_size": 48}))
    with pytest.raises(
        ModelError, match=r"6 weights in .* have other shapes than its config.json says, such as .*down_"
    ):
        load_base(config(copy))


# --- tokens


def with_tokens(folder: Path, more: list[str], pad: str | None = None) -> Path:
    """The same model with tokens that its embeddings have no rows for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(more)
    if pad:
        tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pad_token_without_an_embedding_gives_way_to_the_end_token(copy: Path) -> None:
    said: list[str] = []
    base = load_base(config(with_tokens(copy, ["[PAD]"], "[PAD]")), said.append)
    assert base.tokenizer.pad_token == "<|im_end|>"
    assert said == [f"{copy}: its pad token '[PAD]' has no embedding; batches are filled with '<|im_end|>'"]
    assert torch.isfinite(base.model(input_ids=on_device(torch.tensor([[9, base.pad_id]]))).logits).all()


def test_other_tokens_without_an_embedding_are_refused(copy: Path) -> None:
    with pytest.raises(
        ModelError, match=r"has 2 tokens beyond the 260 rows of its embeddings, such as 'one' = 260; use"
    ):
        load_base(config(with_tokens(copy, ["one", "two"])))


# --- real models


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_smollm2_answers(quantization: str) -> None:
    base = load_base(ModelConfig(quantization=quantization, device=str(DEVICE)))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer: Any = base.tokenizer
    model: Any = base.model
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(DEVICE)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.slow
def test_minilm_classifies() -> None:
    settings = ModelConfig(name="minilm-l6", task="classification", labels=2, device=str(DEVICE))
    base = load_base(settings)
    inputs = base.tokenizer(["a fine film", "dull"], padding=True, return_tensors="pt").to(DEVICE)
    with torch.no_grad():
        assert base.model(**inputs).logits.shape == (2, 2)
    assert base.heads == ("classifier",)


@pytest.mark.parametrize("shape", [(32, 32), (16, 32), (64, 96), (96, 48), (10, 100), (7, 46), (5, 33), (32, 64)])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_weights_of_every_width_are_read_by_the_papers_table(shape: tuple[int, int], nested: bool) -> None:
    """bitsandbytes' kernel for AVX512 takes scales from other blocks where a row is no multiple of one."""
    mended.mend()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    scales = state.absmax
    if nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()[: weight.numel()]
    each = scales.float().repeat_interleave(state.blocksize)[: len(codes)]
    expected = (bnb.functional.get_4bit_type("nf4", device="cpu")[codes] * each).reshape(shape)
    torch.testing.assert_close(bnb.functional.dequantize_4bit(packed, state), expected, rtol=1e-5, atol=1e-6)
    assert float((expected - weight).norm() / weight.norm()) < 0.12
    layer = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=nested
    )
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    x = torch.randn(3, shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, expected.sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_int8_takes_inputs_of_four_axes_as_it_takes_their_rows(device: torch.device) -> None:
    mended.mend_int8()
    layer = bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(16, 32), "bias": torch.randn(16)})
    layer = layer.to(device)
    x = torch.randn(2, 3, 5, 32, device=device)
    torch.testing.assert_close(layer(x), layer(x.reshape(30, 32)).reshape(2, 3, 5, 16))
