"""The node's resident process, and how a ClientApp finds and watches it."""
