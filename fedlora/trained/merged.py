"""A start for a new task: the adapters of the tasks that are most like it by their texts, merged (SG-LoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapters import AdapterState, LoraFactors, compress, stack
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.config import Config
from fedlora.models.peft_files import read_adapter, save_checkpoint

from .embedding import ENCODER, embed
from .export import Source, check_free, find

TOP, TEMPERATURE = 4, 0.1


@dataclass(frozen=True)
class Expert:
    """One adapter, and how much of the merged one it is.

    Attributes:
        adapter: folder of its checkpoint.
        text: describes its task.
        cosine: between this text and that of the new task.
        weight: its share; 0 if it is none of the most alike.
    """

    adapter: Path
    text: str
    cosine: float
    weight: float


def merge_by_text(
    adapters: Sequence[Path],
    texts: Sequence[str],
    task: str,
    out: Path,
    *,
    top: int = TOP,
    temperature: float = TEMPERATURE,
    rank: int = 0,
    encoder: str = ENCODER,
) -> list[Expert]:
    """Write `dW = sum_e w_e dW_e` over the adapters whose tasks are most like a new one, with w = softmax(cos / tau).

    The semantic merge of SG-LoRA (Li et al. 2025, "Semantic-guided LoRA Parameters Generation",
    https://arxiv.org/abs/2509.10535), without its generator: cosines are those of the mean last hidden states of an
    encoder that sees the texts. Experimental: the paper is known here from its abstract and notes. It takes the K = 4
    most similar experts and CLIP's text encoder. Its tau is not known, and its weights enter the mean and the variance
    from which a conditional variational autoencoder draws; here they enter the merge itself. The sum is exact, by
    stacking factors, of any ranks; a module that an adapter lacks counts as zero. `rank` then keeps the best
    approximation.

    Args:
        adapters: runs, or folders of PEFT checkpoints, all of one base model; each once.
        texts: describes the task of each adapter; empty: what the adapter's run was made of (see `task_of_run`).
        task: describes the new task.
        out: folder to write; it must be new or empty.
        top: the number K of adapters that are merged, at least 1.
        temperature: tau, above 0: small ones leave the nearest adapter alone.
        rank: largest rank of the result; 0: the sum of the ranks, as far as they differ.
        encoder: a model without a head, as `model.name`.

    Returns:
        All adapters, the most similar first.

    Raises:
        ConfigError: a number is out of bounds, or texts and adapters do not match.
        AdapterError: the adapters do not fit each other, or `out` is not empty.
    """
    _check_numbers(top, temperature, rank)
    if texts and len(texts) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters and {len(texts)} texts; give each adapter its text, or none")
    if not task.strip() or not all(text.strip() for text in texts):
        raise ConfigError("a text that describes a task is empty; write a sentence")
    check_free(out)
    sources = [find(path) for path in adapters]
    check_alike(sources)
    states = [read_adapter(source.adapter) for source in sources]
    described = list(texts) or [task_of_run(source.config) for source in sources]
    vectors = embed([task, *described], encoder)
    cosines = (vectors[1:] @ vectors[0]).tolist()
    shares = weights(cosines, top, temperature)
    merged = weighted_sum(states, shares)
    if rank:
        merged = replace(merged, lora=compress(merged.lora, rank))
    experts = [
        Expert(source.adapter, text, cosine, share)
        for source, text, cosine, share in zip(sources, described, cosines, shares, strict=True)
    ]
    nearest = sources[max(range(len(sources)), key=lambda e: cosines[e])]
    save_checkpoint(merged, out, nearest.config.model, {**nearest.about, "made": _made(experts, task, temperature)})
    return sorted(experts, key=lambda expert: -expert.cosine)


def task_of_run(config: Config) -> str:
    """What a run's record says of its task, for an adapter that was given no text: its name, its data and its task."""
    name = Path(config.data.source).stem
    prompt = f". {config.data.system_prompt}" if config.data.system_prompt else ""
    return f"{config.run.name}: {config.model.task.replace('-', ' ')} on {name}{prompt}"


def weights(cosines: Sequence[float], top: int, temperature: float) -> list[float]:
    """softmax(cos / tau) over the `top` largest cosines, and 0 for the others. Equal ones: the first ones given."""
    chosen = sorted(range(len(cosines)), key=lambda e: -cosines[e])[:top]
    shares = torch.softmax(torch.tensor([cosines[e] for e in chosen], dtype=torch.float64) / temperature, dim=0)
    found = dict(zip(chosen, shares.tolist(), strict=True))
    return [found.get(e, 0.0) for e in range(len(cosines))]


def weighted_sum(states: Sequence[AdapterState], shares: Sequence[float]) -> AdapterState:
    """`sum_e w_e dW_e` by stacking, and the same sum of tensors trained in full.

    Raises:
        AdapterError: the tensors trained in full are not the same in all adapters that count.
    """
    used = [(state, share) for state, share in zip(states, shares, strict=True) if share > 0]
    lora: dict[str, LoraFactors] = {}
    for name in sorted({name for state, _ in used for name in state.lora}):
        parts = [(state.lora[name], share) for state, share in used if name in state.lora]
        lora[name] = stack([factors for factors, _ in parts], [share for _, share in parts])
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.tensors.items()} for state, _ in used]
    if any(each != shapes[0] for each in shapes):
        raise AdapterError(
            "the adapters' tensors trained in full, such as a classification head, have other names or shapes; merge "
            "adapters of one task and one number of classes"
        )
    tensors: dict[str, Tensor] = {
        name: torch.stack([share * state.tensors[name].float() for state, share in used]).sum(dim=0)
        for name in shapes[0]
    }
    return AdapterState(lora=lora, tensors=tensors)


def _check_numbers(top: int, temperature: float, rank: int) -> None:
    if top < 1:
        raise ConfigError(f"the number of adapters to merge is {top}, expected at least 1")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"the temperature is {temperature}, expected a number above 0")
    if rank < 0:
        raise ConfigError(f"the rank is {rank}, expected at least 1, or 0 for the whole sum")


def check_alike(sources: Sequence[Source]) -> None:
    """Raise AdapterError if the adapters are not of one base, task and list of classes, or if one occurs twice."""
    first = sources[0]
    for place, source in enumerate(sources):
        if source.adapter in [other.adapter for other in sources[:place]]:
            raise AdapterError(f"{source.adapter}: named twice; name each adapter once")
        for what, own, expected in (
            ("the base model", source.about.get("base"), first.about.get("base")),
            ("model.task", source.config.model.task, first.config.model.task),
            ("the classes", source.about.get("classes"), first.about.get("classes")),
        ):
            if own != expected:
                raise AdapterError(
                    f"{source.adapter}: {what} is {own}, and that of {first.adapter} is {expected}; merge adapters of "
                    "one base model and one task"
                )


def _made(experts: Sequence[Expert], task: str, temperature: float) -> dict[str, Any]:
    """For the checkpoint's fedlora.json: what the adapter is made of; the rest of it is the nearest adapter's."""
    used = [expert for expert in experts if expert.weight > 0]
    listed = ", ".join(f"{expert.weight:.3g} of {expert.adapter}" for expert in used)
    return {
        "by": "fedlora merge",
        "said": f"not trained, but merged from trained adapters by the texts of their tasks ({listed}); what is said "
        "of training and data is that of the most similar one",
        "task": task,
        "temperature": temperature,
        "from": [{"adapter": str(e.adapter), "text": e.text, "cosine": e.cosine, "weight": e.weight} for e in experts],
    }
