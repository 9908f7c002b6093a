"""Comparisons of strategies: a grid of runs, their standing, their ranking."""
