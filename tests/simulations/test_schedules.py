"""Schedules that do not wait for all: equal to the synchronous run where nothing is stale, exact where something is."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.clients.client_app import app as client_app
from fedlora.common.errors import ConfigError, FedLoraError, RunError
from fedlora.common.events import listen
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.results.record import RunRecord
from fedlora.results.run_folder import folder_of, resumed, stored
from fedlora.simulations.engines.local import LocalGrid
from fedlora.simulations.engines.traces import Device, Traces, traces_of
from fedlora.strategies.schedules.session import Session
from fedlora.strategies.server import overlapping
from fedlora.strategies.server.clock import WallClock
from fedlora.strategies.server.flights import Flight
from fedlora.strategies.server.rebased import rebased
from fedlora.strategies.server.roster import Meeting
from fedlora.strategies.server_app import app as server_app
from tests.device import run_bound
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

QUICK: dict[str, Any] = {"federation__rounds": 3, "train__steps": 2}


def two(tmp_path, model, one: dict[str, Any], other: dict[str, Any]):
    found = []
    for name, keys in (("one", one), ("two", other)):
        (tmp_path / name).mkdir()
        found.append(run_locally(tiny(tmp_path / name, model, **(QUICK | keys))))
    return found


@pytest.mark.parametrize("strategy", ["fedavg-zeropad", "ffa", "flora", "florist"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_buffered_without_staleness_is_the_synchronous_run_bit_by_bit(tmp_path, tiny_llama, strategy, fraction):
    keys = {"strategy__name": strategy, "federation__fraction": fraction}
    (a, one), (b, other) = two(tmp_path, tiny_llama, keys, keys | {"federation__schedule": "buffered"})
    first, second = saved_adapter(a), saved_adapter(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for x, y in zip(one["rounds"], other["rounds"], strict=True):
        assert x["heldout"] == y["heldout"]
        assert x["clients"].keys() == y["clients"].keys()
        assert {*y["staleness"].values()} == {0}
    assert [entry["time"] for entry in other["rounds"]] == [1.0, 2.0, 3.0]


@dataclass(frozen=True)
class Given(Traces):
    """Client k needs `seconds[k]` seconds for each training."""

    seconds: ClassVar[tuple[float, ...]] = (1.0, 2.0, 3.0, 7.0)

    def device(self, client: int) -> Device | None:
        return None

    def arrives(self, client: int, asked: float, down: int, tokens: int, up: int) -> float:
        return asked + self.seconds[client]


GIVEN = {"federation__traces": f"{__name__}:Given", "strategy__name": "fedavg-zeropad"}


def replayed(rounds: int, size: int) -> list[tuple[float, dict[int, int]]]:
    """(time, staleness) of each round, where all four clients train at once and each begins again when it may."""
    ends = {client: (seconds, 1) for client, seconds in enumerate(Given.seconds)}
    made, now = [], 0.0
    for number in range(1, rounds + 1):
        heard: dict[int, int] = {}
        while len(heard) < size:
            now = min(time for time, _ in ends.values())
            for client in sorted(c for c, (time, _) in ends.items() if time == now)[: size - len(heard)]:
                heard[client] = number - ends.pop(client)[1]
        ends |= {client: (now + Given.seconds[client], number + 1) for client in heard}
        made.append((now, dict(sorted(heard.items()))))
    return made


@pytest.mark.parametrize(("schedule", "size"), [("buffered", 2), ("fedasync", 1)])
def test_staleness_is_the_number_of_rounds_that_ended_meanwhile(tmp_path, tiny_llama, schedule, size):
    options = f"size={size}, at_once=4"
    keys = GIVEN | {"federation__schedule": schedule, "federation__schedule_options": options, "federation__rounds": 9}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys)))
    found = [(entry["time"], {int(c): s for c, s in entry["staleness"].items()}) for entry in result["rounds"]]
    assert found == replayed(9, size)
    assert any(staleness > 2 for _, each in found for staleness in each.values())


def test_a_round_with_a_deadline_ends_then_and_what_is_late_counts_in_the_next(tmp_path, tiny_llama):
    keys = GIVEN | {"federation__schedule": "deadline", "federation__rounds": 4}
    found = {}
    for late in ("use", "drop"):
        (tmp_path / late).mkdir()
        options = {"federation__schedule_options": f"seconds=2.5, late={late}"}
        _, result = run_locally(tiny(tmp_path / late, tiny_llama, **(QUICK | keys | options)))
        assert {entry["at-once"] for entry in result["rounds"]} == {4}
        found[late] = [
            (e["time"], {int(c): s for c, s in e["staleness"].items()}, e["failures"]) for e in result["rounds"]
        ]
    assert [(time, each) for time, each, _ in found["use"]] == [
        (2.5, {0: 0, 1: 0}),
        (5.0, {0: 0, 1: 0, 2: 1}),
        (7.5, {0: 0, 1: 0, 3: 2}),
        (10.0, {0: 0, 1: 0, 2: 1}),
    ]
    assert all({*each.values()} == {0} for _, each, _ in found["drop"])
    assert any("rounds late" in why for _, _, failures in found["drop"] for why in failures.values())


@dataclass(frozen=True)
class Night(Given):
    """The devices of clients 0 and 1 are there in the first second alone, and from the twentieth on."""

    def awake(self, client: int, time: float) -> bool:
        return client > 1 or not 1.0 <= time < 20.0


@pytest.mark.parametrize("late", ["use", "drop"])
def test_a_round_in_which_only_late_clients_were_there_asks_those_that_sleep(tmp_path, tiny_llama, late):
    keys = GIVEN | {"federation__schedule": "deadline", "federation__rounds": 2, "federation__min_clients": 2}
    keys |= {"federation__traces": f"{__name__}:Night"}
    keys |= {"federation__schedule_options": f"seconds=2.5, late={late}"}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys)))
    assert [len(entry["clients"]) >= 2 for entry in result["rounds"]] == [True, True]


def test_a_client_is_given_up_at_its_own_time_and_another_asked(tmp_path, tiny_llama):
    keys = GIVEN | {"federation__schedule": "fedasync", "federation__schedule_options": "at_once=1"}
    keys |= {"federation__rounds": 12, "federation__round_timeout": 4.5}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys)))
    began, given_up = 0.0, 0
    for entry in result["rounds"]:
        [(client, about)] = entry["clients"].items()
        late = 4.5 if entry["failures"] else 0.0
        assert entry["failures"].keys() <= {"3"}
        assert (about["asked"], entry["time"]) == (began + late, began + late + Given.seconds[int(client)])
        began, given_up = entry["time"], given_up + len(entry["failures"])
    assert given_up


def test_a_question_that_cannot_be_sent_in_time_is_a_client_that_is_late(tmp_path, tiny_llama):
    class Stuck(LocalGrid):
        """Has one message at a time, whose answer never comes."""

        def window_for(self, kind: str) -> float:
            return 1 if kind == "train" else super().window_for(kind)

        def pull_messages(self, message_ids):
            return [reply for reply in super().pull_messages(message_ids) if reply.metadata.message_type != "train"]

    keys = {"federation__schedule": "buffered", "federation__round_timeout": 0.5, "federation__wait_timeout": 0.5}
    config = tiny(tmp_path, tiny_llama, **(QUICK | keys), strategy__name="fedavg-zeropad", evaluate__server=False)
    grid = Stuck(client_app, [{"partition-id": client} for client in range(4)], config.to_flat(), 7)
    with pytest.raises(RunError, match=r"0 of 4 clients answered.*client 0 did not answer before the deadline"):
        server_app(grid, Context(7, 1, {}, RecordDict(), config.to_flat()))


@pytest.mark.parametrize(
    ("schedule", "options"), [("buffered", "size=2, at_once=4"), ("fedasync", "at_once=2"), ("deadline", "seconds=60")]
)
@pytest.mark.parametrize("times", [1, 100])
def test_a_round_that_lost_all_of_its_nodes_waits_for_them(tmp_path, tiny_llama, monkeypatch, schedule, options, times):
    """As when the only edge is started again; they are back after one try, or not within federation.wait-timeout."""
    monkeypatch.setattr(overlapping, "_AGAIN_SECONDS", 0.1)
    tries: Counter[int] = Counter()

    def absent(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and tries[context.node_id] < times:
            tries[context.node_id] += 1
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "away"), reply_to=message)
        return client_app(message, context)

    keys = {"federation__schedule": schedule, "federation__schedule_options": options, "federation__rounds": 2}
    keys |= {"federation__wait_timeout": 2.0, "strategy__name": "fedavg-zeropad", "evaluate__server": False}
    config = tiny(tmp_path, tiny_llama, **(QUICK | keys))
    given: Any = absent
    grid = LocalGrid(given, [{"partition-id": client} for client in range(4)], config.to_flat(), 7)
    if times > 1:
        with pytest.raises(RunError, match=r"round 1: 0 of . clients answered.*away"):
            server_app(grid, Context(7, 1, {}, RecordDict(), config.to_flat()))
        return
    server_app(grid, Context(7, 1, {}, RecordDict(), config.to_flat()))
    rounds = stored(folder_of(config))["rounds"]
    assert len(rounds) == 2
    assert all(not entry["failures"].keys() & entry["clients"].keys() for entry in rounds)


@pytest.mark.parametrize("options", ["size=2, at_once=4", "size=4"])
def test_a_run_begins_with_fewer_clients_than_may_train_at_once(tmp_path, tiny_llama, options):
    """One of them is not there, as after a resume; federation.min-clients says how many it takes."""
    keys = {"federation__schedule": "buffered", "federation__schedule_options": options, "federation__min_clients": 2}
    keys |= {"federation__wait_timeout": 0.5, "strategy__name": "fedavg-zeropad", "evaluate__server": False}
    config = tiny(tmp_path, tiny_llama, **(QUICK | keys))
    grid = LocalGrid(client_app, [{"partition-id": client} for client in range(3)], config.to_flat(), 7)
    server_app(grid, Context(7, 1, {}, RecordDict(), config.to_flat()))
    rounds = stored(folder_of(config))["rounds"]
    assert [len(entry["clients"]) for entry in rounds] == [2 if "size=2" in options else 3] * 3


def test_a_stale_change_is_applied_to_the_present_value_and_damped():
    g = torch.Generator().manual_seed(0)

    def adapter() -> AdapterState:
        lora = LoraFactors(torch.randn(3, 5, generator=g), torch.randn(4, 3, generator=g), 2.0)
        return AdapterState({"m": lora}, {"head": torch.randn(2, 4, generator=g)})

    begun, present, made = adapter(), adapter(), adapter()
    update = ClientUpdate(0, made, 7, start=begun)
    found = rebased(update, begun, present, 0.25, anew=False).adapter
    for part in "AB":
        c, s, x = (getattr(each.lora["m"], part) for each in (present, begun, made))
        torch.testing.assert_close(getattr(found.lora["m"], part), c + 0.25 * (x - s))
    head = present.tensors["head"] + 0.25 * (made.tensors["head"] - begun.tensors["head"])
    torch.testing.assert_close(found.tensors["head"], head)
    only_b = replace(made, lora={"m": replace(made.lora["m"], A=torch.zeros(0, 5))})
    assert not rebased(replace(update, adapter=only_b), begun, present, 0.25, anew=False).adapter.lora["m"].A.numel()
    folded = rebased(update, begun, present, 0.25, anew=True).adapter.lora["m"]
    torch.testing.assert_close(folded.scaling * folded.B @ folded.A, 0.25 * 2.0 * made.lora["m"].B @ made.lora["m"].A)


def test_a_run_goes_on_without_clients_that_are_turned_away_while_they_train(tmp_path, tiny_llama, monkeypatch):
    """As those that came back on another node with another rank."""
    welcome, rounds = Meeting.welcome, iter(range(1, 7))

    def turned(meeting: Meeting) -> list[int]:
        if next(rounds) == 3:
            for client in (2, 3):
                meeting.turn_away(client, "it is another one")
        return welcome(meeting)

    monkeypatch.setattr(Meeting, "welcome", turned)
    keys = {"federation__schedule": "buffered", "federation__schedule_options": "size=1, at_once=4"}
    keys |= {"federation__wait_timeout": 0.0, "federation__rounds": 6}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys)))
    answered = [client for entry in result["rounds"] for client in entry["clients"]]
    assert len(answered) == 6
    assert {*answered[2:]} == {"0", "1"}


def test_a_client_that_is_back_on_another_node_is_asked_anew_and_its_earlier_answer_does_not_count(
    tmp_path, tiny_llama, monkeypatch
):
    """All answers come together, and those that wait for the next round are of the ranks of the first."""
    welcome, rounds = Meeting.welcome, iter(range(1, 7))

    def back(meeting: Meeting) -> list[int]:
        came = welcome(meeting)
        if next(rounds) != 2:
            return came
        meeting.roster.infos[1] = replace(meeting.roster.infos[1], rank=1)
        return [1]

    monkeypatch.setattr(Meeting, "welcome", back)
    keys = {"federation__schedule": "buffered", "federation__schedule_options": "size=1, at_once=4"}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys | {"federation__rounds": 6})))
    assert [entry["failures"] for entry in result["rounds"]] == [{}] * 6
    asked = [about["asked"] for entry in result["rounds"] for c, about in entry["clients"].items() if c == "1"]
    assert asked[0] == 1.0, "the time at which it was back"


@pytest.mark.parametrize("resumes", [True, False])
def test_nothing_is_heard_of_a_client_that_is_left_out_while_it_trains(tmp_path, tiny_llama, monkeypatch, resumes):
    noted = RunRecord.round

    def note(record: RunRecord, entry: dict[str, Any]) -> None:
        noted(record, entry)
        if entry["round"] == 2:
            record.exclude(3, "its update was by far the largest", None)

    monkeypatch.setattr(RunRecord, "round", note)
    keys = GIVEN | {"federation__schedule": "buffered", "federation__schedule_options": "size=2, at_once=4"}
    config = tiny(tmp_path, tiny_llama, **(QUICK | keys | {"federation__rounds": 8}))

    def stop(kind: str, facts: dict[str, Any]) -> None:
        if resumes and kind == "round-end" and facts["entry"]["round"] == 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt), listen(stop):
        run_locally(config)
    rounds = (run_locally(resumed(folder_of(config))) if resumes else [stored(folder_of(config))])[-1]["rounds"]
    assert len(rounds) == 8
    assert not any("3" in entry["clients"] for entry in rounds)


@pytest.mark.parametrize("undone", [True, False])
def test_an_update_from_a_state_that_was_undone_is_moved_to_the_present_one(tmp_path, monkeypatch, undone):
    """As if it were late, although it began in a round of this number."""

    def broadcast(value: float) -> Broadcast:
        return Broadcast(3, AdapterState({"m": LoraFactors(torch.full((1, 2), value), torch.ones(2, 1), 1.0)}))

    info = ClientInfo(client_id=0, rank=1, alpha="1", num_examples=4)
    nobody: Any = None
    roster: Any = SimpleNamespace(infos={0: info}, nodes={0: 2}, answers=lambda node, clients, reply: {0: reply})
    flights: Any = SimpleNamespace(clock=WallClock())
    config, rules = tiny(tmp_path, tmp_path), overlapping.Rules(1, 1)
    this = overlapping.OverlappingRound(
        nobody, config, "", roster, 3, lambda client: broadcast(10.0), keep=False, flights=flights, rules=rules
    )
    began = broadcast(1.0) if undone else broadcast(10.0)
    trained = ClientUpdate(0, broadcast(3.0).adapter, 4, start=began.adapter)
    monkeypatch.setattr(this, "_settle", lambda client, answer: trained)
    this.answers[0] = {}
    make = (lambda client: began) if undone else this.make_broadcast
    update = this._read(Flight(0, 3, 0.0, make, sent=began), None)
    assert update is not None
    assert update.adapter.lora["m"].A.tolist() == [[12.0, 12.0] if undone else [3.0, 3.0]]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"strategy__name": "fedsvd"}, "changes from round to round what a client's factors mean"),
        ({"strategy__name": "rolora"}, "changes from round to round"),
        ({"strategy__name": "fslora"}, "changes from round to round"),  # a client's rows are drawn anew in each round
        ({"strategy__name": "fedsa", "evaluate__clients": True}, "keeps factors on the clients"),
        (
            {"strategy__name": "lora-fair", "wire__sum": "sketch"},
            "sketches of strategy.name = lora-fair cannot be moved",
        ),
        ({"strategy__name": "flora", "wire__sum": "sketch", "wire__sketch_passes": 2}, "some train already; set 1"),
        ({"strategy__name": "flora", "anchor__base_update": "merge"}, "needs the weights of before a merge"),
        ({"federation__schedule_options": "size=3, at_once=2"}, "2 clients at once and 3 updates in a round"),
        ({"federation__schedule_options": "rate=0"}, "rate: expected a number above 0, at most 1"),
    ],
)
def test_what_cannot_be_buffered_is_one_sentence(tmp_path, tiny_llama, keys, why):
    with pytest.raises(FedLoraError, match=why):
        run_locally(tiny(tmp_path, tiny_llama, federation__schedule="buffered", **(QUICK | keys)))


def test_the_numbers_of_a_round_are_those_of_the_weights_that_count(tmp_path, tiny_llama):
    keys = {"federation__max_share": 1.5, "strategy__name": "fedavg", "lora__ranks": "2", "federation__rounds": 1}
    keys |= {"data__partition": "sizes", "data__sizes": "30,8,6,4", "evaluate__server": False}
    (_, one), (_, other) = two(tmp_path, tiny_llama, keys, keys | {"federation__schedule": "buffered"})
    [left], [right] = one["rounds"], other["rounds"]
    counts = [[about["num-examples"] for about in entry["clients"].values()] for entry in (left, right)]
    assert counts[0] == counts[1]
    assert counts[0][0] < 20, "of 30 rows"
    assert len({*counts[0]}) > 1
    for figure in ("aggregation-error", "drift", "update-cosine", "tail-energy", "effective-rank", "norms"):
        assert left[figure] == right[figure]


@dataclass(frozen=True)
class LateRiser(Given):
    """Client 3's device is there from the tenth second on."""

    def awake(self, client: int, time: float) -> bool:
        return client != 3 or time >= 10.0


