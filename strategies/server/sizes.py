"""Limits the size of replies: a reply that is too large is not fetched from the SuperLink, but deleted there.

Flower's grid fetches a reply object by object (arrays in pieces of 5 MB), and returns it when it is complete. This
module counts the bytes of each object before the next one is fetched. Objects other than bytes of arrays become many
small Python objects. They may therefore be only a part of a reply, unless the question asks for them, and the number of
objects is limited too.
"""

from __future__ import annotations

import threading
from typing import Any

from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content, iterate_object_tree
from flwr.superlink.grid.http_grid import HttpGrid

_ATTRIBUTE = "_fedlora_sizes"
_BYTES = "ArrayChunk"
_OTHERS_SHARE, _OTHERS_LEAST = 8, 1 << 20  # objects other than arrays: at most an eighth of a reply, or a megabyte
_OBJECT, _SOME = 256, 64  # a reply may have one object for each 256 of its bytes, and 64 more


class Sizes:
    """The limits of expected replies, by the id of the message that each reply answers.

    Attributes:
        too_large: id of a message whose reply was not fetched -> the limit in bytes that the reply exceeds.
    """

    def __init__(self, client: Any, node: Any) -> None:
        """Begin to watch a connection to the SuperLink.

        Args:
            client: Flower's client of the Runtime API, whose methods `PullMessages` and `PullObject` are replaced.
            node: Flower's record of this side.
        """
        self.too_large: dict[str, int] = {}
        self._limits: dict[str, tuple[int, int]] = {}  # of the bytes of a reply, and of its objects other than arrays
        self._replies: dict[str, tuple[str, str]] = {}  # object -> the message it answers, and its own id
        self._parts: dict[str, list[str]] = {}  # message -> the objects of its reply
        self._held: dict[str, int] = {}
        self._others: dict[str, int] = {}
        self._lock = threading.Lock()
        self._node, self._client = node, client
        self._pull_messages, self._pull_object = client.PullMessages, client.PullObject
        client.PullMessages, client.PullObject = self._messages, self._object

    def expect(self, message_id: str, most: int, others: int = 0) -> None:
        """Limit the reply to this message.

        Args:
            message_id: of the message.
            most: the largest number of bytes of the reply.
            others: the largest number of bytes of its objects other than arrays; at least a megabyte, and an eighth of
                `most`, are allowed.
        """
        self._limits[message_id] = most, max(others, most // _OTHERS_SHARE, _OTHERS_LEAST)

    def arrived(self, message_id: str) -> int | None:
        """Forget a message whose reply has been read or dropped; the limit that the reply exceeded, or None."""
        for held in (self._limits, self._held, self._others):
            held.pop(message_id, None)
        for part in self._parts.pop(message_id, ()):
            if self._replies.get(part, ("", ""))[0] == message_id:
                del self._replies[part]
        return self.too_large.pop(message_id, None)

    def _messages(self, request: Any) -> Any:
        response = self._pull_messages(request)
        for message, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            asked = message.metadata.reply_to_message_id
            most, _ = self._limits.get(asked, (None, None))
            for count, part in enumerate(iterate_object_tree(tree), 1):
                self._replies[part.object_id] = asked, message.metadata.message_id
                self._parts.setdefault(asked, []).append(part.object_id)
                if most is not None and count > _SOME + most // _OBJECT:
                    self._drop(asked, most, message.metadata.message_id, message.metadata.run_id)
                    break
        return response

    def _object(self, request: PullObjectRequest) -> PullObjectResponse:
        asked, reply = self._replies.get(request.object_id, ("", ""))
        if asked in self.too_large:
            return PullObjectResponse(object_found=False)
        response = self._pull_object(request)
        if asked not in self._limits:
            return response
        most, most_others = self._limits[asked]
        content = response.object_content
        other = bool(content) and get_object_type_from_object_content(content) != _BYTES
        with self._lock:
            held = self._held[asked] = self._held.get(asked, 0) + len(content)
            others = self._others[asked] = self._others.get(asked, 0) + (len(content) if other else 0)
        if held <= most and others <= most_others:
            return response
        self._drop(asked, most, reply, request.run_id)
        return PullObjectResponse(object_found=False)

    def _drop(self, asked: str, most: int, reply: str, run_id: int) -> None:
        """Fetch no more of this reply, and have the SuperLink delete it."""
        with self._lock:
            first = asked not in self.too_large
            self.too_large[asked] = most
        if first:
            self._client.ConfirmMessageReceived(  # this deletes a message and its objects
                ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=reply)
            )


def of(grid: Grid) -> Sizes | None:
    """The limits of this grid, made by the first call; None if replies do not come over a connection."""
    if not isinstance(grid, HttpGrid):
        return None
    client = grid._runtime_client
    if not hasattr(client, _ATTRIBUTE):
        setattr(client, _ATTRIBUTE, Sizes(client, grid.node))
    return getattr(client, _ATTRIBUTE)
