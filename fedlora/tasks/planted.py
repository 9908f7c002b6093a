"""Planted regression: a microscope for methods of aggregation, in which the best adapter is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.common.errors import ConfigError, ModelError
from fedlora.config import Config, DataConfig, client_parts

from .base import Batch
from .classification import Classification
from .losses import inputs_of
from .probed import LAYER, Probed, original
from .scores import Predictions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig

SOURCE = "planted"
_SEED = 0  # of the planted matrices, which are the same in every run


@dataclass(frozen=True)
class Planted(Classification):
    """Learning a planted low-rank change of one linear layer, from the features that an encoder has for real texts.

    The model is an encoder and one more layer, `probe`: `y = W_0 x`, where x [d] is the mean of the encoder's last
    hidden states over a text's tokens, scaled to the norm sqrt(d). W_0 [width, d] is random with rows of norm 1. The
    encoder and W_0 are frozen, and the adapter is on `probe` alone. Every group of rows, which is one client's, has
    targets of its own: `y_g = (W_0 + U_g) x` with

        U_g = sum_i [i < held_g] s_i u_i v_i^T + shift ||U|| D_g.

    The directions u_i and v_i are orthonormal, s_i falls as (i + 1)^-decay, and ||U||_F = ||W_0||_F for the whole sum.
    `held_g` is `rank`, or with halvings `rank / 2^(g mod halvings)`, at least 1: group 0 has all directions, group 1
    the first half of them, and so on. D_g is a random matrix of rank `rank` less the mean of all of these, so that
    `sum_g D_g = 0`; the mean square of its norm is 1.

    All groups have the same texts. The mean loss over all groups and texts is therefore smallest at the mean of U_g
    over the groups, U*, and the metric is the distance to it: `distance = sqrt(sum ||dW x - U* x||^2 / sum ||U* x||^2)`
    over the held-out texts, where dW is what was learned: 1 at the start, 0 at the best. Rows that are held out are
    missing from their groups, so that the best adapter for the training rows alone differs from U* a little if groups
    differ.

    Args:
        labels: number of groups; set by `model.labels`, and equal to `federation.clients`.
        width: number of outputs of `probe`.
        rank: rank of the planted change.
        decay: exponent of the fall of its singular values; 0: all are equal.
        halvings: number of groups with different numbers of directions; 0: all groups have all of them.
        shift: size of the groups' own differences, as a multiple of ||U||.
    """

    metrics: ClassVar[frozenset[str]] = frozenset({"loss", "distance"})
    lower: ClassVar[frozenset[str]] = frozenset({"loss", "distance"})
    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"
    pipeline: ClassVar[str] = "feature-extraction"
    kind: ClassVar[str] = "encoder with a probe"

    width: int = 192
    rank: int = 16
    decay: float = 0.5
    halvings: int = 0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.rank < 1 or self.rank > self.width:
            raise ValueError("expected 1 <= rank <= width")
        if self.halvings < 0 or self.shift < 0:
            raise ValueError("expected halvings and shift of at least 0")

    def check_config(self, config: Config) -> None:
        _, clients = client_parts(config.data, config.federation.clients)
        for key, got, expected, why in (
            ("data.source", config.data.source, SOURCE, "its rows have groups"),
            ("data.label-column", config.data.label_column, "group", "a group decides a row's targets"),
            ("lora.target-modules", config.lora.target_modules, LAYER, "the best change of this layer is known"),
            ("model.quantization", config.model.quantization, "none", "the targets belong to exact weights"),
            ("model.labels", self.labels, clients, "each client has one group"),
        ):
            if got != expected:
                raise ConfigError(f"model.task = 'planted': {key} = {got!r}, expected {expected!r}, since {why}")

    def check_rows(self, rows: Dataset, data: DataConfig) -> None:
        """Nothing: groups beyond the clients' are nobody's."""

    def auto_class(self) -> Any:
        return Probed

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": self.width}

    def check_architecture(self, name: str, settings: PreTrainedConfig) -> None:
        if self.rank > settings.hidden_size:
            raise ModelError(
                f"{name}: its encoder has {settings.hidden_size} features, too few for a change of rank {self.rank}; "
                "lower the rank in model.task-options, or choose a larger encoder"
            )

    def added(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """What the adapter adds to the outputs, [rows, width], and the features x [rows, d]."""
        more = {} if adapters is None else {"adapter_names": list(adapters)}
        found = model(**inputs_of(model, batch), **more)
        (x,) = found.hidden_states
        return found.logits.float() - x @ original(self.width, x.shape[1]).to(x).T, x

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Half of the squared error of each text, as a mean over the outputs."""
        added, x = self.added(model, batch, None)
        return self._loss(added, x, batch), torch.arange(len(x), device=x.device)

    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        added, x = self.added(model, batch, adapters)
        best = x @ self.changes(x.shape[1]).mean(dim=0).to(x).T
        groups = batch["labels"].to(x.device)
        more = {"missed": (added - best).square().sum(dim=1), "planted": best.square().sum(dim=1)}
        rows, certain = torch.arange(len(x), device=x.device), torch.ones(len(x), device=x.device)
        return Predictions(rows, groups, groups, certain, self._loss(added, x, batch), more)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        missed, planted = (predictions.more[name].double().sum() for name in ("missed", "planted"))
        return {"loss": float(predictions.losses.double().mean()), "distance": float((missed / planted).sqrt())}

    def changes(self, inputs: int) -> Tensor:
        """U_g of all groups, fp32 [groups, width, inputs]."""
        return _changes(self, inputs)

    def _loss(self, added: Tensor, x: Tensor, batch: Batch) -> Tensor:
        changes, groups = self.changes(x.shape[1]).to(x), batch["labels"].to(x.device)
        wanted = torch.empty_like(added)
        for group in groups.unique():
            own = groups == group
            wanted[own] = x[own] @ changes[group].T
        return 0.5 * (added - wanted).square().mean(dim=1)


@lru_cache(maxsize=4)
def _changes(task: Planted, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank, groups = task.rank, torch.arange(task.labels)
    left, right = (torch.linalg.qr(drawn(size, rank))[0] for size in (task.width, inputs))
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -task.decay
    values *= task.width**0.5 / values.norm()
    held = (rank // 2 ** (groups % task.halvings)).clamp(min=1) if task.halvings else torch.full_like(groups, rank)
    planted = torch.stack([(left[:, :count] * values[:count]) @ right[:, :count].T for count in held.tolist()])
    if not task.shift:
        return planted.float()
    own = drawn(task.labels, task.width, rank) @ drawn(task.labels, rank, inputs)
    own -= own.mean(dim=0)
    own *= task.shift * (task.width * task.labels) ** 0.5 / own.norm()
    return (planted + own).float()
