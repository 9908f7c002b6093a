"""Runs with secure sums in one process: the same adapters as without masks, drop-outs, refusals, and what is seen."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.torch import load_file
from scipy.stats import chisquare

from fedlora.adapters.algebra import norm, stack
from fedlora.adapters.sketched_sum import Sketch
from fedlora.clients.answering import secure, single
from fedlora.clients.node import round_secrets
from fedlora.clients.node.rules import client_id_of
from fedlora.common.errors import ConfigError, RunError, StrategyError, WireError
from fedlora.config import Config
from fedlora.deployment import certificates
from fedlora.exchange import sketches
from fedlora.exchange.secure import masks
from fedlora.exchange.secure.neighbours import degree
from fedlora.exchange.secure.opening import Participants
from fedlora.exchange.secure_messages import decode_question, encode_question
from fedlora.exchange.wire import decode_broadcast, encode_second
from fedlora.models.peft_files import read_adapter
from fedlora.simulations.engines.local import LocalGrid
from tests.federation import run_locally, tiny, write_labels, write_rows

PEOPLE = 7  # each has six neighbours, of whom four must open: two may drop out
LINEAR = ["fedavg", "fedavg-zeropad", "ffa", "rolora", "fedsvd", "fedsb"]
SKETCHED = ["flora", "flexlora", "florist", "fedex", "lora-fair"]


def seven(folder: Path, model: Path, strategy: str = "fedavg-zeropad", **keys: Any) -> Config:
    """Seven clients of unequal ranks where the strategy serves them, two rounds of one step."""
    folder.mkdir(exist_ok=True)
    about = {
        "data__source": str(write_rows(folder / "seven.jsonl", people=PEOPLE)),
        "federation__clients": PEOPLE,
        "lora__ranks": "4" if strategy == "fedavg" else "4,2,2,1,1,2,4",
        "lora__rank": 4,
        "strategy__name": strategy,
        "train__steps": 1,
        "privacy__secure_sum": True,
    }
    if strategy == "fedsb":
        about["lora__init"] = "lora-xs"
    if strategy in SKETCHED:
        about |= {"wire__sum": "sketch", "wire__sketch_width": 16}
    return tiny(folder, model, **(about | keys))


@contextmanager
def dropping(phase: str, clients: tuple[int, ...]) -> Iterator[None]:
    """These clients fail in a phase of every round: "keys", "shares", "train" or "open"."""

    def failing(content: RecordDict, context: Context) -> RecordDict:
        if client_id_of(context) in clients:
            raise RuntimeError("the power is gone")
        return whole(content, context)

    whole = single._TASKS[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(single._TASKS, phase, failing)
        yield


@contextmanager
def without_masks() -> Iterator[None]:
    """The same numbers in fixed point, in the open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "masked", lambda words, *_, **__: words)
        patch.setattr(Participants, "unmasked", lambda self, total, *_, **__: total)
        yield


def trained(config: Config) -> dict[str, Any]:
    folder, _ = run_locally(config)
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


RARELY_WRONG = [pytest.mark.slow, pytest.mark.nightly]
PHASES = ["keys", "shares", "train", "open"]
CASES = [
    *((strategy, "train", 2) for strategy in LINEAR + SKETCHED),
    *(("fedavg-zeropad", phase, 2) for phase in PHASES if phase != "train"),
    *(pytest.param(strategy, "train", 0, marks=RARELY_WRONG) for strategy in LINEAR + SKETCHED),
    *(pytest.param("fedavg-zeropad", phase, 1, marks=RARELY_WRONG) for phase in PHASES),
]


@pytest.mark.parametrize(("strategy", "phase", "lost"), CASES)
def test_the_adapter_is_the_same_bit_for_bit_with_masks_and_without(tmp_path, tiny_llama, strategy, phase, lost):
    with dropping(phase, tuple(range(1, 1 + lost))):
        with_masks = trained(seven(tmp_path / "a", tiny_llama, strategy))
        with without_masks():
            plain = trained(seven(tmp_path / "b", tiny_llama, strategy))
    assert equal(with_masks, plain)


