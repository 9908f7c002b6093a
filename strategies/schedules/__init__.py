"""Whom to ask, and when to aggregate."""
