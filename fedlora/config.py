"""The run configuration: frozen dataclasses, and one parser for TOML presets, `-c` and Flower's run config.

Keys are flat and kebab-case ("lora.rank"). Values are bool, int, float or str, since Flower carries no
others; lists are comma strings ("16,8,8,4"). This module imports nothing heavy, so that a wrong key is named at once.
"""

from __future__ import annotations

import functools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from fedlora.common.errors import ConfigError, suggest

Scalar = bool | int | float | str
MOST_RANK = 4096
LONGEST_CLASS = 64  # characters of a class's name


def option(default: Any, text: str, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None):
    """A field with its help text, its choices and its bounds, all of which stand in the field's metadata."""
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class RunConfig:
    name: str = option("run", "name of the run; its results go to <run.dir>/<run.name>/<run.id>")
    id: str = option("", "name of this run's folder; empty: the time at which it starts")
    resume: bool = option(False, "continue the run in the folder run.id after its last complete round")
    by: str = option("", "person who starts the run, for the server's audit log; fedlora run --server: user@machine")
    from_round: int = option(
        -1, "with run.resume: continue from the server's state after this round; -1: after the last one", low=-1
    )
    keep: int = option(3, "number of last rounds whose state the server keeps, for run.from-round", low=1, high=100)
    dir: str = option("runs", "folder for the results of all runs")
    seed: int = option(0, "seed of everything random", low=0)
    threads: int = option(0, "torch threads of each process; 0: torch's own choice", low=0)


