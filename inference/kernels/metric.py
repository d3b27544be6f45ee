"""The metric of Hamiltonian chains, learnt from their draws: dense or diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.kernels.trajectory import Metric

DENSE = 200
"""Dimensions up to which a dense metric costs little beside the gradients it saves."""


INDEPENDENT_FRACTION = 1 / 3
"""Independent draws that one draw of the warmup is taken for."""


def learn(draws: Tensor, old: Metric) -> tuple[Metric, float]:
    """Metric of draws (S, D), as far as they are enough to tell it from the last, and the largest sd that it leaves."""
    like, dim = old.covariance, draws.shape[-1]
    if like.dim() == 1:
        width = spread(draws)
        slowest = _largest(draws / width) if dim <= DENSE else 1.0
        return Metric(width.square().to(like), *((1 / width).to(like).clone() for _ in range(2))), slowest
    # In the coordinates of the last metric, what few draws cannot tell stays as it was.
    last = old.whitener.double()
    white = draws @ last.T
    width = spread(white)
    few = (dim / (len(draws) * INDEPENDENT_FRACTION)) ** 2
    correlation = (torch.cov((white / width).T).reshape(dim, dim) + few * torch.eye(dim).to(white)) / (1 + few)
    root = width[:, None] * torch.linalg.cholesky(correlation)
    back = torch.linalg.solve(last, root)
    whitener = torch.linalg.solve_triangular(root, last, upper=False)
    return Metric((back @ back.T).to(like), whitener.contiguous().to(like), whitener.T.contiguous().to(like)), 1.0


def spread(draws: Tensor) -> Tensor:
    """Standard deviation of each dimension of draws (S, D); 1 where it is none."""
    width = draws.std(0)
    return torch.where((width > 0) & width.isfinite(), width, 1.0)


def _largest(standard: Tensor) -> float:
    """Standard deviation of the widest direction of draws (S, D)."""
    return float(torch.linalg.matrix_norm(standard - standard.mean(0), 2)) / len(standard) ** 0.5
