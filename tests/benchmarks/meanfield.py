r"""AutoNormal written by hand in PyTorch: a diagonal Gaussian over the unconstrained values of two posteriors.

Where Pyro's AutoNormal samples sites, this samples one vector: less work, as people write it by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
Density = Callable[[Tensor], Tensor]


class MeanField(nn.Module):
    """Loss of a diagonal Gaussian guide: minus one draw of the evidence lower bound.

    Args:
        density: Log density of unconstrained values (size,).
        size: Number of values.
    """

    def __init__(self, density: Density, size: int, scale: float = 0.1) -> None:
        super().__init__()
        self.density = density
        self.loc = nn.Parameter(torch.zeros(size))
        self.unconstrained_scale = nn.Parameter(torch.full((size,), math.log(math.expm1(scale))))

    def forward(self) -> Tensor:
        scale = softplus(self.unconstrained_scale)
        noise = torch.randn_like(self.loc)
        entropy = (0.5 * noise**2 + scale.log() + HALF_LOG_TAU).sum()
        return -self.density(self.loc + scale * noise) - entropy


def normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale)
    return (-0.5 * ((value - loc) / scale) ** 2 - scale.log() - HALF_LOG_TAU).sum()


def eight_schools(error: Tensor, y: Tensor) -> tuple[Density, int]:
    def density(theta: Tensor) -> Tensor:
        mu, log_tau, eta = theta[0], theta[1], theta[2:]
        tau = log_tau.exp()
        half_cauchy = math.log(2 / (5 * math.pi)) - torch.log1p((tau / 5) ** 2) + log_tau
        return normal(mu, 0.0, 5.0) + half_cauchy + normal(eta, 0.0, 1.0) + normal(y, mu + tau * eta, error)

    return density, 2 + len(y)


def logistic_regression(x: Tensor, y: Tensor) -> tuple[Density, int]:
    labels = y.to(x.dtype)

    def density(theta: Tensor) -> Tensor:
        weights, intercept = theta[:-1], theta[-1]
        misfit = binary_cross_entropy_with_logits(x @ weights + intercept, labels, reduction="sum")
        return normal(weights, 0.0, 1.0) + normal(intercept, 0.0, 10.0) - misfit

    return density, x.shape[1] + 1


DENSITIES = {"eight_schools": eight_schools, "logistic_regression": logistic_regression}
