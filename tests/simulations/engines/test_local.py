"""Whole federations in one process, on tiny models."""

import json

import pytest
import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from peft import PeftModel

from fedlora.adapters import delta
from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import RunError, StrategyError
from fedlora.common.events import listen
from fedlora.config import parse
from fedlora.data import encode, prepare
from fedlora.exchange import wire
from fedlora.models import adapted, load_base
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.configured import configured
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.predict import evaluate
from tests.device import bound, on_device, run_bound
from tests.federation import run_locally, tiny, write_labels, write_rows
from tests.tiny import save_llama


@pytest.fixture(autouse=True)
def _fresh_process():
    yield
    adapted.forget()
    held_folds._held.clear()


def saved_adapter(folder):
    """The checkpoint as dense updates by module."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }


def apart(left, right) -> float:
    """Largest relative distance between two runs' updates."""
    assert left.keys() == right.keys()
    return max(float((left[n] - right[n]).norm() / left[n].norm()) for n in left)


@pytest.mark.parametrize(
    ("strategy", "ranks", "rounds"), [("flora", "4,2,2,1", 4), ("lora-fair", "4,2,2,1", 4), ("fedavg", "4", 4)]
)
def test_what_is_learned_lowers_the_loss_and_peft_loads_it(tmp_path, tiny_llama, strategy, ranks, rounds):
    config = tiny(
        tmp_path, tiny_llama, strategy__name=strategy, lora__ranks=ranks, federation__rounds=rounds, train__steps=6
    )
    folder, result = run_locally(config)
    losses = [result["baseline"]["loss"]] + [entry["heldout"]["loss"] for entry in result["rounds"]]
    assert losses[-1] < losses[0] - 0.1
    assert result["status"] == "completed"
    errors = [entry["aggregation-error"] for entry in result["rounds"]]
    assert max(errors) < 1e-5 if strategy == "flora" else max(errors) > 1e-3

    base = load_base(config.model)
    model = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
    examples = encode(prepare(config).heldout, base.tokenizer, config.data, CausalLM())
    assert evaluate(CausalLM(), model, examples, 16, base.pad_id)["loss"] == pytest.approx(losses[-1], rel=bound(1e-5))


def test_the_checkpoint_gives_the_logits_of_the_global_model(tmp_path, tiny_llama):
    """The global model of a quantized federation: the base, the folds and the adapter side by side."""
    config = tiny(tmp_path, tiny_llama, model__quantization="nf4", lora__target_modules="q_proj,v_proj")
    states = []
    from fedlora.strategies.schedules import session

    aggregate = session.Session._aggregate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Session, "_aggregate", lambda *args: states.append(aggregate(*args)) or states[-1])
        folder, _ = run_locally(config)
    bench = adapted.adapted_model(config.model, config.lora)
    ids = on_device(torch.arange(40).reshape(2, 20) + 20)
    bench.model.eval()
    adapted.install(bench, configured(config).global_adapter(states[-1]))
    adapted.install_anchor(bench, ())
    with torch.no_grad():
        stacked = bench.model(input_ids=ids).logits
        adapted.install(bench, states[-1].adapter)
        adapted.install_anchor(bench, states[-1].folds.parts)
        anchored = bench.model(input_ids=ids).logits
        adapted.forget()
        loaded = PeftModel.from_pretrained(load_base(config.model).model, str(folder / "adapter"))
        restored = loaded(input_ids=ids).logits
    torch.testing.assert_close(stacked, anchored, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restored, anchored, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama)
    one, _ = run_locally(config)
    two, _ = run_locally(parse({"run.id": "two"}, config))
    other, _ = run_locally(parse({"run.id": "three", "run.seed": 1}, config))
    assert apart(saved_adapter(one), saved_adapter(two)) <= run_bound(0.0)
    assert apart(saved_adapter(one), saved_adapter(other)) > run_bound(0.01)


