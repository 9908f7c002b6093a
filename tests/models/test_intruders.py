"""Intruder dimensions against dense decompositions, PEFT's own reduction, and planted directions."""

import copy
import math

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension

from fedlora.adapters import AdapterState, LoraFactors, delta, stack, truncate
from fedlora.common.errors import AdapterError
from fedlora.config import LoraConfig
from fedlora.models import adapted, load_base
from fedlora.models.intruders import BaseSpectra, count, leading, remove, without_intruders
from tests.device import bound, model_config, on_device
from tests.federation import run_locally, tiny
from tests.tiny import save_gpt2

SHAPES = [(64, 64), (48, 80), (80, 48), (200, 260), (260, 200)]


@pytest.fixture(autouse=True)
def _fresh_process(fresh_process):
    return


def trained(d_out: int, d_in: int, decay: float = 0.97, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall by a factor each, as trained weights' do."""
    g = torch.Generator().manual_seed(seed)
    n = min(d_out, d_in)
    u = torch.linalg.qr(torch.randn(d_out, n, generator=g))[0]
    v = torch.linalg.qr(torch.randn(d_in, n, generator=g))[0]
    return (u * decay ** torch.arange(n)) @ v.T


def learned(d_out: int, d_in: int, rank: int, size: float, seed: int = 1) -> LoraFactors:
    """A random update of scaling 0.5 whose largest singular value is near `size`."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=g) / math.sqrt(d_in)
    b = torch.randn(d_out, rank, generator=g) / math.sqrt(d_out)
    return LoraFactors(A=a, B=2 * size * b, scaling=0.5)


def naive(weight, update, k=10, epsilon=0.5):
    """The definition with loops, by numpy: the singular triplets of W + dW that are intruders."""
    w = weight.cpu().double().numpy()
    base = np.linalg.svd(w, full_matrices=False)[0]
    u, s, vh = np.linalg.svd(w + delta(update).double().numpy(), full_matrices=False)
    found = []
    for i in range(min(k, len(s))):
        if max(abs(float(base[:, j] @ u[:, i])) for j in range(base.shape[1])) < epsilon:
            found.append((u[:, i], s[i], vh[i]))
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0.1, 0.6, 2.0])
def test_counts_and_removals_are_those_of_the_definition(shape, size):
    weight, update = trained(*shape), learned(*shape, 6, size)
    found = naive(weight, update)
    assert count(weight, update) == len(found)
    assert count(weight, update, k=3, epsilon=0.8) == len(naive(weight, update, 3, 0.8))
    for lam in (0.0, 0.3, 1.5):
        expected = delta(update).double().numpy() + (lam - 1) * sum(s * np.outer(u, v) for u, s, v in found)
        got = remove(weight, update, lam)
        assert got.rank == 6 + len(found)
        np.testing.assert_allclose(delta(got).numpy(), expected, atol=1e-5)


def test_the_sizes_above_hold_none_some_and_more_intruders():
    weight = trained(200, 260)
    numbers = [count(weight, learned(200, 260, 6, size)) for size in (0.1, 0.6, 2.0)]
    assert numbers[0] == 0
    assert 0 < numbers[1] <= numbers[2] == 6


def test_a_planted_direction_is_found_and_one_of_the_bases_own_is_not():
    """At 3 s_1, by a random rank-1 update, or along (u_1, v_1), or (u_5, v_5)."""
    weight = trained(128, 128)
    u, s, vh = torch.linalg.svd(weight)
    g = torch.Generator().manual_seed(3)
    left, right = (torch.nn.functional.normalize(torch.randn(128, generator=g), dim=0) for _ in range(2))
    planted = LoraFactors(A=right[None], B=3 * s[0] * left[:, None], scaling=1.0)
    assert count(weight, planted) == 1
    assert count(weight, planted, epsilon=0.0) == 0
    for own in (0, 4):
        aligned = LoraFactors(A=vh[own][None], B=3 * s[0] * u[:, own][:, None], scaling=1.0)
        assert count(weight, aligned) == 0
        assert remove(weight, aligned, 0.0) is aligned
    clean = remove(weight, planted, 0.0)
    assert count(weight, clean) == 0
    assert clean.rank == 2
    cosine = torch.linalg.svd(weight + delta(clean))[0][:, :10].T @ left
    assert float(cosine.abs().max()) < 0.5


def test_no_update_has_no_intruders_and_lambda_one_changes_nothing():
    weight, update = trained(64, 64), learned(64, 64, 4, 2.0)
    nothing = LoraFactors(A=update.A, B=torch.zeros_like(update.B), scaling=0.5)
    assert count(weight, nothing) == 0
    assert count(torch.zeros(40, 40), learned(40, 40, 1, 0.0)) == 0
    assert remove(weight, update, 1.0) is update
    with pytest.raises(AdapterError, match=r"lambda = -0\.5, expected 0"):
        remove(weight, update, -0.5)
    with pytest.raises(AdapterError, match="lambda = nan"):
        remove(weight, update, math.nan)


@pytest.mark.parametrize("shape", [(96, 96), (48, 96), (96, 48), (30, 7)])
@pytest.mark.parametrize("decay", [0.9, 0.99, 1.0])
def test_leading_directions_are_those_of_the_whole_decomposition(shape, decay):
    matrix = trained(*shape, decay=decay).double()
    k = min(10, *shape)
    u, s, vh = leading(matrix, k)
    all_u, all_s, all_vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, all_s[:k], rtol=1e-6, atol=0)
    torch.testing.assert_close(u.T @ u, torch.eye(k, dtype=u.dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close((matrix @ vh.T), u * s, atol=1e-6, rtol=0)
    if decay < 1:  # with equal singular values, any directions are leading ones
        assert float((u * all_u[:, :k]).sum(dim=0).abs().min()) > 1 - 1e-6
        assert float((vh * all_vh[:k]).sum(dim=1).abs().min()) > 1 - 1e-6


@pytest.mark.parametrize("lam", [0.0, 0.75])
def test_removal_is_pefts_own_up_to_its_truncation(tiny_llama, lam):
    """PEFT cuts the result back to the adapter's rank; ours cut to that rank is the same update."""
    model = load_base(model_config(tiny_llama)).model
    model = get_peft_model(model, PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "v_proj"]))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    g = torch.Generator().manual_seed(0)
    for layer in layers.values():
        up = layer.lora_B["default"].weight
        up.data.copy_(torch.randn(up.shape, generator=g))
    said: list[str] = []
    reduce_intruder_dimension(model, mitigation_lambda=lam, logging_sink=said.append)
    counts = {line.split(": ", 1)[0]: line.split(": ", 1)[1] for line in said if ": " in line}
    assert sum(line != "No intruders" for line in counts.values()) > 0
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.data
        down, up = layer.lora_A["default"].weight.data.cpu(), layer.lora_B["default"].weight.data.cpu()
        factors = LoraFactors(A=down, B=up, scaling=layer.scaling["default"])
        n = count(weight, factors)
        assert counts[name] == (f"Intruders: {n}" if n else "No intruders")
        ours = delta(truncate(remove(weight, factors, lam), 4))
        theirs = layer.get_delta_weight("intruder_reduced").data.cpu()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def bench_of(folder, quantization="none", targets="q_proj,v_proj,down_proj"):
    return adapted.adapted_model(model_config(folder, quantization), LoraConfig(target_modules=targets))


