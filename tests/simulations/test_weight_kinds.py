"""Adapter kinds that need the frozen weights, and those with parts that stay on the clients: whole federations."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedlora.adapters import AdapterState, delta
from fedlora.adapters.kinds.registry import KINDS
from fedlora.clients.answering import together
from fedlora.clients.node import own_state
from fedlora.common.errors import ConfigError, ModelError, RunError, StrategyError
from fedlora.common.events import listen
from fedlora.config import parse
from fedlora.models import adapted, parts, peft_files
from fedlora.models.base.read import quiet
from fedlora.models.weights import weight_of
from fedlora.results.run_folder import folder_of
from fedlora.simulations.engines import flower
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.schedules import session
from fedlora.strategies.server import saved_state
from tests.device import bound
from tests.federation import run_locally, tiny

PERSONAL: dict[str, Any] = {"evaluate__clients": True, "data__client_test_fraction": 0.3}


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def of_kind(folder, model, kind: str, **keys: Any):
    common = {"lora__ranks": "", "lora__rank": 4, "strategy__name": "fedavg", "lora__kind": kind}
    return tiny(folder, model, **{**common, "train__lr": 2e-2, **keys})


def state_of(folder) -> AdapterState:
    key = json.loads((folder / "result.json").read_text(encoding="utf-8"))["key"]
    found = saved_state.load(folder / "state", key)
    assert found is not None
    return found[0].adapter


def plain(model_folder):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["lora-xs", "loldu"])
def test_the_saved_adapter_is_the_parts_between_what_the_weights_give(tmp_path, tiny_llama, kind, caplog):
    """On a server that evaluates nothing, and so would load no weights for another kind."""
    with caplog.at_level(logging.INFO, logger="fedlora"):
        folder, _ = run_locally(of_kind(tmp_path, tiny_llama, kind, evaluate__server=False))
    assert f"lora.kind = {kind}: the server loads the base's weights" in caplog.text
    base, tensors = plain(tiny_llama), state_of(folder).tensors
    found = peft_files.read_adapter(folder / "adapter").lora
    for name, factors in found.items():
        W = base.get_submodule(name).weight.detach().double()
        if kind == "lora-xs":
            u, s, vh = torch.linalg.svd(W)
            # whatever signs the vectors have here: U_r' dW V_r S_r^-1 has R's entries up to them
            inner = (u[:, :4].T @ delta(factors).double() @ vh[:4].T) / s[:4]
            part = tensors[f"{name}.loraxs_R"].double()
            torch.testing.assert_close(inner.abs(), part.abs(), rtol=1e-3, atol=1e-5)
        else:
            P, L, U = torch.linalg.lu(W)
            part = tensors[f"{name}.loldu_z"].double()
            expected = (P @ L)[:, :4] @ torch.diag(part) @ (U / U.diagonal()[:, None])[:4]
            torch.testing.assert_close(delta(factors).double(), expected, rtol=1e-3, atol=1e-5)
        assert bool(part.any())


def test_a_client_whose_weights_decompose_otherwise_refuses(tmp_path, tiny_llama, monkeypatch):
    def other(model, adapter):
        first, *rest = parts.probe(model, adapter)
        return (first + 0.5, *rest)

    monkeypatch.setattr(session, "parts", SimpleNamespace(factored=parts.factored, probe=other))
    with pytest.raises(RunError, match="the fixed tensors that loraxs makes of the base's weight are not the server's"):
        run_locally(of_kind(tmp_path, tiny_llama, "lora-xs"))


def test_a_probe_is_compared_number_by_number(tmp_path, tiny_llama):
    config = of_kind(tmp_path, tiny_llama, "loldu")
    model = adapted.adapted_model(config.model, config.lora)
    adapter = AdapterState(tensors={f"{name}.loldu_z": torch.zeros(4) for name in model.layers})
    numbers = parts.probe(model, adapter)
    assert len(numbers) == len(model.layers)
    parts.check_probe(model, adapter, [number + 1e-3 for number in numbers])
    with pytest.raises(ModelError, match=r"the same model.quantization"):
        parts.check_probe(model, adapter, [*numbers[:-1], numbers[-1] + 0.05])
    with pytest.raises(ModelError, match=f"0 numbers on the fixed tensors of loldu, expected {len(numbers)}"):
        parts.check_probe(model, adapter, ())


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"strategy__name": "flora"}, StrategyError, "lora.kind = lora-xs has no factors A and B"),
        ({"lora__ranks": "4,2", "strategy__name": "rblora"}, StrategyError, "lora.kind = lora-xs needs one rank"),
        (
            {"anchor__base_update": "merge"},
            StrategyError,
            "anchor.base-update = merge: lora.kind = lora-xs needs the base's own weights",
        ),
        (
            {"lora__rank": 24, "lora__target_modules": "q_proj,v_proj"},
            ConfigError,
            r"lora\.kind = lora-xs at rank 24: .*v_proj, 16 x 32, has only 16 singular",
        ),
        ({"lora__kind_options": "scale=0"}, ConfigError, "lora-xs's scale = 0"),
        (
            {"lora__kind": "dora", "evaluate__intruders": True},
            StrategyError,
            "evaluate.intruders: .*dora has no factors",
        ),
        (
            {"lora__kind": "mtl-lora"},
            StrategyError,
            "mtl-lora: mtllora_L and mtllora_w stays on the clients.*evaluate.cli",
        ),
        (
            {"lora__kind": "mtl-lora", "strategy__robust": "median", **PERSONAL},
            StrategyError,
            "leaves mtllora_L and mtllora_w on the clients; set strategy.robust = none",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path, tiny_llama, monkeypatch, keys, error, message):
    monkeypatch.setattr(adapted, "load_base", None)
    config = of_kind(tmp_path, tiny_llama, "lora-xs", **keys)

    def start() -> None:
        check_ranks(config)
        run_locally(config)

    with pytest.raises(error, match=message):
        start()


def test_fewer_clients_share_a_batch_where_each_needs_whole_matrices(tmp_path, tiny_llama):
    """GLoRA holds a product of the weight's size for each client; 8 bytes for each entry of q, v and down."""
    asked = {}
    for kind in ("glora", "dora"):
        config = of_kind(tmp_path, tiny_llama, kind)
        model = adapted.adapted_model(config.model, config.lora)
        asked[kind] = together.bytes_beside(model)
    entries = sum(weight_of(layer).numel() for layer in model.layers.values())
    assert asked == {"glora": 8 * entries, "dora": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["dora", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("lora-xs", "loldu"))]
)
def test_processes_of_their_own_make_the_same_of_the_weights(tmp_path, tiny_llama, kind):
    """On Flower's engine, where the server and the clients each decompose the quantized weights."""
    config = of_kind(tmp_path, tiny_llama, kind, model__quantization="nf4")
    _, here = run_locally(config)
    other = parse({"run.id": "two"}, config)
    flower.run(other)
    there = json.loads((folder_of(other) / "result.json").read_text(encoding="utf-8"))
    losses = [[entry["heldout"]["loss"] for entry in result["rounds"]] for result in (here, there)]
    assert losses[0] == pytest.approx(losses[1])


