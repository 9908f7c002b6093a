"""Starts Flower's own programs with safe settings, and manages certificates, keys and nodes."""
