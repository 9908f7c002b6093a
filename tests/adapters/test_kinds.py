"""Adapter kinds as functions: shapes, PEFT's own layers as references, and what averaging does to them."""

import hashlib
from typing import Any

import pytest
import torch
from peft import MissConfig, VeraConfig, get_peft_model

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.kinds.base import Place, as_factors
from fedlora.adapters.kinds.registry import KINDS
from fedlora.adapters.kinds.signs import signs
from fedlora.common.errors import ConfigError
from fedlora.models.functional import Functional
from tests.device import DEVICE

PLACES = [Place("m", 12, 20, 4, 2.0), Place("m", 5, 9, 4, 0.5), Place("m", 7, 6, 6, 1.0), Place("m", 3, 8, 1, 3.0)]


def random_parts(kind, place: Place, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=g) for part, shape in kind.shapes(place).items()}


def serves(name: str, rank: int) -> bool:
    try:
        KINDS.load(name).check(rank)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in KINDS.names for place in PLACES if serves(name, place.rank)]
)
def test_a_kind_adds_what_its_factors_say_and_nothing_at_first(name, place):
    kind = KINDS.load(name)
    constants, x = kind.constants(place), torch.randn(2, 3, place.d_in)
    parts = random_parts(kind, place)
    assert kind.rank(parts) == place.rank
    update = delta(kind.factors(parts, constants, place))
    torch.testing.assert_close(kind.forward(x, parts, constants, place), x @ update.T, rtol=1e-4, atol=1e-5)
    first = kind.initial(place, torch.Generator().manual_seed(0))
    assert {part: tuple(value.shape) for part, value in first.items()} == kind.shapes(place)
    assert not kind.forward(x, first, constants, place).any()


@pytest.mark.parametrize("name", [name for name in KINDS.names if KINDS.load(name).linear])
def test_the_mean_of_a_linear_kind_is_the_mean_of_the_updates(name):
    kind, place = KINDS.load(name), PLACES[0]
    sent = [random_parts(kind, place, seed) for seed in range(3)]
    shares = (0.5, 0.3, 0.2)
    mean = {part: sum(p * own[part] for p, own in zip(shares, sent, strict=True)) for part in sent[0]}
    constants = kind.constants(place)
    expected = sum(p * delta(kind.factors(own, constants, place)).double() for p, own in zip(shares, sent, strict=True))
    torch.testing.assert_close(delta(kind.factors(mean, constants, place)).double(), expected, rtol=1e-5, atol=1e-6)


class OneLayer(torch.nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 20, 4), (10, 9, 4), (7, 6, 6)])
def test_miss_is_pefts_own_layer(d_out, d_in, rank):
    model = get_peft_model(OneLayer(d_in, d_out), MissConfig(r=rank, target_modules=["layer"]))
    block = dict(model.named_parameters())["base_model.model.layer.miss_block.default"]
    kind, place = KINDS.load("miss"), Place("layer", d_out, d_in, rank)
    parts = random_parts(kind, place)
    x = torch.randn(5, d_in)
    bare = model(x).detach()
    with torch.no_grad():
        block.copy_(parts["D"])
    torch.testing.assert_close(model(x) - bare, kind.forward(x, parts, {}, place), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 20, 4), (10, 9, 4)])
def test_vera_is_pefts_own_layer(d_out, d_in, rank):
    model = get_peft_model(OneLayer(d_in, d_out), VeraConfig(r=rank, target_modules=["layer"]))
    kind, place = KINDS.load("vera"), Place("layer", d_out, d_in, rank)
    parts, constants = random_parts(kind, place), kind.constants(place)
    layer: Any = model.base_model.model.layer
    x = torch.randn(5, d_in)
    with torch.no_grad():
        layer.vera_lambda_b["default"].zero_()
        bare = model(x)
        layer.vera_A["default"].copy_(constants["A"] * (2 / d_in) ** 0.5)
        layer.vera_B["default"].copy_(constants["B"] * (2 / rank) ** 0.5)
        layer.vera_lambda_d["default"].copy_(parts["d"])
        layer.vera_lambda_b["default"].copy_(parts["b"])
    torch.testing.assert_close(model(x) - bare, kind.forward(x, parts, constants, place), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(18, 24, 4), (40, 30, 8)])
