"""Loop-written, dense, fp64 twins of the strategies, from the papers' formulas: slow, and easy to check by eye."""
