"""What a node decides for itself: its data, the folder of its base model, its limits. No server can change them.

The node's config is given to `flower-supernode --node-config`; the run's config comes from the server. Text from a
server may name neither a file nor a folder on the node, unless the node allows it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from math import inf
from pathlib import Path

from flwr.app import Context

from fedlora import config as configuration
from fedlora.common import accountant, assets
from fedlora.common.errors import ConfigError
from fedlora.config import MOST_RANK, Config, DataConfig, PrivacyConfig, Scalar, TrainConfig
from fedlora.data import PACKAGED
from fedlora.tasks.registry import task_of

from . import peers

# Environment variables, set when a simulation is started, where server and clients belong to one user. A run's config
# cannot set them.
ALLOW_FILES = "FEDLORA_ALLOW_FILES"
PLUGINS = "FEDLORA_PLUGINS"
# Key of the node -> key of the run that it replaces. The server compares fingerprints, and so refuses another model.
_OF_MODEL = {"device": "model.device", "model": "model.name"}
_OF_DATA = {
    "form": "data.form",
    "prompt-column": "data.prompt-column",
    "response-column": "data.response-column",
    "messages-column": "data.messages-column",
    "text-column": "data.text-column",
    "image-column": "data.image-column",
    "label-column": "data.label-column",
}
_LIMITS = ("max-rank", "max-steps", "max-length", "max-batch", "max-memory-mb")
_OTHERS = (
    "max-epsilon",
    "delta",
    "partition-id",
    "partition-ids",
    "num-partitions",
    "data",
    "rank",
    "state",
    "resident",
    "allow-files",
    "plugins",
    "peers",
)
_OF_WORKER = ("worker", "worker-idle", "worker-stall", "node-pid", "server", "ca", "key")
_OF_EDGE = ("region", "region-ca")
_KNOWN = (*_OF_MODEL, *_OF_DATA, *_LIMITS, *_OTHERS, *_OF_WORKER, *_OF_EDGE)
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_IDS = re.compile(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", re.ASCII)
_MOST_HOSTED = 4096


def ruled(config: Config, node: Mapping[str, Scalar]) -> Config:
    """The run's config, with the keys replaced that the node decides.

    If the node has a data file of its own, the node also decides its columns and its partition: columns that its config
    does not name have their default names, whatever the run says. Otherwise `data.source` may be a packaged set or a
    hub id. The same holds for `model.name`.

    Args:
        config: the run's config as the server sent it.
        node: the node's own config.

    Raises:
        ConfigError: a key of the node's config refuses the run, or is wrong itself; the message names the key.
    """
    _check_names(node)
    check_plugins(config, node)
    config = _with_own_data(config, node)
    own = {ours: node[key] for key, ours in _OF_MODEL.items() if key in node}
    if "model" in node and node["model"] != config.model.name:
        own["model.revision"] = ""  # the run's revision belongs to the model that the server names
    config = configuration.parse(own, config, where="node config") if own else config
    if "model" not in node and not _allows_files(node):
        _check_public("model.name", config.model.name, _packaged_models(), "model")
    _check_privacy(config, node)
    limit(node, "max-memory-mb")  # only checked here; memory.limit enforces it
    most_tokens, most_examples = limit(node, "max-length"), limit(node, "max-batch")
    if most_tokens and config.data.max_length > most_tokens and task_of(config.model).unit == "tokens":
        raise _too_much(f"data.max-length = {config.data.max_length}", "max-length", most_tokens)
    per_step = config.train.batch_size * config.train.accumulate
    if most_examples and per_step > most_examples:
        raise _too_much(f"train.batch-size * train.accumulate = {per_step}", "max-batch", most_examples)
    if most_examples and config.evaluate.batch_size > most_examples:
        raise _too_much(f"evaluate.batch-size = {config.evaluate.batch_size}", "max-batch", most_examples)
    return config


def check(node: Mapping[str, Scalar]) -> None:
    """Check a node's own config, before it connects to a server.

    Raises:
        ConfigError: a key is wrong; the message names it.
    """
    _check_names(node)
    hosted(node)
    for key in _LIMITS:
        limit(node, key)
    most, delta = most_epsilon(node)
    if most:
        accountant.epsilon(1.0, 1.0, 1, delta)  # is the library there?
    rank(Config(), {key: value for key, value in node.items() if key in ("rank", "max-rank")}, 0)
    client = node.get("partition-id", 0)
    if type(client) is not int or client < 0:
        raise ConfigError(f"node config: partition-id = {client!r}, expected a number from 0")
    _allows_files(node)
    peers.public(node)
    check_plugins(Config(), node)
    if own_data(node) or any(key in node for key in _OF_DATA):
        _with_own_data(Config(), node)
    configuration.parse({ours: node[key] for key, ours in _OF_MODEL.items() if key in node}, where="node config")


def own_data(node: Mapping[str, Scalar]) -> str:
    """The path of the node's own data file; empty if its config names none."""
    return str(node.get("data", ""))


