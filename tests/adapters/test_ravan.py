"""RAVAN against its formula, against averaging whole matrices, and against Fed-SB with one head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.adapters.kinds.base import Place, as_factors, settled
from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import ConfigError
from fedlora.exchange import ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState
from tests.naive import ravan as naive

PLACE = Place("m", 18, 24, 3)
SHAPES = {"m": (PLACE.d_out, PLACE.d_in)}
EXAMPLES = (3, 5, 1)


def drawn(kind, seed: int, place: Place = PLACE) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {part: torch.randn(shape, generator=g) for part, shape in kind.shapes(place).items()}


def adapter_of(kind, parts) -> AdapterState:
    return AdapterState(tensors={kind.key("m", part): value for part, value in parts.items()})


def update_of(parts: dict[str, Tensor], fixed: dict[str, Tensor]) -> Tensor:
    H, s = (torch.stack([parts[f"{part}{head}"] for head in range(4)]) for part in "Hs")
    return naive.update(H, s, fixed["A"].T, fixed["B"])


def test_it_is_the_sum_of_its_heads():
    kind = KINDS.load("ravan", scale=0.5)
    parts, fixed = drawn(kind, 1), kind.constants(PLACE)
    expected = 0.5 * update_of(parts, fixed)
    torch.testing.assert_close(delta(kind.factors(parts, fixed, PLACE)).double(), expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 5, PLACE.d_in)
    torch.testing.assert_close(
        kind.forward(x, parts, fixed, PLACE).double(), x.double() @ expected.T, rtol=1e-4, atol=1e-4
    )


def test_the_bases_of_all_heads_are_orthonormal_and_depend_on_the_seed():
    fixed, other = (KINDS.load("ravan", seed=seed).constants(PLACE) for seed in (0, 1))
    for part, value in fixed.items():
        torch.testing.assert_close(value.T @ value, torch.eye(12), rtol=0, atol=1e-5)
        assert not torch.allclose(value, other[part], atol=0.1)


def test_the_mean_of_what_clients_send_is_the_mean_of_their_updates():
    """Two rounds by fedavg, against the mean of whole matrices; means of H and of s would be another one."""
    kind, strategy = KINDS.load("ravan"), load("fedavg")
    fixed = kind.constants(PLACE)

    def error(state: ServerState, adapters: list[AdapterState], ideal: Tensor) -> tuple[float, AdapterState]:
        replies = [ClientUpdate(i, own, n) for i, (own, n) in enumerate(zip(adapters, EXAMPLES, strict=True))]
        new = strategy.aggregate(state, replies, 1).adapter
        return float((delta(as_factors(new, kind, SHAPES).lora["m"]).double() - ideal).norm()), new

    state = strategy.init(adapter_of(kind, kind.initial(PLACE, torch.Generator())))
    for number in (1, 2):
        trained = [drawn(kind, 10 * number + client) for client in range(3)]
        ideal = naive.mean([update_of(p, fixed) for p in trained], EXAMPLES)
        raw = [adapter_of(kind, parts) for parts in trained]
        assert error(state, raw, ideal)[0] > 0.5
        off, adapter = error(state, [settled(own, kind, SHAPES) for own in raw], ideal)
        assert off < 1e-5
        assert all(torch.equal(adapter.tensors[f"m.ravan_s{head}"], torch.ones(1)) for head in range(4))
        state = ServerState(adapter=adapter)


def test_one_head_is_fedsb_on_random_bases():
    """The same bases, and a core R for s H: the server's next update is the same."""
    kind, fedavg, fedsb = KINDS.load("ravan", heads=1), load("fedavg"), load("fedsb")
    fixed = kind.constants(PLACE)
    trained = [drawn(kind, client) for client in range(3)]
    ours = fedavg.aggregate(
        fedavg.init(adapter_of(kind, kind.initial(PLACE, torch.Generator()))),
        [
            ClientUpdate(client, settled(adapter_of(kind, parts), kind, SHAPES), n)
            for client, (parts, n) in enumerate(zip(trained, EXAMPLES, strict=True))
        ],
        1,
    )
    core = LoraFactors(A=fixed["A"].T, B=fixed["B"], scaling=1.0, R=torch.zeros(3, 3))
    theirs = fedsb.aggregate(
        ServerState(adapter=AdapterState(lora={"m": core})),
        [
            ClientUpdate(client, AdapterState(lora={"m": replace(core, R=parts["s0"] * parts["H0"])}), n)
            for client, (parts, n) in enumerate(zip(trained, EXAMPLES, strict=True))
        ],
        1,
    )
    torch.testing.assert_close(
        delta(as_factors(ours.adapter, kind, SHAPES).lora["m"]), delta(theirs.adapter.lora["m"]), rtol=1e-5, atol=1e-6
    )


def test_both_the_heads_and_their_scales_are_trained():
    kind = KINDS.load("ravan")
    fixed, parts = kind.constants(PLACE), {n: t.requires_grad_() for n, t in drawn(kind, 0).items()}
    grads = torch.autograd.grad(
        kind.forward(torch.randn(4, PLACE.d_in), parts, fixed, PLACE).square().sum(), [*parts.values()]
    )
    assert len(grads) == 8
    assert all(bool(grad.any()) for grad in grads)


def test_the_rank_of_some_heads_is_their_share():
    kind = KINDS.load("ravan")
    parts = drawn(kind, 0, Place("m", 40, 40, 8))
    assert [kind.rank({n: t for n, t in parts.items() if int(n[1:]) < heads}) for heads in (1, 2, 3, 4)] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, r"ravan's heads = 0, expected at least 1"),
        ({"scale": 0.0}, r"ravan's scale = 0.0, expected a number above 0"),
        ({"heads": 7}, r"ravan with 7 heads of rank 3: m, 18 x 24, has only 18 orthogonal directions"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        KINDS.load("ravan", **options).check_place(PLACE)
