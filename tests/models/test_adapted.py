"""Factors in a PEFT model, anchors beside them, and checkpoints that PEFT itself loads."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file

from fedlora.adapters import AdapterState, LoraFactors, delta, initial, keep_factors
from fedlora.common.errors import AdapterError, ConfigError, ModelError
from fedlora.config import AnchorConfig, LoraConfig, ModelConfig
from fedlora.models import adapted, fresh_head, injection, load_base, peft_files
from fedlora.models.stacked import NotStackable, stacked
from fedlora.tasks.checked import mean_loss
from tests.device import activations, assert_near, bound, model_config, on_device
from tests.tiny import save_gpt2

LORA = LoraConfig(target_modules="q_proj,v_proj,down_proj")
IDS = on_device(torch.arange(12).reshape(2, 6) + 20)


@pytest.fixture(autouse=True)
def _fresh_workbench():
    yield
    adapted.forget()


def random_adapter(bench, seed: int, rank: int, scaling: float = 0.5) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    lora = {
        name: LoraFactors(
            A=torch.randn(rank, int(layer.in_features), generator=g) * 0.1,
            B=torch.randn(int(layer.out_features), rank, generator=g) * 0.1,
            scaling=scaling,
        )
        for name, layer in bench.layers.items()
    }
    return AdapterState(lora=lora, tensors={n: torch.randn(p.shape, generator=g) for n, p in bench.tensors.items()})


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.cpu()


def dense_logits(config: ModelConfig, *updates: AdapterState) -> torch.Tensor:
    """The reference: updates added to the weights of an unquantized base."""
    model = load_base(config).model
    for update in updates:
        for name, factors in update.lora.items():
            weight = model.get_submodule(name).weight.data
            weight += delta(factors).to(weight)
    return logits(model)


def test_factors_of_any_rank_do_what_their_product_says(tiny_llama):
    config = model_config(tiny_llama)
    bench = adapted.adapted_model(config, LORA)
    for rank in (1, 7, 3):
        adapter = random_adapter(bench, rank, rank)
        adapted.install(bench, adapter)
        adapted.install_anchor(bench, ())
        torch.testing.assert_close(logits(bench.model), dense_logits(config, adapter), rtol=1e-4, atol=1e-4)


def test_bf16_is_fp32_up_to_its_rounding(tiny_llama):
    """Of an unquantized base: weights that are rounded before they are quantized may get the next code."""
    found = {}
    for dtype in ("fp32", "bf16"):
        bench = adapted.adapted_model(model_config(tiny_llama, compute_dtype=dtype), LORA)
        adapted.install(bench, random_adapter(bench, 0, 4), folds=(random_adapter(bench, 1, 2),))
        found[dtype] = logits(bench.model)
    assert found["bf16"].dtype == torch.bfloat16
    assert_near(found["bf16"], found["fp32"], bound(1e-5, torch.bfloat16))


def test_folds_add_up_beside_the_adapter_and_leave_again(tiny_llama):
    config = model_config(tiny_llama)
    bench = adapted.adapted_model(config, LORA)
    adapter, *folds = (random_adapter(bench, seed, rank) for seed, rank in ((0, 4), (1, 9), (2, 2)))
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, tuple(folds))
    torch.testing.assert_close(logits(bench.model), dense_logits(config, adapter, *folds), rtol=1e-4, atol=1e-4)
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, ())
    torch.testing.assert_close(logits(bench.model), dense_logits(config, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantized_base_anchor_and_adapter_equal_one_stacked_adapter(tiny_llama, quantization):
    bench = adapted.adapted_model(model_config(tiny_llama, quantization), LORA)
    adapter, fold = random_adapter(bench, 0, 4), random_adapter(bench, 1, 6)
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, (fold,))
    both = logits(bench.model)
    stacked = {
        name: LoraFactors(torch.cat([f.A, fold.lora[name].A]), torch.cat([f.B, fold.lora[name].B], 1), f.scaling)
        for name, f in adapter.lora.items()
    }
    adapted.install(bench, AdapterState(lora=stacked))
    adapted.install_anchor(bench, ())
    close = bound(1e-4, activations(quantization))
    torch.testing.assert_close(both, logits(bench.model), rtol=close, atol=close)


def test_merged_folds_equal_the_anchor_and_are_added_once(tiny_llama):
    config = model_config(tiny_llama)
    bench = adapted.adapted_model(config, LORA)
    first, second, adapter = (random_adapter(bench, seed, 3) for seed in range(3))
    adapted.install(bench, adapter)
    adapted.merge_folds(bench, "run", (first,))
    adapted.merge_folds(bench, "run", (first, second))
    one_by_one = {name: layer.get_base_layer().weight.clone() for name, layer in bench.layers.items()}
    torch.testing.assert_close(logits(bench.model), dense_logits(config, adapter, first, second), rtol=1e-4, atol=1e-4)
    adapted.merge_folds(bench, "another run", (first, second))  # rereads the base, adds both at once
    for name, layer in bench.layers.items():
        assert torch.equal(layer.get_base_layer().weight, one_by_one[name])


def test_a_run_with_an_anchor_finds_no_folds_that_an_earlier_run_merged(tiny_llama):
    config = model_config(tiny_llama, "none")
    bench = adapted.adapted_model(config, LORA)
    fold, adapter = random_adapter(bench, 1, 3), random_adapter(bench, 2, 3)
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in bench.layers.items()}
    assert adapted.place(bench, (fold,), AnchorConfig(base_update="merge"), "first") == ()
    assert not all(torch.equal(layer.get_base_layer().weight, weights[n]) for n, layer in bench.layers.items())
    beside = adapted.place(bench, (fold,), AnchorConfig(), "second")
    adapted.install(bench, adapter, folds=beside)
    assert all(torch.equal(layer.get_base_layer().weight, weights[n]) for n, layer in bench.layers.items())
    torch.testing.assert_close(logits(bench.model), dense_logits(config, adapter, fold), rtol=1e-4, atol=1e-4)


def test_fault_6_conv1d_weights_are_transposed_and_updates_are_not(tmp_path):
    """GPT-2's Conv1D keeps W [d_in, d_out]; a square one would hide a transposed update."""
    config = model_config(save_gpt2(tmp_path / "gpt2"))
    targets = LoraConfig(target_modules="c_attn,c_proj")
    bench = adapted.adapted_model(config, targets)
    shapes = injection.shapes(config, targets).lora
    assert {(96, 32), (32, 32), (32, 128)} == set(shapes.values())
    adapter, fold = random_adapter(bench, 0, 4), random_adapter(bench, 1, 3)
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, (fold,))
    beside = logits(bench.model)
    dense = load_base(config).model
    with torch.no_grad():
        for part in (adapter, fold):
            for name, factors in part.lora.items():
                weight = dense.get_submodule(name).weight
                weight += delta(factors).T.to(weight)
    torch.testing.assert_close(beside, logits(dense), rtol=1e-4, atol=1e-4)
    adapted.install_anchor(bench, ())
    adapted.merge_folds(bench, "run", (fold,))
    torch.testing.assert_close(logits(bench.model), beside, rtol=1e-4, atol=1e-4)


