"""Costs of a round of flexlora: from the clients' factors, and from sketches of their updates (`wire.sum = sketch`).

    python -m benchmarks.sketched [--quick]

SmolLM2-135M's q, k, v and o in 10 of its 30 layers, clients of rank 8. Each row is measured in a process of its own and
written to benchmarks/results/sketched.json. Seconds are processor time on one thread:

- `upload-bytes`, `download-bytes`: of one client, tensors alone. Down are its factors, and Q with two passes.
- `client-seconds`: what one client computes beside its training.
- `server-seconds`: to judge every reply (`guard.moved`), to count it, and to compute the next state. Replies come one
  by one, as copies in new memory; the time to make them is not counted.
- `server-bytes`: the most resident memory beyond that before the first reply.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.aggregation import SMOLLM2, replies
from benchmarks.engine import ROOT, write
from fedlora.adapters import AdapterState, initial, map_tensors
from fedlora.adapters.flat import OWN
from fedlora.adapters.sketched_sum import Sketch
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, sketches
from fedlora.strategies import load
from fedlora.strategies.server import guard
from fedlora.strategies.server.sums import total

RANK = 8
LAYERS = 10
SHAPES = {name: shape for name, shape in SMOLLM2.items() if name[-1] in "qkvo" and int(name.split(".")[0]) < LAYERS}
CLIENTS = (10, 100, 1000)
FORMS = ((0, 0), (16, 1), (16, 2), (64, 1), (64, 2))  # width and passes; 0: factors


@dataclass
class Watch:
    """Times and memory while replies come."""

    making: float = 0.0
    before: int = field(default_factory=lambda: psutil.Process().memory_info().rss)
    most: int = 0

    def look(self) -> None:
        self.most = max(self.most, psutil.Process().memory_info().rss)

    def copies(
        self, reply: AdapterState, sent: Broadcast, clients: Collection[int], bases: Mapping[str, Tensor] | None = None
    ) -> Iterator[ClientUpdate]:
        """As many replies, each judged as the server does it."""
        shapes = map_tensors(lambda name, tensor: tensor.to("meta"), sent.adapter)
        for client in clients:
            began = time.process_time()
            own = map_tensors(lambda name, tensor: tensor.clone(), reply)
            self.making += time.process_time() - began
            update = ClientUpdate(client, own, num_examples=client + 1, start=sent.adapter)
            guard.moved(update, sent, bases)
            self.look()
            yield replace(update, start=shapes) if sent.plan.sketch else update


def one(clients: int, width: int, passes: int) -> dict[str, Any]:
    """One row of the table."""
    torch.set_num_threads(1)
    strategy = load("flexlora")
    begun = initial(SHAPES, lambda _: RANK, lambda _: 2.0, torch.Generator().manual_seed(0))
    infos = [ClientInfo(client_id=i, rank=RANK) for i in range(4)]
    state = strategy.init(begun)
    first = [strategy.broadcast(state, info, 1) for info in infos]
    state = strategy.aggregate(state, list(replies(first, infos)), 1)
    sketch = Sketch(width, passes, seed=1) if width else None
    sent = strategy.broadcast(state, infos[0], 2)
    sent = replace(sent, plan=replace(sent.plan, sketch=sketch))
    [trained] = replies([sent], infos[:1], seed=2)
    reply, second, bases, client_seconds = trained.adapter, AdapterState(), dict[str, Tensor](), 0.0
    if sketch:
        sketches.made(sent.plan, reply)  # Omega and Psi are drawn once for a process and round
        began = time.process_time()
        reply = sketches.made(sent.plan, trained.adapter)
        client_seconds = time.process_time() - began
    if passes == 2:
        bases = {name: torch.linalg.qr(torch.randn(shape[0], width)).Q for name, shape in SHAPES.items()}
        began = time.process_time()
        second = sketches.made(sent.plan, trained.adapter, second=True, bases=bases)
        client_seconds += time.process_time() - began
    watch = Watch()
    began = time.process_time()
    updates = watch.copies(reply, sent, range(clients))
    if sketch:
        found = total(sketch, updates, lambda ids, q: watch.copies(second, sent, ids, q))
        assert found is not None
        strategy.aggregate(state, [found[0]], 2)
    else:
        strategy.aggregate(state, updates, 2)
    seconds = time.process_time() - began - watch.making
    watch.look()
    return {
        "clients": clients,
        "width": width,
        "passes": passes,
        "upload-bytes": size(reply) + size(second),
        "download-bytes": size(sent.adapter) + 4 * sum(basis.numel() for basis in bases.values()),
        "client-seconds": client_seconds,
        "server-seconds": seconds,
        "server-bytes": max(watch.most, psutil.Process().memory_info().rss) - watch.before,
    }


def size(adapter: AdapterState) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in OWN.put(adapter).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 clients alone")
    parser.add_argument("--one", nargs=3, type=int, metavar=("CLIENTS", "WIDTH", "PASSES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one(*asked.one)))
        return
    rows: list[dict[str, Any]] = []
    for clients in CLIENTS[: 1 if asked.quick else None]:
        for width, passes in FORMS:
            command = [sys.executable, "-m", "benchmarks.sketched", "--one", *map(str, (clients, width, passes))]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(rows[-1], file=sys.stderr, flush=True)
            write("sketched", {"rows": rows})


if __name__ == "__main__":
    main()
