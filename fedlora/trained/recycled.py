"""One adapter from several classifiers' adapters, without rows, by inputs found from the adapters (LoRA Recycle)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.adapters import AdapterState, initial
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.models import adapted
from fedlora.models.adapted import AdaptedModel
from fedlora.models.injection import shape_of
from fedlora.models.peft_files import has_magnitudes, read_adapter, save_checkpoint
from fedlora.tasks.classification import Classification
from fedlora.tasks.registry import task_of

from .export import Source, check_base, check_free, find
from .inverted import Classifier, Inverted, invert
from .merged import check_alike

_RISK = "inputs that can come close to what the clients' rows look like, which is what federation protects"
WARNING = (
    f"this finds {_RISK}; take only adapters whose owners agree. The inputs are kept in memory alone, and what is "
    "written has learned from them."
)
_RATE = 1e-3
OnDone = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Recycled:
    """What was made of the adapters.

    Attributes:
        kept: for each adapter's folder, the number of inputs that get the class that they were to get.
        tried: for each adapter, the number of inputs that were looked for.
        first: mean prototypical loss over the first tenth of the episodes.
        last: over the last tenth.
    """

    kept: dict[Path, int]
    tried: int
    first: float
    last: float


def recycle(
    adapters: Sequence[Path],
    out: Path,
    *,
    accept_inversion: bool = False,
    rank: int = 8,
    rows: int = 16,
    tokens: int = 16,
    inversion_steps: int = 200,
    steps: int = 200,
    shots: int = 5,
    seed: int = 0,
    on_done: OnDone = lambda what, done, total: None,
) -> Recycled:
    """Write one adapter that is trained on inputs which are found from the adapters of several classifiers.

    Experimental: LoRA Recycle (Hu et al. 2024, "Unlocking Tuning-Free Few-Shot Adaptability in Visual Foundation Models
    by Recycling Pre-Tuned LoRAs", https://arxiv.org/abs/2412.02220) is known here from its abstract and from notes on
    its code. As there, inputs are searched for each adapter, `argmin_x CE(f_e(x), c) + 0.01 R(x)` (see `invert`), and
    one new LoRA adapter is trained on episodes of them by the prototypical loss

        L = -mean_q log softmax_c(-|h(x_q) - p_c|^2)[y_q],   p_c = mean of h over the support of class c.

    Differences: the paper is on images, and R compares the statistics of batch norms; inputs here are soft tokens, and
    R compares those of the token embeddings. The search has 200 steps instead of 2000 and leaves no tokens out. The
    paper's adapters have classes of their own, and each episode is of one of them; here all have the same classes, so
    that support and queries may be of two adapters. h is what the last layer of the head sees, in place of the
    backbone's output. The paper leaves the classes to the rows of a new task. Here the head is written too: nearest
    prototypes are a linear layer, `W_c = 2 p_c` and `b_c = -|p_c|^2`, with prototypes over all found inputs.

    Args:
        adapters: at least 2 runs, or folders of PEFT checkpoints, of one encoder and one list of classes.
        out: folder to write; it must be new or empty.
        accept_inversion: must be True: found inputs resemble private rows.
        rank: of every module.
        rows: number of inputs for each class and adapter.
        tokens: of each input.
        inversion_steps: of the search for them.
        steps: number of episodes, one for each step of the training.
        shots: number of inputs of each class in the support, and among the queries.
        seed: of the random tokens, the adapter's A and the episodes.
        on_done: called with (what is done, number done, number of all).

    Raises:
        ConfigError: the inversion is not accepted, a number is out of bounds, or the task is no classification.
        AdapterError: the adapters do not fit each other, or too few inputs get their class, or `out` is not empty.
    """
    if not accept_inversion:
        raise ConfigError(f"fedlora recycle finds {_RISK}; add --accept-inversion if the adapters' owners agree")
    _check_numbers(
        {"rank": rank, "rows": rows, "tokens": tokens, "inversion-steps": inversion_steps, "steps": steps}, shots, rows
    )
    if len(adapters) < 2:
        raise ConfigError(f"fedlora recycle: {len(adapters)} adapter, expected at least 2 to recycle")
    check_free(out)
    sources = [find(path) for path in adapters]
    check_alike(sources)
    states = _read(sources)
    generator = torch.Generator().manual_seed(seed)
    config = sources[0].config
    model = adapted.adapted_model(config.model, replace(config.lora, kind="lora", kind_options=""))
    check_base(sources[0], model.base)
    adapted.merge_folds(model, None, ())
    model.model.eval()
    found: list[Inverted] = []
    for source, state in zip(sources, states, strict=True):
        adapted.install(model, state)
        made = invert(
            Classifier(model),
            classes=config.model.labels,
            rows=rows,
            tokens=tokens,
            steps=inversion_steps,
            generator=generator,
            on_done=lambda done, total, of=source.adapter: on_done(f"inputs of {of}", done, total),
        )
        _check_enough(source, made, config.model.labels, 2 * shots)
        found.append(made)
    trained, losses = _train(
        model, states, found, rank=rank, steps=steps, shots=shots, generator=generator, on_done=on_done
    )
    tenth = max(1, steps // 10)
    done = Recycled(
        {source.adapter: len(made.labels) for source, made in zip(sources, found, strict=True)},
        found[0].tried,
        sum(losses[:tenth]) / tenth,
        sum(losses[-tenth:]) / tenth,
    )
    save_checkpoint(trained, out, config.model, {**sources[0].about, "made": _made(done, sources, shots)})
    return done


def prototypical_loss(support: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> Tensor:
    """`-mean_q log softmax_c(-|h_q - p_c|^2)[y_q]`; labels 0 … C - 1, each of them in the support."""
    return F.cross_entropy(-(queries[:, None] - prototypes(support, labels)).square().sum(dim=2), truth)


def prototypes(hidden: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class's rows, [C, h]."""
    member = F.one_hot(labels).to(hidden.dtype)
    return (member.T @ hidden) / member.sum(dim=0)[:, None]


def nearest_prototype(points: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer whose softmax is that of `-|h - p_c|^2`: `|h|^2` is the same for all."""
    return 2 * points, -points.square().sum(dim=1)


def episode(found: Sequence[Inverted], shots: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Support, its labels, queries and theirs: `shots` of each class, from one adapter or two, without overlap."""
    one, other = (int(torch.randint(len(found), (), generator=generator)) for _ in range(2))
    support: list[Tensor] = []
    queries: list[Tensor] = []
    for label in found[one].labels.unique():
        own, others = ((found[at].labels == label).nonzero().flatten() for at in (one, other))
        drawn = own[torch.randperm(len(own), generator=generator).to(own.device)]
        support.append(drawn[:shots])
        queries.append(
            drawn[shots : 2 * shots]
            if one == other
            else others[torch.randperm(len(others), generator=generator).to(others.device)][:shots]
        )
    s, q = torch.cat(support), torch.cat(queries)
    return found[one].inputs[s], found[one].labels[s], found[other].inputs[q], found[other].labels[q]


def _train(
    model: AdaptedModel,
    states: Sequence[AdapterState],
    found: Sequence[Inverted],
    *,
    rank: int,
    steps: int,
    shots: int,
    generator: torch.Generator,
    on_done: OnDone,
) -> tuple[AdapterState, list[float]]:
    """A new adapter, trained on episodes, with the head of nearest prototypes; and the loss of each episode.

    Other layers of the head start from their mean over the adapters, and are trained too.
    """
    shapes = {name: shape_of(layer) for name, layer in model.layers.items()}
    fresh = initial(shapes, lambda _: rank, lambda _: 2.0, generator)
    means = {name: torch.stack([s.tensors[name].float() for s in states]).mean(dim=0) for name in states[0].tensors}
    trained = adapted.install(model, replace(fresh, tensors=means), train=("A", "B"))
    classifier = Classifier(model)
    model.model.eval()
    search = torch.optim.Adam(trained.parameters, lr=_RATE)
    losses: list[float] = []
    for _ in range(steps):
        inputs, labels, queries, truth = episode(found, shots, generator)
        _, hidden = classifier(torch.cat([inputs, queries]))
        loss = prototypical_loss(hidden[: len(labels)], labels, hidden[len(labels) :], truth)
        search.zero_grad()
        loss.backward()
        search.step()
        losses.append(float(loss.detach()))
        if len(losses) % 20 == 0 or len(losses) == steps:
            on_done("episodes", len(losses), steps)
    with torch.no_grad():
        hidden = torch.cat([classifier(part)[1] for made in found for part in made.inputs.split(64)])
        weight, bias = nearest_prototype(prototypes(hidden, torch.cat([made.labels for made in found])))
        done = adapted.read(model)
    head = {f"{classifier.name}.weight": weight.cpu(), f"{classifier.name}.bias": bias.cpu()}
    return replace(done, tensors={**done.tensors, **head}), losses


def _read(sources: Sequence[Source]) -> list[AdapterState]:
    """The adapters.

    Raises:
        ConfigError: they are of no classification.
        AdapterError: an adapter is DoRA's, or its modules or tensors are not those of the first one.
    """
    task = task_of(sources[0].config.model)
    if not isinstance(task, Classification):
        raise ConfigError(
            f"{sources[0].adapter}: model.task = {sources[0].config.model.task}, expected classification: inputs are "
            "found by the classes that they get"
        )
    states = [read_adapter(source.adapter) for source in sources]
    kinds = [
        (state.lora.keys(), {name: tuple(tensor.shape) for name, tensor in state.tensors.items()}) for state in states
    ]
    for source, state, kind in zip(sources, states, kinds, strict=True):
        if has_magnitudes(state):
            raise AdapterError(f"{source.adapter}: an adapter of lora.kind = dora cannot be recycled; take LoRA's")
        if kind != kinds[0]:
            raise AdapterError(
                f"{source.adapter}: other modules or tensors than those of {sources[0].adapter}; recycle adapters of "
                "one lora.target-modules"
            )
    return states


def _check_numbers(numbers: dict[str, int], shots: int, rows: int) -> None:
    for name, value in (*numbers.items(), ("shots", shots)):
        if value < 1:
            raise ConfigError(f"fedlora recycle: --{name} is {value}, expected at least 1")
    if rows < 2 * shots:
        raise ConfigError(
            f"fedlora recycle: --rows is {rows}, expected at least {2 * shots}, twice --shots, for support and queries"
        )


def _check_enough(source: Source, made: Inverted, classes: int, least: int) -> None:
    counts = torch.bincount(made.labels.cpu(), minlength=classes).tolist()
    fewest = min(range(classes), key=lambda label: counts[label])
    if counts[fewest] < least:
        raise AdapterError(
            f"{source.adapter}: {counts[fewest]} of {made.tried // classes} inputs found for class {fewest} get it, "
            f"expected at least {least}; set more --inversion-steps or --rows"
        )


def _made(done: Recycled, sources: Sequence[Source], shots: int) -> dict[str, Any]:
    return {
        "by": "fedlora recycle",
        "said": f"not trained on rows, but on inputs that were found from {len(sources)} trained adapters (LoRA "
        "Recycle, experimental), which may resemble the rows of their clients; what is said of training and data is "
        "that of the first adapter",
        "shots": shots,
        "loss": {"first": done.first, "last": done.last},
        "from": [{"adapter": str(folder), "inputs": kept, "of": done.tried} for folder, kept in done.kept.items()],
    }