@pytest.mark.parametrize("schedule", ["synchronous", "buffered"])
def test_devices_that_sleep_are_not_asked(tmp_path, tiny_llama, schedule):
    keys = GIVEN | {
        "federation__traces": f"{__name__}:LateRiser",
        "federation__fraction": 0.5,
        "federation__rounds": 12,
        "federation__schedule": schedule,
    }
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | keys)))
    asked = [about["asked"] for entry in result["rounds"] for c, about in entry["clients"].items() if c == "3"]
    assert min(asked) >= 10.0
    assert all(len(entry["clients"]) == 2 for entry in result["rounds"])


def test_traces_are_refused_by_an_engine_without_a_virtual_clock(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__traces="lognormal")
    without: Any = object()
    with pytest.raises(ConfigError, match="only the local engine on one device has a virtual clock"):
        Session.open(without, config, without, 0)


def test_a_synchronous_round_waits_for_the_slowest_device(tmp_path, tiny_llama):
    _, result = run_locally(tiny(tmp_path, tiny_llama, **(QUICK | GIVEN)))
    assert [entry["time"] for entry in result["rounds"]] == [7.0, 14.0, 21.0]
    assert {c: (e["asked"], e["answered"]) for c, e in result["rounds"][1]["clients"].items()} == {
        str(client): (7.0, 7.0 + seconds) for client, seconds in enumerate(Given.seconds)
    }


