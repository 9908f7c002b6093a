"""Base models: found by name, told apart by content, quantized once, loaded once per process."""