def test_the_result_says_what_was_done(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, evaluate__clients=True, data__client_test_fraction=0.3)
    folder, result = run_locally(config)
    assert parse(result["config"]) == config
    assert [client["rank"] for client in result["clients"]] == [4, 2, 2, 1]
    assert result["versions"]["torch"].startswith("2.")
    assert result["peak-memory-bytes"]["process"] > 1e7
    assert len(result["base"]) >= 12
    for number, entry in enumerate(result["rounds"], start=1):
        assert entry["round"] == number
        assert set(entry["clients"]) == {"0", "1", "2", "3"}
        assert entry["failures"] == {}
        assert entry["upload-bytes"] > 0
        assert set(entry["client-test"]["clients"]) == {"0", "1", "2", "3"}
        assert entry["client-test"]["mean"]["loss"] > 0
        assert entry["seconds"]["round"] >= entry["seconds"]["clients"]
        assert all(answer["train-steps"] == 3 for answer in entry["clients"].values())
    assert any((folder / "tensorboard").iterdir())
    assert json.loads((folder / "adapter" / "fedlora.json").read_text())["base"] == result["base"]


def test_bytes_count_what_was_sent(tmp_path, tiny_llama):
    """6 modules: q (32->32), v (32->16), down (64->32), twice; ranks 4,2,2,1 in fp32, headers apart."""
    _, result = run_locally(tiny(tmp_path, tiny_llama))
    values = 2 * ((32 + 32) + (32 + 16) + (64 + 32)) * 9
    headers = range(4 * 6 * 2 * 50, 4 * 6 * 2 * 128)
    assert result["rounds"][0]["upload-bytes"] - 4 * values in headers
    _, narrow = run_locally(tiny(tmp_path, tiny_llama, wire__upload_dtype="bf16", run__id="two"))
    assert narrow["rounds"][0]["upload-bytes"] - 2 * values in headers
    assert narrow["rounds"][0]["download-bytes"] - 4 * values in headers


def test_clients_that_skip_rounds_change_nothing_but_who_trains(tmp_path, tiny_llama):
    """With half of the clients sampled, a resident client gets what it lacks; one that holds nothing, all anew."""
    config = tiny(tmp_path, tiny_llama, federation__fraction=0.5, federation__rounds=4)
    resident, result = run_locally(config)
    assert [len(entry["clients"]) for entry in result["rounds"]] == [2, 2, 2, 2]
    held_folds._held.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_folds, "_VERSIONS_KEPT", 0)  # forgets at once: the server has to send everything again
        forgetful, again = run_locally(parse({"run.id": "two"}, config))
    assert apart(saved_adapter(resident), saved_adapter(forgetful)) <= run_bound(0.0)
    assert all(not entry["failures"] for entry in again["rounds"])
    assert sum(e["download-bytes"] for e in again["rounds"]) > sum(e["download-bytes"] for e in result["rounds"])


def test_merging_into_the_base_is_the_same_federation(tmp_path, tiny_llama):
    anchored, one = run_locally(tiny(tmp_path, tiny_llama, federation__rounds=3))
    merged, two = run_locally(
        tiny(tmp_path, tiny_llama, federation__rounds=3, anchor__base_update="merge", run__id="two")
    )
    assert apart(saved_adapter(anchored), saved_adapter(merged)) < run_bound(1e-3)
    for left, right in zip(one["rounds"], two["rounds"], strict=True):
        assert left["heldout"]["loss"] == pytest.approx(right["heldout"]["loss"], rel=1e-4)


def test_a_classifier_learns_its_head_beside_the_adapters(tmp_path, tiny_bert):
    rows = write_labels(tmp_path / "labels.jsonl")
    config = tiny(
        tmp_path,
        tiny_bert,
        model__task="classification",
        lora__ranks="2",
        lora__target_modules="query,value",
        data__source=str(rows),
        data__partition_by="domain",
        federation__clients=2,
        federation__rounds=3,
        strategy__name="fedavg",
        train__steps=20,
        train__batch_size=8,
        train__lr=2e-2,
    )
    _, result = run_locally(config)
    assert result["rounds"][-1]["heldout"]["accuracy"] > 0.9


