"""MixLoRA: several LoRA experts beside a layer, of which a router picks a few for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.common.errors import AdapterError, ConfigError

from ..algebra import uniform
from ..state import LoraFactors
from .base import MASK, AdapterKind, Parts, Place, check_positive


@dataclass(frozen=True)
class MixLora(AdapterKind):
    """`y = W x + c sum_{e in top k} w_e B_e A_e x`, with `w = softmax(R x)` cut to its k largest, whose sum is then 1.

    Li et al. 2024, "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
    https://arxiv.org/abs/2404.15159. Trained are R [E, d_in], and A_e [r, d_in] and B_e [d_out, r] of E experts. The
    loss gets `a E sum_e F_e P_e` for each layer, where F_e is the share of the tokens that have e among their k, and
    P_e the mean of softmax(R x)_e over the tokens. It is a k where R x is equal for all experts, and larger where
    experts that are picked more often are more probable too. Padding counts for nothing. The loss that a run records is
    without this term.

    Experimental: how the authors add the term up over layers is not confirmed, and neither are the number of experts
    and whether F counts all k experts of a token. Differences: each adapted layer has a router of its own, on the
    layer's own input, where the paper has one for each FFN block, so that gate, up and down may pick different experts;
    attention layers are mixtures too, unless `lora.target-modules` leaves them out; all experts are computed and those
    outside the k multiplied by 0, so that a step costs as much as LoRA of rank E r; with dropout, the router's input
    has been through it. The mean of the parts is not the mean of the updates.

    Over clients, expert e of a layer is averaged by n_k N_ke, where n_k is the number of a client's rows, and N_ke the
    share of its routed tokens of the round that e had. With equal shares this is the mean by rows, as of R. An expert
    that no token was routed to stays as it was. A strategy that is no weighted mean averages experts like all else.

    What is added depends on x by more than a product: there is no dW, and no LoRA checkpoint. With one expert, or with
    equal ones, it is LoRA. A client uploads E (r (d_in + d_out) + d_in + 1) numbers for a layer. `lora.alpha` is
    not used.

    Args:
        experts: E.
        top_k: k, the number of experts for each token.
        balance: a, the weight of the loss of uneven routing; 0: none.
        deviation: standard deviation of R's entries at first.
        scale: c, which is LoRA's alpha / r.
    """

    experts: int = 8
    top_k: int = 2
    balance: float = 0.001
    deviation: float = 0.02
    scale: float = 2.0

    name: ClassVar[str] = "mixlora"
    matrix: ClassVar[bool] = False
    sees_mask: ClassVar[bool] = True
    counted: ClassVar[str] = "N"
    routed: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(
                f"lora.kind-options: mixlora's top_k = {self.top_k}, expected a number from 1 to experts = "
                f"{self.experts}"
            )
        for option, value in (("balance", self.balance), ("deviation", self.deviation)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"lora.kind-options: mixlora's {option} = {value}, expected a number of at least 0")
        check_positive("mixlora", scale=self.scale)

    @property
    def adds_to_loss(self) -> bool:
        return self.balance > 0

    def shapes(self, place: Place) -> dict[str, tuple[int, ...]]:
        count, rank = self.experts, place.rank
        own = {"A": (count, rank, place.d_in), "B": (count, place.d_out, rank), "R": (count, place.d_in)}
        return {**own, "N": (count, 1)}

    def rank(self, parts: Parts) -> int:
        return parts["A"].shape[1]

    def initial(self, place: Place, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes(place)
        A, R = uniform(shapes["A"], generator), torch.empty(shapes["R"], device=generator.device)
        return {
            "A": A,
            "B": torch.zeros(shapes["B"]),
            "R": R.normal_(0, self.deviation, generator=generator) if self.deviation else R.zero_(),
            "N": torch.zeros(shapes["N"]),
        }

    def forward(self, x: Tensor, parts: Parts, constants: Parts, place: Place) -> Tensor:
        probable = torch.softmax(F.linear(x, parts["R"]), dim=-1)
        chosen = torch.zeros_like(probable).scatter(-1, probable.topk(self.top_k, dim=-1).indices, 1.0)
        weights = probable * chosen
        weights = weights / weights.sum(dim=-1, keepdim=True)
        if torch.is_grad_enabled():
            mask = constants.get(MASK)
            if self.balance:
                weights = _WithTerm.apply(weights, self.balance * unevenness(probable, chosen, mask))
            own = chosen if mask is None else chosen * mask[..., None]
            weights = _Counted.apply(weights, parts["N"], own.flatten(0, -2).sum(dim=0)[:, None])
        low = F.linear(x, parts["A"].flatten(0, 1)).unflatten(-1, (self.experts, -1))
        mixed = (low * weights[..., None]).flatten(-2)
        return self.scale * F.linear(mixed, parts["B"].movedim(0, 1).flatten(1))

    def factors(self, parts: Parts, constants: Parts, place: Place) -> LoraFactors:
        raise AdapterError("mixlora adds no fixed matrix to a layer, and so has no factors B A")


def unevenness(probable: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
    """`E sum_e F_e P_e`.

    Args:
        probable: the router's softmax, [..., E].
        chosen: 1 for the experts of a token, else 0, [..., E].
        mask: 1 for tokens, 0 for padding, [...]; None: all are tokens.
    """
    own = torch.ones_like(probable[..., :1]) if mask is None else mask[..., None]
    count = own.sum().clamp(min=1)
    F_e, P_e = ((value * own).flatten(0, -2).sum(dim=0) / count for value in (chosen, probable))
    return probable.shape[-1] * (F_e * P_e).sum()


class _WithTerm(torch.autograd.Function):
    """(y, term) -> y. In the backward pass the term's gradient is 1, as if it had been added to the loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, term: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        (term,) = ctx.saved_tensors
        return upstream[0], torch.ones_like(term)


class _Counted(torch.autograd.Function):
    """(y, N, n) -> y. In the backward pass the gradient of N is n."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, N: Tensor, n: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (n,) = ctx.saved_tensors
        return upstream[0], n.clone(), None
