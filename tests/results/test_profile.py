"""Where the time of a round went: all of it, each section for what it is, and nothing else changed."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from fedlora.cli.run import Engine, run
from fedlora.common.errors import ConfigError
from fedlora.deployment.flower_programs import config_table
from fedlora.exchange import wire
from fedlora.models import adapted
from fedlora.results import profile
from fedlora.results.profile import MOST_BATCHES, ROWS, TABLE, TRACE, by_section, operations, profiled
from fedlora.results.run_folder import folder_of
from tests.device import assert_same, assert_same_figures
from tests.federation import run_locally, tiny


@pytest.fixture(autouse=True)
def clean():
    yield
    adapted.forget()


def watched(config):
    """A run under the profiler: `(its folder, what was found, the trace, result.json)`."""
    folder = folder_of(config)
    with profiled(config, folder) as watcher:
        _, result = run_locally(config)
    assert watcher.profile is not None
    return folder, watcher.profile, read(folder / TRACE), result


def read(trace: Path):
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        return json.load(file)


def tensors(folder: Path):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("at_once", [1, 4], ids=["alone", "as-one"])
def test_every_section_has_its_time_and_the_sum_is_the_round(tmp_path, tiny_llama, at_once):
    config = tiny(
        tmp_path, tiny_llama, train__clients_at_once=at_once, wire__upload_dtype="int8", strategy__name="fedavg-zeropad"
    )
    folder, found, trace, result = watched(config)
    assert found.covers == "round 1"
    assert all(found.sections[name] > 0 for name in ROWS), found.sections
    assert sum(found.sections.values()) == pytest.approx(found.seconds, rel=1e-9)
    first = result["rounds"][0]["seconds"]
    assert first["evaluate"] / 2 < found.sections["evaluate"] <= first["evaluate"]
    assert found.seconds > sum(first[name] for name in ("clients", "encode", "decode", "aggregate", "evaluate"))
    assert json.loads((folder / TABLE).read_text(encoding="utf-8"))["sections"] == found.sections

    events = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    names = [event["name"].removeprefix("fedlora/") for event in events if event["name"].startswith("fedlora/")]
    assert {*names} == {*ROWS, "base"} - {"adapter-backward"}
    assert names.count("round") == 1
    assert names.count("adapter") == names.count("base")  # no LoRA layer goes around its base layer
    assert names.count("backward") == 3 * (4 if at_once == 1 else 1)


def test_the_result_is_bitwise_that_of_a_run_without_it(tmp_path, tiny_llama):
    for name in ("plain", "watched"):
        (tmp_path / name).mkdir()
    plain, expected = run_locally(tiny(tmp_path / "plain", tiny_llama))
    before = dict(vars(wire))
    folder, _, _, result = watched(tiny(tmp_path / "watched", tiny_llama))
    assert_same(tensors(folder), tensors(plain))
    assert_same_figures(result["baseline"], expected["baseline"])
    for entry, other in zip(result["rounds"], expected["rounds"], strict=True):
        assert_same_figures(entry["train-loss"], other["train-loss"])
    assert vars(wire) == before
    assert adapted._current is not None
    layers = adapted._current[1].layers.values()
    assert not any(layer._forward_hooks or layer.get_base_layer()._forward_hooks for layer in layers)


def test_a_long_round_is_watched_up_to_a_number_of_batches(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(profile, "MOST_BATCHES", 5)
    config = tiny(tmp_path, tiny_llama, train__clients_at_once=1, federation__rounds=1)
    _, found, trace, _ = watched(config)
    assert found.covers == "round 1, up to the 5th batch"
    assert sum(found.sections.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert all(seconds >= 0 for seconds in found.sections.values())
    assert found.sections["forward"] > 0
    assert found.sections["evaluate"] == 0
    assert sum(event["name"] == "fedlora/backward" for event in trace["traceEvents"]) == 5
    assert MOST_BATCHES > 24  # a preset's round is seen whole


def test_with_checkpointing_the_backward_pass_is_one_row(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, model__gradient_checkpointing=True, federation__rounds=1)
    _, found, _, _ = watched(config)
    assert not found.split
    assert found.sections["adapter-backward"] == 0
    assert found.sections["backward"] > 0
    assert sum(found.sections.values()) == pytest.approx(found.seconds, rel=1e-9)


class _Slow(torch.autograd.Function):
    """x -> x, whose backward pass takes its time."""

    @staticmethod
    def forward(ctx, x, millis):
        ctx.millis = millis
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        busy(ctx.millis)
        return *gradients, None


def busy(millis: float) -> None:
    began = time.perf_counter()
    while time.perf_counter() - began < millis / 1e3:
        pass


def test_the_backward_pass_is_told_apart_by_who_made_its_nodes(tmp_path):
    x = nn.Parameter(torch.ones(3))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("fedlora/round"):
        with record_function("fedlora/forward"):
            with record_function("fedlora/adapter"):
                with record_function("fedlora/base"):
                    y = _Slow.apply(x, 20)
                busy(10)
                y = _Slow.apply(y, 60)
            y = _Slow.apply(y, 5).sum()
        with record_function("fedlora/backward"):
            y.backward()
            busy(5)
    profiler.export_chrome_trace(str(tmp_path / TRACE))
    found = by_section(operations(tmp_path / TRACE), split=True)
    assert found["adapter"] >= 0.010  # only from below: a busy machine takes longer
    assert found["adapter-backward"] >= 0.060
    assert found["backward"] >= 0.020 + 0.005 + 0.005


def test_the_command_prints_the_table_and_goes_with_resume(tmp_path, tiny_llama, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    preset = tmp_path / "run.toml"
    preset.write_text(config_table(tiny(tmp_path, tiny_llama, federation__rounds=1)), encoding="utf-8")
    run(str(preset), profile=True)
    shown = capsys.readouterr().out
    assert "where the time went: round 1" in shown
    assert "adapters, backward" in shown
    assert TRACE in shown

    folder = tmp_path / "runs" / "tiny" / "one"
    run(None, ["federation.rounds=2"], resume=folder, profile=True)
    assert "where the time went: round 2" in capsys.readouterr().out
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    (folder / "result.json").write_text(json.dumps(result | {"status": "interrupted"}), encoding="utf-8")
    run(None, resume=folder, profile=True)
    assert "no profile: this run had no round to play" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("elsewhere", "says"),
    [({"engine": Engine.flower}, "--engine flower"), ({"server": "localhost:9092"}, "--server")],
    ids=["flower", "server"],
)
def test_it_refuses_what_computes_elsewhere(elsewhere, says):
    with pytest.raises(ConfigError, match=f"--profile measures this process, but with {says}"):
        run("quickstart", profile=True, **elsewhere)
