"""Privacy of clients for strategies of the ideal: dense references, sensitivity by construction, noise, and a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fedlora.adapters import delta
from fedlora.common import accountant
from fedlora.common.errors import StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.configured import configured
from fedlora.strategies.wrappers import product_noise
from fedlora.strategies.wrappers.client_noise import MEMORY
from fedlora.strategies.wrappers.product_noise import ProductNoise
from tests.federation import run_locally, tiny
from tests.naive.clients import dense_deltas, start, train

SHAPES = {"layers.0.q": (40, 56), "layers.0.v": (33, 56), "layers.1.q": (56, 40), "layers.1.small": (12, 14)}
CLIENTS = [ClientInfo(client_id=i, rank=rank, num_examples=3 + 20 * i) for i, rank in enumerate((4, 2, 3, 1))]
WIDTH = 20  # a client's change has at most twice its rank; the last module is smaller
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("flora", {}),
    ("fedex", {}),
    ("florist", {"tau": 1.0}),
    ("flexlora", {"keep_tail": True}),
    ("flexlora", {"fold_tail": True}),
]
KEY = bytes(32)


def product_noise_of(strategy: Strategy, **about: Any) -> ProductNoise:
    return ProductNoise(strategy, **({"clip": 3.0, "noise_multiplier": 1e-15, "clients": 5, "width": WIDTH} | about))


def begun(strategy: Strategy) -> ServerState:
    """After a round without privacy, so that products are not zero where a strategy keeps its adapter."""
    state = strategy.init(start(CLIENTS, shapes=SHAPES))
    return strategy.aggregate(state, replies(strategy, state, 1), 1)


def replies(strategy: Strategy, state: ServerState, number: int = 2, size: float = 0.3) -> list[ClientUpdate]:
    return [
        train(
            strategy.broadcast(state, replace(client, known_base_version=state.folds.version), number),
            client,
            number,
            size,
        )
        for client in CLIENTS
    ]


def learned(strategy: Strategy, state: ServerState) -> dict[str, Tensor]:
    return {name: matrix.double() for name, matrix in dense_deltas(strategy.global_adapter(state)).items()}


def dense_change(update: ClientUpdate) -> dict[str, Tensor]:
    assert update.start is not None
    moved = {n: delta(f).double() - delta(update.start.lora[n]).double() for n, f in update.adapter.lora.items()}
    return moved | {n: t.double() - update.start.tensors[n].double() for n, t in update.adapter.tensors.items()}


def factor_changes(update: ClientUpdate, state: ServerState) -> dict[str, Tensor]:
    """By loops over ranks, at the server's scaling, with zeros where the client has no row."""
    assert update.start is not None
    found = {}
    for name, held in state.adapter.lora.items():
        A, B = torch.zeros_like(held.A).double(), torch.zeros_like(held.B).double()
        f, s = update.adapter.lora[name], update.start.lora[name]
        for row in range(f.rank):
            A[row] = (f.scaling * f.A[row] - s.scaling * s.A[row]) / held.scaling
            B[:, row] = f.B[:, row] - s.B[:, row]
        found |= {f"{name}.A": A, f"{name}.B": B}
    return found


def size_of(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([t.double().flatten() for t in tensors.values()]).norm())


@pytest.mark.parametrize("clip", [3.0, 1e9], ids=["clipped", "whole"])
@pytest.mark.parametrize(("name", "options"), EXACT, ids=str)
def test_without_noise_it_is_the_mean_of_the_clipped_changes(name, options, clip):
    """Against dense matrices: unequal ranks, equal weights, and the number of clients that were asked."""
    inner = load(name, **options)
    state = begun(inner)
    sent = replies(inner, state)
    after = product_noise_of(inner, clip=clip).aggregate(state, sent, 2)
    got, before = learned(inner, after), learned(inner, state)
    expected = {**before, **{n: t.double() for n, t in state.adapter.tensors.items()}}
    for update in sent:
        change = dense_change(update)
        counted = change | (factor_changes(update, state) if inner.needs_means else {})
        share = min(1.0, clip / size_of(counted))
        assert (share < 1) is (clip < 1e9)
        for n, matrix in change.items():
            expected[n] = expected[n] + share * matrix / 5
    for n, matrix in got.items():
        assert float((matrix - expected[n]).norm()) <= 1e-5 * float(expected[n].norm()), n
    torch.testing.assert_close(
        after.adapter.tensors["head.weight"].double(), expected["head.weight"], rtol=1e-5, atol=1e-5
    )