@pytest.mark.parametrize("strategy", LINEAR + SKETCHED)
def test_the_update_is_that_of_a_run_without_secure_sums(tmp_path, tiny_llama, strategy):
    """Up to fixed point, and up to the order of the sums."""
    found = []
    for hidden in (True, False):
        config = seven(tmp_path / str(hidden), tiny_llama, strategy, privacy__secure_sum=hidden, federation__rounds=1)
        folder, _ = run_locally(config)
        found.append(read_adapter(folder / "adapter"))
    for name, factors in found[0].lora.items():
        other = found[1].lora[name]
        assert norm(stack([factors, other], [1.0, -1.0])) <= 1e-5 * norm(other) + 1e-9


def test_a_client_that_is_lost_in_training_is_missing_from_the_mean_alone(tmp_path, tiny_llama):
    found = []
    for hidden in (True, False):
        with dropping("train", (2,)):
            config = seven(tmp_path / str(hidden), tiny_llama, privacy__secure_sum=hidden)
            folder, result = run_locally(config)
        assert "2" in result["rounds"][0]["failures"]
        found.append(read_adapter(folder / "adapter"))
    for name, factors in found[0].lora.items():
        assert norm(stack([factors, found[1].lora[name]], [1.0, -1.0])) <= 1e-5 * norm(factors)


def test_fewer_than_the_threshold_fail_the_round_and_nothing_is_opened(tmp_path, tiny_llama):
    with dropping("open", (1, 2, 3)), pytest.raises(RunError, match="the secure sum cannot be unmasked, and"):
        trained(seven(tmp_path, tiny_llama))
    few = "client 6 refused: client 6: only 3 of its 6 neighbours are in the sum, expected at least 4"
    with dropping("train", (1, 2, 3)), pytest.raises(RunError, match=few):
        trained(seven(tmp_path / "b", tiny_llama))


def test_the_cohort_and_a_host_of_several_clients_give_the_same(tmp_path, tiny_llama):
    one = read_adapter(run_locally(seven(tmp_path / "a", tiny_llama))[0] / "adapter")
    together = read_adapter(run_locally(seven(tmp_path / "b", tiny_llama, train__clients_at_once="4"))[0] / "adapter")
    for name, factors in one.lora.items():
        assert norm(stack([factors, together.lora[name]], [1.0, -1.0])) <= 1e-4 * norm(factors)


