"""What a client keeps on its own disk from round to round: personal factors, what coarse formats left out.

One safetensors file per run, client, kind and round, read when needed: clients that are not at work cost no
memory, and a client that was restarted goes on where it was. Rounds before are kept too: a server that died before its
round was complete plays that round again, one that goes back plays several, and each client must start them from what
it had then.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlora.adapters import AdapterState
from fedlora.adapters.flat import OWN
from fedlora.common.errors import ConfigError, DataError
from fedlora.common.files import replacing
from fedlora.exchange import Broadcast


def load(folder: Path, kind: str, round: int) -> AdapterState | None:
    """What a client has at the start of a round: what `save` wrote in the last of the rounds before, or None.

    Raises:
        DataError: the file cannot be read.
    """
    earlier = {number: path for number, path in _files(folder, kind).items() if number < round}
    if not earlier:
        return None
    path = earlier[max(earlier)]
    try:
        with safe_open(path, framework="pt") as file:
            scalings: dict[str, float] = json.loads(file.metadata()["scalings"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove it to start this client anew") from None
    return OWN.get(tensors, scalings)


def save(folder: Path, kind: str, state: AdapterState, round: int, keep: int = 2) -> None:
    """Keep what a round made, whole or not at all, beside that of the client's rounds before; a factor that is empty
    is left out.

    Args:
        folder: this run's and client's own; see `folder_of`.
        kind: names the file: "personal" or "left-out".
        state: any factors and tensors.
        round: that made it. Later rounds that are there already were undone, and go.
        keep: so many are there afterwards; one more than states of the server, which may be amid the next round.
    """
    tensors = {name: tensor.contiguous() for name, tensor in OWN.put(state).items()}
    scalings = {name: factors.scaling for name, factors in state.lora.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{kind}-{round}.safetensors") as part:
        save_file(tensors, part, metadata={"scalings": json.dumps(scalings)})
    files = _files(folder, kind)
    kept = sorted((number for number in files if number <= round), reverse=True)[:keep]
    for number, path in files.items():
        if number not in kept:
            path.unlink()


def with_personal_factors(broadcast: Broadcast, folder: Path) -> AdapterState:
    """The broadcast's adapter, with the personal factors that a client keeps in place of those that were sent.

    Args:
        broadcast: of the round that begins; the client has what earlier rounds left.
        folder: this run's and client's own; see `folder_of`.

    Raises:
        ConfigError: what it keeps has another rank.
    """
    kept = load(folder, "personal", broadcast.round) if broadcast.plan.keep else None
    if kept is None:
        return broadcast.adapter
    lora = dict(broadcast.adapter.lora)
    for name in [name for name in lora if name in kept.lora]:
        own = kept.lora[name]
        for factor in broadcast.plan.keep:
            sent, mine = getattr(lora[name], factor), getattr(own, factor)
            if mine.shape != sent.shape:
                raise ConfigError(
                    f"{name}: this client keeps a {factor} {tuple(mine.shape)} of its own, this run's is "
                    f"{tuple(sent.shape)}; give the client its earlier rank, or remove {folder} to start it anew"
                )
            lora[name] = replace(lora[name], **{factor: mine})
    return replace(broadcast.adapter, lora=lora)


def folder_of(root: str | Path, run: int | str, client_id: int) -> Path:
    """`<root>/<run's key>/client-<id>`."""
    return Path(root) / str(run) / f"client-{client_id}"


def _files(folder: Path, kind: str) -> dict[int, Path]:
    """The files of this kind by round."""
    names = {path: path.stem.removeprefix(f"{kind}-") for path in folder.glob(f"{kind}-*.safetensors")}
    return {int(name): path for path, name in names.items() if name.isdigit()}
