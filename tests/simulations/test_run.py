"""`fedlora.run`: objects in, a result out; what cannot be is refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

import fedlora
from fedlora.adapters import LoraFactors, delta
from fedlora.adapters.flat import OWN
from fedlora.common import given
from fedlora.common.errors import ConfigError, DataError, FedLoraError, ModelError, RunError, StrategyError
from fedlora.models import fingerprint
from fedlora.models.base.read import quiet
from fedlora.strategies.configured import configured
from fedlora.strategies.methods.fedavg_zeropad import FedAvgZeropad
from fedlora.strategies.methods.flora import Flora
from fedlora.strategies.methods.hetlora import HetLora
from tests.device import ON_CPU, assert_same, run_bound
from tests.federation import tiny, write_labels, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys(tmp_path, tiny_llama) -> dict[str, Any]:
    """A tiny run's configuration, without its data and its model."""
    flat = tiny(tmp_path, tiny_llama).to_flat()
    for key in ("data.source", "data.partition-by", "model.name", "run.id"):
        del flat[key]
    return flat | {"train.steps": 1}


@pytest.fixture
def rows(tmp_path) -> list[dict[str, str]]:
    return read(write_rows(tmp_path / "mine.jsonl"))


@pytest.fixture(scope="module")
def llama(tiny_llama) -> tuple[Any, Any]:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def factors(result: fedlora.Result) -> dict[str, LoraFactors]:
    return dict(result.adapter.lora)


def assert_equal(one: fedlora.Result, other: fedlora.Result) -> None:
    if ON_CPU:
        assert_same(OWN.put(one.adapter), OWN.put(other.adapter))
    else:  # factors are determined up to a rotation
        one_update, other_update = ({n: delta(f) for n, f in each.adapter.lora.items()} for each in (one, other))
        assert_same(one_update, other_update)


@dataclass(frozen=True)
class Halved(FedAvgZeropad):
    """Goes half of the way."""

    by: float = 0.5

    def aggregate(self, state, updates, number):
        new = super().aggregate(state, updates, number)
        lora = {
            name: replace(f, B=state.adapter.lora[name].B * (1 - self.by) + f.B * self.by)
            for name, f in new.adapter.lora.items()
        }
        return replace(new, adapter=replace(new.adapter, lora=lora))


def test_objects_give_what_files_give(tmp_path, monkeypatch, keys, rows, llama, tiny_llama):
    monkeypatch.chdir(tmp_path)
    for key in ("run.dir", "run.name"):
        keys.pop(key)
    weights = {name: value.clone() for name, value in llama[0].state_dict().items()}
    heard: list[str] = []
    two = {"federation.rounds": 2}
    result = fedlora.run(keys, two, data=rows, model=llama, strategy="flora", listen=lambda kind, _: heard.append(kind))
    assert [entry["round"] for entry in result.rounds] == [1, 2]
    assert result.folder.parent == tmp_path / "runs" / "run"
    assert heard.count("round-end") == 2
    assert (result.folder / "adapter").is_dir()
    after = llama[0].state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    files = {"data.source": str(tmp_path / "mine.jsonl"), "model.name": str(tiny_llama), "data.partition": "iid"}
    other = fedlora.run(keys, files, strategy="flora")
    assert_equal(result, other)
    assert result.folder != other.folder
    recorded = [json.loads((run.folder / "result.json").read_text(encoding="utf-8"))["base"] for run in (result, other)]
    assert recorded == [fingerprint(tiny_llama)] * 2


def test_a_run_says_nothing_unless_it_is_asked_to(keys, rows, tiny_llama, capfd):
    given = keys | {"federation.rounds": 1}
    fedlora.run(given, data=rows, model=str(tiny_llama))
    assert capfd.readouterr() == ("", "")
    fedlora.run(given, data=rows, model=str(tiny_llama), progress=True)
    assert "round 1  held-out loss" in capfd.readouterr().out


