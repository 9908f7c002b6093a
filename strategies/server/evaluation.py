"""Evaluates the global adapter on the server's held-out rows."""

from __future__ import annotations

import logging
from dataclasses import replace

from fedlora.adapters import AdapterState
from fedlora.common.errors import RunError
from fedlora.common.events import emit
from fedlora.config import Config
from fedlora.data import Example, encode, prepare, usable_rows
from fedlora.data.values import rows_by_value, values_without_rows
from fedlora.models import adapted
from fedlora.models.intruders import BaseSpectra
from fedlora.tasks.by_value import Scored, scored
from fedlora.tasks.predict import predict

from ..base import ServerState, Strategy

_log = logging.getLogger("fedlora")


class HeldOutEvaluator:
    """Evaluates the global adapter on the held-out rows, which are encoded only once."""

    def __init__(self, config: Config, run_id: int) -> None:
        self._config, self._run_id = config, run_id
        self._model = adapted.adapted_model(config.model, config.lora)
        self.spectra = BaseSpectra(self._model) if config.evaluate.intruders else None
        split = prepare(config)
        rows = split.heldout
        if not len(rows):
            raise RunError(
                "no held-out rows to evaluate on; raise data.heldout-fraction or set evaluate.server = false"
            )
        tokenizer, task = self._model.base.tokenizer, self._model.task
        self._examples: list[Example] = encode(rows, tokenizer, config.data, task)
        self._groups = {}
        if by := config.evaluate.by:
            self._groups = rows_by_value(rows.select(usable_rows(rows, tokenizer, config.data, task)), by, config.data)
            if lacking := values_without_rows(split, by, config.data):
                _log.warning(
                    "evaluate.by = %r: no held-out row has the value %s, so that it has no metrics; raise "
                    "data.heldout-fraction or data.heldout-max",
                    by,
                    ", ".join(map(repr, lacking)),
                )

    def __call__(self, strategy: Strategy, state: ServerState, learned: AdapterState) -> Scored:
        """The metrics of the global adapter, by value of `evaluate.by` too.

        Args:
            strategy: the run's strategy.
            state: the server's state.
            learned: the strategy's global adapter at this state.
        """
        emit("evaluate-start", examples=len(self._examples))
        # clients in this process share the weights, into which a run may merge its folds
        beside = adapted.place(self._model, state.folds.parts, self._config.anchor, self._run_id)
        if state.folds.parts and not beside:
            learned = strategy.global_adapter(replace(state, folds=state.folds.emptied()))
        adapted.install(self._model, learned)
        predictions = predict(
            self._model.task,
            self._model.model,
            self._examples,
            self._config.evaluate.batch_size,
            self._model.base.pad_id,
            on_batch=lambda done, total: emit("evaluate-step", done=done, total=total),
        )
        return scored(self._model.task, predictions, self._config.evaluate.by, self._groups)