def test_reading_gives_back_the_bits_that_were_set(tiny_llama):
    bench = adapted.adapted_model(model_config(tiny_llama), LORA)
    adapter = random_adapter(bench, 0, 5)
    adapted.install(bench, adapter)
    got = adapted.read(bench)
    for name, factors in adapter.lora.items():
        assert torch.equal(got.lora[name].A, factors.A)
        assert torch.equal(got.lora[name].B, factors.B)
        assert got.lora[name].scaling == factors.scaling


def test_only_what_is_trainable_gets_a_gradient(tiny_llama):
    bench = adapted.adapted_model(model_config(tiny_llama), LORA)
    parameters = adapted.install(bench, random_adapter(bench, 0, 2), {"B"}).parameters
    adapted.install_anchor(bench, (random_adapter(bench, 1, 2),))
    bench.model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {id(p) for p in bench.model.parameters() if p.grad is not None}
    assert with_gradient == {id(p) for p in parameters}
    assert with_gradient == {id(layer.lora_B["default"].weight) for layer in bench.layers.values()}


@pytest.mark.parametrize(
    ("quantization", "kind"), [("none", "Linear"), ("int8", "Linear8bitLt"), ("nf4", "Linear4bit")]
)
def test_layers_are_the_class_that_was_asked_for(tiny_llama, quantization, kind):
    bench = adapted.adapted_model(model_config(tiny_llama, quantization), LORA)
    assert {type(layer).__name__ for layer in bench.layers.values()} == {kind}
    assert len(bench.layers) == 6


