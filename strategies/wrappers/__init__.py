"""What stands around a strategy and changes one step of it."""
