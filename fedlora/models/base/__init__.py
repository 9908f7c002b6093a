"""Base models, which are found by name, identified by content, quantized once and loaded once in each process."""
