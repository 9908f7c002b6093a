"""Secure sums as pure functions: bitwise equality, drop-outs in each phase, false shares, and what a server sees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from fedlora.common.errors import WireError
from fedlora.exchange.secure import masks
from fedlora.exchange.secure.keys import RoundSecrets, pair_key
from fedlora.exchange.secure.neighbours import degree, graph, threshold_of
from fedlora.exchange.secure.numbers import most, to_numbers, to_words
from fedlora.exchange.secure.opening import Participants
from fedlora.exchange.secure.sharing import combine, split

CONTEXT = b"run one, round 3"


class Round:
    """All clients of a round in this process, each with its own secrets."""

    def __init__(self, count: int, silent: tuple[int, ...] = ()) -> None:
        """`silent` clients sent their keys, and then nothing."""
        self.near = graph(range(count), "seed")
        self.secrets = {client: RoundSecrets.draw(CONTEXT) for client in self.near}
        public = {client: secrets.public for client, secrets in self.secrets.items()}
        holders = {client: near for client, near in self.near.items() if client not in silent}
        self.masking = Participants(CONTEXT, public, holders)
        self.shares = {
            client: {
                "self_mask": split(self.secrets[client].self_mask, near, threshold_of(len(near))),
                "masking": split(self.secrets[client].masking, near, threshold_of(len(near))),
            }
            for client, near in holders.items()
        }

    def masked(self, client: int, words: np.ndarray, part: int = 0) -> np.ndarray:
        return masks.masked(words, client, self.secrets[client], self.masking.masked_with(client), part)

    def opened(self, arrived, opening) -> dict[int, dict[int, bytes]]:
        """What the clients of `opening` open."""
        kind = {client: "self_mask" if client in arrived else "masking" for client in self.shares}
        return {
            client: {holder: share for holder, share in shares[kind[client]].items() if holder in opening}
            for client, shares in self.shares.items()
        }


def numbers(count: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, size))


@pytest.mark.parametrize("count", [2, 3, 7, 80])
@pytest.mark.parametrize("phase", ["nobody", "shares", "numbers", "unmasking"])
def test_with_masks_or_without_the_sum_is_the_same_bit_for_bit(count, phase):
    """As many drop out in this phase as can be borne: all but the threshold of each client's neighbours."""
    words = to_words(numbers(count), count, "client")
    spare = min(len(near) - threshold_of(len(near)) for near in graph(range(count), "seed").values())
    gone = tuple(range(count))[1 : 1 + (0 if phase == "nobody" else spare)]
    this = Round(count, silent=gone if phase == "shares" else ())
    arrived = [client for client in range(count) if phase not in ("shares", "numbers") or client not in gone]
    opening = [client for client in range(count) if client not in gone]
    total = np.sum([this.masked(client, words[client]) for client in arrived], axis=0, dtype=np.uint64)
    plain = np.sum([words[client] for client in arrived], axis=0, dtype=np.uint64)
    found = this.masking.unmasked(total, arrived, this.opened(arrived, opening))
    np.testing.assert_array_equal(found, plain)
    np.testing.assert_allclose(to_numbers(found), numbers(count)[arrived].sum(axis=0), atol=count * 1e-11)


def test_one_opener_too_few_fails_and_shows_nothing():
    this = Round(7)
    needed = threshold_of(6)
    opened = this.opened(range(7), range(needed))  # of clients that open one share less, since nobody holds its own
    with pytest.raises(WireError, match=rf"client 0: {needed - 1} of the {needed} shares that a secret needs"):
        this.masking.unmasked(np.zeros(3, np.uint64), range(7), opened)


def test_fewer_shares_than_the_threshold_fit_every_secret():
    """For each possible secret there is a last share that makes the others give it: they say nothing of it."""
    secret, holders = bytes(range(16)), [3, 5, 9]
    shares = split(secret, holders, 3)
    assert combine(shares, holders, 3) == secret
    found = {combine({**shares, 9: bytes([last]) * 16}, holders, 3) for last in range(32)}
    assert len(found) == 32


def test_a_false_share_is_noticed_and_its_holders_are_named():
    this = Round(5)
    opened = {client: dict(shares) for client, shares in this.opened(range(5), range(5)).items()}
    opened[2][4] = bytes(16)
    for holder in (0, 1):  # the others are not needed
        del opened[2][holder]
    opened[2][0] = this.shares[2]["self_mask"][0]
    with pytest.raises(WireError, match="client 2: a share of its secret is false; it was opened by one of the"):
        this.masking.unmasked(np.zeros(3, np.uint64), range(5), opened)


