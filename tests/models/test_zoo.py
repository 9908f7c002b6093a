"""Every architecture of the zoo through the product's own code: measured, trained, saved, merged; or refused by name.

References are transformers and PEFT alone, on the folder as it was saved.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.training import trainer
from fedlora.common.errors import ModelError
from fedlora.config import Config, TrainConfig, parse
from fedlora.data import LazyExamples
from fedlora.models import adapted, fresh_head, injection, load_base, peft_files
from fedlora.models.base.limits import longest
from fedlora.models.base.read import quiet
from fedlora.tasks.base import Task
from fedlora.tasks.checked import mean_loss
from fedlora.tasks.predict import evaluate, predict
from fedlora.trained import evaluate as checkpoint_scores
from fedlora.trained import export
from tests.device import COMPUTE_DTYPE, DEVICE, bound, on_device
from tests.models import zoo
from tests.models.zoo import CAUSAL, CLASSIFIERS, Species

# PEFT sees from the layers that GPT-2's weights are transposed, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

TEXTS = ["ash", "a birch and", "cedars, elms, firs", "hazel under larch and oak"]
# Each much like another of the zoo.
ALIKE = {
    *("gpt-bigcode", "codegen", "qwen3-moe", "olmoe", "xglm", "biogpt", "glm4", "recurrent-gemma", "mamba2"),
    *("deberta", "mpnet", "longformer", "funnel"),
}
QUANTIZED = ["llama", "gpt2", "mixtral", "phi3", "mamba", "rwkv", "gemma3-images", "deepseek-v3"]
QUANTIZED_CLASSIFIERS = ["bert", "bart", "modernbert", "albert"]


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zoo")


def folder_of(species: Species, name: str, folders: Path) -> Path:
    folder = folders / species.task / name
    if not folder.exists():
        with quiet():
            zoo.save(species, folder)
    return folder


def config_of(folder: Path, species: Species, **keys: Any) -> Config:
    base = {
        "model.name": str(folder),
        "model.task": species.task,
        "model.quantization": "none",
        "model.device": str(DEVICE),
        "model.compute-dtype": COMPUTE_DTYPE,
        "lora.target-modules": "auto",
        "data.form": "text" if species.task == "causal-lm" else "label",
    }
    return parse(base | {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()})


@dataclass
class Trained:
    """What the product makes of a species.

    Attributes:
        before: each example's loss alone, with random factors in place.
        after: the same after one step.
        adapter: after that step.
        logits: of all examples in one batch, with that adapter.
    """

    config: Config
    bench: adapted.AdaptedModel
    examples: LazyExamples
    before: list[float]
    after: list[float]
    adapter: AdapterState
    logits: Tensor


def train(config: Config) -> Trained:
    """One step with random factors, after the checks that go for every architecture on the way."""
    shapes = injection.shapes(config.model, config.lora)
    bench = adapted.adapted_model(config.model, config.lora)
    assert shapes.lora == {name: (layer.out_features, layer.in_features) for name, layer in bench.layers.items()}
    rows = Dataset.from_list([{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)])
    examples = LazyExamples(rows, bench.base.tokenizer, config.data, bench.task)
    parameters = adapted.install(bench, drawn(shapes), "AB")
    pad = bench.base.pad_id
    close = 5e-2 if config.model.quantization == "int8" else bound(5e-5)  # int8 rounds activations too
    before = [evaluate(bench.task, bench.model, [one], 1, pad)["loss"] for one in examples]

    found = predict(bench.task, bench.model, examples, len(examples), pad)
    padded = [float(found.losses[found.rows == row].mean()) for row in range(len(examples))]
    assert padded == pytest.approx(before, abs=close)  # padding is not seen, and nothing stays of another batch

    bench.model.train()
    trained = [float(mean_loss(bench.task, bench.model, bench.task.collate([one], pad)).detach()) for one in examples]
    assert trained == pytest.approx(before, abs=close)  # as no dropout is there

    settings = TrainConfig(steps=1, batch_size=len(examples), lr=1e-2)
    trainer.train(bench.task, bench.model, parameters, examples, settings, pad_id=pad, number=1, rounds=1, seed=0)
    bench.model.eval()
    after = [evaluate(bench.task, bench.model, [one], 1, pad)["loss"] for one in examples]
    return Trained(
        config, bench, examples, before, after, adapted.read(bench), logits(bench.task, bench.model, examples, pad)
    )


def drawn(shapes: injection.Shapes) -> AdapterState:
    """Random factors of rank 2, none of them zero, and a head."""
    g = torch.Generator().manual_seed(1)
    lora = {
        name: LoraFactors(
            A=torch.randn(2, d_in, generator=g) * 0.2, B=torch.randn(d_out, 2, generator=g) * 0.2, scaling=1.0
        )
        for name, (d_out, d_in) in shapes.lora.items()
    }
    return AdapterState(lora=lora, tensors=fresh_head(shapes.tensors, 1))


def logits(task: Task, model: Any, examples: LazyExamples, pad: int) -> Tensor:
    """Of all examples in one batch; of a causal model where no padding is."""
    batch = task.collate(list(examples), pad)
    inputs = on_device({name: batch[name] for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        found = model.eval()(**inputs).logits.cpu()
    return found if found.ndim == 2 else found[batch["attention_mask"].bool()]


def plain(folder: Path, species: Species, **options: Any) -> Any:
    """The model as transformers reads it."""
    kind = AutoModelForCausalLM if species.task == "causal-lm" else AutoModelForSequenceClassification
    with quiet():
        return kind.from_pretrained(folder, dtype=torch.float32, **species.read, **options).to(DEVICE)


def check_files(done: Trained, species: Species, out: Path) -> None:
    """The saved adapter in plain PEFT, and the merged model in plain transformers, give the logits of training."""
    pad = done.bench.base.pad_id
    about = {"config": done.config.to_flat(), "base": done.bench.base.fingerprint}
    peft_files.save_checkpoint(done.adapter, out / "adapter", done.config.model, about)
    classes = {} if species.task == "causal-lm" else {"num_labels": 2}
    with_adapter = PeftModel.from_pretrained(
        plain(Path(done.config.model.name), species, **classes), str(out / "adapter")
    )
    torch.testing.assert_close(
        logits(done.bench.task, with_adapter, done.examples, pad), done.logits, rtol=1e-4, atol=1e-4
    )
    source = export.find(out / "adapter")
    export.write_merged(source, peft_files.read_adapter(source.adapter), out / "merged", lambda state: state, {})
    merged = plain(out / "merged", species)
    torch.testing.assert_close(logits(done.bench.task, merged, done.examples, pad), done.logits, rtol=1e-4, atol=1e-4)


def check_length(done: Trained) -> None:
    """A model takes as many tokens as is said, and no more; or as many as one likes."""
    most = longest(done.bench.base.model)

    def run(length: int) -> None:
        ids = torch.full((1, length), 9, device=DEVICE)
        ids[:, -1] = done.bench.base.tokenizer.eos_token_id
        with torch.no_grad():
            done.bench.model(input_ids=ids, attention_mask=torch.ones_like(ids))

    run(most or 100)
    if most is not None and DEVICE.type == "cpu":  # a GPU is of no more use once an index was beyond its table
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            run(most + 1)


NIGHTLY = [pytest.mark.slow, pytest.mark.nightly]


def marked(names: dict[str, Species], fast: Sequence[str] | None = None) -> list[Any]:
    """Those that are served; nightly but for these, or but for what others hardly differ from."""
    quick = (names.keys() - ALIKE) if fast is None else fast
    return [
        pytest.param(name, marks=[] if name in quick else NIGHTLY)
        for name, species in names.items()
        if not species.refused
    ]


def check_served(species: Species, name: str, folders: Path, tmp_path: Path) -> None:
    """From its folder to its files: trained a step, on the targets that it is known to have."""
    done = train(config_of(folder_of(species, name, folders), species))
    assert {module.rsplit(".", 1)[-1] for module in done.bench.layers} == {*species.targets.split()}
    assert done.after != pytest.approx(done.before, abs=1e-4)
    check_files(done, species, tmp_path)
    check_length(done)


@pytest.mark.parametrize("name", marked(CAUSAL))
def test_a_causal_model_is_served(name: str, folders: Path, tmp_path: Path) -> None:
    check_served(CAUSAL[name], name, folders, tmp_path)


@pytest.mark.parametrize("name", marked(CLASSIFIERS))
def test_a_classifier_is_served(name: str, folders: Path, tmp_path: Path) -> None:
    check_served(CLASSIFIERS[name], name, folders, tmp_path)


@pytest.mark.parametrize("name", marked(CAUSAL, ["gpt2", "jamba", "qwen2-moe", "gemma3-images"]))
def test_all_linear_layers_of_a_causal_model_are_served(name: str, folders: Path, tmp_path: Path) -> None:
    species = CAUSAL[name]
    done = train(config_of(folder_of(species, name, folders), species, lora__target_modules="all-linear"))
    check_files(done, species, tmp_path)


@pytest.mark.parametrize("name", marked(CLASSIFIERS, ["bert", "roberta", "distilbert", "bart", "modernbert", "llama"]))
def test_all_linear_layers_of_a_classifier_are_served_and_its_head_is_none_of_them(
    name: str, folders: Path, tmp_path: Path
) -> None:
    species = CLASSIFIERS[name]
    done = train(config_of(folder_of(species, name, folders), species, lora__target_modules="all-linear"))
    assert not [module for module in done.bench.layers if module.startswith(done.bench.base.heads)]
    check_files(done, species, tmp_path)


@pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`")  # PEFT, when it reads the checkpoint
@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("llama-tied", "lm_head"),
        ("gpt2", "lm_head"),
        ("bloom", "lm_head"),
        ("biogpt", "output_projection"),
        ("gemma3-images", "lm_head"),
        ("bert-decoder", "cls.predictions.decoder"),
        ("olmo", "lm_head"),
    ],
)
def test_an_output_layer_is_merged_without_the_input_embeddings(
    name: str, output: str, folders: Path, tmp_path: Path
) -> None:
    species = CAUSAL[name]
    done = train(config_of(folder_of(species, name, folders), species, lora__target_modules=output))
    check_files(done, species, tmp_path)
    facts = json.loads((tmp_path / "merged" / "fedlora.json").read_text())["export"]
    assert facts.get("untied", []) == ([] if name == "olmo" else [output])  # which has two tensors


@pytest.mark.parametrize("name", [name for name, species in {**CAUSAL, **CLASSIFIERS}.items() if species.refused])
def test_what_cannot_be_served_is_refused_in_words(name: str, folders: Path) -> None:
    species = ({**CAUSAL, **CLASSIFIERS})[name]
    config = config_of(folder_of(species, name, folders), species)
    with pytest.raises(ModelError, match=species.refused):
        adapted.adapted_model(config.model, config.lora)


@pytest.mark.parametrize("quantization", ["nf4", pytest.param("int8", marks=NIGHTLY)])
@pytest.mark.parametrize("name", [*QUANTIZED, *(f"{name} classifier" for name in QUANTIZED_CLASSIFIERS)])
def test_a_quantized_model_is_served(name: str, quantization: str, folders: Path, tmp_path: Path) -> None:
    kind = name.removesuffix(" classifier")
    species = CAUSAL[kind] if kind == name else CLASSIFIERS[kind]
    config = config_of(folder_of(species, kind, folders), species, model__quantization=quantization)
    done = train(config)
    assert done.after != pytest.approx(done.before, abs=1e-4)
    peft_files.save_checkpoint(done.adapter, tmp_path / "adapter", config.model, {"base": done.bench.base.fingerprint})
    base = load_base(config.model)  # from the copy on disk
    again = checkpoint_scores.load(base, [tmp_path / "adapter"], config)
    close = 5e-2 if quantization == "int8" else 1e-4
    torch.testing.assert_close(
        logits(done.bench.task, again, done.examples, base.pad_id), done.logits, rtol=close, atol=close
    )


def test_a_model_whose_layers_cannot_be_quantized_is_refused(folders: Path) -> None:
    config = config_of(folder_of(CAUSAL["falcon"], "falcon", folders), CAUSAL["falcon"], model__quantization="nf4")
    with pytest.raises(ModelError, match=r"'nf4' had no effect: .* is a FalconLinear.* model.quantization = 'none'"):
        load_base(config.model)


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        (
            "mixtral",
            "experts",
            "'experts': the experts' weights are fused.* linear modules are k_proj, lm_head, o_proj",
        ),
        ("mixtral", "q_proj,gate_up_proj", "'gate_up_proj': the experts' weights are fused"),
        ("deepseek-v3", "down_proj", "'down_proj': the experts' weights are fused"),
        ("mamba", "x_proj", "'x_proj': the model reads these weights without calling the layer"),
        ("llama", "embed_tokens", "'embed_tokens': it is of class Embedding, and LoRA here is of linear layers alone"),
        ("llama", "mlp", "'mlp': it is of class LlamaMLP"),
        (
            "llama",
            "q_proj, vproj",
            r"'vproj': there is no such module; did you mean 'v_proj'\?; this model's linear mod",
        ),
        ("gemma3-images", "fc1", "'fc1': it belongs to the part for other inputs than text"),
        ("xlnet", "auto", "no attention projections are found in a XLNetLMHeadModel.* are layer_1, layer_2"),
        ("bert classifier", "classifier", "'classifier': it is a part of the head, which is trained in full"),
    ],
)
def test_a_module_that_cannot_be_a_target_is_refused_in_words(
    name: str, targets: str, words: str, folders: Path
) -> None:
    kind = name.removesuffix(" classifier")
    species = CAUSAL[kind] if kind == name else CLASSIFIERS[kind]
    config = config_of(folder_of(species, kind, folders), species, lora__target_modules=targets)
    with pytest.raises(ModelError, match=f"^lora.target-modules = .*{words}"):
        injection.shapes(config.model, config.lora)


def test_int8_that_cannot_compute_is_refused_before_anything_is_trained(folders: Path, monkeypatch) -> None:
    def fails(layer: Linear8bitLt, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no int8 on this device")

    config = config_of(folder_of(CAUSAL["llama"], "llama", folders), CAUSAL["llama"], model__quantization="int8")
    monkeypatch.setattr(Linear8bitLt, "forward", fails)
    with pytest.raises(ModelError, match=r"a first pass of 12 tokens fails with model.quantization = 'int8' .*no int8"):
        load_base(config.model)


def test_the_zoo_has_some_thirty_architectures() -> None:
    served = {species.config for species in (*CAUSAL.values(), *CLASSIFIERS.values()) if not species.refused}
    assert len(served) >= 30
