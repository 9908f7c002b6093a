"""FedAvg against its naive twin, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common.errors import StrategyError
from fedlora.config import LoraConfig
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.checks.clients import check
from tests.naive import fedavg as naive
from tests.naive.clients import start, train
from tests.naive.dense import Part

FEDAVG = load("fedavg")


def client(number: int, rank: int, **changes: object) -> ClientInfo:
    return replace(ClientInfo(client_id=number, rank=rank), **changes)  # pyright: ignore[reportArgumentType]


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    examples=st.lists(st.integers(1, 99), min_size=1, max_size=5),
    seed=st.integers(0, 999),
)
def test_matches_the_naive_means(rank: int, shape: tuple[int, int], examples: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    parts = [Part(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), 0.5, n) for n in examples]
    reference = naive.Module(torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank), 0.5)
    reference.aggregate(parts)
    updates = [
        ClientUpdate(client_id=i, adapter=AdapterState(lora={"m": LoraFactors(p.A, p.B, 0.5)}), num_examples=p.examples)
        for i, p in enumerate(parts)
    ]
    got = FEDAVG.aggregate(FEDAVG.init(AdapterState()), updates, 1).adapter.lora["m"]
    torch.testing.assert_close(got.A.double(), reference.A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.B.double(), reference.B, rtol=1e-5, atol=1e-6)
    assert got.scaling == 0.5


def test_one_client_and_equal_clients_are_bitwise_identity() -> None:
    one = client(0, 3)
    state = FEDAVG.init(start([one]))
    update = train(FEDAVG.broadcast(state, one, 1), one, seed=1)
    for updates in ([update], [replace(update, client_id=i, num_examples=7 * i + 3) for i in range(5)]):
        got = FEDAVG.aggregate(state, updates, 1).adapter
        for name, factors in update.adapter.lora.items():
            assert torch.equal(got.lora[name].A, factors.A)
            assert torch.equal(got.lora[name].B, factors.B)
        assert torch.equal(got.tensors["head.weight"], update.adapter.tensors["head.weight"])


def test_check_refuses_unequal_ranks_and_names_the_fix() -> None:
    with pytest.raises(StrategyError) as caught:
        check(FEDAVG, [client(i, rank) for i, rank in enumerate((16, 8, 8, 4))], LoraConfig())
    assert str(caught.value).startswith(
        "fedavg averages factors and needs one rank, got ranks 16, 8, 8, 4; "
        "set lora.ranks = '' and lora.rank = 16, or use strategy.name = "
    )
    assert " or rolora" in str(caught.value)
    assert "flora, " in str(caught.value)
    with pytest.raises(StrategyError, match=r"got ranks 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …;"):
        FEDAVG.check([client(i, i + 1) for i in range(300)])


@pytest.mark.parametrize(
    "other", [{"alpha": 32}, {"rslora": True}, {"alpha": "r"}], ids=["alpha", "rslora", "multiple"]
)
def test_check_refuses_unequal_effective_scalings(other: dict[str, object]) -> None:
    with pytest.raises(StrategyError, match="needs one scaling, got 2, "):
        FEDAVG.check([client(0, 8), client(1, 8, **other)])


def test_check_looks_at_the_scalings_of_patterned_ranks_too() -> None:
    """alpha = 16 and "2r" agree at rank 8, not at rank 2."""
    pattern = {"v_proj": 2}
    FEDAVG.check([client(0, 8, alpha=16), client(1, 8, alpha="2r")])
    with pytest.raises(StrategyError, match="needs one scaling"):
        FEDAVG.check([client(0, 8, alpha=16, rank_pattern=pattern), client(1, 8, alpha="2r", rank_pattern=pattern)])


def test_check_accepts_equal_clients() -> None:
    FEDAVG.check([client(i, 8, alpha=16, num_examples=i + 1) for i in range(4)])


def test_fault_1_a_late_rank_1_client_is_refused_not_broadcast() -> None:
    clients = [client(0, 3), client(1, 3)]
    state = FEDAVG.init(start(clients))
    good = [train(FEDAVG.broadcast(state, c, 1), c, seed=1) for c in clients]
    one = AdapterState(lora={n: LoraFactors(f.A[:1], f.B[:, :1], f.scaling) for n, f in good[1].adapter.lora.items()})
    for updates in ([good[0], replace(good[1], adapter=one)], [replace(good[1], adapter=one), good[0]]):
        with pytest.raises(
            StrategyError, match=r"layers\.\d\.\w: client 1 sent rank 1, but fedavg on the server needs rank 3; set"
        ):
            FEDAVG.aggregate(state, updates, 1)
    with pytest.raises(StrategyError, match="client 7 has rank 1, but fedavg on the server needs rank 3"):
        FEDAVG.broadcast(state, client(7, 1), 1)


def test_a_late_other_scaling_is_refused() -> None:
    clients = [client(0, 3), client(1, 3)]
    state = FEDAVG.init(start(clients))
    good = [train(FEDAVG.broadcast(state, c, 1), c, seed=1) for c in clients]
    other = AdapterState(lora={n: LoraFactors(f.A, f.B, 0.5) for n, f in good[1].adapter.lora.items()})
    with pytest.raises(
        StrategyError, match=r"client 1 sent scaling 0\.5, but fedavg on the server needs 2; set one lora\.alpha"
    ):
        FEDAVG.aggregate(state, [good[0], replace(good[1], adapter=other)], 1)


def test_a_dense_tensor_of_another_shape_is_refused_not_broadcast() -> None:
    clients = [client(0, 3), client(1, 3)]
    state = FEDAVG.init(start(clients))
    good = [train(FEDAVG.broadcast(state, c, 1), c, seed=1) for c in clients]
    thin = replace(good[1].adapter, tensors={"head.weight": torch.zeros(1, 3)})
    with pytest.raises(StrategyError, match=r"head\.weight: client 1 sent shape \[1, 3\], others sent \[2, 3\]"):
        FEDAVG.aggregate(state, [good[0], replace(good[1], adapter=thin)], 1)


def test_an_update_that_counts_for_nothing_is_refused() -> None:
    state = FEDAVG.init(start([client(0, 3)]))
    update = train(FEDAVG.broadcast(state, client(0, 3), 1), client(0, 3), seed=1)
    with pytest.raises(StrategyError, match="client 0 sent num_examples = 0"):
        FEDAVG.aggregate(state, [replace(update, num_examples=0)], 1)


def test_memory_is_that_of_one_reply() -> None:
    """A reply can be freed once the next one is asked for."""
    import weakref

    one = client(0, 3)
    state = FEDAVG.init(start([one]))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def stream():
        nonlocal most
        for i in range(6):
            update = replace(train(FEDAVG.broadcast(state, one, 1), one, seed=i), client_id=i)
            alive.append(weakref.ref(update.adapter.lora["layers.0.q"].A))
            yield update
            del update
            most = max(most, sum(ref() is not None for ref in alive))

    FEDAVG.aggregate(state, stream(), 1)
    assert most <= 1
