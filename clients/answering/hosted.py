"""Answers for a node that hosts several clients. Messages and answers have a part for each client.

The clients are trained as one batch if the model allows it, on the one base model in the process. If one of them fails,
its part of the answer is an error, and the others' are not affected.
"""

from __future__ import annotations

from flwr.app import Context, Error, RecordDict

from fedlora.common.errors import WireError
from fedlora.exchange import parts

from ..node import rules
from . import single, together

Request = tuple[RecordDict, Context]


def answer(task: str, content: RecordDict, context: Context) -> RecordDict | Error:
    """The answers of all clients to which a message is addressed.

    Args:
        task: "describe", which every hosted client answers, or another one, such as "train", which the clients answer
            for which the message has a part.
        content: the message's content.
        context: Flower's context of this run on this node.

    Raises:
        ConfigError: `partition-ids` is wrong.
        WireError: the message is malformed, or has a part for a client that this node does not host.
    """
    hosted = rules.hosted(context.node_config)
    if len(hosted) == 1:
        return single.answer(task, content, _of(hosted[0], context))
    if task == "describe":
        asked: dict[int, RecordDict] = dict.fromkeys(hosted, content)
    else:
        asked = _asked(content, hosted)
    requests = {client: (part, _of(client, context)) for client, part in asked.items()}
    if task == "train":
        return parts.join(dict(zip(requests, _trained(list(requests.values())), strict=True)))
    return parts.join({client: single.answer(task, *request) for client, request in requests.items()})


def _asked(content: RecordDict, hosted: tuple[int, ...]) -> dict[int, RecordDict]:
    """The part of the message for each client, by client id."""
    asked: dict[int, RecordDict] = {}
    for client, part in parts.split(content, "the server").items():
        if client not in hosted:
            raise WireError(f"the server asks for client {client}, but this node hosts {', '.join(map(str, hosted))}")
        if isinstance(part, Error):
            raise WireError(f"the server sent an error in place of client {client}'s message")
        asked[client] = part
    return asked


def _trained(requests: list[Request]) -> list[RecordDict | Error]:
    """The answers, in order. `together.how_many` says how many clients are trained at once."""
    answers: list[RecordDict | Error] = []
    while requests:
        size = together.how_many(requests[0][1])
        answers += together.train(requests[:size])
        requests = requests[size:]
    return answers


def _of(client: int, context: Context) -> Context:
    """The context for a hosted client, as if it were alone on its node."""
    settings = {name: value for name, value in context.node_config.items() if name != "partition-ids"}
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config={**settings, "partition-id": client},
        state=context.state,
        run_config=context.run_config,
    )
