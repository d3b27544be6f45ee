r"""Scores of a Result: errors against a true posterior, and predictions of held-out rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.diagnostics import two_sample
from inference.draws.scoring import draw_sites
from inference.evidence.estimate import log_evidence
from inference.predict import classify, pointwise_log_likelihood
from inference.result import Result

Moments = Mapping[str, tuple[Tensor, Tensor]]

PARTICLES = 500
"""Particles of the guide per held-out row, for pairs with latent sites per row."""


def heldout_scores(result: Result, heldout: Any, label: str | None) -> dict[str, float]:
    """Scores of held-out rows: log predictive density, and accuracy and calibration of labels."""
    if heldout is None:
        return {}
    if not result.bound.observes:
        return sample_scores(result, heldout)
    try:
        density = _density(result, heldout)
    except (ValueError, RuntimeError) as error:
        # A guide with parameters per fitted row fails in torch with a mismatch of shapes.
        said = " ".join(str(error).split())[:200]
        warnings.warn(f"held-out rows are not scored: {said}", stacklevel=4)
        return {}
    sd = float(density.std()) if len(density) > 1 else math.nan
    scores = {"lpd": float(density.mean()), "lpd_se": sd / math.sqrt(len(density))}
    finite = [n for n, s in result.bound.sites.items() if s.finite]
    name = label or (finite[0] if len(finite) == 1 else "")
    # Labels that the fit drew, row by row, say nothing of other rows.
    if name not in finite or name in result.draws or not isinstance(heldout, Mapping) or name not in heldout:
        return scores
    probabilities, labels = classify(result, heldout, label=name), torch.as_tensor(heldout[name]).long()
    return scores | {
        "accuracy": float((probabilities.argmax(-1) == labels).double().mean()),
        "ece": calibration_error(probabilities, labels),
    }


def sample_scores(result: Result, heldout: Any) -> dict[str, float]:
    """Two-sample metrics of generated rows and as many held-out rows, for a model without a likelihood."""
    data = heldout if isinstance(heldout, Mapping) else {next(iter(result.bound.data)): heldout}
    names = [n for n in result.bound.generated if n in data]
    if not names:
        return {}
    generate_like = result.bound.asked.generate_like
    with isolated(0), result.state():
        if generate_like is not None:
            generated = generate_like(**data)
        else:
            inputs = bind(result.bound.pair, {n: v for n, v in data.items() if n not in names})
            drawn = draw_sites(inputs.generator(len(data[names[0]])), {}, 1)
            generated = {n: drawn[n][0] for n in names}
    scores = [_two_sample(torch.as_tensor(data[n]), generated[n]) for n in names]
    return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}


def _two_sample(real: Tensor, generated: Tensor) -> dict[str, float]:
    energy = two_sample.energy_distance(real, generated)
    return {
        "energy": energy.value,
        "energy_se": energy.error,
        "precision": two_sample.precision(real, generated).value,
        "recall": two_sample.recall(real, generated).value,
    }


def _density(result: Result, heldout: Any) -> Tensor:
    """Log predictive density of each row; latent sites per row are integrated out with particles of the guide."""
    bound = result.bound
    observed = {p for s in bound.select("observed").values() for p in s.plates}
    if bound.guided and all((observed - {None}) & set(bound.sites[n].plates) for n in bound.guided):
        return log_evidence(result, heldout, k=PARTICLES, progress=False).values
    score = pointwise_log_likelihood(result, heldout)
    return (score.logsumexp(0) - math.log(len(score))).double()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Expected calibration error (Guo et al. 2017): mean over rows of \|confidence - accuracy\|, by confidence bin.

    Args:
        probabilities: Class probabilities (rows, classes).
        labels: Classes (rows,).
        bins: Number of bins of equal width.

    Example:
        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 2)
        0.4
    """
    confidence, guess = probabilities.double().max(-1)
    correct = (guess == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    zero = torch.zeros(bins, dtype=torch.double)
    gap = zero.index_add(0, index, confidence) - zero.index_add(0, index, correct)
    return float(gap.abs().sum() / len(labels))


def truth_scores(result: Result, truth: Moments) -> dict[str, float]:
    """Errors of posterior means and ratios of standard deviations, summarised over all quantities."""
    errors, ratios = standardised_errors(result, truth)
    if not len(errors):
        return {}
    positive = ratios[ratios > 0]
    return {
        "error_max": float(np.abs(errors).max()),
        "error_rms": float(np.sqrt((errors**2).mean())),
        "sd_ratio": float(np.exp(np.log(positive).mean())) if len(positive) else 0.0,
    }


def standardised_errors(result: Result, truth: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Errors of posterior means in true standard deviations, and ratios of standard deviations to the true ones."""
    errors, ratios = [], []
    for name, (mean, sd) in truth.items():
        if name in result.draws:
            draws, mean, sd = result.draws[name].double(), mean.double(), sd.double()
            errors.append(((draws.mean(0) - mean) / sd).flatten())
            ratios.append((draws_sd(draws) / sd).flatten())
    empty = torch.zeros(0, dtype=torch.double)
    return torch.cat([*errors, empty]).numpy(), torch.cat([*ratios, empty]).numpy()


def draws_sd(draws: Tensor) -> Tensor:
    """Standard deviation over draws; zero for a single one."""
    return draws.double().std(0) if len(draws) > 1 else torch.zeros_like(draws[0], dtype=torch.double)
