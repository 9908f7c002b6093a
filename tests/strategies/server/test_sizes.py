"""A reply that is larger than what was asked for is not fetched to its end, and is deleted where it lies."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import GetNodesResponse, PullAppMessagesResponse, PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from fedlora.adapters import AdapterState, LoraFactors
from fedlora.config import parse
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate, parts, secure_messages, wire
from fedlora.exchange.codec import FORMATS
from fedlora.exchange.secure.keys import SECRET
from fedlora.exchange.secure.neighbours import degree
from fedlora.strategies.server import sizes as module
from fedlora.strategies.server.mailbox import SMALL, Mailbox
from fedlora.strategies.server.roster import Meeting

PIECE = 5 << 20


class Link:
    """A SuperLink's side of Flower's Runtime API, which holds one reply of some size to each question."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.replies: dict[str, Message] = {}
        self.objects: dict[str, bytes] = {}
        self.pulled: dict[str, int] = {}
        self.deleted: list[str] = []
        self.contents: dict[int, RecordDict] = {}  # of nodes whose reply is another one

    def GetNodes(self, request) -> GetNodesResponse:
        return GetNodesResponse(nodes=[NodeInfo(node_id=node) for node in self.sizes])

    def PushMessages(self, request) -> PushAppMessagesResponse:
        for proto in request.messages_list:
            self._answer(proto)
        return PushAppMessagesResponse(message_ids=[proto.metadata.message_id for proto in request.messages_list])

    def _answer(self, proto) -> None:
        node, asked = proto.metadata.dst_node_id, proto.metadata.message_id
        if content := self.contents.get(node):
            self._keep(asked, node, content)
            return
        data = random.Random(node).randbytes(self.sizes[node])  # equal pieces would be one object
        array = Array(dtype="uint8", shape=(len(data),), stype="safetensors", data=data)
        content = RecordDict({"head": ConfigRecord({"node": node}), "adapter": ArrayRecord({"tensors": array})})
        self._keep(asked, node, content)

    def _keep(self, asked: str, node: int, content: RecordDict) -> None:
        reply = Message(content, dst_node_id=1, message_type="train")
        reply.metadata.__dict__.update(_reply_to_message_id=asked, _src_node_id=node, _delivered_at="x")
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.replies[asked] = reply
        self.objects |= {name: each.deflate() for name, each in get_all_nested_objects(reply).items()}

    def PullMessages(self, request) -> PullAppMessagesResponse:
        arrived = [self.replies.pop(asked) for asked in list(request.message_ids) if asked in self.replies]
        bare = []
        for reply in arrived:
            proto = message_to_proto(reply)
            proto.ClearField("content")
            bare.append(proto)
        return PullAppMessagesResponse(messages_list=bare, message_object_trees=[get_object_tree(r) for r in arrived])

    PushObject = None  # no object is asked for

    def PullObject(self, request) -> PullObjectResponse:
        content = self.objects[request.object_id]
        self.pulled[request.object_id] = len(content)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request) -> ConfirmMessageReceivedResponse:
        self.deleted.append(request.message_object_id)
        return ConfirmMessageReceivedResponse()


@pytest.fixture
def linked() -> Iterator:
    try:
        before = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:  # no test before this one has set them
        before = 1, 1, 0
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 0

    def make(sizes: dict[int, int]) -> tuple[HttpGrid, Link]:
        grid, link = HttpGrid(token="x"), Link(sizes)
        grid._client = link  # pyright: ignore[reportAttributeAccessIssue]
        grid.set_run(Run.create_empty(1))
        return grid, link

    yield make
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = before


def answers(grid: HttpGrid, most: int, others: int = 0) -> dict[int, str]:
    box = Mailbox(grid, "train", "1", 30.0)
    for node in grid.get_node_ids():
        box.post(node, lambda: RecordDict({"head": ConfigRecord({"a": 1})}), lambda: most, others)
    return {node: reply.error.reason if reply.has_error() else "good" for node, reply in box.replies() if reply}