def adapter_for(bench, rank=3, size=3.0):
    lora = {
        name: learned(int(layer.out_features), int(layer.in_features), rank, size, seed)
        for seed, (name, layer) in enumerate(bench.layers.items())
    }
    return AdapterState(lora=lora, tensors={n: torch.zeros(p.shape) for n, p in bench.tensors.items()})


def dequantized(module):
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        scale = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return module.weight.data.float() * scale[:, None] / 127
    return module.weight.data


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_quantized_weights_count_as_what_they_compute_with(tiny_llama, quantization):
    bench = bench_of(tiny_llama, quantization)
    adapter = adapter_for(bench)
    weights = {name: dequantized(layer.get_base_layer()).clone() for name, layer in bench.layers.items()}
    expected = {name: len(naive(weights[name], adapter.lora[name])) for name in adapter.lora}
    assert any(expected.values())
    ids = on_device(torch.arange(12).reshape(2, 6) + 20)
    adapted.install(bench, adapter)
    before = bench.model(input_ids=ids).logits
    spectra = BaseSpectra(bench)
    assert spectra.counts() == expected
    assert torch.equal(bench.model(input_ids=ids).logits, before)
    assert spectra.counts() == expected  # after a forward pass too, which moves int8's scales

    for lam in (0.0, 0.5):
        less = without_intruders(bench, adapter, lam)
        for name, f in adapter.lora.items():
            torch.testing.assert_close(
                delta(less.lora[name]), delta(remove(weights[name], f, lam)), rtol=1e-3, atol=1e-4
            )
    same = without_intruders(bench, adapter, 1.0)
    assert all(same.lora[name] is f for name, f in adapter.lora.items())


