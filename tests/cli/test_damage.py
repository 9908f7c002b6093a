"""Files that are missing, damaged or empty, and disks that are full or read-only: a sentence from every command."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError
from transformers import PreTrainedModel
from typer.testing import CliRunner

from fedlora.cli import main
from fedlora.common.errors import FedLoraError, of_the_disk
from fedlora.deployment import certificates
from fedlora.deployment.flower_programs import config_table
from fedlora.models import adapted
from tests.federation import run_locally, tiny


def said(*words: object) -> str:
    """What a command that fails says; every error is one of ours, or of the disk."""
    done = CliRunner().invoke(main.app, [str(word) for word in words])
    adapted.forget()
    assert done.exit_code
    assert done.exception is not None
    if isinstance(done.exception, FedLoraError):
        return str(done.exception)
    assert of_the_disk(done.exception), repr(done.exception)
    return of_the_disk(done.exception)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    return run_locally(tiny(folder, tiny_llama, federation__rounds=1))[0]


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run's folder to damage."""
    return shutil.copytree(finished, tmp_path / "run")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "other": lambda path: path.write_text("[]"),
    "thin": lambda path: path.write_text("{}"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command", ["run --resume", "status", "report", "export"])
def test_a_damaged_record(run: Path, tmp_path: Path, how: str, command: str) -> None:
    DAMAGE[how](run / "result.json")
    out = [tmp_path / "out"] if command == "export" else []
    assert str(run / "result.json") in said(*command.split(), run, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["run --resume", "status"])
def test_a_record_with_a_part_missing(run: Path, command: str) -> None:
    for name in ("key", "status", "config", "rounds"):
        data = json.loads((run / "result.json").read_text())
        whole = dict(data)
        del data[name]
        (run / "result.json").write_text(json.dumps(data))
        assert "not the record of a run that this version can read" in said(*command.split(), run)
        (run / "result.json").write_text(json.dumps(whole))


def test_damaged_events_are_left_out(run: Path) -> None:
    (run / "events.jsonl").write_bytes(b'\xff\n{"event": "round-start"}\n3\n{"event": "log", "time": "late"}\n')
    done = CliRunner().invoke(main.app, ["status", str(run)])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["fedlora.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter(run: Path, tmp_path: Path, how: str, file: str) -> None:
    DAMAGE[how](run / "adapter" / file)
    assert str(run / "adapter") in said("export", run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert str(run / "adapter") in said("evaluate", "--adapter", run / "adapter")


@pytest.mark.parametrize("how", ["cut", "empty", "other", "binary"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_damaged_model(tmp_path: Path, tiny_llama: Path, how: str, file: str) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    DAMAGE[how](model / file)
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, model)), encoding="utf-8")
    assert str(model) in said("run", preset)
    assert str(model) in said("data", preset, "--show", "1")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder"])
def test_nothing_of_use_is_there(tmp_path: Path, there: str) -> None:
    path = tmp_path / "place"
    if there == "a file":
        path.write_text("hello")
    elif there == "an empty folder":
        path.mkdir()
    for words in (["run", path], ["run", "--resume", path], ["status", path], ["report", path], ["data", path]):
        assert str(path) in said(*words) or there == "a file"
    for words in (["export", path, tmp_path / "out"], ["evaluate", "--adapter", path], ["server", "--certs", path]):
        assert str(path) in said(*words)
    for words in (["register", path, "--ca", path], ["node", "--ca", path, "--key", path], ["compare", path]):
        assert said(*words)
    assert sorted(tmp_path.iterdir()) == ([] if there == "nothing" else [path])


def grid_of(folder: Path, model: Path, settings: str = "") -> Path:
    """A comparison of one cell, with more of its TOML."""
    preset = folder / "run.toml"
    preset.write_text(config_table(tiny(folder, model, data__test_fraction=0.5)), encoding="utf-8")
    grid = folder / "grid.toml"
    grid.write_text(
        f'name = "g"\nconfig = "{preset}"\nstrategies = ["flora"]\nlearning-rates = [0.001]\nseeds = [0]\n'
        f'metric = "loss"\nreference = "flora"\n{settings}[scenarios.one]\n'
    )
    return grid


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("command", ["export", "export --merge", "export --all-clients", "compare", "report"])
def test_a_folder_that_cannot_be_written(
    run: Path, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, number: int, command: str
) -> None:
    out = tmp_path / "disk" / "out"
    make = Path.mkdir

    def refuse(path: Path, *words: object, **options: object) -> None:
        if tmp_path / "disk" in (path, *path.parents):
            raise OSError(number, "the disk says no", str(path))
        make(path, *words, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    words: list[object] = [*command.split(), run, out]
    if command == "compare":
        words = ["compare", grid_of(tmp_path, tiny_llama), "--out", out]
    elif command == "report":
        words = ["report", run, "--out", out]
    message = said(*words)
    assert str(tmp_path / "disk") in message
    assert "the disk says no" in message


def test_a_disk_that_is_full_leaves_nothing_of_a_merge(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: PreTrainedModel, folder: Path) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    message = said("export", run, tmp_path / "out", "--merge")
    assert "No space left on device" in message
    assert "make room" in message
    assert sorted(tmp_path.iterdir()) == [run]


def test_a_comparison_whose_cells_would_all_fail_leaves_no_folder(tmp_path: Path, tiny_llama: Path) -> None:
    grid = grid_of(tmp_path, tiny_llama, '[settings]\ndata.source = "missing.jsonl"\n')
    assert "missing.jsonl: no such file" in said("compare", grid, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [certificates.SERVER, certificates.SERVER_KEY])
def test_damaged_certificates_are_named_before_anything_starts(tmp_path: Path, file: str) -> None:
    certificates.make(tmp_path / "certs")
    (tmp_path / "certs" / file).write_text("")
    message = said("server", "--certs", tmp_path / "certs", "--state", tmp_path / "state")
    assert f"{tmp_path / 'certs' / certificates.SERVER} and {certificates.SERVER_KEY} are not a certificate" in message
    assert not (tmp_path / "state").exists()


def test_other_errors_are_no_sentences_about_the_disk() -> None:
    assert of_the_disk(KeyError("a")) == ""
    assert of_the_disk(OSError("no number")) == ""
    assert of_the_disk(OSError(errno.EINVAL, "Invalid argument")) == ""
    assert of_the_disk(OSError(errno.EROFS, "Read-only", "/a/b")).startswith("/a/b: Read-only; give another path")