def hosted(node: Mapping[str, Scalar]) -> tuple[int, ...]:
    """The clients that this node hosts, from `partition-ids` ("0-3" or "0,2,5"); empty without this key.

    Raises:
        ConfigError: the key has another form or names a client twice; the node has `partition-id` too; or several
            clients would share one `data` file.
    """
    if "partition-ids" not in node:
        return ()
    value = node["partition-ids"]
    if "partition-id" in node:
        raise ConfigError("node config: partition-id and partition-ids both say which clients are here; keep one")
    ids: list[int] = []
    for piece in str(value).split(","):
        found = _IDS.fullmatch(piece)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if last < first or last - first >= _MOST_HOSTED - len(ids):
            shown = repr(value) if len(str(value)) <= 80 else f"{str(value)[:77]!r}..."
            raise ConfigError(
                f"node config: partition-ids = {shown}, expected numbers of clients, at most {_MOST_HOSTED}, such as "
                "'0-3' or '0,2,5'"
            )
        ids += range(first, last + 1)
    if len({*ids}) < len(ids):
        raise ConfigError(f"node config: partition-ids = {value!r} names a client twice")
    if len(ids) > 1 and own_data(node):
        raise ConfigError(
            f"node config: data names the rows of one client, but partition-ids = {value!r} are {len(ids)} clients; "
            "start a node for each file, with its own partition-id"
        )
    return tuple(ids)


def rank(config: Config, node: Mapping[str, Scalar], client_id: int) -> int:
    """The rank of a client's factors on this node: the node's `rank`, or the run's, but at most `max-rank`.

    Raises:
        ConfigError: `rank` is no positive integer or above `max-rank`, or the run's `lora.rank-pattern` is above it.
    """
    own, most = node.get("rank"), limit(node, "max-rank")
    if own is not None and (type(own) is not int or not 1 <= own <= MOST_RANK):
        raise ConfigError(f"node config: rank = {own!r}, expected a whole number from 1 to {MOST_RANK}")
    if own and most and own > most:
        raise ConfigError(f"node config: rank = {own} is above its own max-rank = {most}")
    for module, wanted in configuration.rank_pattern(config.lora).items():
        if most and wanted > most:
            raise _too_much(f"lora.rank-pattern: {module} = {wanted}", "max-rank", most)
    wanted = own or configuration.client_rank(config.lora, client_id)
    return min(wanted, most) if most else wanted


def check_steps(config: TrainConfig, node: Mapping[str, Scalar], steps: int) -> None:
    """Check that a round has no more steps than the node allows.

    Args:
        config: the run's section train, for the message.
        node: the node's own config.
        steps: number of steps of one round on this node.

    Raises:
        ConfigError: there are more steps than `max-steps`.
    """
    most = limit(node, "max-steps")
    if most and steps > most:
        asked = f"train.steps = {steps}" if config.steps else f"train.epochs = {config.epochs:g} ({steps} steps here)"
        raise _too_much(asked, "max-steps", most)


def limit(node: Mapping[str, Scalar], key: str) -> int:
    """One of the node's limits; 0 if its config does not have this key."""
    value = node.get(key, 0)
    if type(value) is not int or value < 0 or (key in node and value < 1):
        raise ConfigError(f"node config: {key} = {value!r}, expected a positive integer")
    return value


def most_epsilon(node: Mapping[str, Scalar]) -> tuple[float, float]:
    """What all runs together may cost the rows of this node: `max-epsilon` at `delta`; (0, delta) without a limit.

    Raises:
        ConfigError: one of the keys is no number in its range, or `delta` stands alone.
    """
    most, delta = node.get("max-epsilon", 0.0), node.get("delta", PrivacyConfig().delta)
    if isinstance(most, bool) or not isinstance(most, int | float) or ("max-epsilon" in node and not 0 < most < inf):
        raise ConfigError(f"node config: max-epsilon = {most!r}, expected a number above 0")
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise ConfigError(f"node config: delta = {delta!r}, expected a number above 0 and below 1")
    if "delta" in node and not most:
        raise ConfigError("node config: delta is that of max-epsilon, which is not set; set both")
    return float(most), float(delta)


def _check_privacy(config: Config, node: Mapping[str, Scalar]) -> None:
    """Raise ConfigError if this node has a limit of epsilon, and the run has something that no account covers."""
    most, _ = most_epsilon(node)
    if not most:
        return
    asked, level = "", config.privacy.level
    if level != "example":
        asked = f"privacy.level = {level}, by which this node adds no noise; the run needs example"
    elif config.privacy.epsilon > most:
        asked = f"privacy.epsilon = {config.privacy.epsilon:g}, which is more than {most:g}"
    elif config.evaluate.clients:
        asked = "evaluate.clients = true, whose metrics have no noise; the run needs false"
    if asked:
        raise ConfigError(
            f"this node limits what its rows may cost (node config: max-epsilon), and the run has {asked}"
        )