def test_intruders_are_counted_for_a_kind_with_factors(tmp_path, tiny_llama, command):
    folder, result = run_locally(of_kind(tmp_path, tiny_llama, "lora-xs", evaluate__intruders=True))
    counted = result["rounds"][-1]["intruders"]
    assert set(counted.values()) <= set(range(11))
    code, said, _ = command("export", folder, tmp_path / "out", "--remove-intruders", 1)
    assert code == 0
    assert f"intruder dimensions: {sum(counted.values())} before" in said


def test_dora_is_evaluated_and_merged_from_pefts_own_checkpoint(tmp_path, tiny_llama, command, fresh_process):
    folder, result = run_locally(of_kind(tmp_path, tiny_llama, "dora", train__steps=6))
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["use_dora"]
    ids = torch.tensor([[5, 17, 40, 99, 23]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(tiny_llama), str(folder / "adapter"))(input_ids=ids).logits
        bare = plain(tiny_llama)(input_ids=ids).logits
    code, said, _ = command("evaluate", "--adapter", folder)
    assert code == 0
    assert f"{result['rounds'][-1]['heldout']['loss']:.4f}" in said
    assert command("export", folder, tmp_path / "merged", "--merge")[0] == 0
    with torch.no_grad():
        merged = plain(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(merged, bare, atol=1e-3)
    assert command("export", folder, tmp_path / "same")[0] == 0
    code, _, refused = command("export", folder, tmp_path / "cut", "--rank", 1)
    assert code == 1
    assert "a DoRA adapter has no factors whose product is its update" in refused


def test_doras_magnitudes_begin_as_the_norms_of_the_rows(tmp_path, tiny_llama):
    config = of_kind(tmp_path, tiny_llama, "dora")
    model = adapted.adapted_model(config.model, config.lora)
    kind, tensors = model.kind, dict[str, torch.Tensor]()
    for name, layer in model.layers.items():
        place = replace(parts.place_of(name, layer), rank=4)
        first = kind.initial(place, torch.Generator().manual_seed(0))
        tensors |= {kind.key(name, part): value for part, value in first.items()}
    for name, tensor in parts.factored(model, AdapterState(tensors=tensors)).tensors.items():
        W = weight_of(model.layers[name.removesuffix(".lora_magnitude_vector")])
        torch.testing.assert_close(tensor, W.norm(dim=1).cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_once", ["1", "auto"])
@pytest.mark.parametrize("upload", ["fp32", "int8"])
def test_mtl_loras_own_parts_stay_on_the_clients(tmp_path, tiny_llama, command, fresh_process, at_once, upload):
    keys = {**PERSONAL, "train__clients_at_once": at_once, "wire__upload_dtype": upload, "train__steps": 6}
    received = []
    with listen(lambda kind, facts: received.append(facts) if kind == "client-done" else None):
        folder, result = run_locally(of_kind(tmp_path, tiny_llama, "mtl-lora", **keys))
    assert len(received) == 8
    losses = [entry["client-test"]["mean"]["loss"] for entry in result["rounds"]]
    assert losses[1] < losses[0]
    server = state_of(folder).tensors
    own = [
        own_state.load(own_state.folder_of(folder / "clients", result["key"], client), "personal", 99)
        for client in (0, 1)
    ]
    kind, module = (
        KINDS.load("mtl-lora"),
        next(name.removesuffix(".mtllora_A") for name in server if "mtllora_A" in name),
    )
    for part in ("L", "w"):
        mine, other = (state.tensors[f"{module}.mtllora_{part}"] for state in own)
        assert not torch.equal(mine, other)
        assert not torch.equal(mine, server[f"{module}.mtllora_{part}"])
    assert torch.equal(server[f"{module}.mtllora_L"], torch.eye(4))
    assert {name.rpartition("_")[2] for name in own[0].tensors} == {"L", "w"}
    shared = sum(t.numel() for name, t in server.items() if not name.endswith(("_L", "_w")))
    width = {"fp32": 4, "int8": 1}[upload]
    sent = result["rounds"][0]["upload-bytes"] / 4
    assert sent < 1.3 * shared * width + 12_000
    # a client's own model, as LoRA factors
    assert command("export", folder, tmp_path / "own", "--client", 1)[0] == 0
    found = delta(peft_files.read_adapter(tmp_path / "own").lora[module])
    mine = {part: server[f"{module}.mtllora_{part}"] for part in ("A", "B")}
    mine |= {part: own[1].tensors[f"{module}.mtllora_{part}"] for part in ("L", "w")}
    mixed = torch.einsum("i,iok->ok", torch.softmax(mine["w"] / 0.1, 0), mine["B"])
    torch.testing.assert_close(found, 2.0 * mixed @ mine["L"] @ mine["A"], rtol=1e-4, atol=1e-5)
    assert kind.personal == {"L", "w"}
    code, _, refused = command("evaluate", "--adapter", folder)
    assert code == 1
    assert "mtllora_L and mtllora_w stays on the clients" in refused


def test_mtl_lora_at_once_is_mtl_lora_alone(tmp_path, tiny_llama):
    """By SGD: AdamW makes steps of one size of w's small gradients, and of their rounding."""
    ends, keys = [], {**PERSONAL, "train__optimizer": "sgd", "train__lr": 0.5}
    for at_once in ("1", "auto"):
        config = of_kind(
            tmp_path, tiny_llama, "mtl-lora", run__id=f"r{at_once}", train__clients_at_once=at_once, **keys
        )
        folder, result = run_locally(config)
        own = own_state.load(own_state.folder_of(folder / "clients", result["key"], 2), "personal", 99)
        assert own is not None
        ends.append({**state_of(folder).tensors, **own.tensors})
    for name, alone in ends[0].items():
        assert float((ends[1][name] - alone).norm() / alone.norm()) <= bound(1e-4)
