"""A run whose process dies goes on where it was, and ends with the bits of one that was never interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from safetensors.torch import load_file

from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import ConfigError, RunError
from fedlora.common.events import listen
from fedlora.config import Config, Scalar, parse, parse_overrides
from fedlora.deployment.flower_programs import config_table
from fedlora.models import adapted
from fedlora.results.record import RunRecord
from fedlora.results.run_folder import folder_of, resumed
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.server import saved_state
from tests.device import ON_CPU, assert_same, assert_same_figures
from tests.federation import tiny
from tests.simulations.engines.test_local import other_base, saved_adapter

ROUNDS = 4
EQUAL = {"lora.ranks": "2"}
PERSONAL = {"evaluate.clients": True, "data.client-test-fraction": 0.3}
RUNS: dict[str, dict[str, Scalar]] = {
    "flora": {"strategy.name": "flora"},
    "flora-merge-half": {"anchor.base-update": "merge", "federation.fraction": 0.5},
    "lora-fair-int8": {"strategy.name": "lora-fair", "wire.upload-dtype": "int8"},
    "lora-fair-bf16": {"strategy.name": "lora-fair", "wire.upload-dtype": "bf16", "wire.dtype": "bf16"},
    "fedsa": {"strategy.name": "fedsa", **PERSONAL},
    "fedsa-int4-half": {"strategy.name": "fedsa", "wire.upload-dtype": "int4", "federation.fraction": 0.5, **PERSONAL},
    "momentum-fedavg": {"strategy.name": "fedavg", "strategy.server-optimizer": "momentum", **EQUAL},
    "restart-adam-fedavg": {
        "strategy.name": "fedavg",
        "strategy.server-optimizer": "adam",
        "strategy.server-lr": 0.01,
        "strategy.restart-every": 2,
        **EQUAL,
    },
    "fedsb": {"strategy.name": "fedsb"},
    "flora-three-at-once": {"strategy.name": "flora", "train.clients-at-once": "3"},
    "flexlora": {"strategy.name": "flexlora"},
    "flora-eva-ranks": {"strategy.name": "flora", "lora.init": "eva", "lora.allocation": "eva"},
    "flora-flexora": {"strategy.name": "flora", "lora.allocation": "flexora"},
    "fedavg-pissa": {"strategy.name": "fedavg", "lora.init": "pissa", **EQUAL},
    "flexlora-comp-lora": {"strategy.name": "flexlora", "lora.init": "comp-lora", "lora.init-options": "k=4"},
    "mtl-lora-int8": {
        "lora.kind": "mtl-lora",
        "strategy.name": "fedavg",
        "wire.upload-dtype": "int8",
        **PERSONAL,
        **EQUAL,
    },
    "dora": {"lora.kind": "dora", "strategy.name": "fedavg", **EQUAL},
    "fedalt-int8": {
        "lora.kind": "fedalt",
        "strategy.name": "fedavg",
        "wire.upload-dtype": "int8",
        **PERSONAL,
        **EQUAL,
    },
    "mixlora-int8": {
        "lora.kind": "mixlora",
        "lora.kind-options": "experts=3",
        "strategy.name": "fedavg",
        "wire.upload-dtype": "int8",
        **EQUAL,
    },
    "ravan-int8": {
        "lora.kind": "ravan",
        "lora.ranks": "4,2,2,1",
        "strategy.name": "fedavg",
        "wire.upload-dtype": "int8",
    },
    "flora-buffered": {
        "strategy.name": "flora",
        "federation.rounds": 6,
        "federation.schedule": "buffered",
        "federation.schedule-options": "size=2, at_once=3",
        "federation.traces": "lognormal",
    },
    "zeropad-int8-buffered": {
        "strategy.name": "fedavg-zeropad",
        "wire.upload-dtype": "int8",
        "federation.schedule": "buffered",
        "federation.schedule-options": "size=2, at_once=4, rate=0.6",
        "federation.traces": "lognormal",
    },
    "florist-synchronous-traces": {
        "strategy.name": "florist",
        "federation.rounds": 6,
        "federation.traces": "lognormal",
    },
    "ffa-synchronous-traces": {
        "strategy.name": "ffa",
        "federation.fraction": 0.5,
        "federation.traces": "diurnal",
        "federation.traces-options": "hours=0.0001, spread=0.00003, speed=300",
    },
    "ffa-deadline": {
        "strategy.name": "ffa",
        "federation.schedule": "deadline",
        "federation.schedule-options": "seconds=0.25",
        "federation.traces": "lognormal",
    },
}
QUICK = (
    "flora-buffered",
    "ffa-deadline",
    "ffa-synchronous-traces",
    "florist-synchronous-traces",
    *("flora", "lora-fair-int8", "fedsa", "flora-eva-ranks", "flora-flexora", "mtl-lora-int8", "fedalt-int8"),
)


class Killed(BaseException):
    """Ends the server's process; no handler of the product catches it to go on."""


