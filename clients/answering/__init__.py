"""A node's answers to the server's messages."""
