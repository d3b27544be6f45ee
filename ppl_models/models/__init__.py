"""The pairs, one file each. They use Pyro and torch alone."""
