"""Several methods on one pair, side by side."""
