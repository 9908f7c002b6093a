"""The node's resident worker, which keeps the base model in memory, and how a ClientApp finds and watches it."""
