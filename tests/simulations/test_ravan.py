"""Federations in which clients of smaller ranks train some of RAVAN's heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.adapters import AdapterState
from fedlora.models import adapted
from fedlora.models.functional import Functional
from fedlora.models.injection import ADAPTER
from fedlora.models.stacked import stacked
from fedlora.strategies.wrappers import some_groups
from tests.device import bound
from tests.federation import run_locally, tiny


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def of_ravan(folder, model, **keys: Any):
    common = {"lora__kind": "ravan", "lora__ranks": "4,4,2,1", "strategy__name": "fedavg"}
    return tiny(folder, model, **{**common, "train__optimizer": "sgd", "train__lr": 0.5, **keys})


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_unequal_clients_learn_at_once_what_they_learn_alone(tmp_path, tiny_llama, quantization, sizes):
    """The two that train all heads share a batch, and the two others are alone in theirs, with other heads."""
    ends: list[dict[str, torch.Tensor]] = []
    for at_once in ("1", "auto"):
        config = of_ravan(
            tmp_path,
            tiny_llama,
            run__id=f"r{at_once}",
            train__clients_at_once=at_once,
            model__quantization=quantization,
        )
        folder, result = run_locally(config)
        assert [len(entry["clients"]) for entry in result["rounds"]] == [4, 4]
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"] - 0.01
        ends.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
    assert sizes == [2, 2]
    for name, alone in ends[0].items():
        assert float((ends[1][name] - alone).norm() / alone.norm()) <= bound(1e-4)


def test_smaller_clients_upload_less_also_coarsely_and_with_a_servers_optimizer(tmp_path, tiny_llama):
    keys = {"federation__rounds": 3, "wire__upload_dtype": "int8", "strategy__server_optimizer": "momentum"}
    sizes = []
    for name, ranks in (("equal", "4"), ("unequal", "4,1,1,1")):
        config = of_ravan(tmp_path, tiny_llama, run__id=name, lora__ranks=ranks, **keys)
        _, result = run_locally(config)
        sizes.append(result["rounds"][-1]["upload-bytes"])
        assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]
    assert sizes[1] < 0.7 * sizes[0]


def test_heads_that_are_frozen_get_no_gradient_alone_and_in_a_batch(tmp_path, tiny_llama):
    config = of_ravan(tmp_path, tiny_llama)
    model = adapted.adapted_model(config.model, config.lora)
    places = [adapted.place_of(name, layer) for name, layer in model.layers.items()]
    g = torch.Generator().manual_seed(0)
    start = AdapterState(
        tensors={model.kind.key(p.module, n): t for p in places for n, t in model.kind.initial(p, g).items()}
    )
    frozen = {f"ravan_{part}" for part in ("H0", "s0", "H3", "s3")}
    ids = torch.ones(2, 3, dtype=torch.long, device=model.base.device)
    trained = adapted.install(model, start, "AB", frozen=frozen)
    assert len(trained.parameters) == 4 * len(places)
    model.model(input_ids=ids).logits.square().sum().backward()
    for layer in model.layers.values():
        one = layer.lora_A[ADAPTER]
        assert isinstance(one, Functional)
        assert {part for part, value in one.parts.items() if value.grad is not None} == {"H1", "H2", "s1", "s2"}
    with stacked(model, [start, start], frozenset("AB"), frozen=frozen) as stack:
        assert [len(slot.parameters) for slot in stack.slots] == [4 * len(places)] * 2


def test_a_client_refuses_more_heads_than_it_affords(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(some_groups, "chosen", lambda seed, number, client, counts: [*range(counts[0])])
    _, result = run_locally(of_ravan(tmp_path, tiny_llama, federation__rounds=1, train__steps=1))
    failures = result["rounds"][0]["failures"]
    assert sorted(failures) == ["2", "3"]
    assert "has rank 4, expected 1" in failures["3"]
