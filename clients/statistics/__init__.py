"""Statistics: what clients can measure for the server in a round 0, before round 1."""
