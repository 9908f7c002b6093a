"""The fingerprint of a base model, computed from its content. Server and clients must have the same one."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedlora.common.assets import cache_dir
from fedlora.common.errors import ModelError

# Keys of config.json that depend on the folder, the library or the use of a model, but not on the model itself.
_VOLATILE = frozenset(
    {
        *("_name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "architectures"),
        *("torch_dtype", "dtype", "use_cache", "gradient_checkpointing"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    }
)
_VERSION = 2  # version of what is hashed; cached fingerprints of other versions are not used


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order: `model.safetensors`, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return [folder / "model.safetensors"]


def fingerprint(folder: Path) -> str:
    """16 hex digits of a sha256 over the architecture and every byte of every weight.

    It does not change with the folder's place, the file names of its shards, or a later quantization. It changes with
    any change of a weight. One core hashes one or two gigabytes in a second.

    Args:
        folder: folder with config.json and safetensors files.

    Raises:
        ModelError: a file is damaged.
    """
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for name, content in sorted(item for path in weight_files(folder) for item in _weights(path)):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:16]


def remembered_fingerprint(folder: Path) -> str:
    """`fingerprint`, from a cache as long as the folder's files have the same paths, sizes and times of change.

    Loading a quantized copy therefore reads no full-precision weight. Both times of change are compared, since the
    modification time of a file can be set back, but that of its inode cannot.
    """
    try:
        files = [(path.resolve(), path.stat()) for path in (folder / "config.json", *weight_files(folder))]
    except OSError as error:
        raise ModelError(f"{folder}: the model's files are no longer there: {error}") from None
    stamp = "\n".join(f"{_VERSION} {path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}" for path, stat in files)
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
    """For each tensor its name, and a text with its shape, its dtype and the hash of its bytes."""
    if path.stat().st_size < 8:
        raise ModelError(f"{path}: the file is cut off: got {path.stat().st_size} bytes; copy it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        first, tensors = _header(path, held)

        def content(entry: Any) -> str:
            start, end = (first + offset for offset in entry["data_offsets"])
            with memoryview(held) as whole, whole[start:end] as part:
                return f"{entry['shape']} {entry['dtype']} {hashlib.sha256(part).hexdigest()}"

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
            return list(zip(tensors, pool.map(content, tensors.values()), strict=True))


def _header(path: Path, held: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """The offset at which a safetensors file's data begins, and the header's entry of each tensor.

    Raises:
        ModelError: the file is damaged.
    """
    first = 8 + int.from_bytes(held[:8], "little")
    try:
        tensors: dict[str, Any] = json.loads(held[8:first])
        tensors.pop("__metadata__", None)
        end = first + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path}: the file is damaged: its header cannot be read; copy it again") from None
    if end > len(held):
        raise ModelError(f"{path}: the file is cut off: got {len(held)} bytes, expected {end}; copy it again")
    return first, tensors
