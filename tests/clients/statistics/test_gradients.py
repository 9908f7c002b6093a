"""Leading directions of the gradient against autograd on the full weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.clients.statistics.gradients import leading_directions
from fedlora.clients.training.trainer import TrainResult
from fedlora.config import LoraConfig, ModelConfig, TrainConfig
from fedlora.data import Example, batch_at
from fedlora.models import adapted, load_base
from fedlora.tasks.base import Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.checked import mean_loss
from fedlora.tasks.classification import Classification
from tests.device import bound, model_config

TARGETS = ("q_proj", "v_proj", "down_proj")
CONFIG = TrainConfig(batch_size=3)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def examples(count: int, long: int, labels: bool = False) -> list[Example]:
    g = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(5, 200, (long + index % 3,), generator=g).tolist()
        made.append(Example({"input_ids": ids, "labels": index % 2 if labels else [-100] * 2 + ids[2:]}))
    return made


def dense_gradients(model: nn.Module, names: list[str], data: list[Example], config: TrainConfig) -> dict[str, Tensor]:
    """By autograd on the weights themselves, all labelled tokens of all batches in one mean."""
    task: Task = Classification() if isinstance(data[0]["labels"], int) else CausalLM()
    weights: dict[str, Any] = {name: model.get_submodule(name).weight for name in names}
    for weight in weights.values():
        weight.requires_grad_()
    batches = [
        task.collate([data[i] for i in batch_at(len(data), config.batch_size, index, 7)], 3)
        for index in range(config.accumulate)
    ]
    counts = [len(b["labels"]) if b["labels"].ndim == 1 else int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    for batch, count in zip(batches, counts, strict=True):
        (mean_loss(task, model, batch) * count / sum(counts)).backward()
    return {name: weight.grad.double().cpu() for name, weight in weights.items()}


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def found(
    config: ModelConfig, data: list[Example], rank: int, train: TrainConfig = CONFIG, targets=TARGETS
) -> tuple[dict[str, LoraFactors], TrainResult]:
    """As a client does it: the adapter of the broadcast is in place and adds nothing."""
    bench = adapted.adapted_model(config, LoraConfig(target_modules=",".join(targets)))
    shapes: dict[str, Any] = {name: (layer.out_features, layer.in_features) for name, layer in bench.layers.items()}
    nothing = {n: LoraFactors(torch.zeros(rank, i), torch.zeros(o, rank), 1.0) for n, (o, i) in shapes.items()}
    adapted.install(
        bench, AdapterState(lora=nothing, tensors={n: p.detach().clone() for n, p in bench.tensors.items()})
    )
    adapted.install_anchor(bench, ())
    factors, result = leading_directions(
        bench.task,
        bench.model,
        bench.layers,
        dict.fromkeys(bench.layers, rank),
        data,
        config=train,
        pad_id=3,
        seed=7,
    )
    assert all(parameter.grad is None for parameter in bench.model.parameters())
    assert not any(layer._forward_hooks for layer in bench.layers.values())  # pyright: ignore[reportAttributeAccessIssue]
    return factors, result


def assert_best(factors: dict[str, LoraFactors], gradients: dict[str, Tensor], rank: int, on_cpu=1e-5) -> None:
    assert factors.keys() == gradients.keys()
    for name, gradient in gradients.items():
        f = factors[name]
        assert f.scaling == 1.0
        assert (f.A.shape, f.B.shape) == ((rank, gradient.shape[1]), (gradient.shape[0], rank))
        expected = best(gradient, rank)
        assert float((delta(f).double() - expected).norm()) < bound(on_cpu) * float(gradient.norm()), name
        assert float(gradient.norm()) > 0


@pytest.mark.parametrize(("long", "rank"), [(3, 2), (30, 4), (30, 40)])
def test_it_is_the_best_approximation_of_the_dense_gradient(tiny_llama, long, rank):
    """With fewer tokens than columns, with more, and with more directions asked for than there are."""
    config = model_config(tiny_llama)
    data = examples(7, long)
    factors, result = found(config, data, rank)
    model = load_base(config).model.train()
    gradients = dense_gradients(model, list(factors), data, CONFIG)
    assert_best(factors, gradients, rank)
    chosen = [data[i] for i in batch_at(7, 3, 0, 7)]
    assert result.loss == pytest.approx(
        mean_loss(CausalLM(), model, CausalLM().collate(chosen, 3)).item(), rel=bound(1e-5)
    )
    assert (result.steps, result.tokens) == (0, sum(len(e["input_ids"]) for e in chosen))


def test_accumulated_batches_are_one_mean(tiny_llama):
    """Batches of few tokens, so that nothing is cut between them: the gradient is that of one optimizer step."""
    config = model_config(tiny_llama)
    train, data = TrainConfig(batch_size=1, accumulate=3), examples(7, 6)
    factors, _ = found(config, data, 6, train)
    assert_best(factors, dense_gradients(load_base(config).model, list(factors), data, train), 6)


def test_on_nf4_it_is_the_gradient_at_the_dequantized_weights(tiny_llama):
    config = model_config(tiny_llama, quantization="nf4")
    data = examples(7, 12)
    factors, _ = found(config, data, 4)
    base = load_base(config)
    plain = load_base(replace(config, quantization="none")).model
    for name, module in base.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    assert_best(factors, dense_gradients(plain, list(factors), data, CONFIG), 4, on_cpu=1e-3)


def test_gradient_checkpointing_changes_nothing(tiny_llama):
    config = model_config(tiny_llama)
    data = examples(7, 12)
    plain, _ = found(config, data, 3)
    again, _ = found(replace(config, gradient_checkpointing=True), data, 3)
    for name, factors in plain.items():
        torch.testing.assert_close(delta(again[name]), delta(factors), rtol=bound(1.3e-6), atol=bound(1e-5))


def test_a_classifiers_body_has_gradients_too(tiny_bert):
    config = model_config(tiny_bert, task="classification", labels=2)
    data = examples(7, 12, labels=True)
    bench = adapted.adapted_model(config, LoraConfig(target_modules="query,value"))
    for module in bench.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in bench.tensors.items():
        parameter.data.normal_(generator=torch.Generator(parameter.device).manual_seed(len(name)))
    factors, result = found(config, data, 3, targets=("query", "value"))
    plain = load_base(config).model.eval()
    for name, parameter in bench.tensors.items():
        plain.get_parameter(name.replace("modules_to_save.default.", "")).data.copy_(parameter.data)
    assert_best(factors, dense_gradients(plain, list(factors), data, CONFIG), 3, on_cpu=1e-4)
    assert result.loss > 0