def test_a_cap_gives_weights_by_rows():
    """Rows 3, 23, 43, 63 with a cap of 40."""
    inner = load("flora")
    state = begun(inner)
    sent = replies(inner, state)
    got = learned(inner, product_noise_of(inner, clip=1e9, cap=40).aggregate(state, sent, 2))
    for n, matrix in learned(inner, state).items():
        expected = matrix + sum(min(1.0, update.num_examples / 40) * dense_change(update)[n] / 5 for update in sent)
        assert float((got[n] - expected).norm()) <= 1e-5 * float(expected.norm()), n


def test_means_of_factors_are_those_of_the_clipped_changes():
    inner = load("fedex")
    state = begun(inner)
    sent = replies(inner, state)
    after = product_noise_of(inner).aggregate(state, sent, 2)
    expected = {f"{n}.{w}": getattr(f, w).double() for n, f in state.adapter.lora.items() for w in "AB"}
    for update in sent:
        factors = factor_changes(update, state)
        share = min(1.0, 3.0 / size_of(factors | dense_change(update)))
        expected = {n: tensor + share * factors[n] / 5 for n, tensor in expected.items()}
    for n, f in after.adapter.lora.items():
        torch.testing.assert_close(f.A.double(), expected[f"{n}.A"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(f.B.double(), expected[f"{n}.B"], rtol=1e-5, atol=1e-5)


def test_lora_fair_gets_the_ideal_and_the_mean_of_a():
    """With lam = 0 its update is the projection of the ideal on the rows of the mean A, by a dense pseudo-inverse."""
    inner = load("lora-fair", lam=0.0)
    state = begun(inner)
    sent = replies(inner, state)
    after = product_noise_of(inner, clip=1e9).aggregate(state, sent, 2)
    got, before = learned(inner, after), learned(inner, state)
    for n, held in state.adapter.lora.items():
        ideal = before[n] + sum(dense_change(update)[n] for update in sent) / 5
        A = held.A.double() + sum(factor_changes(update, state)[f"{n}.A"] for update in sent) / 5
        expected = ideal @ torch.linalg.pinv(A) @ A
        assert float((got[n] - expected).norm()) <= 1e-4 * float(expected.norm()), n


def released(
    monkeypatch: pytest.MonkeyPatch, strategy: ProductNoise, state: ServerState, sent: Sequence[ClientUpdate]
) -> tuple[Tensor, Tensor]:
    """Both releases of a round as vectors: all Y, and all P and tensors trained in full, with the same Q every time."""
    ranges: list[Tensor] = []

    def fixed(Y: Tensor, sketch: Any) -> Tensor:
        ranges.append(Y.clone())
        generator = torch.Generator().manual_seed(len(Y))
        return torch.linalg.qr(torch.randn(Y.shape, generator=generator, dtype=torch.float64)).Q

    with monkeypatch.context() as patch:
        patch.setattr(product_noise, "basis_of", fixed)
        after = strategy.aggregate(state, sent, 2)
    inner = strategy.inner
    moved = {n: matrix - learned(inner, state)[n] for n, matrix in learned(inner, after).items()}
    dense = {n: t.double() - state.adapter.tensors[n].double() for n, t in after.adapter.tensors.items()}
    parts = [strategy.clients * t.flatten() for t in [*moved.values(), *dense.values()]]
    return torch.cat([Y.flatten() for Y in ranges]), torch.cat(parts)


@pytest.mark.parametrize("size", [0.001, 30.0], ids=["short", "long"])
@pytest.mark.parametrize(("name", "options"), EXACT[:4:3], ids=str)
def test_without_one_client_both_releases_differ_by_at_most_the_clip(monkeypatch, name, options, size):
    """The same noise and the same Q on both sides, so that what is left is the one client's part."""
    strategy = product_noise_of(load(name, **options), clip=0.5, noise_multiplier=0.7, width=2, key=KEY)
    state = begun(strategy.inner)
    sent = replies(strategy.inner, state, size=size)
    whole = released(monkeypatch, strategy, state, sent)
    apart = []
    for left_out in range(4):
        rest = released(monkeypatch, strategy, state, [u for u in sent if u.client_id != left_out])
        apart.append([float((one - other).norm()) for one, other in zip(whole, rest, strict=True)])
    assert all(distance <= 0.5 * (1 + 1e-3) for each in apart for distance in each)
    if size > 1:
        assert all(distance > 0.02 for each in apart for distance in each)


def test_the_noise_of_both_releases_has_the_deviation_that_is_accounted_for(monkeypatch):
    """Clients that change nothing leave the noise alone, in Y and in what Q' of the change and the head are."""
    strategy = product_noise_of(load("flora"), clip=0.4, noise_multiplier=2.0, width=6)
    state = strategy.inner.init(start(CLIENTS, shapes=SHAPES))
    sent = replies(strategy.inner, state)
    still = [replace(update, adapter=update.start) for update in sent if update.start]
    drawn: dict[str, list[Tensor]] = {"Y": [], "rest": []}
    for _ in range(5):
        Y, rest = released(monkeypatch, strategy, state, still)
        drawn["Y"].append(Y)
        drawn["rest"].append(rest)
    noise = torch.cat(drawn["Y"]) / (2.0 * 0.4)
    assert len(noise) == 5 * 6 * (40 + 33 + 56 + 12)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    # Q of 6 orthonormal columns keeps the length of P, which has 6 d_in numbers; the head has 6
    squares = torch.cat(drawn["rest"]).square().sum() / (2.0 * 0.4) ** 2
    low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], 5 * (6 * (56 + 56 + 40 + 14) + 6))
    assert low < float(squares) < high


