"""Estimate the metric of Hamiltonian Monte Carlo from draws, dense or diagonal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inference.core.spacing import spaced
from inference.kernels.trajectory import Metric

MAX_DENSE_DIM = 200
"""Dimensions up to which a dense metric costs little compared with the gradients it saves."""


INDEPENDENT_FRACTION = 1 / 3
"""Number of independent draws that one draw of the warmup counts for."""


MOST_DRAWS = 1000
"""Draws that the volume of a mode of more dimensions is taken from."""


NARROW = 0.01
"""Variance, as a share of the marginal one, in directions in which a mode has no draws."""


def learn(draws: Tensor, old: Metric) -> tuple[Metric, float]:
    """Estimate the metric from draws.

    A dense estimate is shrunk towards the previous metric where there are few draws.

    Args:
        draws: Draws (S, D).
        old: The previous metric; the new one is dense or diagonal as it is.

    Returns:
        The metric, and the largest standard deviation of the whitened draws over all directions (1 if dense).
    """
    like, dim = old.covariance, draws.shape[-1]
    if like.dim() == 1:
        sd = positive_sd(draws)
        slowest = _largest_sd(draws / sd) if dim <= MAX_DENSE_DIM else 1.0
        return Metric(sd.square().to(like), *((1 / sd).to(like).clone() for _ in range(2))), slowest
    # In the coordinates of the previous metric shrinkage to the identity keeps what few draws cannot determine.
    previous = old.whitener.double()
    white = draws @ previous.T
    sd = positive_sd(white)
    shrinkage = (dim / (len(draws) * INDEPENDENT_FRACTION)) ** 2
    covariance = torch.cov((white / sd).T).reshape(dim, dim)
    correlation = (covariance + shrinkage * torch.eye(dim).to(white)) / (1 + shrinkage)
    root = sd[:, None] * torch.linalg.cholesky(correlation)
    factor = torch.linalg.solve(previous, root)
    whitener = torch.linalg.solve_triangular(root, previous, upper=False)
    return Metric((factor @ factor.T).to(like), whitener.contiguous().to(like), whitener.T.contiguous().to(like)), 1.0


def positive_sd(draws: Tensor) -> Tensor:
    """Standard deviation of each dimension of draws (S, D), with 1 in place of zero or non-finite values."""
    sd = draws.std(0)
    return torch.where((sd > 0) & sd.isfinite(), sd, 1.0)


def log_volume(draws: Tensor, *, least: bool) -> float:
    r"""Logarithm of the volume of a mode up to a constant: half the log determinant of the covariance of its draws.

    By marginal standard deviations alone a correlated mode would pass for a wide one. Few draws do not determine all
    directions: for an upper estimate the correlations are shrunk, for a lower one (``least``) directions without a draw
    count as narrow (``NARROW``).

    Args:
        draws: Draws (S, D).
        least: Whether to estimate the volume from below.
    """
    draws = draws[draws.isfinite().all(-1)]
    if len(draws) > MOST_DRAWS and draws.shape[1] > MAX_DENSE_DIM:
        draws = draws[spaced(len(draws), MOST_DRAWS)]
    size, dim = draws.shape
    if size < 2:
        return -math.inf if least else math.inf
    sd = positive_sd(draws)
    volume = float(sd.log().sum())
    shares = _shares(draws / sd).clamp(min=torch.finfo(sd.dtype).eps)
    if least:
        shares[: max(0, dim - size + 1)] = NARROW
    else:
        shrinkage = (dim / (size * INDEPENDENT_FRACTION)) ** 2
        shares = (shares + shrinkage) / (1 + shrinkage)
    return volume + 0.5 * float(shares.log().sum())


def _shares(draws: Tensor) -> Tensor:
    """Variances (D,) of draws (S, D) along the axes of their covariance, ascending, by what is smaller of S and D."""
    size, dim = draws.shape
    if dim <= size:
        return torch.linalg.eigvalsh(torch.cov(draws.T).reshape(dim, dim))
    centred = draws - draws.mean(0)
    # All but as many are zero.
    return torch.cat([draws.new_zeros(dim - size), torch.linalg.eigvalsh(centred @ centred.T / (size - 1))])


def _largest_sd(draws: Tensor) -> float:
    """Largest standard deviation of draws (S, D) over all directions."""
    return float(torch.linalg.matrix_norm(draws - draws.mean(0), 2)) / len(draws) ** 0.5
