"""Inputs that a classifier's adapter gives chosen classes, found from the adapter alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import longest
from fedlora.models.adapted import AdaptedModel

RATE, PRIOR = 0.25, 0.01  # the paper's
_AT_ONCE = 64  # inputs per step


@dataclass(frozen=True)
class Inverted:
    """Inputs that were found for one adapter.

    Attributes:
        inputs: embeddings, [n, T, d], of those inputs that get the class that they were to get.
        labels: their classes, [n].
        tried: number of inputs that were looked for.
    """

    inputs: Tensor
    labels: Tensor
    tried: int


class Classifier:
    """The installed adapter's model as functions of input embeddings.

    Attributes:
        name: of the last layer of the head.
        head: that layer.
        mean: of the embeddings of all tokens, [d].
        spread: their standard deviations, [d].
    """

    def __init__(self, model: AdaptedModel) -> None:
        """Find the parts of the model.

        Raises:
            AdapterError: the model takes no embeddings, or its head does not end with a linear layer with a bias.
        """
        base = cast("Any", model.model.get_base_model())
        if "inputs_embeds" not in inspect.signature(base.forward).parameters:
            raise AdapterError(f"{model.config.name}: the model takes no embeddings as inputs, which are looked for")
        ends = [
            (name, module)
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear)
            and module.out_features == model.config.labels
            and {f"{name}.weight", f"{name}.bias"} <= model.tensors.keys()
        ]
        if not ends:
            raise AdapterError(
                f"{model.config.name}: its head does not end with a linear layer with a bias, which holds the "
                "distances to prototypes; take adapters of an encoder such as minilm-l6"
            )
        self.name, self.head = ends[-1]
        self._model, self._device = model, model.base.device
        self._table = base.get_input_embeddings()
        with torch.no_grad():
            table = self._embedded(torch.arange(self._table.num_embeddings))
        self.mean, self.spread = table.mean(dim=0), table.std(dim=0).clamp(min=1e-8)
        first, last = _frame(model.base.tokenizer)
        with torch.no_grad():
            self._first, self._last = self._embedded(first), self._embedded(last)
        self.most = (longest(base) or 1 << 30) - len(first) - len(last)

    def framed(self, free: Tensor) -> Tensor:
        """Embeddings [n, t, d] between those of the tokenizer's own first and last tokens."""
        first, last = (each.expand(len(free), *each.shape) for each in (self._first, self._last))
        return torch.cat([first, free, last], dim=1)

    def tokens(self, rows: int, count: int, generator: torch.Generator) -> Tensor:
        """Embeddings of tokens drawn at random, [rows, count, d]."""
        with torch.no_grad():
            return self._embedded(torch.randint(self._table.num_embeddings, (rows, count), generator=generator))

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what the head's last layer sees, [n, h]; both in fp32."""
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            mask = torch.ones(inputs.shape[:2], dtype=torch.int64, device=inputs.device)
            given = inputs.to(self._table.weight.dtype)
            logits = self._model.model(inputs_embeds=given, attention_mask=mask).logits
        finally:
            handle.remove()
        return logits.float(), seen[-1].float()

    def _embedded(self, ids: Tensor) -> Tensor:
        return self._table(ids.to(self._device)).float()


def invert(
    classifier: Classifier,
    *,
    classes: int,
    rows: int,
    tokens: int,
    steps: int,
    generator: torch.Generator,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> Inverted:
    """Search `argmin_x CE(f(x), c) + 0.01 R(x)` over soft inputs x, by Adam from the embeddings of random tokens.

    x stands in units of the spread of the model's token embeddings, and R holds its mean and variance over a batch,
    of each entry, at theirs: `R = mean_d (mean(x_d)^2 + (var(x_d) - 1)^2)`.

    Args:
        classifier: the model with the adapter.
        classes: number of classes.
        rows: number of inputs for each class.
        tokens: of each input, besides the tokenizer's own first and last ones.
        steps: of the search.
        generator: of the random tokens.
        on_done: called after each batch with the number of inputs done and of all.

    Raises:
        ConfigError: the model has no positions for so many tokens.
    """
    if tokens > classifier.most:
        raise ConfigError(
            f"fedlora recycle: --tokens is {tokens}, but the model has positions for at most {classifier.most}"
        )
    labels = torch.arange(classes).repeat(rows)  # each batch has inputs of all classes
    found: list[Tensor] = []
    kept: list[Tensor] = []
    for wanted in labels.split(_AT_ONCE):
        start = (classifier.tokens(len(wanted), tokens, generator) - classifier.mean) / classifier.spread
        free, target = nn.Parameter(start), wanted.to(start.device)
        search = torch.optim.Adam([free], lr=RATE)
        for _ in range(steps):
            logits, _ = classifier(classifier.framed(classifier.mean + classifier.spread * free))
            loss = F.cross_entropy(logits, target) + PRIOR * unlikeness(free)
            search.zero_grad()
            loss.backward()
            search.step()
        with torch.no_grad():
            inputs = classifier.framed(classifier.mean + classifier.spread * free)
            logits, _ = classifier(inputs)
        right = logits.argmax(dim=1) == target
        found.append(inputs[right])
        kept.append(target[right])
        on_done(sum(map(len, found)), len(labels))
    return Inverted(torch.cat(found), torch.cat(kept), len(labels))


def unlikeness(free: Tensor) -> Tensor:
    """How far mean and variance of each entry, over all inputs and tokens, are from 0 and 1."""
    flat = free.flatten(0, 1)
    return (flat.mean(dim=0).square() + (flat.var(dim=0, correction=0) - 1).square()).mean()


def _frame(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The tokens that the tokenizer puts before and after a text."""
    made = tokenizer("one text", return_special_tokens_mask=True)
    own: list[int] = made["special_tokens_mask"]
    ids = torch.tensor(made["input_ids"], dtype=torch.int64)
    start, end = own.index(0), own[::-1].index(0)
    return ids[:start], ids[len(ids) - end :]
