"""Intruder dimensions: leading singular directions of W + dW that the base W does not have.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (https://arxiv.org/abs/2410.21228):
LoRA adds such directions where full fine-tuning does not, and they go with forgetting. With W = U S V' and the k
leading singular triplets (s_i, u_i, v_i) of W + dW, direction i is an intruder if `max_j |U_j' u_i| < epsilon`, over
all of W's left singular vectors. Scaling the intruders by lambda gives back some of what was forgotten:
`dW + (lambda - 1) sum_i s_i u_i v_i'`. The update's rank grows by the number of intruders; nothing is truncated.

Quantized weights enter dequantized, GPT-2's transposed ones as [d_out, d_in].
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Int8Params, Linear8bitLt, Params4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedlora.adapters import AdapterState, LoraFactors, stack, to_fp32
from fedlora.adapters.lowrank import Svd
from fedlora.common.errors import AdapterError

from .adapted import AdaptedModel, merge_folds, read

# The defaults of PEFT's reduce_intruder_dimension, too.
K, EPSILON = 10, 0.5


def count(weight: Tensor, delta: LoraFactors, k: int = K, epsilon: float = EPSILON, base: Tensor | None = None) -> int:
    """The number of intruders among the k leading directions of `weight + dW`.

    Args:
        weight: [d_out, d_in].
        delta: dW's factors.
        k: leading directions to look at.
        epsilon: a direction whose cosine with every left singular vector of the base is below it is an intruder.
        base: these vectors, [d_out, min(d_out, d_in)], where they are known; else those of `weight`.
    """
    return _intruders(weight, delta, k, epsilon, base)[1].numel()


def remove(weight: Tensor, delta: LoraFactors, lam: float, k: int = K, epsilon: float = EPSILON) -> LoraFactors:
    """The update with its intruders scaled: 1 leaves it as it is, 0 takes them out of `weight + dW`.

    Args:
        weight: of the base, [d_out, d_in].
        delta: dW's factors, of rank r.
        lam: the paper's lambda.
        k, epsilon: as in `count`.

    Returns:
        Factors of rank r + the number of intruders; `delta` itself where there are none.

    Raises:
        AdapterError: lambda is below 0.
    """
    if not lam >= 0:
        raise AdapterError(f"intruders are scaled by lambda = {lam}, expected 0 (none is left) to 1 (all stay)")
    if lam == 1:
        return delta
    u, s, vh = _intruders(weight, delta, k, epsilon)
    if not s.numel():
        return delta
    like, root = to_fp32(delta.down), s.sqrt()
    found = LoraFactors(A=(root[:, None] * vh).to(like), B=(u * root).to(like), scaling=1.0)
    return stack([delta, found], [1.0, lam - 1.0])


def without_intruders(
    bench: AdaptedModel, adapter: AdapterState, lam: float, k: int = K, epsilon: float = EPSILON
) -> AdapterState:
    """The adapter with every module's intruders scaled; the head stays, cores are multiplied into their factors.

    Args:
        bench: the base, brought back to its untouched weights if folds were merged into them.
        adapter: everything learned, for all or some of the base's modules.
        lam: 1 leaves all as it is, 0 removes the intruders.
        k, epsilon: as in `count`.

    Raises:
        AdapterError: the adapter has modules that the base lacks, or lambda is below 0.
    """
    odd = sorted(set(adapter.lora) - set(bench.layers))
    if odd:
        raise AdapterError(
            f"the base has no adapted module {odd[0]!r}; removing intruders needs the model.name and "
            "lora.target-modules that the adapter was trained with"
        )
    merge_folds(bench, None, ())
    lora = {name: remove(_weight(bench.layers[name]), f, lam, k, epsilon) for name, f in adapter.lora.items()}
    return AdapterState(lora=lora, tensors=adapter.tensors)


class BaseSpectra:
    """The left singular vectors of every adapted weight of an untouched base, decomposed once.

    They are kept on the CPU in fp16, d_out * min(d_out, d_in) numbers each: rounding moves a cosine by less than
    5e-4, and a base's vectors would fill a GPU.
    """

    def __init__(self, bench: AdaptedModel) -> None:
        merge_folds(bench, None, ())
        self._bench = bench
        self._left = {name: _left(_weight(layer)).to("cpu", torch.float16) for name, layer in bench.layers.items()}

    def counts(self, k: int = K, epsilon: float = EPSILON) -> dict[str, int]:
        """Module -> intruders of what is installed: the adapter, and folds merged into the weights; no anchor."""
        installed = read(self._bench).lora
        return {
            name: count(_weight(layer), installed[name], k, epsilon, self._left[name])
            for name, layer in self._bench.layers.items()
        }


def leading(matrix: Tensor, k: int) -> Svd:
    """The k leading singular triplets, from all eigenpairs of the smaller Gram matrix in fp64.

    Trained weights' spectra fall so slowly that subspace iterations take longer than the whole eigenproblem.

    Args:
        matrix: [d_out, d_in].
        k: at least 1; at most min(d_out, d_in) come back.

    Returns:
        U [d_out, k], S [k] descending, Vh [k, d_in], fp64; zeros where S is below 1e-7 of the largest.
    """
    m = matrix.double()
    across = m.shape[0] > m.shape[1]
    values, vectors = torch.linalg.eigh(m.mT @ m if across else m @ m.mT)
    s, vectors = values[-k:].flip(0).clamp(min=0.0).sqrt(), vectors[:, -k:].flip(1)
    known = (s > 1e-7 * s[:1]) & (s > 0)
    s, vectors = s * known, vectors * known
    inverse = torch.where(known, 1.0 / s.where(known, torch.ones_like(s)), 0.0)
    if across:
        return (m @ vectors) * inverse, s, vectors.mT
    return vectors, s, inverse[:, None] * (vectors.mT @ m)


def _intruders(weight: Tensor, delta: LoraFactors, k: int, epsilon: float, base: Tensor | None = None) -> Svd:
    """The singular triplets of `weight + dW` that are intruders."""
    left = _left(weight) if base is None else base
    w = weight.detach().double()
    update = delta.B.to(w) @ delta.down.to(w)
    u, s, vh = leading(w + delta.scaling * update, k)
    cosines = (left.to(w.device, torch.float32).mT @ u.float()).abs()
    found = (cosines.amax(dim=0) < epsilon) & (s > 0)
    return u[:, found], s[found], vh[found]


def _left(weight: Tensor) -> Tensor:
    """All left singular vectors, [d_out, min(d_out, d_in)]."""
    return torch.linalg.svd(weight.detach().float(), full_matrices=False)[0]


def _weight(layer: LoraLayer) -> Tensor:
    """The layer's frozen weight as it computes with it, [d_out, d_in]; on the CPU where the device has no SVD."""
    weight = _dequantized(layer.get_base_layer()).detach()
    weight = weight.cpu() if weight.device.type not in ("cpu", "cuda") else weight
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def _dequantized(module: nn.Module) -> Tensor:
    """The module's weight as numbers; nothing of the module changes."""
    weight = module.weight
    if isinstance(weight, Params4bit):
        return dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(weight, Int8Params):
        assert isinstance(module, Linear8bitLt)
        scales = weight.SCB if module.state.SCB is None else module.state.SCB  # the first forward pass moves them
        return int8_vectorwise_dequant(weight.data, scales)
    assert isinstance(weight, Tensor)
    return weight
