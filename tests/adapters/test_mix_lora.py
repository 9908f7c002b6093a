"""MixLoRA's layer against plain loops, LoRA, and its own limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import MASK, Place, as_factors
from fedlora.adapters.kinds.mix_lora import unevenness
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models.functional import Functional, FunctionalStack, Mask, Nothing
from tests.device import DEVICE
from tests.naive import mix_lora as naive

PLACE = Place("m", 12, 20, 3)


def parts_of(kind, place: Place = PLACE, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=g) for part, shape in kind.shapes(place).items()}


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (3, 3)])
def test_mixlora_is_the_loop_over_tokens_and_their_experts(experts, top_k):
    kind = KINDS.load("mixlora", experts=experts, top_k=top_k, scale=1.5)
    parts, x = parts_of(kind), torch.randn(2, 5, 20)
    expected = naive.mixture(x.flatten(0, 1), parts["A"], parts["B"], parts["R"], top_k, 1.5)
    got = kind.forward(x, parts, {}, PLACE)
    torch.testing.assert_close(got, expected.unflatten(0, (2, 5)), rtol=1e-4, atol=1e-4)
    assert kind.rank(parts) == PLACE.rank


def test_it_adds_nothing_at_first_and_its_experts_part():
    kind = KINDS.load("mixlora")
    first = kind.initial(PLACE, torch.Generator().manual_seed(0))
    assert {part: tuple(value.shape) for part, value in first.items()} == kind.shapes(PLACE)
    x = torch.randn(200, 20)
    assert not kind.forward(x, first, {}, PLACE).any()
    assert float(first["R"].std()) == pytest.approx(0.02, rel=0.3)
    parts = {name: value.requires_grad_() for name, value in first.items()}
    kind.forward(x, parts, {}, PLACE).square().mean().backward()  # zeros, whose gradient is zero
    kind.forward(x, parts, {}, PLACE).sum().backward()
    grad = parts["B"].grad
    assert grad is not None
    assert not torch.allclose(grad[0], grad[1], rtol=1e-2)


def test_equal_experts_are_lora_whatever_the_router_says():
    kind = KINDS.load("mixlora", experts=4, top_k=2, scale=1.5)
    parts, x = parts_of(kind), torch.randn(6, 20)
    parts |= {name: parts[name][:1].expand_as(parts[name]) for name in ("A", "B")}
    lora = {"A": parts["A"][0], "B": parts["B"][0]}
    plain = KINDS.load("lora").forward(x, lora, {}, Place("m", 12, 20, 3, scaling=1.5))
    for seed in range(2):
        other = parts | {"R": parts_of(kind, seed=seed)["R"]}
        torch.testing.assert_close(kind.forward(x, other, {}, PLACE), plain, rtol=1e-4, atol=1e-4)


def test_with_all_experts_it_is_the_dense_mixture():
    kind = KINDS.load("mixlora", experts=5, top_k=5, scale=1.0)
    parts, x = parts_of(kind), torch.randn(6, 20)
    each = torch.einsum("eor,eri,ni->neo", parts["B"], parts["A"], x)
    expected = torch.einsum("ne,neo->no", torch.softmax(x @ parts["R"].T, dim=1), each)
    torch.testing.assert_close(kind.forward(x, parts, {}, PLACE), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_uneven_routing_is_least_where_all_experts_are_equal():
    kind = KINDS.load("mixlora", experts=4, top_k=2)
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1

    def loss(R: torch.Tensor) -> float:
        probable = torch.softmax(x @ R.T, dim=1)
        chosen = torch.zeros_like(probable).scatter(1, probable.topk(2, dim=1).indices, 1.0)
        return float(unevenness(probable, chosen, None))

    R = parts_of(kind)["R"]
    even = loss(torch.zeros_like(R))
    assert even == pytest.approx(2.0)
    assert loss(R) > even
    one = torch.zeros_like(R)
    one[0, 0] = 5  # one expert for all tokens, and then any other: F = 1 and P near 1 for it
    assert loss(one) > 3.8


def test_the_term_adds_its_own_gradient_whatever_the_loss_is_and_padding_adds_none():
    """Against the derivative in plain loops; the output is multiplied by 0, so that no other gradient is left."""
    kind = KINDS.load("mixlora", experts=4, top_k=2, balance=0.5)
    parts = {name: value.requires_grad_() for name, value in parts_of(kind).items()}
    x, mask = torch.randn(2, 5, 20), torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2])
    value, expected = naive.balance_gradient(x[mask.bool()], parts["R"].detach(), 2)
    (0 * kind.forward(x, parts, {MASK: mask}, PLACE)).sum().backward()
    torch.testing.assert_close(parts["R"].grad, 0.5 * expected, rtol=1e-3, atol=1e-5)
    probable = torch.softmax(x @ parts["R"].detach().T, dim=-1)
    chosen = torch.zeros_like(probable).scatter(-1, probable.topk(2, dim=-1).indices, 1.0)
    assert float(unevenness(probable, chosen, mask)) == pytest.approx(value, rel=1e-4)
    parts["R"].grad = None
    without = KINDS.load("mixlora", experts=4, top_k=2, balance=0)
    (0 * without.forward(x, parts, {MASK: mask}, PLACE)).sum().backward()
    assert parts["R"].grad is not None
    assert not parts["R"].grad.any()  # pyright: ignore[reportUnknownMemberType]


def test_the_gradient_of_N_counts_the_tokens_of_each_expert_over_all_passes_without_padding():
    kind = KINDS.load("mixlora", experts=4, top_k=2)
    parts = {name: value.requires_grad_() for name, value in parts_of(kind).items()}
    mask, counted = torch.tensor([[1.0] * 5, [1.0] * 3 + [0.0] * 2]), [0.0] * 4
    for seed in range(3):
        x = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(seed))
        kind.forward(x, parts, {MASK: mask}, PLACE).square().sum().backward()
        for token in x[mask.bool()]:
            for e in torch.topk(parts["R"].detach() @ token, 2).indices.tolist():
                counted[e] += 1
    assert parts["N"].grad is not None
    assert parts["N"].grad.flatten().tolist() == counted  # pyright: ignore[reportUnknownMemberType]
    assert sum(counted) == 3 * 8 * 2


def test_training_by_the_term_alone_evens_the_routing_out():
    kind = KINDS.load("mixlora", experts=4, top_k=1, balance=1.0)
    parts = {name: value.requires_grad_() for name, value in parts_of(kind).items()}
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(1))
    x[:, 0] = 1
    with torch.no_grad():
        parts["R"][0, 0] = 6

    def largest() -> float:
        return float((x @ parts["R"].detach().T).argmax(dim=1).bincount(minlength=4).max() / len(x))

    before, steps = largest(), torch.optim.SGD([parts["R"]], lr=1.0)
    for _ in range(200):
        steps.zero_grad()
        (0 * kind.forward(x, parts, {}, PLACE)).sum().backward()
        steps.step()
    assert before > 0.6
    assert largest() < 0.35


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x)


class Rows:
    def check(self, x: torch.Tensor) -> int:
        return 2


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
def test_two_clients_at_once_are_each_of_them_alone_with_their_terms(quantize):
    """Also where one client's rows are padded to the length of the other's, as they are not alone."""
    where = torch.device("cpu") if quantize and DEVICE.type != "cuda" else DEVICE
    kind, place = KINDS.load("mixlora", experts=4, balance=0.5), Place("layer", 32, 64, 3)
    base = Wrapped()
    if quantize:
        made = Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
        made.load_state_dict(base.layer.state_dict())
        base.layer = made
    model: Any = get_peft_model(base.to(where), LoraConfig(r=3, target_modules=["layer"]))  # pyright: ignore
    layer, mask = model.base_model.model.layer, Mask(model)
    parts = [{n: nn.Parameter(t.to(where)) for n, t in parts_of(kind, place, seed).items()} for seed in range(2)]
    singles = [Functional(kind, place, own, {}, mask) for own in parts]
    leaves = [own[name] for own in parts for name in ("A", "B", "R", "N")]
    x = torch.randn(4, 6, 64, device=where)
    tokens = torch.ones(4, 6, device=where)
    tokens[:2, 4:] = 0
    layer.scaling["default"] = 1.0

    def run(down: nn.Module, rows: torch.Tensor, of_rows: torch.Tensor) -> torch.Tensor:
        layer.lora_A["default"], layer.lora_B["default"] = down, Nothing(singles[0].weight)
        return (model(rows, attention_mask=of_rows) * of_rows[..., None]).square().sum()

    alone = run(singles[0], x[:2, :4], tokens[:2, :4]), run(singles[1], x[2:], tokens[2:])
    expected = torch.autograd.grad(sum(alone), leaves)  # pyright: ignore
    got = torch.autograd.grad(run(FunctionalStack(singles[1], parts, Rows()), x, tokens), leaves)
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    # with other rows counted as padding, R's gradient is another one: the mask does reach the layer
    less = tokens.clone()
    less[3] = 0
    _, _, *rest = torch.autograd.grad(run(singles[1], x[2:], less[2:]), [*parts[1].values()])
    assert not torch.allclose(rest[0], expected[6], rtol=1e-2)


def test_a_mask_of_another_layout_counts_all_rows():
    model = Wrapped()
    mask, x = Mask(model), torch.randn(2, 3, 64)
    model(x, attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert mask.take(x)[MASK].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert mask.take(x.flatten(0, 1))[MASK].tolist() == [1, 1, 1, 1, 0, 0]
    assert mask.take(x[0])[MASK].tolist() == [1, 1, 1]  # a selection of rows, which the mask says nothing of
    model(x)
    assert mask.take(x)[MASK].tolist() == [[1, 1, 1], [1, 1, 1]]


def test_it_has_no_factors_and_stays_its_parts():
    kind = KINDS.load("mixlora")
    adapter = AdapterState(tensors={kind.key("m", name): value for name, value in parts_of(kind).items()})
    assert as_factors(adapter, kind, {"m": (12, 20)}) is adapter
    with pytest.raises(AdapterError, match="no fixed matrix"):
        kind.factors({}, {}, PLACE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "top_k": 3}, "mixlora's top_k = 3, expected a number from 1 to experts = 2"),
        ({"experts": 0}, "mixlora's top_k = 2, expected a number from 1 to experts = 0"),
        ({"balance": -1.0}, "mixlora's balance = -1.0, expected a number of at least 0"),
        ({"deviation": float("nan")}, "mixlora's deviation = nan"),
        ({"scale": 0.0}, "mixlora's scale = 0.0, expected a number above 0"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        KINDS.load("mixlora", **options)
