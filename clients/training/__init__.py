"""Local training: of one client, and of several as one batch."""
