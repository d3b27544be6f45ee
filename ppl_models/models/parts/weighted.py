"""Posterior moments by importance sampling from a multivariate t at the mode: references without a guide or a chain."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

LEAST = 5000
"""Effective draws below which there is no reference."""


def weighted_draws(
    density: Callable[[Tensor], Tensor],
    start: Tensor,
    draws: int,
    *,
    freedom: int = 30,
    block: int = 10_000,
    least: float = LEAST,
) -> tuple[Tensor, Tensor]:
    """Draws (S, D) of a density of one mode, with normalised importance weights (S,).

    Args:
        density: From points (S, D) to log densities (S,), up to a constant; differentiable.
        start: Where the search for the mode begins, (D,).
        draws: Number of draws S.
        freedom: Degrees of freedom of the t.
        block: Points that are evaluated at once.
        least: Smallest effective number of draws.

    Raises:
        ArithmeticError: The effective sample size is below ``least``: the density is too far from a t.
    """
    mode = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([mode], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -density(mode[None])[0]
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
        hessian = torch.autograd.functional.hessian(lambda point: density(point[None])[0], mode.detach())
    mean, covariance = mode.detach(), torch.linalg.inv(-hessian)
    # Not torch's own random state, which a fit in another thread may be drawing from.
    random, kind = torch.Generator().manual_seed(0), start.dtype
    with torch.no_grad():
        # Mode and curvature of a skewed posterior are not its mean and covariance: a few rounds move there.
        rounds = [draws // 4] * 5 + [draws]
        while rounds:
            count = rounds.pop(0)
            scale = torch.linalg.cholesky(covariance * (freedom - 2) / freedom)
            proposal = dist.MultivariateStudentT(start.new_tensor(float(freedom)), mean, scale)
            # A sum of squares of normals is chi-squared.
            normal = torch.randn(count, len(start), generator=random, dtype=kind).to(start)
            squares = torch.randn(count, freedom, generator=random, dtype=kind).square().mean(1).to(start)
            theta = mean + normal @ scale.mT / squares.sqrt()[:, None]
            logs = torch.cat([density(part) for part in theta.split(max(1, block))])
            weights = (logs - proposal.log_prob(theta)).softmax(0)
            mean = weights @ theta
            covariance = (theta - mean).mT @ ((theta - mean) * weights[:, None])
            effective = float(1 / (weights**2).sum())
            if effective > count / 5:
                # Close enough: only the last round remains, with all draws.
                rounds = rounds[-1:] if count < draws else []
    if effective < least:
        raise ArithmeticError(
            f"importance sampling: {effective:.0f} effective draws of {count}, expected at least {least:g}"
        )
    return theta, weights


def moments_of(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation of values (S, \*shape) under weights (S,)."""
    mean = torch.tensordot(weights, values, 1)
    return mean, torch.tensordot(weights, (values - mean).square(), 1).sqrt()
