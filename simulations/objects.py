"""Objects that a caller gives to `fedlora.run`, and the keys of the configuration that stand for them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedlora.common import given
from fedlora.common.errors import ConfigError, ModelError, StrategyError
from fedlora.config import Config
from fedlora.data.given import is_per_client, joined, table
from fedlora.models.base.given import write


def keys_of(held: ExitStack, base: Config, changed: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the configuration that stand for the given objects.

    Args:
        held: releases the objects when it is closed.
        base: the configuration without the objects.
        changed: the keys that the caller changes in that configuration.
        objects: the objects, under the names "data", "model" and "strategy".

    Raises:
        FedLoraError: one of the objects cannot be used.
    """
    flat: dict[str, Any] = {}
    if "data" in objects:
        flat |= _of_data(held, base, changed, objects["data"])
    if "model" in objects:
        flat |= {"model.name": _of_model(held, objects["model"]), "model.revision": ""}
    if "strategy" in objects:
        flat |= {"strategy.name": _of_strategy(held, objects["strategy"]), "strategy.options": ""}
    return flat


def given_in(config: Config) -> list[str]:
    """Those of "data", "model" and "strategy" that are objects in this process."""
    names = {"data": config.data.source, "model": config.model.name, "strategy": config.strategy.name}
    return [what for what, name in names.items() if given.is_here(name)]


def _of_data(held: ExitStack, base: Config, changed: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """The keys of the section data for these rows, and the number of clients."""
    # the configuration's subset, split and revision belong to its own source
    hub = {"data.subset": "", "data.split": "train", "data.revision": ""}
    if isinstance(data, str | Path):
        return hub | {"data.source": str(data)}
    if not is_per_client(data):
        name = _held(held, table(data), "rows")
        partition = changed.get("data.partition", base.data.partition)
        by = changed.get("data.partition-by", base.data.partition_by)
        # with "auto", only packaged sets have a column for natural clients
        return (
            hub | {"data.source": name} | ({"data.partition": "iid"} if (partition, by) == ("natural", "auto") else {})
        )
    rows, column, clients = joined(data)
    for key, value in (("federation.clients", clients), ("data.partition", "numbered"), ("data.partition-by", column)):
        if changed.get(key, value) != value:
            raise ConfigError(
                f"fedlora.run: {key} = {changed[key]!r}, but data has the rows of {clients} clients; leave out {key}"
            )
    name = _held(held, rows, "rows")
    return hub | {
        "data.source": name,
        "data.partition": "numbered",
        "data.partition-by": column,
        "federation.clients": clients,
    }


def _of_model(held: ExitStack, model: Any) -> str:
    if isinstance(model, str | Path):
        return str(model)
    if not isinstance(model, tuple | list) or len(model) != 2:
        got = f"{len(model)} things" if isinstance(model, tuple | list) else f"a {type(model).__name__} alone"
        raise ModelError(f"model: got {got}, expected a name, a path, or (model, tokenizer)")
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="fedlora-model-")))
    plain, tokenizer = model
    write(plain, tokenizer, folder)
    return _held(held, folder, type(plain).__name__)


def _of_strategy(held: ExitStack, strategy: Any) -> str:
    if isinstance(strategy, str):
        return strategy
    if isinstance(strategy, type):
        raise StrategyError(f"strategy: got the class {strategy.__name__}, expected an object: {strategy.__name__}()")
    return _held(held, strategy, type(strategy).__name__)


def _held(held: ExitStack, thing: Any, label: str) -> str:
    name = given.hold(thing, label)
    held.callback(given.release, name)
    return name
