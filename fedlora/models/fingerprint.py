"""The identity of a base model, by content: server and clients must hold the same one."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open

from fedlora.assets import cache_dir

# Keys of config.json that change with the place, the library or the use of a model, not with the model.
_VOLATILE = frozenset(
    {
        *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "architectures"),
        *("torch_dtype", "dtype", "use_cache", "gradient_checkpointing"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    }
)
_SMALL = 1 << 14  # elements; smaller tensors are read whole
_ROWS = 8  # evenly spaced rows read of every larger one


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order: `model.safetensors`, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return [folder / "model.safetensors"]


def fingerprint(folder: Path) -> str:
    """16 hex digits of a sha256 over the architecture and a sample of every weight.

    The same for a copy of the folder, for other file names of the shards and for any later quantization;
    another one when a layer's weights change. A sample is read, so that gigabytes take a second: this finds
    wrong models, not forged ones.

    Args:
        folder: holds config.json and safetensors files.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, content in sorted(item for path in weight_files(folder) for item in _weights(path)):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:16]


def remembered_fingerprint(folder: Path) -> str:
    """`fingerprint`, from the cache while the folder's files have the same place, size and time of change.

    So that loading a quantized copy touches no full-precision weight.
    """
    files = [(path.resolve(), path.stat()) for path in (folder / "config.json", *weight_files(folder))]
    stamp = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in files)
    kept = cache_dir() / "fingerprints" / hashlib.sha256(stamp.encode()).hexdigest()[:32]
    try:
        return kept.read_text("utf-8")
    except OSError:
        value = fingerprint(folder)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False, encoding="utf-8") as part:
        part.write(value)
    Path(part.name).replace(kept)
    return value


def _weights(path: Path) -> list[tuple[str, str]]:
    """Each tensor's name, with its shape, dtype and the hash of its sample."""
    found: list[tuple[str, str]] = []
    with safe_open(path, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
            part = weights.get_slice(name)
            shape = tuple(part.get_shape())
            size = torch.Size(shape).numel()
            if size <= _SMALL:
                sample = [weights.get_tensor(name)]
            elif len(shape) == 1:
                starts = range(0, size, max(1, size // _ROWS))
                sample = [part[start : start + _SMALL // _ROWS] for start in starts]
            else:
                rows = range(0, shape[0], max(1, shape[0] // _ROWS))
                sample = [part[row : row + 1] for row in rows]
            content = hashlib.sha256()
            for tensor in sample:
                content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
            found.append((name, f"{shape} {part.get_dtype()} {content.hexdigest()}"))
    return found