def test_layers_of_another_class_are_an_error(tiny_llama, monkeypatch):
    class Odd(LoraLinear): ...

    def inject(*arguments):
        model = injected(*arguments)
        model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj").__class__ = Odd
        return model

    injected = injection.inject
    monkeypatch.setattr(adapted, "inject", inject)
    with pytest.raises(ModelError, match=r"1.self_attn.v_proj, a Linear, needs PEFT's Linear, and .* peft made a Odd;"):
        adapted.adapted_model(model_config(tiny_llama), LORA)


def test_a_target_that_matches_nothing_names_what_there_is(tiny_llama):
    with pytest.raises(ModelError, match=r"lora.target-modules = 'query'.*q_proj"):
        adapted.adapted_model(model_config(tiny_llama), LoraConfig(target_modules="query"))


@pytest.mark.parametrize("change", ["missing module", "wrong shape"])
def test_an_adapter_that_does_not_fit_is_refused(tiny_llama, change):
    bench = adapted.adapted_model(model_config(tiny_llama), LORA)
    lora = dict(random_adapter(bench, 0, 2).lora)
    name = next(iter(lora))
    if change == "missing module":
        del lora[name]
    else:
        lora[name] = replace(lora[name], A=lora[name].A[:, 1:])
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
        adapted.install(bench, AdapterState(lora=lora))


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_shapes_need_no_weights(tiny_llama, tiny_bert, task):
    config = model_config(tiny_llama if task == "causal-lm" else tiny_bert, task=task, labels=3)
    lora = LORA if task == "causal-lm" else LoraConfig(target_modules="auto")
    found = injection.shapes(config, lora)
    bench = adapted.adapted_model(config, lora)
    assert found.lora == {n: (layer.out_features, layer.in_features) for n, layer in bench.layers.items()}
    assert found.tensors == {name: tuple(p.shape) for name, p in bench.tensors.items()}
    assert bool(found.tensors) == (task == "classification")


def test_a_fresh_head_is_seeded():
    shapes = {"classifier.weight": (2, 8), "classifier.bias": (2,), "norm.weight": (8,)}
    one, two = (fresh_head(shapes, 3) for _ in range(2))
    assert torch.equal(one["classifier.weight"], two["classifier.weight"])
    assert not one["classifier.bias"].any()
    assert torch.equal(one["norm.weight"], torch.ones(8))  # zeros would let nothing through