@dataclass(frozen=True)
class ModelConfig:
    name: str = option(
        "smollm2-135m-instruct", "base model: a packaged one (fedlora fetch lists them), a local folder, or a hub id"
    )
    revision: str = option("", "hub revision of the model (branch, tag or commit); empty: the default branch")
    task: str = option(
        "causal-lm",
        "what the model learns to do: causal-lm, classification (of texts), image-classification, image-text "
        "(of images, by a prompt for each class), or your own as package.module:Class",
    )
    task_options: str = option("", "options of the task, as 'name=value, name=value', such as 'smoothing=0.1'")
    labels: int = option(2, "classification, of texts or images: number of classes", low=2)
    head: str = option(
        "keep",
        "classification: the output layer that training starts from; keep: the model's own, if it has model.labels "
        "classes, else a new one; fresh: a new one",
        ("keep", "fresh"),
    )
    quantization: str = option("nf4", "storage format of the base model's frozen weights", ("none", "int8", "nf4"))
    compute_dtype: str = option(
        "auto",
        "number format of the computation; auto: bf16 on a GPU that supports it, fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    device: str = option("auto", "device that computes: auto, cpu, cuda, cuda:1, mps …")
    gradient_checkpointing: bool = option(
        False, "save memory in the backward pass by computing activations a second time"
    )


@dataclass(frozen=True)
class LoraConfig:
    kind: str = option(
        "lora",
        "what is trained beside a layer: lora, miss, randlora, vera, beamlora, lora-xs, loldu, dora, glora, "
        "mtl-lora, ravan, mixlora, fedalt or block-lora, or your own as package.module:Class",
    )
    kind_options: str = option("", "its options, as 'name=value, name=value'")
    init: str = option(
        "auto",
        "how the adapter starts: auto (as the strategy wants it, else uniform), uniform, lora-sb, lora-xs, lora-ga, "
        "eva, pissa, olora, loldu, orthogonal, comp-lora, given (from a trained adapter: lora.init-options = "
        "adapter=RUN), or your own as package.module:Class",
    )
    init_options: str = option("", "its options, as 'name=value, name=value'")
    rank: int = option(8, "rank of every client, unless lora.ranks is set", low=1)
    ranks: str = option("16,8,8,4", "rank per client, cyclic; empty: lora.rank for all")
    alpha: str = option("2r", "a number, or a multiple of the rank such as 2r")
    rslora: bool = option(False, "scale by alpha/sqrt(rank) instead of alpha/rank")
    dropout: float = option(0.0, "dropout before A", low=0.0, high=0.99)
    target_modules: str = option(
        "auto",
        "comma list of module name endings or regular expressions for them (vision_model.*q_proj), all-linear, or auto "
        "(attention projections)",
    )
    allocation: str = option(
        "pattern",
        "how a client's ranks are spread over the modules: pattern (lora.rank-pattern, else the client's own rank), "
        "prilora (growing with the layer); by what clients measure before round 1: eva, gelora, dynamic, colora; or "
        "with chosen layers or modules alone: flexora, diffora; or your own as package.module:Class",
    )
    allocation_options: str = option("", "its options, as 'name=value, name=value'")
    rank_pattern: str = option("", "ranks of some modules, for every client: 'k_proj=4, layers.0.mlp.up_proj=2'")


@dataclass(frozen=True)
class DataConfig:
    source: str = option(
        "chitchat",
        "training rows: a packaged set (fedlora fetch lists them), a file (.jsonl, .json, .csv, .tsv or .parquet; of "
        "images: .npz or IDX), a folder of images with a subfolder for each class, or a hub dataset id",
    )
    subset: str = option("", "name of a hub dataset's configuration")
    split: str = option("train", "name of a hub dataset's split, or of the part of an .npz file")
    revision: str = option("", "hub revision of the dataset (branch, tag or commit); empty: the default branch")
    form: str = option(
        "auto",
        "what a row holds; auto: read from the names of its columns",
        ("auto", "prompt", "chat", "alpaca", "sharegpt", "text", "label", "image"),
    )
    prompt_column: str = option("prompt", "form prompt: the column of the prompt")
    response_column: str = option("response", "form prompt: the column of the response")
    messages_column: str = option("messages", "form chat: the column of the messages, [{role, content}, …]")
    text_column: str = option("text", "forms text and label: the column of the text")
    image_column: str = option("image", "form image: the column of the image")
    label_column: str = option("label", "forms label and image: the column of the class, 0-based integers or names")
    label_names: str = option(
        "",
        "forms label and image: names of the classes in the order of their numbers, such as 'benign, malignant'; "
        "empty: the names in the rows, in alphabetical order",
    )
    chat_template: str = option(
        "", "name of one of the tokenizer's chat templates, if it has several; empty: its default template"
    )
    system_prompt: str = option("", "system message put before every conversation; empty: the chat template's own")
    partition: str = option(
        "natural",
        "how rows are divided among the clients; iid: at random; dirichlet: unequal mixtures of the key's values; "
        "natural: each client gets the rows of one value of the key; numbered: by a column with the client's number; "
        "sizes: at random, as many as data.sizes says",
        ("iid", "dirichlet", "natural", "numbered", "sizes"),
    )
    partition_by: str = option(
        "auto",
        "natural, dirichlet: the column that is the key, such as label; auto: the packaged set's own key, else the "
        "label; numbered: the column with the client's number; auto: client",
    )
    dirichlet_alpha: float = option(0.5, "dirichlet: the smaller, the more the clients' rows differ", low=1e-3)
    sizes: str = option("", "sizes: number of rows of each client, such as '400,200,100,50'")
    heldout_fraction: float = option(
        0.1, "share of all rows that no client gets, kept for the server's evaluation", low=0.0, high=0.9
    )
    heldout_max: int = option(64, "largest number of held-out rows that are evaluated; 0: all", low=0)
    test_fraction: float = option(
        0.0,
        "share of the held-out rows that is scored only once, after the last round (used by fedlora compare)",
        low=0.0,
        high=0.9,
    )
    client_test_fraction: float = option(
        0.1,
        "share of each client's own rows that it does not train on, but tests on (evaluate.clients)",
        low=0.0,
        high=0.9,
    )
    client_max: int = option(0, "largest number of rows of a client; 0: all", low=0)
    parts: str = option(
        "",
        "for baselines: which of several equal clients' parts of the rows each client gets; '0+1+2+3 of 4': one client "
        "gets the rows of all four; '2 of 4': one client gets those of the third; empty: one part for each client",
    )
    max_length: int = option(
        128, "largest number of tokens of an example; longer ones are cut (fedlora data counts them)", low=4
    )


@dataclass(frozen=True)
class FederationConfig:
    clients: int = option(
        4, "number of clients in a simulation; with a server, the largest number that may take part", low=1
    )
    rounds: int = option(3, "number of rounds: the server sends, clients train and reply, the server combines", low=1)
    fraction: float = option(1.0, "share of the clients that is asked to train in each round", low=1e-6, high=1.0)
    min_clients: int = option(1, "smallest number of usable replies in a round; fewer end the run with an error", low=1)
    round_timeout: float = option(
        43200.0,
        "seconds to wait for a round's replies; the round goes on without clients that have not replied by then, and "
        "they stop training; the default is the 12 hours that Flower gives a message; 0: no limit",
        low=0.0,
    )
    wait_timeout: float = option(
        120.0,
        "seconds to wait until federation.clients have connected, or until lost nodes have come back",
        low=0.0,
    )
    max_share: float = option(
        4.0,
        "largest weight of a client in the mean, as a multiple of the other clients' mean number of examples; 0: no "
        "limit",
        low=0.0,
    )
    max_move: float = option(
        100.0,
        "without strategy.robust: an update is ignored if it changes the model more than this many times the median of "
        "the others; 0: no limit",
        low=0.0,
    )
    max_rank: int = option(
        0, "largest rank that a node may choose (fedlora node --rank); 0: the largest of lora.ranks", low=0
    )
    max_hosted: int = option(
        0,
        "largest number of clients on one node; a node that announces more is refused; 0: federation.clients",
        low=0,
    )
    schedule: str = option(
        "synchronous",
        "rule for which clients are asked when, and when replies are combined: synchronous, buffered, fedasync, "
        "deadline, or your own as package.module:Class",
    )
    schedule_options: str = option("", "options of the schedule, as 'name=value, name=value'")
    traces: str = option(
        "equal",
        "in a simulation, how long each client's training takes, on a virtual clock: equal: the same for all; "
        "lognormal; diurnal: and only at some hours of the day; a CSV file; or your own as package.module:Class",
    )
    traces_options: str = option("", "options of the traces, as 'name=value, name=value'")
    lost_clients: str = option(
        "fail",
        "if a client was refused in every round: fail ends the run with an error after its last round; accept does not",
        ("fail", "accept"),
    )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(8, "optimizer steps of a client in each round; 0: by train.epochs", low=0)
    epochs: float = option(1.0, "with train.steps = 0: passes over the client's rows in each round", low=1e-6)
    batch_size: int = option(4, "examples per forward pass", low=1)
    accumulate: int = option(1, "forward passes per optimizer step, whose gradients are added up", low=1)
    layers_per_round: int = option(
        0, "number of layers whose adapters are trained in a round, drawn anew each round; 0: all", low=0
    )
    optimizer: str = option(
        "adamw",
        "the clients' optimizer: adamw, sgd, lora-plus, lora-rite, lora-pro, riemannian, allora, sam, glad, "
        "adamw-8bit, paged-adamw or paged-adamw-8bit (the last three need a CUDA GPU), or your own as "
        "package.module:Class",
    )
    optimizer_options: str = option("", "options of the optimizer, as 'name=value, name=value'")
    lr: float = option(1e-3, "highest learning rate of the clients", low=0.0)
    weight_decay: float = option(0.0, "decoupled weight decay, as in AdamW", low=0.0)
    schedule: str = option(
        "cosine", "how the learning rate falls over the steps of all rounds", ("cosine", "linear", "constant")
    )
    warmup_fraction: float = option(
        0.05,
        "share of the steps, at the start of what train.warmup names, in which the learning rate rises",
        low=0.0,
        high=1.0,
    )
    warmup: str = option(
        "run",
        "when the learning rate rises: run: once, at the start of the run; link: each time that a new adapter starts "
        "(after strategy.restart-every rounds; in every round of flora, florist and frlora)",
        ("run", "link"),
    )
    clip: float = option(1.0, "largest norm of a client's gradient; longer ones are scaled down; 0: no limit", low=0.0)
    clients_at_once: str = option(
        "auto",
        "number of clients that one process trains together as one batch; auto: by free memory and computing power",
    )
    augment: str = option(
        "",
        "model.task on images: how training images are changed at random, each time anew: some of flip, crop, rotate, "
        "color and erase, such as 'crop, flip'; empty: not at all",
    )
    prox_mu: float = option(
        0.0, "FedProx: weight of the penalty |theta - theta_start|^2 / 2 in a client's loss; 0: none", low=0.0
    )
    prox_of: str = option(
        "factors",
        "what the penalty of train.prox-mu keeps near its start: the factors A and B, or the update s B A",
        ("factors", "update"),
    )


@dataclass(frozen=True)
class StrategyConfig:
    name: str = option(
        "flora",
        "how the server combines the clients' replies: a strategy of docs/strategies.md, or your own as "
        "package.module:Class",
    )
    options: str = option("", "options of the strategy, such as 'similarity=cosine, lam=0.01'")
    server_optimizer: str = option(
        "none",
        "optimizer on the server, which takes a round's change as its gradient",
        ("none", "momentum", "adam", "yogi", "adagrad"),
    )
    server_lr: float = option(1.0, "server-optimizer: learning rate; adam, yogi and adagrad need about 0.01", low=0.0)
    server_beta1: float = option(0.9, "server-optimizer: decay of the first moment", low=0.0, high=0.9999)
    server_beta2: float = option(0.99, "adam, yogi: decay of the second moment", low=0.0, high=0.9999)
    server_tau: float = option(1e-3, "adam, yogi, adagrad: added to the root of the second moment", low=1e-12)
    restart_every: int = option(
        0,
        "number of rounds after which the adapter is added to the frozen model (a fold) and starts anew; 0: never",
        low=0,
    )
    correction: str = option(
        "none",
        "what keeps many local steps from biasing the result, over ffa or fedsb; feddyn: dynamic regularisation; "
        "scaffold: control variates",
        ("none", "feddyn", "scaffold"),
    )
    correction_weight: float = option(0.01, "feddyn: weight alpha of the terms that clients add", low=1e-9)
    robust: str = option(
        "none",
        "rule against poisoned replies",
        ("none", "norm-bound", "median", "trimmed-mean", "krum", "multi-krum"),
    )
    robust_bound: float = option(
        2.0, "norm-bound: largest norm of an update, as a multiple of the clients' median norm", low=1.0
    )
    robust_trim: float = option(
        0.2, "trimmed-mean: share of the clients left out at the high end, and at the low end", low=0.0, high=0.49
    )
    robust_byzantine: int = option(
        1, "krum, multi-krum: number f of poisoned clients that do no harm; needs 2 f + 3 clients in a round", low=0
    )
    robust_keep: int = option(
        0, "multi-krum: number of clients whose updates are used; 0: all but strategy.robust-byzantine", low=0
    )


@dataclass(frozen=True)
class AnchorConfig:
    max_rank: int = option(
        0,
        "largest rank of the anchor, which holds all folds (frozen updates) so far; 0: as large as needed to lose "
        "nothing",
        low=0,
    )
    base_update: str = option(
        "anchor",
        "where a client keeps folds; anchor: in a frozen adapter beside the base model; merge: in the base model's "
        "weights, which must not be quantized",
        ("anchor", "merge"),
    )


@dataclass(frozen=True)
class EvaluateConfig:
    server: bool = option(True, "evaluate the global adapter on the server's held-out rows")
    clients: bool = option(False, "let each client of a round evaluate the global adapter on its own test rows")
    every: int = option(1, "evaluate after every so many rounds; the last round is always evaluated", low=1)
    by: str = option(
        "",
        "name of a column of the rows, such as domain or label: metrics on held-out rows are also given for each of "
        "its values; empty: for all rows together alone",
    )
    batch_size: int = option(16, "examples per forward pass of an evaluation", low=1)
    intruders: bool = option(
        False,
        "after each evaluated round, count intruder dimensions: strong directions of the adapted weights that are like "
        "none of the base model's; costs an SVD of every adapted weight",
    )


@dataclass(frozen=True)
class WireConfig:
    dtype: str = option("fp32", "number format of the tensors that the server sends", ("fp32", "fp16", "bf16"))
    upload_dtype: str = option(
        "fp32",
        "number format of the tensors that clients send; in all formats but fp32, a client sends the change since the "
        "broadcast, and adds what rounding left out to its next reply",
        ("fp32", "fp16", "bf16", "int8", "int4", "sparse"),
    )
    upload_density: float = option(
        0.25,
        "with wire.upload-dtype = sparse: share of the entries that a client sends, those that changed most",
        low=1e-4,
        high=1.0,
    )
    edges: str = option(
        "forward",
        "what an edge sends of its clients' updates: forward: each one as it came; sum: their weighted mean alone, one "
        "update whatever their number, for strategies that need no more",
        ("forward", "sum"),
    )
    sum: str = option(
        "none",
        "what clients send; sketch: sketches of their updates, of one size whatever the rank, of which the server "
        "needs only the sum (flora, flexlora, florist, fedex and lora-fair; linear strategies need no sketch)",
        ("none", "sketch"),
    )
    sketch_width: int = option(
        0,
        "with wire.sum = sketch: width of a sketch; nothing is lost if it is at least the sum of the ranks of a "
        "round's clients; 0: 64; with privacy.level = client, width of the sum that gets noise, for strategies of the "
        "ideal; 0: the largest rank",
        low=0,
        high=65536,
    )
    sketch_passes: int = option(
        1,
        "with wire.sum = sketch: 2 asks clients a second time in each round, and loses less below that width",
        low=1,
        high=2,
    )


@dataclass(frozen=True)
class PrivacyConfig:
    level: str = option(
        "none",
        "whom differential privacy protects; client: all of a client's rows together, by noise that the server adds to "
        "the sum of the clipped changes; example: each row, by noise that the client adds to its clipped gradients",
        ("none", "client", "example"),
    )
    epsilon: float = option(
        0.0,
        "with privacy.level: the privacy that all rounds may spend; the noise is computed from it; 0: set "
        "privacy.noise-multiplier instead",
        low=0.0,
    )
    delta: float = option(
        1e-5,
        "the delta for which epsilon holds; it should be far below 1 over the number of those protected",
        low=1e-12,
        high=0.5,
    )
    noise_multiplier: float = option(
        0.0,
        "with privacy.level: standard deviation of the noise over privacy.clip; 0: computed from privacy.epsilon",
        low=0.0,
    )
    clip: float = option(
        1.0,
        "with privacy.level: largest norm of a client's change, or of one row's gradient; longer ones are scaled down; "
        "with privacy.clip-quantile, that of the first round",
        low=1e-9,
    )
    clip_quantile: float = option(
        0.0,
        "privacy.level = client: privacy.clip moves towards this quantile of the clients' norms, which is itself found "
        "with noise; 0: it stays",
        low=0.0,
        high=0.99,
    )
    clip_rate: float = option(0.2, "with privacy.clip-quantile: how fast privacy.clip moves", low=1e-3, high=2.0)
    start: str = option(
        "refuse",
        "privacy.level = example: what to do with a start that clients measure on their rows before round 1; noise: "
        "they clip and noise it, at the cost of one more round (lora-ga, lora-sb, and so fedsb)",
        ("refuse", "noise"),
    )
    weight_cap: int = option(
        0,
        "privacy.level = client: a client with n rows weighs min(1, n / weight-cap), so that those with fewer rows "
        "count less; 0: all weigh alike",
        low=0,
    )
    secure_sum: bool = option(
        False,
        "whether clients mask what they send, so that the server learns the sum of all replies and no client's own; "
        "at least 3 clients a round, and a strategy that needs only sums",
    )
    stages: str = option(
        "", "comma list of privacy stages, on clients and server: unchanged, or your own as package.module:Class"
    )
    stages_options: str = option(
        "", "their options, as 'stage.name=value, stage.name=value'; your own stage is called by its class's name here"
    )


@dataclass(frozen=True)
class Config:
    """One run. Every section is a frozen dataclass; `to_flat` and `parse` go to and from flat keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def to_flat(self) -> dict[str, Scalar]:
        """Flat kebab-case keys, in the order of the sections."""
        return {
            f"{section.name}.{key.name.replace('_', '-')}": getattr(getattr(self, section.name), key.name)
            for section in fields(self)
            for key in fields(getattr(self, section.name))
        }


def describe() -> list[tuple[str, Scalar, str]]:
    """`(key, default, meaning)` of every key, with the choices in the meaning."""
    rows: list[tuple[str, Scalar, str]] = []
    for key, default in Config().to_flat().items():
        section, name = key.split(".", 1)
        meta = next(f for f in fields(getattr(Config(), section)) if f.name == name.replace("-", "_")).metadata
        choices = f" [{', '.join(meta['choices'])}]" if meta["choices"] else ""
        rows.append((key, default, meta["help"] + choices))
    return rows


def parse(flat: Mapping[str, Scalar], base: Config | None = None, where: str = "config") -> Config:
    """The config with these keys changed.

    Args:
        flat: flat kebab-case keys.
        base: the config that all other keys are taken from; the defaults when left out.
        where: the source of the keys, such as a file, which error messages name.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named), or a value has a wrong type or is out of bounds.
    """
    config = base or Config()
    known = config.to_flat()
    changes: dict[str, dict[str, Scalar]] = {}
    for key, value in flat.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{suggest(key, known)}")
        section, name = key.split(".", 1)
        name = name.replace("-", "_")
        changes.setdefault(section, {})[name] = _check(where, key, value, getattr(config, section), name)
    config = replace(config, **{s: replace(getattr(config, s), **c) for s, c in changes.items()})
    return _check_together(config, where)


def load(path: Path, overrides: Iterable[str] = ()) -> Config:
    """A TOML preset, then `key=value` overrides as given on the command line.

    Raises:
        ConfigError: the file cannot be read or parsed, or `parse` refuses its keys or the overrides.
    """
    return parse(parse_overrides(overrides), parse(read_toml(path), where=str(path)), where="-c")


def find_preset(name: str) -> Path:
    """The path of a TOML file, or of the packaged preset of that name."""
    path = Path(name).expanduser()
    if path.suffix == ".toml" or path.is_file():
        return path
    from fedlora import configs  # pyright: ignore[reportAttributeAccessIssue]

    folder = Path(configs.__path__[0])
    presets = {preset.stem: preset for preset in folder.glob("*.toml")}
    if name not in presets:
        raise ConfigError(f"{name}: neither a TOML file nor a preset{suggest(name, presets)}")
    return presets[name]


def read_toml(path: Path) -> dict[str, Scalar]:
    """The flat keys of a TOML file; tables flatten to dotted keys."""
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables to dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_overrides(overrides: Iterable[str]) -> dict[str, Scalar]:
    """`key=value` strings as a dictionary; a value that is not valid TOML is taken as plain text."""
    flat: dict[str, Scalar] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"-c {item!r}: expected key=value, such as -c lora.rank=16")
        try:
            value = tomllib.loads(f"v = {text.strip()}")["v"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        flat[key.strip()] = value
    return flat


@functools.lru_cache(maxsize=64)  # read for each of many clients
def ints(key: str, text: str) -> tuple[int, ...]:
    """A comma string of positive integers."""
    try:
        values = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (0,)
    if any(value < 1 for value in values):
        raise ConfigError(f"{key}: got {text!r}, expected positive integers separated by commas, such as '16,8,8,4'")
    return values


def alpha_of(alpha: float | str, rank: int) -> float:
    """LoRA's alpha for a rank: a number as it is, "2r" as twice the rank."""
    try:
        return float(alpha[:-1] or 1) * rank if isinstance(alpha, str) and alpha.endswith("r") else float(alpha)
    except ValueError:
        raise ConfigError(
            f"lora.alpha: got {alpha!r}, expected a number or a multiple of the rank such as '2r'"
        ) from None


