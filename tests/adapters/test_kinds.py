"""Adapter kinds as functions: shapes, PEFT's own layers as references, and what averaging does to them."""

import pytest
import torch
from peft import MissConfig, get_peft_model

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.kinds.base import Place, as_factors
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import ConfigError

PLACES = [Place("m", 12, 20, 4, 2.0), Place("m", 5, 9, 4, 0.5), Place("m", 7, 6, 6, 1.0), Place("m", 3, 8, 1, 3.0)]


def random_parts(kind, place: Place, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=g) for part, shape in kind.shapes(place).items()}


@pytest.mark.parametrize("name", KINDS.names)
@pytest.mark.parametrize("place", PLACES)
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


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(12, 20, 4), (10, 9, 4), (7, 6, 6)])
def test_miss_is_pefts_own_layer(d_out, d_in, rank):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(d_in, d_out)

        def forward(self, x):
            return self.layer(x)

    net = Net()
    model = get_peft_model(net, MissConfig(r=rank, target_modules=["layer"]))
    block = dict(model.named_parameters())["base_model.model.layer.miss_block.default"]
    kind, place = KINDS.load("miss"), Place("layer", d_out, d_in, rank)
    parts = random_parts(kind, place)
    x = torch.randn(5, d_in)
    bare = model(x).detach()
    with torch.no_grad():
        block.copy_(parts["D"])
    torch.testing.assert_close(model(x) - bare, kind.forward(x, parts, {}, place), rtol=1e-4, atol=1e-5)


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
