"""Losses whose logits are never whole, against those of whole logits."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from fedlora.adapters import initial
from fedlora.config import LoraConfig
from fedlora.data import Example
from fedlora.models import adapted, injection
from fedlora.models.base.devices import DTYPES
from fedlora.tasks import losses
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.checked import mean_loss
from fedlora.tasks.losses import labelled_logits
from tests.device import DEVICE, assert_near, bound, model_config, on_device


@pytest.fixture(params=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    """That the model computes in."""
    return DTYPES[request.param]


@pytest.fixture
def trained(tiny_llama, dtype):
    """A model with a rank-3 adapter, and the adapter's parameters."""
    lora = LoraConfig(target_modules="q_proj,v_proj")
    name = next(name for name, known in DTYPES.items() if known == dtype)
    bench = adapted.adapted_model(model_config(tiny_llama, compute_dtype=name), lora)
    g = torch.Generator().manual_seed(0)
    start = initial(injection.shapes(bench.config, lora).lora, lambda name: 3, lambda name: 1.0, g)
    yield bench.model, adapted.install(bench, start, "AB").parameters
    adapted.forget()


def batch(count: int = 5):
    g = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        ids = torch.randint(5, 200, (5 + 2 * index,), generator=g).tolist()
        made.append(Example({"input_ids": ids, "labels": [-100] * index + ids[index:]}))
    return CausalLM().collate(made, 3)


def gradients(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("at_once", [1, 300, 2**23])
def test_losses_and_gradients_are_those_of_whole_logits(trained, dtype, monkeypatch, at_once):
    model, parameters = trained
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once)
    assert losses._plain[model]
    logits, targets, rows = labelled_logits(model, batch())
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    got, same_rows = losses.token_losses(model, batch())
    assert torch.equal(rows, same_rows)
    torch.testing.assert_close(got, expected, rtol=bound(1e-5, dtype), atol=bound(1e-6, dtype))
    weights = on_device(torch.linspace(0.1, 2.0, len(got)))  # each loss has its own weight in a cohort
    for one, two in zip(
        gradients((got * weights).sum(), parameters), gradients((expected * weights).sum(), parameters), strict=True
    ):
        assert_near(one, two, bound(1e-5, dtype))
    assert float(mean_loss(CausalLM(), model, batch()).detach()) == pytest.approx(
        float(expected.detach().mean()), rel=bound(1e-5, dtype)
    )


def test_without_a_gradient_to_take_it_is_the_same_loss(trained, dtype):
    model, _ = trained
    with torch.no_grad():
        one = mean_loss(CausalLM(), model, batch())
    assert float(one.detach()) == pytest.approx(
        float(mean_loss(CausalLM(), model, batch()).detach()), rel=bound(1e-6, dtype)
    )


def test_a_model_that_does_more_to_its_logits_is_found_out():
    torch.manual_seed(0)
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma2Config(num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=0.5, **shape)
    model = Gemma2ForCausalLM(config).requires_grad_(False).eval().to(DEVICE)
    losses.look_at(model)
    assert losses._plain[model] is False
    expected = float(model(**on_device(batch())).loss.detach())
    assert float(mean_loss(CausalLM(), model, batch()).detach()) == pytest.approx(expected, rel=bound(1e-5))


def test_a_model_that_nobody_looked_at_or_whose_output_is_trained_takes_the_whole_logits():
    model = torch.nn.Linear(2, 2)
    assert losses._plain.get(model) is None
    torch.manual_seed(0)
    config = Gemma2Config(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
    trained = Gemma2ForCausalLM(config)
    losses.look_at(trained)
    assert trained not in losses._plain
