"""The server's part of a round: the clients that take part, messages to them, their replies, and the saved state."""
