"""Local training, of one client alone or of several clients as one batch."""
