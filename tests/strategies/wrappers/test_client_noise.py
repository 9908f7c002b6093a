"""Privacy of clients: sensitivity by construction, the noise as it is drawn, moving clips, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from scipy import stats
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.common import accountant
from fedlora.common.errors import ConfigError, StrategyError
from fedlora.config import parse
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.results.run_folder import check_changes
from fedlora.simulations import report
from fedlora.simulations.checks import check
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.configured import configured
from fedlora.strategies.registry import NAMES, STRATEGIES
from fedlora.strategies.server.collect import TrainRound
from fedlora.strategies.wrappers.client_noise import MEMORY, ClientNoise, change_of, length_of
from fedlora.strategies.wrappers.sampled_layers import SampledLayers
from fedlora.strategies.wrappers.server_optimizer import ServerOptimizer
from fedlora.trained import export, model_card
from tests.federation import run_locally, tiny
from tests.naive.clients import start, train

EQUAL = [ClientInfo(client_id=i, rank=3, num_examples=1 + 10 * i) for i in range(4)]
UNEQUAL = [ClientInfo(client_id=i, rank=(4, 2, 2, 1)[i], num_examples=1 + i) for i in range(4)]
LINEAR = [name for name in NAMES if STRATEGIES.resolve(name).linear]
KEY = bytes(32)


def clients_of(name: str) -> list[ClientInfo]:
    return UNEQUAL if STRATEGIES.resolve(name).unequal_ranks else EQUAL


def replies(strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], size: float = 0.3):
    return [train(strategy.broadcast(state, client, 1), client, 7, size) for client in clients]


def step(before: ServerState, after: ServerState) -> Tensor:
    """What a round changed in the server's adapter, as one vector in fp64."""
    parts = [
        [getattr(a, which) - getattr(b, which) for which in "ABR" if getattr(b, which) is not None]
        for a, b in zip(after.adapter.lora.values(), before.adapter.lora.values(), strict=True)
    ]
    dense = [after.adapter.tensors[name] - tensor for name, tensor in before.adapter.tensors.items()]
    return torch.cat([tensor.double().flatten() for tensor in [*(t for part in parts for t in part), *dense]])


def begun(strategy: Strategy, clients: Sequence[ClientInfo]) -> ServerState:
    """A state with B that is not zero, so that A has a gradient too, and with a core where the strategy has one."""
    state = strategy.init(start(clients))
    generator = torch.Generator().manual_seed(3)
    lora = {n: replace(f, B=torch.randn(f.B.shape, generator=generator)) for n, f in state.adapter.lora.items()}
    if strategy.cores:
        lora = {n: replace(f, R=torch.randn(f.rank, f.rank, generator=generator)) for n, f in lora.items()}
    return replace(state, adapter=replace(state.adapter, lora=lora))


@pytest.mark.parametrize("name", LINEAR)
def test_without_noise_and_clips_it_is_the_mean_of_the_changes_with_equal_weights(name):
    """At one rank: what the strategy itself makes of the replies, each with the same number of rows."""
    inner = load(name)
    state = begun(inner, EQUAL)
    sent = replies(inner, state, EQUAL)
    own = inner.aggregate(state, [replace(update, num_examples=5) for update in sent], 1)
    got = ClientNoise(inner, clip=1e9, noise_multiplier=1e-15, clients=4).aggregate(state, sent, 1)
    torch.testing.assert_close(step(state, got), step(state, own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.001, 30.0], ids=["short", "long"])
@pytest.mark.parametrize("name", LINEAR)
def test_without_one_client_the_sum_differs_by_at_most_the_clip(name, size):
    """The same noise on both sides, so that what is left is the one client's part, whoever it is."""
    clients = clients_of(name)
    strategy = ClientNoise(load(name), clip=0.5, noise_multiplier=0.7, clients=4, key=KEY)
    state = begun(strategy, clients)
    sent = replies(strategy, state, clients, size)
    with_all = step(state, strategy.aggregate(state, sent, 1))
    apart = []
    for left_out in range(4):
        rest = [update for update in sent if update.client_id != left_out]
        apart.append(float((4 * (with_all - step(state, strategy.aggregate(state, rest, 1)))).norm()))
    assert max(apart) <= 0.5 * (1 + 1e-3)
    if size > 1:  # each is at the bound: the noise of the two sides was the same
        assert min(apart) == pytest.approx(0.5, rel=1e-3)


