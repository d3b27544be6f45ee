"""Diagnostics of chains, guides and generated rows."""
