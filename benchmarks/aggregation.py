"""Every strategy's aggregation against the naive dense form, PEFT's own, and the time to read what was uploaded.

    python -m benchmarks.aggregation [--quick] [--only fedavg,flexlora]
    python -m benchmarks.aggregation --plain [--threads 1]

Three tables, and benchmarks/results/aggregation.json:

1. One 4096 x 4096 module, ten clients of ranks 64, 32, 16, 16, 8, 8, 4, 4, 4, 4: each strategy against the dense
   matrix that its formula names, and the matrix products that nothing can avoid.
2. Whole models: SmolLM2-135M's 210 linear modules and one Llama-7B layer's seven, with those ten clients and with
   100 of rank 16. `read` is the time to sum every uploaded byte once, `mean` a plain mean per tensor (the memory
   floor, for equal ranks), `products` what the strategy's own matrix products and small decompositions cost when
   they are called on bare tensors of these shapes, without the rest.
3. Peak memory of fedavg over 10 and over 1,000 streamed clients, each in a process of its own.

`--plain` measures instead, by turns in one process, the plain forms of three strategies and ours: the stack of the
factors, its QR-SVD (as NVFlare computes it), and the bare concatenation of the scaled factors. It writes
benchmarks/results/aggregation-plain-<threads>.json. With one thread, these are seconds of the processor.

Seconds are the best of several. Replies are random; rank 16 stands for every client where a method wants one rank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.engine import ROOT, write
from fedlora.adapters import AdapterState, LoraFactors, initial
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.strategies import load
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.initializers.registry import INITIALIZERS
from fedlora.strategies.registry import NAMES

Shapes = Mapping[str, tuple[int, int]]
TEN = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
EQUAL = 16
_ATTENTION = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
_MLP = {"gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
SMOLLM2: Shapes = {f"{layer}.{n}": s for layer in range(30) for n, s in {**_ATTENTION, **_MLP}.items()}
LLAMA: Shapes = dict.fromkeys("qkvo", (4096, 4096)) | {
    "gate": (11008, 4096),
    "up": (11008, 4096),
    "down": (4096, 11008),
}
ONE: Shapes = {"m": (4096, 4096)}


@dataclass(frozen=True)
class Round:
    """A state and the replies to its broadcasts."""

    strategy: Strategy
    state: ServerState
    updates: list[ClientUpdate]
    number: int

    def aggregate(self) -> ServerState:
        return self.strategy.aggregate(self.state, self.updates, self.number)


def best(function: Callable[[], object], most_seconds: float = 3.0, most: int = 7) -> float:
    """The shortest of up to `most` calls, after a first one; fewer when they take long."""
    times: list[float] = []
    function()
    while len(times) < most and sum(times) < most_seconds:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def prepare(name: str, shapes: Shapes, ranks: Sequence[int], options: Mapping[str, Any] | None = None) -> Round:
    """A strategy in its second round, with random replies of the factors that it asks for."""
    strategy = load(name, **(options or {}))
    chosen = ranks if strategy.unequal_ranks else [EQUAL] * len(ranks)
    clients = [ClientInfo(client_id=i, rank=r, num_examples=i + 1) for i, r in enumerate(chosen)]
    generator = torch.Generator().manual_seed(0)
    top = max(chosen)
    begun = initial(shapes, lambda _: top, lambda _: 2.0, generator)
    state = strategy.init(begun)
    if strategy.starts_with:
        first = INITIALIZERS.load(strategy.starts_with)
        asked = [first.ask(state.adapter, client) for client in clients[:2]]
        state = strategy.begin(state, replies(asked, clients[:2]), first)
    state = strategy.aggregate(state, list(replies(sent(strategy, state, clients[:2], 1), clients[:2])), 1)
    return Round(strategy, state, list(replies(sent(strategy, state, clients, 2), clients, 2)), 2)


def sent(strategy: Strategy, state: ServerState, clients: Sequence[ClientInfo], number: int) -> Iterator[Broadcast]:
    return (strategy.broadcast(state, client, number) for client in clients)


def replies(broadcasts: Iterable[Broadcast], clients: Sequence[ClientInfo], seed: int = 1) -> Iterator[ClientUpdate]:
    generator = torch.Generator().manual_seed(seed)
    for sent, client in zip(broadcasts, clients, strict=True):

        def trained(tensor: Tensor, part: str, upload: frozenset[str] = sent.plan.send) -> Tensor:
            moved = torch.empty_like(tensor).normal_(generator=generator).mul_(0.02).add_(tensor)
            return moved if part in upload else torch.empty(0, 0)

        lora = {
            n: LoraFactors(trained(f.A, "A"), trained(f.B, "B"), f.scaling, None if f.R is None else trained(f.R, "R"))
            for n, f in sent.adapter.lora.items()
        }
        dense = {n: tensor + 0.02 for n, tensor in sent.adapter.tensors.items()}
        yield ClientUpdate(client.client_id, AdapterState(lora, dense), client.num_examples, sent.base_version)


def tensors(updates: Sequence[ClientUpdate]) -> list[Tensor]:
    """Everything that was uploaded."""
    found: list[Tensor] = []
    for update in updates:
        found += [t for f in update.adapter.lora.values() for t in (f.A, f.B) if t.numel()]
        found += update.adapter.tensors.values()
    return found


def read(updates: Sequence[ClientUpdate]) -> float:
    """Seconds to sum every uploaded tensor once."""
    uploaded = tensors(updates)
    return best(lambda: [t.sum() for t in uploaded])


def parts_of(updates: Sequence[ClientUpdate], module: str) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """B_k, p_k s_k A_k and p_k of one module."""
    total = sum(u.num_examples for u in updates)
    factors = [u.adapter.lora[module] for u in updates]
    shares = [u.num_examples / total for u in updates]
    scaled = [p * f.scaling * f.A for p, f in zip(shares, factors, strict=True)]
    return [f.B for f in factors], scaled, shares


def sum_one_by_one(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> Tensor:
    total = ups[0] @ downs[0]
    for b, a in zip(ups[1:], downs[1:], strict=True):
        total.addmm_(b, a)
    return total


def one_module() -> list[dict[str, Any]]:
    """Table 1."""
    rows: list[dict[str, Any]] = []

    def row(strategy: str, against: str, seconds: float, ours: float, goal: str) -> None:
        rows.append(
            {
                "strategy": strategy,
                "against": against,
                "seconds": seconds,
                "ours": ours,
                "ratio": seconds / ours,
                "goal": goal,
            }
        )

    ups, downs, _ = parts_of(prepare("flora", ONE, TEN).updates, "m")
    B, A = torch.cat(ups, dim=1), torch.cat(downs)
    R = B.shape[1]
    began = time.perf_counter()
    torch.linalg.svd(sum_one_by_one(ups, downs), full_matrices=False)
    dense_svd = time.perf_counter() - began
    b, a, thin = B.double(), A.double(), torch.randn(R, max(TEN), dtype=torch.float64)
    products = best(lambda: (b.mT @ b, a @ a.mT, b @ thin, thin.mT @ a))
    for name in ("flexlora", "florist"):
        ours = best(prepare(name, ONE, TEN).aggregate)
        row(name, "dense sum and SVD", dense_svd, ours, ">= 300")
        row(name, "its matrix products alone (fp64)", products, ours, ">= 1/2.5")
    mean_b = torch.zeros(4096, max(TEN))
    mean_a = torch.zeros(max(TEN), 4096)
    residual = best(lambda: sum(b @ a for b, a in zip(ups, downs, strict=True)) - mean_b @ mean_a)
    row("fedex", "dense residual", residual, best(prepare("fedex", ONE, TEN).aggregate), ">= 200")
    row(
        "lora-fair",
        "1,000 dense SGD steps",
        1000 * sgd_step(ups, downs),
        best(prepare("lora-fair", ONE, TEN).aggregate),
        ">= 10,000",
    )
    for kind, name in (("svd", "flexlora"), ("cat", "flora")):
        row(name, f"PEFT add_weighted_adapter {kind!r}", peft(kind), best(prepare(name, ONE, TEN).aggregate), "")
    return rows


def sgd_step(ups: Sequence[Tensor], downs: Sequence[Tensor]) -> float:
    """Seconds of one step of LoRA-FAIR's objective with dense matrices, the ideal given."""
    ideal = sum_one_by_one(ups, downs)
    A = torch.randn(max(TEN), ideal.shape[1])
    B = torch.randn(ideal.shape[0], max(TEN))
    correction = torch.zeros_like(B, requires_grad=True)
    optimizer = torch.optim.SGD([correction], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        product = (B + correction) @ A
        loss = 1 - torch.cosine_similarity(product.flatten(), ideal.flatten(), dim=0) + 0.01 * correction.norm()
        loss.backward()
        optimizer.step()

    return best(step)


def peft(kind: str) -> float:
    """Seconds of PEFT's own merge of ten adapters on one 4096 x 4096 module."""
    from peft import LoraConfig, get_peft_model

    holder = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    model: Any = None
    for i, rank in enumerate(TEN):
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(holder, config, adapter_name=f"c{i}")  # pyright: ignore[reportArgumentType]
        else:
            model.add_adapter(f"c{i}", config)
    extra = {"svd_rank": max(TEN), "svd_full_matrices": False} if kind == "svd" else {}
    began = time.perf_counter()
    names = [f"c{i}" for i in range(len(TEN))]
    model.add_weighted_adapter(names, [0.1] * len(names), "merged", combination_type=kind, **extra)
    return time.perf_counter() - began


def products(number: Round) -> float:
    """Seconds of the strategy's large products and small decompositions, batched over equal modules, and no more.

    Only for strategies whose result is an SVD of the stack.
    """
    groups: dict[tuple[int, int], int] = {}
    first = number.updates[0].adapter.lora
    ranks = [u.adapter.lora[next(iter(first))].A.shape[0] for u in number.updates]
    for f in first.values():
        shape = (f.B.shape[0], f.A.shape[1])
        groups[shape] = groups.get(shape, 0) + 1
    R, top, seconds = sum(ranks), max(ranks), 0.0
    for (d_out, d_in), count in groups.items():
        B, A = torch.randn(d_out, R, dtype=torch.float64), torch.randn(R, d_in, dtype=torch.float64)
        small = min(R, d_out, d_in)
        core = torch.randn(small, small, dtype=torch.float64)
        core = core @ core.mT
        if small == R:
            thin = torch.randn(R, top, dtype=torch.float64)
            once = best(lambda B=B, A=A, thin=thin: (B.mT @ B, A @ A.mT, B @ thin, thin.mT @ A), 1.0)
            once += best(
                lambda core=core: (torch.linalg.cholesky_ex(core), core @ core, core @ core, torch.linalg.eigh(core)),
                1.0,
            )
        else:
            product, thin = B @ A, torch.randn(small, min(top, small), dtype=torch.float64)
            square = (lambda x=product: x @ x.mT) if d_out <= d_in else (lambda x=product: x.mT @ x)
            once = best(lambda B=B, A=A, square=square: (B @ A, square()), 1.0) + best(
                lambda core=core: torch.linalg.eigh(core), 1.0
            )
            once += best(lambda x=product, t=thin, o=d_out, i=d_in: t.mT @ x if o <= i else x @ t, 1.0)
        seconds += once * count
    return seconds


def whole_models(names: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Table 2."""
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, Shapes, str, Sequence[int]]] = [
        ("SmolLM2-135M", SMOLLM2, "10 unequal", TEN),
        ("a Llama-7B layer", LLAMA, "10 unequal", TEN),
        ("SmolLM2-135M", SMOLLM2, "100 of rank 16", [16] * 100),
        ("a Llama-7B layer", LLAMA, "100 of rank 16", [16] * 100),
    ]
    for model, shapes, clients, ranks in cases[: 2 if quick else None]:
        for name in names:
            round = prepare(name, shapes, ranks)
            uploaded = tensors(round.updates)
            ours, reading = best(round.aggregate), read(round.updates)
            row: dict[str, Any] = {
                "model": model,
                "clients": clients,
                "strategy": name,
                "seconds": ours,
                "read": reading,
            }
            row["uploaded-bytes"] = sum(t.numel() * t.element_size() for t in uploaded)
            if name in {"flexlora", "florist"}:
                row["products"] = products(round)
            if name == "fedavg":
                row["mean"] = best(lambda r=round: per_key_mean(r.updates))
            rows.append(row)
            print(
                f"  {model}, {clients}: {name} {ours:.3f} s, {ours / reading:.2f} x read", file=sys.stderr, flush=True
            )
    return rows


def per_key_mean(updates: Sequence[ClientUpdate]) -> list[Tensor]:
    """torch.stack and mean, tensor by tensor."""
    names = updates[0].adapter.lora
    return [torch.stack([getattr(u.adapter.lora[n], p) for u in updates]).mean(0) for n in names for p in "AB"]


def streamed(clients: int) -> int:
    """The most resident bytes, beyond those at the start, while fedavg takes this many clients' replies one by one."""
    process = psutil.Process()
    strategy = load("fedavg")
    state = strategy.init(initial(SMOLLM2, lambda _: EQUAL, lambda _: 2.0, torch.Generator().manual_seed(0)))
    infos = [ClientInfo(client_id=i, rank=EQUAL, num_examples=i + 1) for i in range(clients)]
    before = most = process.memory_info().rss

    def watched() -> Iterator[ClientUpdate]:
        nonlocal most
        for update in replies(sent(strategy, state, infos, 1), infos):
            yield update
            most = max(most, process.memory_info().rss)

    strategy.aggregate(state, watched(), 1)
    return most - before


def concatenated(updates: Sequence[ClientUpdate], module: str) -> tuple[Tensor, Tensor]:
    """`[B_1|...|B_K]` and `[p_1 s_1 A_1; ...]` of one module: what `flora` folds."""
    ups, downs, _ = parts_of(updates, module)
    return torch.cat(ups, dim=1), torch.cat(downs)


def qr_svd(updates: Sequence[ClientUpdate], rank: int, tau: float = 0.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's mean update by the QRs of its stacked factors and the SVD of their core, all in fp32.

    Args:
        updates: of all clients.
        rank: the number of components that are kept.
        tau: if above 0, the share of the energy that is kept instead.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for module in updates[0].adapter.lora:
        B, A = concatenated(updates, module)
        q_b, r_b = torch.linalg.qr(B)
        q_a, r_a = torch.linalg.qr(A.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        energy = s.square().cumsum(0)
        kept = int((energy < tau * energy[-1]).sum()) + 1 if tau else rank
        root = s[:kept].sqrt()
        found[module] = q_b @ (u[:, :kept] * root), (root[:, None] * vh[:kept]) @ q_a.T
    return found


def by_turns(functions: Sequence[Callable[[], object]], most_seconds: float = 45.0, most: int = 9) -> list[float]:
    """The shortest time of each function, each called at most so often, one after the other, after a first round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in functions]
    began = time.perf_counter()
    for turn in range(most + 1):
        for function, its in zip(functions, times, strict=True):
            start = clock()
            function()
            its.append(clock() - start)
        if turn and time.perf_counter() - began > most_seconds:
            break
    return [min(its[1:]) for its in times]


def plain_forms() -> list[dict[str, Any]]:
    """The table of `--plain`."""
    attention = {n: s for n, s in SMOLLM2.items() if n.split(".")[1] in _ATTENTION}
    cases: list[tuple[str, Shapes, Sequence[int]]] = [
        ("one 4096 x 4096, 10 unequal", ONE, TEN),
        ("one 4096 x 4096, 10 of rank 8", ONE, [8] * 10),
        ("one 4096 x 4096, 10 of rank 16", ONE, [16] * 10),
        ("one 4096 x 4096, 10 of rank 64", ONE, [64] * 10),
        ("SmolLM2-135M q, k, v, o, 10 of rank 8", attention, [8] * 10),
        ("SmolLM2-135M q, k, v, o, 10 unequal", attention, TEN),
        ("SmolLM2-135M all linear, 10 of rank 16", SMOLLM2, [16] * 10),
        ("SmolLM2-135M q, k, v, o, 10 of rank 64", attention, [64] * 10),
    ]
    rows: list[dict[str, Any]] = []
    for case, shapes, ranks in cases:
        flex, florist, flora = (prepare(name, shapes, ranks) for name in ("flexlora", "florist", "flora"))
        top = max(ranks)
        loose = replace(flora, state=replace(flora.state, folds=replace(flora.state.folds, compact=False)))
        seconds = by_turns(
            [
                lambda r=flex, top=top: qr_svd(r.updates, top),
                flex.aggregate,
                lambda r=florist, top=top: qr_svd(r.updates, top, 0.99),
                florist.aggregate,
                lambda r=flora: [concatenated(r.updates, module) for module in r.updates[0].adapter.lora],
                loose.aggregate,
                flora.aggregate,
            ]
        )
        names = ("qr-svd", "flexlora", "qr-svd-tau", "florist", "concatenation", "flora-stack", "flora")
        rows.append({"case": case, "threads": torch.get_num_threads(), **dict(zip(names, seconds, strict=True))})
        print(f"  {case}: {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def memory() -> list[dict[str, int]]:
    """Table 3."""
    rows = []
    for clients in (10, 1000):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aggregation", "--streamed", str(clients)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rows.append({"clients": clients, "peak-bytes": int(done.stdout.strip().splitlines()[-1])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ten clients only")
    parser.add_argument("--only", default=",".join(NAMES), help="strategies of the second table")
    parser.add_argument("--streamed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help="the plain forms of flexlora, florist and flora alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.plain:
        write(f"aggregation-plain-{options.threads}", {"cases": plain_forms()})
        return
    if options.streamed:
        print(streamed(options.streamed))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    first, second, third = one_module(), whole_models(options.only.split(","), options.quick), memory()
    table = Table(title=f"One 4096 x 4096 module, ranks {', '.join(map(str, TEN))}; {torch.get_num_threads()} threads")
    for title in ("strategy", "against", "its seconds", "ours", "ratio", "goal"):
        table.add_column(title, justify="left" if title in {"strategy", "against"} else "right")
    for r in first:
        table.add_row(
            r["strategy"], r["against"], f"{r['seconds']:.4g}", f"{r['ours']:.4f}", f"{r['ratio']:,.3g}", r["goal"]
        )
    console.print(table)
    table = Table(title="Whole models")
    for title in ("model", "clients", "strategy", "seconds", "MB uploaded", "x read", "x products", "x mean"):
        table.add_column(title, justify="left" if title in {"model", "clients", "strategy"} else "right")
    for r in second:
        ratios = [f"{r['seconds'] / r[k]:.2f}" if k in r else "" for k in ("read", "products", "mean")]
        table.add_row(
            r["model"], r["clients"], r["strategy"], f"{r['seconds']:.4f}", f"{r['uploaded-bytes'] / 1e6:.0f}", *ratios
        )
    console.print(table)
    for r in third:
        console.print(f"fedavg over {r['clients']} streamed clients adds {r['peak-bytes'] / 1e6:.0f} MB at its peak")
    write("aggregation", {"one-module": first, "whole-models": second, "streamed": third})
    console.print(json.dumps({"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
