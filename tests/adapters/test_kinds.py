"""Adapter kinds as functions: shapes, PEFT's own layers as references, and what averaging does to them."""

import copy
import hashlib
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import GloraConfig, LoraConfig, MissConfig, VeraConfig, get_peft_model
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.kinds.base import Place, as_factors, project
from fedlora.adapters.kinds.registry import KINDS
from fedlora.adapters.kinds.signs import signs
from fedlora.common.errors import ConfigError
from fedlora.models.functional import Functional, FunctionalStack, Nothing, Sight
from tests.device import DEVICE

MATRICES = [name for name in KINDS.names if KINDS.load(name).matrix]  # kinds whose update is a matrix
PLACES = [Place("m", 12, 20, 4, 2.0), Place("m", 5, 9, 4, 0.5), Place("m", 7, 6, 6, 1.0), Place("m", 3, 8, 1, 3.0)]
PLACES.append(Place("m", 18, 24, 4, 1.0))


def random_parts(kind, place: Place, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=g) for part, shape in kind.shapes(place).items()}


def frozen(place: Place) -> torch.Tensor:
    """A frozen weight for a layer of this shape."""
    return torch.randn(place.d_out, place.d_in, generator=torch.Generator().manual_seed(7))


PLACES = [replace(place, weight=partial(frozen, place)) for place in PLACES]


def seen(kind, place: Place, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The kind's constants, and what it sees of the layer."""
    W = place.weight()
    return {**kind.constants(place), **({"W": W, "y": x @ W.T} if kind.sees_layer else {})}


def update_of(kind, parts, constants, place: Place) -> torch.Tensor:
    """The update that the kind's factors say, with DoRA's magnitude where it has one."""
    update = delta(kind.factors(parts, constants, place))
    if kind.factored:
        return update
    whole = place.weight() + update
    return kind.magnitude(parts, constants, place)[:, None] * whole / whole.norm(dim=1, keepdim=True) - place.weight()


def serves(name: str, place: Place) -> bool:
    try:
        KINDS.load(name).check(place.rank)
        KINDS.load(name).check_place(place)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in MATRICES for place in PLACES if serves(name, place)]
)
def test_a_kind_adds_what_its_factors_say_and_nothing_at_first(name, place):
    kind = KINDS.load(name)
    x = torch.randn(2, 3, place.d_in)
    constants = seen(kind, place, x)
    parts = random_parts(kind, place)
    assert kind.rank(parts) == place.rank
    update = update_of(kind, parts, constants, place)
    torch.testing.assert_close(kind.forward(x, parts, constants, place), x @ update.T, rtol=1e-4, atol=1e-4)
    first = kind.initial(place, torch.Generator().manual_seed(0))
    assert {part: tuple(value.shape) for part, value in first.items()} == kind.shapes(place)
    assert not kind.forward(x, first, constants, place).any()


@pytest.mark.parametrize("name", MATRICES)
def test_the_mean_of_the_parts_is_the_mean_of_the_updates_for_linear_kinds_alone(name):
    kind, place = KINDS.load(name), PLACES[-1]
    sent = [kind.settled(random_parts(kind, place, seed)) for seed in range(3)]
    shares = (0.5, 0.3, 0.2)
    mean = {part: sum(p * own[part] for p, own in zip(shares, sent, strict=True)) for part in sent[0]}
    constants = seen(kind, place, torch.zeros(1, place.d_in))
    expected = sum(p * update_of(kind, own, constants, place) for p, own in zip(shares, sent, strict=True))
    off = update_of(kind, mean, constants, place) - expected
    error = float(off.norm() / torch.as_tensor(expected).norm())
    assert error < 1e-5 if kind.linear else error > 0.05


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


