"""Prompts that a model makes up, told from real ones, and what an adapter answers to them (Trans-LoRA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fedlora.common.errors import AdapterError, DataError
from fedlora.config import Config
from fedlora.data import form_of, prepare
from fedlora.data.conversations import RowError, conversation
from fedlora.models import adapted
from fedlora.models.adapted import AdaptedModel
from fedlora.models.peft_files import read_adapter
from fedlora.tasks.registry import task_of

from .embedding import ENCODER, embed
from .export import Source, check_base

_FORMS = ("prompt", "chat", "alpaca", "sharegpt")
_AT_ONCE = 16  # sequences per call of generate
_ATTEMPTS = 4  # as many prompts are sampled, at most, as are wanted, times this
_LONGEST_PROMPT = 48  # tokens of a prompt that is made up
_RIDGE = 1e-2
_REAL = 4  # real prompts that the discriminator sees, at most, as a multiple of the made-up ones
OnDone = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """Rows that a source model and its adapter made.

    Attributes:
        rows: a prompt and the adapter's answer each.
        sampled: number of different prompts that the source made up.
        told_apart: share of real and made-up prompts that the discriminator told apart, each by one that has not seen
            it; 0.5 is chance.
    """

    rows: tuple[dict[str, str], ...]
    sampled: int
    told_apart: float


def real_prompts(config: Config) -> list[str]:
    """The first message of a user in each row of the clients, without repetitions.

    Raises:
        DataError: the rows are no conversations.
    """
    split = prepare(config)
    form = form_of(split.rows.column_names, config.data, task_of(config.model))
    if form not in _FORMS:
        raise DataError(
            f"{config.data.source}: rows of the form {form} have no prompts; expected one of {', '.join(_FORMS)}"
        )
    found: dict[str, None] = {}
    for part in split.parts:
        for row in split.rows.select(part):
            try:
                messages = conversation(cast("dict[str, Any]", row), form, config.data).messages
            except RowError:  # such a row takes no part in training either
                continue
            said = next((m["content"] for m in messages if m["role"] == "user"), None)
            if isinstance(said, str) and said.strip():
                found[" ".join(said.split())] = None
    return list(found)


def make_rows(
    source: Source, config: Config, *, count: int, keep: float, seeds: int, encoder: str = ENCODER, on_done: OnDone
) -> Rows:
    """Make up prompts, drop those that a discriminator tells from real ones, and let the adapter answer the others.

    Args:
        source: the adapter.
        config: whose rows are the real ones.
        count: number of prompts to make up.
        keep: share of them that is kept: those most like real ones.
        seeds: number of real prompts that the source sees as examples, each time others.
        encoder: what the discriminator sees of a prompt.
        on_done: called with (what is done, number done, number of all).

    Raises:
        AdapterError: the source has no chat template, or makes up too few prompts.
        DataError: there are too few real prompts.
    """
    real = real_prompts(config)
    if len(real) < 2 * seeds:
        raise DataError(f"{config.data.source} has {len(real)} different prompts, expected at least {2 * seeds}")
    model = _teacher(source)
    if not model.base.tokenizer.chat_template:
        raise AdapterError(f"{source.config.model.name}: its tokenizer has no chat template, by which it would answer")
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        prompts = _made_up(model, real, count=count, seeds=seeds, seed=config.run.seed, on_done=on_done)
        if len(prompts) < 4:
            raise AdapterError(
                f"{source.adapter}: of {_ATTEMPTS * count} tries, {len(prompts)} are prompts that differ from each "
                "other and from the examples, expected at least 4; ask for more rows, or take another source"
            )
        some = torch.randperm(len(real))[: _REAL * len(prompts)].tolist()
        kept, told_apart = most_real([real[index] for index in some], prompts, keep, encoder)
        rows = [
            {"prompt": prompt, "response": answer}
            for prompt, answer in zip(kept, answers(model, kept, config, on_done), strict=True)
            if answer
        ]
    if len(rows) < 2:
        raise AdapterError(f"{source.adapter}: it answers {len(rows)} of {len(kept)} prompts, expected at least 2")
    return Rows(tuple(rows), len(prompts), told_apart)


def answers(model: AdaptedModel, prompts: Sequence[str], config: Config, on_done: OnDone) -> list[str]:
    """What the model with its adapter answers to each prompt, greedily; at most `data.max-length` tokens in all."""
    tokenizer = model.base.tokenizer
    first = [{"role": "system", "content": config.data.system_prompt}] if config.data.system_prompt else []
    texts = [
        str(
            tokenizer.apply_chat_template(
                [*first, {"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
        )
        for prompt in prompts
    ]
    longest = max(8, config.data.max_length // 2)
    found: list[str] = []
    for part in _parts(texts):
        found += [text.strip() for text in _generate(model, part, new_tokens=longest, sample=False)]
        on_done("answers", len(found), len(texts))
    return found


def most_real(real: Sequence[str], made_up: Sequence[str], keep: float, encoder: str) -> tuple[list[str], float]:
    """The share of the made-up prompts that are most like real ones, in their order; how well they are told apart.

    A logistic regression on an encoder's vectors is fitted twice, each time to one half of all prompts, and judges the
    other half. Real and made-up prompts count alike, whatever their numbers.
    """
    vectors = embed([*real, *made_up], encoder).double()
    is_real = torch.tensor([1.0] * len(real) + [0.0] * len(made_up), dtype=torch.float64)
    half = torch.randperm(len(is_real), generator=torch.Generator().manual_seed(0)) % 2
    probability = torch.empty_like(is_real)
    for which in (0, 1):
        seen = half != which
        probability[~seen] = _fitted(vectors[seen], is_real[seen])(vectors[~seen])
    right = (probability > 0.5) == (is_real > 0.5)
    told_apart = 0.5 * float(right[: len(real)].double().mean() + right[len(real) :].double().mean())
    of_made_up = probability[len(real) :]
    number = max(2, round(keep * len(made_up)))
    chosen = sorted(of_made_up.argsort(descending=True, stable=True)[:number].tolist())
    return [str(made_up[index]) for index in chosen], told_apart


def _fitted(vectors: Tensor, is_real: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression with a ridge, by L-BFGS; the probability that a prompt is real."""
    center = vectors.mean(dim=0)
    weights = torch.zeros(vectors.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    share = is_real.mean()
    each = torch.where(is_real > 0.5, 0.5 / share, 0.5 / (1 - share))
    search = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def logits(of: Tensor) -> Tensor:
        return (of - center) @ weights[:-1] + weights[-1]

    def closure() -> Tensor:
        search.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits(vectors), is_real, each)
        loss = loss + _RIDGE * weights[:-1].square().sum()
        loss.backward()
        return loss

    search.step(closure)  # pyright: ignore[reportArgumentType]
    return lambda of: torch.sigmoid(logits(of)).detach()