@pytest.fixture(autouse=True)
def _fresh_process():
    yield
    forget()


def forget() -> None:
    """As a new process begins: nothing is held."""
    adapted.forget()
    held_folds._held.clear()


def config_of(folder: Path, model: Path, name: str, **keys: Scalar) -> Config:
    base: dict[str, Scalar] = {"federation.rounds": ROUNDS, "lora.dropout": 0.1}
    return parse(base | RUNS[name], tiny(folder, model, **keys))


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter, the server's whole state, and what each client keeps for itself after the last round."""
    state = max((folder / "state").glob("round-*"), key=lambda path: int(path.stem.removeprefix("round-")))
    files = {"adapter": folder / "adapter" / "adapter_model.safetensors", "state": state}
    [run] = (folder / "clients").iterdir() if (folder / "clients").exists() else [folder / "nothing"]
    files |= {str(path.relative_to(run)): path for path in run.rglob("*.safetensors")}
    return {f"{where} {name}": tensor for where, path in files.items() for name, tensor in load_file(path).items()}


def assert_same_bits(one: Path, two: Path) -> None:
    """Those of two runs; on a GPU, the adapters within its rounding."""
    left, right = tensors_of(one), tensors_of(two)
    assert left.keys() == right.keys()
    if ON_CPU:
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    else:  # factors are determined up to a rotation
        assert_same(saved_adapter(one), saved_adapter(two))
    assert any(bool(tensor.any()) for name, tensor in left.items() if name.startswith(("adapter", "client-")))


def assert_differ(one: Path, two: Path) -> None:
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    assert any(key not in right or not torch.equal(left[key], right[key]) for key in left)


def die(config: Config, when: Callable[[str, dict[str, Any]], bool]) -> Path:
    """Run until an event, and end there."""

    def listener(kind: str, facts: dict[str, Any]) -> None:
        if when(kind, facts):
            raise Killed

    with listen(listener), pytest.raises(Killed):
        simulation.in_process(config)
    forget()
    return folder_of(config)


def amid_round(number: int, *, virtual: bool = False) -> Callable[[str, dict[str, Any]], bool]:
    """A client has trained the round, and the next has begun; or, where all train at first, has been heard."""
    trained: list[int] = []

    def when(kind: str, facts: dict[str, Any]) -> bool:
        if kind == "client-done" and facts["round"] == number:
            trained.append(facts["client_id"])
        return kind == ("client-done" if virtual else "client-step") and facts["round"] == number and bool(trained)

    return when


def go_on(folder: Path, *overrides: str, from_round: int = -1) -> dict[str, Any]:
    simulation.in_process(resumed(folder, overrides, from_round))
    return result_of(folder)


