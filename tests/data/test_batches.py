"""The endless walk visits every example once per epoch; padding never reaches the loss."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data import Example, batch_at, eval_batches
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification


@given(n=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_each_epoch_is_a_permutation(n: int, batch_size: int, seed: int, epochs: int) -> None:
    batches = -(-n * epochs // batch_size)
    walk = [i for index in range(batches) for i in batch_at(n, batch_size, index, seed)]
    assert len(walk) == batches * batch_size
    for epoch in range(epochs):
        assert sorted(walk[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(n=st.integers(1, 40), index=st.integers(0, 50), seed=st.integers(0, 99))
def test_batch_size_does_not_change_the_walk(n: int, index: int, seed: int) -> None:
    ones = [batch_at(n, 1, 6 * index + i, seed)[0] for i in range(6)]
    assert batch_at(n, 6, index, seed) == ones


def test_epochs_and_seeds_differ() -> None:
    first = batch_at(100, 100, 0, 7)
    assert first != batch_at(100, 100, 1, 7)
    assert first != batch_at(100, 100, 0, 8)


def test_collate_masks_by_position_when_pad_is_the_end_token() -> None:
    end = 2
    examples = [
        Example({"input_ids": [5, 6, end], "labels": [-100, 6, end]}),
        Example({"input_ids": [5], "labels": [5]}),
    ]
    batch = CausalLM().collate(examples, pad_id=end)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [5, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [5, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_classes() -> None:
    examples = [Example({"input_ids": [5, 6], "labels": 0}), Example({"input_ids": [5], "labels": 3})]
    batch = Classification(4).collate(examples, pad_id=0)
    assert batch["labels"].tolist() == [0, 3]
    assert batch["labels"].dtype == torch.int64


@given(lengths=st.lists(st.integers(1, 30), max_size=40), batch_size=st.integers(1, 9))
def test_eval_batches_give_each_example_once(lengths: list[int], batch_size: int) -> None:
    examples = [Example({"input_ids": [i] * length, "labels": i}) for i, length in enumerate(lengths)]
    batches = [[examples[place] for place in places] for places in eval_batches(examples, batch_size)]
    assert sorted(example["labels"] for batch in batches for example in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    ordered = [len(example["input_ids"]) for batch in batches for example in batch]
    assert ordered == sorted(lengths)