class Watched:
    """All contents that the server received, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.received: list[RecordDict] = []
        whole = LocalGrid._answered

        def answered(grid: LocalGrid, waiting: list[Any]) -> list[Any]:
            replies = whole(grid, waiting)
            self.received += [reply.content for reply in replies if not reply.has_error()]
            return replies

        patch.setattr(LocalGrid, "_answered", answered)


def test_the_server_receives_no_number_of_a_client_in_the_clear(tmp_path, tiny_llama, monkeypatch):
    """Words of all replies are uniform bytes; no losses, and no adapters."""
    watched = Watched(monkeypatch)
    _, result = run_locally(seven(tmp_path, tiny_llama, federation__rounds=3))
    assert all("adapter" not in record for record in watched.received)
    masked = [record for record in watched.received if "words" in record]
    assert len(masked) == 3 * PEOPLE
    for record in masked:
        assert not {"train-loss", "train-last-loss", "train-tokens", "train-cut"} & {*record["metrics"]}
    seen = np.frombuffer(b"".join(record["words"]["words"].data for record in masked), np.uint8)
    assert chisquare(np.bincount(seen, minlength=256)).pvalue > 1e-4
    losses = {about["train-loss"] for about in result["rounds"][0]["clients"].values()}
    assert len(losses) == 1  # that of the sum, for all
    assert losses.pop() == pytest.approx(result["rounds"][0]["train-loss"], rel=1e-12)  # a mean of equal numbers rounds


def test_all_replies_have_one_size_whatever_the_rank(tmp_path, tiny_llama, monkeypatch):
    watched = Watched(monkeypatch)
    run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    assert len({len(record["words"]["words"].data) for record in watched.received if "words" in record}) == 1


@pytest.mark.slow
@pytest.mark.nightly
def test_seventy_clients_mask_with_some_of_the_others_and_the_adapter_is_the_same(tmp_path, tiny_llama, monkeypatch):
    """Beyond 64 clients the graph is sparse. One client is lost before its shares, and one in training."""
    watched = Watched(monkeypatch)
    many = {
        "data__source": str(write_rows(tmp_path / "seventy.jsonl", people=70, rows=2)),
        "federation__clients": 70,
        "federation__rounds": 1,
    }
    with dropping("shares", (3,)), dropping("train", (40,)):
        with_masks = trained(seven(tmp_path / "a", tiny_llama, **many))
        with without_masks():
            plain = trained(seven(tmp_path / "b", tiny_llama, **many))
    assert equal(with_masks, plain)
    letters = [len(record["head"]["ids"]) for record in watched.received if "ids" in record["head"]]
    assert {*letters} <= {degree(70), degree(70) - 1}  # a neighbour may be one of those that are lost
    masked = [record for record in watched.received if "words" in record]
    assert len(masked) == 2 * 68


@contextmanager
def asked_again(phase: str, change: Callable[[Any], Any]) -> Iterator[list[str]]:
    """Each client is asked once more in a phase, with a changed question; the list has why it refused."""
    refusals: list[str] = []

    def twice(content: RecordDict, context: Context) -> RecordDict:
        answer = whole(content, context)
        fingerprint = content["head"]["base"]
        try:
            whole(encode_question(change(decode_question(content, fingerprint)), fingerprint), context)
        except WireError as error:
            refusals.append(str(error))
        return answer

    whole = single._TASKS[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(single._TASKS, phase, twice)
        yield refusals


def test_a_client_never_opens_both_secrets_of_another(tmp_path, tiny_llama):
    def swapped(question):
        gone = min(question.arrived)
        return replace(question, arrived=question.arrived - {gone})

    with asked_again("open", swapped) as refusals:
        run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    assert len(refusals) == PEOPLE
    assert all("has opened the other secret of client" in said for said in refusals)


def test_a_client_opens_nothing_for_a_sum_of_few(tmp_path, tiny_llama):
    with asked_again("open", lambda question: replace(question, arrived=frozenset([*question.arrived][:1]))) as said:
        run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    assert all("only 1 of its 6 neighbours are in the sum, expected at least 4" in each for each in said)
    assert len(said) == PEOPLE


def test_a_replayed_key_is_refused(tmp_path, tiny_llama):
    def replayed(question):
        ids = [*question.public]
        return replace(question, public={**question.public, ids[0]: question.public[ids[1]]})

    def first(content: RecordDict, context: Context) -> RecordDict:
        fingerprint = content["head"]["base"]
        return whole(encode_question(replayed(decode_question(content, fingerprint)), fingerprint), context)

    whole = single._TASKS["shares"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(single._TASKS, "shares", first)
        with pytest.raises(RunError, match="two clients have one public key in this round, so that"):
            trained(seven(tmp_path, tiny_llama))


def test_a_client_that_is_asked_for_shares_twice_sends_the_same_letters(tmp_path, tiny_llama, monkeypatch):
    """A letter's key is used once: two texts under it would show how they differ, and how to write a third."""
    answers: list[tuple[RecordDict, RecordDict]] = []

    def twice(content: RecordDict, context: Context) -> RecordDict:
        answers.append((whole(content, context), whole(content, context)))
        return answers[-1][1]

    whole = single._TASKS["shares"]
    monkeypatch.setitem(single._TASKS, "shares", twice)
    run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    assert len(answers) == PEOPLE
    assert all(one["head"]["texts"] == other["head"]["texts"] for one, other in answers)


