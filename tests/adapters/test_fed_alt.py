"""FedALT's layer against plain loops, LoRA, and several clients in one batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds.base import Place, as_factors
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models.functional import Functional, FunctionalStack
from fedlora.models.parts import has_gradient, trained_parts
from tests.adapters.test_kinds import Rows
from tests.naive import fedalt as naive

PLACE = Place("m", 12, 20, 3)


def parts_of(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = KINDS.load("fedalt").shapes(PLACE)
    return {part: torch.randn(shape, generator=g) for part, shape in shapes.items()}


def test_fedalt_is_the_loop_over_tokens_and_their_two_updates() -> None:
    kind, parts, x = KINDS.load("fedalt", scale=1.5), parts_of(), torch.randn(2, 5, 20)
    expected = naive.layer(x.flatten(0, 1), parts, 1.5).unflatten(0, (2, 5)).float()
    torch.testing.assert_close(kind.forward(x, parts, {}, PLACE), expected, rtol=1e-4, atol=1e-4)
    assert kind.rank(parts) == PLACE.rank


def test_it_adds_nothing_at_first_and_weighs_both_alike() -> None:
    kind = KINDS.load("fedalt", scale=1.5)
    first, x = kind.initial(PLACE, torch.Generator().manual_seed(0)), torch.randn(4, 20)
    assert {part: tuple(value.shape) for part, value in first.items()} == kind.shapes(PLACE)
    assert not kind.forward(x, first, {}, PLACE).any()
    assert first["A"].any()
    other = parts_of()
    even = first | {part: other[part] for part in ("A", "B", "C", "D")}
    expected = 1.5 / 2 * x @ (other["D"] @ other["C"] + other["B"] @ other["A"]).T
    torch.testing.assert_close(kind.forward(x, even, {}, PLACE), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_that_is_sure_of_the_own_part_is_lora() -> None:
    kind, parts, x = KINDS.load("fedalt", scale=1.5), parts_of(), torch.rand(6, 20) + 0.1
    parts["G"] = torch.stack([torch.full((20,), -50.0), torch.full((20,), 50.0)])
    lora = {"A": parts["A"], "B": parts["B"]}
    plain = KINDS.load("lora").forward(x, lora, {}, Place("m", 12, 20, 3, scaling=1.5))
    torch.testing.assert_close(kind.forward(x, parts, {}, PLACE), plain, rtol=1e-4, atol=1e-4)


def test_the_others_part_gets_no_gradient_alone_and_among_others() -> None:
    kind, x = KINDS.load("fedalt"), torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    frozen = {"fedalt_C", "fedalt_D"}
    clients = [
        {part: nn.Parameter(value, has_gradient(kind, part, True, frozen)) for part, value in parts_of(seed).items()}
        for seed in range(2)
    ]
    assert [[name for name, p in own.items() if p.requires_grad] for own in clients] == [["A", "B", "G"]] * 2
    assert len(trained_parts(kind, clients[0])) == 3
    alone = []
    for number, own in enumerate(clients):
        out = Functional(kind, PLACE, own)(x[3 * number : 3 * number + 3])
        alone.append((out, *torch.autograd.grad(out.square().sum(), trained_parts(kind, own))))
    both = FunctionalStack(Functional(kind, PLACE, clients[0]), clients, Rows(2))(x)
    for number, own in enumerate(clients):
        expected, *grads = alone[number]
        torch.testing.assert_close(both[3 * number : 3 * number + 3], expected, rtol=1e-4, atol=1e-4)
        mine = torch.autograd.grad(both.square().sum(), trained_parts(kind, own), retain_graph=True)
        for got, grad in zip(mine, grads, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-3)


def test_it_has_no_factors() -> None:
    kind = KINDS.load("fedalt")
    with pytest.raises(AdapterError, match="no fixed matrix"):
        kind.factors(parts_of(), {}, PLACE)
    adapter = AdapterState(tensors={kind.key("m", part): value for part, value in parts_of().items()})
    assert as_factors(adapter, kind, {"m": (12, 20)}) is adapter
    with pytest.raises(ConfigError, match="fedalt's scale = 0"):
        KINDS.load("fedalt", scale=0.0)
