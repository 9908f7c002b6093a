"""An adapter for a new task, generated from trained ones by a conditional variational autoencoder (ICM-LoRA)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.adapters import AdapterState, LoraFactors, inner, leading, norm, pad, svd_each
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.config import Config
from fedlora.models import load_base
from fedlora.models.peft_files import read_adapter, save_checkpoint

from .export import check_base, check_free, find
from .merged import check_alike
from .task_vectors import task_vector

KL_WEIGHT = 0.005  # the paper's
_LATENT, _HIDDEN, _RATE = 16, 128, 2e-3
_ROWS = 64  # of a task, whose hidden states condition the generator


@dataclass(frozen=True)
class Canon:
    """How the adapters of one base model are vectors of one length, in one gauge.

    Each module's update is `U S V'`, and stands in the vector as `U sqrt(S)` and `sqrt(S) V'`, cut or filled up to one
    rank. The sign of each direction is such that the largest entry of its column of U is above zero. Two adapters with
    the same updates are then the same vector, whatever their factors are.

    Attributes:
        shapes: module -> (d_out, d_in), in the order of the vector.
        tensors: name -> shape of each tensor trained in full; these come last.
        rank: of every module.
    """

    shapes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, torch.Size]
    rank: int

    @classmethod
    def of(cls, states: Sequence[AdapterState], rank: int) -> Canon:
        """That of these adapters.

        Raises:
            AdapterError: their modules or tensors differ.
        """
        kinds = [
            (
                {name: (f.B.shape[0], f.A.shape[1]) for name, f in sorted(state.lora.items())},
                {name: tensor.shape for name, tensor in sorted(state.tensors.items())},
            )
            for state in states
        ]
        if any(kind != kinds[0] for kind in kinds):
            raise AdapterError(
                "the adapters have other modules or tensors than each other; take adapters of one lora.target-modules"
            )
        return cls(*kinds[0], rank)

    def vector(self, state: AdapterState) -> Tensor:
        """The adapter as a vector, in fp32."""
        parts: list[Tensor] = []
        for svd in svd_each({name: state.lora[name] for name in self.shapes}, self.rank).values():
            factors = pad(leading(svd, self.rank), self.rank)
            parts += [factors.B.flatten(), factors.A.flatten()]
        return torch.cat([*parts, *(state.tensors[name].float().flatten() for name in self.tensors)])

    def adapter(self, vector: Tensor) -> AdapterState:
        """The adapter that a vector stands for."""
        lora: dict[str, LoraFactors] = {}
        at = 0
        for name, (d_out, d_in) in self.shapes.items():
            b, a = d_out * self.rank, d_in * self.rank
            B, A = vector[at : at + b].reshape(d_out, self.rank), vector[at + b : at + b + a].reshape(self.rank, d_in)
            lora[name] = LoraFactors(A=A.clone(), B=B.clone(), scaling=1.0)
            at += a + b
        tensors: dict[str, Tensor] = {}
        for name, shape in self.tensors.items():
            tensors[name] = vector[at : at + shape.numel()].reshape(shape).clone()
            at += shape.numel()
        return AdapterState(lora=lora, tensors=tensors)


class Generator(nn.Module):
    """A conditional variational autoencoder of adapters, given as vectors, under a vector of their task.

    It sees an adapter's coordinates in the span of all that it is trained on, so that it has as many inputs as there
    are adapters, less one, and what it generates lies in that span.
    """

    center: Tensor
    basis: Tensor
    spread: Tensor
    middle: Tensor
    width: Tensor

    def __init__(self, vectors: Tensor, conditions: Tensor, seed: int) -> None:
        """Prepare for training.

        Args:
            vectors: the adapters, [n, D], with n of at least 2.
            conditions: the vectors of their tasks, [n, d].
            seed: of the first weights and of all noise.
        """
        super().__init__()
        self.noise = torch.Generator().manual_seed(seed)
        center = vectors.mean(dim=0)
        _, s, vh = torch.linalg.svd((vectors - center).double(), full_matrices=False)
        known = s > 1e-6 * s[0].clamp(min=1e-30)
        spread = (s[known] / len(vectors) ** 0.5).float()
        self.register_buffer("center", center)
        self.register_buffer("basis", vh[known].float())
        self.register_buffer("spread", spread)
        middle = conditions.mean(dim=0)
        self.register_buffer("middle", middle)
        self.register_buffer("width", (conditions - middle).square().mean().sqrt().clamp(min=1e-6))
        size, seen = len(spread), conditions.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(
                nn.Linear(size + seen, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, 2 * _LATENT),
            )
            self.decoder = nn.Sequential(
                nn.Linear(_LATENT + seen, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, size),
            )

    def fit(self, vectors: Tensor, conditions: Tensor, steps: int) -> float:
        """Train on all adapters in every step; the last loss, `MSE + 0.005 KL`."""
        coordinates = ((vectors - self.center) @ self.basis.T) / self.spread
        seen = self._seen(conditions)
        search = torch.optim.Adam(self.parameters(), lr=_RATE)
        last = 0.0
        for step in range(steps):
            for group in search.param_groups:
                group["lr"] = _RATE * (1 - step / steps)
            mean, log_variance = self.encoder(torch.cat([coordinates, seen], dim=1)).chunk(2, dim=1)
            drawn = mean + torch.randn(mean.shape, generator=self.noise) * (0.5 * log_variance).exp()
            made = self.decoder(torch.cat([drawn, seen], dim=1))
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1).mean()
            loss = F.mse_loss(made, coordinates) + KL_WEIGHT * divergence
            search.zero_grad()
            loss.backward()
            search.step()
            last = float(loss.detach())
        return last

    def draw(self, condition: Tensor) -> Tensor:
        """A vector of an adapter for a task, with z from N(0, I)."""
        with torch.no_grad():
            z = torch.randn(1, _LATENT, generator=self.noise)
            coordinates = self.decoder(torch.cat([z, self._seen(condition[None])], dim=1))[0]
        return self.center + (coordinates * self.spread) @ self.basis

    def _seen(self, conditions: Tensor) -> Tensor:
        return (conditions - self.middle) / self.width


@dataclass(frozen=True)
class Likeness:
    """How like a generated adapter is to one from which it was learned.

    Attributes:
        adapter: folder of that one.
        cosine: between the updates of both, over all modules.
        task: cosine between the vectors of both tasks, less the mean of all tasks.
    """

    adapter: Path
    cosine: float
    task: float


def generate(
    adapters: Sequence[Path], config: Config, out: Path, *, rank: int = 8, steps: int = 2000, seed: int = 0
) -> list[Likeness]:
    """Write an adapter for a new task, drawn from a generator that was trained on adapters of other tasks.

    Experimental: ICM-LoRA (Shao et al. 2025, "In-Context Meta LoRA Generation", https://arxiv.org/abs/2501.17635) is
    known here from its abstract and from notes on its code. As there, adapters are flattened and standardised, the
    condition is the mean hidden state of the base at the last token of the task's rows, the loss is `MSE + 0.005 KL`,
    and an adapter is decoded from z of N(0, I). Differences: adapters are put into one gauge first (see `Canon`); the
    autoencoder is a small one over coordinates in the span of the adapters, instead of twelve convolutions over their
    entries, so that what is generated is a combination of them; and the paper trains on many checkpoints of each task.
    With few adapters the result is little more than an interpolation.

    Args:
        adapters: at least 2 runs, or folders of PEFT checkpoints with their runs' configuration, of one base model.
        config: its section data names the rows of the new task.
        out: folder to write; it must be new or empty.
        rank: of every module; larger adapters are cut to their best approximation.
        steps: of the generator's training.
        seed: of the generator.

    Returns:
        Each adapter with its likeness to the generated one, in the order of `adapters`.

    Raises:
        ConfigError: a number is out of bounds.
        AdapterError: the adapters do not fit each other, or `out` is not empty.
    """
    if len(adapters) < 2:
        raise ConfigError(f"fedlora generate: {len(adapters)} adapter, expected at least 2 to learn from")
    for name, value in (("rank", rank), ("steps", steps)):
        if value < 1:
            raise ConfigError(f"fedlora generate: --{name} is {value}, expected at least 1")
    check_free(out)
    sources = [find(path) for path in adapters]
    check_alike(sources)
    if config.model.task != sources[0].config.model.task:
        raise ConfigError(
            f"the new task has model.task = {config.model.task}, the adapters {sources[0].config.model.task}; name a "
            "CONFIG of the same task"
        )
    states = [read_adapter(source.adapter) for source in sources]
    canon = Canon.of(states, rank)
    base = load_base(sources[0].config.model)
    check_base(sources[0], base)
    tasks = torch.stack([task_vector(base, each, _ROWS) for each in (*(s.config for s in sources), config)])
    conditions, new = tasks[:-1], tasks[-1]
    vectors = torch.stack([canon.vector(state) for state in states])
    generator = Generator(vectors, conditions, seed)
    loss = generator.fit(vectors, conditions, steps)
    made = canon.adapter(generator.draw(new))
    middle = conditions.mean(dim=0)
    found = [
        Likeness(source.adapter, cosine(made, state), float(F.cosine_similarity(task - middle, new - middle, dim=0)))
        for source, state, task in zip(sources, states, conditions, strict=True)
    ]
    nearest = sources[max(range(len(found)), key=lambda index: found[index].task)]
    save_checkpoint(made, out, nearest.config.model, {**nearest.about, "made": _made(found, config, rank, loss)})
    return found


def cosine(one: AdapterState, other: AdapterState) -> float:
    """Between two adapters' updates, over all modules together."""
    shared = sorted(one.lora.keys() & other.lora.keys())
    product = sum(inner(one.lora[name], other.lora[name]) for name in shared)
    sizes = [sum(norm(f) ** 2 for f in state.lora.values()) ** 0.5 for state in (one, other)]
    return product / max(sizes[0] * sizes[1], 1e-30)


def _made(found: Sequence[Likeness], config: Config, rank: int, loss: float) -> dict[str, Any]:
    return {
        "by": "fedlora generate",
        "said": f"not trained, but generated for the rows of {config.data.source} from {len(found)} trained adapters "
        "(ICM-LoRA, experimental); what is said of training and data is that of the adapter with the most similar task",
        "rank": rank,
        "generator-loss": loss,
        "from": [{"adapter": str(e.adapter), "cosine": e.cosine, "task-cosine": e.task} for e in found],
    }
