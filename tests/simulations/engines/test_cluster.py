"""Flower's engine over a Ray cluster of two nodes gives the result of the local engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fedlora.common import processes
from fedlora.config import parse
from fedlora.deployment import flower_programs
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from tests.device import run_bound
from tests.federation import tiny
from tests.simulations.engines.test_local import apart, saved_adapter

_START_SECONDS = 240.0
_ASK_SECONDS = 120.0
_TRIES = 4  # Ray gives a node 30 seconds to start, which a busy machine does not keep
# Of the nodes on which actors of the cluster are or were, since Flower's actors end with its run.
_NODES_OF_ACTORS = """
import json, sys, ray
from ray._private import state
ray.init(address=sys.argv[1], log_to_driver=False)
print(json.dumps([len(ray.nodes()), sorted({a["Address"]["NodeID"] for a in state.actors().values()})]))
"""


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine, with one core each."""
    folder = tmp_path_factory.mktemp("ray")
    address = f"127.0.0.1:{processes.free_port()}"
    ray = [flower_programs.program("ray"), "start", "--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false"]
    head += [f"--temp-dir={folder}", "--object-store-memory=100000000"]
    environment = {**os.environ, flower.ALLOW_FILES: "1", flower.PLUGINS: "any", "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, words in enumerate((head, [f"--address={address}", "--object-store-memory=100000000"])):
            log = folder / f"node-{number}.txt"
            for _ in range(_TRIES):
                with log.open("wb") as output:
                    running.append(processes.start([*ray, *words], folder, environment, output))
                if _is_there(number + 1, address, running[-1]):
                    break
            else:
                raise AssertionError(log.read_text(errors="replace"))
        monkeypatch.setenv(flower.RAY_ADDRESS, address)
        yield address
    finally:
        for process in reversed(running):
            processes.stop_tree(process)


def _is_there(nodes: int, address: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the cluster has so many nodes, before the last one's process ends."""
    ends = time.monotonic() + _START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        found = _asked(address)
        if found and found[0] >= nodes:
            return True
        time.sleep(1.0)
    return False


def _asked(address: str) -> list | None:
    command = [sys.executable, "-W", "ignore", "-c", _NODES_OF_ACTORS, address]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_ASK_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1500)
@pytest.mark.skipif(sys.platform == "win32", reason="Ray has no clusters of several nodes on Windows")
def test_two_nodes_of_a_cluster_give_the_adapter_of_one_process(tmp_path, tiny_llama, cluster):
    config = tiny(tmp_path, tiny_llama, federation__wait_timeout=900.0)
    simulation.in_process(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other, at_once=os.cpu_count() or 1)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= run_bound(1e-6)
    nodes, with_actors = _asked(cluster) or (0, [])
    assert nodes == len(with_actors) == 2