@pytest.mark.parametrize(
    "name",
    [
        "lora-fair-int8",
        *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.nightly]) for name in ("flora", "fedsa")),
    ],
)
def test_a_run_goes_back_to_an_earlier_round_with_all_that_was_kept_then(tmp_path, tiny_llama, name):
    """Also what clients keep for themselves, and also after a process that died: the same bits from there on."""
    whole = config_of(tmp_path, tiny_llama, name, run__id="whole")
    simulation.in_process(whole)
    forget()
    config = config_of(tmp_path, tiny_llama, name)
    simulation.in_process(config)
    forget()
    folder = folder_of(config)
    assert sorted(path.name for path in (folder / "state").iterdir()) == [
        f"round-{number}.safetensors" for number in (2, 3, 4)
    ]
    with pytest.raises(RunError, match="no state after round 1 is kept; there are states after rounds: 2, 3, 4"):
        go_on(folder, from_round=1)
    forget()

    def die_in_round_3(kind: str, facts: dict[str, Any]) -> None:
        if kind == "client-step" and facts["round"] == 3:
            raise Killed

    with listen(die_in_round_3), pytest.raises(Killed):
        go_on(folder, from_round=2)
    forget()
    assert [path.name for path in (folder / "state").iterdir()] == ["round-2.safetensors"]
    assert [entry["round"] for entry in result_of(folder)["rounds"]] == [1, 2]
    if name != "fedsa":  # what it saves is a part of a model
        assert_differ(folder, folder_of(whole))
    result = go_on(folder)  # as any run whose process died, from where it had gone back to
    assert result["status"] == "completed"
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3, 4]
    assert_same_bits(folder_of(whole), folder)


@pytest.mark.parametrize("name", ["zeropad-int8-buffered", "ffa-synchronous-traces"])
def test_a_run_with_a_clock_goes_back_to_an_earlier_round_and_its_time(tmp_path, tiny_llama, name):
    """With the clients that were training after it, and the states from which they did; and goes on after it died."""
    whole = parse({"federation.rounds": 6}, config_of(tmp_path, tiny_llama, name, run__id="whole"))
    simulation.in_process(whole)
    forget()
    config = parse({"run.id": "back"}, whole)
    simulation.in_process(config)
    forget()
    result = go_on(folder_of(config), from_round=4)
    assert_same_bits(folder_of(whole), folder_of(config))
    assert_same_times(result, result_of(folder_of(whole)))


def assert_same_times(one: dict[str, Any], two: dict[str, Any]) -> None:
    for left, right in zip(one["rounds"], two["rounds"], strict=True):
        assert left["time"] == right["time"]
        assert left.get("staleness") == right.get("staleness")
        times = [{c: (e["asked"], e["answered"]) for c, e in each["clients"].items()} for each in (left, right)]
        assert times[0] == times[1]


def test_a_run_goes_back_after_another_learning_went_wrong_and_keeps_as_many_states_as_asked(tmp_path, tiny_llama):
    config = config_of(tmp_path, tiny_llama, "flora", run__keep=1)
    simulation.in_process(config)
    folder = folder_of(config)
    assert [path.name for path in (folder / "state").iterdir()] == ["round-4.safetensors"]
    with pytest.raises(RunError, match=r"all 4 rounds are complete.*go back with --from-round"):
        resumed(folder)
    with pytest.raises(ConfigError, match=r"run.from-round works only in a run that is resumed"):
        parse({"run.from-round": 2})


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=[pytest.mark.slow, pytest.mark.nightly]) for n in RUNS],
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(tmp_path, tiny_llama, name):
    whole = config_of(tmp_path, tiny_llama, name, run__id="whole")
    simulation.in_process(whole)
    forget()
    config = parse({"run.id": "broken"}, whole)
    folder = die(config, amid_round(3, virtual="federation.traces" in RUNS[name]))
    assert [entry["round"] for entry in result_of(folder)["rounds"]][-1] == 2
    result = go_on(folder)
    assert_same_bits(folder, folder_of(whole))
    expected = result_of(folder_of(whole))
    assert result["status"] == "completed"
    assert "error" not in result
    assert [entry["round"] for entry in result["rounds"]] == [entry["round"] for entry in expected["rounds"]]
    for figure in ("train-loss", "heldout", "client-test"):
        assert_same_figures([e.get(figure) for e in result["rounds"]], [e.get(figure) for e in expected["rounds"]])
    if "federation.traces" in RUNS[name]:
        assert_same_times(result, expected)
        assert [e["download-bytes"] for e in result["rounds"]] == [e["download-bytes"] for e in expected["rounds"]]
    assert [entry["after-round"] for entry in result["resumed"]] == [2]
    assert parse(result["config"]) == config


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["flora", "fedsa", "lora-fair-int8", "flora-buffered"])
def test_it_may_die_anywhere_and_again(tmp_path, tiny_llama, monkeypatch, name):
    """In round 1; after round 2 was recorded, before its checkpoint; right after a checkpoint; after the last one."""
    whole = config_of(tmp_path, tiny_llama, name, run__id="whole")
    simulation.in_process(whole)
    forget()
    folder = die(parse({"run.id": "broken"}, whole), amid_round(1, virtual="federation.traces" in RUNS[name]))
    assert result_of(folder)["rounds"] == []
    save = saved_state.save

    def dies_before(state_folder: Path, state: Any, number: int, run: str, **kept: Any) -> None:
        if number == 2:
            raise Killed
        save(state_folder, state, number, run, **kept)

    def dies_after(state_folder: Path, state: Any, number: int, run: str, **kept: Any) -> None:
        save(state_folder, state, number, run, **kept)
        if number in (3, ROUNDS):
            raise Killed

    for dies, done in ((dies_before, 1), (dies_after, 3), (dies_after, ROUNDS)):
        with monkeypatch.context() as patch:
            patch.setattr(saved_state, "save", dies)
            with pytest.raises(Killed):
                simulation.in_process(resumed(folder))
        forget()
        key = result_of(folder)["key"]
        saved = saved_state.load(folder / "state", key)
        assert saved is not None
        assert saved[1] == done
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")  # was not on the disk yet
    result = go_on(folder)
    assert result["key"] == key
    assert_same_bits(folder, folder_of(whole))
    first = 0 if name == "flora-buffered" else None  # the state before round 1 is saved where a client may be late
    assert [entry["after-round"] for entry in result["resumed"]] == [first, 1, 3, ROUNDS]
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3, 4]


