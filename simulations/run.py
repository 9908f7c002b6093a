"""`fedlora.run`: one federation on this machine, from Python or from the command line."""

from __future__ import annotations

import secrets
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedlora.adapters import AdapterState
from fedlora.common import events
from fedlora.common.errors import ConfigError
from fedlora.config import Config, Scalar, find_preset, flatten, parse, read_toml
from fedlora.data.given import table
from fedlora.models import adapted
from fedlora.models.peft_files import read_any
from fedlora.results.run_folder import folder_of, nothing_left, resumed, stamp, stored
from fedlora.trained.evaluate import score

from .checks import check
from .engines.clock import TimedGrid
from .engines.local import SERVER, LocalGrid, NodeConfigs
from .engines.traces import traces_of
from .objects import given_in, keys_of

if TYPE_CHECKING:
    from ..strategies.base import Strategy

_LIBRARIES = r"(transformers|peft|torch|accelerate|bitsandbytes|datasets|flwr|tensorboard)\b"


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a run.

    Attributes:
        folder: the folder with all of the run's files.
        rounds: the record of each round, as in result.json.
        config: the run's configuration.
    """

    folder: Path
    rounds: Sequence[Mapping[str, Any]] = field(repr=False)
    config: Config = field(repr=False)

    @cached_property
    def adapter(self) -> AdapterState:
        """The trained adapter, for the unchanged base model: the sum of all updates, folds included.

        Of a kind that adds no fixed matrix, such as mixlora, it has parts by name instead of factors.
        """
        return read_any(self.folder / "adapter")

    def evaluate(self, rows: Any) -> dict[str, float]:
        """The metrics of the trained adapter on other rows.

        Args:
            rows: a list of dicts, a pandas DataFrame or a `datasets.Dataset`, with the same columns as the run's rows.

        Raises:
            DataError: the rows cannot be used.
        """
        classes = stored(self.folder).get("classes", ())
        with _quiet_libraries():
            return score(self.adapter, table(rows, "evaluate"), self.config, tuple(classes))


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    keys: Mapping[str, Any] | None = None,
    *,
    data: Any = None,
    model: Any = None,
    strategy: str | Strategy | None = None,
    listen: events.Listener | None = None,
    progress: bool = False,
    engine: Literal["local", "flower"] = "local",
    devices: Sequence[str] = (),
    at_once: int | None = None,
    resume: str | Path | None = None,
) -> Result:
    """Run a federation on this machine.

    Only warnings are printed, unless `progress` is set. Results go to a new folder in `run.dir`, by default the folder
    "runs" in the current one; `Result.folder` names it.

    Args:
        config: the name of a preset, a TOML file, a dictionary of keys, or a `Config`; the defaults when left out.
        keys: keys that are changed in that configuration, such as `{"federation.rounds": 2}`.
        data: the training rows: a name or path, as for `data.source`; a list of dicts, a pandas DataFrame or a
            `datasets.Dataset`; or one of these for each client, as a list or as a dictionary whose keys are the
            clients' ids from 0 on, which also sets `federation.clients`. One table for all clients is divided at
            random, unless the configuration names a partition and its key.
        model: a name or path, as for `model.name`, or (model, tokenizer) of transformers, of which the run uses a copy.
        strategy: a name, as for `strategy.name`, or an object of a strategy's class.
        listen: function that is called with (kind, facts) of every event.
        progress: show the same progress as `fedlora run`.
        engine: "local": all clients in this process; "flower": Flower's simulation engine.
        devices: with "local": the devices among which the clients are divided, such as "cuda:0" and "cuda:1", each
            with a process of its own.
        at_once: with "flower": the number of clients that train at the same time.
        resume: folder of a run to continue. The run keeps its configuration, and `config` must be left out.

    Raises:
        FedLoraError: the run cannot begin, or failed; the message says why in one sentence.
    """
    with ExitStack() as held, _quiet_libraries():
        objects = {
            name: thing
            for name, thing in (("data", data), ("model", model), ("strategy", strategy))
            if thing is not None
        }
        if resume is None:
            settings = _settings(held, config, flatten(keys or {}), objects)
        else:
            settings = _resumed(resume, config, flatten(keys or {}), objects)
        settings = stamp(settings)
        _refuse_elsewhere(settings, engine, devices, at_once)
        from ..strategies.configured import check_ranks

        check_ranks(settings)
        with _listening(listen, progress):
            if engine == "flower":
                from .engines import flower

                flower.run(settings, at_once or 1)
            else:
                in_process(settings, devices=devices)
        folder = folder_of(settings)
        result = Result(folder, stored(folder)["rounds"], settings)
        weakref.finalize(result, held.pop_all().close)  # Result.evaluate still needs the objects that were given
        return result


def _settings(
    held: ExitStack,
    config: str | Path | Mapping[str, Any] | Config | None,
    changed: Mapping[str, Any],
    objects: Mapping[str, Any],
) -> Config:
    """The run's configuration, in which names stand for the given objects; closing `held` releases the objects."""
    for name, key in (("data", "data.source"), ("model", "model.name"), ("strategy", "strategy.name")):
        if name in objects and key in changed:
            raise ConfigError(f"fedlora.run: {name}= and {key} = {changed[key]!r} are both given; leave out one")
    base = _base(config)
    return parse({**keys_of(held, base, changed, objects), **changed}, base, where="fedlora.run")


def _resumed(resume: str | Path, config: Any, changed: Mapping[str, Any], objects: Mapping[str, Any]) -> Config:
    """The configuration of the run in the folder `resume`, which is continued."""
    given = [*(["its first argument"] if config is not None else []), *(f"{name}=" for name in objects)]
    if given:
        raise ConfigError(
            f"fedlora.run: a run that is resumed has the configuration, the data, the model and the strategy that it "
            f"began with; leave out {' and '.join(given)}"
        )
    return resumed(Path(resume), [f"{key}={_toml(value)}" for key, value in changed.items()])


