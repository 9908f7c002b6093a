"""Tasks by name. A task is imported only when it is asked for, so that this module loads no torch."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from fedlora.common.errors import ConfigError
from fedlora.common.registry import Registry
from fedlora.config import Config, DataConfig, ModelConfig
from fedlora.data.forms import columns_by_form

if TYPE_CHECKING:
    from .base import Task

NAMES: dict[str, str] = {
    "causal-lm": "fedlora.tasks.causal_lm:CausalLM",
    "classification": "fedlora.tasks.classification:Classification",
    "image-classification": "fedlora.tasks.image_classification:ImageClassification",
    "image-text": "fedlora.tasks.image_text:ImageText",
    "frozen-encoder": "fedlora.tasks.frozen_encoder:FrozenEncoder",
    "planted": "fedlora.tasks.planted:Planted",
}

TASKS = Registry(
    noun="task",
    key="model.task",
    options_key="model.task-options",
    base="fedlora.tasks.base:Task",
    method="losses",
    names=NAMES,
)

# The attributes that every task's class must have; see `Task`.
_SAID = ("forms", "metrics", "peft_type", "pipeline", "kind")


def is_own(model: ModelConfig) -> bool:
    """Whether the task is a user's own class, which may be missing on this machine."""
    return ":" in model.task


@lru_cache(maxsize=32)
def task_of(model: ModelConfig) -> Task:
    """The task that `model.task` names, with the options of `model.task-options` and those that other keys set.

    Raises:
        ConfigError: there is no such task, it cannot be imported, it is not complete, or an option is wrong.
    """
    cls = TASKS.resolve(model.task)
    if lacking := [name for name in _SAID if not hasattr(cls, name)]:
        raise ConfigError(
            f"model.task = {model.task!r}: {cls.__name__} has no attribute {lacking[0]!r}; see fedlora.tasks.base.Task"
        )
    known = columns_by_form(DataConfig())
    if not cls.forms or not {*cls.forms} <= known.keys():
        raise ConfigError(
            f"model.task = {model.task!r}: {cls.__name__}.forms = {cls.forms!r}, expected some of {', '.join(known)}"
        )
    if "loss" not in cls.metrics:
        raise ConfigError(f"model.task = {model.task!r}: {cls.__name__}.metrics has no 'loss', which every run records")
    options, fixed = TASKS.parse(model.task_options), cls.options_of(model)
    if twice := sorted(options.keys() & fixed.keys()):
        raise ConfigError(f"model.task-options: {twice[0]} is set by model.{twice[0].replace('_', '-')}; leave it out")
    return TASKS.load(model.task, **fixed, **options)


def check_task(config: Config) -> Task:
    """The run's task, after a check that the other keys fit it; no model or data is loaded.

    Raises:
        ConfigError: as in `task_of`, or another key does not fit the task.
    """
    task = task_of(config.model)
    if config.train.augment and "image" not in task.forms:
        raise ConfigError(
            f"train.augment = {config.train.augment!r} changes images, but model.task = {config.model.task!r} reads "
            "none; remove it"
        )
    task.check_config(config)
    return task
