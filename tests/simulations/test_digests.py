"""Every strategy's global adapter, bit for bit what it was when `digests.json` was recorded.

Another processor or another torch rounds otherwise: there the same file's coarse figures are compared instead.
Record anew, where a change of the numbers is meant: `python -m tests.simulations.test_digests`.
A case with a platform of its own was recorded there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.config import Scalar, parse
from fedlora.results.run_folder import folder_of, resumed
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from fedlora.strategies import load
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.registry import NAMES
from tests.device import cpu_only
from tests.federation import tiny, write_labels
from tests.simulations.test_resume import amid_round, die, forget

pytestmark = cpu_only  # recorded there: other devices draw other numbers for dropout
RECORDED = Path(__file__).with_name("digests.json")
EQUAL = {"lora.ranks": "3"}
BASES = ("none", "nf4")


def keys_of(name: str) -> dict[str, Scalar]:
    strategy = load(name)
    own = {"evaluate.clients": True, "data.client-test-fraction": 0.3} if strategy.personal else {}
    return {"strategy.name": name, **own} | ({} if strategy.unequal_ranks else EQUAL)


# What stands around the strategies, and what else changes the numbers of a run.
OTHERS: dict[str, dict[str, Scalar]] = {
    "momentum": keys_of("fedavg") | {"strategy.server-optimizer": "momentum"},
    "yogi-restart": keys_of("fedavg")
    | {"strategy.server-optimizer": "yogi", "strategy.server-lr": 0.01, "strategy.restart-every": 1},
    "restart-zeropad": keys_of("fedavg-zeropad") | {"strategy.restart-every": 1},
    "robust-bound": keys_of("flora") | {"strategy.robust": "norm-bound", "strategy.robust-bound": 1.0},
    "robust-median": keys_of("fedavg") | {"strategy.robust": "median"},
    "robust-trimmed": keys_of("flexlora") | EQUAL | {"strategy.robust": "trimmed-mean", "strategy.robust-trim": 0.25},
    "int8": keys_of("lora-fair") | {"wire.upload-dtype": "int8", "wire.dtype": "bf16"},
    "merge-half": keys_of("flora") | {"anchor.base-update": "merge", "federation.fraction": 0.5},
    "compacted": keys_of("flora") | {"anchor.max-rank": 6, "federation.rounds": 3},
    "pruned": keys_of("hetlora") | {"strategy.options": "prune-gamma=0.5, prune-weight=10.0"},
    "proximal-sgd": keys_of("fedavg-zeropad") | {"train.prox-mu": 0.1, "train.optimizer": "sgd"},
    "pattern": keys_of("flexlora") | {"lora.rank-pattern": "q_proj=2", "lora.rslora": True},
    "accumulated": keys_of("fedex") | {"train.accumulate": 2, "train.epochs": 1.0, "train.steps": 0},
}
CASES = [f"{name} {base} {at_once}" for name in NAMES for base in BASES for at_once in ("1", "auto")]
CASES += [
    f"{name} {'none' if name == 'merge-half' else 'nf4'} {at_once}" for name in OTHERS for at_once in ("1", "auto")
]
CASES += [f"{name} bert {at_once}" for name in ("fedavg-zeropad", "lora-fair", "fedsb") for at_once in ("1", "auto")]


def config_of(folder: Path, models: dict[str, Path], case: str, **more: Scalar) -> Any:
    name, base, at_once = case.split()
    keys: dict[str, Scalar] = {"lora.dropout": 0.1, "train.clients-at-once": at_once, **more}
    if base == "bert":
        keys |= {
            "model.name": str(models["bert"]),
            "model.task": "classification",
            "model.quantization": "nf4",
            "data.source": str(write_labels(folder / "labels.jsonl")),
            "data.partition-by": "domain",
            "data.partition": "iid",
            "lora.target-modules": "query,value",
        }
    else:
        keys["model.quantization"] = base
    return parse(keys | (OTHERS.get(name) or keys_of(name)), tiny(folder, models["llama"]))


def figures(folder: Path) -> dict[str, Any]:
    """The adapter's digest, and norms and projections of its products, which hardly depend on rounding."""
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    coarse: dict[str, list[float]] = {}
    for name in sorted(tensors):
        if "lora_B" in name or not tensors[name].is_floating_point():
            continue
        value = tensors[name].double()
        if "lora_A" in name:
            value = tensors[name.replace("lora_A", "lora_B")].double() @ value
        value = value.reshape(len(value), -1)
        rows, columns = (torch.cos(torch.arange(size, dtype=torch.float64)) for size in value.shape)
        coarse[name] = [float(value.norm()), float(rows @ value @ columns)]
    losses = [entry.get("heldout", {}).get("loss") for entry in result_of(folder)["rounds"]]
    return {"sha256": digest.hexdigest(), "coarse": coarse, "losses": losses}


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def platform() -> str:
    """What decides how sums are rounded."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {model.split(':')[-1]}"


def assert_as_recorded(found: dict[str, Any], case: str) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    expected = recorded["cases"][case]
    if platform() == expected.get("platform", recorded["platform"]):
        assert found["sha256"] == expected["sha256"]
        assert found["losses"] == expected["losses"]
    assert found["coarse"].keys() == expected["coarse"].keys()
    for name, (norm, projection) in expected["coarse"].items():
        assert found["coarse"][name] == pytest.approx([norm, projection], abs=0.05 * norm + 1e-6), name
    assert found["losses"] == pytest.approx(expected["losses"], abs=0.02)


@pytest.fixture
def models(tiny_llama, tiny_bert) -> dict[str, Path]:
    return {"llama": tiny_llama, "bert": tiny_bert}


@pytest.mark.parametrize("case", CASES)
def test_a_run_gives_the_recorded_adapter(tmp_path, models, case):
    config = config_of(tmp_path, models, case)
    simulation.in_process(config)
    assert_as_recorded(figures(folder_of(config)), case)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("flora", "fedsa", "fedsb")
        else pytest.param(name, marks=[pytest.mark.slow, pytest.mark.nightly])
        for name in NAMES
    ],
)
def test_a_killed_and_resumed_run_gives_it_too(tmp_path, models, name):
    case = f"{name} nf4 1"
    forget()
    folder = die(config_of(tmp_path, models, case), amid_round(2))
    simulation.in_process(resumed(folder))
    assert_as_recorded(figures(folder), case)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n == "flora" else pytest.param(n, marks=pytest.mark.nightly) for n in NAMES])
def test_flowers_engine_gives_it_too(tmp_path, models, name):
    case = f"{name} nf4 1"
    config = config_of(tmp_path, models, case)
    flower.run(config)
    assert_as_recorded(figures(folder_of(config)), case)


def record(folder: Path) -> None:
    """Write `digests.json` from what this commit computes."""
    from tests.tiny import save_bert, save_llama

    torch.set_num_threads(1)
    models = {"llama": save_llama(folder / "llama"), "bert": save_bert(folder / "bert")}
    cases = {}
    (folder / "checked").mkdir()
    for case in CASES:  # all that can be wrong with them, before any runs
        check_ranks(config_of(folder / "checked", models, case))
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        config = config_of(place, models, case)
        simulation.in_process(config)
        cases[case] = figures(folder_of(config))
    RECORDED.write_text(json.dumps({"platform": platform(), "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        record(Path(made))
