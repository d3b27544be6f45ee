"""Distributions, networks and helper functions that several pairs share."""