@pytest.mark.parametrize("kind", [list, pd.DataFrame, datasets.Dataset.from_list])
def test_rows_of_any_kind_are_the_same_rows(keys, rows, tiny_llama, kind):
    keys |= {"federation.rounds": 1, "data.partition": "natural", "data.partition-by": "person"}
    expected = fedlora.run(keys, data=rows, model=tiny_llama)
    assert_equal(fedlora.run(keys, data=kind(rows), model=tiny_llama), expected)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_each_client_has_its_own_rows(keys, rows, tiny_llama, as_mapping):
    """In the clients' order, however many rows each has."""
    people = [[row for row in rows if row["person"] == f"p{person}"] for person in (2, 0, 1)]
    people[0] = people[0][:6]
    tables = [pd.DataFrame(people[0]), people[1], datasets.Dataset.from_list(people[2])]
    del keys["federation.clients"], keys["data.partition"]
    data = {2: tables[2], 0: tables[0], 1: tables[1]} if as_mapping else tables
    result = fedlora.run(keys, {"federation.rounds": 1, "data.heldout-fraction": 0.1}, data=data, model=tiny_llama)
    split = fedlora.data.prepare(result.config)
    assert [sorted({row["person"] for row in split.client(client)}) for client in range(3)] == [["p2"], ["p0"], ["p1"]]
    assert result.config.federation.clients == len(split.parts) == 3
    assert [client["num-examples"] for client in result.rounds[0]["clients"].values()] == [
        split.count(client) for client in range(3)
    ]


def test_a_model_in_memory_is_quantized_like_its_files(keys, rows, llama, tiny_llama):
    keys |= {"model.quantization": "nf4", "federation.rounds": 1}
    assert_equal(fedlora.run(keys, data=rows, model=llama), fedlora.run(keys, data=rows, model=tiny_llama))


def test_a_strategy_object_is_the_one_that_aggregates(keys, rows, tiny_llama):
    keys |= {"federation.rounds": 1}
    whole = fedlora.run(keys, data=rows, model=tiny_llama, strategy="fedavg-zeropad").adapter
    half = fedlora.run(keys, data=rows, model=tiny_llama, strategy=Halved(by=0.25)).adapter
    for name, pair in whole.lora.items():
        product = half.lora[name].B @ half.lora[name].A * half.lora[name].scaling
        torch.testing.assert_close(
            product, 0.25 * (pair.B @ pair.A) * pair.scaling, rtol=run_bound(1e-4), atol=run_bound(1e-7)
        )


def test_an_object_keeps_what_was_set_in_it_and_takes_the_runs_options_for_the_rest():
    name = given.hold(HetLora(prune_gamma=0.25), "HetLora")
    config = fedlora.config.parse({"strategy.name": name, "strategy.options": "prune-weight=0.5"})
    assert configured(config) == HetLora(prune_gamma=0.25, prune_weight=0.5)
    given.release(name)
    with pytest.raises(StrategyError, match="stood for an object of the Python program"):
        configured(config)


def test_evaluate_scores_the_learned_adapter_on_other_rows(keys, rows, llama):
    result = fedlora.run(keys, {"federation.rounds": 2}, data=rows, model=llama, strategy=Flora())
    split = fedlora.data.prepare(result.config)
    found = result.evaluate(split.heldout)
    last = result.rounds[-1]["heldout"]
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["accuracy"] == last["accuracy"]
    assert result.evaluate(rows[:5])["loss"] != found["loss"]
    with pytest.raises(DataError, match="cannot be told from the columns"):
        result.evaluate([{"question": "why"}])


@pytest.mark.parametrize("kind", ["miss", "loldu", "dora"])
def test_evaluate_scores_an_adapter_of_another_kind(keys, rows, tiny_llama, kind):
    keys |= {"lora.kind": kind, "lora.ranks": "2", "federation.rounds": 1}
    result = fedlora.run(keys, data=rows, model=tiny_llama, strategy="fedavg")
    found = result.evaluate(fedlora.data.prepare(result.config).heldout)
    assert found["loss"] == pytest.approx(result.rounds[-1]["heldout"]["loss"], rel=1e-5)


def test_evaluate_is_of_the_base_without_what_the_run_merged(keys, rows, tiny_llama):
    result = fedlora.run(keys, {"anchor.base-update": "merge"}, data=rows, model=tiny_llama, strategy="flora")
    found = result.evaluate(fedlora.data.prepare(result.config).heldout)
    assert found["loss"] == pytest.approx(result.rounds[-1]["heldout"]["loss"], rel=1e-4)


def test_evaluate_numbers_classes_as_the_run_did(tmp_path, keys, tiny_bert):
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    labels = [row | {"label": ("ham", "spam")[row["label"]]} for row in read(write_labels(tmp_path / "labels.jsonl"))]
    keys |= {"model.task": "classification", "lora.target-modules": "query,value", "federation.rounds": 1}
    result = fedlora.run(keys, data=labels, model=(model, tokenizer), strategy="fedavg-zeropad")
    spam = [row for row in labels if row["label"] == "spam"]
    both = result.evaluate(spam)["accuracy"] + result.evaluate([row | {"label": "ham"} for row in spam])["accuracy"]
    assert both == pytest.approx(1.0)
    with pytest.raises(DataError, match="holds a name that is none of"):
        result.evaluate([{"text": "ash", "label": "eggs"}])


