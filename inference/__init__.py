"""Fit, sample and compare any Pyro pair: one ``Result`` that ArviZ reads."""

from importlib.metadata import version
from typing import Any

from inference import kernels, objectives
from inference._fit import fit
from inference._sample import sample
from inference.checkpoint import Checkpoint
from inference.comparison.calibrate import calibrate
from inference.comparison.compare import compare
from inference.comparison.judgement import ksd, loo, sensitivity
from inference.comparison.methods import Method
from inference.comparison.scores import Moments
from inference.comparison.table import COLUMNS, Comparison
from inference.compression import Compressed, compress, decompress
from inference.core.files import stem_of, write_whole
from inference.core.group import launched
from inference.core.handlers import exclusive, isolated
from inference.denoising import Denoised, denoise, super_resolve
from inference.diagnostics import two_sample
from inference.diagnostics.calibration import Calibration
from inference.diagnostics.convergence import Diagnosis, diagnose
from inference.diagnostics.stein import Stein
from inference.diagnostics.weights import pareto_k
from inference.evidence.estimate import Evidence, log_evidence
from inference.imputation import Imputation, impute
from inference.optim import Joint
from inference.outliers import OutlierScores, outlier_score
from inference.predict import (
    classify,
    latent_kl,
    log_weights,
    pointwise_log_likelihood,
    posterior_predictive,
    prior_predictive,
)
from inference.result import Result
from inference.saved import Saved
from inference.stored import open_draws

__all__ = [
    "COLUMNS",
    "Calibration",
    "Checkpoint",
    "Comparison",
    "Compressed",
    "Denoised",
    "Diagnosis",
    "Evidence",
    "Imputation",
    "Joint",
    "Method",
    "Moments",
    "OutlierScores",
    "Result",
    "Saved",
    "Stein",
    "calibrate",
    "classify",
    "compare",
    "compress",
    "decompress",
    "denoise",
    "diagnose",
    "exclusive",
    "fit",
    "impute",
    "isolated",
    "kernels",
    "ksd",
    "latent_kl",
    "launched",
    "log_evidence",
    "log_weights",
    "loo",
    "objectives",
    "open_draws",
    "outlier_score",
    "pareto_k",
    "pointwise_log_likelihood",
    "posterior_predictive",
    "prior_predictive",
    "sample",
    "sensitivity",
    "stem_of",
    "super_resolve",
    "two_sample",
    "write_whole",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ppl-models")
    raise AttributeError(f"module 'inference' has no attribute {name!r}")