@pytest.mark.parametrize("awake", [3600.0, 40000.0, 86400.0])
def test_a_device_works_only_while_it_is_there(awake):
    device = Device(1.0, 1.0, 1.0, wakes=80000.0, awake=awake)
    step = 100.0
    for begun in (0.0, 79000.0, 80050.0, 250000.0):
        for seconds in (50.0, 3600.0, 50000.0, 200000.0):
            time, done = begun, 0.0
            while done < seconds:  # by small steps, each of which it works or not
                done += step if device.there(time + step / 2) else 0.0
                time += step
            assert device.after(begun, seconds) == pytest.approx(time, abs=2 * step)
            assert device.there(device.after(begun, seconds) - 1e-3)


def test_traces_from_a_file_and_what_is_wrong_with_them(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("client,tokens-per-second,down,up,from,to\n0,100,1000,500,22,6\n1,50,1000,500,,\n")
    traces = traces_of(str(path), "")
    assert traces.device(0) == Device(100.0, 1000.0, 500.0, 22 * 3600.0, 8 * 3600.0)
    assert traces.arrives(1, 10.0, 2000, 100, 500) == 10.0 + 2 + 2 + 1
    assert traces.awake(0, 23 * 3600.0)
    assert not traces.awake(0, 12 * 3600.0)
    with pytest.raises(ConfigError, match="has no row for client 2; give each client one"):
        traces.device(2)
    path.write_text("client,tokens-per-second,down,up\n0,fast,1,1\n")
    with pytest.raises(
        ConfigError, match="line 2: expected numbers in the columns client, tokens-per-second, down, up"
    ):
        traces_of(str(path), "").device(0)
    path.write_text("client,tokens-per-second,down,up\n0,1,1,nan\n")
    with pytest.raises(ConfigError, match="line 2: expected finite speeds above 0, and hours from 0 to 24"):
        traces_of(str(path), "").device(0)
    path.write_text("client,tokens-per-second,down,up\n0,1,1,1\n0,2,2,2\n")
    with pytest.raises(ConfigError, match="line 3: client 0 has a row already"):
        traces_of(str(path), "").device(0)
    with pytest.raises(ConfigError, match=r"federation.traces-options.*hours: expected above 0"):
        traces_of("diurnal", "hours=0")
    with pytest.raises(ConfigError, match="did you mean 'diurnal'"):
        traces_of("diurnel", "")


@pytest.mark.parametrize("strategy", ["flora", "florist"])
def test_sketches_of_stale_products_sum_up_to_what_the_products_do(tmp_path, tiny_llama, strategy):
    keys = GIVEN | {
        "strategy__name": strategy,
        "federation__schedule": "buffered",
        "federation__schedule_options": "size=2, at_once=4",
        "federation__rounds": 5,
    }
    sketched = keys | {"wire__sum": "sketch", "wire__sketch_passes": 1, "wire__sketch_width": 32}
    (a, one), (b, other) = two(tmp_path, tiny_llama, keys, sketched)
    assert max(s for entry in other["rounds"] for s in entry["staleness"].values()) > 0
    for x, y in zip(one["rounds"], other["rounds"], strict=True):
        assert x["staleness"] == y["staleness"]
    assert apart(saved_adapter(a), saved_adapter(b)) <= run_bound(1e-5)


@dataclass(frozen=True)
class Slow(Traces):
    """One token in a second, and a network that takes no time."""

    def device(self, client: int) -> Device | None:
        return Device(speed=1.0, down=1e30, up=1e30)


def test_a_training_takes_the_time_of_its_tokens(tmp_path, tiny_llama):
    keys = {"federation__traces": f"{__name__}:Slow", "federation__rounds": 1, "train__steps": 2}
    _, result = run_locally(tiny(tmp_path, tiny_llama, **keys, strategy__name="fedavg-zeropad"))
    clients = result["rounds"][0]["clients"].values()
    assert all(client["answered"] - client["asked"] == pytest.approx(client["train-tokens"]) for client in clients)
    assert result["rounds"][0]["time"] == pytest.approx(max(client["train-tokens"] for client in clients))
