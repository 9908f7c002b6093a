"""Classification of images: runs learn, alone as in company, on any base; adapters are exported; bad keys named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageClassification

from fedlora.common.errors import ConfigError, ModelError
from fedlora.config import Config, DataConfig, ModelConfig, parse
from fedlora.data import encode, prepare
from fedlora.models import load_base, meta_model
from fedlora.models.peft_files import read_adapter
from fedlora.results.pictures import picture_text
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import flower
from fedlora.tasks.pixels import frame_of, resized
from fedlora.tasks.predict import evaluate
from fedlora.tasks.registry import check_task, task_of
from fedlora.trained.export import find, write_adapter, write_merged
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import apart, saved_adapter
from tests.tiny import save_clip, save_vit


def write_pictures(folder: Path, each: int = 40) -> Path:
    """Two classes: noise that is rather red, and rather blue."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("red", "blue")):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            values = draw.integers(0, 100, (16, 16, 3), dtype=np.uint8)
            values[..., 2 * label] += 120
            Image.fromarray(values).save(folder / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def config_of(folder: Path, model: Path, pictures: Path, **keys: Any) -> Config:
    own = {
        "model__task": "image-classification",
        "model__labels": 2,
        "data__source": str(pictures),
        "data__partition": "iid",
        "data__partition_by": "auto",
        "data__heldout_fraction": 0.2,
        "data__max_length": DataConfig().max_length,
        "lora__target_modules": "auto",
        "federation__lost_clients": "fail",
        "federation__clients": 2,
        "strategy__name": "flora",
    }
    return tiny(folder, model, **(own | keys))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_run_learns(tmp_path, tiny_vit, pictures, quantization):
    keys: dict[str, Any] = {"train__steps": 8, "train__lr": 0.02, "train__batch_size": 4, "evaluate__clients": True}
    folder, result = run_locally(config_of(tmp_path, tiny_vit, pictures, model__quantization=quantization, **keys))
    first, last = result["baseline"], result["rounds"][-1]["heldout"]
    assert last.keys() >= {"loss", "accuracy", "macro-f1", "calibration-error"}
    assert last["loss"] < 0.7 * first["loss"]
    assert last["accuracy"] >= 0.9
    assert result["rounds"][-1]["client-test"]["mean"]["accuracy"] >= 0.9
    assert result["classes"] == ["blue", "red"]
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    assert set(settings["modules_to_save"]) == {"classifier"}


def test_a_batch_of_clients_trains_each_as_alone(tmp_path, pictures, sizes):
    model = save_vit(tmp_path / "vit", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    adapters = []
    for at_once in ("1", "2"):
        folder = tmp_path / at_once
        folder.mkdir()
        keys = {"train__clients_at_once": at_once, "lora__dropout": 0.1}
        found = read_adapter(run_locally(config_of(folder, model, pictures, **keys))[0] / "adapter")
        updates = {name: factors.scaling * factors.B @ factors.A for name, factors in found.lora.items()}
        adapters.append(updates | found.tensors)
    assert 2 in sizes
    assert adapters[0].keys() == adapters[1].keys()
    assert sum(name.startswith("classifier") for name in adapters[0]) == 2
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=2e-5, rtol=1e-4)


def test_a_checkpoint_is_read_by_peft_and_a_merge_by_transformers(tmp_path, tiny_vit, pictures, command):
    config = config_of(tmp_path, tiny_vit, pictures, train__lr=0.02)
    folder, result = run_locally(config)
    recorded = result["rounds"][-1]["heldout"]
    code, said, why = command("evaluate", "--adapter", folder)
    assert code == 0, why
    assert f"{recorded['loss']:.4f}" in said
    source = find(folder)
    trained = read_adapter(source.adapter)
    write_adapter(source, trained, tmp_path / "adapter", lambda adapter: adapter, {})
    write_merged(source, trained, tmp_path / "merged", lambda adapter: adapter, {})
    task = task_of(config.model)
    processor = load_base(config.model).tokenizer
    examples = encode(prepare(config).heldout, processor, config.data, task)
    plain = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=2), tmp_path / "adapter"
    )
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    found = [evaluate(task, model, examples, 16, 0) for model in (plain.eval(), merged.eval())]
    for scores in found:
        assert scores == pytest.approx({name: recorded[name] for name in scores}, abs=1e-4)
    assert merged.config.id2label == {0: "blue", 1: "red"}
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file()
    batch = processor(images=[Image.open(pictures / "red" / "00.png")], return_tensors="pt")
    torch.testing.assert_close(plain(**batch).logits, merged(**batch).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [
        *(("deit", "nf4"), ("dinov2", "int8"), ("swin", "nf4"), ("convnext", "int8"), ("swin", "none")),
        *(
            pytest.param(*pair, marks=[pytest.mark.slow, pytest.mark.nightly])
            for pair in (
                *(("deit", "none"), ("dinov2", "none"), ("convnext", "none")),
                *(("deit", "int8"), ("dinov2", "nf4"), ("swin", "int8"), ("convnext", "nf4")),
            )
        ),
    ],
)
def test_other_architectures_train_their_head_and_lora(tmp_path, architecture, quantization, pictures):
    from transformers import ConvNextConfig, DeiTConfig, Dinov2Config, SwinConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    config: Any = {
        "deit": lambda: DeiTConfig(intermediate_size=64, **small),
        "dinov2": lambda: Dinov2Config(**small),
        "swin": lambda: SwinConfig(
            image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
        ),
        "convnext": lambda: ConvNextConfig(num_stages=2, patch_size=2, hidden_sizes=[16, 32], depths=[1, 1]),
    }[architecture]()
    config.architectures = [type(config).__name__.replace("Config", "ForImageClassification")]
    model = AutoModelForImageClassification.from_config(config)
    model.save_pretrained(tmp_path / "model")
    shutil.copy(save_vit(tmp_path / "vit") / "preprocessor_config.json", tmp_path / "model")
    targets = "all-linear" if architecture == "convnext" else "auto"
    keys = {"lora__target_modules": targets, "train__clients_at_once": "2", "federation__rounds": 1}
    keys["model__quantization"] = quantization
    folder, result = run_locally(config_of(tmp_path, tmp_path / "model", pictures, **keys))
    assert result["rounds"][-1]["heldout"]["loss"] != result["baseline"]["loss"]
    assert all(update.abs().max() > 0 for update in saved_adapter(folder).values())


