"""Flower's simulation engine: a run gets a SuperLink of its own, is started by `flwr run`, and raises if it fails.

Flower's shared local SuperLink outlives its runs and keeps its first caller's folder and environment. Here each
run starts its own SuperLink, on free ports and in a neutral folder, and stops it in the end.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.common import processes
from fedlora.common.processes import free_port
from fedlora.config import Config
from fedlora.deployment import flower_programs
from fedlora.deployment.flower_programs import Connection, absolute, write_bundle
from fedlora.results.run_folder import nothing_left, stamp

from ...clients.node.rules import ALLOW_FILES, PLUGINS
from ..checks import check

RAY_ADDRESS = "RAY_ADDRESS"  # environment variable that Ray itself reads: host:port of a running cluster
_log = logging.getLogger("fedlora")


def run(config: Config, at_once: int = 1) -> None:
    """Run a federation through `flwr run` on Flower's simulation engine (Ray).

    If the environment variable `RAY_ADDRESS` names a Ray cluster, the clients run there; else a Ray of their own is
    started on this machine.

    Args:
        config: the run's configuration.
        at_once: number of clients that train at the same time on a machine, each with its own process and base model.
            They share the cores, and a GPU if there is one; all machines of a cluster are taken to be like this one.

    Raises:
        RunError: Flower did not start, or the run did not complete; the message says why.
    """
    processes.share_cores(at_once)
    config = absolute(stamp(config))
    check(config)
    with nothing_left(config), tempfile.TemporaryDirectory(prefix="fedlora-flower-") as scratch:
        home = Path(scratch)
        bundle = write_bundle(config, home / "app")
        with _superlink(home) as environment:
            _log.info("starting Flower's simulation engine")
            connection = Connection("local", environment, home)
            flower_programs.carry_out(config, bundle, connection, home / "superlink.log", _resources(config, at_once))


@contextmanager
def _superlink(home: Path) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode for one run; yields the environment of `flwr`."""
    port, control = free_port(), free_port()
    environment = flower_programs.environment(home / "flwr") | {
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        PLUGINS: "any",
        ALLOW_FILES: "1",  # clients run as the user who named the files; Flower sets their node configs, not FedLoRA
    }
    command = [flower_programs.program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}"]
    log = home / "superlink.log"
    with log.open("wb") as output:
        process = processes.start(command, home, environment, output)
    try:
        flower_programs.wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield environment
    finally:
        processes.stop_tree(process)


def _resources(config: Config, at_once: int) -> str:
    """The simulation's settings for `flwr run`: the number of nodes, and each one's share of this machine."""
    cores = os.cpu_count() or 1
    resources = [
        f"num-supernodes={config.federation.clients}",
        f"client-resources-num-cpus={max(1, cores // at_once)}",
    ]
    if not os.environ.get(RAY_ADDRESS):  # a cluster that is there already knows what it has
        resources.append(f"init-args-num-cpus={cores}")
    if config.model.device != "cpu" and _has_gpu():
        resources.append(f"client-resources-num-gpus={1 / at_once}")
    return " ".join(resources)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