def _made_up(
    model: AdaptedModel, real: Sequence[str], *, count: int, seeds: int, seed: int, on_done: OnDone
) -> list[str]:
    """Prompts that continue a list of real ones, none of them twice or among the real ones."""
    known, found = set(real), dict[str, None]()
    generator = torch.Generator().manual_seed(seed)
    tries = 0
    while len(found) < count and tries < _ATTEMPTS * count:
        texts = []
        for _ in range(min(_AT_ONCE, count)):
            shown = [real[int(i)] for i in torch.randperm(len(real), generator=generator)[:seeds]]
            texts.append("".join(f"Message: {prompt}\n" for prompt in shown) + "Message:")
        tries += len(texts)
        for text in _generate(model, texts, new_tokens=_LONGEST_PROMPT, sample=True):
            line = " ".join(text.strip().split("\n")[0].split())
            if len(line) > 1 and line not in known and len(found) < count:
                found[line] = None
        on_done("prompts", len(found), count)
    return list(found)


def _generate(model: AdaptedModel, texts: Sequence[str], *, new_tokens: int, sample: bool) -> list[str]:
    """The continuation of each text."""
    tokenizer = model.base.tokenizer
    with _padded_left(tokenizer):
        batch = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
    batch = {name: batch[name].to(model.base.device) for name in ("input_ids", "attention_mask")}
    chosen = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0} if sample else {"do_sample": False}
    model.model.eval()
    with torch.no_grad():
        made = model.model.generate(
            **batch, max_new_tokens=new_tokens, pad_token_id=model.base.pad_id, use_cache=True, **chosen
        )
    return tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def _padded_left(tokenizer: Any) -> Iterator[None]:
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        yield
    finally:
        tokenizer.padding_side = before


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    return (texts[at : at + _AT_ONCE] for at in range(0, len(texts), _AT_ONCE))


def _teacher(source: Source) -> AdaptedModel:
    """The source's base model with its adapter, as this process's one model."""
    learned = read_adapter(source.adapter)
    model = adapted.adapted_model(source.config.model, replace(source.config.lora, kind="lora", kind_options=""))
    check_base(source, model.base)
    adapted.merge_folds(model, None, ())
    adapted.install(model, learned)
    return model