def test_other_numbers_under_the_same_masks_are_refused(tmp_path, tiny_llama):
    config = seven(tmp_path, tiny_llama, federation__rounds=1)
    refusals: list[str] = []

    def twice(update, sent, folder, fingerprint, known):
        answer = whole(update, sent, folder, fingerprint, known)
        whole(update, sent, folder, fingerprint, known)  # the same again is answered
        try:
            whole(replace(update, metrics=dict(update.metrics) | {"train-loss": 9.0}), sent, folder, fingerprint, known)
        except WireError as error:
            refusals.append(str(error))
        return answer

    whole = secure.masked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secure, "masked", twice)
        run_locally(config)
    assert len(refusals) == PEOPLE
    assert all("has sent other numbers in this round already" in said for said in refusals)


def test_the_same_numbers_under_fewer_masks_are_refused(tmp_path, tiny_llama, monkeypatch):
    """Two answers that differ in one neighbour alone would show the mask between the two."""
    refusals: list[str] = []

    def twice(update, sent, folder, fingerprint, known):
        answer = whole(update, sent, folder, fingerprint, known)
        fewer = replace(sent.masking, neighbours=sent.masking.neighbours[1:])
        try:
            whole(update, replace(sent, masking=fewer), folder, fingerprint, known)
        except WireError as error:
            refusals.append(str(error))
        return answer

    whole = secure.masked
    monkeypatch.setattr(secure, "masked", twice)
    run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    assert len(refusals) == PEOPLE
    assert all("the same ones under other neighbours' masks" in said for said in refusals)