def test_a_module_smaller_than_the_width_is_released_once(monkeypatch):
    strategy = product_noise_of(load("flora"), clip=0.4, noise_multiplier=2.0, width=WIDTH)
    state = strategy.inner.init(start(CLIENTS, shapes=SHAPES))
    sent = [replace(update, adapter=update.start) for update in replies(strategy.inner, state) if update.start]
    Y, _ = released(monkeypatch, strategy, state, sent)
    assert len(Y) == WIDTH * (40 + 33 + 56)
    drawn = [
        5 * learned(strategy.inner, strategy.aggregate(state, sent, 2))["layers.1.small"].flatten() for _ in range(20)
    ]
    noise = torch.cat(drawn) / (2.0 * 0.4)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_what_a_client_says_about_its_rows_changes_nothing():
    strategy = product_noise_of(load("flora"), clip=0.5, key=KEY)
    state = begun(strategy.inner)
    sent = replies(strategy.inner, state)
    many = [replace(update, num_examples=10**9) for update in sent]
    one, other = (learned(strategy.inner, strategy.aggregate(state, each, 2)) for each in (sent, many))
    assert all(torch.equal(matrix, other[n]) for n, matrix in one.items())


def test_a_moving_clip_pays_for_both_releases_and_the_count():
    """`2/z^2 = 2/z_D^2 + 1/(2 s_b)^2`, by the deviation of the sums and of the count."""
    z = 1.3
    strategy = product_noise_of(load("flora"), clip=0.5, noise_multiplier=z, width=2, quantile=0.5)
    state = strategy.inner.init(start(CLIENTS, shapes={"layers.0.q": (6, 9)}))
    sent = [replace(update, adapter=update.start) for update in replies(strategy.inner, state, 1) if update.start]
    rounds = [strategy.aggregate(state, sent, 1) for _ in range(400)]
    counts = torch.tensor([5 * float(each.memory[MEMORY].tensors["clipped"]) for each in rounds])
    dense = torch.stack(
        [5 * (each.adapter.tensors["head.weight"] - state.adapter.tensors["head.weight"]) for each in rounds]
    )
    of_sum = float(dense.square().mean().sqrt()) / 0.5
    assert 2 / of_sum**2 + 1 / (2 * float(counts.std())) ** 2 == pytest.approx(2 / z**2, rel=0.15)


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_a_run_counts_two_releases_a_round(tmp_path, tiny_llama, caplog, name):
    keys = {
        "strategy__name": name,
        "privacy__level": "client",
        "privacy__epsilon": 20.0,
        "privacy__delta": 1e-3,
        "privacy__clip_quantile": 0.5 if name == "flora" else 0.0,
    }
    with caplog.at_level("INFO", logger="fedlora"):
        _, result = run_locally(tiny(tmp_path, tiny_llama, **keys))
    noise = accountant.noise_for(20.0, 1e-3, 1.0, 4)
    spent = [entry["privacy"]["epsilon"] for entry in result["rounds"]]
    assert result["privacy"]["noise-multiplier"] == noise
    assert spent == [accountant.epsilon(noise, 1.0, 2 * n, 1e-3) for n in (1, 2)]
    assert "two releases a round" in result["privacy"]["mechanism"]
    assert set(result["rounds"][0]["privacy"]["signal-to-noise"]) == set(result["rounds"][0]["norms"])
    assert "A and B both get noise" not in caplog.text


BASE = {"privacy.level": "client", "privacy.noise-multiplier": 1.0, "strategy.name": "flora"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"wire.sum": "sketch"}, r"wire\.sum = sketch: privacy\.level = client clips .*set wire\.sum = none"),
        (
            {"strategy.name": "hetlora"},
            r"HetLora needs the clients' own factors.*or use strategy\.name = .*fedsb.*flora",
        ),
    ],
)
def test_what_breaks_the_promise_is_refused(keys, message):
    with pytest.raises(StrategyError, match=message):
        configured(parse(BASE | keys))