def client_rank(config: LoraConfig, client_id: int) -> int:
    """The rank of one client: `lora.ranks` taken cyclically, or `lora.rank`."""
    ranks = ints("lora.ranks", config.ranks)
    return ranks[client_id % len(ranks)] if ranks else config.rank


def largest_rank(config: Config) -> int:
    """The largest rank that a node may choose: `federation.max-rank`, or else the largest of `lora.ranks`."""
    ranks = ints("lora.ranks", config.lora.ranks)
    return config.federation.max_rank or max(ranks or (config.lora.rank,))


def rank_pattern(config: LoraConfig) -> dict[str, int]:
    """`lora.rank-pattern` as a mapping from regular expression to rank."""
    pattern: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in config.rank_pattern.split(","))):
        name, _, rank = item.rpartition("=")
        if not name.strip() or not rank.strip().isdigit() or int(rank) < 1:
            raise ConfigError(f"lora.rank-pattern: got {item!r}, expected module=rank, such as k_proj=4")
        pattern[name.strip()] = int(rank)
    return pattern


def label_names(data: DataConfig) -> tuple[str, ...]:
    """`data.label-names` as the names of the classes, in order; an empty tuple if the key is empty.

    Raises:
        ConfigError: a name is blank or too long or occurs twice, or there is only one.
    """
    if not data.label_names.strip():
        return ()
    names = tuple(name.strip() for name in data.label_names.split(","))
    if not all(0 < len(name) <= LONGEST_CLASS for name in names) or len({*names}) < max(2, len(names)):
        raise ConfigError(
            f"data.label-names: got {data.label_names!r}, expected two or more different names of at most "
            f"{LONGEST_CLASS} characters, separated by commas, such as 'benign, malignant'"
        )
    return names


