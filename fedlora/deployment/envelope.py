"""The messages between a ClientApp and its worker: Flower's records in Flower's serialization, and events."""

from __future__ import annotations

import json
from typing import Any

from flwr.app import ConfigRecord, Context, Error, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

SERVICE = "fedlora.Worker"
METHOD = "Work"
BEGUN = "worker-begun"  # the event with which the work on a message begins
WAITING = "worker-busy"  # the event that tells, while a message waits, that another one is worked on
# No limit on the length of messages, which contain adapters; both processes belong to one user.
GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_TASK, _NODE, _RUN = "worker.task", "worker.node-config", "worker.run-config"
_EVENT, _ERROR, _REPLY = b"p", b"e", b"r"


def pack_request(task: str, content: RecordDict, context: Context) -> bytes:
    """A message and its context, without `context.state`, as bytes; equal messages give equal bytes."""
    whole = RecordDict({**content})
    whole[_TASK] = ConfigRecord({"task": task, "run-id": str(context.run_id), "node-id": str(context.node_id)})
    whole[_NODE] = ConfigRecord({**context.node_config})
    whole[_RUN] = ConfigRecord({**context.run_config})
    return recorddict_to_proto(whole).SerializeToString(deterministic=True)


def unpack_request(data: bytes) -> tuple[str, RecordDict, Context]:
    """The inverse of `pack_request`."""
    whole = recorddict_from_proto(ProtoRecordDict.FromString(data))
    task, node_config, run_config = (dict(whole.pop(name)) for name in (_TASK, _NODE, _RUN))
    context = Context(
        run_id=int(str(task["run-id"])),
        node_id=int(str(task["node-id"])),
        node_config=node_config,  # pyright: ignore[reportArgumentType]
        state=RecordDict(),
        run_config=run_config,  # pyright: ignore[reportArgumentType]
    )
    return str(task["task"]), whole, context


def pack_event(kind: str, facts: dict[str, Any]) -> bytes:
    """An event of the worker, as bytes."""
    return _EVENT + json.dumps([kind, facts]).encode()


def pack_answer(answer: RecordDict | Error) -> bytes:
    """The answer as bytes, which is the last frame of a call."""
    if isinstance(answer, Error):
        return _ERROR + json.dumps([answer.code, answer.reason or ""]).encode()
    return _REPLY + recorddict_to_proto(answer).SerializeToString()


def unpack(frame: bytes) -> tuple[str, dict[str, Any]] | RecordDict | Error:
    """An event as `(kind, facts)`, or the answer."""
    kind, payload = frame[:1], frame[1:]
    if kind == _EVENT:
        name, facts = json.loads(payload)
        return name, facts
    if kind == _ERROR:
        return Error(*json.loads(payload))
    return recorddict_from_proto(ProtoRecordDict.FromString(payload))
