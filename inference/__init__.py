"""Two verbs for any Pyro pair, ``fit`` and ``sample``; one ``Result`` that ArviZ reads; one table, ``compare``."""

import warnings

with warnings.catch_warnings():
    # ArviZ announces its 1.0 at every import; what differs there is kept in one converter, result.py.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz  # noqa: F401

from inference import kernels, objectives
from inference.compare import Comparison, compare
from inference.diagnostics import Diagnosis, diagnose
from inference.fit import fit
from inference.likelihood import Evidence, log_likelihood
from inference.optim import Joint
from inference.predict import pointwise_log_likelihood, posterior_predictive, prior_predictive
from inference.queries import classify
from inference.result import Result
from inference.sample import sample

__all__ = [
    "Comparison",
    "Diagnosis",
    "Evidence",
    "Joint",
    "Result",
    "classify",
    "compare",
    "diagnose",
    "fit",
    "kernels",
    "log_likelihood",
    "objectives",
    "pointwise_log_likelihood",
    "posterior_predictive",
    "prior_predictive",
    "sample",
]
