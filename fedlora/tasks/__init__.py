"""What a model learns to do: its losses, its predictions, its metrics."""