def test_what_a_client_says_about_its_rows_changes_nothing():
    strategy = ClientNoise(load("fedavg"), clip=0.5, clients=4, key=KEY)
    state = begun(strategy, EQUAL)
    sent = replies(strategy, state, EQUAL)
    one = strategy.aggregate(state, sent, 1)
    other = strategy.aggregate(state, [replace(update, num_examples=10**9) for update in sent], 1)
    assert torch.equal(step(state, one), step(state, other))


def test_rows_of_others_do_not_bound_what_a_client_weighs():
    """`federation.max-share` would let one client's rows decide about another's weight."""
    infos = {i: ClientInfo(client_id=i, rank=3, num_examples=n) for i, n in enumerate((1, 1, 1000))}
    for keys, counted in ((BASE, 1000), ({"strategy.name": "fedavg", "lora.ranks": ""}, 4)):
        this = SimpleNamespace(roster=SimpleNamespace(infos=infos), config=parse(keys))
        assert TrainRound.weights(cast("TrainRound", this), [0, 1, 2])[2] == counted


def test_a_cap_gives_weights_by_rows_and_keeps_the_bound():
    """Rows 1, 11, 21, 31 with a cap of 20: weights 0.05, 0.55, 1, 1, each still over the number of clients."""
    inner = load("fedavg")
    state = begun(inner, EQUAL)
    sent = replies(inner, state, EQUAL, 30.0)
    strategy = ClientNoise(inner, clip=0.5, noise_multiplier=0.7, clients=4, cap=20, key=KEY)
    whole = step(state, strategy.aggregate(state, sent, 1))
    for left_out, weight in enumerate((0.05, 0.55, 1.0, 1.0)):
        rest = [update for update in sent if update.client_id != left_out]
        apart = float((4 * (whole - step(state, strategy.aggregate(state, rest, 1)))).norm())
        assert apart == pytest.approx(0.5 * weight, rel=2e-3)  # the changes are longer than the clip


@pytest.mark.parametrize("name", ["fedavg", "ffa"])
def test_the_noise_has_the_deviation_that_is_accounted_for(name):
    """Clients that change nothing leave the noise alone: N(0, (z C / m)^2) in each number that is sent, in no other."""
    strategy = ClientNoise(load(name), clip=0.4, noise_multiplier=2.0, clients=5)
    state = begun(strategy, EQUAL)
    still = [
        replace(update, adapter=replace(update.start, lora=sent_only(update)))
        for update in replies(strategy, state, EQUAL)
        if update.start
    ]
    drawn = torch.cat([step(state, strategy.aggregate(state, still, 1)) for _ in range(30)])
    noise = drawn[drawn != 0] / (2.0 * 0.4 / 5)
    whole = sum(f.A.numel() * (name == "fedavg") + f.B.numel() for f in state.adapter.lora.values()) + 6
    assert len(noise) == 30 * whole
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
    low, high = stats.chi2.ppf([5e-4, 1 - 5e-4], len(noise))
    assert low < float(noise.square().sum()) < high


def sent_only(update: ClientUpdate) -> dict[str, LoraFactors]:
    """The factors that the client sent, as it was sent them."""
    assert update.start is not None
    return {
        name: replace(update.start.lora[name], A=update.start.lora[name].A if f.A.numel() else f.A)
        for name, f in update.adapter.lora.items()
    }


def test_a_module_that_a_round_leaves_out_gets_no_noise():
    strategy = ClientNoise(SampledLayers(load("fedavg"), count=1), clip=0.5, clients=4)
    state = begun(strategy, EQUAL)
    plan = strategy.broadcast(state, EQUAL[0], 1).plan
    sent = [replace(each, adapter=plan.sent_back(each.adapter)) for each in replies(strategy, state, EQUAL)]
    after, drawn = strategy.aggregate(state, sent, 1), plan.modules
    assert drawn
    for name, factors in after.adapter.lora.items():
        assert torch.equal(factors.A, state.adapter.lora[name].A) == (name not in drawn)


def test_an_optimizer_on_the_server_sees_the_noised_change():
    plain = ClientNoise(load("fedavg"), clip=0.5, clients=4, key=KEY)
    state = begun(plain, EQUAL)
    sent = replies(plain, state, EQUAL)
    moved = ClientNoise(
        ServerOptimizer(load("fedavg"), kind="momentum", lr=0.5, beta1=0.0), clip=0.5, clients=4, key=KEY
    )
    expected = 0.5 * step(state, plain.aggregate(state, sent, 1))
    torch.testing.assert_close(step(state, moved.aggregate(state, sent, 1)), expected, rtol=1e-4, atol=1e-6)


