"""What clients can be asked for before round 1."""