def test_the_command_shows_the_classes_and_the_first_images_of_each_client(tmp_path, tiny_vit, pictures, command):
    config = config_of(tmp_path, tiny_vit, pictures)
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {json.dumps(v)}" for key, v in config.to_flat().items()))
    code, said, why = command("data", tmp_path / "run.toml", "--show", "2")
    assert code == 0, why
    assert "classes: blue (40), red (40)" in said
    assert "pixels: 256 in each image, as the model sees it" in said
    assert "mean characters" not in said
    split = prepare(config)
    names = split.rows.features["label"].names
    for client, block in enumerate(said.split("\nclient ")[-2:]):
        assert block.startswith(f"{client}\n")
        captions = re.findall(r"row (\d+): 16 x 16 pixels → ⟦(\w+)⟧", block)
        expected = [(str(at + 1), names[split.rows[int(at)]["label"]]) for at in split.parts[client][:2]]
        assert captions == expected
        drawn = block.splitlines()[2:10]
        assert all({*line} <= {*" ░▒▓█"} for line in drawn)
        assert {len(line.split("  ")[0]) for line in drawn} == {16}


def test_a_run_counts_the_pixels_that_a_client_saw(tmp_path, tiny_vit, pictures, command):
    config = config_of(tmp_path, tiny_vit, pictures, federation__rounds=1, lora__ranks="2")
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {json.dumps(v)}" for key, v in config.to_flat().items()))
    code, said, why = command("run", tmp_path / "run.toml")
    assert code == 0, why
    seen = config.train.steps * config.train.batch_size * 16 * 16
    assert said.count(f"{config.train.steps} steps, {seen} pixels, ") == 2
    assert " tokens" not in said


def test_of_very_many_clients_the_first_ones_images_are_shown(tmp_path, tiny_vit, pictures, command):
    config = config_of(tmp_path, tiny_vit, pictures, federation__clients=14)
    (tmp_path / "run.toml").write_text("\n".join(f"{key} = {json.dumps(v)}" for key, v in config.to_flat().items()))
    _, said, _ = command("data", tmp_path / "run.toml", "--show", "1")
    assert "the first 12 of 14 clients, --every-client shows all" in " ".join(said.split())
    assert len(re.findall(r"row \d+: ", said)) == 12
    _, said, _ = command("data", tmp_path / "run.toml", "--show", "1", "--every-client")
    assert len(re.findall(r"row \d+: ", said)) == 14


