"""Tasks: a task is what a model learns to do, with its examples, batches, losses, predictions and metrics.

Each task is one class in a file of its own, and has one line in the table of `registry.py`.
"""
