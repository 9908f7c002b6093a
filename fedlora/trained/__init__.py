"""Evaluates, compares and exports trained adapters."""
