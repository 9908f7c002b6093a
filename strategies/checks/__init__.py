"""What a strategy cannot do in a run, said before the run begins."""
