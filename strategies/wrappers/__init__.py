"""Wrappers: a wrapper is a strategy that contains another strategy and changes one step of it."""
