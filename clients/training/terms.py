"""Terms that are added to a client's loss, as gradients: FedProx's by the client's config, others by the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from fedlora.adapters import pruned_rank
from fedlora.common.errors import ConfigError
from fedlora.exchange import Plan
from fedlora.models.trainable import Pair

from .projections import COMPLEMENT


def add_proximal(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term mu/2 |theta - theta_start|^2 (https://arxiv.org/abs/1812.06127, eq. 2)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def add_tail_penalty(pairs: Sequence[Pair], weight: float, gamma: float) -> None:
    """Add the gradient of `weight * sum |B tail|_F |A tail|_F`, which shrinks the last ranks (HetLoRA's self-pruning).

    Cho et al. 2024, https://arxiv.org/abs/2401.06432, Section 4.

    Args:
        pairs: the factors of each module.
        weight: weight of the term.
        gamma: the tail begins after row ceil(gamma r), but not before the second row.
    """
    for A, B in ((pair.A, pair.B) for pair in pairs):
        keep = pruned_rank(A.shape[0], gamma)
        a, b = A.detach()[keep:], B.detach()[:, keep:]
        size_a, size_b = a.norm(), b.norm()
        if A.grad is not None and float(size_a) > 0:
            A.grad[keep:].add_(a * (weight * size_b / size_a))
        if B.grad is not None and float(size_b) > 0:
            B.grad[:, keep:].add_(b * (weight * size_a / size_b))


def _tail(pairs: Sequence[Pair], weight: float, gamma: float) -> Callable[[], None]:
    return lambda: add_tail_penalty(pairs, weight, gamma)


def _prior(pairs: Sequence[Pair], weight: float, _: float) -> Callable[[], None]:
    """Of `weight/2 |phi - theta|^2`, where phi are the factors and theta what they are now, when training begins.

    It is `beta KL(N(phi, sigma^2) || N(theta, sigma^2))` with `weight = beta / sigma^2`.
    """
    factors = [factor for pair in pairs for factor in (pair.A, pair.B)]
    start = [factor.detach().clone() for factor in factors]
    return lambda: add_proximal(factors, start, weight)


# What a term's name stands for: a function of (pairs, weight, value), called when a client's training begins. What it
# returns is called after each pass, and adds the term's gradient.
Term = Callable[[Sequence[Pair], float, float], Callable[[], None]]
TERMS: Mapping[str, Term] = MappingProxyType({"tail": _tail, "prior": _prior})


def check_terms(plan: Plan) -> None:
    """Raises ConfigError where the server asks for a term that this client does not know."""
    for term in plan.terms:
        if term.name not in (*TERMS, COMPLEMENT):
            raise ConfigError(
                f"the server asks for the term {term.name!r}, this client knows {', '.join((*TERMS, COMPLEMENT))}; "
                "install the same version of fedlora on both sides"
            )


def penalty(pairs: Sequence[Pair], plan: Plan) -> Callable[[], None]:
    """What adds the gradients of the plan's terms, after each pass.

    Args:
        pairs: the factors of each module, as they are when training begins.
        plan: whose terms `check_terms` has seen.
    """
    terms = [TERMS[term.name](pairs, term.weight, term.value) for term in plan.terms if term.name in TERMS]

    def add() -> None:
        for term in terms:
            term()

    return add
