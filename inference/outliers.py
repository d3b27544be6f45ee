r"""Outliers: how unlikely each row is under a fitted pair, with a false-alarm rate that holds in finite samples.

The score of a row is :math:`s(x) = -\log p(x \mid D)`. Among the scores :math:`s_1, \dots, s_n` of calibration rows its
rank gives the conformal p-value

.. math:: p = \frac{1 + \#\{i : s_i \ge s(x)\}}{n + 1}

If the row is exchangeable with the calibration rows, then :math:`P(p \le \alpha) \le \alpha` for every n, whether the
model is right or not: a wrong model costs power, not validity.

Reference: Vovk, Gammerman and Shafer 2005, Algorithmic Learning in a Random World; Bates et al. 2023, "Testing for
Outliers with Conformal p-values" (https://arxiv.org/abs/2104.08279).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_chance, check_count
from inference.core.handlers import isolated
from inference.core.lazy import azs
from inference.evidence.estimate import log_evidence
from inference.idata import seen_rows
from inference.predict import pointwise_log_likelihood
from inference.result import Result


@dataclass(frozen=True, eq=False)
class OutlierScores:
    r"""Scores of rows and what calibration rows say of them.

    Attributes:
        scores: :math:`-\log p(x \mid D)` of each row in nats, (rows,): more is stranger.
        errors: Monte Carlo standard error of each score, (rows,); 0 if exact.
        p_values: Conformal p-value of each row, (rows,).
        rate: False-alarm rate :math:`\alpha`: the probability that a row like those of the calibration is flagged is at
            most this.
        threshold: Score above which a row is flagged, which is where its p-value is at most the rate.
        calibration: Scores of the calibration rows, (n,).
        held_out: Whether the calibration rows were given. Those of the fit have lower scores than new ones, so that
            the rate is somewhat above the one stated.
    """

    scores: Tensor
    errors: Tensor
    p_values: Tensor
    rate: float
    threshold: float
    calibration: Tensor
    held_out: bool

    @property
    def flagged(self) -> Tensor:
        """Whether each row is taken for an outlier, (rows,)."""
        return self.scores > self.threshold

    def __str__(self) -> str:
        kind = "held-out rows" if self.held_out else "rows of the fit, so that the rate is a lower bound"
        return (
            f"{int(self.flagged.sum())} of {len(self.scores)} rows above {self.threshold:.2f} nats, at a false-alarm "
            f"rate of {self.rate:g} by {len(self.calibration)} {kind}"
        )


def outlier_score(
    result: Result, data: Any, *, calibration: Any = None, rate: float = 0.05, k: int = 1000, seed: int = 0
) -> OutlierScores:
    r"""Score rows by :math:`-\log p(x \mid D)`, and flag those that are too strange at a false-alarm rate.

    With global parameters p(x | D) is the mean density over the posterior draws, otherwise the evidence of the row
    under the fitted parameters: exact where the pair knows it, else importance-weighted (:func:`log_evidence`). Data
    that the model conditions on, such as labels, are given with the rows; without labels of a generative classifier
    they are summed out.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Rows to score.
        calibration: Rows without outliers that the fit has not seen: only then is the rate guaranteed. Default: the
            rows of the fit.
        rate: False-alarm rate.
        k: Particles per row, where the evidence is estimated.
        seed: Seed of these particles.

    Returns:
        An OutlierScores with scores, p-values and what is flagged.

    Raises:
        ValueError: The model has no likelihood or no density of a row, or there are too few calibration rows for the
            rate: one row can be flagged only where :math:`\alpha \ge 1 / (n + 1)`.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from inference import fit
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> rows = torch.linspace(-2.0, 2.0, 99)
        >>> result = fit((model, lambda x: None), rows, steps=100, progress=False)
        >>> found = outlier_score(result, torch.tensor([0.5, 4.0]), calibration=rows)
        >>> found.p_values, found.flagged
        (tensor([0.7500, 0.0100], dtype=torch.float64), tensor([False,  True]))
    """
    check_chance("rate", rate)
    check_count("k", k)
    check_count("seed", seed, 0)
    bound = result.bound
    if not bound.observes:
        raise ValueError(f"result: expected a model with a likelihood, got {bound.name}, which observes nothing")
    held_out = calibration is not None
    if calibration is None:
        bound.check_in_memory("calibration")
        given = bound.rebound(data).data
        calibration = {n: v for n, v in bound.data.items() if n in given}
    hidden = ~_seen(result, data)
    if hidden.any():
        row = int(hidden.nonzero()[0])
        raise ValueError(f"data: expected rows that are seen, got one that a mask hides, row {row}")
    # Its own noise for each row: the scores of all rows are then exchangeable if the rows are.
    scores, errors = _scores(result, data, k, seed)
    known = _scores(result, calibration, k, seed + 1)[0][_seen(result, calibration)]
    threshold = _threshold(known, float(rate))
    return OutlierScores(scores, errors, conformal(scores, known), float(rate), threshold, known, held_out)


def conformal(scores: Tensor, calibration: Tensor) -> Tensor:
    """P-value (1 + the number of calibration scores that are not below) / (n + 1) of each score.

    Example:
        >>> conformal(torch.tensor([0.5, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.7500, 0.2500], dtype=torch.float64)
    """
    ordered = calibration.sort().values
    not_below = len(ordered) - torch.searchsorted(ordered, scores.contiguous())
    return (1 + not_below).double() / (len(ordered) + 1)


def _threshold(calibration: Tensor, rate: float) -> float:
    """The largest score with a p-value above the rate."""
    count = len(calibration)
    # The rounding of a product such as 0.29 * 100 must not cost a row.
    allowed = math.floor(rate * (count + 1) * (1 + 1e-12)) - 1
    if allowed < 0:
        raise ValueError(
            f"rate: expected at least {1 / (count + 1):.2g} with {count} calibration rows, got {rate:g}; give more rows"
        )
    return -math.inf if allowed >= count else float(calibration.sort(descending=True).values[allowed])


def _scores(result: Result, data: Any, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores of rows, in double precision, and their Monte Carlo errors."""
    bound = result.bound
    if _global(bound):
        density = pointwise_log_likelihood(result, data).double()
        chains = result.groups["posterior"].sizes["chain"] if "sample_stats" in result.groups else 1
        values, errors = density.logsumexp(0) - math.log(len(density)), _errors(density, chains)
    else:
        exact = bound.asked.log_evidence is not None or not (bound.guided or bound.unguided)
        kind = "exact" if exact else "importance"
        evidence = log_evidence(result, data, kind, k=k, seed=seed, progress=False)
        values, errors = evidence.values, evidence.errors
    if values.isnan().any():
        raise ValueError(f"data: expected rows with a density, got nan at row {int(values.isnan().nonzero()[0])}")
    return -values, errors


def _seen(result: Result, data: Any) -> Tensor:
    """Whether a mask leaves something of each row, (rows,): a hidden one has a density of 1, whatever it is."""
    bound = result.bound.rebound(data)
    with isolated(0), result.state():
        # Latent sites of rows have draws for the rows of the fit: a mask may not depend on them.
        return seen_rows(bound, {n: v for n, v in result.draws.items() if n in _global(bound)})


def _global(bound: BoundPair) -> list[str]:
    """Latent sites that lie outside of the plate of the observed rows."""
    rows = {p for s in bound.select("observed").values() for p in s.plates if p}
    return [s.name for s in bound.select("latent").values() if not rows & set(s.plates)]


def _errors(density: Tensor, chains: int) -> Tensor:
    """Monte Carlo error of the log of the mean density of each row, from log densities (S, rows) of all chains."""
    relative = (density - density.logsumexp(0) + math.log(len(density))).exp()
    if len(density) == 1:
        return torch.zeros_like(relative[0])
    sd = torch.where((density != density[0]).any(0), relative.std(0), 0.0)
    size = torch.full_like(sd, len(density))
    if chains > 1:
        size = torch.as_tensor(azs.ess(relative.reshape(chains, -1, len(sd)).numpy())).to(sd)
        # Equal draws have no effective number, and no error either.
        size = torch.where(size.isfinite() & (sd > 0), size, torch.full_like(sd, len(density) / chains))
    return sd / size.sqrt()
