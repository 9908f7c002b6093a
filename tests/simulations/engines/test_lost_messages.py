"""What Flower loses on the way is asked again: the run ends with the bits of one that lost nothing."""

import json
import time
from collections.abc import Iterable
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.clients.client_app import app as client_app
from fedlora.clients.node import held_folds
from fedlora.common.errors import RunError
from fedlora.common.events import listen
from fedlora.results.run_folder import folder_of
from fedlora.simulations import run as simulation
from fedlora.simulations.engines import local
from fedlora.strategies.server import mailbox, roster
from fedlora.strategies.server.mailbox import Mailbox
from tests.device import assert_same
from tests.federation import tiny
from tests.simulations.engines.test_local import saved_adapter

LOST = Error(ErrorCode.MESSAGE_UNAVAILABLE, "Reply message objects are unavailable")
GONE = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")


class Losing(local.LocalGrid):
    """Each client does what it is asked, and its first answer to each training message gets lost."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        seen = self.__dict__.setdefault("seen", set())
        for place, reply in enumerate(replies):
            key = (reply.metadata.message_type, reply.metadata.group_id, reply.metadata.src_node_id)
            if key[0] == "train" and key not in seen:
                replies[place] = Message(LOST, reply_to=reply)
                replies[place].metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            seen.add(key)
        return replies


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy__name": "lora-fair", "wire__upload_dtype": "int8", "lora__dropout": 0.1},
        {"strategy__name": "fedsa", "evaluate__clients": True, "data__client_test_fraction": 0.3},
        {"strategy__name": "flora"},
    ],
    ids=lambda keys: keys["strategy__name"],
)
def test_lost_replies_are_asked_for_again_to_the_same_bits(tmp_path, tiny_llama, fresh_process, monkeypatch, keys):
    config = tiny(tmp_path, tiny_llama, federation__rounds=3, **keys)
    simulation.in_process(config)
    held_folds._held.clear()
    other = tiny(tmp_path, tiny_llama, federation__rounds=3, run__id="lossy", **keys)
    monkeypatch.setattr(simulation, "LocalGrid", Losing)
    simulation.in_process(other)
    one, two = saved_adapter(folder_of(config)), saved_adapter(folder_of(other))
    assert_same(two, one)
    result = json.loads((folder_of(other) / "result.json").read_text())
    assert all(entry["failures"] == {} for entry in result["rounds"])


def echo() -> ClientApp:
    app = ClientApp()
    app.train()(lambda message, context: Message(message.content, reply_to=message))
    return app


class Scripted(local.LocalGrid):
    """Two nodes that echo; `answers` says what becomes of the replies in turn, `pushes` of the questions."""

    def __init__(self, answers: list, pushes: list | None = None) -> None:
        super().__init__(echo(), [{}, {}], {}, 1)
        self.answers, self.pushes = answers, pushes or []
        self._retry_invoker = make_simple_http_retry_invoker()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        if self.pushes and self.pushes.pop(0):
            raise ObjectPushError("object", 1, "session")
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        fate = self.answers.pop(0) if self.answers else None
        if isinstance(fate, str) and fate == "away":
            tries = []

            def answer() -> None:
                tries.append(1)
                if len(tries) == 1:
                    raise httpx.ConnectError("refused")

            self._retry_invoker.invoke(answer)
            return []
        replies = list(super().pull_messages(message_ids))
        if isinstance(fate, str):  # late: it comes, but with the next but one
            self.answers.insert(1, replies[0])
            return []
        if isinstance(fate, Message):
            return [fate, *replies]
        if isinstance(fate, Error):
            lost = [Message(fate, reply_to=reply) for reply in replies]
            for message, reply in zip(lost, replies, strict=True):
                message.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            return lost
        return replies


def ask_both(grid: Scripted, timeout: float = 30.0, **more: Any) -> tuple[list[tuple[int, bool]], list[int]]:
    """(node, answered well) as they come; and the nodes in the order in which they were sent something."""
    asked: list[int] = []
    box = Mailbox(grid, "train", "1", timeout, **more)
    for node in grid.get_node_ids():

        def make(node: int = node) -> RecordDict:
            asked.append(node)
            return RecordDict({"head": ConfigRecord({"node": node})})

        box.post(node, make)
    return [(node, reply is not None and not reply.has_error()) for node, reply in box.replies()], asked


def test_nothing_lost_is_asked_once():
    assert ask_both(Scripted([])) == ([(2, True), (3, True)], [2, 3])


def test_a_lost_reply_is_asked_for_again():
    answers, asked = ask_both(Scripted([LOST]))
    assert sorted(answers) == [(2, True), (3, True)]
    assert asked == [2, 3, 2]


def test_a_node_that_is_gone_is_not_asked_again():
    assert ask_both(Scripted([GONE])) == ([(2, False), (3, True)], [2, 3])


class Returning(Scripted):
    """A node that is gone comes back, after so many looks at who is there."""

    def __init__(self, answers: list, back_after: int) -> None:
        super().__init__(answers)
        self.looks, self.back_after = 0, back_after

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return [2, 3] if self.looks == 1 or self.looks > self.back_after else [3]


def ask_patiently(
    grid: Scripted, patience: float, wanted: bool, monkeypatch
) -> tuple[list[tuple[int, bool]], list[int]]:
    monkeypatch.setattr(mailbox, "_AGAIN_SECONDS", 0.02)
    return ask_both(grid, patience=patience, wanted=lambda: wanted)


def test_a_node_that_comes_back_is_asked_again_while_its_answer_is_needed(monkeypatch):
    grid = Returning([GONE], back_after=4)
    answers, asked = ask_patiently(grid, 30.0, True, monkeypatch)
    assert sorted(answers) == [(2, True), (3, True)]
    assert asked == [2, 3, 2]
    assert grid.looks == 5  # it is not asked before it is listed


def test_a_node_that_stays_away_is_waited_for_no_longer_than_that(monkeypatch):
    began = time.monotonic()
    answers, asked = ask_patiently(Returning([GONE], back_after=10**6), 0.3, True, monkeypatch)
    assert sorted(answers) == [(2, False), (3, True)]
    assert asked == [2, 3]
    assert 0.3 <= time.monotonic() - began < 5


def test_where_enough_have_answered_nobody_waits_for_the_absent(monkeypatch):
    began = time.monotonic()
    answers, _ = ask_patiently(Returning([GONE], back_after=10**6), 60.0, False, monkeypatch)
    assert sorted(answers) == [(2, False), (3, True)]
    assert time.monotonic() - began < 5


class Hanging(local.LocalGrid):
    """The first node is connected, and never says who it is."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        others = [one for one in message_ids if one in self._waiting and self._waiting[one].metadata.dst_node_id != 2]
        return super().pull_messages(others)


