r"""Importance weights: Pareto k, effective fraction, and moments after weighting.

The weights of draws :math:`z_s \sim q` are :math:`w_s = p(x, z_s) / q(z_s)`. Their effective fraction

.. math:: \frac{(\sum_s w_s)^2}{S \sum_s w_s^2} \to \frac{\mathrm{E}_q[w]^2}{\mathrm{E}_q[w^2]}

is 1 for the exact posterior. A normal guide with r times the standard deviations of a normal posterior of D dimensions
has :math:`(\sqrt{2 r^2 - 1} / r^2)^D`.

References: Yao et al. 2018, "Yes, but did it work?" (https://arxiv.org/abs/1802.02538); Vehtari et al. 2024, "Pareto
smoothed importance sampling" (https://arxiv.org/abs/1507.02646); Zhang and Stephens 2009, "A new and efficient
estimation method for the generalized Pareto distribution" (https://doi.org/10.1198/tech.2009.08017).
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from inference.core.lazy import pd, special

MIN_DRAWS = 25
"""Draws below which the tail of the weights cannot be fitted."""


MIN_TAIL = 5
"""Weights in the tail below which its shape cannot be fitted."""


def pareto_k(log_weights: Tensor) -> float:
    r"""Pareto k of importance weights (Yao et al. 2018, "Yes, but did it work?").

    The shape of a generalised Pareto distribution fitted to the largest
    :math:`\lceil \min(S / 5, 3 \sqrt S) \rceil` weights (Vehtari et al. 2024).

    Args:
        log_weights: Log density of the model minus that of the guide, per draw (S,), with S at least 25.
            ``psislw`` of ArviZ takes their negative, the log likelihood of an observation that is left out.

    Returns:
        k. Below 0.5 the guide is good; below 0.7 it is usable with importance weighting; above 0.7 it is unreliable.
        -inf if all weights are equal (the guide is the posterior), inf if fewer than five weights lie above the
        threshold of the tail, nan if some are not finite.

    Raises:
        ValueError: There are fewer than 25 draws.
    """
    if not isinstance(log_weights, Tensor) or log_weights.dim() != 1:
        got = tuple(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise ValueError(f"log_weights: expected a tensor (draws,), got {got}")
    weights = log_weights.detach().double().cpu().numpy()
    if len(weights) < MIN_DRAWS:
        raise ValueError(f"log_weights: expected at least {MIN_DRAWS} draws, got {len(weights)}")
    if not np.isfinite(weights).all():
        return float("nan")
    if np.ptp(weights) < 1e-6 * max(1.0, abs(weights).max()):
        return float("-inf")
    ordered = np.exp(np.sort(weights - weights.max()))
    count = math.ceil(min(len(ordered) / 5, 3 * len(ordered) ** 0.5))
    # Weights that underflow beside the largest are not part of the tail.
    cutoff = max(ordered[-count - 1], np.finfo(float).tiny)
    tail = ordered[ordered > cutoff] - cutoff
    return _pareto_shape(tail) if len(tail) >= MIN_TAIL else float("inf")


def _pareto_shape(x: np.ndarray) -> float:
    r"""Shape k of a generalised Pareto distribution from ascending values x (n,) above its threshold.

    The posterior mean of Zhang and Stephens (2009) over a grid of :math:`b = -k / \sigma`, then shrunk towards 1/2 with
    the weight of ten observations (Vehtari et al. 2024).
    """
    n, points = len(x), 30 + int(len(x) ** 0.5)
    with np.errstate(all="ignore"):
        b = 1 / x[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
        k = np.log1p(-b[:, None] * x).mean(1)
        weights = special.softmax(n * (np.log(-b / k) - k - 1))
        # Grid points of negligible weight are dropped, as ArviZ and the R package loo do.
        kept = weights >= 10 * np.finfo(float).eps
        mean = (weights * b)[kept].sum() / weights[kept].sum()
        shape = np.log1p(-mean * x).mean()
    return float((n * shape + 5) / (n + 10))


def effective_fraction(log_weights: Tensor) -> Tensor:
    r"""Effective fraction :math:`(\sum w)^2 / (S \sum w^2)` of weights along the first dimension; nan if not finite.

    Example:
        >>> import torch
        >>> f"{effective_fraction(torch.tensor([0.0, 0.0, -50.0, -50.0])):.2f}"
        '0.50'
    """
    weights = log_weights.detach().double()
    return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp() / len(weights)


def weigh(draws: np.ndarray, log_weights: np.ndarray) -> pd.DataFrame:
    r"""Moments of quantities after importance weighting, beside those before.

    Args:
        draws: Draws (S, quantities).
        log_weights: Their log weights, (S,).

    Returns:
        A line per quantity: ``mean`` and ``sd`` after weighting; ``shift``, the raw mean minus the weighted one in raw
        standard deviations; ``width``, the logarithm of the raw standard deviation over the weighted one; and the
        standard errors ``shift_error`` and ``width_error``, by the delta method over draws. Of a quantity that is the
        same in all draws these are nan.
    """
    x, count = draws.astype(float), len(draws)
    relative = np.exp(log_weights - log_weights.max())
    weights = (relative / relative.mean())[:, None]
    centred, after = x - x.mean(0), x - (weights * x).mean(0)
    raw, weighted = (centred**2).mean(0), (weights * after**2).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = np.sqrt(raw)
        width = 0.5 * (np.log(raw) - np.log(weighted))
        of_width = 0.5 * (centred**2 / raw - weights * after**2 / weighted)
        of_shift = (centred - weights * after) / sd
        shift = (x.mean(0) - (weights * x).mean(0)) / sd
        errors = {"shift_error": of_shift.std(0) / count**0.5, "width_error": of_width.std(0) / count**0.5}
    mean = (weights * x).mean(0)
    return pd.DataFrame({"mean": mean, "sd": np.sqrt(weighted), "shift": shift, "width": width, **errors})


def weigh_rows(draws: np.ndarray, log_weights: np.ndarray) -> pd.DataFrame:
    r"""Misfit of the quantities of a row after importance weighting, over all rows.

    Args:
        draws: Draws (S, rows, quantities).
        log_weights: Their log weights, (S, rows).

    Returns:
        A line per quantity: ``width``, the mean over rows of the logarithm of the raw standard deviation over that
        after weighting; ``shift``, the root mean square over rows of the raw mean minus the weighted one, in raw
        standard deviations, without the part that is Monte Carlo error; and their standard errors over rows,
        ``width_error`` and ``shift_error``.
    """
    rows = [weigh(draws[:, n], log_weights[:, n]) for n in range(draws.shape[1])]
    width, shift, noise = (np.stack([r[c] for r in rows]) for c in ("width", "shift", "shift_error"))
    # Rows draw on their own, so that their spread holds the Monte Carlo error; a single row has that alone.
    alone = rows[0]["width_error"].to_numpy()
    square, count = shift**2 - noise**2, len(rows)
    root = np.sqrt(square.mean(0).clip(0))
    spread = square.std(0, ddof=1) / count**0.5 if count > 1 else 2 * root * noise[0]
    return pd.DataFrame(
        {
            "width": width.mean(0),
            "width_error": width.std(0, ddof=1) / count**0.5 if count > 1 else alone,
            "shift": root,
            "shift_error": spread / np.maximum(2 * root, 1e-12),
        }
    )
