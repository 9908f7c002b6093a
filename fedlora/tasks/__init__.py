"""What a model learns to do: from rows to examples, batches, losses, predictions and metrics.

A task is one class in one file, and one line in the table of `registry.py`.
"""
