"""Client optimizers by name."""
