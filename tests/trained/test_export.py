"""What is exported, against the run's own adapter on the same base."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlora.adapters import AdapterState, LoraFactors, delta
from fedlora.clients.node import own_state
from fedlora.common.errors import AdapterError, ModelError
from fedlora.deployment.flower_programs import config_table
from fedlora.exchange import ClientInfo
from fedlora.models import adapted as adapted_models
from fedlora.models import load_base, peft_files
from fedlora.models.base.read import quiet
from fedlora.strategies.server import saved_state
from fedlora.trained import export, model_card
from fedlora.trained.model_card import citation
from tests.device import bound, model_config
from tests.federation import run_locally, tiny, write_labels
from tests.tiny import save_gpt2

IDS = torch.tensor([[5, 17, 40, 99, 23]])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llama):
    folder, _ = run_locally(tiny(tmp_path_factory.mktemp("run"), tiny_llama, strategy__name="flora"))
    yield folder
    adapted_models.forget()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.cpu()


def plain(model_folder):
    with quiet():
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def adapted(model_folder, checkpoint_folder) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(plain(model_folder), str(checkpoint_folder)))


def test_a_plain_export_is_the_run_s_adapter(run, tmp_path, tiny_llama, command):
    code, said, _ = command("export", run, tmp_path / "out")
    assert code == 0
    assert "relative error" in said
    assert torch.allclose(adapted(tiny_llama, tmp_path / "out"), adapted(tiny_llama, run / "adapter"), atol=1e-5)
    about = json.loads((tmp_path / "out" / "fedlora.json").read_text())
    assert about["export"]["relative-error"] < 1e-6
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_lower_rank_is_the_best_approximation_and_says_its_error(run, tmp_path, tiny_llama, command):
    assert command("export", run / "adapter", tmp_path / "two", "--rank", 2)[0] == 0
    whole, two = (peft_files.read_adapter(folder) for folder in (run / "adapter", tmp_path / "two"))
    missed = total = 0.0
    for name, factors in whole.lora.items():
        u, s, vh = torch.linalg.svd(delta(factors).double(), full_matrices=False)
        best = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
        assert torch.allclose(delta(two.lora[name]).double(), best, atol=1e-6)
        missed, total = missed + float((s[2:] ** 2).sum()), total + float((s**2).sum())
    expected = (missed / total) ** 0.5
    about = json.loads((tmp_path / "two" / "fedlora.json").read_text())["export"]
    assert about["relative-error"] == pytest.approx(expected, rel=1e-4)
    assert f"{expected:.3g}" in (tmp_path / "two" / "README.md").read_text()
    assert command("export", run, tmp_path / "many", "--rank", 64)[0] == 0
    many, before = adapted(tiny_llama, tmp_path / "many"), adapted(tiny_llama, run / "adapter")
    assert torch.allclose(many, before, atol=1e-5)


@pytest.fixture
def strong(run, tmp_path):
    """The run's checkpoint with a much larger update, which has intruder dimensions."""
    folder = tmp_path / "strong"
    shutil.copytree(run / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: 200 * t if "lora_B" in n else t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("extra", [[], ["--rank", "3"], ["--merge"]])
def test_intruders_are_removed_before_the_rank_is_cut(strong, tmp_path, command, extra):
    """Against the dense formula dW - sum_i s_i u_i v_i' over the intruders of W + dW."""
    before, expected = 0, {}
    config = export.find(strong).config.model
    weights = {name: p.detach().cpu() for name, p in load_base(config).model.named_parameters()}
    for name, factors in peft_files.read_adapter(strong).lora.items():
        weight, update = weights[f"{name}.weight"].double(), delta(factors).double()
        left = torch.linalg.svd(weight, full_matrices=False)[0]
        u, s, vh = torch.linalg.svd(weight + update, full_matrices=False)
        odd = (left.T @ u[:, :10]).abs().amax(dim=0) < 0.5
        before += int(odd.sum())
        expected[name] = update - (u[:, :10][:, odd] * s[:10][odd]) @ vh[:10][odd]
    assert before > 0
    code, said, _ = command("export", strong, tmp_path / "out", "--remove-intruders", 0, *extra)
    assert code == 0
    about = json.loads((tmp_path / "out" / "fedlora.json").read_text())["export"]["intruders"]
    assert (about["lambda"], about["before"]) == (0, before)
    assert f"intruder dimensions: {before} before, {about['after']} after" in said
    assert f"{before} before, {about['after']} after" in (tmp_path / "out" / "README.md").read_text()
    if extra == ["--merge"]:
        merged = dict(plain(tmp_path / "out").named_parameters())
        found = {name: (merged[f"{name}.weight"] - weights[f"{name}.weight"]).detach().double() for name in expected}
    else:
        found = {name: delta(f).double() for name, f in peft_files.read_adapter(tmp_path / "out").lora.items()}
    for name, update in expected.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        kept = 3 if "--rank" in extra else len(s)
        assert torch.allclose(found[name], (u[:, :kept] * s[:kept]) @ vh[:kept], atol=1e-5)


def test_lambda_1_changes_nothing(strong, tmp_path, tiny_llama, command):
    assert command("export", strong, tmp_path / "out", "--remove-intruders", 1)[0] == 0
    about = json.loads((tmp_path / "out" / "fedlora.json").read_text())["export"]
    assert about["intruders"]["before"] == about["intruders"]["after"] > 0
    assert torch.allclose(adapted(tiny_llama, tmp_path / "out"), adapted(tiny_llama, strong), atol=1e-5)


def test_a_client_s_export_has_its_rank(run, tmp_path, command):
    assert command("export", run, tmp_path / "all", "--all-clients")[0] == 0
    whole = peft_files.read_adapter(run / "adapter")
    for client, rank in enumerate((4, 2, 2, 1)):
        found = peft_files.read_adapter(tmp_path / "all" / f"client-{client}")
        expected = export.for_client(whole, ClientInfo(client_id=client, rank=rank))
        for name, factors in found.lora.items():
            assert factors.rank <= rank
            assert torch.allclose(delta(factors), delta(expected.lora[name]), atol=1e-6)
    code, _, refused = command("export", run, tmp_path / "none", "--client", 9)
    assert code == 1
    assert "--client 9: this run has the clients 0, 1, 2, 3" in refused


def test_a_personal_export_has_the_client_s_own_factors(tmp_path, tiny_llama, command, fresh_process):
    folder, _ = run_locally(
        tiny(tmp_path, tiny_llama, strategy__name="fedsa", evaluate__clients=True, data__client_test_fraction=0.3)
    )
    assert command("export", folder, tmp_path / "out", "--client", 1)[0] == 0
    key = json.loads((folder / "result.json").read_text())["key"]
    state, done = saved_state.load(folder / "state", key)
    own = own_state.load(own_state.folder_of(folder / "clients", key, 1), "personal", done + 1)
    found = peft_files.read_adapter(tmp_path / "out")
    for name, factors in found.lora.items():
        shared, mine = state.adapter.lora[name], own.lora[name]
        product = shared.scaling * (mine.B @ shared.A[: mine.B.shape[1]])
        assert torch.allclose(delta(factors), product, atol=1e-6)
        assert bool(product.any())
    code, _, refused = command("export", folder, tmp_path / "global")
    assert code == 1
    assert "B stays on the clients" in refused
    code, _, refused = command("evaluate", "--adapter", folder)
    assert code == 1
    assert "with fedsa, B stays on the clients, and without it the adapter is nobody's model" in refused
    assert command("evaluate", "--adapter", tmp_path / "out")[0] == 0


def test_a_run_of_personal_factors_tells_how_to_get_a_client_s_own(tmp_path, tiny_llama, command, fresh_process):
    config = tiny(tmp_path, tiny_llama, strategy__name="fedsa", evaluate__clients=True, data__client_test_fraction=0.3)
    (tmp_path / "run.toml").write_text(config_table(config), encoding="utf-8")
    code, out, _ = command("run", tmp_path / "run.toml")
    assert code == 0
    assert "fedlora evaluate" not in out
    hint = next(line for line in out.splitlines() if "fedlora export" in line)
    words = hint.replace("OUT", str(tmp_path / "own")).split()[1:]
    assert command(*words)[0] == 0
    assert (tmp_path / "own" / "adapter_config.json").is_file()


def test_evaluate_begins_with_the_head_of_round_0(tmp_path, tiny_bert, command, fresh_process):
    config = tiny(
        tmp_path,
        tiny_bert,
        run__seed=3,
        model__task="classification",
        data__source=str(write_labels(tmp_path / "labels.jsonl")),
        data__partition_by="domain",
        federation__clients=2,
        federation__rounds=1,
        lora__target_modules="query,value",
    )
    folder, _ = run_locally(config)
    adapted_models.forget()
    assert command("evaluate", "--adapter", folder, "--json", tmp_path / "scores.json")[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    result = json.loads((folder / "result.json").read_text())
    assert scores["untouched base with a fresh head"]["loss"] == pytest.approx(
        result["baseline"]["loss"], abs=bound(1e-6)
    )
    assert scores["with the adapter"]["loss"] == pytest.approx(result["rounds"][-1]["heldout"]["loss"], abs=bound(1e-5))


def test_a_packaged_base_is_named_as_on_the_hub(run, tmp_path):
    source = export.find(run)
    named = replace(source.config, model=replace(source.config.model, name="smollm2-135m-instruct"))
    source = replace(source, config=named)
    export.write_adapter(source, peft_files.read_adapter(source.adapter), tmp_path / "out", lambda state: state, {})
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct, dequantized from Q4_1, fingerprint" in card
    assert "with others its metrics differ" in card


def test_merged_weights_are_the_base_with_the_adapter(run, tmp_path, tiny_llama, command):
    assert command("export", run, tmp_path / "out", "--merge")[0] == 0
    merged = plain(tmp_path / "out")
    assert torch.allclose(logits(merged), adapted(tiny_llama, run / "adapter"), atol=1e-4)
    assert not torch.allclose(logits(merged), logits(plain(tiny_llama)), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


def test_a_merged_classifier_has_its_trained_head(tmp_path, tiny_bert, command, fresh_process):
    rows = write_labels(tmp_path / "labels.jsonl")
    config = tiny(
        tmp_path,
        tiny_bert,
        model__task="classification",
        data__source=str(rows),
        data__partition_by="domain",
        federation__clients=2,
        lora__target_modules="query,value",
    )
    folder, _ = run_locally(config)
    assert command("export", folder, tmp_path / "merged", "--merge")[0] == 0
    assert command("export", folder, tmp_path / "adapter")[0] == 0
    with quiet():
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        base = load_base(config.model).model
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert torch.allclose(logits(merged), logits(model), atol=bound(1e-5))


def test_layers_with_transposed_weights_merge(tmp_path):
    with quiet():
        folder = save_gpt2(tmp_path / "gpt2")
    base = load_base(model_config(folder))
    before = base.model.get_submodule("transformer.h.0.attn.c_attn").weight.detach().clone()
    factors = LoraFactors(A=torch.randn(2, 32), B=torch.randn(96, 2), scaling=0.5)
    export.merge(base, AdapterState(lora={"transformer.h.0.attn.c_attn": factors}))
    after = base.model.get_submodule("transformer.h.0.attn.c_attn").weight
    assert torch.allclose(after.cpu(), before.cpu() + delta(factors).T, atol=1e-6)
    with pytest.raises(AdapterError, match="no such module"):
        export.merge(base, AdapterState(lora={"layers.9": factors}))


def test_of_a_quantized_run_the_full_precision_base_is_merged_and_the_card_says_so(run, tmp_path, tiny_llama):
    source = export.find(run)
    config = replace(source.config, model=replace(source.config.model, quantization="nf4"))
    source = replace(source, config=config)
    trained = peft_files.read_adapter(source.adapter)
    export.write_merged(source, trained, tmp_path / "out", lambda state: state, {})
    assert torch.allclose(logits(plain(tmp_path / "out")), adapted(tiny_llama, run / "adapter"), atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained with an nf4 base and is merged into the full-precision one" in card


def test_nothing_half_written_is_left(run, tmp_path, command, monkeypatch):
    def fails(card):
        raise OSError("disk full")

    monkeypatch.setattr(export, "render", fails)
    source = export.find(run)
    with pytest.raises(OSError, match="disk full"):
        export.write_adapter(source, peft_files.read_adapter(source.adapter), tmp_path / "out", lambda s: s, {})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("extra", [[], ["--all-clients"], ["--merge"]])
def test_a_folder_that_holds_something_is_left_alone(run, tmp_path, command, extra):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, _, refused = command("export", run, tmp_path / "out", *extra)
    assert code == 1
    assert "is not empty" in refused
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_errors_are_one_sentence(run, tmp_path, command):
    code, _, refused = command("export", tmp_path, tmp_path / "out")
    assert code == 1
    assert "no adapter here" in refused
    source = export.find(run)
    other = replace(source, about={**source.about, "base": "another"})
    with pytest.raises(ModelError, match="was trained on base another"):
        export.write_merged(other, peft_files.read_adapter(source.adapter), tmp_path / "out", lambda s: s, {})


def test_the_card_says_how_it_was_trained(run, tmp_path, command):
    assert command("export", run, tmp_path / "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "peft"
    assert yaml.safe_load(front)["tags"] == ["lora", "federated-learning", "fedlora", "flora"]
    result = json.loads((run / "result.json").read_text())
    assert "https://arxiv.org/abs/2409.05976" in body
    assert f"| 2 | {result['rounds'][-1]['heldout']['loss']:.4f}" in body
    assert "Ranks of the clients:** 1, 2, 4" in body
    assert str(tmp_path.parent) not in text


def test_the_card_of_a_moved_checkpoint_leaves_out_what_is_not_known(run):
    source = replace(export.find(run), result={})
    text = model_card.render(model_card.Card(source.config, source.about, {}, {}, "", "x"))
    assert "## Metrics" not in text
    assert "## Training" in text


def test_citations_come_from_docstrings():
    from fedlora.strategies.registry import NAMES, STRATEGIES

    found = {name: citation(STRATEGIES.resolve(name).__doc__) for name in NAMES}
    places = ("https://arxiv.org/abs/", "https://openreview.net/forum?id=")
    assert all(any(place in text for place in places) for text in found.values()), found
    assert found["fedsa"].startswith("Guo et al. 2024, ")
    assert citation("Means of both factors.") == ""