def quantized(linear: torch.nn.Linear) -> torch.nn.Module:
    """The layer in nf4."""
    made = Linear4bit(linear.in_features, linear.out_features, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(linear.state_dict())
    return made


class Rows:
    """All rows belong to so many clients, in equal parts."""

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def check(self, x: torch.Tensor) -> int:
        return self.clients


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
def test_dora_is_pefts_own_layer_with_its_gradients(quantize):
    """PEFT's DoRA is one model; in another one, the kind stands in the place of lora_A, alone and for two clients."""
    d_out, d_in, rank = 64, 128, 4
    kind = KINDS.load("dora", scale=3.0)
    torch.manual_seed(0)
    where = torch.device("cpu") if quantize and DEVICE.type != "cuda" else DEVICE  # a pretended one holds no nf4
    model = OneLayer(d_in, d_out)
    exact = model.layer.weight.detach().clone()
    if quantize:
        model.layer = quantized(model.layer)
    model = model.to(where)
    other = copy.deepcopy(model)
    theirs: Any = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=3 * rank, use_dora=True, target_modules=["layer"])
    )
    layer = theirs.base_model.model.layer
    sight = Sight(layer)
    assert torch.equal(sight.weight.cpu(), exact) is not quantize
    place = Place("layer", d_out, d_in, rank, weight=lambda: sight.weight)
    x = torch.randn(6, d_in, device=where)
    clients = [random_parts(kind, place, seed) for seed in range(2)]
    expected: list[tuple[torch.Tensor, ...]] = []
    for number, own in enumerate(clients):
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(own["A"])
            layer.lora_B["default"].weight.copy_(own["B"])
            length = kind.magnitude({n: t.to(where) for n, t in own.items()}, kind.constants(place), place)
            layer.lora_magnitude_vector["default"].weight.copy_(length)
        out = theirs(x[3 * number : 3 * number + 3])
        leaves = (
            layer.lora_A["default"].weight,
            layer.lora_B["default"].weight,
            layer.lora_magnitude_vector["default"].weight,
        )
        expected.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    plain: Any = get_peft_model(other, LoraConfig(r=rank, target_modules=["layer"]))
    ours: Any = plain.base_model.model.layer
    parts = [{n: torch.nn.Parameter(t.to(where)) for n, t in own.items()} for own in clients]
    sight = Sight(ours)
    singles = [Functional(kind, place, own, kind.constants(place), sight) for own in parts]
    for number, (one, own) in enumerate(zip(singles, parts, strict=True)):
        ours.lora_A["default"], ours.lora_B["default"], ours.scaling["default"] = one, Nothing(one.weight), 1.0
        got = plain(x[3 * number : 3 * number + 3])
        grads = torch.autograd.grad(got.square().sum(), [own[n] for n in ("A", "B", "m")])
        for mine, his in zip((got, *grads), expected[number], strict=True):
            torch.testing.assert_close(mine, his, rtol=1e-3, atol=1e-3)
    ours.lora_A["default"] = FunctionalStack(singles[1], parts, Rows(2))
    both = plain(x)
    torch.testing.assert_close(both, torch.cat([own[0] for own in expected]), rtol=1e-3, atol=1e-3)
    grads = torch.autograd.grad(both.square().sum(), [own[n] for own in parts for n in ("A", "B", "m")])
    for mine, other in zip(grads, [g for own in expected for g in own[1:]], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def test_glora_is_pefts_own_layer_with_its_gradients():
    d_out, d_in, rank = 12, 20, 4
    kind, model = KINDS.load("glora"), OneLayer(d_in, d_out)
    weight = model.layer.weight.detach().clone()
    place = Place("layer", d_out, d_in, rank, weight=lambda: weight)
    parts = {n: t.requires_grad_() for n, t in random_parts(kind, place).items()}
    x = torch.randn(5, d_in)
    settings = GloraConfig(r=rank, target_modules=["layer"], config_A_B="lora", config_C="none", config_D_E="none")
    theirs: Any = get_peft_model(model, settings)
    bare = F.linear(x, weight, model.layer.base_layer.bias).detach()  # pyright: ignore
    layer = theirs.base_model.model.layer
    paths = layer.glora_A["default"], layer.glora_B["default"]
    with torch.no_grad():
        for number, path in enumerate(paths, 1):
            path.Xd.copy_(parts[f"B{number}"])
            path.Xu.copy_(parts[f"A{number}"])
    expected = theirs(x) - bare
    got = kind.forward(x, parts, {"W": weight}, place)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    leaves = [leaf for path in paths for leaf in (path.Xd, path.Xu)]
    mine = torch.autograd.grad(got.square().sum(), [parts[name] for name in ("B1", "A1", "B2", "A2")])
    for one, other in zip(mine, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", PLACES[:2])
def test_lora_xs_stands_between_the_leading_singular_vectors(place):
    kind, W = KINDS.load("lora-xs", scale=0.5), place.weight().double()
    u, s, vh = torch.linalg.svd(W)
    constants = kind.constants(place)
    R = torch.randn(place.rank, place.rank)
    got = delta(kind.factors({"R": R}, constants, place)).double()
    r = place.rank
    flip = torch.where(u[:, :r].gather(0, u[:, :r].abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).double()
    expected = 0.5 * (u[:, :r] * flip) @ R.double() @ torch.diag(s[:r]) @ (vh[:r] * flip[:, None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # R = I moves each of the leading singular values by a share, and no vector
    moved = W + delta(kind.factors({"R": torch.eye(r)}, constants, place)).double()
    torch.testing.assert_close(torch.linalg.svdvals(moved)[:r], 1.5 * s[:r], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES[:2])
def test_loldu_changes_the_first_pivots(place):
    """z is what the first entries of D change by: W + dW has the same P, L and U, and D + z."""
    kind, W, r = KINDS.load("loldu", scale=1.0), place.weight().double(), place.rank
    P, L, U = torch.linalg.lu(W)
    D = U.diagonal()
    z = torch.randn(r)
    got = delta(kind.factors({"z": z}, kind.constants(place), place)).double()
    change = torch.zeros(len(D), dtype=torch.float64)
    change[:r] = z.double()
    expected = P @ L @ torch.diag(change) @ (U / D[:, None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mtl_lora_with_one_matrix_is_lora():
    kind, place = KINDS.load("mtl-lora", matrices=1, scale=1.5), Place("m", 5, 9, 3)
    parts = random_parts(kind, place) | {"L": torch.eye(3)}
    lora = {"A": parts["A"], "B": parts["B"][0]}
    x = torch.randn(4, 9)
    plain = KINDS.load("lora").forward(x, lora, {}, Place("m", 5, 9, 3, scaling=1.5))
    torch.testing.assert_close(kind.forward(x, parts, {}, place), plain)
    assert kind.kept == {"mtllora_L", "mtllora_w"}


def test_mtl_loras_matrices_part_from_each_other():
    """With equal weights w, all B_i would get one gradient and stay one matrix."""
    kind, place = KINDS.load("mtl-lora"), Place("m", 5, 9, 3)
    parts = {n: t.requires_grad_() for n, t in kind.initial(place, torch.Generator().manual_seed(0)).items()}
    kind.forward(torch.randn(4, 9), parts, {}, place).sum().backward()
    grad = parts["B"].grad
    assert grad is not None
    assert not torch.allclose(grad[0], grad[1], rtol=1e-2)


@pytest.mark.parametrize("name", ["lora-xs", "loldu"])
def test_another_decomposition_shows_in_the_projection(name):
    kind, place = KINDS.load(name), PLACES[0]
    constants = kind.constants(place)
    again = kind.constants(replace(place, weight=lambda: frozen(place) * (1 + 1e-6)))
    assert abs(project(constants) - project(again)) < 1e-4
    for part, value in constants.items():
        flipped = value.clone()
        rows = flipped if part == "A" else flipped.T
        rows[0] *= -1
        assert abs(project({**constants, part: flipped}) - project(constants)) > 0.01


@pytest.mark.parametrize("name", ["lora-xs", "loldu"])
def test_a_rank_beyond_the_layers_is_refused(name):
    with pytest.raises(ConfigError, match=rf"lora\.kind = {name} at rank 6: m, 5 x 9, has only 5"):
        KINDS.load(name).check_place(Place("m", 5, 9, 6))


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


@pytest.mark.parametrize("name", ["randlora", "vera", "ravan"])
def test_layers_of_equal_shape_share_what_is_fixed(name):
    """Also on a GPU, where each layer would else have a copy of its own."""
    kind = KINDS.load(name)

    def layer(module: str, d_out: int) -> Functional:
        place = Place(module, d_out, 12, 2)
        kind.check_place(place)
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
