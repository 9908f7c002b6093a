"""What a client stores on its disk from round to round.

These are personal factors, what coarse formats left out, FedDyn's g, SCAFFOLD's c_k, and what a round trained, for the
second question of that round.

There is one safetensors file per run, client, kind and round, which is read when it is needed. Clients that do not
work therefore cost no memory, and a client that was restarted continues where it was. The files of earlier rounds are
kept too. A server that died within a round plays this round again, and one that goes back plays several; each client
must then start from what it had at that time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.common.assets import cache_dir
from fedlora.common.errors import ConfigError, DataError
from fedlora.common.files import replacing
from fedlora.exchange import Broadcast

from . import rules


def load(folder: Path, kind: str, number: int) -> AdapterState | None:
    """What a client has at the start of a round: what `save` stored in the latest earlier round, or None.

    Args:
        folder: the folder of this run and client; see `folder_of`.
        kind: "personal", "left-out", "dynamic" or "control".
        number: number of the round that starts.

    Raises:
        DataError: the file cannot be read.
    """
    earlier = {each: path for each, path in _files(folder, kind).items() if each < number}
    return _read(earlier[max(earlier)]) if earlier else None


def load_of(folder: Path, kind: str, number: int) -> AdapterState | None:
    """What `save` stored in this very round, or None.

    Args:
        folder: the folder of this run and client; see `folder_of`.
        kind: "trained".
        number: number of the round.

    Raises:
        DataError: the file cannot be read.
    """
    path = _files(folder, kind).get(number)
    return _read(path) if path else None


def _read(path: Path) -> AdapterState:
    try:
        with safe_open(path, framework="pt") as file:
            scalings: dict[str, float] = json.loads(file.metadata()["scalings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it to start this client anew") from None
    return OWN.get(tensors, scalings)


def save(folder: Path, kind: str, state: AdapterState, number: int, keep: int = 2, *, since: int = 0) -> None:
    """Store the result of a round beside those of earlier rounds. The file is complete or absent, whatever happens.

    Args:
        folder: the folder of this run and client; see `folder_of`.
        kind: "personal", "left-out", "dynamic", "control" or "trained", which is part of the file's name.
        state: any factors and tensors; empty factors are left out.
        number: number of the round. Files of later rounds are removed, since the server has undone these rounds.
        keep: number of files that stay. It should be one more than the server's saved states, since the server may
            have a next round under way.
        since: number of a round whose file stays too, with those after it; 0: none.
    """
    tensors = {name: tensor.contiguous() for name, tensor in OWN.put(state).items()}
    scalings = {name: factors.scaling for name, factors in state.lora.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{kind}-{number}.safetensors") as part:
        save_file(tensors, part, metadata={"scalings": json.dumps(scalings)})
    files = _files(folder, kind)
    earlier = sorted((each for each in files if each <= number), reverse=True)
    kept = {*earlier[:keep], *(each for each in earlier if since and each >= since)}
    for each, path in files.items():
        if each not in kept:
            path.unlink()


def with_personal_factors(broadcast: Broadcast, folder: Path) -> AdapterState:
    """The broadcast's adapter, with the client's personal factors in place of those that were sent.

    Args:
        broadcast: the message of the round that begins.
        folder: the folder of this run and client; see `folder_of`.

    Raises:
        ConfigError: the client's personal factors have another rank.
    """
    kept = load(folder, "personal", broadcast.round) if broadcast.plan.keep else None
    if kept is None:
        return broadcast.adapter
    plan = broadcast.plan
    lora, tensors = dict(broadcast.adapter.lora), dict(broadcast.adapter.tensors)

    def own(name: str, sent: Tensor, mine: Tensor) -> Tensor:
        if mine.shape != sent.shape:
            raise ConfigError(
                f"{name} is {tuple(mine.shape)}, but this run needs {tuple(sent.shape)}; give the client its earlier "
                f"rank, or remove {folder} to start it anew"
            )
        return mine

    for name in [name for name in lora if name in kept.lora]:
        for factor in plan.kept_factors:
            sent, mine = getattr(lora[name], factor), getattr(kept.lora[name], factor)
            found = own(f"{name}: this client's personal {factor}", sent, mine)
            lora[name] = replace(lora[name], **{factor: found})
    for name in [name for name in tensors if plan.keeps(name) and name in kept.tensors]:
        tensors[name] = own(f"this client's personal {name}", tensors[name], kept.tensors[name])
    return AdapterState(lora=lora, tensors=tensors)


def own_folder(context: Context, run: str) -> Path:
    """Where this client keeps its own state in a run: below the node's `state` folder, or the cache.

    Args:
        context: Flower's, of this run and client.
        run: the run's key; empty: Flower's run id.
    """
    return folder_of(root_of(context), run or str(context.run_id), rules.client_id_of(context))


def root_of(context: Context) -> Path:
    """The node's `state` folder; without this key, one in the cache."""
    return Path(str(context.node_config.get("state") or cache_dir() / "clients"))


def folder_of(root: str | Path, run: int | str, client_id: int) -> Path:
    """The folder of a run and client: `<root>/<run's key>/client-<id>`."""
    return Path(root) / str(run) / f"client-{client_id}"


def _files(folder: Path, kind: str) -> dict[int, Path]:
    """The files of this kind, by number of the round."""
    names = {path: path.stem.removeprefix(f"{kind}-") for path in folder.glob(f"{kind}-*.safetensors")}
    return {int(name): path for path, name in names.items() if name.isdigit()}