def test_a_reply_beyond_its_limit_is_dropped_and_deleted_and_the_others_arrive(linked):
    grid, link = linked({2: 1000, 3: 12 * PIECE, 4: PIECE})
    got = answers(grid, most=2 * PIECE)
    assert got[2] == got[4] == "good"
    assert got[3] == f"its reply is larger than {2 * PIECE} bytes, the most that it may have"
    assert len(link.deleted) == 3  # each reply once: two that were read, and the one that was dropped
    assert len(set(link.deleted)) == 3
    assert sum(link.pulled.values()) < 6 * PIECE
    sizes = module.of(grid)
    assert sizes is not None
    assert not any((sizes._limits, sizes._replies, sizes._parts, sizes._held, sizes._others, sizes.too_large))


def test_a_reply_of_very_many_small_things_is_dropped_before_it_is_read(linked):
    """Each value of a list, and each record, is an object in Python, many times as large as what was sent."""
    grid, link = linked({2: 1000, 3: 0, 4: 0})
    link.contents[3] = RecordDict({"head": ConfigRecord({"many": list(range(400_000))})})
    link.contents[4] = RecordDict({f"{i}/head": ConfigRecord({"a": i}) for i in range(20_000)})
    got = answers(grid, most=4 << 20)
    assert got[2] == "good"
    assert got[3] == got[4] == f"its reply is larger than {4 << 20} bytes, the most that it may have"
    assert len(set(link.deleted)) == 3
    assert len(link.pulled) < 100


def test_the_letters_of_all_clients_of_a_host_arrive_and_little_more(linked):
    """A secure sum's letters are no tensors: those of 200 clients are more than the megabyte that others may send."""
    largest, neighbours = 2**64 - 1, degree(1000)
    letters = {largest - place: bytes(2 * SECRET + 16) for place in range(neighbours)}

    def host(clients: range) -> RecordDict:
        ids = [largest - client for client in clients]
        return parts.join({c: secure_messages.encode_letters(c, "ab" * 16, letters, "0" * 64) for c in ids})

    grid, link = linked({2: 0, 3: 0})
    link.contents |= {2: host(range(200)), 3: host(range(200, 600))}
    got = answers(grid, SMALL, secure_messages.most_bytes(200, neighbours))
    assert got == {2: "good", 3: f"its reply is larger than {SMALL} bytes, the most that it may have"}
    assert sum(map(len, link.objects.values())) > 3 << 20


def test_a_node_may_introduce_as_many_clients_as_a_run_may_have_and_not_many_more(linked):
    """Each names its 300 classes: together more than the megabyte that other answers may have."""
    config = parse({"federation.clients": 300, "federation.wait-timeout": 1})
    names = tuple(f"class {number}" for number in range(300))

    def host(clients: range) -> RecordDict:
        infos = [ClientInfo(c, 8, config.lora.alpha, num_examples=9 + c, class_names=names) for c in clients]
        return parts.join({info.client_id: wire.encode_info(info, "0" * 64) for info in infos})

    grid, link = linked({2: 0, 3: 0})
    link.contents |= {2: host(range(300)), 3: host(range(300, 3300))}
    meeting = Meeting(grid, config, "0" * 64)
    meeting.begin()
    assert meeting.roster.infos.keys() == {*range(300)}
    assert sum(link.pulled.values()) > 1 << 20
    assert any("is larger than" in why for why in meeting.roster.refusals)


def test_a_broadcasts_limit_holds_every_format_and_little_more():
    lora = {
        f"model.layers.{i}.self_attn.q_proj": LoraFactors(torch.randn(8, 64), torch.randn(64, 8), 2.0) for i in range(9)
    }
    sent = Broadcast(round=1, adapter=AdapterState(lora=lora, tensors={"score.weight": torch.randn(3, 64)}))
    most = wire.most_bytes(sent)
    for dtype in FORMATS:
        update = ClientUpdate(client_id=1, adapter=sent.adapter, num_examples=3)
        assert wire.payload_bytes(wire.encode_update(update, "base", dtype)) < most
    assert most < SMALL
