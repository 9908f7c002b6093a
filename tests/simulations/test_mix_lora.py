"""A federation of MixLoRA adapters, which have no factors: what is saved, read, and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.adapters.kinds.registry import KINDS
from fedlora.common.errors import AdapterError, StrategyError
from fedlora.models import adapted, peft_files
from fedlora.simulations.run import Result
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.server import saved_state
from tests.device import bound
from tests.federation import run_locally, tiny, write_labels


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def mixed(folder, model, **keys: Any):
    common = {
        "lora__ranks": "",
        "lora__rank": 2,
        "strategy__name": "fedavg",
        "lora__kind": "mixlora",
        "lora__kind_options": "experts=4, balance=0.01",
    }
    return tiny(folder, model, **{**common, "train__lr": 2e-2, **keys})


def test_a_run_is_saved_as_its_parts_and_evaluated_from_them(tmp_path, tiny_llama, command, fresh_process):
    folder, result = run_locally(mixed(tmp_path, tiny_llama, train__steps=6))
    losses = [entry["heldout"]["loss"] for entry in result["rounds"]]
    assert losses[1] < losses[0]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    key = json.loads((folder / "result.json").read_text(encoding="utf-8"))["key"]
    state = saved_state.load(folder / "state", key)
    assert state is not None
    assert saved.keys() == state[0].adapter.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state[0].adapter.tensors.items())
    assert {name.rpartition("_")[2] for name in saved} == {"A", "B", "R", "N"}
    shares = [tensor for name, tensor in saved.items() if name.endswith("_N")]
    for of_layer in shares:
        assert of_layer.shape == (4, 1)
        assert float(of_layer.sum()) == pytest.approx(1, abs=1e-6)
    assert all(bool(tensor.any()) for tensor in saved.values())
    adapted.forget()
    code, said, _ = command("evaluate", "--adapter", folder)
    assert code == 0
    assert f"{losses[-1]:.4f}" in said
    assert "untouched base" in said
    assert command("report", folder)[0] == 0


def test_a_runs_result_evaluates_its_parts_on_other_rows(tmp_path, tiny_llama):
    config = mixed(tmp_path, tiny_llama)
    folder, result = run_locally(config)
    made = Result(folder, result["rounds"], config)
    rows = [{"prompt": "ash", "response": "0 ash", "person": "p0"}]
    trained, other = made.adapter, mixed(tmp_path, tiny_llama, run__id="two", train__steps=9)
    assert not trained.lora
    folder, result = run_locally(other)
    assert made.evaluate(rows)["loss"] != Result(folder, result["rounds"], other).evaluate(rows)["loss"]


def test_what_needs_factors_is_refused_in_a_sentence(tmp_path, tiny_llama, command, fresh_process):
    folder, _ = run_locally(mixed(tmp_path, tiny_llama))
    plain, _ = run_locally(tiny(tmp_path, tiny_llama, run__id="plain"))
    refused = "what lora.kind = mixlora adds to a layer is no fixed matrix, so that the adapter has no LoRA factors"
    calls = [
        ("export", folder, tmp_path / "out"),
        ("export", folder, tmp_path / "out", "--merge"),
        ("evaluate", "--adapter", folder, "--lm-eval", "x"),
    ]
    for words in calls:
        code, _, said = command(*words)
        assert code == 1, words
        assert refused in " ".join(said.split()), words
        assert not (tmp_path / "out").exists()
    with pytest.raises(AdapterError, match=refused):  # as all other commands read adapters
        peft_files.read_adapter(folder / "adapter")
    code, _, said = command("evaluate", "--adapter", folder, "--adapter", plain)
    assert code == 1
    assert "cannot be evaluated in one pass; evaluate each by itself" in " ".join(said.split())
    start = tiny(tmp_path, tiny_llama, run__id="next", lora__init="given", lora__init_options=f"adapter={folder}")
    with pytest.raises(AdapterError, match="no fixed matrix"):
        run_locally(start)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy__name": "flora"}, "lora.kind = mixlora has no factors A and B"),
        ({"evaluate__intruders": True}, "evaluate.intruders: .*mixlora has no factors"),
        ({"train__accumulate": 2}, "train.accumulate = 2: lora.kind = mixlora adds its own term .*balance=0"),
        ({"lora__ranks": "4,2", "strategy__name": "rblora"}, "lora.kind = mixlora needs one rank"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, tiny_llama, monkeypatch, keys, message):
    monkeypatch.setattr(adapted, "load_base", None)
    config = mixed(tmp_path, tiny_llama, **keys)
    with pytest.raises(StrategyError, match=message):
        check_ranks(config)


def test_passes_are_added_up_where_there_is_no_term(tmp_path, tiny_llama):
    check_ranks(mixed(tmp_path, tiny_llama, train__accumulate=2, lora__kind_options="balance=0"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_clients_at_once_are_each_of_them_alone(tmp_path, tiny_llama, quantization, sizes):
    """By SGD, on rows of unequal lengths, with a term that is as large as the loss."""
    ends: list[dict[str, torch.Tensor]] = []
    for at_once in ("1", "auto"):
        config = mixed(
            tmp_path,
            tiny_llama,
            run__id=f"r{at_once}",
            train__clients_at_once=at_once,
            train__optimizer="sgd",
            train__lr=0.5,
            lora__kind_options="experts=4, balance=0.5",
            model__quantization=quantization,
        )
        folder, _ = run_locally(config)
        ends.append(dict(peft_files.read_parts(folder / "adapter").tensors))
    assert sizes == [4, 4]
    for name, alone in ends[0].items():
        assert float((ends[1][name] - alone).norm() / alone.norm()) <= bound(1e-4)


def test_the_term_reaches_the_routers_of_a_run(tmp_path, tiny_llama):
    """Also through gradient checkpointing, which runs each layer twice: it is counted once."""
    ends: list[dict[str, torch.Tensor]] = []
    for number, (options, checkpointing) in enumerate(
        [("experts=4, balance=0", False), ("experts=4, balance=0.5", False), ("experts=4, balance=0.5", True)]
    ):
        keys = {"lora__kind_options": options, "model__gradient_checkpointing": checkpointing}
        config = mixed(tmp_path, tiny_llama, run__id=f"r{number}", train__optimizer="sgd", train__lr=0.5, **keys)
        folder, _ = run_locally(config)
        ends.append(dict(peft_files.read_parts(folder / "adapter").tensors))
    for name, plain in ends[1].items():
        torch.testing.assert_close(ends[2][name], plain, rtol=1e-3, atol=1e-5)
        if name.endswith("_R"):
            assert not torch.allclose(ends[0][name], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("upload", ["bf16", "int8"])
def test_coarse_uploads_and_a_head_beside_the_parts(tmp_path, tiny_llama, command, fresh_process, upload):
    config = mixed(
        tmp_path,
        tiny_llama,
        model__task="classification",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition_by="domain",
        federation__clients=2,
        train__steps=8,
        wire__upload_dtype=upload,
    )
    folder, result = run_locally(config)
    found = peft_files.read_parts(folder / "adapter").tensors
    heads = [name for name in found if "mixlora" not in name]
    assert heads
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items() if "q_proj" in name}
    assert sorted(map(len, shapes.values())) == sorted([3, 3, 2, 2] * (len(shapes) // 4))
    code, said, _ = command("evaluate", "--adapter", folder)
    assert code == 0
    assert f"{result['rounds'][-1]['heldout']['accuracy']:.4f}"[:5] in said


def test_kinds_with_a_matrix_are_all_others():
    assert [name for name in KINDS.names if not KINDS.load(name).matrix] == ["mixlora", "fedalt"]