def test_a_start_changes_nothing(tiny_llama):
    config = model_config(tiny_llama)
    bench = adapted.adapted_model(config, LORA)
    shapes = injection.shapes(config, LORA)
    start = initial(shapes.lora, lambda name: 4, lambda name: 2.0, torch.Generator().manual_seed(0))
    adapted.install(bench, start)
    assert torch.equal(logits(bench.model), dense_logits(config))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_peft_loads_the_checkpoint_onto_the_untouched_base(tiny_llama, tiny_bert, tmp_path, task, quantization):
    config = model_config(tiny_llama if task == "causal-lm" else tiny_bert, quantization, task=task)
    bench = adapted.adapted_model(config, LORA if task == "causal-lm" else LoraConfig(target_modules="auto"))
    adapter = random_adapter(bench, 0, 5)
    one = next(iter(adapter.lora))  # unequal ranks, and one that is lower than its factors say
    lora = dict(adapter.lora)
    lora[one] = LoraFactors(lora[one].A[:2].repeat(2, 1), lora[one].B[:, :2].repeat(1, 2), 1.0)
    adapter = AdapterState(lora=lora, tensors=adapter.tensors)
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, ())
    expected = copy.deepcopy(logits(bench.model))
    peft_files.save_checkpoint(adapter, tmp_path / "adapter", config, {"base": bench.base.fingerprint})
    adapted.forget()

    loaded = PeftModel.from_pretrained(load_base(config).model, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.peft_config["default"].rank_pattern


def with_cores(bench, seed: int, rank: int) -> AdapterState:
    """A random adapter with a core between the factors of every module."""
    plain, g = random_adapter(bench, seed, rank), torch.Generator().manual_seed(100 + seed)
    lora = {name: replace(f, R=torch.randn(rank, rank, generator=g)) for name, f in plain.lora.items()}
    return AdapterState(lora=lora, tensors=plain.tensors)


def multiplied_in(adapter: AdapterState) -> AdapterState:
    """The same update without cores."""
    lora = {n: LoraFactors(A=f.down, B=f.B, scaling=f.scaling) for n, f in adapter.lora.items()}
    return AdapterState(lora=lora, tensors=adapter.tensors)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_core_lies_between_the_factors_and_leaves_with_its_adapter(tiny_llama, quantization):
    """One workbench serves adapters with and without cores, of any ranks, one after another."""
    bench = adapted.adapted_model(model_config(tiny_llama, quantization), LORA)

    def in_place(adapter: AdapterState) -> torch.Tensor:
        adapted.install(bench, adapter)
        adapted.install_anchor(bench, ())
        return logits(bench.model)

    plain = random_adapter(bench, 5, 4)
    before = in_place(plain)
    for rank in (3, 6):
        cored = with_cores(bench, rank, rank)
        got = in_place(cored)
        close = bound(1e-4, activations(quantization))
        torch.testing.assert_close(got, in_place(multiplied_in(cored)), rtol=close, atol=close)
        assert float((got - in_place(keep_factors(cored, "AB"))).abs().max()) > 1e-2
    assert torch.equal(in_place(plain), before)
    assert all(f.R is None for f in adapted.read(bench).lora.values())


def test_reading_gives_cores_and_head_back_apart(tiny_bert):
    config = model_config(tiny_bert, task="classification", labels=2)
    bench = adapted.adapted_model(config, LoraConfig(target_modules="query,value"))
    adapter = with_cores(bench, 0, 3)
    parameters = adapted.install(bench, adapter, {"R"}).parameters
    assert len(parameters) == len(bench.layers) + len(bench.tensors)  # a core each, and the head
    got = adapted.read(bench)
    assert got.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, got.tensors[name]) for name, tensor in adapter.tensors.items())
    for name, factors in adapter.lora.items():
        assert torch.equal(got.lora[name].A, factors.A)
        assert torch.equal(got.lora[name].B, factors.B)
        assert torch.equal(got.lora[name].R, factors.R)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_cores_gradient_is_the_weights_between_b_and_a(tiny_llama, quantization):
    """dL/dR = s B' G A' with G the gradient by the weight, here by autograd on a full matrix added beside the base."""
    bench = adapted.adapted_model(model_config(tiny_llama, quantization), LORA)
    cored = with_cores(bench, 1, 3)
    parameters = adapted.install(bench, cored, {"R"}).parameters
    adapted.install_anchor(bench, ())
    bench.model(input_ids=IDS, labels=IDS).loss.backward()
    assert {id(p) for p in bench.model.parameters() if p.grad is not None} == {id(p) for p in parameters}
    gradients = dict(zip(bench.layers, [p.grad for p in parameters], strict=True))

    whole = {}  # the same update as one matrix: A = I, B = dW
    for name, f in multiplied_in(cored).lora.items():
        whole[name] = LoraFactors(A=torch.eye(f.A.shape[1]), B=delta(f), scaling=1.0)
    dense = adapted.install(bench, AdapterState(lora=whole), {"B"}).parameters
    bench.model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, f), matrix in zip(cored.lora.items(), dense, strict=True):
        assert matrix.grad is not None
        found = gradients[name]
        assert found is not None
        expected = f.scaling * f.B.T @ matrix.grad.cpu() @ f.A.T
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=bound(1e-5))
        assert expected.any()


