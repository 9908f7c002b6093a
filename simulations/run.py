"""One federation in this process, from Python or the command line."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedlora.config import Config, Scalar, parse
from fedlora.models import adapted
from fedlora.results.run_folder import folder_of, nothing_left, stamp

from .checks import check
from .engines.local import SERVER, LocalGrid


def run(
    config: Config,
    server_app: ServerApp | None = None,
    client_app: ClientApp | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Run a federation in this process.

    Args:
        config: the run.
        server_app: the product's own when left out.
        client_app: the product's own when left out.
        devices: clients are spread over these, a process for each; the server is here, on the first. One device needs
            no other process; none is `model.device`.

    Raises:
        FedLoraError: the run failed; result.json says why.
        ValueError: a client app of one's own, which runs in this process alone, and several devices.
    """
    if client_app is not None and len(devices) > 1:
        raise ValueError("run: a client app of one's own runs in this process alone; leave out devices")
    if server_app is None:
        from ..strategies.server_app import app as server_app
    cohorts = None
    if client_app is None:
        from ..clients.answering import together as cohorts
        from ..clients.client_app import app as client_app

    config = stamp(parse({"model.device": devices[0]}, config) if devices else config)
    check(config)
    run_config = config.to_flat()
    run_id = secrets.randbits(62)
    count = config.federation.clients
    nodes: list[dict[str, Scalar]] = [
        {"partition-id": i, "num-partitions": count, "resident": True, "state": str(folder_of(config) / "clients")}
        for i in range(count)
    ]
    grid: AbstractContextManager[LocalGrid]
    if len(devices) > 1:
        from .engines.devices import DevicesGrid

        logs = folder_of(config) / "logs"
        grid = DevicesGrid(client_app, nodes, run_config, run_id, devices=devices, logs=logs)
    else:
        if cohorts is not None:  # what a first pass shows of the base is said before the run, and not by each client
            adapted.adapted_model(config.model, config.lora)
        grid = nullcontext(LocalGrid(client_app, nodes, run_config, run_id, cohorts))
    with nothing_left(config), grid as opened:
        server_app(opened, Context(run_id, SERVER, {}, RecordDict(), run_config))
