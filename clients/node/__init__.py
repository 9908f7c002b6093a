"""What a node decides for itself, and what it stores."""
