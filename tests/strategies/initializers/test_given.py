"""A run that starts from an adapter that is there."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from fedlora.adapters import delta
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import adapted, peft_files
from fedlora.simulations import checks
from fedlora.strategies.initializers.registry import INITIALIZERS
from fedlora.strategies.registry import NAMES, load
from tests.device import bound
from tests.federation import run_locally, tiny, write_labels


@pytest.fixture(scope="module")
def first(tmp_path_factory, tiny_llama):
    """The run whose adapter is given."""
    folder, result = run_locally(tiny(tmp_path_factory.mktemp("first"), tiny_llama, train__lr=2e-2))
    yield folder, result
    adapted.forget()


def starting_from(folder, tmp_path, tiny_llama, **keys):
    return tiny(tmp_path, tiny_llama, lora__init="given", lora__init_options=f"adapter={folder}", **keys)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["fedavg-zeropad", "flora", "lora-fair", "flexlora", "flexlora keep_tail=true"])
def test_untrained_it_is_the_given_adapters_model_and_nothing_else(first, tmp_path, tiny_llama, name, quantization):
    folder, _ = first
    config = starting_from(
        folder,
        tmp_path,
        tiny_llama,
        strategy__name=name.split()[0],
        strategy__options=" ".join(name.split()[1:]),
        train__lr=0.0,
        model__quantization=quantization,
    )
    again, result = run_locally(config)
    given, made = (peft_files.read_adapter(path / "adapter") for path in (folder, again))
    for module, factors in given.lora.items():
        torch.testing.assert_close(delta(made.lora[module]), delta(factors), rtol=bound(1e-4), atol=bound(1e-5))
    if quantization == "none":
        heldout = first[1]["rounds"][-1]["heldout"]["loss"]
        assert result["rounds"][0]["heldout"]["loss"] == pytest.approx(heldout, abs=1e-3)
        assert result["baseline"]["loss"] > heldout + 0.01  # round 0 of the record is the bare base


def test_training_goes_on_from_it_at_other_ranks(first, tmp_path, tiny_llama):
    folder, before = first
    _, result = run_locally(
        starting_from(folder, tmp_path, tiny_llama, lora__ranks="1,3", strategy__name="rblora", train__lr=2e-2)
    )
    assert result["rounds"][-1]["heldout"]["loss"] < before["rounds"][-1]["heldout"]["loss"]


@pytest.mark.parametrize("name", [n for n in NAMES if not load(n).starts_with and not load(n).personal])
def test_every_strategy_keeps_it(first, tmp_path, tiny_llama, name):
    equal = {} if load(name).unequal_ranks else {"lora__ranks": "2"}
    again, _ = run_locally(
        starting_from(
            first[0], tmp_path, tiny_llama, strategy__name=name, federation__rounds=3, train__lr=1e-7, **equal
        )
    )
    given, made = (peft_files.read_adapter(path / "adapter") for path in (first[0], again))
    for module, factors in given.lora.items():
        expected = delta(factors)
        assert float((delta(made.lora[module]) - expected).norm()) <= 0.05 * float(expected.norm())


def test_a_given_head_is_where_the_head_starts(tmp_path, tiny_bert):
    common = {
        "model__task": "classification",
        "data__partition": "iid",
        "lora__target_modules": "query,value",
        "data__source": str(write_labels(tmp_path / "labels.jsonl")),
    }
    folder, _ = run_locally(tiny(tmp_path, tiny_bert, train__lr=2e-2, **common))
    again, _ = run_locally(starting_from(folder, tmp_path, tiny_bert, run__id="two", train__lr=0.0, **common))
    one, other = (peft_files.read_adapter(path / "adapter").tensors for path in (folder, again))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor)
    wider = starting_from(folder, tmp_path, tiny_bert, run__id="three", model__labels=3, **common)
    with pytest.raises(AdapterError, match=r"has \w+\.\w+ of shape .* but this run trains"):
        checks.check(wider)


def test_what_does_not_fit_is_refused_before_the_run(first, tmp_path, tiny_llama):
    folder, _ = first
    with pytest.raises(ConfigError, match=r"lora\.init = given: the adapter to start from is missing"):
        INITIALIZERS.load("given")
    fewer = starting_from(folder, tmp_path, tiny_llama, lora__target_modules="q_proj,v_proj")
    with pytest.raises(AdapterError, match=r"down_proj of .* not adapted in this run; set model\.name and lora"):
        run_locally(fewer)
    with pytest.raises(AdapterError, match="no adapter here"):
        run_locally(starting_from(tmp_path / "nowhere", tmp_path, tiny_llama))
    other = tmp_path / "adapter"
    peft_files.save_checkpoint(
        peft_files.read_adapter(folder / "adapter"), other, fewer.model, {"base": "another", "config": {}}
    )
    with pytest.raises(AdapterError, match=r"was trained on base another, but the base model of this run is"):
        run_locally(starting_from(other, tmp_path, tiny_llama))
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_does_not_need_it_any_more(first, tmp_path, tiny_llama):
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(first[0] / "adapter", copied)
    whole = starting_from(copied, tmp_path, tiny_llama, federation__rounds=2)
    again, result = run_locally(whole)
    shutil.rmtree(copied)
    longer = replace(whole, run=replace(whole.run, resume=True), federation=replace(whole.federation, rounds=3))
    run_locally(longer)
    after = json.loads((again / "result.json").read_text())
    assert after["rounds"][:2] == result["rounds"]
    assert len(after["rounds"]) == 3
