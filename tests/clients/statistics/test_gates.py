"""Gates before modules' updates: their derivatives, what the contributions add up to, and which layers are chosen."""

from __future__ import annotations

import pytest
import torch

from fedlora.adapters import AdapterState, initial
from fedlora.clients.statistics.contributions import Contributions
from fedlora.clients.statistics.gates import gate_gradients, set_gates
from fedlora.clients.statistics.selection import Selection
from fedlora.common.errors import ConfigError
from fedlora.config import LoraConfig, TrainConfig
from fedlora.data import batch_at
from fedlora.models import adapted
from fedlora.models.adapted import AdaptedModel
from fedlora.models.injection import ADAPTER
from fedlora.strategies.allocations.selection import Diffora, Flexora
from fedlora.tasks.checked import mean_loss
from tests.clients.statistics.test_gradients import examples
from tests.device import bound, model_config

TRAIN = TrainConfig(batch_size=3, steps=4, lr=2e-2, schedule="constant", warmup_fraction=0.0)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def model_of(tiny_llama) -> tuple[AdaptedModel, AdapterState]:
    model = adapted.adapted_model(model_config(tiny_llama), LoraConfig(target_modules="q_proj,down_proj"))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in model.layers.items()}
    return model, initial(shapes, lambda _: 3, lambda _: 2.0, torch.Generator().manual_seed(0))


def loss_at(model: AdaptedModel, gates: dict[str, float], trained, batch) -> float:
    set_gates(model, trained, gates)
    with torch.no_grad():
        return float(mean_loss(model.task, model.model.eval(), model.task.collate(batch, model.base.pad_id)))


def test_a_gates_derivative_is_the_slope_of_the_loss(tiny_llama):
    model, first = model_of(tiny_llama)
    lora = {
        n: f.__class__(f.A, torch.randn(f.B.shape, generator=torch.Generator().manual_seed(1)), f.scaling)
        for n, f in first.lora.items()
    }
    trained = adapted.install(model, AdapterState(lora=lora), ("A", "B"))
    gates = {name: 0.5 + 0.1 * place for place, name in enumerate(model.layers)}
    batch = examples(4, 12)
    set_gates(model, trained, gates)
    slopes, loss = gate_gradients(model, trained, gates, batch)
    assert loss == pytest.approx(loss_at(model, gates, trained, batch), rel=bound(1e-5))
    for name, gate in gates.items():
        step = 1e-2
        up, down = (loss_at(model, gates | {name: gate + s}, trained, batch) for s in (step, -step))
        assert slopes[name] == pytest.approx((up - down) / (2 * step), rel=0.03, abs=2e-3)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_contributions_add_up_to_the_change_of_the_loss(tiny_llama):
    """Completeness: sum over modules = L(base) - L(trained)."""
    model, first = model_of(tiny_llama)
    data = examples(7, 12)
    asked = AdapterState(lora=first.lora, tensors={f"{name}.contribution": torch.zeros(1) for name in model.layers})
    answer, result = Contributions().measure(model, asked, data, TRAIN, seed=5)
    assert result.steps == TRAIN.steps
    assert answer.tensors.keys() == asked.tensors.keys()
    batch = [data[place] for place in batch_at(7, 3, 0, 5)]
    trained = adapted.read(model)
    collated = model.task.collate(batch, model.base.pad_id)
    losses = []
    for adapter in (first, trained):
        adapted.install(model, adapter)
        with torch.no_grad():
            losses.append(float(mean_loss(model.task, model.model.eval(), collated)))
    total = sum(float(value) for value in answer.tensors.values())
    assert losses[0] - losses[1] > 0.05
    assert total == pytest.approx(losses[0] - losses[1], rel=0.05)


@pytest.mark.parametrize("rule", [Flexora(), Diffora()])
def test_alpha_grows_where_the_update_lowers_the_loss(tiny_llama, rule):
    """The planted layer: the other's update is kept from training by A = 0, so that its gate has no slope."""
    model, first = model_of(tiny_llama)
    planted = "model.layers.1"
    lora = {
        name: f if name.startswith(planted) else f.__class__(torch.zeros_like(f.A), f.B, f.scaling)
        for name, f in first.lora.items()
    }
    groups = {rule.group(name) for name in model.layers}
    asked = AdapterState(lora=lora, tensors={f"{group}.alpha": torch.zeros(1) for group in groups})
    same = examples(1, 12) * 12  # what one half teaches holds for the other
    answer, result = Selection().measure(model, asked, same, TRAIN, seed=2)
    assert result.steps == 4
    alpha = {group: float(answer.tensors[f"{group}.alpha"]) for group in groups}
    best = max(alpha, key=lambda group: alpha[group])
    assert best.startswith(planted)
    assert alpha[best] > 0
    assert all(value <= 0 for group, value in alpha.items() if not group.startswith(planted))
    assert all(layer.lora_A[ADAPTER].weight.grad is None for layer in model.layers.values())


def test_one_example_is_too_few_to_choose_by(tiny_llama):
    model, first = model_of(tiny_llama)
    with pytest.raises(ConfigError, match="choosing layers needs 2 examples of each client, this one has 1"):
        Selection().measure(model, first, examples(1, 12), TRAIN, seed=2)