class Dead(local.LocalGrid):
    """The first node died, Flower still lists it, and says at once that it is not there, however often it is asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for place, reply in enumerate(replies):
            if reply.metadata.src_node_id == 2:
                replies[place] = Message(GONE, reply_to=reply)
                replies[place].metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return replies


@pytest.mark.parametrize(
    ("grid", "why"), [(Hanging, "connected, but without .* node 2;"), (Dead, "the first that did not: node 2 failed")]
)
def test_a_node_that_hangs_or_stays_dead_is_waited_for_no_longer_than_the_wait_timeout(
    tmp_path, tiny_llama, fresh_process, monkeypatch, grid, why
):
    monkeypatch.setattr(simulation, "LocalGrid", grid)
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, federation__wait_timeout=2.0)
    began = time.monotonic()
    simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert [set(entry["clients"]) for entry in result["rounds"]] == [set("123")]
    strict = tiny(tmp_path, tiny_llama, federation__wait_timeout=2.0, federation__min_clients=4, run__id="strict")
    with pytest.raises(RunError, match=rf"3 of 4 clients connected within 2 s \({why}"):
        simulation.in_process(strict)
    assert time.monotonic() - began < 60


class Late(local.LocalGrid):
    """The last node connects after the first round."""

    def get_node_ids(self) -> Iterable[int]:
        nodes = list(super().get_node_ids())
        trained = self.__dict__.get("trained", False)
        return nodes if trained else nodes[:-1]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.__dict__["trained"] = self.__dict__.get("trained") or any(
            reply.metadata.message_type == "train" for reply in replies
        )
        return replies


@pytest.mark.parametrize("name", ["flora", "fedsa", "hetlora", "lora-fair", "fedex", "flexlora"])
def test_a_client_that_comes_later_takes_part_from_the_next_round(
    tmp_path, tiny_llama, fresh_process, monkeypatch, name
):
    """With every fold that it lacks: what it learns is what it would have learned, had it been away for a round."""
    keys = {"strategy__name": name, "evaluate__server": name != "fedsa", "evaluate__clients": name == "fedsa"}
    config = tiny(tmp_path, tiny_llama, federation__rounds=3, federation__wait_timeout=0.0, **keys)
    with monkeypatch.context() as patched:
        patched.setattr(simulation, "LocalGrid", Late)
        simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert [sorted(entry["clients"]) for entry in result["rounds"]] == [list("012"), list("0123"), list("0123")]
    assert [about.get("joined-in-round") for about in result["clients"]] == [None, None, None, 2]
    held_folds._held.clear()

    class Away(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            kind, number = message.metadata.message_type, message.metadata.group_id
            if kind != "query" and number == "1" and context.node_config["partition-id"] == 3:
                raise RuntimeError("not there")
            return client_app(message, context)

    other = tiny(tmp_path, tiny_llama, federation__rounds=3, run__id="away", **keys)
    simulation.in_process(other, client_app=Away())
    one, two = saved_adapter(folder_of(config)), saved_adapter(folder_of(other))
    assert_same(two, one)


def test_a_client_that_comes_later_and_cannot_be_served_is_named_and_the_run_goes_on(
    tmp_path, tiny_llama, fresh_process, monkeypatch
):
    monkeypatch.setattr(simulation, "LocalGrid", Late)
    ranks = {"lora__ranks": "2,2,2,4", "strategy__name": "fedavg-zeropad"}
    config = tiny(tmp_path, tiny_llama, federation__rounds=2, federation__wait_timeout=0.0, **ranks)
    seen: list[str] = []
    with listen(lambda kind, facts: seen.append(facts["reason"]) if kind == "client-failed" else None):
        simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert [sorted(entry["clients"]) for entry in result["rounds"]] == [list("012"), list("012")]
    assert any("client 3 on node 5 cannot join the run: " in reason and "rank 4" in reason for reason in seen)


class Restarted(local.LocalGrid):
    """All nodes died; Flower still lists the first one's old life, which answers nothing, and then all new ones."""

    def get_node_ids(self) -> Iterable[int]:
        self.__dict__["looks"] = looks = self.__dict__.get("looks", 0) + 1
        return [2] if looks < 3 else [2, 3, 4, 5]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for place, reply in enumerate(replies):
            if reply.metadata.src_node_id == 2 and not self.__dict__.get("told"):
                self.__dict__["told"] = True
                replies[place] = Message(GONE, reply_to=reply)
                replies[place].metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
        return replies


