"""Causal language modelling: the model learns to predict each labelled token from the tokens before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.common.errors import DataError, ModelError
from fedlora.config import DataConfig
from fedlora.data import Example, form_of
from fedlora.data.chats import encode_chat
from fedlora.data.conversations import conversation, text
from fedlora.data.forms import each, end_token, too_short, unanswered
from fedlora.data.rendering import Template

from .base import Batch
from .losses import IGNORED, labelled_logits, look_at, output_layer, token_losses
from .scores import COMMON, Predictions, common, exact_match
from .text import TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_FIRST = 12  # tokens of the pass that tries a base model
# When later tokens change, earlier logits of a causal model change only by rounding and int8's outliers; those of an
# encoder change by a third or more of the change of later logits. This share is the limit between the two.
_LEAK = 0.03


@dataclass(frozen=True)
class CausalLM(TextTask):
    """Predicting the next token, in texts or in the assistant's part of conversations.

    Conversations are rendered with the tokenizer's chat template. The loss is taken over the assistant's words and the
    token that ends its turn. If a tokenizer has no template, a conversation is "prompt\\nresponse" and the end token.
    Some templates render an assistant's turn differently once more turns follow, for instance without its reasoning;
    such a turn is context, and not in the loss. With form text, the loss is taken over all tokens and the end token.
    Examples longer than `data.max-length` are cut (see `fedlora.data.chats`); a text is cut at its end.

    Labels are the tokens themselves at positions in the loss, and -100 elsewhere; the model shifts them.
    """

    forms: ClassVar[tuple[str, ...]] = ("chat", "prompt", "sharegpt", "alpaca", "text")
    metrics: ClassVar[frozenset[str]] = COMMON | {"perplexity", "exact-match"}
    peft_type: ClassVar[str] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    kind: ClassVar[str] = "causal language model"

    def unusable(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig
    ) -> tuple[dict[int, str], dict[int, str]]:
        form = form_of(rows.column_names, data, self)
        if form == "text":
            column, faults = each(rows, lambda row: _text(row, data.text_column))
            idle = too_short([words or "" for words in column], tokenizer, least=2)
            return {at: why for at, why in idle.items() if at not in faults}, faults
        found, faults = each(rows, lambda row: unanswered(row, form, data))
        return {at: why for at, why in enumerate(found) if why}, faults

    def encode(
        self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> tuple[Sequence[Example | None], dict[int, str]]:
        form = form_of(rows.column_names, data, self)
        if not len(rows):
            return [], {}
        if form == "text":
            return _encode_texts(rows[:][data.text_column], tokenizer, data.max_length), {}
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} gives no character offsets, which are needed to find the response in a "
                f"conversation; use a model with a tokenizer.json, or data.form = 'text'"
            )
        render = Template(tokenizer, data)

        def read(row: Any) -> Example:
            chat = encode_chat(conversation(row, form, data), render, data.max_length)
            labels = np.where(chat.learned, chat.ids, IGNORED).tolist()
            return Example({"input_ids": chat.ids.tolist(), "labels": labels}, chat.whole, chat.cut)

        return each(rows, read)

    def learned(self, example: Example) -> Sequence[bool]:
        return [place > 0 and token != IGNORED for place, token in enumerate(example["labels"])]

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def check_architecture(self, name: str, settings: PreTrainedConfig) -> None:
        if settings.is_encoder_decoder:
            raise ModelError(
                f"{name}: a {settings.model_type} model is an encoder and a decoder, but model.task = "
                "'causal-lm' needs a decoder alone; choose another model, or model.task = 'classification'"
            )

    def first_tokens(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Tensor:
        """Two rows with the same first half."""
        ids = torch.randint(vocabulary, (2, _FIRST), generator=torch.Generator().manual_seed(0))
        ids[1, : _FIRST // 2] = ids[0, : _FIRST // 2]
        return ids

    def check_first(self, logits: Tensor, name: str, kind: str) -> None:
        change = (logits[0] - logits[1]).abs()
        early, late = float(change[: _FIRST // 2].max()), float(change[_FIRST // 2 :].max())
        if early > _LEAK * late:
            raise ModelError(
                f"{name}: {kind} predicts a token from later ones too (with other later tokens, "
                f"earlier logits change by {early:.2g}), so that its loss would mean nothing for model.task = "
                "'causal-lm'; choose a causal model, or model.task = 'classification'"
            )

    def prepare(self, model: nn.Module) -> None:
        look_at(model)

    def outputs(self, settings: PreTrainedConfig) -> int:
        return int(settings.vocab_size)

    def narrowed(self, model: nn.Module) -> nn.Module | None:
        return output_layer(model)

    def counts(self, batch: Batch) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORED).sum(dim=1)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return token_losses(model, batch)

    def predict(self, model: nn.Module, batch: Batch, adapters: Sequence[str] | None = None) -> Predictions:
        logits, targets, rows = labelled_logits(model, batch, adapters)
        return Predictions.of_logits(logits, targets, rows)

    def scores(self, predictions: Predictions) -> dict[str, float]:
        """The common metrics, perplexity, and exact match.

        Exact match is the share of examples in which each labelled token is the most probable one after the true
        prefix. For these, greedy generation gives exactly the label.
        """
        found = common(predictions)
        found["perplexity"] = math.exp(min(found["loss"], 700.0))
        correct = predictions.predicted == predictions.targets
        return found | {"exact-match": exact_match(predictions.rows, correct)}


def _text(row: Mapping[str, Any], column: str) -> str:
    return "" if row[column] is None else text(row, column)


def _encode_texts(column: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    examples = []
    for ids in tokenizer(column, verbose=False)["input_ids"]:
        whole = [*ids, *end_token(ids, tokenizer)]
        kept = whole[:length]
        arrays = {"input_ids": kept, "labels": list(kept)}
        examples.append(Example(arrays, len(whole), "end" if len(kept) < len(whole) else ""))
    return examples
