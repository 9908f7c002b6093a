"""Intruder dimensions: leading singular directions of W + dW that the base model's weight W does not have.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (https://arxiv.org/abs/2410.21228):
LoRA adds such directions, full fine-tuning does not, and models with more of them forget more. With W = U S V' and the
k leading singular triplets (s_i, u_i, v_i) of W + dW, direction i is an intruder if `max_j |U_j' u_i| < epsilon`, over
all left singular vectors of W. Scaling the intruders by lambda restores some of what was forgotten:
`dW + (lambda - 1) sum_i s_i u_i v_i'`. The update's rank grows by the number of intruders, and nothing is truncated.

Quantized weights are dequantized first, and GPT-2's transposed ones are taken as [d_out, d_in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, stack, to_fp32
from fedlora.adapters.lowrank import Svd
from fedlora.common.errors import AdapterError

from .adapted import AdaptedModel, merge_folds, read
from .parts import factored
from .weights import weight_of

# These are also the defaults of PEFT's reduce_intruder_dimension.
K, EPSILON = 10, 0.5


def count(weight: Tensor, delta: LoraFactors, k: int = K, epsilon: float = EPSILON, base: Tensor | None = None) -> int:
    """The number of intruders among the k leading directions of `weight + dW`.

    Args:
        weight: the base model's weight W, [d_out, d_in].
        delta: the factors of dW.
        k: number of leading directions to examine.
        epsilon: a direction is an intruder if its cosines with all left singular vectors of W are below this number.
        base: these vectors, [d_out, min(d_out, d_in)]; computed from `weight` when left out.
    """
    return _intruders(weight, delta, k, epsilon, base)[1].numel()


def remove(weight: Tensor, delta: LoraFactors, lam: float, k: int = K, epsilon: float = EPSILON) -> LoraFactors:
    """The update with its intruders scaled.

    Args:
        weight: the base model's weight W, [d_out, d_in].
        delta: the factors of dW, of rank r.
        lam: the paper's lambda; with 1 nothing changes, with 0 the intruders are removed from W + dW.
        k, epsilon: as in `count`.

    Returns:
        Factors of rank r + the number of intruders; `delta` itself if there are none.

    Raises:
        AdapterError: lambda is below 0.
    """
    if not lam >= 0:
        raise AdapterError(f"intruders are scaled by lambda = {lam}, expected 0 (removes them) to 1 (changes nothing)")
    if lam == 1:
        return delta
    u, s, vh = _intruders(weight, delta, k, epsilon)
    if not s.numel():
        return delta
    like, root = to_fp32(delta.down), s.sqrt()
    found = LoraFactors(A=(root[:, None] * vh).to(like), B=(u * root).to(like), scaling=1.0)
    return stack([delta, found], [1.0, lam - 1.0])


def without_intruders(
    model: AdaptedModel, adapter: AdapterState, lam: float, k: int = K, epsilon: float = EPSILON
) -> AdapterState:
    """The adapter with the intruders of every module scaled. The head is unchanged; cores are multiplied into A.

    Args:
        model: the base model; folds that were merged into its weights are taken out again.
        adapter: the whole trained adapter, for all or some of the base's modules.
        lam: with 1 nothing changes, with 0 the intruders are removed.
        k, epsilon: as in `count`.

    Raises:
        AdapterError: the adapter has modules that the base lacks, or lambda is below 0.
    """
    odd = sorted(set(adapter.lora) - set(model.layers))
    if odd:
        raise AdapterError(
            f"the base has no adapted module {odd[0]!r}; removing intruders needs the model.name and "
            "lora.target-modules that the adapter was trained with"
        )
    merge_folds(model, None, ())
    lora = {name: remove(weight_of(model.layers[name]), f, lam, k, epsilon) for name, f in adapter.lora.items()}
    return AdapterState(lora=lora, tensors=adapter.tensors)


class BaseSpectra:
    """The left singular vectors of every adapted weight of the unchanged base model, computed once.

    They are kept on the CPU in fp16, with d_out * min(d_out, d_in) numbers for each weight, since the vectors of all
    weights would fill a GPU. Rounding to fp16 changes a cosine by less than 5e-4.
    """

    def __init__(self, model: AdaptedModel) -> None:
        merge_folds(model, None, ())
        self._model = model
        self._left = {name: _left(weight_of(layer)).to("cpu", torch.float16) for name, layer in model.layers.items()}

    def counts(self, k: int = K, epsilon: float = EPSILON) -> dict[str, int]:
        """Module -> number of intruders of the installed adapter and of merged folds; an anchor does not count."""
        installed = factored(self._model, read(self._model)).lora
        return {
            name: count(weight_of(layer), installed[name], k, epsilon, self._left[name])
            for name, layer in self._model.layers.items()
        }


def leading(matrix: Tensor, k: int) -> Svd:
    """The k leading singular triplets, from all eigenpairs of the smaller Gram matrix in fp64.

    The spectra of trained weights fall so slowly that subspace iterations take longer than the whole eigenproblem.

    Args:
        matrix: a matrix [d_out, d_in].
        k: number of triplets, at least 1; at most min(d_out, d_in) are returned.

    Returns:
        U [d_out, k], S [k] in descending order, Vh [k, d_in], in fp64, with zeros where S is below 1e-7 of the largest.
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