def test_cores_that_do_not_fit_are_named(tiny_llama):
    bench = adapted.adapted_model(model_config(tiny_llama), LORA)
    cored = with_cores(bench, 0, 3)
    name = next(iter(cored.lora))
    with pytest.raises(AdapterError, match=rf"{name}: got a core R \(2, 2\), its factors of rank 3 need \(3, 3\)"):
        adapted.install(bench, replace(cored, lora={**cored.lora, name: replace(cored.lora[name], R=torch.eye(2))}))
    with pytest.raises(AdapterError, match=r"tensors trained in full are not the model's, for instance 'elsewhere'"):
        adapted.install(bench, replace(cored, tensors={**cored.tensors, "elsewhere": torch.eye(3)}))


def test_folds_merged_into_an_output_layer_leave_the_input_embeddings_alone(tiny_llama):
    """The tiny Llama's are one tensor."""
    config, lora = model_config(tiny_llama), LoraConfig(target_modules="q_proj,lm_head")
    bench = adapted.adapted_model(config, lora)
    adapter, *folds = (random_adapter(bench, seed, 3) for seed in range(3))
    adapted.install(bench, adapter)
    adapted.install_anchor(bench, tuple(folds))
    beside = logits(bench.model)
    embeddings = bench.base.model.get_input_embeddings().weight.clone()
    adapted.install_anchor(bench, ())
    adapted.merge_folds(bench, "run", tuple(folds))
    torch.testing.assert_close(logits(bench.model), beside, rtol=1e-4, atol=1e-4)
    assert torch.equal(bench.base.model.get_input_embeddings().weight, embeddings)
    adapted.merge_folds(bench, "another run", tuple(folds))  # rereads the base
    torch.testing.assert_close(logits(bench.model), beside, rtol=1e-4, atol=1e-4)


def test_an_output_layer_gets_lora_on_a_quantized_base_too(tiny_llama):
    bench = adapted.adapted_model(model_config(tiny_llama, "nf4"), LoraConfig(target_modules="q_proj,lm_head"))
    adapter = random_adapter(bench, 0, 3)
    parameters = adapted.install(bench, adapter, {"A", "B"}).parameters
    with pytest.raises(NotStackable, match="the output layer has an adapter"), stacked(bench, [adapter] * 2, {"A"}):
        pass
    mean_loss(
        bench.task, bench.model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    ).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_a_workbench_follows_the_files_of_its_base(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    first = adapted.adapted_model(model_config(folder), LORA)
    assert adapted.adapted_model(model_config(folder), LORA) is first
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    second = adapted.adapted_model(model_config(folder), LORA)
    assert second.base.fingerprint != first.base.fingerprint
    assert torch.equal(second.base.model.model.norm.weight, 2 * first.base.model.model.norm.weight)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("qproj=2", r"'qproj' fits none of the adapted modules; did you mean 'q_proj'\?"),
        ("v_proj=3, k_proj=2", r"'k_proj' fits none of the adapted modules; did you mean"),
        ("layers.7.self_attn.q_proj=2", "'layers.7.self_attn.q_proj' fits none"),
    ],
)
def test_a_rank_pattern_that_fits_nothing_is_an_error(tiny_llama, pattern, words):
    with pytest.raises(ConfigError, match=f"lora.rank-pattern: {words}"):
        injection.shapes(model_config(tiny_llama), replace(LORA, rank_pattern=pattern))
    injection.shapes(model_config(tiny_llama), replace(LORA, rank_pattern=r"layers\.\d+\.self_attn\.q_proj=2"))