def _check_names(node: Mapping[str, Scalar]) -> None:
    """Raise ConfigError for keys that resemble a known one, since a mistyped limit would not limit anything.

    Keys that resemble none are accepted, since they may belong to another app.
    """
    for key in node:
        near = [] if key in _KNOWN else get_close_matches(key.replace("_", "-").lower(), _KNOWN, n=1, cutoff=0.8)
        if near:
            raise ConfigError(f"node config: unknown key {key!r}; did you mean {near[0]!r}?")


def _with_own_data(config: Config, node: Mapping[str, Scalar]) -> Config:
    columns = {ours: node[key] for key, ours in _OF_DATA.items() if key in node}
    path = own_data(node)
    if not path:
        if columns:
            keys = ", ".join(key for key in _OF_DATA if key in node)
            raise ConfigError(f"node config: {keys} describes a file of the node's own, but data names none")
        if not _allows_files(node):
            _check_public("data.source", config.data.source, PACKAGED, "data")
        return config
    if not Path(path).exists():
        raise ConfigError("node config: data does not name a file or folder on this node")
    default = DataConfig()
    data = replace(
        config.data,
        source=path,
        partition="iid",
        heldout_fraction=0.0,
        prompt_column=default.prompt_column,
        response_column=default.response_column,
        messages_column=default.messages_column,
        text_column=default.text_column,
        image_column=default.image_column,
        label_column=default.label_column,
    )
    config = replace(config, data=data, federation=replace(config.federation, clients=1, min_clients=1))
    return configuration.parse(columns, config, where="node config")


def _allows_files(node: Mapping[str, Scalar]) -> bool:
    own = node.get("allow-files", os.environ.get(ALLOW_FILES) == "1")
    if type(own) is not bool:
        raise ConfigError(f"node config: allow-files = {own!r}, expected true or false")
    return own


def check_plugins(config: Config, node: Mapping[str, Scalar], statistic: str = "") -> None:
    """Check, before anything is imported, that the node allows all code that the run names.

    Args:
        config: the run's config.
        node: the node's own config.
        statistic: the statistic that the server asks for, if any.

    Raises:
        ConfigError: the run names code that the node's `plugins` does not.
    """
    allowed = node.get("plugins", os.environ.get(PLUGINS, ""))
    if not isinstance(allowed, str):
        raise ConfigError(f"node config: plugins = {allowed!r}, expected names such as 'mypkg.mine:MyTask', or any")
    names = {name.strip() for name in allowed.split(",")}
    named = [
        ("model.task", config.model.task),
        ("train.optimizer", config.train.optimizer),
        ("lora.kind", config.lora.kind),
        *(("privacy.stages", stage.strip()) for stage in config.privacy.stages.split(",")),
        ("the statistic of round 0", statistic),
    ]
    for key, name in named:
        if ":" in name and not {"any", name} & names:
            shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}..."
            raise ConfigError(
                f"{key} = {shown} is not part of fedlora, and this node imports no other code that a server names; to "
                "allow it, set plugins = that name in the node's config"
            )


def _check_public(key: str, name: str, packaged: Mapping[str, object] | frozenset[str], own_key: str) -> None:
    """Raise ConfigError unless the name is that of a packaged model or set, or can only be a hub id."""
    if name in packaged or (_HUB_ID.fullmatch(name) and Path(name).suffix.lower() not in _FILES and not _exists(name)):
        return
    shown = repr(name) if len(name) <= 80 else f"{name[:77]!r}..."
    raise ConfigError(
        f"{key} = {shown} is neither a packaged name nor a hub id, and this node opens no file that a server names; "
        f"set {own_key} in the node's config, or allow-files = true"
    )


_FILES = frozenset({".json", ".jsonl", ".csv", ".tsv", ".parquet", ".npz", ".gz", ".gguf"})


def _exists(name: str) -> bool:
    return os.path.lexists(name)


def _packaged_models() -> frozenset[str]:
    return frozenset(name for name, asset in assets.known().items() if asset.kind == "model")


def _too_much(asked: str, key: str, most: int) -> ConfigError:
    return ConfigError(f"the run asks for {asked}, but this node allows at most {most} (node config: {key})")


def config_of(context: Context) -> Config:
    """The run's config on this node; see `ruled`."""
    items = tuple((key, type(value), value) for key, value in context.run_config.items())
    return ruled(_parsed(items), context.node_config)


@functools.lru_cache(maxsize=4)
def _parsed(items: tuple[tuple[str, type, Scalar], ...]) -> Config:
    """A run's config, parsed once, since every message carries it and checking it takes milliseconds.

    Args:
        items: key, type and value of each entry; the type distinguishes 1 from true.
    """
    return configuration.parse({key: value for key, _, value in items}, where="run config")


def client_id_of(context: Context) -> int:
    return int(context.node_config.get("partition-id", context.node_id))
