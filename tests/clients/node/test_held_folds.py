"""A client that missed rounds ends with the bits of one that did not."""

from contextlib import suppress

import pytest
import torch

from fedlora.adapters import AdapterState, LoraFactors, concatenate
from fedlora.adapters.folds import Folds
from fedlora.clients.node.held_folds import StaleBase, folds_up_to
from fedlora.exchange import Broadcast


def fold(seed: int, rank: int = 3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    return AdapterState(
        lora={"q": LoraFactors(torch.randn(rank, 8, generator=g), torch.randn(10, rank, generator=g), 1.0)}
    )


def broadcast(folds: Folds, known: int) -> Broadcast:
    folds_from, parts = folds.since(known)
    return Broadcast(round=1, adapter=AdapterState(), base_version=folds.version, folds=parts, folds_from=folds_from)


@pytest.mark.parametrize("max_rank", [0, 5])
def test_late_restarted_and_faithful_clients_hold_the_same_bits(max_rank):
    """With rank 3 a round, min(d) = 8 and a limit of 5, compaction happens along the way."""
    folds = Folds(max_rank=max_rank)
    faithful, late, restarted = 1, 2, 3  # run ids, so that the three hold nothing in common
    known_late = 0
    for number in range(6):
        known_faithful = folds.version
        folds = folds.push(fold(number))
        always = concatenate(folds_up_to(faithful, broadcast(folds, known_faithful)))
        if number % 2:
            sometimes = concatenate(folds_up_to(late, broadcast(folds, known_late)))
            known_late = folds.version
            anew = concatenate(folds_up_to(restarted + number, broadcast(folds, 0)))
            for other in (sometimes, anew):
                assert torch.equal(always.lora["q"].A, other.lora["q"].A)
                assert torch.equal(always.lora["q"].B, other.lora["q"].B)
    assert folds.version == 6


def test_folds_that_continue_an_unknown_version_are_refused():
    with pytest.raises(StaleBase, match="base version 3 is not in memory"):
        folds_up_to(99, Broadcast(round=5, adapter=AdapterState(), base_version=4, folds=(fold(0),), folds_from=3))


def test_an_untouched_base_needs_nothing():
    assert folds_up_to(98, Broadcast(round=1, adapter=AdapterState())) == ()


def test_versions_that_no_broadcast_can_continue_are_let_go():
    """Compacted or replaced: what a client holds does not grow with the rounds."""
    folds, held = Folds(max_rank=5), []
    for number in range(12):
        folds = folds.push(fold(number))
        held.append(folds_up_to(97, broadcast(folds, folds.version - 1)))
    refused = 0
    for version in range(1, 12):
        with suppress(StaleBase):
            folds_up_to(97, Broadcast(1, AdapterState(), base_version=12, folds=(fold(0),), folds_from=version))
            continue
        refused += 1
    assert refused >= 9
