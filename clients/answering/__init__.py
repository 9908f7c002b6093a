"""How a node answers the server's messages."""