def test_a_second_question_is_not_answered_in_the_clear(tmp_path, tiny_llama):
    """Whatever the server is: it would see this client's own projection."""
    refusals: list[str] = []

    def asked(content: RecordDict, context: Context) -> RecordDict:
        answer, fingerprint = whole(content, context), content["head"]["base"]
        broadcast = decode_broadcast(content, fingerprint)
        plan = replace(broadcast.plan, sketch=Sketch(4, 2, 0))
        try:
            single.project(encode_second(sketches.question(1, plan, {}, broadcast.run), fingerprint), context)
        except ConfigError as error:
            refusals.append(str(error))
        return answer

    whole = single._TASKS["train"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(single._TASKS, "train", asked)
        run_locally(seven(tmp_path, tiny_llama, "flexlora", federation__rounds=1))
    assert len(refusals) == PEOPLE
    assert all("privacy.secure-sum promises that it sees only one sum" in said for said in refusals)


@contextmanager
def on_nodes(folder: Path, owners: dict[int, str]) -> Iterator[None]:
    """Each client on the node of that name, with its key, and with the others' public keys as its peers."""
    names = sorted({*owners.values()})
    certificates.make(folder, nodes=names)

    def there(whole: Callable[[RecordDict, Context], RecordDict]) -> Callable[[RecordDict, Context], RecordDict]:
        def answer(content: RecordDict, context: Context) -> RecordDict:
            mine = owners[client_id_of(context)]
            others = os.pathsep.join(str(folder / f"{name}.pub") for name in names if name not in (mine, "eve"))
            context.node_config |= {"key": str(folder / mine), "peers": others}
            return whole(content, context)

        return answer

    with pytest.MonkeyPatch.context() as patch:
        for phase in ("keys", "shares"):
            patch.setitem(single._TASKS, phase, there(single._TASKS[phase]))
        yield


def test_with_keys_that_nodes_signed_the_adapter_is_the_same(tmp_path, tiny_llama):
    """One of the nodes hosts two clients, whose keys have its own signature."""
    plain = trained(seven(tmp_path / "a", tiny_llama, federation__rounds=1))
    owners = {client: f"n{max(client, 1)}" for client in range(PEOPLE)}
    with on_nodes(tmp_path / "keys", owners):
        assert equal(trained(seven(tmp_path / "b", tiny_llama, federation__rounds=1)), plain)


def test_a_client_whose_keys_no_peer_signed_is_refused_by_name(tmp_path, tiny_llama):
    """As if the server had put keys of its own in the place of client 2's."""
    owners = {client: "eve" if client == 2 else f"n{client}" for client in range(PEOPLE)}
    why = "client 0 takes no part: the keys of client 2 are signed by a node that is none of this node's --peers"
    with on_nodes(tmp_path / "keys", owners), pytest.raises(RunError, match=why):
        trained(seven(tmp_path, tiny_llama, federation__rounds=1))


def test_one_peer_cannot_stand_for_all_others_of_a_sum(tmp_path, tiny_llama):
    owners = {client: "n0" if client == 0 else "many" for client in range(PEOPLE)}
    with on_nodes(tmp_path / "keys", owners):
        _, result = run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    failures = result["rounds"][0]["failures"]
    assert failures.keys() == {"0"}  # the other node's clients know one another
    assert "one node has signed the keys of 6 of its 6 neighbours, expected fewer than 4" in failures["0"]


def test_a_head_beside_sketches_stays_in_fp32(tmp_path, tiny_bert):
    keys = {
        "model__task": "classification",
        "model__labels": 2,
        "lora__target_modules": "query,value",
        "data__source": str(write_labels(tmp_path / "labels.jsonl")),
        "data__partition": "iid",
        "federation__rounds": 1,
    }
    found = []
    for hidden in (True, False):
        config = seven(tmp_path / str(hidden), tiny_bert, "flexlora", privacy__secure_sum=hidden, **keys)
        folder, _ = run_locally(config)
        found.append(load_file(folder / "adapter" / "adapter_model.safetensors"))
        states = [load_file(path) for path in (folder / "state").rglob("*.safetensors")]
        assert {str(tensor.dtype) for state in states for tensor in state.values()} == {"torch.float32"}
    heads = [name for name in found[0] if "lora" not in name]
    assert heads
    for name in heads:
        assert (found[0][name] - found[1][name]).abs().max() <= 1e-5


def test_secrets_are_only_for_the_nodes_user(tmp_path, tiny_llama):
    folder, _ = run_locally(seven(tmp_path, tiny_llama, federation__rounds=1))
    files = list(folder.rglob(round_secrets.NAME))
    assert len(files) == PEOPLE
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strategy__name": "hetlora"}, "hetlora needs the clients' own factors.* use abmll, .*fedavg.*ffa"),
        ({"strategy__name": "flexlora"}, "flexlora needs the clients' own factors.*set wire.sum = sketch"),
        ({"strategy__robust": "median"}, "strategy.robust = median judges each client's update"),
        ({"wire__upload_dtype": "int8"}, "wire.upload-dtype = int8 has scales of each client"),
        ({"federation__clients": 2}, "2 clients take part in a round, expected at least 3"),
        (
            {"privacy__level": "client", "privacy__noise_multiplier": 1.0},
            "privacy.level = client clips each client's change",
        ),
        ({"federation__fraction": 0.3}, "2 clients take part in a round, expected at least 3"),
        ({"lora__init": "eva"}, "in round 0 clients would send .* in the clear"),
        ({"strategy__name": "rblora"}, "rblora averages a row over the clients that have it"),
        (
            {"strategy__name": "flora", "wire__sum": "sketch", "wire__sketch_passes": 2},
            "set wire.sketch-passes = 1: from the sums of two passes the server could compute what a client sketched",
        ),
        (
            {"strategy__name": "ffa", "strategy__correction": "feddyn", "lora__ranks": "4"},
            "strategy.correction = feddyn keeps sums of each client",
        ),
    ],
)
def test_what_needs_single_replies_is_refused_with_the_reason(tmp_path, tiny_llama, keys, message):
    with pytest.raises(StrategyError, match=f"privacy.secure-sum = true: .*{message}"):
        run_locally(seven(tmp_path, tiny_llama, **keys))
