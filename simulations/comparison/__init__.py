"""Comparisons of strategies: a grid of runs, its progress, and the ranking of its results."""
