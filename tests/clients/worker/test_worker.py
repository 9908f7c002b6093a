"""The resident worker, as a real process: same answers, one base, hard to kill, nobody else's."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedlora.clients.answering.vigil import Over, Vigil
from fedlora.clients.client_app import app as client_app
from fedlora.clients.worker import caller, process
from fedlora.common.errors import ConfigError
from fedlora.common.events import listen
from fedlora.common.processes import stop_recorded
from fedlora.config import Config
from fedlora.deployment import envelope, resident
from fedlora.exchange import Broadcast, wire
from fedlora.models import base_fingerprint
from fedlora.results.run_folder import folder_of, stamp
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.initializers import uniform
from fedlora.strategies.server_app import app as server_app
from tests.device import assert_same
from tests.federation import tiny
from tests.simulations.engines.test_local import saved_adapter


def test_a_message_crosses_to_the_worker_whole():
    content = RecordDict({"head": ConfigRecord({"a": 1, "b": "x", "c": True, "d": 0.5})})
    context = Context(2**63 + 5, 2**64 - 1, {"rank": 4, "data": "rows.jsonl"}, RecordDict(), {"train.lr": 1e-3})
    task, arrived, there = envelope.unpack_request(envelope.pack_request("train", content, context))
    assert (task, arrived) == ("train", content)
    assert (there.run_id, there.node_id) == (context.run_id, context.node_id)
    assert (there.node_config, there.run_config) == (context.node_config, context.run_config)
    assert envelope.unpack(envelope.pack_answer(content)) == content
    assert envelope.unpack(envelope.pack_event("client-step", {"loss": 0.25})) == ("client-step", {"loss": 0.25})
    refused = envelope.unpack(envelope.pack_answer(Error(wire.REFUSED, "no")))
    assert isinstance(refused, Error)
    assert (refused.code, refused.reason) == (wire.REFUSED, "no")


@pytest.fixture(scope="module")
def socket(tmp_path_factory):
    """Where these tests' worker listens: it takes seconds to import torch and all else."""
    path = tmp_path_factory.mktemp("w") / "worker.sock"
    assert len(str(path)) < 100
    yield path
    stop_recorded(path.with_name("worker.pid"), "worker")
    while caller._started:
        caller._started.pop().wait(timeout=30)


def settings(socket: Path, folder: Path, **more) -> dict:
    return {"partition-id": 0, "worker": str(socket), "state": str(folder), "node-pid": os.getpid(), **more}


def pid(socket: Path) -> int:
    return int(socket.with_name("worker.pid").read_text())


def ask(
    config: Config,
    node_config: dict,
    kind: str = "train",
    seen: list | None = None,
    on_step=None,
    ttl: float | None = None,
) -> Message:
    """One message's answer; what the worker tells goes to `seen`."""

    def tell(event, facts):
        if seen is not None:
            seen.append((event, facts))
        if event == "client-step" and on_step:
            on_step(facts)

    grid = local.LocalGrid(client_app, [node_config], config.to_flat(), 7)
    fingerprint = base_fingerprint(config.model)
    content = wire.encode_hello(fingerprint)
    if kind != "query":
        hello = Message(wire.encode_hello(fingerprint), 2, "query", group_id="0")
        [answer] = local.LocalGrid(client_app, [node_config], config.to_flat(), 7).send_and_receive([hello])
        client = wire.decode_info(answer.content, fingerprint, "node")
        content = wire.encode_broadcast(Broadcast(round=1, adapter=uniform.seeded(config, [client])), fingerprint)
    with listen(tell):
        [answer] = grid.send_and_receive([Message(content, 2, kind, ttl=ttl, group_id="1")])
    return answer


def factors(answer: Message) -> dict[str, bytes]:
    assert not answer.has_error(), answer.error.reason
    return {name: array.data for record in answer.content.array_records.values() for name, array in record.items()}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_federation_through_workers_is_the_same_federation(tmp_path, tiny_llama, socket):
    """Bitwise, strategies that fold included; one worker from the first message to the last."""
    config = stamp(tiny(tmp_path, tiny_llama, strategy__name="flora", evaluate__clients=True, run__id="plain"))
    simulation.in_process(config)
    other = tiny(tmp_path, tiny_llama, strategy__name="flora", evaluate__clients=True, run__id="workers")
    state = tmp_path / "state"
    state.mkdir()
    nodes = [{**settings(socket, state), "partition-id": i, "num-partitions": 4} for i in range(4)]
    kept = []
    with listen(lambda kind, facts: kept.append(kind)):
        server_app(
            local.LocalGrid(client_app, nodes, other.to_flat(), 9), Context(9, 1, {}, RecordDict(), other.to_flat())
        )
    one, two = saved_adapter(folder_of(config)), saved_adapter(folder_of(other))
    assert_same(two, one)
    assert kept.count("worker-start") == 1
    assert kept.count("client-step") == 4 * 2 * 3  # progress comes through
    results = [json.loads((folder_of(c) / "result.json").read_text()) for c in (config, other)]
    first, second = ([e["download-bytes"] for e in result["rounds"]] for result in results)
    assert first == second  # folds that it holds already are not sent again


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_message_that_comes_again_gets_the_same_answer_at_once(tmp_path, tiny_llama, socket):
    """As after a SuperLink that died with the answer: nothing is trained twice, and another message is."""
    config = tiny(tmp_path, tiny_llama, train__steps=4)
    first: list = []
    second: list = []
    third: list = []
    one = ask(config, settings(socket, tmp_path), seen=first)
    two = ask(config, settings(socket, tmp_path), seen=second)
    assert factors(one) == factors(two)
    other = ask(tiny(tmp_path, tiny_llama, train__steps=4, train__lr=1e-4), settings(socket, tmp_path), seen=third)
    assert factors(other) != factors(one)
    steps = [[kind for kind, _ in seen].count("client-step") for seen in (first, second, third)]
    assert steps == [4, 0, 4]


