"""The presets on their real models and data, and the wheel that carries them."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import Config, load, parse
from fedlora.models import adapted
from fedlora.results.run_folder import folder_of, resumed
from fedlora.simulations import run as simulation
from fedlora.tasks.registry import check_task
from tests.device import cpu_only
from tests.federation import write_rows
from tests.simulations.test_resume import forget

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


def two_phases(whole: Config, first: int, elsewhere: Path) -> tuple[Path, Path]:
    """(folder of the run without a break, folder of the run in two phases, moved away between them)."""
    simulation.in_process(whole)
    forget()
    part = parse({"run.id": "two", "federation.rounds": first}, whole)
    simulation.in_process(part)
    forget()
    moved = elsewhere / "runs" / whole.run.name / "two"
    moved.parent.mkdir(parents=True)
    shutil.move(folder_of(part), moved)
    rounds = f"federation.rounds={whole.federation.rounds}"
    simulation.in_process(resumed(moved, [rounds, "model.device=auto"]))
    forget()
    return folder_of(whole), moved


def assert_one_run(whole: Path, phases: Path) -> None:
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, phases))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, phases)]
    losses = [[entry["heldout"]["loss"] for entry in result["rounds"]] for result in results]
    assert losses[0] == losses[1]
    assert len(results[1]["resumed"]) == 1


def education(tmp_path: Path, *overrides: str) -> Config:
    config = load(ROOT / "configs" / "education.toml", [f"run.dir={tmp_path}", "run.id=one", *overrides])
    assert (config.train.schedule, config.train.warmup_fraction, config.model.compute_dtype) == ("constant", 0, "fp32")
    return config


@cpu_only
@pytest.mark.parametrize("first", [1, 2])
def test_two_phases_on_two_machines_are_one_run(tmp_path, tiny_llama, first):
    rows = write_rows(tmp_path / "rows.jsonl")
    own = [f"model.name={tiny_llama}", f"data.source={rows}", "data.partition-by=person", "run.threads=1"]
    whole = education(tmp_path, *own, "federation.rounds=3", "train.steps=3", "train.clients-at-once=1")
    assert_one_run(*two_phases(whole, first, tmp_path / "elsewhere"))


@pytest.mark.slow
@pytest.mark.nightly
def test_the_education_preset_in_two_phases_is_one_run_and_learns(tmp_path):
    whole = education(tmp_path, "train.steps=2", "federation.clients=2", "data.heldout-max=16", "federation.rounds=2")
    folders = two_phases(whole, 1, tmp_path / "elsewhere")
    assert_one_run(*folders)
    result = json.loads((folders[1] / "result.json").read_text())
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


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


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "configs").glob("*.toml")))
def test_a_preset_names_keys_that_there_are(preset):
    if preset.startswith("compare-"):
        return
    config = load(ROOT / "configs" / f"{preset}.toml", [])
    assert config.run.name == preset
    check_task(config)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["vit-domains", "vit-skew"])
def test_the_presets_on_images_learn_clearly(preset, tmp_path):
    result = run(preset, tmp_path, "evaluate.every=5")
    first, last = result["baseline"]["accuracy"], result["rounds"][-1]["heldout"]["accuracy"]
    assert first < 0.2
    assert last > 0.45


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_clip_learns_six_styles_and_is_scored_on_plain_images_before_and_after(tmp_path, command):
    result = run("clip-domains", tmp_path)
    first, last = result["baseline"]["accuracy"], result["rounds"][-1]["heldout"]["accuracy"]
    assert last > first + 0.1
    scores = tmp_path / "scores.json"
    (adapter,) = (tmp_path / "clip-domains").glob("*/adapter")
    code, _, why = command("evaluate", "--adapter", adapter, "--data", "fashion-mnist-test", "--json", scores)
    assert code == 0, why
    before, after = (each["accuracy"] for each in json.loads(scores.read_text())["scores"].values())
    assert before > 0.75
    assert after != before
