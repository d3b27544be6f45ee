r"""Kernel Stein discrepancy of draws from a density known up to a factor.

For a density p with score :math:`s(x) = \nabla \log p(x)` and a kernel k,

.. math:: k_p(x, y) = s(x)^T s(y)\, k + s(x)^T \nabla_y k + s(y)^T \nabla_x k + \mathrm{tr} \nabla_x \nabla_y^T k

has expectation zero over x from p, whatever y is. The squared discrepancy of draws is the mean of :math:`k_p` over
pairs of different draws: zero in expectation for draws of p, and positive for others. It takes no draws of p and no
normalising constant, only a gradient per draw. The kernel is the inverse multiquadric
:math:`k(x, y) = (1 + |x - y|^2 / \ell^2)^{-1/2}`, by which the discrepancy tells convergence to p where a Gaussian one
does not. Draws are taken in the unconstrained space in which kernels move, scaled to standard deviations of one.

What it cannot see: the weights of modes far apart, whose scores are the same whatever the weights.

References: Liu, Lee and Jordan 2016 (https://arxiv.org/abs/1602.03253); Chwialkowski, Strathmann and Gretton 2016
(https://arxiv.org/abs/1602.02964; the bootstrap); Gorham and Mackey 2017 (https://arxiv.org/abs/1703.01717; the
kernel).
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from inference.compiler.capture import Untraceable
from inference.compiler.potential import BatchedPotential
from inference.compiler.supports import follow_supports, images_as_supports
from inference.core.bound import BoundPair
from inference.core.handlers import first_valid

BOOTSTRAPS = 1000
"""Draws of the bootstrap."""


class Stein(NamedTuple):
    """A kernel Stein discrepancy.

    Attributes:
        value: Root of the mean of the Stein kernel over all pairs of draws, each with itself among them: positive.
        p: Probability of such a value for as many independent draws of the posterior, by the bootstrap.
        draws: Number of draws.
    """

    value: float
    p: float
    draws: int

    def __str__(self) -> str:
        return f"KSD {self.value:.3g} (p {self.p:.2g}, {self.draws} draws)"


def stein_matrix(x: Tensor, scores: Tensor, scale: float = 1.0) -> Tensor:
    r"""Stein kernel (S, S) of draws (S, D) and their scores (S, D), with the inverse multiquadric of a length scale."""
    dim, square = x.shape[1], scale**2
    distance = torch.cdist(x, x).square()
    base = 1 + distance / square
    # k = base^(-1/2); the gradient by y is (x - y) base^(-3/2) / scale^2, and that by x its opposite.
    along = (scores * x).sum(1)[:, None] - scores @ x.T
    cross = (along + along.T) * base**-1.5 / square
    trace = dim * base**-1.5 / square - 3 * distance * base**-2.5 / square**2
    return scores @ scores.T * base**-0.5 + cross + trace


def discrepancy(x: Tensor, scores: Tensor, random: torch.Generator) -> Stein:
    """Kernel Stein discrepancy of independent draws (S, D) with their scores (S, D), and its p-value.

    The null distribution is that of the statistic with the sign of each draw's terms at random (wild bootstrap). The
    length scale of the kernel is the median distance.
    """
    x, scores, count = x.double(), scores.double(), len(x)
    median = float(torch.pdist(x[:: max(1, count // 500)]).median())
    matrix = stein_matrix(x, scores, median or 1.0)
    value = float(matrix.mean())
    # Terms of a draw with itself are the same under all signs, so that they do not count in the comparison.
    off = matrix - torch.diag(matrix.diagonal())
    signs = torch.randint(0, 2, (BOOTSTRAPS, count), generator=random).to(off) * 2 - 1
    null = ((signs @ off) * signs).sum(1)
    above = int((null >= off.sum()).sum())
    return Stein(math.sqrt(max(value, 0.0)), (1 + above) / (1 + BOOTSTRAPS), count)


def scores_of(bound: BoundPair, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    r"""Draws (S, D) in unconstrained space and the gradient of their log density there, (S, D).

    Finite sites are summed out. One program computes all gradients, where the model can be traced; else they are
    computed one by one.

    Raises:
        ValueError: There is no continuous site, a draw of one is missing, the support of a site moves with others, or
            rows of the data are read by minibatches.
    """
    bound.check_in_memory("gradients of the log density")
    with warnings.catch_warnings(), torch.enable_grad(), images_as_supports():
        warnings.filterwarnings("ignore", message="Encountered")
        example, potential, transforms, trace = first_valid(
            lambda: initialize_model(bound.model, (), bound.arguments()), 100
        )
    names = list(example)
    missing = [n for n in names if n not in draws]
    if missing or not names:
        raise ValueError(f"draws: expected values of {', '.join(missing) or 'a continuous site'}, got none")
    moving = follow_supports(potential, trace, {}, [])
    if moving is not None:
        raise ValueError(f"model: expected sites of fixed supports, got one that moves: {', '.join(moving.names)}")
    count = len(draws[names[0]])
    free = {n: transforms[n](draws[n]) if n in transforms else draws[n] for n in names}
    with torch.enable_grad():
        try:
            density = BatchedPotential(potential, example, count)
        except Untraceable:
            density = BatchedPotential(potential, example, count, eager=True)
    x = density.pack({n: v.to(bound.device) for n, v in free.items()})
    return x.detach().cpu(), -density.run(x)[1].detach().cpu()


def stein(bound: BoundPair, draws: dict[str, Tensor], random: torch.Generator) -> Stein:
    """Kernel Stein discrepancy of independent draws from the posterior of a pair, with the parameters in the store."""
    x, scores = scores_of(bound, draws)
    kept = x.isfinite().all(1) & scores.isfinite().all(1)
    if not kept.all():
        raise ArithmeticError(f"the gradient is not finite at {int((~kept).sum())} of {len(x)} draws")
    sd = x.double().std(0)
    sd = torch.where(sd > 0, sd, torch.ones_like(sd))
    return discrepancy(x / sd, scores * sd, random)