def _base(config: str | Path | Mapping[str, Any] | Config | None) -> Config:
    if isinstance(config, Config):
        return config
    if config is None:
        return Config()
    if isinstance(config, Mapping):
        return parse(flatten(config), where="fedlora.run")
    if not isinstance(config, str | Path):
        raise ConfigError(
            f"fedlora.run: got {type(config).__name__} as configuration, expected the name of a preset, a TOML file, "
            "or a dict of keys"
        )
    path = find_preset(str(config))
    return parse(read_toml(path), where=str(path))


def _toml(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _refuse_elsewhere(config: Config, engine: str, devices: Sequence[str], at_once: int | None) -> None:
    """Raise ConfigError if options do not fit, or if clients in other processes would need objects of this one."""
    if engine not in ("local", "flower"):
        raise ConfigError(f"fedlora.run: engine = {engine!r}, expected 'local' or 'flower'")
    if isinstance(devices, str):
        raise ConfigError(f"fedlora.run: devices = {devices!r}, expected a list of names, such as ['cuda:0', 'cuda:1']")
    if engine == "flower" and devices:
        raise ConfigError("fedlora.run: devices needs engine = 'local'; Flower's engine places the clients itself")
    if engine == "local" and at_once is not None:
        raise ConfigError(
            "fedlora.run: at_once needs engine = 'flower'; with the local engine, set train.clients-at-once"
        )
    objects = given_in(config)
    where = "engine = 'flower'" if engine == "flower" else "several devices" if len(devices) > 1 else ""
    if where and objects:
        raise ConfigError(
            f"fedlora.run: {where}: its clients are other processes, which cannot have the object given as "
            f"{' and '.join(objects)}; give a file, a folder or package.module:Class, or use the local engine on one "
            "device"
        )


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Within the block, deprecation warnings of libraries are not shown."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, module=_LIBRARIES)
        yield


@contextmanager
def _listening(listener: events.Listener | None, progress: bool) -> Iterator[None]:
    """Within the block, events go to the listener and, with `progress`, to the display.

    Even without a listener, one that ignores all events is set, since a run without any listener logs its progress.
    """
    with ExitStack() as stack:
        stack.enter_context(events.listen(listener or _ignore))
        if progress:
            from rich.console import Console

            from fedlora.results.display import RunDisplay

            stack.enter_context(events.listen(stack.enter_context(RunDisplay(Console(highlight=False)))))
        yield


def _local(config: Config, *given: Any) -> LocalGrid:
    """A local grid, with a virtual clock if the schedule or the record needs one."""
    from ..strategies.schedules.registry import SCHEDULES

    federation = config.federation
    if federation.traces == "equal" and not SCHEDULES.resolve(federation.schedule).overlaps:
        return LocalGrid(*given)
    traces = traces_of(federation.traces, federation.traces_options)
    traces.check(federation.clients)
    return TimedGrid(*given, traces=traces)


def _hold_folds(config: Config, run_id: int) -> None:
    """Have the folds that the clients of a run had when it was left: on a virtual clock they are not sent again."""
    from ..clients.node.held_folds import hold
    from ..strategies.server import saved_state

    folder = folder_of(config)
    if found := saved_state.load(folder / "state", stored(folder).get("key", ""), config.run.from_round):
        hold(run_id, found[0].folds)


def _ignore(kind: str, facts: Mapping[str, Any]) -> None:
    """The listener that ignores all events."""


def in_process(
    config: Config,
    server_app: ServerApp | None = None,
    client_app: ClientApp | None = None,
    devices: Sequence[str] = (),
) -> None:
    """Run the server in this process, and the clients too unless there are several devices.

    Args:
        config: the run's configuration.
        server_app: Flower's ServerApp; FedLoRA's own when left out.
        client_app: Flower's ClientApp; FedLoRA's own when left out.
        devices: the devices among which the clients are divided, each with a process of its own; the server is in this
            process, on the first device. With one device, all is in this process; with none, `model.device` is used.

    Raises:
        FedLoraError: the run failed; result.json says why.
        ValueError: `client_app` is given together with several devices.
    """
    if client_app is not None and len(devices) > 1:
        raise ValueError("run: a client_app that is given runs in this process alone; leave out devices")
    if server_app is None:
        from ..strategies.server_app import app as server_app
    cohorts = None
    if client_app is None:
        from ..clients.answering import together as cohorts
        from ..clients.client_app import app as client_app

    config = stamp(parse({"model.device": devices[0]}, config) if devices else config)
    check(config)
    run_config = config.to_flat()
    run_id = secrets.randbits(62)
    count = config.federation.clients
    own = {"num-partitions": count, "resident": True, "state": str(folder_of(config) / "clients")}
    nodes = NodeConfigs(count, lambda i: {"partition-id": i, **own})
    grid: AbstractContextManager[LocalGrid]
    if len(devices) > 1:
        from .engines.devices import DevicesGrid

        logs = folder_of(config) / "logs"
        grid = DevicesGrid(client_app, nodes, run_config, run_id, cohorts, devices=devices, logs=logs)
    else:
        if cohorts is not None:  # load and try the base model before the run, so that its faults are reported once
            adapted.adapted_model(config.model, config.lora)
        local = _local(config, client_app, nodes, run_config, run_id, cohorts)
        if config.run.resume and isinstance(local, TimedGrid):
            _hold_folds(config, run_id)
        grid = nullcontext(local)
    with nothing_left(config), grid as opened:
        server_app(opened, Context(run_id, SERVER, {}, RecordDict(), run_config))