def client_parts(data: DataConfig, clients: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """`data.parts` as (the numbers of each client's parts, the number of all parts).

    Raises:
        ConfigError: the key cannot be read, or does not have exactly one group of parts for each client.
    """
    if not data.parts.strip():
        return tuple((client,) for client in range(clients)), clients
    groups, _, count = data.parts.partition(" of ")
    try:
        parts = tuple(tuple(int(part) for part in group.split("+")) for group in groups.split(","))
        total = int(count)
    except ValueError:
        parts, total = (), 0
    named = [part for group in parts for part in group]
    if not named or len(set(named)) != len(named) or not all(0 <= part < total for part in named):
        raise ConfigError(
            f"data.parts: got {data.parts!r}, expected different parts joined by +, clients separated by commas, and "
            "how many parts there are, such as '0+1+2+3 of 4'"
        )
    if len(parts) != clients:
        raise ConfigError(
            f"data.parts = {data.parts!r} is for {len(parts)} clients, but federation.clients is {clients}; make them "
            "agree"
        )
    return parts, total


def clients_per_round(clients: int, fraction: float) -> int:
    """The number of clients that are asked in a round: at least one."""
    return max(1, min(clients, int(fraction * clients + 0.5)))


def steps_per_round(config: TrainConfig, num_examples: int) -> int:
    """The number of optimizer steps in one round: `train.steps`, or as many as `train.epochs` needs."""
    per_step = config.batch_size * config.accumulate
    return config.steps or max(1, math.ceil(config.epochs * num_examples / per_step))


def clients_at_once(config: TrainConfig) -> int:
    """`train.clients-at-once` as a number; 0 for auto."""
    text = config.clients_at_once.strip()
    if text != "auto" and not (text.isdigit() and int(text) >= 1):
        raise ConfigError(f"train.clients-at-once: got {text!r}, expected auto or a number of clients from 1")
    return 0 if text == "auto" else int(text)


def _check(where: str, key: str, value: Any, section: Any, name: str) -> Scalar:
    """The value, converted to its field's type; raises ConfigError for a wrong type, choice or bound."""
    expected = get_type_hints(type(section))[name]
    meta = next(f for f in fields(section) if f.name == name).metadata
    if expected is float and type(value) is int:
        value = float(value)
    if expected is str and type(value) in (int, float):  # -c lora.ranks=8 and lora.alpha=16 arrive as numbers
        value = str(value)
    if type(value) is not expected:
        hint = "; write lists as comma strings, such as '16,8,8,4'" if isinstance(value, list) else ""
        raise ConfigError(f"{where}: {key} = {value!r} is {type(value).__name__}, expected {expected.__name__}{hint}")
    if meta["choices"] and value not in meta["choices"]:
        raise ConfigError(f"{where}: {key} = {value!r}{suggest(str(value), meta['choices'])}")
    low, high = meta["low"], meta["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"{where}: {key} = {value!r} is out of bounds, expected {bounds}")
    return value


def _check_together(config: Config, where: str) -> Config:
    """The config itself; raises ConfigError where several keys do not go together."""
    for key, name in (("run.name", config.run.name), ("run.id", config.run.id)):
        if name in (".", "..") or "/" in name or "\\" in name:
            raise ConfigError(
                f"{where}: {key} = {name!r} is not the name of a single folder; give a plain name, and set run.dir for "
                "another place"
            )
    if config.run.resume and not config.run.id:
        raise ConfigError(f"{where}: run.resume = true needs run.id, the name of the folder of the run to continue")
    if config.run.from_round >= 0 and not config.run.resume:
        raise ConfigError(f"{where}: run.from-round works only in a run that is resumed; set run.resume too")
    ints("lora.ranks", config.lora.ranks)
    rank_pattern(config.lora)
    clients_at_once(config.train)
    label_names(config.data)
    if not alpha_of(config.lora.alpha, config.lora.rank) > 0:
        raise ConfigError(f"{where}: lora.alpha = {config.lora.alpha!r}, expected a number above 0 or such as '2r'")
    if config.anchor.base_update == "merge" and config.model.quantization != "none":
        raise ConfigError(
            f"{where}: anchor.base-update = 'merge' needs model.quantization = 'none', got "
            f"{config.model.quantization!r}: a quantized base loses small updates; leave anchor.base-update at 'anchor'"
        )
    _check_privacy(config, where)
    _, dealt = client_parts(config.data, config.federation.clients)
    if config.data.partition == "sizes" and len(ints("data.sizes", config.data.sizes)) != dealt:
        raise ConfigError(
            f"{where}: data.sizes = {config.data.sizes!r} must name one size for each of the "
            f"{dealt} clients (federation.clients)"
        )
    if 0 < config.federation.max_share < 1:
        raise ConfigError(
            f"{where}: federation.max-share = {config.federation.max_share:g} is below the mean of the other clients; "
            "set it to 1 or more, or to 0 for no limit"
        )
    if config.federation.min_clients > config.federation.clients:
        raise ConfigError(
            f"{where}: federation.min-clients = {config.federation.min_clients} exceeds federation.clients = "
            f"{config.federation.clients}"
        )
    return config


def _check_privacy(config: Config, where: str) -> None:
    """Raises ConfigError where the keys of the section privacy do not go together."""
    privacy = config.privacy
    if privacy.level == "none":
        return
    if not privacy.epsilon and not privacy.noise_multiplier:
        raise ConfigError(
            f"{where}: privacy.level = {privacy.level!r} needs privacy.epsilon, from which the noise is computed, or "
            "privacy.noise-multiplier; set one of them"
        )
    if privacy.epsilon and privacy.noise_multiplier:
        raise ConfigError(
            f"{where}: privacy.epsilon = {privacy.epsilon:g} and privacy.noise-multiplier = "
            f"{privacy.noise_multiplier:g} both say how much noise there is; leave one of them at 0"
        )
    if privacy.clip_quantile and privacy.level == "example":
        raise ConfigError(
            f"{where}: privacy.clip-quantile = {privacy.clip_quantile:g} moves the norm at which clients' changes are "
            "clipped, and privacy.level = 'example' clips each row's gradient at a fixed one; set "
            "privacy.clip-quantile = 0, or privacy.level = 'client'"
        )
    if privacy.level == "example" and config.model.quantization == "int8":
        raise ConfigError(
            f"{where}: privacy.level = 'example' bounds what one row changes, and model.quantization = 'int8' treats "
            "columns by the largest values of all rows of a batch, so that a row changes the others' gradients; set "
            "model.quantization = 'nf4' or 'none'"
        )


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression fits the end of the module's name: all of it, or from a dot on."""
    return re.search(rf"(^|\.)({pattern})$", module) is not None