class GoneAway(Exception):
    pass


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_stops_at_what_nobody_waits_for(tmp_path, tiny_llama, socket):
    """A run that is stopped ends its ClientApps; the next message does not wait for the old one's steps."""

    def go_away(facts):
        raise GoneAway

    config = tiny(tmp_path, tiny_llama, train__steps=100_000)
    assert "GoneAway" in ask(config, settings(socket, tmp_path), on_step=go_away).error.reason
    short = tiny(tmp_path, tiny_llama)
    plain = ask(short, {"partition-id": 0, "state": str(tmp_path)})
    assert factors(ask(short, settings(socket, tmp_path))) == factors(plain)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_worker_is_started_again_once(tmp_path, tiny_llama, socket):
    config = tiny(tmp_path, tiny_llama, train__steps=200)  # a few steps would be answered before the first is heard of
    node_config = settings(socket, tmp_path)
    died = ask(config, node_config, on_step=lambda facts: os.kill(pid(socket), signal.SIGKILL))
    assert died.has_error()
    assert "the node's worker ended 2 times during train" in died.error.reason
    seen, killed = [], []

    def kill_once(facts):
        if not killed:
            killed.append(pid(socket))
            os.kill(killed[0], signal.SIGKILL)

    answer = ask(config, node_config, seen=seen, on_step=kill_once)
    assert factors(answer) == factors(ask(config, {"partition-id": 0, "state": str(tmp_path)}))
    assert [kind for kind, _ in seen].count("worker-start") == 1  # another had come with the hello
    assert pid(socket) != killed[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_worker_is_noticed_and_replaced(tmp_path, tiny_llama, socket, monkeypatch):
    """SIGSTOP, as a debugger or a machine without memory does it: it stays there, and says nothing for good."""
    monkeypatch.setattr(resident, "_HEALTH_SECONDS", 2.0)
    monkeypatch.setattr(caller, "_LOOK_SECONDS", 1.0)
    config = tiny(tmp_path, tiny_llama, train__steps=200)
    node_config = settings(socket, tmp_path)
    stopped: list[int] = []

    def stop_once(facts):
        if not stopped:
            stopped.append(pid(socket))
            os.kill(stopped[0], signal.SIGSTOP)

    seen: list = []
    began = time.monotonic()
    answer = ask(config, node_config, seen=seen, on_step=stop_once)
    assert factors(answer) == factors(ask(config, {"partition-id": 0, "state": str(tmp_path)}))
    assert pid(socket) != stopped[0]
    assert not psutil.pid_exists(stopped[0]) or psutil.Process(stopped[0]).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 120
    # between two messages, too
    os.kill(pid(socket), signal.SIGSTOP)
    assert not ask(config, node_config, "query").has_error()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_stops_when_the_messages_lifetime_is_over(tmp_path, tiny_llama, socket):
    config = tiny(tmp_path, tiny_llama, train__steps=100_000)
    began = time.monotonic()
    answer = ask(config, settings(socket, tmp_path), ttl=5.0)
    assert "train was given up: it was not done within the 5 s that its message lives" in answer.error.reason
    assert "federation.round-timeout" in answer.error.reason
    assert not ask(tiny(tmp_path, tiny_llama), settings(socket, tmp_path)).has_error(), "it is free for the next"
    alone = ask(config, {"partition-id": 0, "state": str(tmp_path)}, ttl=5.0)
    assert alone.error.reason == answer.error.reason, "without a worker too"
    assert time.monotonic() - began < 120


@pytest.fixture
def hanging(tmp_path_factory):
    """A worker whose main thread hangs: it is well when asked, and sends the frames given, and then no more."""
    path = tmp_path_factory.mktemp("h") / "worker.sock"
    frames: list[bytes] = []
    let_go = threading.Event()

    def handle(request, context):
        yield from frames
        let_go.wait(60)

    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    method = grpc.unary_stream_rpc_method_handler(handle)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(envelope.SERVICE, {envelope.METHOD: method})])
    service = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    service.set(envelope.SERVICE, health_pb2.HealthCheckResponse.SERVING)
    yield path, frames
    let_go.set()
    server.stop(grace=None).wait()


