"""A task from a user's own module: it runs on both engines, and a bad one is named before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora.common.errors import ConfigError, RunError, TaskError
from fedlora.config import ModelConfig, parse
from fedlora.models.base import read
from fedlora.results.run_folder import folder_of, stored
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import flower
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.registry import NAMES, task_of
from tests.federation import run_locally, tiny
from tests.simulations.engines.test_local import apart, saved_adapter

OWN = '''
from dataclasses import dataclass, replace
from typing import ClassVar

from fedlora.tasks.base import Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.losses import labelled_logits
from fedlora.tasks.scores import Predictions


@dataclass(frozen=True)
class MyTask(CausalLM):
    """Every loss counts `weight` times, and the share of tokens among the most probable few is measured."""

    metrics: ClassVar[frozenset[str]] = CausalLM.metrics | {"top"}
    weight: float = 1.0
    most: int = 5

    def __post_init__(self):
        if self.most < 1:
            raise ValueError("most must be at least 1")

    def losses(self, model, batch):
        each, rows = super().losses(model, batch)
        return each * self.weight, rows

    def predict(self, model, batch, adapters=None):
        logits, targets, rows = labelled_logits(model, batch, adapters)
        among = (logits.topk(self.most, dim=-1).indices == targets[:, None]).any(dim=-1)
        return replace(Predictions.of_logits(logits, targets, rows), more={"among": among})

    def scores(self, predictions):
        return super().scores(predictions) | {"top": float(predictions.more["among"].double().mean())}


class Plain: ...


@dataclass(frozen=True)
class Lacking(Task): ...


@dataclass(frozen=True)
class OtherForm(CausalLM):
    forms: ClassVar[tuple[str, ...]] = ("pixels",)


@dataclass(frozen=True)
class NoLoss(CausalLM):
    metrics: ClassVar[frozenset[str]] = frozenset({"accuracy"})


@dataclass(frozen=True)
class OneLoss(CausalLM):
    def losses(self, model, batch):
        return super().losses(model, batch)[0].mean()


@dataclass(frozen=True)
class OneCount(CausalLM):
    def counts(self, batch):
        return super().counts(batch).sum()


@dataclass(frozen=True)
class OneRow(CausalLM):
    def collate(self, examples, pad_id):
        return {name: array[0] for name, array in super().collate(examples, pad_id).items()}


@dataclass(frozen=True)
class FewScores(CausalLM):
    def scores(self, predictions):
        return {"loss": 1.0}


@dataclass(frozen=True)
class ShortColumn(CausalLM):
    def predict(self, model, batch, adapters=None):
        found = super().predict(model, batch, adapters)
        return replace(found, more={"odd": found.rows[:1]})
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "mytasks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "mine.py").write_text(OWN, encoding="utf-8")
    (folder / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for Flower's processes
    return "mytasks.mine"


def test_a_task_of_ones_own_runs_with_its_options_and_its_metric(tmp_path, tiny_llama, own):
    keys: dict[str, Any] = {"model__task": f"{own}:MyTask", "evaluate__clients": True}
    folder, result = run_locally(tiny(tmp_path, tiny_llama, **keys, model__task_options="most=64, weight=2"))
    entry = result["rounds"][-1]
    assert entry["heldout"]["accuracy"] <= entry["heldout"]["top"] <= 1
    assert entry["heldout"]["top"] > 0
    assert entry["client-test"]["mean"]["top"] > 0
    _, plain = run_locally(tiny(tmp_path, tiny_llama, run__id="plain", evaluate__clients=True))
    assert "top" not in plain["rounds"][-1]["heldout"]
    assert result["rounds"][0]["train-loss"] == pytest.approx(2 * plain["rounds"][0]["train-loss"], rel=1e-2)
    assert '"CAUSAL_LM"' in (folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.nightly
def test_both_engines_learn_the_same_of_a_task_of_ones_own(tmp_path, tiny_llama, own):
    keys: dict[str, Any] = {"model__task": f"{own}:MyTask", "model__task_options": "weight=3"}
    config = tiny(tmp_path, tiny_llama, **keys, evaluate__clients=True)
    simulation.in_process(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    assert apart(saved_adapter(folder_of(config)), saved_adapter(folder_of(other))) <= 1e-6
    one, two = (stored(folder_of(each)) for each in (config, other))
    assert two["status"] == "completed"
    for where in ("heldout", "client-test"):
        tops = [
            entry[where] if where == "heldout" else entry[where]["mean"] for entry in (*one["rounds"], *two["rounds"])
        ]
        assert tops[0]["top"] == pytest.approx(tops[2]["top"])


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "causal",
            "",
            r"model.task: unknown task 'causal' \(your own is named package.module:Class\); did you mean 'causal",
        ),
        ("xyz", "", "known are causal-lm, classification"),
        ("no_such_package.mine:X", "", "cannot import 'no_such_package.mine' .ModuleNotFoundError"),
        ("mytasks.broken:X", "", "cannot import 'mytasks.broken' .ZeroDivisionError: division by zero"),
        ("mytasks.mine:Nothing", "", "module 'mytasks.mine' has no class 'Nothing'"),
        ("mytasks.mine:Plain", "", "Plain is no task; write a frozen dataclass that extends fedlora.tasks.base.Task"),
        ("mytasks.mine:Lacking", "", "Lacking is no task"),
        ("mytasks.mine:OtherForm", "", r"OtherForm.forms = \('pixels',\), expected some of prompt, chat"),
        ("mytasks.mine:NoLoss", "", "NoLoss.metrics has no 'loss'"),
        (
            "mytasks.mine:MyTask",
            "mots=3",
            "model.task-options: mytasks.mine:MyTask has no option 'mots'; did you mean 'most'",
        ),
        ("mytasks.mine:MyTask", "most=few", "most = 'few' is str, expected int"),
        ("mytasks.mine:MyTask", "most=0", "refuses .*most must be at least 1"),
        ("classification", "labels=3", "model.task-options: labels is set by model.labels; leave it out"),
        (
            "mytasks.mine:OneCount",
            "",
            r"OneCount.counts returned a tensor of shape \(\) and type int64, expected .* int64 \[1\]",
        ),
        (
            "mytasks.mine:OneRow",
            "",
            "OneRow.collate returned {input_ids: a tensor of shape .*, expected a dictionary of tensors",
        ),
    ],
)
def test_a_bad_one_is_named_before_any_weight_is_read(tmp_path, tiny_llama, own, monkeypatch, task, options, message):
    def nothing(*_: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(read, "weights", nothing)
    config = tiny(tmp_path, tiny_llama, model__task=task, model__task_options=options)
    with pytest.raises((ConfigError, TaskError), match=message):
        simulation.in_process(config)
    assert not folder_of(config).exists()


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (
            "OneLoss",
            RunError,
            r"OneLoss.losses returned a tensor of shape \(\) and type float32, expected all losses \[n\]",
        ),
        (
            "FewScores",
            TaskError,
            "FewScores.scores returned loss, expected a number for each of accuracy, calibration-error",
        ),
        (
            "ShortColumn",
            TaskError,
            r"ShortColumn.predict: more.odd returned a tensor of shape \(1,\) .* each of the \d+ pos",
        ),
    ],
)
def test_what_a_method_gives_is_checked_where_it_is_used(tmp_path, tiny_llama, own, task, error, message):
    with pytest.raises(error, match=message):
        simulation.in_process(tiny(tmp_path, tiny_llama, model__task=f"{own}:{task}"))


@pytest.mark.parametrize("name", NAMES)
def test_every_built_in_task_says_what_it_is(name):
    task = task_of(ModelConfig(task=name))
    assert "loss" in task.metrics
    assert task.lower & task.metrics
    assert hasattr(task.auto_class(), "from_pretrained")


def test_a_task_is_a_value():
    assert task_of(ModelConfig()) == CausalLM()


def test_the_table_of_tasks_loads_no_torch() -> None:
    code = "import sys, fedlora.tasks.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
