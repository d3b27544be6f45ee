"""Comparison of methods on one pair."""
