"""Recipes of packaged models that are trained on this machine, from a packaged data set, at their first use."""
