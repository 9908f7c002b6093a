"""A federation whose clients are spread over several processes, one for each device, against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

import psutil
import pytest
import torch
from flwr.app import Message, RecordDict

from fedlora.clients.node import held_folds
from fedlora.common.errors import ConfigError, RunError
from fedlora.common.events import listen
from fedlora.config import Config, parse
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import devices as module
from fedlora.simulations.engines.devices import Child, devices_of
from tests.device import DEVICE, bound, run_bound, starts_processes
from tests.federation import hears_ctrl_c, tiny
from tests.simulations.engines.test_cohorts import apart
from tests.simulations.engines.test_local import crashing, saved_adapter

TWO = (str(DEVICE),) * 2


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    pass


def children() -> list[int]:
    """Pids of the processes that multiprocessing started here; its resource tracker is no such one."""
    return sorted(process.pid for process in workers_of(os.getpid()))


def workers_of(pid: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def result_of(config: Config) -> dict:
    return json.loads((folder_of(config) / "result.json").read_text())


def config_of(folder, model, name: str, **keys) -> Config:
    return parse({"run.id": name}, tiny(folder, model, **keys))


CASES = {
    "flora": {"strategy__name": "flora", "federation__fraction": 0.75, "federation__rounds": 4},
    "fedsa": {
        "strategy__name": "fedsa",
        "federation__fraction": 0.75,
        "federation__rounds": 3,
        "evaluate__clients": True,
        "data__client_test_fraction": 0.3,
    },
}


@starts_processes
@pytest.mark.parametrize(
    ("strategy", "at_once"),
    [
        ("flora", "auto"),
        pytest.param("flora", "1", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("fedsa", "1", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("fedsa", "auto", marks=pytest.mark.slow),
    ],
)
def test_what_is_learned_does_not_depend_on_the_number_of_devices(tmp_path, tiny_llama, strategy, at_once):
    keys = CASES[strategy] | {"train__clients_at_once": at_once}
    told: dict[str, list[tuple[str, int, int]]] = {"one": [], "two": []}
    configs = {name: config_of(tmp_path, tiny_llama, name, **keys) for name in told}
    for name, devices in (("one", ()), ("two", TWO)):
        held_folds._held.clear()
        heard = told[name]
        with listen(lambda kind, facts, heard=heard: heard.append((kind, facts.get("client_id"), facts.get("round")))):
            simulation.in_process(configs[name], devices=devices)
        assert children() == []
    one, two = (result_of(config) for config in configs.values())
    assert apart(*(saved_adapter(folder_of(config)) for config in configs.values())) < run_bound(1e-4)
    for left, right in zip(one["rounds"], two["rounds"], strict=True):
        assert left["clients"].keys() == right["clients"].keys()
        assert right["failures"] == {}
        for client, metrics in left["clients"].items():
            assert right["clients"][client]["train-loss"] == pytest.approx(metrics["train-loss"], rel=1e-4)
        if strategy == "flora":
            assert right["heldout"]["loss"] == pytest.approx(left["heldout"]["loss"], rel=bound(1e-5))
        else:
            assert right["client-test"]["mean"]["loss"] == pytest.approx(left["client-test"]["mean"]["loss"], rel=1e-4)
    kinds = ("client-start", "client-step", "client-trained", "client-evaluated")
    assert sorted(e for e in told["one"] if e[0] in kinds) == sorted(e for e in told["two"] if e[0] in kinds)


@pytest.mark.slow
def test_a_process_that_dies_fails_its_own_messages_and_is_started_again(tmp_path, tiny_llama, caplog):
    """Devices have clients 0 and 2, and 1 and 3; the second is killed while client 1 trains."""
    config = tiny(tmp_path, tiny_llama, federation__rounds=3, federation__min_clients=2, train__clients_at_once="2")
    pids: dict[int, int] = {}
    start = Child._start

    def started(child: Child) -> None:
        start(child)
        if child._log.name == "device-1.txt":
            pids[len(pids) + 1] = child._process.pid

    def kill(kind, facts):
        if kind == "client-step" and facts["round"] == 2 and facts["client_id"] == 1 and facts["step"] == 1:
            os.kill(pids[1], signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch, listen(kill):
        patch.setattr(Child, "_start", started)
        simulation.in_process(config, devices=TWO)
    first, second, third = result_of(config)["rounds"]
    assert first["failures"] == third["failures"] == {}
    assert set(second["clients"]) == {"0", "2"}
    assert set(second["failures"]) == {"1", "3"}
    reason = f"failed: the process on {DEVICE} died with exit code -9, out of memory or killed; its output is in logs/"
    assert f"client 3 {reason}device-1.txt of the run's folder" in second["failures"]["3"]
    assert set(third["clients"]) == {"0", "1", "2", "3"}
    assert len(set(pids.values())) == 2
    assert children() == []


@pytest.mark.slow
@pytest.mark.parametrize("when", ["error", "interrupt"])
def test_no_process_outlives_the_run(tmp_path, tiny_llama, when):
    config = tiny(tmp_path, tiny_llama, train__steps=400)
    seen = []

    def stop(kind, facts):
        if kind == "client-step":
            seen[:] = children()
            raise KeyboardInterrupt if when == "interrupt" else RunError("no more")

    with listen(stop), pytest.raises(KeyboardInterrupt if when == "interrupt" else RunError):
        simulation.in_process(config, devices=TWO)
    assert len(seen) == 2
    assert not any(psutil.pid_exists(pid) for pid in seen)
    assert children() == []
    assert result_of(config)["status"] == ("interrupted" if when == "interrupt" else "failed")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells children that their parent was killed")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_command_that_is_stopped(tmp_path, tiny_llama, how):
    """Ctrl-C reaches the command and its processes alike, whatever they are at: here, they start."""
    flat = tiny(tmp_path, tiny_llama, train__steps=100_000).to_flat()
    own = {key: str(value).lower() if type(value) is bool else value for key, value in flat.items() if value != ""}
    words = [f"-c{key}={value}" for key, value in own.items() if key != "run.id"]
    command = [sys.executable, "-m", "fedlora.cli", "run", "quickstart", "--devices", "cpu,cpu", *words]
    written = tmp_path / "said.txt"
    with written.open("w") as file:
        out = {"stdout": file, "stderr": file}
        process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=hears_ctrl_c, **out)  # noqa: PLW1509
    workers: list[psutil.Process] = []
    try:
        while len(workers) < 2 and process.poll() is None:
            workers = workers_of(process.pid)
            time.sleep(0.05)
        os.killpg(process.pid, how) if how == signal.SIGINT else process.send_signal(how)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert len(workers) == 2, written.read_text()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert code == (-how if how == signal.SIGKILL else 128 + how), written.read_text()
    assert "Traceback" not in written.read_text()


def test_one_device_needs_no_other_process(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(Child, "_start", lambda child: pytest.fail("a process was started"))
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, model__device="auto")
    simulation.in_process(config, devices=("cpu",))
    assert result_of(config)["config"]["model.device"] == "cpu"


def test_a_client_app_of_ones_own_is_not_spread(tmp_path, tiny_llama):
    with pytest.raises(ValueError, match="leave out devices"):
        simulation.in_process(tiny(tmp_path, tiny_llama), client_app=crashing(0, "train"), devices=TWO)


def test_names_of_devices(monkeypatch):
    assert devices_of("cpu, cpu") == ("cpu", "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("auto") == devices_of("cuda:0,cuda:1") == ("cuda:0", "cuda:1")
    with pytest.raises(ConfigError, match=r"'cuda:0,cuda:2': cuda:2 does not exist, torch sees 2 CUDA devices"):
        devices_of("cuda:0,cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert devices_of("auto") == ("cpu",)


@pytest.mark.parametrize("text", ["", "cpu,", "gpu", "cuda", "cuda:-1", "cuda:x", "2", "mps", "auto,cpu", "cpu;cpu"])
def test_a_wrong_name_is_refused(text):
    with pytest.raises(ConfigError, match="expected auto, or cpu and cuda:N"):
        devices_of(text)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "cuda:9"], "--devices 'cuda:9': cuda:9 does not exist"),
        (["--devices", "cpu", "--profile"], "--profile measures this process alone"),
        (["--devices", "cpu", "--engine", "flower"], "place the clients themselves"),
        (["--devices", "cpu", "--server", "here:1"], "place the clients themselves"),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else "",
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, words, says):
    from typer.testing import CliRunner

    from fedlora.cli import main

    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(main.app, ["run", "quickstart", *words]).exception
    assert isinstance(error, ConfigError)
    assert says in str(error)
    assert not (tmp_path / "runs").exists()


class Prompt(Child):
    """Answers its work at once, in this process, when it is listened to."""

    def ask(self, task, requests):
        if self._pipe is None:
            self._pipe, self.other = Pipe()
        self.other.send(("size", 1) if task == "size" else ("answers", [content for content, _ in requests]))

    def stop(self):
        pass


def test_an_answer_that_comes_while_another_is_waited_for_is_there_when_it_is_asked_for(tmp_path, monkeypatch):
    """As of a client that still trains while others evaluate, in a schedule whose rounds do not wait for all."""
    monkeypatch.setattr(module, "Child", Prompt)
    nobody: Any = None
    grid = module.DevicesGrid(nobody, [{}] * 3, {}, 1, devices=("cpu", "cpu"), logs=tmp_path)
    asked = [("train", 2), ("evaluate", 4)]  # on one device
    train, evaluate = grid.push_messages(Message(RecordDict(), node, kind) for kind, node in asked)
    grid._hand_out([train])
    for known in (evaluate, train):
        assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages([known])] == [known]
    assert not grid.pull_messages([evaluate, train])
