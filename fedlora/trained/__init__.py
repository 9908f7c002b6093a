"""What is done with a trained adapter: evaluated, mixed with others, exported."""
