"""Flower's own programs, started safely, and who may take part."""
