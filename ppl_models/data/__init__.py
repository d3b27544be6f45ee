"""Real data by name, and simulated data with the truth that made them."""

from ppl_models.data.sets import Dataset, hide_labels, load, names, prepared_rows
from ppl_models.data.simulate import simulate_modes, simulate_naive_bayes, simulate_returns

__all__ = [
    "Dataset",
    "hide_labels",
    "load",
    "names",
    "prepared_rows",
    "simulate_modes",
    "simulate_naive_bayes",
    "simulate_returns",
]
