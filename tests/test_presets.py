"""The presets on their real models and data, and the wheel that carries them."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fedlora.config import load
from fedlora.models import adapted
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation

ROOT = Path(__file__).resolve().parent.parent


def run(preset: str, tmp_path: Path, *overrides: str):
    config = load(ROOT / "configs" / f"{preset}.toml", [f"run.dir={tmp_path}", "run.id=one", *overrides])
    simulation.in_process(config)
    adapted.forget()
    return json.loads((folder_of(config) / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_fedavg_reaches_80_percent_on_sentiment(tmp_path):
    result = run("sentiment", tmp_path, "evaluate.every=4")  # what is learned is the same
    assert result["config"]["strategy.name"] == "fedavg"
    assert result["rounds"][-1]["heldout"]["accuracy"] >= 0.80


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantization", ["nf4", *(pytest.param(q, marks=pytest.mark.nightly) for q in ("none", "int8"))]
)
def test_the_quickstart_learns_round_by_round_on_every_quantization(tmp_path, quantization):
    """The real model and data at unequal ranks, with fewer clients and steps than `make demo` takes."""
    result = run(
        "quickstart",
        tmp_path,
        f"model.quantization={quantization}",
        "federation.clients=2",
        "federation.rounds=2",
        "train.steps=3",
        "data.heldout-max=16",
    )
    losses = [result["baseline"]["loss"]] + [entry["heldout"]["loss"] for entry in result["rounds"]]
    assert [client["rank"] for client in result["clients"]] == [16, 8]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.slow
def test_the_wheel_carries_every_folder_and_preset(tmp_path):
    source = tmp_path / "source"
    for folder in ("fedlora", "strategies", "clients", "simulations", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=300)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for folder in ("fedlora", "strategies", "clients", "simulations", "configs"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".toml"}:
                inside = path.relative_to(ROOT).as_posix()
                assert (inside if folder == "fedlora" else f"fedlora/{inside}") in names


def test_what_flower_would_install_are_the_tested_versions():
    """`flwr run` syncs an environment by pyproject.toml, unless it is told not to; see docs/simulations.md."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["uv"]["constraint-dependencies"] == pins
