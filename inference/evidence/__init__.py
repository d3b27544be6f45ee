"""Estimators of log p(x): exact, importance-weighted, annealed."""
