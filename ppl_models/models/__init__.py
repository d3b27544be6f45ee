"""The pairs: one file per family, on Pyro and torch alone."""
