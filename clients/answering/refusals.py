"""The errors with which a client refuses a message."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from flwr.app import Error
from flwr.common.constant import ErrorCode

from fedlora.common.errors import DataError, DivergedError, FedLoraError
from fedlora.config import Scalar
from fedlora.exchange import wire

from ..node import memory, rules
from ..node.held_folds import StaleBase

_log = logging.getLogger("fedlora")


def refusal(error: Exception, settings: Mapping[str, Scalar]) -> Error:
    """The error that is sent to the server. It does not quote a node's own rows.

    Args:
        error: the exception that the message caused.
        settings: the node's config.
    """
    code, reason = wire.REFUSED, str(error)
    if isinstance(error, StaleBase):
        code = wire.STALE
    elif isinstance(error, DataError) and rules.own_data(settings):
        _log.error("%s", error)
        reason = "node config: the file that data names cannot be used; the node's log says why"
    elif memory.ran_out(error):
        reason = memory.refusal(settings)
    elif isinstance(error, DivergedError):
        code = wire.DIVERGED
    elif not isinstance(error, FedLoraError):
        _log.error("a message was not answered", exc_info=error)
        code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        own = f"{type(error).__name__} on a node with its own data; the node's log says more"
        reason = own if rules.own_data(settings) else "".join(traceback.format_exception(error))
    return Error(code, reason)
