"""Flower's simulation engine: the same federation, and failures that are failures."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from fedlora import config as configuration
from fedlora.common.errors import RunError
from fedlora.config import parse
from fedlora.deployment import flower_programs
from fedlora.deployment.flower_programs import config_table
from fedlora.models import adapted
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from tests.device import run_bound
from tests.federation import hears_ctrl_c, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

ROOT = Path(__file__).resolve().parents[3]


def test_the_bundle_holds_the_whole_config_and_nothing_else(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, strategy__options="similarity=cosine", data__system_prompt='say "hi"\n')
    bundle = flower_programs.write_bundle(config, tmp_path / "app")
    project = tomllib.loads((bundle / "pyproject.toml").read_text(encoding="utf-8"))
    assert parse(configuration.flatten(project["tool"]["flwr"]["app"]["config"])) == config
    from flwr.cli.config_utils import load_and_validate

    load_and_validate(bundle / "pyproject.toml")


def test_this_project_is_itself_a_valid_flower_app():
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    load_and_validate(ROOT / "pyproject.toml")
    assert len(build_fab_from_disk(ROOT)) < 10 * 2**20


@pytest.mark.slow
def test_both_engines_give_the_same_adapter(tmp_path, tiny_llama):
    """Same seed, fp32, same thread count."""
    config = tiny(tmp_path, tiny_llama)
    simulation.in_process(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= run_bound(1e-6)
    one, two = (json.loads((folder_of(c) / "result.json").read_text()) for c in (config, other))
    assert two["status"] == "completed"
    assert [e["heldout"]["loss"] for e in one["rounds"]] == pytest.approx([e["heldout"]["loss"] for e in two["rounds"]])


@pytest.mark.slow
def test_flwr_run_on_a_checkout_gives_the_same_adapter(tmp_path, tiny_llama):
    """`flwr run .` as a user types it, with the config as overrides."""
    config = tiny(tmp_path, tiny_llama)
    simulation.in_process(config)
    adapted.forget()
    other = parse({"run.id": "two"}, config)
    overrides = tmp_path / "run.toml"
    overrides.write_text(config_table(other), encoding="utf-8")
    with flower._superlink(tmp_path) as environment:
        command = [str(Path(sys.executable).with_name("flwr")), "run", str(ROOT), "local", "--stream"]
        command += ["--federation-config", "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=1"]
        command += ["--run-config", str(overrides)]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= run_bound(1e-6)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Ray's sockets."""
    with TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def working_in(folder: Path) -> list[psutil.Process]:
    """The processes that have this folder in their command line, or a file in it open, as Ray's have their logs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(str(folder) in word for word in words):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_failed_run_is_a_non_zero_exit_and_leaves_nothing_running(tmp_path, short, tiny_llama):
    config = tiny(tmp_path, tiny_llama, data__heldout_fraction=0.0)
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(config), encoding="utf-8")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("fedlora")), "run", str(preset), "--engine", "flower"],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200", "TMPDIR": str(short)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ended as finished:failed" in done.stderr
    assert "no held-out rows to evaluate on" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "runs").exists()
    assert not psutil.wait_procs(working_in(short), timeout=60)[1]


@pytest.mark.slow
@pytest.mark.parametrize("told", [pytest.param(signal.SIGINT, marks=pytest.mark.nightly), signal.SIGTERM])
def test_a_signal_stops_flower_and_keeps_what_was_finished(tmp_path, short, tiny_llama, told):
    config = tiny(tmp_path, tiny_llama, federation__rounds=2000)
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(config), encoding="utf-8")
    path = folder_of(config) / "result.json"
    command = [str(Path(sys.executable).with_name("fedlora")), "run", str(preset), "--engine", "flower"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(short)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509 - no other thread starts here
    ) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if path.exists() and json.loads(path.read_text())["rounds"]:
                break
            time.sleep(0.5)
        names = {found.name() for found in working_in(short)}
        process.send_signal(told)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + told, err
    assert "interrupted; what was finished is in" in err
    result = json.loads(path.read_text())
    assert result["status"] == "interrupted"
    assert result["rounds"]
    assert (path.parent / "adapter" / "adapter_model.safetensors").exists()
    assert {"flower-superlin", "raylet", "ray::ClientAppA"} <= {name[:15] for name in names}
    assert not psutil.wait_procs(working_in(short), timeout=60)[1]


@pytest.mark.parametrize("program", ["flower-superlink", "flwr"])
def test_a_missing_program_says_what_to_install(monkeypatch, tmp_path, program):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RunError, match=r"pip install 'flwr\[simulation\]'"):
        flower_programs.program(program)
