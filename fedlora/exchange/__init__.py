"""All that crosses the wire."""

from fedlora.config import matches

from .messages import Broadcast, ClientInfo, ClientUpdate

__all__ = ["Broadcast", "ClientInfo", "ClientUpdate", "matches"]
