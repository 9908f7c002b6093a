"""All that crosses the wire."""

from .messages import Broadcast, ClientInfo, ClientUpdate, matches

__all__ = ["Broadcast", "ClientInfo", "ClientUpdate", "matches"]
