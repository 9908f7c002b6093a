"""All that crosses the wire."""

from fedlora.config import matches

from .messages import Broadcast, ClientInfo, ClientUpdate, Plan, Term

__all__ = ["Broadcast", "ClientInfo", "ClientUpdate", "Plan", "Term", "matches"]