def test_a_node_that_is_listed_and_dead_at_the_start_is_asked_again(tmp_path, tiny_llama, fresh_process, monkeypatch):
    monkeypatch.setattr(simulation, "LocalGrid", Restarted)
    monkeypatch.setattr(roster, "_LOOK_SECONDS", 0.01)
    config = tiny(tmp_path, tiny_llama, federation__rounds=1, federation__min_clients=4, federation__wait_timeout=60.0)
    simulation.in_process(config)
    result = json.loads((folder_of(config) / "result.json").read_text())
    assert [set(entry["clients"]) for entry in result["rounds"]] == [set("0123")]


def test_one_that_is_always_lost_ends_as_a_failure():
    answers, asked = ask_both(Scripted([LOST] * 8))
    assert sorted(answers) == [(2, False), (3, False)]
    assert asked.count(2) == asked.count(3) == 4


def test_after_a_lost_connection_everyone_open_is_asked_again_and_counts_once():
    grid = Scripted([None, "away"])
    answers, asked = ask_both(grid)
    assert answers == [(2, True), (3, True)]
    assert asked == [2, 3, 3]
    answers, asked = ask_both(Scripted(["late", "away"]))  # the first answer arrives after all, beside the second
    assert sorted(answers) == [(2, True), (3, True)]
    assert asked == [2, 3, 2, 3]


def test_a_question_that_the_superlink_lost_is_sent_again():
    answers, asked = ask_both(Scripted([], pushes=[False, True, False]))
    assert sorted(answers) == [(2, True), (3, True)]
    assert asked == [2, 3, 3]


def test_a_question_that_the_superlink_always_loses_ends_as_a_failure():
    answers, asked = ask_both(Scripted([], pushes=[False] + [True] * 8))
    assert sorted(answers) == [(2, True), (3, False)]
    assert asked == [2, 3, 3, 3, 3]


def test_a_lost_reply_whose_question_the_superlink_then_loses_ends_as_a_failure():
    answers, _ = ask_both(Scripted([LOST], pushes=[False] * 2 + [True] * 8))
    assert sorted(answers) == [(2, False), (3, True)]


def test_who_never_answers_is_told_at_the_deadline():
    grid = Scripted([])
    grid.pull_messages = lambda message_ids: []
    assert ask_both(grid, timeout=0.3)[0] == [(2, False), (3, False)]


def test_flowers_grid_still_has_what_tells_of_a_lost_connection():
    assert isinstance(HttpGrid(token="x")._retry_invoker, RetryInvoker)