def test_transposed_weights_are_turned(tmp_path):
    bench = bench_of(save_gpt2(tmp_path / "gpt2"), targets="c_attn")
    adapter = adapter_for(bench)
    weights = {name: layer.get_base_layer().weight.detach().T for name, layer in bench.layers.items()}
    expected = {name: len(naive(weights[name], f)) for name, f in adapter.lora.items()}
    adapted.install(bench, adapter)
    assert BaseSpectra(bench).counts() == expected
    less = without_intruders(bench, adapter, 0.0)
    for name, f in adapter.lora.items():
        torch.testing.assert_close(
            delta(less.lora[name]), delta(remove(weights[name], f, 0.0)), rtol=bound(1.3e-6), atol=bound(1e-5)
        )


def test_merged_folds_are_told_from_the_base(tiny_llama):
    """What was merged into the weights counts as learned; the base's own vectors are of the untouched weights."""
    bench = bench_of(tiny_llama)
    fold = adapter_for(bench)
    rest = AdapterState(lora={n: learned(f.B.shape[0], f.A.shape[1], 2, 1.0, 50) for n, f in fold.lora.items()})
    spectra = BaseSpectra(bench)
    adapted.install(bench, AdapterState(lora={n: stack([fold.lora[n], f]) for n, f in rest.lora.items()}))
    whole = spectra.counts()
    original = {n: layer.get_base_layer().weight.detach().clone() for n, layer in bench.layers.items()}

    adapted.merge_folds(bench, "run", (fold,))
    adapted.install(bench, rest)
    assert spectra.counts() == whole
    assert BaseSpectra(bench).counts() == {n: count(original[n], f) for n, f in rest.lora.items()}
    adapted.merge_folds(bench, "run", (fold,))
    less = without_intruders(bench, fold, 0.0)
    for name, f in fold.lora.items():
        expected = delta(remove(original[name], f, 0.0))
        torch.testing.assert_close(delta(less.lora[name]), expected, rtol=bound(1.3e-6), atol=bound(1e-5))


def test_cores_count_and_other_modules_are_refused(tiny_llama):
    bench = bench_of(tiny_llama)
    adapter = adapter_for(bench)
    core = torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    lora = {n: LoraFactors(A=f.A, B=f.B, scaling=f.scaling, R=core) for n, f in adapter.lora.items()}
    cored = AdapterState(lora=lora, tensors=adapter.tensors)
    first = {n: LoraFactors(A=f.A[:1], B=f.B[:, :1], scaling=f.scaling) for n, f in adapter.lora.items()}
    adapted.install(bench, cored)
    weights = {name: layer.get_base_layer().weight for name, layer in bench.layers.items()}
    assert BaseSpectra(bench).counts() == {name: count(weights[name], f) for name, f in first.items()}
    less = without_intruders(bench, cored, 0.0)
    assert not less.tensors
    for name, f in first.items():
        torch.testing.assert_close(delta(less.lora[name]), delta(remove(weights[name], f, 0.0)), rtol=1e-3, atol=1e-4)
    strange = AdapterState(lora={"model.nowhere": first[next(iter(first))]})
    with pytest.raises(AdapterError, match=r"no adapted module 'model.nowhere'; removing intruders needs the model.n"):
        without_intruders(bench, strange, 0.0)


@pytest.mark.parametrize("base_update", ["anchor", "merge"])
def test_a_federation_counts_after_each_evaluated_round(tmp_path, tiny_llama, base_update):
    config = tiny(
        tmp_path,
        tiny_llama,
        evaluate__intruders=True,
        evaluate__every=2,
        federation__rounds=3,
        anchor__base_update=base_update,
        lora__target_modules="q_proj,v_proj",
    )
    folder, result = run_locally(config)
    assert ["intruders" in entry for entry in result["rounds"]] == [False, True, True]
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    base = load_base(copy.deepcopy(config.model)).model
    expected = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors = LoraFactors(A=a, B=tensors[name.replace("lora_A", "lora_B")], scaling=1.0)
            expected[module] = len(naive(base.get_submodule(module).weight.detach(), factors))
    assert result["rounds"][-1]["intruders"] == expected


def test_it_is_off_unless_asked_for(tmp_path, tiny_llama):
    _, result = run_locally(tiny(tmp_path, tiny_llama, federation__rounds=1))
    assert "intruders" not in result["rounds"][0]