def test_shares_of_strangers_and_of_wrong_lengths_are_refused():
    shares = split(bytes(16), [1, 2, 3], 2)
    with pytest.raises(WireError, match="client 8 opened a share that it was never given"):
        combine({**shares, 8: bytes(16)}, [1, 2, 3], 2)
    with pytest.raises(WireError, match="client 2 opened a share of a wrong length, expected 16 bytes"):
        combine({**shares, 2: bytes(5)}, [1, 2, 3], 2)


def test_a_letter_is_read_by_its_receiver_alone_unchanged_and_in_its_round():
    ann, bob, eve = (RoundSecrets.draw(CONTEXT) for _ in range(3))
    letter = ann.write(b"a share", 1, 2, bob.public)
    assert bob.read(letter, 1, 2, ann.public) == b"a share"
    later = replace(bob, context=b"run one, round 4")
    changed = bytes([letter[0] ^ 1]) + letter[1:]
    for reader, text, sender in ((eve, letter, 1), (bob, changed, 1), (bob, letter, 3), (later, letter, 1)):
        with pytest.raises(WireError, match=r"the letter with a share from client . to client 2 was changed, or is of"):
            reader.read(text, sender, 2, ann.public)


def test_a_key_that_everybody_could_guess_is_refused():
    with pytest.raises(WireError, match="no usable X25519 key"):
        pair_key(bytes(16), bytes(32), CONTEXT)


def test_neighbours_agree_on_a_mask_that_differs_by_round_pair_and_part():
    ann, bob, eve = (RoundSecrets.draw(CONTEXT) for _ in range(3))
    keys = {
        pair_key(ann.masking, bob.public.masking, CONTEXT),
        pair_key(bob.masking, ann.public.masking, CONTEXT),
    }
    assert len(keys) == 1
    (key,) = keys
    assert key != pair_key(ann.masking, eve.public.masking, CONTEXT)
    assert key != pair_key(ann.masking, bob.public.masking, b"another round")
    streams = [masks.stream(key, 100, part) for part in (0, 1)]
    assert not np.any(streams[0] == streams[1])


def test_what_the_server_sees_is_uniform_whatever_the_numbers_are():
    """Over many rounds, the bytes of two clients' masked numbers are equally frequent: one has zeros, one ones."""
    zeros, ones = np.zeros(200, np.uint64), to_words(np.ones(200), 3, "client")
    seen: list[list[np.ndarray]] = [[], []]
    for _ in range(40):
        this = Round(3)
        seen[0].append(this.masked(0, zeros))
        seen[1].append(this.masked(1, ones))
    for words in seen:
        counts = np.bincount(np.concatenate(words).view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-4
    (first, second) = (np.concatenate(words).view(np.uint8).astype(float) for words in seen)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


@pytest.mark.parametrize("clients", [2, 100, 10**6])
def test_a_sum_of_the_largest_numbers_does_not_wrap_and_a_larger_one_is_refused(clients):
    largest = most(clients)
    words = to_words(np.array([largest, -largest]), clients, "client 3")
    total = np.array([int(word) if word < 2**63 else int(word) - 2**64 for word in words], dtype=object) * clients
    assert max(abs(int(each)) for each in total) <= 2**63
    for bad in (largest * 1.01, np.nan, np.inf):
        with pytest.raises(WireError, match=f"client 3: a number of magnitude .* secure sum over {clients} clients"):
            to_words(np.array([0.0, bad]), clients, "client 3")


@pytest.mark.parametrize("count", [2, 64, 65, 100, 300])
def test_the_graph_is_symmetric_and_regular_and_connected(count):
    near = graph([3 * client for client in range(count)], "seed")
    sizes = {len(others) for others in near.values()}
    assert sizes == ({count - 1} if count <= 64 else {degree(count)})
    for client, others in near.items():
        assert client not in others
        assert all(client in near[other] for other in others)
    reached, front = {0}, [0]
    while front:
        front = [other for client in front for other in near[client] if other not in reached]
        reached |= {*front}
    assert len(reached) == count


def test_two_thirds_open_and_degrees_grow_slower_than_the_clients():
    assert [threshold_of(count) for count in (1, 2, 3, 6, 63)] == [1, 2, 2, 4, 42]
    degrees = [degree(count) for count in (100, 1000, 10000)]
    assert degrees == sorted(degrees)
    assert degrees[2] < 200
    for few, many in itertools.pairwise(degrees):
        assert many < 4 * few
