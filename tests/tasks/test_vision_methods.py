"""Methods that were published for models of images: GLAD, Comp-LoRA, Block-LoRA and CoLoRA's ranks, on a ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

from fedlora.adapters import AdapterState, initial
from fedlora.adapters.algebra import delta
from fedlora.clients.statistics.contributions import Contributions
from fedlora.clients.statistics.gates import set_gates
from fedlora.config import Config
from fedlora.data import LazyExamples, batch_at, encode, prepare
from fedlora.models import adapted, fresh_head, load_base
from fedlora.models.weights import weight_of
from fedlora.strategies.configured import configured
from fedlora.strategies.server import saved_state
from fedlora.tasks.checked import mean_loss
from fedlora.tasks.predict import evaluate
from fedlora.tasks.registry import task_of
from tests.federation import run_locally
from tests.simulations.engines.test_local import apart, saved_adapter
from tests.tasks.test_image_classification import config_of, pictures  # noqa: F401 - a fixture

EQUAL: dict[str, Any] = {"lora__ranks": "", "lora__rank": 4, "train__lr": 2e-2, "train__steps": 6}


def state_of(config: Config, folder, result):
    saved = saved_state.load(folder / "state", result["key"])
    assert saved is not None
    return configured(config).global_adapter(saved[0])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_comp_lora_keeps_the_leading_directions_of_a_vit(tmp_path, tiny_vit, pictures, quantization):  # noqa: F811
    keys = EQUAL | {"lora__init": "comp-lora", "lora__init_options": "k=5", "strategy__name": "lora-fair"}
    config = config_of(tmp_path, tiny_vit, pictures, model__quantization=quantization, **keys)
    folder, result = run_locally(config)
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    learned = state_of(config, folder, result).lora
    model = adapted.adapted_model(config.model, config.lora)
    for name, factors in learned.items():
        update = delta(factors).double()
        u, _, vh = torch.linalg.svd(weight_of(model.layers[name]).cpu().double())
        assert float(update.norm()) > 1e-3
        assert float((u[:, :5].T @ update).norm()) < 1e-4 * float(update.norm())
        assert float((update @ vh[:5].T).norm()) < 1e-4 * float(update.norm())


def test_glad_without_a_neighbourhood_is_the_plain_step(tmp_path, tiny_vit, pictures):  # noqa: F811
    adapters = []
    for name, keys in {
        "plain": {"train__optimizer": "adamw"},
        "near": {"train__optimizer": "glad", "train__optimizer_options": "rho=1e-6"},
        "far": {"train__optimizer": "glad", "train__optimizer_options": "rho=100"},
    }.items():
        (tmp_path / name).mkdir()
        folder, result = run_locally(config_of(tmp_path / name, tiny_vit, pictures, **(EQUAL | keys)))
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
        adapters.append(saved_adapter(folder))
    assert apart(adapters[0], adapters[1]) < 1e-3
    assert apart(adapters[0], adapters[2]) > 1e-2


def test_block_lora_of_a_vit_is_a_checkpoint_of_plain_lora(tmp_path, tiny_vit, pictures):  # noqa: F811
    keys = EQUAL | {"lora__kind": "block-lora", "lora__kind_options": "blocks=2", "strategy__name": "fedavg"}
    config = config_of(tmp_path, tiny_vit, pictures, **keys)
    folder, result = run_locally(config)
    recorded = result["rounds"][-1]["heldout"]
    assert recorded["loss"] < result["baseline"]["loss"]
    plain = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=2), folder / "adapter"
    ).eval()
    assert {len(value) for name, value in plain.named_parameters() if "lora_A" in name} == {2}
    task = task_of(config.model)
    examples = encode(prepare(config).heldout, load_base(config.model).tokenizer, config.data, task)
    scores = evaluate(task, plain, examples, 16, 0)
    assert scores == pytest.approx({name: recorded[name] for name in scores}, abs=1e-4)


def test_colora_divides_ranks_by_what_modules_of_a_vit_contribute(tmp_path, tiny_vit, pictures):  # noqa: F811
    keys = EQUAL | {"lora__allocation": "colora", "strategy__name": "flora", "lora__ranks": "4,2"}
    config = config_of(tmp_path, tiny_vit, pictures, **keys)
    folder, result = run_locally(config)
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    assert len({factors.rank for factors in state_of(config, folder, result).lora.values()}) > 1


def test_what_modules_of_a_vit_contribute_adds_up_beside_a_trained_head(tmp_path, tiny_vit, pictures):  # noqa: F811
    config = config_of(tmp_path, tiny_vit, pictures, **EQUAL)
    model = adapted.adapted_model(config.model, config.lora)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in model.layers.items()}
    lora = initial(shapes, lambda _: 3, lambda _: 2.0, torch.Generator().manual_seed(0)).lora
    head = fresh_head({name: value.shape for name, value in model.tensors.items()}, 1)
    asked = {f"{name}.contribution": torch.zeros(1) for name in model.layers}
    examples = LazyExamples(prepare(config).client(0), model.base.tokenizer, config.data, model.task)
    answer, _ = Contributions().measure(model, AdapterState(lora, {**head, **asked}), examples, config.train, seed=5)

    batch = [examples[place] for place in batch_at(len(examples), config.train.batch_size, 0, 5)]
    trained = adapted.install(model, adapted.read(model), ("A", "B"))
    losses = []
    for strength in (0.0, 1.0):
        set_gates(model, trained, dict.fromkeys(model.layers, strength))
        with torch.no_grad():
            losses.append(
                float(mean_loss(model.task, model.model.eval(), model.task.collate(batch, model.base.pad_id)))
            )
    total = sum(float(answer.tensors[f"{name}.contribution"]) for name in model.layers)
    assert losses[0] - losses[1] > 0.01
    assert total == pytest.approx(losses[0] - losses[1], rel=0.1)
