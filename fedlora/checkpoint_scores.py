"""A PEFT checkpoint on held-out rows, beside the base that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftModel

from fedlora.config import Config
from fedlora.data import encode, prepare
from fedlora.errors import AdapterError, ModelError
from fedlora.evaluate import evaluate
from fedlora.models import load_base


def compare_with_base(adapter: Path, config: Config) -> dict[str, dict[str, float]]:
    """Metrics of the base as it is and with the adapter, on the run's held-out rows.

    Raises:
        ModelError: the adapter was trained on another base.
        AdapterError: the checkpoint does not fit the model.
    """
    about = adapter / "fedlora.json"
    trained_on = json.loads(about.read_text(encoding="utf-8")).get("base") if about.is_file() else None
    base = load_base(config.model)
    if trained_on not in (None, base.fingerprint):
        raise ModelError(
            f"{adapter} was trained on base {trained_on}, model.name = {config.model.name!r} is {base.fingerprint}"
        )
    try:
        model = PeftModel.from_pretrained(base.model, str(adapter))  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError, KeyError) as error:
        raise AdapterError(f"{adapter} does not fit {config.model.name}: {str(error).splitlines()[0]}") from error
    examples = encode(prepare(config).heldout, base.tokenizer, config.data, config.model.task, config.model.labels)

    def score() -> dict[str, float]:
        return evaluate(model, examples, config.evaluate.batch_size, base.pad_id)

    with model.disable_adapter():
        bare = score()
    fresh_head = " with a fresh head" if config.model.task == "classification" else ""
    return {f"untouched base{fresh_head}": bare, "with the adapter": score()}
