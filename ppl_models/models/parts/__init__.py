"""Distributions and networks that pairs are built from."""
