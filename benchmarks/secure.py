"""What a secure sum costs beside a plain round: bytes, and seconds in its phases.

    python -m benchmarks.secure [--parts protocol,rounds,nodes] [--numbers 1000000] [--clients 10,50,100] [--repeats 2]

*protocol*: the four phases alone, in one process and on one thread: each client's keys, shares, masked numbers and
opened shares, and the server's part, for replies of so many numbers. One client's seconds are the mean over three
clients; the server's are those of all phases. A tenth of the clients drop out before their numbers arrive. Bytes are
those that one client sends and receives in the four phases, beside the fp32 numbers of a plain reply.

*rounds*: whole rounds of runs in this process, with one step of training in each, on a Llama of random weights with
110,592 numbers of LoRA. Runs with secure sums and without take turns, and a round's seconds are processor time. The
first round of a run, which loads, is not counted. Bytes are those of the run's record: tensors, masked numbers, keys,
letters and shares of all clients, without the messages' heads.

*nodes*: a server and one node of Flower's own programs on this machine, with a resident worker and three clients on the
node. Runs with secure sums and without take turns. Seconds are wall time: of a round on the server, and of the process
that Flower starts on the node for a message, up to its answer.

Writes benchmarks/results/secure.json, secure-rounds.json and secure-nodes.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from benchmarks import worker
from benchmarks.clients import SHAPES
from benchmarks.engine import write
from fedlora.common.events import listen
from fedlora.exchange.secure import masks
from fedlora.exchange.secure.keys import SECRET, RoundSecrets
from fedlora.exchange.secure.neighbours import graph, threshold_of
from fedlora.exchange.secure.numbers import to_numbers, to_words
from fedlora.exchange.secure.opening import Participants
from fedlora.exchange.secure.sharing import split

if TYPE_CHECKING:
    from fedlora.config import Config, Scalar

_CONTEXT, _LOOKED_AT = b"benchmark", 3
KINDS = ("plain", "secure")
_HOSTED, _ROUNDS = 3, 3  # clients of the node, and rounds of each run
_PUBLIC = 3 * 32  # bytes of a client's public keys
_Made = TypeVar("_Made")


def timed(function: Callable[[], _Made]) -> tuple[_Made, float]:
    """What the function returns, and its seconds of processor time."""
    began = time.process_time()
    made = function()
    return made, time.process_time() - began


def measure(clients: int, numbers: int) -> dict[str, Any]:
    """One round."""
    near = graph(range(clients), "benchmark")
    gone = {client for client in near if client % 10 == 9}
    secrets = {client: RoundSecrets.draw(_CONTEXT) for client in near}
    public = {client: own.public for client, own in secrets.items()}
    who = Participants(_CONTEXT, public, near)
    values = np.random.default_rng(0).normal(size=numbers)
    looked_at = [client for client in near if client not in gone][:_LOOKED_AT]
    seconds = dict.fromkeys(("keys", "shares", "mask", "open"), 0.0)
    shares: dict[int, tuple[dict[int, bytes], dict[int, bytes]]] = {}
    for client, others in near.items():
        needed = threshold_of(len(others))
        own = secrets[client]
        shares[client] = split(own.self_mask, others, needed), split(own.masking, others, needed)
    for client in looked_at:
        own, others, needed = secrets[client], near[client], threshold_of(len(near[client]))
        seconds["keys"] += timed(lambda: RoundSecrets.draw(_CONTEXT).public)[1]

        def share(own=own, others=others, needed=needed, client=client) -> list[bytes]:
            first, second = split(own.self_mask, others, needed), split(own.masking, others, needed)
            return [own.write(first[other] + second[other], client, other, public[other]) for other in others]

        _, spent = timed(share)
        seconds["shares"] += spent
        words = to_words(values, clients, "client")
        seconds["mask"] += timed(lambda own=own, c=client, w=words: masks.masked(w, c, own, who.masked_with(c)))[1]
        sent = {o: secrets[o].write(bytes(2 * SECRET), o, client, public[client]) for o in others}
        seconds["open"] += timed(
            lambda own=own, c=client, s=sent: [own.read(text, o, c, public[o]) for o, text in s.items()]
        )[1]
    arrived = [client for client in near if client not in gone]
    total = np.zeros(numbers, np.uint64)
    for client in arrived:
        words = to_words(values, clients, "client")
        total += masks.masked(words, client, secrets[client], who.masked_with(client))
    opened = {client: {o: s for o, s in shares[client][client in gone].items() if o not in gone} for client in near}
    found, server = timed(lambda: who.unmasked(total, arrived, opened))
    assert np.allclose(to_numbers(found), len(arrived) * values, atol=1e-6)
    k = len(near[0])
    letter = 2 * SECRET + 16  # two shares, and what proves that nobody changed them
    return {
        "clients": clients,
        "neighbours": k,
        "dropped": len(gone),
        "numbers": numbers,
        "client-seconds": {phase: spent / len(looked_at) for phase, spent in seconds.items()},
        "server-seconds": server,
        "plain-bytes": 4 * numbers,
        "sent-bytes": _PUBLIC + k * letter + 8 * numbers + k * SECRET,
        "received-bytes": k * _PUBLIC + k * letter,
    }


def rounds(clients: int, repeats: int) -> dict[str, Any]:
    """Whole rounds with secure sums beside plain ones, in this process."""
    from fedlora.config import parse
    from fedlora.simulations import run as simulation

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    recorded: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys = _keys(folder, clients)
        for repeat in range(repeats):
            for kind in KINDS:
                about: dict[str, Scalar] = {"run.id": f"{kind}-{repeat}", "privacy.secure-sum": kind == "secure"}
                config = parse({**keys, **about, "train.clients-at-once": "1"})
                seconds[kind] += _processor_seconds(lambda config=config: simulation.in_process(config))[1:]
                recorded[kind] = _record(config)["rounds"][-1]
    spent = {kind: statistics.median(found) for kind, found in seconds.items()}
    moved = {kind: {way: entry[f"{way}-bytes"] for way in ("upload", "download")} for kind, entry in recorded.items()}
    plain, secure = (sum(moved[kind].values()) for kind in KINDS)
    return {
        "clients": clients,
        "seconds": spent,
        "all-seconds": seconds,
        "ratio": spent["secure"] / spent["plain"],
        "besides-a-client": (spent["secure"] - spent["plain"]) / clients,
        "bytes": moved,
        "upload-ratio": moved["secure"]["upload"] / moved["plain"]["upload"],
        "download-ratio": moved["secure"]["download"] / moved["plain"]["download"],
        "bytes-ratio": secure / plain,
    }


def _processor_seconds(run: Callable[[], object]) -> list[float]:
    """Processor seconds of each round that a run plays in this process."""
    marks: list[float] = []

    def heard(kind: str, _: dict[str, Any]) -> None:
        if kind in ("round-start", "round-end"):
            marks.append(time.process_time())

    with listen(heard):
        run()
    return [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]


def nodes(repeats: int) -> dict[str, Any]:
    """Rounds over a node with a resident worker, with secure sums and without: seconds of rounds and of messages."""
    from fedlora.config import parse
    from fedlora.deployment.flower_programs import config_table

    waited: dict[str, list[float]] = {kind: [] for kind in KINDS}
    trained: dict[str, list[float]] = {kind: [] for kind in KINDS}
    messages: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        keys = _keys(folder, _HOSTED)
        node = ["--partition-ids", f"0-{_HOSTED - 1}", "-c", "allow-files=true"]
        with worker.site(folder, node) as run:
            for repeat in range(repeats):
                for kind in KINDS:
                    secure: dict[str, Scalar] = {"run.id": f"{kind}-{repeat}", "privacy.secure-sum": kind == "secure"}
                    config = parse({**keys, **secure})
                    (folder / "run.toml").write_text(config_table(config), encoding="utf-8")
                    for task, seconds in run(str(folder / "run.toml")).items():
                        # of the first run, the first message of all loads
                        messages[kind].setdefault(task, []).extend(seconds[1:] if task != "describe" else [])
                    for entry in _record(config)["rounds"][1:]:
                        waited[kind].append(entry["seconds"]["round"])
                        trained[kind].append(sum(client["train-seconds"] for client in entry["clients"].values()))
    spent = {kind: statistics.median(found) for kind, found in waited.items()}
    return {
        "clients": _HOSTED,
        "round": spent,
        "all-rounds": waited,
        "training": {kind: statistics.median(found) for kind, found in trained.items()},
        "ratio": spent["secure"] / spent["plain"],
        "besides": spent["secure"] - spent["plain"],
        "messages": {
            kind: {task: statistics.median(found) for task, found in of_kind.items() if found}
            for kind, of_kind in messages.items()
        },
    }


def _keys(folder: Path, clients: int) -> dict[str, Scalar]:
    """The config of a run of so many clients, with one step in each round and nothing but training."""
    from tests.tiny import save_llama

    shape = {name: size for name, size in SHAPES["15m"].items() if name != "vocab_size"}
    rows = folder / "rows.jsonl"
    texts = [json.dumps({"prompt": f"{i} + {i}", "response": str(2 * i)}) for i in range(4 * clients)]
    rows.write_text("\n".join(texts), encoding="utf-8")
    return {
        "run.dir": str(folder / "runs"),
        "run.name": "secure",
        "run.threads": 1,
        "model.name": str(save_llama(folder / "base", initializer_range=0.02, **shape)),
        "model.quantization": "none",
        "model.compute-dtype": "fp32",
        "lora.ranks": "",
        "lora.rank": 8,
        "lora.target-modules": "q_proj,k_proj,v_proj,o_proj",
        "data.source": str(rows),
        "data.partition": "iid",
        "data.heldout-fraction": 0.0,
        "data.max-length": 32,
        "federation.clients": clients,
        "federation.rounds": _ROUNDS,
        "strategy.name": "fedavg",
        "train.steps": 1,
        "train.batch-size": 2,
        "evaluate.server": False,
    }


def _record(config: Config) -> dict[str, Any]:
    from fedlora.results.run_folder import folder_of

    return json.loads((folder_of(config) / "result.json").read_text(encoding="utf-8"))


def _tell_protocol(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        spent = "  ".join(f"{phase} {seconds:.3f}" for phase, seconds in row["client-seconds"].items())
        print(
            f"{row['clients']:5} clients, {row['neighbours']:3} neighbours: a client {spent} s, the server "
            f"{row['server-seconds']:.2f} s; sent {row['sent-bytes'] / row['plain-bytes']:.2f} x the plain reply, "
            f"received {row['received-bytes'] / 1024:.0f} KiB more"
        )


def _tell_rounds(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        print(
            f"{row['clients']:5} clients: bytes up {row['upload-ratio']:.3f} x, down {row['download-ratio']:.3f} x, "
            f"both {row['bytes-ratio']:.3f} x; plain {row['seconds']['plain']:.2f} s, secure "
            f"{row['seconds']['secure']:.2f} s: {row['ratio']:.2f} x, {row['besides-a-client']:.3f} s more a client"
        )


def _tell_nodes(found: dict[str, Any]) -> None:
    print(
        f"{found['clients']} clients on a node with a worker: a round {found['round']['plain']:.1f} s plain, "
        f"{found['round']['secure']:.1f} s secure: {found['ratio']:.2f} x, {found['besides']:.1f} s more"
    )
    for kind, of_kind in found["messages"].items():
        print(f"  {kind}: " + "  ".join(f"{task} {seconds:.1f} s" for task, seconds in of_kind.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="protocol,rounds,nodes")
    parser.add_argument("--numbers", type=int, default=1_000_000)
    parser.add_argument("--clients", default="10,50,100")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    counts, parts = [int(count) for count in options.clients.split(",")], options.parts.split(",")
    if "protocol" in parts:
        rows = [measure(count, options.numbers) for count in counts]
        _tell_protocol(rows)
        write("secure", {"rows": rows})
    if "rounds" in parts:
        rows = [rounds(count, options.repeats) for count in counts]
        _tell_rounds(rows)
        write("secure-rounds", {"rows": rows})
    if "nodes" in parts:
        found = nodes(options.repeats)
        _tell_nodes(found)
        write("secure-nodes", found)


if __name__ == "__main__":
    main()