def test_what_was_given_is_let_go_of_with_the_result(keys, rows, llama):
    result = fedlora.run(keys | {"federation.rounds": 1}, data=rows, model=llama)
    names = result.config.data.source, result.config.model.name
    folder = given.find(names[1], "model.name", ModelError)
    assert folder.is_dir()
    del result
    assert not folder.exists()
    assert not any(map(given.is_here, names))
    with pytest.raises(FedLoraError):
        fedlora.run(keys, {"lora.ranks": "9999"}, data=rows, model=llama)
    assert not given._held


class Own(LlamaForCausalLM):
    """A user's own."""


def odd(model: Any) -> Any:
    changed = type(model)(model.config)
    changed.model.layers[0].mlp.up_proj = nn.Linear(32, 8, bias=False)
    return changed


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, t: m, "got a LlamaForCausalLM alone, expected a name, a path, or (model, tokenizer)"),
        (lambda m, t: (m,), "got 1 things, expected a name, a path, or (model, tokenizer)"),
        (lambda m, t: (m, None), "got NoneType beside the model, expected the tokenizer of transformers"),
        (lambda m, t: (nn.Linear(2, 2), t), "expected a model of transformers"),
        (lambda m, t: (Own(m.config), t), "is a class of your own"),
        (lambda m, t: (odd(m), t), "up_proj.weight is (8, 32), expected (64, 32); give a plain model"),
        (lambda m, t: (on_meta(m), t), "some weights are not in memory"),
        (lambda m, t: "no-such/../model", "is no packaged model, local folder or hub id"),
    ],
)
def test_a_model_that_cannot_be_one_is_refused(keys, rows, llama, change, says):
    with pytest.raises(ModelError) as refused:
        fedlora.run(keys, data=rows, model=change(*llama))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "data: holds no rows"),
        (pd.DataFrame({"prompt": []}), "data: holds no rows"),
        ({}, "data: got a mapping with the keys none, expected the ids of the clients"),
        ({"prompt": ["a"], "response": ["b"]}, "got a mapping with the keys 'prompt', 'response'"),
        ({1: [{"prompt": "a"}], 2: [{"prompt": "a"}]}, "expected the ids of the clients, 0 to 1"),
        ([[{"prompt": "a"}], []], "data: client 1: holds no rows"),
        ([[{"prompt": "a"}], [{"text": "a"}]], "data: client 1 has no column 'prompt', which client 0 has"),
        ([{"prompt": "a"}, "b"], "got a list with str in place 1"),
        ([{1: "a"}], "a dict whose keys are no texts"),
        ([{"prompt": "a"}, {"prompt": 1}], "column 'prompt' holds values that do not make one column"),
        (7, "data: got int, expected a list of dicts, a pandas DataFrame or a datasets.Dataset"),
        ([{"question": "a", "answer": "b"}] * 40, "cannot be told from the columns"),
        ([{"prompt": "a", "response": "b"}] * 3, "leaves none for the server's evaluation"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(keys, tiny_llama, data, says):
    with pytest.raises(DataError) as refused:
        fedlora.run({k: v for k, v in keys.items() if k != "federation.clients"}, data=data, model=tiny_llama)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not Path(keys["run.dir"]).exists()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"keys": {"federation.round": 2}}, ConfigError, "fedlora.run: unknown key 'federation.round'"),
        (
            {"config": "quikstart"},
            ConfigError,
            "quikstart: neither a TOML file nor a preset; did you mean 'quickstart'",
        ),
        ({"config": 3}, ConfigError, "got int as configuration"),
        ({"config": {"train": {"step": 1}}}, ConfigError, "unknown key 'train.step'"),
        ({"strategy": Flora}, StrategyError, "strategy: got the class Flora, expected an object: Flora()"),
        ({"strategy": "flor"}, StrategyError, "unknown strategy 'flor'"),
        ({"strategy": object()}, StrategyError, "object is no strategy; write a frozen dataclass"),
        ({"keys": {"data.source": "x"}}, ConfigError, "data= and data.source = 'x' are both given"),
        ({"engine": "ray"}, ConfigError, "engine = 'ray', expected 'local' or 'flower'"),
        ({"engine": "flower"}, ConfigError, "engine = 'flower': its clients are other processes"),
        ({"devices": ["cpu", "cpu"]}, ConfigError, "several devices: its clients are other processes"),
        ({"devices": "cpu"}, ConfigError, "expected a list of names"),
        ({"at_once": 2}, ConfigError, "at_once needs engine = 'flower'"),
        ({"resume": "runs/x"}, ConfigError, "leave out data="),
        ({"resume": "runs/x", "data": None, "config": "quickstart"}, ConfigError, "leave out its first argument"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, monkeypatch, rows, given, error, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as refused:
        fedlora.run(**({"data": rows} | given))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_clients_and_the_number_of_tables_agree(keys, rows, tiny_llama):
    with pytest.raises(ConfigError, match=r"federation\.clients = 4, but data has the rows of 2 clients"):
        fedlora.run(keys, {"federation.clients": 4}, data=[rows[:14], rows[14:28]], model=tiny_llama)


def test_a_run_goes_on_where_it_stopped(tmp_path, keys, rows, tiny_llama):
    source = {"data.source": str(tmp_path / "mine.jsonl"), "data.partition": "iid", "model.name": str(tiny_llama)}
    first = fedlora.run(keys, source | {"federation.rounds": 1})
    both = fedlora.run(resume=first.folder, keys={"federation.rounds": 2})
    assert both.folder == first.folder
    assert len(both.rounds) == 2


def test_a_run_of_objects_is_not_resumed_without_them(keys, rows, tiny_llama):
    first = fedlora.run(keys, {"federation.rounds": 1}, data=rows, model=tiny_llama)
    folder = first.folder
    del first
    with pytest.raises(DataError, match="stood for an object of the Python program that started the run"):
        fedlora.run(resume=folder, keys={"federation.rounds": 2})
    with pytest.raises(RunError, match="no run here"):
        fedlora.run(resume=folder.parent / "none")


def test_the_package_is_imported_at_once():
    code = (
        "import time, sys; began = time.perf_counter(); import fedlora; took = time.perf_counter() - began; "
        "fedlora.Config; heavy = {'torch', 'transformers', 'flwr', 'numpy'} & {*sys.modules}; print(took, *heavy)"
    )
    command = [sys.executable, "-c", code]
    said = [subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout.split() for _ in range(3)]
    assert min(float(words[0]) for words in said) < 0.1
    assert all(len(words) == 1 for words in said)


def test_every_public_name_is_there():
    assert {*fedlora.__all__} == {*fedlora._PLACES}
    assert all(getattr(fedlora, name).__name__ == name for name in fedlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'runs'"):
        _ = fedlora.runs


@pytest.mark.slow
def test_a_script_without_a_guard_runs_on_several_devices(tmp_path, keys, rows, tiny_llama):
    """Processes that are spawned would run the script again."""
    source = {"data.source": str(tmp_path / "mine.jsonl"), "data.partition": "iid", "model.name": str(tiny_llama)}
    flat = keys | source | {"federation.rounds": 1}
    script = f"import fedlora\nprint('begun')\nfedlora.run({flat!r}, devices=['cpu', 'cpu'])\n"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "script.py"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["begun"]


CELL = """
import sys
import fedlora
from dataclasses import dataclass
from fedlora.strategies.methods.flora import Flora
from transformers import AutoModelForCausalLM, AutoTokenizer

base = sys.argv[1]
rows = [{"prompt": f"{word} {i}", "response": word[::-1]} for word in ("ash", "elm", "fir") for i in range(16)]
model = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)

@dataclass(frozen=True)
class Mine(Flora):
    "Of this cell."

keys = {"federation.rounds": 2, "train.steps": 1, "lora.target-modules": "q_proj,v_proj", "model.device": "cpu"}
result = fedlora.run("quickstart", keys, data=rows, model=model, strategy=Mine(), listen=lambda kind, facts: None)
print(fedlora.__file__)
print(len(result.rounds), result.folder, result.evaluate(rows[:4])["loss"] > 0, len(result.adapter.lora))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_a_cell_runs_in_a_clean_environment_on_the_wheel(tmp_path, tiny_llama):
    """Installed by `pip install .`; the other packages are those of this environment, on its path."""
    named = subprocess.run(["git", "ls-files", "-z"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    for name in filter(None, named.split("\0")):
        if name.startswith(("fedlora/", "strategies/", "clients/", "simulations/", "configs/")) or "/" not in name:
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", tmp_path / "source"], check=True, cwd=tmp_path)
    (site / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "cell.py").write_text(CELL, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [python, "cell.py", tiny_llama]
    done = subprocess.run(
        command, check=False, cwd=tmp_path / "work", capture_output=True, text=True, timeout=300, env=clean
    )
    assert done.returncode == 0, done.stderr
    where, said = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(site)
    rounds, folder, positive, modules = said.split()
    assert (rounds, positive, modules) == ("2", "True", "4")
    assert Path(folder).parent == tmp_path / "work" / "runs" / "quickstart"
