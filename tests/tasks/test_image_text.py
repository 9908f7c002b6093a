"""Classification of images by prompts: own logits, either tower, alone as in company, exported; bad input named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForZeroShotImageClassification, AutoTokenizer, CLIPProcessor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import ConfigError, DataError, ModelError
from fedlora.config import Config, DataConfig, ModelConfig
from fedlora.data import encode, load_rows, prepare
from fedlora.data.images import decoded
from fedlora.models import load_base
from fedlora.models.adapted import AdaptedModel, adapted_model, install
from fedlora.models.base.read import quiet
from fedlora.models.injection import shape_of
from fedlora.models.peft_files import read_adapter, save_checkpoint
from fedlora.models.per_example import row_gradients
from fedlora.models.stacked import stacked
from fedlora.tasks.checked import mean_loss, row_losses
from fedlora.tasks.groups import grouped
from fedlora.tasks.predict import evaluate
from fedlora.tasks.registry import check_task, task_of
from fedlora.trained.evaluate import load
from fedlora.trained.export import find, write_adapter, write_merged
from fedlora.trained.mixed import BASE, one_by_one, predict_many
from tests.federation import run_locally, tiny
from tests.tasks.test_image_classification import write_pictures
from tests.tiny import save_bert, save_clip, save_siglip

IMAGES, TEXTS = "vision_model.*q_proj,vision_model.*v_proj", "text_model.*q_proj,text_model.*v_proj"
BOTH = f"{IMAGES},{TEXTS}"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with quiet():
        return {"clip": save_clip(folder / "clip"), "siglip": save_siglip(folder / "siglip")}


def config_of(folder: Path, model: Path, pictures: Path, **keys: Any) -> Config:
    own = {
        "model__task": "image-text",
        "model__labels": 2,
        "data__source": str(pictures),
        "data__partition": "iid",
        "data__partition_by": "auto",
        "data__heldout_fraction": 0.2,
        "data__max_length": DataConfig().max_length,
        "lora__target_modules": "auto",
        "lora__ranks": "4,2",
        "federation__lost_clients": "fail",
        "federation__clients": 2,
        "strategy__name": "flora",
    }
    return tiny(folder, model, **(own | keys))


def drawn(model: AdaptedModel, rank: int, seed: int) -> AdapterState:
    """Factors of which none is 0."""
    generator = torch.Generator().manual_seed(seed)

    def factors(d_out: int, d_in: int) -> LoraFactors:
        return LoraFactors(
            A=torch.randn(rank, d_in, generator=generator) * 0.3,
            B=torch.randn(d_out, rank, generator=generator) * 0.3,
            scaling=0.5,
        )

    return AdapterState(lora={name: factors(*shape_of(layer)) for name, layer in model.layers.items()})


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_logits_are_the_models_own(tmp_path, bases, pictures, kind):
    config = config_of(tmp_path, bases[kind], pictures, model__task_options="template=one {} square")
    task, base, rows = task_of(config.model), load_base(config.model), prepare(config).heldout
    batch = task.collate(encode(rows, base.tokenizer, config.data, task), base.pad_id)
    with torch.no_grad():
        found, targets, numbers = task.logits(base.model, batch)  # pyright: ignore[reportAttributeAccessIssue]
        predictions = task.predict(base.model, batch)

    plain = AutoModelForZeroShotImageClassification.from_pretrained(bases[kind]).eval()
    whole: dict[str, Any] = {"padding": "max_length", "max_length": 48} if kind == "siglip" else {"padding": True}
    words = AutoTokenizer.from_pretrained(bases[kind])(
        ["one blue square", "one red square"], return_tensors="pt", **whole
    )
    if kind == "siglip":
        words.pop("attention_mask")
    seen = AutoImageProcessor.from_pretrained(bases[kind], backend="pil")(
        images=[decoded(cell) for cell in rows["image"]], return_tensors="pt"
    )
    with torch.no_grad():
        own = plain(**words, **seen).logits_per_image
    assert float(own.std()) > 1e-3
    torch.testing.assert_close(found.cpu(), own, atol=1e-4, rtol=1e-4)
    assert targets.tolist() == rows["label"]
    assert numbers.tolist() == [*range(len(rows))]
    torch.testing.assert_close(predictions.probabilities.cpu(), own.softmax(1).max(1).values, atol=1e-4, rtol=1e-4)
    losses = F.cross_entropy(own, torch.tensor(rows["label"]), reduction="none")
    torch.testing.assert_close(predictions.losses.cpu(), losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "targets", "quantization"),
    [
        ("clip", IMAGES, "none"),
        ("clip", TEXTS, "none"),
        ("clip", BOTH, "nf4"),
        ("siglip", BOTH, "none"),
        ("siglip", "all-linear", "int8"),
    ],
)
def test_a_run_learns_in_either_tower_or_both(tmp_path, bases, pictures, kind, targets, quantization):
    keys: dict[str, Any] = {"train__steps": 8, "train__lr": 0.02, "train__batch_size": 4, "evaluate__clients": True}
    keys |= {"lora__target_modules": targets, "model__quantization": quantization}
    folder, result = run_locally(config_of(tmp_path, bases[kind], pictures, **keys))
    first, last = result["baseline"], result["rounds"][-1]["heldout"]
    assert last.keys() >= {"loss", "accuracy", "macro-f1", "calibration-error"}
    assert last["loss"] < 0.8 * first["loss"]
    assert result["classes"] == ["blue", "red"]
    assert "head" not in result
    towers = {name.split(".")[0] for name in read_adapter(folder / "adapter").lora}
    assert (
        towers
        == {
            IMAGES: {"vision_model"},
            TEXTS: {"text_model"},
            BOTH: {"vision_model", "text_model"},
            "all-linear": {"vision_model", "text_model"},
        }[targets]
    )
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    assert not settings["modules_to_save"]


@pytest.mark.parametrize(("kind", "targets"), [("clip", BOTH), ("siglip", BOTH), ("clip", TEXTS), ("clip", IMAGES)])
def test_a_batch_of_clients_trains_each_as_alone(tmp_path, pictures, sizes, kind, targets):
    save = {"clip": save_clip, "siglip": save_siglip}[kind]
    model = save(tmp_path / "model", attention_dropout=0.1)
    adapters = []
    for at_once in ("1", "2"):
        folder = tmp_path / at_once
        folder.mkdir()
        keys = {"train__clients_at_once": at_once, "lora__dropout": 0.1, "lora__target_modules": targets}
        keys |= {"train__optimizer": "sgd", "train__lr": 0.5}
        found = read_adapter(run_locally(config_of(folder, model, pictures, **keys))[0] / "adapter")
        adapters.append({name: factors.scaling * factors.B @ factors.A for name, factors in found.lora.items()})
    assert 2 in sizes
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        assert value.abs().max() > 0
        torch.testing.assert_close(adapters[1][name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("clients", [0, 2])
def test_rows_have_gradients_of_their_own(tmp_path, bases, pictures, clients):
    config = config_of(tmp_path, bases["clip"], pictures, lora__target_modules=BOTH)
    model = adapted_model(config.model, config.lora)
    examples = encode(prepare(config).heldout, model.base.tokenizer, config.data, model.task)[:4]
    adapters = [drawn(model, rank, seed) for seed, rank in enumerate((3, 2))]

    def of(examples: Any, groups: Any) -> Tensor:
        batch = model.task.collate(examples, 0)
        with grouped(groups(len(batch["labels"]), int(model.task.tokens(batch).max()))):
            return row_losses(model.task, model.model, batch, len(examples)).sum()

    if clients:
        with stacked(model, adapters, frozenset("AB")) as stack, row_gradients(model, stack) as rows:
            of(examples, rows.begin).backward()
            found = {name: value.clone() for name, value in rows.found.items()}
    else:
        install(model, adapters[0], train="AB")
        with row_gradients(model) as rows:
            of(examples, rows.begin).backward()
            found = {name: value.clone() for name, value in rows.found.items()}
    for row, example in enumerate(examples):
        adapter = adapters[row // 2] if clients else adapters[0]
        trained = install(model, adapter, train="AB")
        mean_loss(model.task, model.model, model.task.collate([example], 0)).backward()
        for pair in trained.pairs:
            a, b = pair.A.grad, pair.B.grad
            assert a is not None
            assert b is not None
            assert a.abs().max() > 0
            rank = adapter.lora[pair.module].rank
            torch.testing.assert_close(found[f"{pair.module}.A"][row, :rank], a, atol=1e-5, rtol=1e-3)
            torch.testing.assert_close(found[f"{pair.module}.B"][row, :, :rank], b, atol=1e-5, rtol=1e-3)
            pair.A.grad = pair.B.grad = None


def test_several_adapters_are_evaluated_in_one_pass(tmp_path, bases, pictures):
    config = config_of(tmp_path, bases["clip"], pictures, lora__target_modules=BOTH)
    model = adapted_model(config.model, config.lora)
    for seed, rank in enumerate((3, 2)):
        save_checkpoint(drawn(model, rank, seed), tmp_path / str(seed), config.model, {})
    base = load_base(config.model)
    task = task_of(config.model)
    examples = encode(prepare(config).heldout, base.tokenizer, config.data, task)
    both = load(base, [tmp_path / "0", tmp_path / "1"], config)
    names = [BASE, "adapter0", "adapter1"]
    together = predict_many(task, both, names, examples, batch_size=7, pad_id=0)
    apart = one_by_one(task, both, names, examples, batch_size=7, pad_id=0)
    assert len({tuple(found.losses.tolist()) for found in apart.values()}) == 3
    for name in names:
        torch.testing.assert_close(together[name].losses, apart[name].losses, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_checkpoint_is_read_by_peft_and_a_merge_by_transformers(tmp_path, bases, pictures, command, kind):
    config = config_of(tmp_path, bases[kind], pictures, train__lr=0.02)
    folder, result = run_locally(config)
    recorded = result["rounds"][-1]["heldout"]
    code, said, why = command("evaluate", "--adapter", folder)
    assert code == 0, why
    assert f"{recorded['loss']:.4f}" in said
    assert f"{recorded['macro-f1']:.4f}" in said
    assert f"{result['baseline']['loss']:.4f}" in said
    source = find(folder)
    trained = read_adapter(source.adapter)
    write_adapter(source, trained, tmp_path / "adapter", lambda adapter: adapter, {})
    write_merged(source, trained, tmp_path / "merged", lambda adapter: adapter, {})
    assert "pipeline_tag: zero-shot-image-classification" in (tmp_path / "adapter" / "README.md").read_text()

    auto = AutoModelForZeroShotImageClassification
    plain: Any = PeftModel.from_pretrained(auto.from_pretrained(bases[kind]), tmp_path / "adapter").eval()
    merged: Any = auto.from_pretrained(tmp_path / "merged").eval()
    whole: dict[str, Any] = {"padding": "max_length", "max_length": 48} if kind == "siglip" else {"padding": True}
    names = ["a photo of a blue", "a photo of a red"]
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")(names, return_tensors="pt", **whole)
    seen = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")(
        images=[Image.open(pictures / "red" / f"{number:02}.png") for number in range(3)], return_tensors="pt"
    )
    words.pop("attention_mask" if kind == "siglip" else "token_type_ids", None)
    with torch.no_grad():
        found = [model(**words, **seen).logits_per_image for model in (plain, merged)]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)
    task, base = task_of(config.model), load_base(config.model)
    rows = load_rows(config.data)
    red = [at for at, label in enumerate(rows["label"]) if label == 1][:3]
    batch = task.collate(encode(rows.select(red), base.tokenizer, config.data, task), 0)
    with torch.no_grad():
        torch.testing.assert_close(task.logits(plain, batch)[0], found[0], atol=1e-4, rtol=1e-4)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data__text_column": "words"}, "data.text-column = 'words' is about texts, but model.task = 'image-text' re"),
        ({"data__label_names": "a, b, c"}, "names 3 classes, but model.labels = 2; make them agree"),
        ({"model__task_options": "template=a photo"}, "template = 'a photo': expected a text with one {}"),
    ],
)
def test_a_key_that_does_not_fit_is_one_sentence(tmp_path, bases, pictures, keys, words):
    with pytest.raises(ConfigError, match=words) as error:
        check_task(config_of(tmp_path, bases["clip"], pictures, **keys))
    assert "\n" not in str(error.value)


def encoded(config: Config) -> object:
    base = load_base(config.model)
    return encode(prepare(config).heldout, base.tokenizer, config.data, task_of(config.model))


def test_classes_without_names_are_one_sentence(tmp_path, bases, pictures):
    numbers = shutil.copytree(pictures, tmp_path / "numbers")
    for at, name in enumerate(("blue", "red")):
        (numbers / name).rename(numbers / str(at))
    with pytest.raises(DataError, match="a name for each of the 2 classes, but column 'label' has no names; set data"):
        encoded(config_of(tmp_path, bases["clip"], numbers))
    encoded(config_of(tmp_path, bases["clip"], numbers, data__label_names="blue, red"))


def test_a_prompt_that_is_too_long_is_one_sentence(tmp_path, bases, pictures):
    options = f"template={'long ' * 10}{{}}"
    with pytest.raises(DataError, match=r"the prompt 'long .* blue' has 56 tokens, but the model has positions for at"):
        encoded(config_of(tmp_path, bases["clip"], pictures, model__task_options=options))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):  # transformers then makes one of the model's kind
        path.unlink()


def with_more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def with_larger_images(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 32, "width": 32}}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("preprocessor_config.json"), "model has no image processor and tokenizer that can be read"),
        (without("tokenizer.json"), "model has no image processor and tokenizer that can be read"),
        (without_tokenizer, "model: its CLIPTokenizer has 2 special tokens and no words, .* into this folder"),
        (with_more_tokens, r"has 1 tokens beyond the 260 of its CLIPConfig, such as '<more>'; use the tokenizer that"),
        (with_larger_images, r"a first pass of \[3, 32, 32\], as its image processor makes images, fails .* use the"),
    ],
)
def test_a_processor_that_does_not_fit_is_one_sentence(tmp_path, spoil, words):
    folder = save_clip(tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=words) as error:
        load_base(ModelConfig(name=str(folder), task="image-text", quantization="none"))
    assert "\n" not in str(error.value)


def test_a_model_of_texts_is_refused(tmp_path):
    with pytest.raises(ModelError, match="transformers has no model of images and texts of the kind Bert"):
        load_base(ModelConfig(name=str(save_bert(tmp_path / "bert")), task="image-text", quantization="none"))


def test_a_model_that_compares_otherwise_is_refused(tmp_path, bases, monkeypatch):
    from transformers import CLIPModel

    own = CLIPModel.get_text_features
    monkeypatch.setattr(
        CLIPModel, "get_text_features", lambda self, input_ids, **more: own(self, input_ids.flip(0), **more)
    )
    monkeypatch.setattr(CLIPModel, "forward", _with(own, CLIPModel.forward))
    with pytest.raises(ModelError, match="a CLIPModel does not compare the features of an image and of a text as"):
        load_base(ModelConfig(name=str(bases["clip"]), task="image-text", quantization="none"))


def _with(features: Any, forward: Any) -> Any:
    """A forward pass that does not use `get_text_features` as it is now."""

    def patched(self: Any, **inputs: Any) -> Any:
        now = type(self).get_text_features
        type(self).get_text_features = features
        try:
            return forward(self, **inputs)
        finally:
            type(self).get_text_features = now

    return patched


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("vision_model.*(q_proj", "it is no regular expression"),
        ("vision_model.*w_proj", "there is no such module"),
    ],
)
def test_a_pattern_that_fits_nothing_is_one_sentence(tmp_path, bases, pictures, targets, words):
    config = config_of(tmp_path, bases["clip"], pictures, lora__target_modules=targets)
    with pytest.raises(ModelError, match=words) as error:
        adapted_model(config.model, config.lora)
    assert "\n" not in str(error.value)


def test_what_was_forgotten_is_seen_on_other_images_and_with_other_prompts(tmp_path, bases, pictures, command):
    config = config_of(tmp_path, bases["clip"], pictures, train__lr=0.02)
    folder, _ = run_locally(config)
    others = write_idx(tmp_path / "others")
    scores = []
    for more in ([], ["-c", "data.label-names=sky, fire"], ["-c", "model.task-options=template={} hues"]):
        code, said, why = command(
            "evaluate", "--adapter", folder, "--data", others, "--json", tmp_path / "scores.json", *more
        )
        assert code == 0, why
        assert "all rows" in said
        scores.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
    names = [
        ("a photo of a blue", "a photo of a red"),
        ("a photo of a sky", "a photo of a fire"),
        ("blue hues", "red hues"),
    ]
    values, labels = idx_images()
    plain = AutoModelForZeroShotImageClassification.from_pretrained(bases["clip"]).eval()
    tuned: Any = PeftModel.from_pretrained(
        AutoModelForZeroShotImageClassification.from_pretrained(bases["clip"]), folder / "adapter"
    ).eval()
    seen = AutoImageProcessor.from_pretrained(bases["clip"], backend="pil")(
        images=[Image.fromarray(each).convert("RGB") for each in values], return_tensors="pt"
    )
    for found, prompts in zip(scores, names, strict=True):
        words = AutoTokenizer.from_pretrained(bases["clip"])([*prompts], padding=True, return_tensors="pt")
        for label, model in (("untouched base", plain), ("with the adapter", tuned)):
            with torch.no_grad():
                logits = model(**words, **seen).logits_per_image
            expected = float(F.cross_entropy(logits, torch.tensor(labels)))
            assert found[label]["loss"] == pytest.approx(expected, abs=1e-4)
            assert found[label]["accuracy"] == pytest.approx(
                float((logits.argmax(1) == torch.tensor(labels)).float().mean())
            )
            assert found[label].keys() >= {"macro-f1", "calibration-error"}
    assert len({found["with the adapter"]["loss"] for found in scores}) == 3


def idx_images() -> tuple[np.ndarray, list[int]]:
    """Ten grey images of noise, and a class for each."""
    return np.random.default_rng(1).integers(0, 256, (10, 16, 16), dtype=np.uint8), [0, 1] * 5


def write_idx(folder: Path) -> Path:
    """The images as an IDX file, whose classes are numbers without names."""
    folder.mkdir()
    values, labels = idx_images()
    head = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    (folder / "t10k-images-idx3-ubyte").write_bytes(head + values.tobytes())
    head = bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(head + bytes(labels))
    return folder / "t10k-images-idx3-ubyte"


def test_a_program_gives_its_own_model_with_its_processor(tmp_path, bases, pictures):
    import fedlora

    config = config_of(tmp_path, bases["clip"], pictures, federation__rounds=1)
    processor = CLIPProcessor(
        image_processor=AutoImageProcessor.from_pretrained(bases["clip"], backend="pil"),
        tokenizer=AutoTokenizer.from_pretrained(bases["clip"]),
    )
    model = AutoModelForZeroShotImageClassification.from_pretrained(bases["clip"])
    keys = {name: value for name, value in config.to_flat().items() if name != "model.name"}
    result = fedlora.run("quickstart", keys, model=(model, processor))
    record = json.loads((result.folder / "result.json").read_text())
    assert result.rounds[-1]["heldout"]["loss"] != record["baseline"]["loss"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_fashion_clip_is_made_and_knows_clothes_without_training():
    config = ModelConfig(name="fashion-clip", task="image-text", labels=10, quantization="none")
    base, task = load_base(config), task_of(config)
    assert "recipe: version 1" in (base.folder / "README.md").read_text()
    data = DataConfig(source="fashion-mnist-test")
    examples = encode(load_rows(data).select(range(2000)), base.tokenizer, data, task)
    assert evaluate(task, base.model, examples, 100, 0)["accuracy"] > 0.75
    other = replace(
        data, label_names="tee, pair of trousers, sweater, gown, jacket, open shoe, blouse, trainer, purse, boot"
    )
    examples = encode(load_rows(other).select(range(2000)), base.tokenizer, other, task)
    assert evaluate(task, base.model, examples, 100, 0)["accuracy"] > 0.7