@pytest.mark.parametrize("begins", [True, False])
def test_a_worker_that_hangs_while_it_is_well_is_killed(hanging, begins, monkeypatch):
    path, frames = hanging
    monkeypatch.setattr(caller, "_QUEUE_SECONDS", 1.0)
    if begins:
        frames += [envelope.pack_event(envelope.BEGUN, {}), envelope.pack_event("client-step", {"step": 1})]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "worker"])
    try:
        path.with_name("worker.pid").write_text(str(child.pid))
        says = (
            r"no step for 1 s \(node config: worker-stall\)" if begins else "did not begin with the message within 1 s"
        )
        with pytest.raises(caller._PastHope, match=says):
            caller._call(path, b"", Vigil(60.0), 1.0)
        child.wait(timeout=10)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("waits", [True, False])
def test_a_message_behind_another_waits_as_long_as_somebody_waits_for_the_other(tmp_path_factory, monkeypatch, waits):
    """Such as that of another client of the node, or a question that is repeated after a lost connection."""
    monkeypatch.setattr(caller, "_QUEUE_SECONDS", 2.0)
    path = tmp_path_factory.mktemp("q") / "worker.sock"
    begun, let_go, over = threading.Event(), threading.Event(), threading.Event()
    handled, answers = [], {}

    def answer(task, content, context, check):
        handled.append(task)
        begun.set()
        let_go.wait(60)
        return RecordDict({"said": ConfigRecord({"task": task})})

    def call(task: str, vigil: Vigil) -> None:
        request = envelope.pack_request(task, RecordDict(), Context(1, 2, {}, RecordDict(), {}))
        try:
            answers[task] = caller._call(path, request, vigil, 60.0)["said"]["task"]
        except (Over, caller._PastHope, grpc.RpcError) as error:
            answers[task] = str(error)

    first = Vigil(60.0)
    threads = [
        threading.Thread(target=resident.serve, args=(path, answer, 60.0, lambda: not over.is_set())),
        threading.Thread(target=call, args=("slow", first)),
        threading.Thread(target=call, args=("next", Vigil(60.0))),
    ]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "worker"]) as child:
        try:
            threads[0].start()
            while not resident.is_healthy(path):
                time.sleep(0.05)
            path.with_name("worker.pid").write_text(str(child.pid))
            threads[1].start()
            assert begun.wait(20)
            threads[2].start()
            if not waits:
                first.over = "its run has ended"
                child.wait(timeout=20)
            else:
                time.sleep(5.0)
                assert child.poll() is None
            let_go.set()
            for thread in threads[1:]:
                thread.join(20)
        finally:
            let_go.set()
            over.set()
            child.kill()
    threads[0].join(20)
    if waits:
        assert handled == ["slow", "next"]
        assert answers == {"slow": "slow", "next": "next"}
    else:
        assert "did not begin with the message within 2 s" in answers["next"]


def test_a_worker_that_is_silent_as_it_loads_its_model_is_waited_for(hanging):
    path, frames = hanging
    frames.append(envelope.pack_event(envelope.BEGUN, {}))
    vigil = Vigil(2.0)
    watching = threading.Thread(target=vigil.keep, args=(None,))
    watching.start()
    with pytest.raises(Over, match="within the 2 s that its message lives"):
        caller._call(path, b"", vigil, 0.5)
    watching.join()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_needs_more_memory_than_the_node_allows_is_refused(tmp_path, tiny_llama, socket):
    config = tiny(tmp_path, tiny_llama, train__batch_size=64, data__max_length=2048)
    node_config = settings(socket, tmp_path, **{"max-memory-mb": 300})
    assert not ask(config, node_config, "query").has_error()
    answer = ask(config, node_config)
    assert answer.error.code == wire.REFUSED
    assert "needs more memory than this node allows (node config: max-memory-mb = 300)" in answer.error.reason


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_is_its_owners_alone_and_ends_when_nobody_needs_it(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("w")
    socket = tmp_path / "worker.sock"
    with subprocess.Popen(["sleep", "60"]) as node:
        caller._make_sure(socket, settings(socket, tmp_path, **{"node-pid": node.pid}))
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        process = psutil.Process(pid(socket))
        caller._make_sure(socket, {})
        assert pid(socket) == process.pid
        node.kill()
    assert psutil.wait_procs([process], timeout=20)[0]
    assert not socket.exists()
    # without a node to belong to, it goes by idle time
    caller._make_sure(socket, {"state": str(tmp_path), "worker-idle": 1})
    assert psutil.wait_procs([psutil.Process(pid(socket))], timeout=30)[0]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_cannot_start_is_an_answer(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    answer = ask(tiny(tmp_path, tiny_llama), settings(tmp_path / "worker.sock", tmp_path), "query")
    assert answer.has_error()
    assert "ended 2 times during describe (it ended at once with exit code 1)" in answer.error.reason


def test_a_socket_that_cannot_be_made_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"--socket .*none/worker\.sock: cannot listen there; give a path of fewer"):
        process.serve(tmp_path / "none" / "worker.sock", None, 1.0)