def test_randlora_is_the_sum_of_its_formula_and_of_full_rank(d_out, d_in, rank):
    """Entry by entry, in plain loops; with equal g_j instead, as the paper starts, it has rank r alone."""
    kind, place = KINDS.load("randlora", scale=3.0), Place("layer", d_out, d_in, rank)
    parts, constants = random_parts(kind, place), kind.constants(place)
    (count, _), expected = parts["l"].shape, torch.zeros(d_out, d_in)
    for o in range(d_out):
        for i in range(d_in):
            for j in range(count):
                for k in range(rank):
                    B = constants["B"][o, j * rank + k]
                    expected[o, i] += B * parts["l"][j, k] * constants["A"][k, i] * constants["g"][j, i]
    got = delta(kind.factors(parts, constants, place))
    torch.testing.assert_close(got, 3.0 / max(d_out, d_in) * expected, rtol=1e-4, atol=1e-5)
    assert count == -(-min(d_out, d_in) // rank)
    assert torch.linalg.matrix_rank(got) == min(d_out, d_in)
    same = {**constants, "g": torch.ones_like(constants["g"])}
    assert torch.linalg.matrix_rank(delta(kind.factors(parts, same, place))) == rank


def test_block_lora_is_lora_of_a_smaller_rank():
    kind, place = KINDS.load("block-lora", blocks=2, scale=1.5), Place("m", 5, 9, 6)
    parts = random_parts(kind, place)
    lora = {"A": parts["A"], "B": parts["B"][0] + parts["B"][1]}
    assert lora["A"].shape == (3, 9)
    x = torch.randn(4, 9)
    plain = KINDS.load("lora").forward(x, lora, {}, Place("m", 5, 9, 3, scaling=1.5))
    torch.testing.assert_close(kind.forward(x, parts, {}, place), plain)
    with pytest.raises(ConfigError, match="2 blocks of equal rank, which rank 5 cannot be divided into"):
        kind.check(5)


def test_signs_are_the_same_everywhere_and_look_random():
    """The first bits of SHA-256 of "0/x/0", by Python alone; and no row of a large matrix resembles another."""
    octets = hashlib.sha256(b"0/x/0").digest()
    expected = [2.0 * (octet >> bit & 1) - 1 for octet in octets[:3] for bit in range(8)]
    assert signs("x", 0, 4, 6).flatten().tolist() == expected
    large = signs("x", 1, 64, 1024)
    gram = large @ large.T / 1024
    assert float((gram - torch.eye(64)).abs().max()) < 0.2
    assert abs(float(large.mean())) < 0.02
    assert not torch.equal(large, signs("y", 1, 64, 1024))


@pytest.mark.parametrize("name", ["randlora", "vera"])
def test_layers_of_equal_shape_share_what_is_fixed(name):
    """Also on a GPU, where each layer would else have a copy of its own."""
    kind = KINDS.load(name)

    def layer(module: str, d_out: int) -> Functional:
        place = Place(module, d_out, 12, 2)
        return Functional(
            kind, place, {n: torch.nn.Parameter(t.to(DEVICE)) for n, t in random_parts(kind, place).items()}
        )

    one, same, other = layer("one", 16), layer("two", 16), layer("three", 17)
    for constant, value in one.constants.items():
        assert value.device.type == DEVICE.type
        assert same.constants[constant] is value
    assert other.constants["B"] is not one.constants["B"]


def test_an_adapter_of_any_kind_ends_as_factors():
    kind = KINDS.load("miss")
    parts = random_parts(kind, PLACES[0])
    adapter = AdapterState(
        lora={"m": LoraFactors(torch.randn(2, 20), torch.randn(12, 2), 1.0)},
        tensors={"m.miss_D": parts["D"], "head.weight": torch.ones(2)},
    )
    got = as_factors(adapter, kind, {"m": (12, 20), "other": (3, 3)})
    expected = delta(adapter.lora["m"]) + delta(kind.factors(parts, {}, PLACES[0]))
    torch.testing.assert_close(delta(got.lora["m"]), expected, rtol=1e-4, atol=1e-5)
    assert [*got.tensors] == ["head.weight"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mis", {}, r"lora\.kind: unknown adapter kind 'mis' .*did you mean 'miss'"),
        ("no.such:Kind", {}, r"lora\.kind = 'no.such:Kind': cannot import 'no.such'"),
        ("fedlora.adapters:LoraFactors", {}, r"LoraFactors is no adapter kind; write a frozen dataclass that extends"),
        ("miss", {"r": 3}, r"lora\.kind-options: miss has no option 'r'; it has no options"),
    ],
)
def test_what_is_no_kind_is_named(name, options, message):
    with pytest.raises(ConfigError, match=message):
        KINDS.load(name, **options)