def test_a_moving_clip_finds_the_quantile():
    """Forty clients whose norms are spread evenly up to 4; the clip goes to their median from above and from below."""
    clients = [ClientInfo(client_id=i, rank=3) for i in range(40)]
    inner = load("ffa")
    state = begun(inner, clients)
    sent = []
    for client, update in zip(clients, replies(inner, state, clients), strict=True):
        length = length_of(change_of(update, state.adapter))
        by = 0.1 * (client.client_id + 1) / length
        assert update.start is not None
        lora = {n: replace(f, B=torch.lerp(update.start.lora[n].B, f.B, by)) for n, f in update.adapter.lora.items()}
        dense = {n: torch.lerp(update.start.tensors[n], t, by) for n, t in update.adapter.tensors.items()}
        sent.append(replace(update, adapter=AdapterState(lora=lora, tensors=dense)))
    for first in (0.1, 20.0):
        strategy = ClientNoise(inner, clip=first, noise_multiplier=0.5, clients=40, quantile=0.5, rate=1.0)
        now = state
        for _ in range(30):
            after = strategy.aggregate(now, sent, 1)
            now = replace(state, memory=after.memory)
        assert float(now.memory[MEMORY].tensors["clip"]) == pytest.approx(2.0, abs=0.25)


def test_a_moving_clip_costs_what_a_fixed_one_does():
    """Without one client, both releases together move by 1/z of their deviations."""
    z = 1.3
    strategy = ClientNoise(load("ffa"), clip=0.5, noise_multiplier=z, clients=4, quantile=0.5, key=KEY)
    state = begun(strategy, EQUAL)
    sent = replies(strategy, state, EQUAL, 30.0)
    one, other = strategy.aggregate(state, sent, 1), strategy.aggregate(state, sent[1:], 1)
    of_sum = float((4 * (step(state, one) - step(state, other))).norm())
    shares = [1 - float(each.memory[MEMORY].tensors["clipped"]) for each in (one, other)]
    of_count = 4 * abs(shares[0] - shares[1])
    assert of_sum == pytest.approx(0.5, rel=1e-3)
    assert of_count == pytest.approx(0.5, rel=1e-6)
    of_noise = measured(replace(strategy, key=None), state, sent)
    assert (of_sum / of_noise[0]) ** 2 + (of_count / of_noise[1]) ** 2 == pytest.approx(1 / z**2, rel=0.15)


def measured(strategy: ClientNoise, state: ServerState, sent: Sequence[ClientUpdate]) -> tuple[float, float]:
    """The deviations of the sum's numbers and of the count, over draws."""
    rounds = [strategy.aggregate(state, sent, 1) for _ in range(300)]
    sums = torch.stack([4 * step(state, each) for each in rounds]).std(dim=0)
    counts = torch.tensor([4 * float(each.memory[MEMORY].tensors["clipped"]) for each in rounds])
    return float(sums[sums > 0].mean()), float(counts.std())


BASE = {"privacy.level": "client", "privacy.noise-multiplier": 1.0, "strategy.name": "fedavg", "lora.ranks": ""}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy.name": "hetlora"}, r"HetLora needs .*or use strategy\.name = .*fedavg.*ffa.*flora.*rolora"),
        ({"strategy.robust": "median"}, r"strategy\.robust = median compares .*set strategy\.robust = none"),
        (
            {"strategy.name": "ffa", "strategy.correction": "feddyn"},
            r"strategy\.correction = feddyn adds up changes over rounds, which privacy\.level = client changes again",
        ),
    ],
)
def test_what_breaks_the_promise_is_refused(keys, message):
    with pytest.raises(StrategyError, match=message):
        configured(parse(BASE | keys))


@pytest.mark.parametrize("level", ["client", "example"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora__init": "eva"}, r"statistics of the clients' rows .*without noise.*set lora\.init = uniform"),
        ({"lora__allocation": "gelora"}, r"lora\.allocation = gelora .*without noise.*set lora\.allocation = pattern"),
        ({"lora__kind": "miss"}, r"lora\.kind = miss: .* set lora\.kind = lora"),
    ],
)
def test_what_leaves_clients_without_noise_is_refused(tmp_path, tiny_llama, level, keys, message):
    private = {"privacy__level": level, "privacy__noise_multiplier": 1.0, "strategy__name": "fedavg", "lora__ranks": ""}
    with pytest.raises(StrategyError, match=message):
        check(tiny(tmp_path, tiny_llama, **private, **keys))


