"""Terms that are added to a client's loss, as gradients: FedProx's by the client's config, others by the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from fedlora.adapters import AdapterState, keep_factors, map_tensors, pruned_rank
from fedlora.adapters.state import difference, is_missing
from fedlora.common.errors import ConfigError
from fedlora.exchange import Plan
from fedlora.models.trainable import Pair, Trainable

from .projections import COMPLEMENT


def add_proximal(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of FedProx's term mu/2 |theta - theta_start|^2 (https://arxiv.org/abs/1812.06127, eq. 2)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=mu)


def proximal(trained: Trainable, mu: float, of: str) -> Callable[[], None]:
    """What adds the gradient of FedProx's term for a client whose training begins now.

    Args:
        trained: what the client trains, as it is when training begins.
        mu: weight of the term; 0: none.
        of: "factors": the term is of all that is trained. "update": of the updates, `mu/2 sum |dW - dW_start|_F^2`, and
            of what is trained in full.
    """
    if not mu:
        return lambda: None
    alone, pairs = trained.parameters, []
    if of == "update":
        cores = {id(pair.core) for pair in trained.pairs}
        alone = [parameter for parameter in trained.others if id(parameter) not in cores]
        pairs = [(pair, pair.B.detach().clone(), _down(pair).clone()) for pair in trained.pairs]
    start = [parameter.detach().clone() for parameter in alone]

    def add() -> None:
        add_proximal(alone, start, mu)
        for pair, B, down in pairs:
            add_proximal_update(pair, B, down, mu)

    return add


def add_proximal_update(pair: Pair, B: Tensor, down: Tensor, mu: float) -> None:
    """Add the gradient of `mu/2 |dW - dW_start|_F^2` to one module's factors and its core.

    It does not depend on how the updates are divided into factors. With D = R A, or A without a core:
    `dB = mu s^2 (B (D D') - B_0 (D_0 D'))` and `dD = mu s^2 ((B'B) D - (B'B_0) D_0)`, in O(r^2 (d_in + d_out)).

    Args:
        pair: the factors now.
        B, down: B_0 and D_0, where training began.
        mu: weight of the term.
    """
    weight, b, d = mu * pair.scaling**2, pair.B.detach(), _down(pair)
    if pair.B.grad is not None:
        pair.B.grad.add_(b @ (d @ d.T) - B @ (down @ d.T), alpha=weight)
    if pair.A.grad is None and (pair.core is None or pair.core.grad is None):
        return
    of_down = (b.T @ b) @ d - (b.T @ B) @ down
    if pair.A.grad is not None:
        pair.A.grad.add_(of_down if pair.core is None else pair.core.detach().T @ of_down, alpha=weight)
    if pair.core is not None and pair.core.grad is not None:
        pair.core.grad.add_(of_down @ pair.A.detach().T, alpha=weight)


def _down(pair: Pair) -> Tensor:
    """R A, or A where there is no core."""
    return pair.A.detach() if pair.core is None else pair.core.detach() @ pair.A.detach()


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


def _dynamic(pairs: Sequence[Pair], weight: float, kept: AdapterState | None) -> Callable[[], None]:
    """Of `-<g, x> + weight/2 |x - x_start|^2`, for all factors and cores x that are trained (FedDyn).

    SCAFFOLD's is that with `g = c_k - c` and the weight 0.
    """
    trained: list[tuple[nn.Parameter, Tensor]] = []
    for pair in pairs:
        own = None if kept is None else kept.lora.get(pair.module)
        for factor, mine in ((pair.A, own and own.A), (pair.B, own and own.B), (pair.core, own and own.R)):
            if factor is not None and factor.requires_grad:
                g = None if mine is None or is_missing(mine) else mine.to(factor)
                # the gradient at x is weight x less this
                trained.append((factor, weight * factor.detach() + (0.0 if g is None else g)))

    def add() -> None:
        for factor, less in trained:
            if factor.grad is not None:
                factor.grad.add_(weight * factor.detach() - less)

    return add


def kept_before(own: AdapterState | None, control: AdapterState | None, plan: Plan) -> AdapterState | None:
    """The g of the plan's term: FedDyn's is what the client kept, and SCAFFOLD's is `c_k - c`; None: zeros.

    Args:
        own: what `kept_after` gave in an earlier round.
        control: SCAFFOLD's c, which the server sent.
        plan: of the round.
    """
    if keeps(plan) != CONTROL or control is None:
        return own
    return map_tensors(lambda _, c, mine: -c if mine is None else mine - c, control, own or AdapterState())


def kept_after(
    kept: AdapterState | None, start: AdapterState, end: AdapterState, plan: Plan, rate: float = 0.0
) -> AdapterState | None:
    """What a client keeps for its next round: `g - w (x_end - x_start)` of the trained factors; None if nothing.

    For FedDyn, w is the term's weight. For SCAFFOLD it is one over the sum of the learning rates: the result is c_k of
    Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, eq. 4, option II.

    Args:
        kept: g, from `kept_before`.
        start, end: the client's adapter before and after training.
        plan: of the round.
        rate: sum of the steps' learning rates.
    """
    if not (name := keeps(plan)):
        return None
    weight = 1 / rate if name == CONTROL else next(term.weight for term in plan.terms if term.name == DYNAMIC)
    lora = {name: factors for name, factors in end.lora.items() if plan.modules is None or name in plan.modules}
    change = keep_factors(difference(AdapterState(lora=lora), start), plan.train)
    return map_tensors(lambda _, d, g: -weight * d + (0.0 if g is None else g), change, kept or AdapterState())


# What a term's name stands for: a function of (pairs, weight, value), called when a client's training begins. What it
# returns is called after each pass, and adds the term's gradient.
Term = Callable[[Sequence[Pair], float, float], Callable[[], None]]
TERMS: Mapping[str, Term] = MappingProxyType({"tail": _tail, "prior": _prior})
DYNAMIC, CONTROL = "dynamic", "control"  # FedDyn's and SCAFFOLD's, which need what the client kept of earlier rounds
_KEEPING = (DYNAMIC, CONTROL)
_KNOWN = (*TERMS, *_KEEPING, COMPLEMENT)


def keeps(plan: Plan) -> str:
    """The plan's term for which a client keeps something from round to round; empty if there is none."""
    return next((term.name for term in plan.terms if term.name in _KEEPING), "")


def check_terms(plan: Plan) -> None:
    """Raises ConfigError where the server asks for a term that this client does not know."""
    for term in plan.terms:
        if term.name not in _KNOWN:
            raise ConfigError(
                f"the server asks for the term {term.name!r}, this client knows {', '.join(_KNOWN)}; "
                "install the same version of fedlora on both sides"
            )


def penalty(pairs: Sequence[Pair], plan: Plan, kept: AdapterState | None = None) -> Callable[[], None]:
    """What adds the gradients of the plan's terms, after each pass.

    Args:
        pairs: the factors of each module, as they are when training begins.
        plan: whose terms `check_terms` has seen.
        kept: g, from `kept_before`.
    """
    terms = [TERMS[term.name](pairs, term.weight, term.value) for term in plan.terms if term.name in TERMS]
    terms += [_dynamic(pairs, term.weight, kept) for term in plan.terms if term.name in _KEEPING]

    def add() -> None:
        for term in terms:
            term()

    return add
