"""The messages between server and clients, and how they are encoded, checked and decoded."""

from fedlora.config import matches

from .messages import Broadcast, ClientInfo, ClientUpdate, Masking, Plan, SecondQuestion, Term

__all__ = ["Broadcast", "ClientInfo", "ClientUpdate", "Masking", "Plan", "SecondQuestion", "Term", "matches"]
