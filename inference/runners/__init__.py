"""Loops that take the steps of a fit and the transitions of chains."""