def test_a_complete_run_goes_on_to_more_rounds(tmp_path, tiny_llama):
    steady = {"train__schedule": "constant", "train__warmup_fraction": 0.0}
    whole = config_of(tmp_path, tiny_llama, "momentum-fedavg", run__id="whole", **steady)
    simulation.in_process(whole)
    forget()
    config = parse({"run.id": "grown", "federation.rounds": 2}, whole)
    simulation.in_process(config)
    forget()
    folder = folder_of(config)
    with pytest.raises(RunError, match=r"all 2 rounds are complete; for more rounds set a larger federation\.rounds"):
        resumed(folder)
    go_on(folder, f"federation.rounds={ROUNDS}")
    assert_same_bits(folder, folder_of(whole))


def test_tensorboard_goes_on_and_drops_what_is_played_again(tmp_path, tiny_llama):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = die(config_of(tmp_path, tiny_llama, "flora"), amid_round(3))
    go_on(folder)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("heldout/loss")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.lr=0.5", r"train\.lr = 0\.5: the run to resume has 0\.005"),
        ("strategy.name=fedex", r"strategy\.name = 'fedex': the run to resume has 'flora'"),
        ("run.seed=1", r"run\.seed = 1: the run to resume has 0"),
        ("data.source=other.jsonl", r"data\.source = 'other\.jsonl'"),
        ("federation.rounds=2", r"federation\.rounds = 2: .* more rounds than its 4, but not fewer"),
        ("train.rl=1", r"unknown key 'train\.rl'"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_name(tmp_path, tiny_llama, override, says):
    folder = die(config_of(tmp_path, tiny_llama, "flora"), amid_round(1))
    before = (folder / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=says):
        resumed(folder, [override])
    if not override.startswith("train.rl"):  # as Flower's own command would: the same keys, and run.resume
        changed = parse_overrides([override]) | {"run.resume": True}
        with pytest.raises(ConfigError, match=says):
            simulation.in_process(parse(changed, parse(result_of(folder)["config"])))
    assert (folder / "result.json").read_bytes() == before


def test_what_does_not_decide_the_result_may_change(tmp_path, tiny_llama):
    folder = die(config_of(tmp_path, tiny_llama, "flora"), amid_round(2))
    config = resumed(folder, ["federation.min-clients=2", "federation.round-timeout=60", "evaluate.every=2"])
    assert config.federation.min_clients == 2
    assert config.run.resume


def test_a_folder_without_a_run_is_one_sentence(tmp_path, tiny_llama):
    with pytest.raises(RunError, match=r"no run here, result\.json is missing"):
        resumed(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: cannot be read"):
        resumed(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": 1}')
    with pytest.raises(RunError, match=r"result\.json: not the record of a run"):
        resumed(tmp_path)
    with pytest.raises(ConfigError, match=r"run\.resume = true needs run\.id"):
        parse({"run.resume": True})


def test_a_checkpoint_that_is_gone_broken_or_foreign_is_one_sentence(tmp_path, tiny_llama):
    folder = die(config_of(tmp_path, tiny_llama, "flora", run__keep=1), amid_round(4))
    path = folder / "state" / "round-3.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(RunError, match=r"round-3\.safetensors: not a readable state"):
        go_on(folder)
    path.unlink()
    with pytest.raises(RunError, match="3 rounds are recorded, but there is no saved state in"):
        go_on(folder)
    other = die(config_of(tmp_path, tiny_llama, "flora", run__id="other", run__keep=1), amid_round(4))
    path.write_bytes((other / "state" / "round-3.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"round-3\.safetensors: the state of another run"):
        go_on(folder)
    assert len(result_of(folder)["rounds"]) == 3
    path.write_bytes(good)
    assert go_on(folder)["status"] == "completed"


def test_another_base_model_is_refused(tmp_path, tiny_llama):
    folder = die(config_of(tmp_path, tiny_llama, "flora"), amid_round(2))
    data = result_of(folder) | {"base": "another"}
    (folder / "result.json").write_text(json.dumps(data))
    with pytest.raises(RunError, match="its rounds were on base model 'another'"):
        go_on(folder)


def test_two_processes_cannot_be_at_one_run(tmp_path, tiny_llama):
    config = config_of(tmp_path, tiny_llama, "flora")
    record = RunRecord(config)
    (record.folder / "result.json").write_text(json.dumps(result_of(record.folder) | {"error": "of the time before"}))
    says = rf"process {os.getpid()} on .* still works on this run; wait for it, or stop it \(kill {os.getpid()}\)"
    with pytest.raises(RunError, match=says):
        resumed(record.folder)
    again = replace(config, run=replace(config.run, resume=True))
    with pytest.raises(RunError, match=says):
        simulation.in_process(again)
    record.finish("interrupted")
    assert go_on(record.folder)["status"] == "completed"


def test_too_few_clients_fail_the_run_and_it_can_go_on(tmp_path, tiny_llama):
    whole = config_of(tmp_path, tiny_llama, "flora", run__id="whole", federation__min_clients=3)
    simulation.in_process(whole)
    forget()
    config = parse({"run.id": "broken"}, whole)
    gone: list[int] = []

    def two_leave(kind: str, facts: dict[str, Any]) -> None:
        if kind == "round-end" and facts["entry"]["round"] == 2:
            gone.extend((1, 2))

    def answer(message: Message, context: Context) -> Message:
        return other_base(*gone)(message, context)

    with listen(two_leave), pytest.raises(RunError, match=r"round 3: 2 of 4 clients answered.*min-clients = 3"):
        simulation.in_process(config, client_app=answer)
    folder = folder_of(config)
    result = result_of(folder)
    assert result["status"] == "failed"
    assert (folder / "state" / "round-2.safetensors").is_file()
    forget()
    assert go_on(folder)["status"] == "completed"
    assert_same_bits(folder, folder_of(whole))


def test_a_full_disk_fails_the_run_and_it_can_go_on(tmp_path, tiny_llama, monkeypatch):
    whole = config_of(tmp_path, tiny_llama, "lora-fair-int8", run__id="whole")
    simulation.in_process(whole)
    forget()
    config = parse({"run.id": "broken"}, whole)
    folder = folder_of(config)
    write = saved_state.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "round-3" in path.name:
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "save_file", full)
        with pytest.raises(RunError, match=r"state/round-3\.safetensors: .*No space left on device; make room"):
            simulation.in_process(config)
    result = result_of(folder)
    assert result["status"] == "failed"
    assert "round-3.safetensors" in result["error"]
    assert sorted(path.name for path in (folder / "state").iterdir()) == [
        f"round-{number}.safetensors" for number in (1, 2)
    ]
    forget()
    go_on(folder)
    assert_same_bits(folder, folder_of(whole))


def test_a_record_that_cannot_be_written_names_the_file_and_not_the_record_of_that(tmp_path, tiny_llama, monkeypatch):
    from fedlora.results import record as results

    config = config_of(tmp_path, tiny_llama, "flora")
    write = results.write_json

    def full(path: Path, data: Any) -> None:
        if data["rounds"]:
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write_json", full)
        with pytest.raises(RunError, match=r"result\.json: cannot be written: .*No space left"):
            simulation.in_process(config)
    forget()
    assert go_on(folder_of(config))["status"] == "completed"


class SlowGrid(local.LocalGrid):
    """One client's replies come a round late, also to those who did not ask for them."""

    def __init__(self, *words: Any, late: int) -> None:
        super().__init__(*words)
        self._late = late
        self._kept: list[Message] = []
        self.told_late = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            of_train = reply.metadata.message_type == "train"
            if of_train and reply.metadata.src_node_id == self._late and reply.metadata.group_id == "1":
                self._kept.append(reply)
                return []
            if of_train and reply.metadata.group_id == "2" and self._kept:
                self.told_late += 1
                return [self._kept.pop(), reply]
        return replies


def test_a_straggler_is_not_waited_for_and_its_late_reply_is_dropped(tmp_path, tiny_llama):
    from fedlora.strategies.server_app import app as server_app

    config = config_of(tmp_path, tiny_llama, "flora", federation__round_timeout=8.0, train__steps=1)
    config = parse({"federation.rounds": 2}, config)
    run_config = config.to_flat()
    nodes: list[dict[str, Scalar]] = [{"partition-id": i, "resident": True} for i in range(4)]
    grid = SlowGrid(client_app, nodes, run_config, 5, late=4)  # node 4 is client 2
    began = time.monotonic()
    server_app(grid, Context(5, 1, {}, RecordDict(), run_config))
    assert time.monotonic() - began < 60
    first, second = result_of(folder_of(config))["rounds"]
    assert first["failures"] == {"2": "client 2 did not answer before the deadline (federation.round-timeout)"}
    assert set(first["clients"]) == {"0", "1", "3"}
    assert first["seconds"]["clients"] >= 5
    assert grid.told_late == 1
    assert second["failures"] == {}
    assert set(second["clients"]) == {"0", "1", "2", "3"}


def fedlora(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedlora.cli", *words],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedsa", pytest.param("lora-fair-int8", marks=pytest.mark.nightly)])
def test_a_process_that_is_killed_in_a_round_is_resumed_to_the_same_bits(tmp_path, tiny_llama, name):
    whole = config_of(tmp_path, tiny_llama, name, run__id="whole", train__steps=20)
    simulation.in_process(whole)
    config = parse({"run.id": "broken"}, whole)
    (tmp_path / "run.toml").write_text(config_table(config), encoding="utf-8")
    folder = folder_of(config)
    with fedlora("run", "run.toml", cwd=tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round 3  client 0"):  # it has trained round 3, the others have not
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait(timeout=60) == -signal.SIGKILL
    result = result_of(folder)
    assert result["status"] == "running"
    assert len(result["rounds"]) == 2
    with fedlora("run", "--resume", str(folder), cwd=tmp_path) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "resumed after round 2" in said
    assert_same_bits(folder, folder_of(whole))
    with fedlora("run", "--resume", str(folder), cwd=tmp_path) as process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert f"all {ROUNDS} rounds are complete" in said


@pytest.mark.slow
def test_flowers_engine_goes_on_too(tmp_path, tiny_llama):
    from fedlora.simulations.engines import flower

    whole = config_of(tmp_path, tiny_llama, "flora", run__id="whole")
    simulation.in_process(whole)
    forget()
    folder = die(parse({"run.id": "broken"}, whole), amid_round(3))
    flower.run(resumed(folder))
    result = result_of(folder)
    assert result["status"] == "completed"
    assert [entry["round"] for entry in result["rounds"]] == [1, 2, 3, 4]
    adapters = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, folder_of(whole))]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