def other_base(*odd: int) -> ClientApp:
    """The product's client, but some clients have another base model."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in odd and message.metadata.message_type == "train":
            message.content["head"]["base"] = "another"
        return client_app(message, context)

    for kind in (app.query, app.train, app.evaluate):
        kind()(answer)
    return app


def test_a_client_on_another_base_is_refused_by_name_and_the_rest_go_on(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__min_clients=3)
    told = []
    with listen(lambda kind, facts: told.append((kind, facts))):
        simulation.in_process(config, client_app=other_base(2))
    result = json.loads((folder_of(config) / "result.json").read_text())
    for entry in result["rounds"]:
        assert set(entry["clients"]) == {"0", "1", "3"}
        assert "client 2 refused: the server has base model 'another'" in entry["failures"]["2"]
    assert [facts["client_id"] for kind, facts in told if kind == "client-failed"] == [2, 2]


def test_too_few_answers_fail_the_run_and_keep_its_record(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__min_clients=3)
    with pytest.raises(RunError, match=r"round 1: 2 of 4 clients answered, and federation.min-clients = 3: client 1"):
        simulation.in_process(config, client_app=other_base(1, 2))
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert result["status"] == "failed"
    assert "2 of 4 clients answered" in result["error"]


def crashing(partition: int, when: str) -> ClientApp:
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == partition and message.metadata.message_type == when:
            raise MemoryError("no room")
        return client_app(message, context)

    for kind in (app.query, app.train, app.evaluate):
        kind()(answer)
    return app


def test_a_client_that_crashes_fails_alone(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama)
    simulation.in_process(config, client_app=crashing(0, "train"))
    entry = json.loads((folder_of(config) / "result.json").read_text())["rounds"][0]
    assert entry["failures"] == {"0": "client 0 failed: MemoryError: no room"}
    assert set(entry["clients"]) == {"1", "2", "3"}


def test_an_update_with_a_strange_value_counts_as_failed(tmp_path, tiny_llama):
    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if context.node_config["partition-id"] == 1:
            reply.content["metrics"]["train-loss"] = float("nan")
        return reply

    app = ClientApp()
    app.query()(client_app)
    app.train()(answer)
    config = tiny(tmp_path, tiny_llama)
    simulation.in_process(config, client_app=app)
    entry = json.loads((folder_of(config) / "result.json").read_text())["rounds"][0]
    assert "metric 'train-loss' is nan" in entry["failures"]["1"]


def test_nobody_home_is_a_clear_failure(tmp_path, tiny_llama):
    app = ClientApp()
    app.query()(lambda message, context: Message(Error(wire.REFUSED, "closed"), reply_to=message))
    with pytest.raises(RunError, match=r"0 of 4 clients can take part.*the first said: node 2 refused: closed"):
        simulation.in_process(tiny(tmp_path, tiny_llama), client_app=app)


def test_fedavg_refuses_unequal_ranks_before_anything_is_trained(tmp_path, tiny_llama):
    trained = []
    with listen(lambda kind, facts: trained.append(kind)), pytest.raises(StrategyError, match="flora"):
        run_locally(tiny(tmp_path, tiny_llama, strategy__name="fedavg"))
    assert "client-start" not in trained


def test_an_interrupted_run_leaves_a_valid_result(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__rounds=3)

    def interrupt(kind, facts):
        if kind == "client-step" and facts["round"] == 2 and facts["client_id"] == 1:
            raise KeyboardInterrupt

    with listen(interrupt), pytest.raises(KeyboardInterrupt):
        simulation.in_process(config)
    folder = folder_of(config)
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert len(result["rounds"]) == 1
    adapted.forget()
    base = load_base(config.model)
    model = PeftModel.from_pretrained(base.model, str(folder / "adapter"))
    examples = encode(prepare(config).heldout, base.tokenizer, config.data, CausalLM())
    got = evaluate(CausalLM(), model, examples, 16, base.pad_id)["loss"]
    assert got == pytest.approx(result["rounds"][0]["heldout"]["loss"], rel=bound(1e-5))


def test_a_folder_is_never_written_over(tmp_path, tiny_llama):
    config = tiny(tmp_path, tiny_llama, federation__rounds=1)
    simulation.in_process(config)
    with pytest.raises(RunError, match="exists already"):
        simulation.in_process(config)


def test_a_nodes_own_config_decides_its_rank_and_its_data(tmp_path, tiny_llama):
    """As in a deployment: no partition of a shared set, but a file of its own."""
    config = tiny(tmp_path, tiny_llama, federation__clients=2, federation__rounds=1)
    own = write_rows(tmp_path / "own.jsonl", people=1, rows=21)
    run_config = config.to_flat()
    nodes = [{"partition-id": 0, "rank": 3, "data": str(own)}, {"partition-id": 1, "rank": 1}]
    from flwr.app import RecordDict

    from fedlora.strategies.server_app import app as server_app

    grid = local.LocalGrid(client_app, nodes, run_config, run_id=5)
    server_app(grid, Context(5, 1, {}, RecordDict(), run_config))
    clients = json.loads((folder_of(config) / "result.json").read_text())["clients"]
    assert [(c["rank"], c["num-examples"]) for c in clients] == [(3, 21), (1, 13)]


def test_a_pattern_gives_some_modules_their_own_rank(tmp_path, tiny_llama):
    folder, _ = run_locally(tiny(tmp_path, tiny_llama, lora__rank_pattern="v_proj=1", federation__rounds=1))
    ranks = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    pattern = ranks["rank_pattern"]
    # one fold: rank 4+2+2+1 at q and down, 1+1+1+1 at v
    assert ranks["r"] == 9
    assert {pattern[name] for name in pattern if "v_proj" in name} == {4}


def test_another_model_of_the_same_shape_has_another_fingerprint(tmp_path, tiny_llama):
    _, one = run_locally(tiny(tmp_path, tiny_llama, federation__rounds=1))
    (tmp_path / "b").mkdir()
    _, two = run_locally(tiny(tmp_path / "b", save_llama(tmp_path / "other", seed=1), federation__rounds=1))
    assert one["base"] != two["base"]


@pytest.mark.parametrize("rslora", [False, True])
def test_one_alpha_over_unequal_ranks_keeps_every_clients_own_scale(tmp_path, tiny_llama, rslora):
    """Scales 16/r or 16/sqrt(r) differ between clients; the aggregate is exact only if each is taken as it is."""
    config = tiny(tmp_path, tiny_llama, lora__alpha="16", lora__rslora=rslora, federation__rounds=2)
    _, result = run_locally(config)
    assert max(entry["aggregation-error"] for entry in result["rounds"]) < 1e-5
    assert result["rounds"][-1]["heldout"]["loss"] < result["baseline"]["loss"]


def test_one_client_under_flora_is_plain_fine_tuning(tmp_path, tiny_llama):
    """One round of one client: what is saved is exactly the update that the client made."""
    config = tiny(tmp_path, tiny_llama, federation__clients=1, federation__rounds=1, lora__ranks="3")
    kept = []
    from fedlora.strategies.schedules import session

    diagnose = session.diagnose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "diagnose", lambda a, b, got, sent: kept.extend(got) or diagnose(a, b, got, sent))
        folder, _ = run_locally(config)
    saved = saved_adapter(folder)
    for name, factors in kept[0].adapter.lora.items():
        torch.testing.assert_close(saved[f"base_model.model.{name}"], delta(factors), rtol=1e-4, atol=1e-6)