def test_a_picture_in_characters_has_the_colours_of_its_pixels():
    picture = np.zeros((4, 2, 3), np.uint8)
    picture[0, 0], picture[3, 1] = (255, 0, 0), (0, 0, 255)
    text = picture_text(picture, colours=True)
    assert text.plain == "▀▀\n▀▀\n"
    styles: list[Any] = [span.style for span in text.spans]
    assert [(tuple(each.color.triplet), tuple(each.bgcolor.triplet)) for each in styles] == [
        ((255, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((0, 0, 0), (0, 0, 255)),
    ]
    assert picture_text(np.full((96, 96, 3), 255, np.uint8), colours=False).plain == ("█" * 48 + "\n") * 24


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data__text_column": "words"}, "data.text-column = 'words' is about texts, but model.task = 'image-classif"),
        ({"data__system_prompt": "Be kind"}, "data.system-prompt = 'Be kind' is about texts"),
        ({"data__max_length": 64}, "data.max-length = 64 is about texts"),
        ({"data__label_names": "a, b, c"}, "names 3 classes, but model.labels = 2; make them agree"),
    ],
)
def test_a_key_that_does_not_fit_is_one_sentence(tmp_path, tiny_vit, pictures, keys, words):
    with pytest.raises(ConfigError, match=words):
        check_task(config_of(tmp_path, tiny_vit, pictures, **keys))


def processor_with(folder: Path, **settings: Any) -> Path:
    path = save_vit(folder / "vit") / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return path.parent


def without_processor(folder: Path) -> Path:
    (processor_with(folder) / "preprocessor_config.json").unlink()
    return folder / "vit"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_processor, "vit has no image processor that can be read"),
        (
            lambda folder: processor_with(folder, image_processor_type="NoSuchProcessor"),
            r"no image processor that can be read \(Unrecognized image processor in [^ ]+/vit\); use the files that",
        ),
        (
            lambda folder: processor_with(folder, size={"height": 32, "width": 32}),
            r"a first pass of \[3, 32, 32\], as its image processor makes images, fails .* use the processor that was",
        ),
        (
            lambda folder: processor_with(folder, do_resize=False),
            r"makes images of \[3, 80, 48\] and of \[3, 48, 80\], expected one size for all",
        ),
        (
            lambda folder: processor_with(folder, image_mean=[0.5]),
            "cannot make pixels of an image|does more to an image",
        ),
    ],
)
def test_a_processor_that_does_not_fit_is_one_sentence(tmp_path, spoil, words):
    with pytest.raises(ModelError, match=words) as error:
        load_base(ModelConfig(name=str(spoil(tmp_path)), task="image-classification", quantization="none"))
    assert "\n" not in str(error.value)


def test_a_model_of_texts_is_refused(tiny_bert):
    with pytest.raises(ModelError, match="transformers has no classifier of images of the kind Bert"):
        load_base(ModelConfig(name=str(tiny_bert), task="image-classification", quantization="none"))


def test_a_model_of_images_and_texts_is_refused(tmp_path):
    folder = save_clip(tmp_path / "clip")
    with pytest.raises(ModelError, match=r"a clip model compares images with texts .* set model.task = 'image-text'"):
        meta_model(ModelConfig(name=str(folder), task="image-classification", quantization="none"))


@pytest.mark.slow
@pytest.mark.nightly
def test_flowers_engine_trains_the_same_on_images(tmp_path, tiny_vit, pictures):
    config = config_of(tmp_path, tiny_vit, pictures, train__augment="flip")
    run_locally(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= run_bound(1e-6)


def test_an_image_of_the_models_size_needs_no_processor_unless_it_crops():
    """The shortcut gives what the processor gives, and is not taken where a part of the image is cut off."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    class Counted(ViTImageProcessorPil):
        calls = 0

        def __call__(self, *args, **kwargs):
            type(self).calls += 1
            return super().__call__(*args, **kwargs)

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 16, 3), dtype=np.uint8))
    plain, cropping = (
        Counted(size={"height": 24, "width": 16}),
        Counted(size={"height": 48, "width": 32}, do_center_crop=True, crop_size={"height": 24, "width": 16}),
    )
    for processor, calls in ((plain, 0), (cropping, 1)):
        frame_of(processor)
        expected = np.asarray(processor(images=[image], do_rescale=False, do_normalize=False)["pixel_values"][0])
        Counted.calls = 0
        assert np.array_equal(resized(image, processor), expected)
        assert Counted.calls == calls
