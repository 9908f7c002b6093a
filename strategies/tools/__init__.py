"""Functions that several methods use."""
