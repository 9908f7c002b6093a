"""EVA: the federated components are those of all clients' inputs in one place, as PEFT's own PCA finds them."""

from __future__ import annotations

import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

from fedlora.adapters import AdapterState, initial
from fedlora.adapters.sketches import sketcher
from fedlora.clients.statistics.inputs import Inputs
from fedlora.common.errors import ConfigError, StrategyError
from fedlora.config import LoraConfig, TrainConfig
from fedlora.exchange import ClientInfo, ClientUpdate
from fedlora.models import adapted
from fedlora.strategies.configured import check_ranks
from fedlora.strategies.initializers.eva import Eva
from fedlora.strategies.server import saved_state
from tests.clients.statistics.test_gradients import examples
from tests.device import model_config
from tests.federation import run_locally, tiny

RANK = 4
TRAIN = TrainConfig(batch_size=3, steps=3)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def pooled_replies(tiny_llama, eva: Eva) -> tuple[AdapterState, list[ClientUpdate], dict[str, torch.Tensor]]:
    """LoRA's start, the answers of three clients of different size, and all their inputs by module."""
    model = adapted.adapted_model(model_config(tiny_llama), LoraConfig(target_modules="q_proj,v_proj,down_proj"))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in model.layers.items()}
    first = initial(shapes, lambda _: RANK, lambda _: 1.0, torch.Generator().manual_seed(0))
    sent = eva.ask(first, ClientInfo(client_id=0, rank=RANK))
    data, replies, rows = examples(9, 12), [], {name: [] for name in shapes}
    for client, part in enumerate((data[:2], data[2:5], data[5:])):
        adapted.install(model, adapted.untouched(model, sent.adapter.tensors))
        handles = [
            layer.register_forward_pre_hook(lambda _, given, name=name: rows[name].append(given[0].detach().cpu()))
            for name, layer in model.layers.items()
        ]
        with torch.no_grad():
            for example in part:  # one by one, so without padding
                model.task.losses(model.model.eval(), model.task.collate([example], model.base.pad_id))
        for handle in handles:
            handle.remove()
        answer, result = Inputs().measure(model, sent.adapter, part, TRAIN, seed=client)
        assert result.tokens == sum(len(example["input_ids"]) for example in part)
        assert {n: t.shape for n, t in answer.tensors.items()} == {n: t.shape for n, t in sent.adapter.tensors.items()}
        replies.append(ClientUpdate(client, answer, num_examples=len(part)))
    return first, replies, {name: torch.cat([x.flatten(0, -2) for x in parts]) for name, parts in rows.items()}


def cosines(A: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (A / A.norm(dim=1, keepdim=True) * others).sum(dim=1).abs()


def test_with_whole_covariances_it_is_the_pca_of_the_pooled_inputs(tiny_llama):
    first, replies, rows = pooled_replies(tiny_llama, Eva(width=10**6))
    start = Eva(width=10**6).start(first, replies)
    assert not start.folds
    for name, x in rows.items():
        theirs = IncrementalPCA(n_components=RANK, lowrank=False).fit(x)
        found = start.adapter.lora[name]
        assert float(cosines(found.A, theirs.components_).min()) > 0.99, name
        torch.testing.assert_close(found.A @ found.A.T, torch.eye(RANK), atol=1e-4, rtol=0)
        assert not found.B.any()
        uncentred = torch.linalg.svd(x, full_matrices=False)[2][:1]
        assert x.mean(dim=0).norm() < 1e-3 or float(cosines(uncentred, theirs.components_[:1])) < 0.9999


def test_a_sketch_keeps_nearly_the_best_variance(tiny_llama):
    first, replies, rows = pooled_replies(tiny_llama, Eva(width=16))
    start = Eva(width=16).start(first, replies)
    for name, x in rows.items():
        centred = (x - x.mean(dim=0)).double()
        best = float((torch.linalg.svdvals(centred)[:RANK] ** 2).sum())
        kept = float((centred @ start.adapter.lora[name].A.double().T).square().sum())
        assert kept > 0.9 * best, name
        random = float((centred @ torch.linalg.qr(first.lora[name].A.double().T)[0]).square().sum())
        assert kept > random


def test_a_constant_input_has_no_component(tiny_llama):
    first, replies, _ = pooled_replies(tiny_llama, Eva())
    still = [
        ClientUpdate(
            0, AdapterState(tensors={n: torch.zeros_like(t) for n, t in replies[0].adapter.tensors.items()}), 1
        )
    ]
    assert torch.equal(
        Eva().start(first, still).adapter.lora["model.layers.0.self_attn.q_proj"].A,
        first.lora["model.layers.0.self_attn.q_proj"].A,
    )


def test_whitened_rows_divide_by_the_deviation(tiny_llama):
    first, replies, _ = pooled_replies(tiny_llama, Eva())
    plain, white = (Eva(whiten=w).start(first, replies).adapter.lora for w in (False, True))
    for name, f in white.items():
        sizes = f.A.norm(dim=1)
        assert float(sizes[0]) == pytest.approx(1.0, abs=1e-4)
        assert bool((sizes[1:] >= sizes[:-1] - 1e-4).all())
        torch.testing.assert_close(f.A / sizes[:, None], plain[name].A, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("strategy", "quantization"), [("fedavg", "none"), ("flora", "nf4"), ("hetlora", "nf4")])
def test_a_federation_of_unequal_clients_starts_from_it(tmp_path, tiny_llama, strategy, quantization):
    keys = {"strategy__name": strategy, "model__quantization": quantization, "train__lr": 2e-2, "train__steps": 6}
    if strategy == "fedavg":
        keys |= {"lora__ranks": "", "lora__rank": 2}
    _, result = run_locally(tiny(tmp_path, tiny_llama, lora__init="eva", **keys))
    assert [entry["round"] for entry in result["rounds"]] == [0, 1, 2]
    assert not result["rounds"][0]["failures"]
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


def test_coarse_uploads_do_not_touch_what_was_measured(tmp_path, tiny_llama):
    """Sums of very different sizes stand beside each other; one scale for all of them would round most to zero."""
    keys = {"lora__init": "eva", "strategy__name": "fedavg", "lora__ranks": "", "lora__rank": 2, "run__keep": 3}
    starts = []
    for number_format in ("fp32", "int4"):
        config = tiny(tmp_path, tiny_llama, run__id=number_format, wire__upload_dtype=number_format, **keys)
        folder, result = run_locally(config)
        found = saved_state.load(folder / "state", result["key"], after=0)
        assert found is not None
        starts.append(found[0].adapter.lora)
    assert all(torch.equal(starts[0][name].A, starts[1][name].A) for name in starts[0])


def test_what_does_not_fit_is_refused_before_the_run(tmp_path, tiny_llama):
    with pytest.raises(StrategyError, match=r"lora\.init = eva starts LoRA's A and B, and lora\.kind = miss has none"):
        check_ranks(
            tiny(tmp_path, tiny_llama, lora__init="eva", lora__kind="miss", lora__ranks="", strategy__name="fedavg")
        )
    with pytest.raises(ConfigError, match="eva's width = -1"):
        Eva(width=-1)


def test_the_signs_of_a_sketch_are_the_same_everywhere():
    assert torch.equal(sketcher(3, 3), torch.eye(3))
    signs = sketcher(600, 64)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert float((signs.T @ signs / 600 - torch.eye(64)).abs().max()) < 0.2