@pytest.mark.parametrize("level", ["client", "example"])
def test_fedsb_has_to_start_from_weights(tmp_path, tiny_llama, level):
    keys = {"privacy__level": level, "privacy__noise_multiplier": 1.0, "strategy__name": "fedsb"}
    fix = r"set lora\.init = lora-xs(, or privacy\.start = noise)?$"
    with pytest.raises(StrategyError, match=rf"without noise, and privacy\.level = .* {fix}"):
        check(tiny(tmp_path, tiny_llama, **keys))
    check(tiny(tmp_path, tiny_llama, **keys, lora__init="lora-xs"))


def test_a_run_of_fedsb_with_privacy_of_clients(tmp_path, tiny_llama):
    keys = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "strategy__name": "fedsb"}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **keys, lora__init="lora-xs"))
    assert [entry["round"] for entry in result["rounds"]] == [1, 2]  # there is no round 0
    assert result["privacy"]["releases"] == 2
    assert set(result["rounds"][0]["privacy"]["signal-to-noise"]) == set(result["rounds"][0]["norms"])


def test_a_run_counts_what_it_spends(tmp_path, tiny_llama, caplog):
    keys = {
        "strategy__name": "fedavg",
        "lora__ranks": "",
        "lora__rank": 2,
        "privacy__level": "client",
        "privacy__epsilon": 20.0,
        "privacy__delta": 1e-3,
        "privacy__clip_quantile": 0.5,
    }
    with caplog.at_level("INFO", logger="fedlora"):
        folder, result = run_locally(tiny(tmp_path, tiny_llama, **keys))
    noise = accountant.noise_for(20.0, 1e-3, 1.0, 2)
    spent = [entry["privacy"]["epsilon"] for entry in result["rounds"]]
    assert spent == [accountant.epsilon(noise, 1.0, n, 1e-3) for n in (1, 2)]
    assert spent[0] < spent[1] <= 20.0
    assert result["privacy"]["releases"] == 2
    assert result["privacy"]["participations"] == dict.fromkeys("0123", 2)
    assert "Gaussian noise from the server" in result["privacy"]["mechanism"]
    assert set(result["rounds"][0]["privacy"]["signal-to-noise"]) == set(result["rounds"][0]["norms"])
    assert result["rounds"][0]["privacy"]["clip"] == 1.0
    assert result["rounds"][1]["privacy"]["clip"] != 1.0
    assert "A and B both get noise" in caplog.text
    page = report.write(folder, tmp_path / "page").read_text(encoding="utf-8")
    assert f"Privacy: epsilon {spent[1]:.2f} at delta 0.001, by Gaussian noise from the server" in page
    assert "signal over noise" in page
    source = export.find(folder)
    card = model_card.render(model_card.Card(source.config, source.about, result, {}, "", "x"))
    assert f"differentially private for all rows of one client together, with epsilon {spent[1]:.3g} at delta" in card
    assert "this was not prevented" not in card
    more = tiny(tmp_path, tiny_llama, federation__rounds=3, run__resume=True, **keys)
    with pytest.raises(
        ConfigError, match=r"federation\.rounds = 3: the noise .*leave it unchanged, or start a new run"
    ):
        check_changes(result, more)
    assert folder.exists()
    assert math.isfinite(result["rounds"][-1]["heldout"]["loss"])


def test_no_client_decides_whether_another_one_counts(tmp_path, tiny_llama):
    """A bound at the median sets clients aside by what others sent; with privacy of clients it is not applied."""
    keys = {"strategy__name": "fedavg", "lora__ranks": "", "federation__max_move": 1.0, "federation__rounds": 1}
    _, plain = run_locally(tiny(tmp_path, tiny_llama, **keys))
    assert plain["rounds"][0]["failures"]
    private = {"privacy__level": "client", "privacy__noise_multiplier": 1.0, "run__id": "two"}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **keys, **private))
    assert result["rounds"][0]["failures"] == {}
    assert len(result["rounds"][0]["clients"]) == 4
