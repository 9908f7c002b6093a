"""What a base model's hidden states say of a task: one vector for a data set."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from fedlora.common.errors import ConfigError
from fedlora.config import Config
from fedlora.data import encode, prepare
from fedlora.models import BaseModel
from fedlora.tasks.registry import task_of
from fedlora.tasks.text import TextTask


def task_vector(base: BaseModel, config: Config, most: int) -> Tensor:
    """The mean, over rows of the clients, of the base model's last hidden state at each row's last token, in fp32.

    Args:
        base: the model, without an adapter.
        config: names the rows and the task.
        most: largest number of rows, taken from the clients in turn.

    Raises:
        ConfigError: the task is not one on texts.
        DataError: rows cannot be used.
    """
    task = task_of(config.model)
    if not isinstance(task, TextTask):
        raise ConfigError(f"model.task = {config.model.task}: only tasks on texts have a last token; name another one")
    split = prepare(config)
    longest = max(len(part) for part in split.parts)
    turns = chain.from_iterable((part[at] for part in split.parts if at < len(part)) for at in range(longest))
    chosen = [int(index) for index, _ in zip(turns, range(most), strict=False)]
    examples = encode(split.rows.select(chosen), base.tokenizer, config.data, task)
    total, size = torch.zeros(0), config.evaluate.batch_size
    with torch.no_grad():
        for first in range(0, len(examples), size):
            batch = task.collate(examples[first : first + size], base.pad_id)
            inputs = {name: batch[name].to(base.device) for name in ("input_ids", "attention_mask")}
            hidden = base.model(**inputs, output_hidden_states=True).hidden_states[-1].float().cpu()
            last = hidden[torch.arange(len(hidden)), batch["attention_mask"].sum(dim=1) - 1]
            total = last.sum(dim=0) if not total.numel() else total + last.sum(dim=0)
    return total / len(examples)
