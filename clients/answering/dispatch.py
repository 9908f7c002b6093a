"""Answers a message to a node, for its only client or for each of the clients that it hosts."""

from __future__ import annotations

from flwr.app import Context, Error, RecordDict

from ..node import rules
from . import hosted, single
from .refusals import refusal


def answer(task: str, content: RecordDict, context: Context) -> RecordDict | Error:
    """Do what a message asks for.

    Errors about a node's own rows may quote them. They stay in the node's log and are not sent.

    Args:
        task: a name in `single._TASKS`, such as "train".
        content: the message's content.
        context: Flower's context of this run on this node.

    Returns:
        The reply's content, or an error. Whatever goes wrong is answered with an error, and never raised.
    """
    try:
        if rules.hosted(context.node_config):
            return hosted.answer(task, content, context)
    except Exception as error:
        return refusal(error, context.node_config)
    return single.answer(task, content, context)
