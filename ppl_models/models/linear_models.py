r"""Regression of a number or a count on features: normal or Student noise, or a Poisson distribution.

.. math:: w \sim \mathrm{N}(0, s^2), \qquad b \sim \mathrm{N}(0, t^2), \qquad y_n \sim p(\cdot \mid b + w^\top x_n)

x is an input, not a site. The guide is a full-rank normal distribution of the unconstrained parameters, near which the
posterior is where there are many more rows than features.

Reference: Gelman et al. 2013, *Bayesian Data Analysis*, chapters 14, 16 and 17.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from ppl_models.models.checks import (
    check_count,
    check_entries,
    check_guide,
    check_matrix,
    check_numbers,
    check_one_of,
    check_positive,
    fractional,
)
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked
from ppl_models.models.parts.weighted import moments_of, weighted_draws
from ppl_models.models.regression import affine, draw_weights


class Regression(Pair):
    """Base class: a number y for each row, given a linear function of x.

    Args:
        features: Number of features D, or their names.
        scale: s, prior standard deviation of a weight, in units of the linear function per unit of x.
        intercept_scale: t, prior standard deviation of the intercept.
        guide: From the model to a guide. Default: AutoMultivariateNormal.

    Data: x (N, D), y (N,) floats. Sites: weights (D,), intercept (), y, and those of a subclass.
    """

    FREE: tuple[str, ...] = ()
    """Further sites, all positive."""

    def __init__(
        self,
        features: int | Sequence[str],
        *,
        scale: float = 2.0,
        intercept_scale: float = 10.0,
        guide: GuideFactory = AutoMultivariateNormal,
    ) -> None:
        super().__init__()
        check_positive("scale", scale)
        check_positive("intercept_scale", intercept_scale)
        check_guide(guide)
        self.features = self.name_dimension("features", features)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("intercept_scale", torch.tensor(float(intercept_scale)))
        self.dims = {"weights": ("features",)}
        self.guide = guide(self.model)

    @abstractmethod
    def priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of each further site."""

    @abstractmethod
    def noise(self, mean: Tensor, *further: Tensor) -> dist.TorchDistribution:
        """p(y) given the linear function and the further sites."""

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw or score weights and y; return y."""
        weights = draw_weights("weights", self.scale, (self.features,))
        intercept = draw_weights("intercept", self.intercept_scale, ())
        further = [pyro.sample(name, prior) for name, prior in self.priors().items()]
        with self.rows(x):
            mean = affine(x, weights.unsqueeze(-2), intercept.unsqueeze(-1))[..., 0]
            return pyro.sample("y", self.noise(mean, *further), obs=y)

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and y has a finite number for each of its rows."""
        check_matrix("x", x, self.features)
        if y is not None:
            check_numbers("y", y, len(x))

    @checked
    def moments(self, x: Tensor, y: Tensor, *, draws: int = 100_000) -> Moments:
        """Posterior mean and standard deviation of each site by importance sampling.

        The proposal is a multivariate t around the mode, of positive sites on the log scale. Neither a guide nor a
        chain has a part in it.

        Raises:
            ValueError: y is missing.
            ArithmeticError: The effective sample size is below 5,000: the posterior is too far from a t.
        """
        check_count("draws", draws, 5000)
        if y is None:
            raise ValueError("y: expected a number for every row, got none")
        priors, width = self.priors(), self.features

        def parts(theta: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            return theta[:, :width], theta[:, width], [v.exp() for v in theta[:, width + 1 :].unbind(1)]

        def density(theta: Tensor) -> Tensor:
            weights, intercept, further = parts(theta)
            total = -(weights**2).sum(1) / (2 * self.scale**2) - intercept**2 / (2 * self.intercept_scale**2)
            for value, prior in zip(further, priors.values(), strict=True):
                total = total + prior.log_prob(value) + value.log()
            fit = self.noise(intercept[:, None] + weights @ x.mT, *(v[:, None] for v in further))
            return total + fit.log_prob(y).sum(1)

        start = x.new_zeros(width + 1 + len(priors))
        theta, chance = weighted_draws(density, start, draws, block=2_000_000 // len(x))
        weights, intercept, further = parts(theta)
        found = {"weights": weights, "intercept": intercept, **dict(zip(priors, further, strict=True))}
        return {name: moments_of(value, chance) for name, value in found.items()}


class LinearRegression(Regression):
    r"""Linear regression with normal noise, or with Student noise, which outliers do not pull.

    .. math::

        w \sim \mathrm{N}(0, s^2), \qquad b \sim \mathrm{N}(0, t^2), \qquad \sigma \sim \mathrm{HalfNormal}(r), \qquad
        y_n \sim \mathrm{N}(b + w^\top x_n, \sigma^2)

    With ``noise="student"``, :math:`\nu \sim \mathrm{Gamma}(2, 0.1)` (Juárez and Steel 2010) and
    :math:`y_n \sim \mathrm{StudentT}(\nu, b + w^\top x_n, \sigma)`.

    Args:
        noise: "normal" or "student".
        noise_scale: r, prior scale of the noise, in units of y.

    The other arguments are those of :class:`Regression`. Sites: weights (D,), intercept (), sigma (), with Student
    noise nu (), y.
    """

    def __init__(
        self, features: int | Sequence[str], *, noise: str = "normal", noise_scale: float = 5.0, **shared: Any
    ) -> None:
        check_one_of("noise", noise, ("normal", "student"))
        check_positive("noise_scale", noise_scale)
        super().__init__(features, **shared)
        self.student = noise == "student"
        self.register_buffer("noise_scale", torch.tensor(float(noise_scale)))
        self.register_buffer("freedom", torch.tensor([2.0, 0.1]))

    def priors(self) -> dict[str, dist.TorchDistribution]:
        sigma = {"sigma": dist.HalfNormal(self.noise_scale)}
        return {**sigma, "nu": dist.Gamma(*self.freedom.unbind())} if self.student else sigma

    def noise(self, mean: Tensor, *further: Tensor) -> dist.TorchDistribution:
        if self.student:
            sigma, nu = further
            return dist.StudentT(nu, mean, sigma)
        return dist.Normal(mean, further[0])


class PoissonRegression(Regression):
    r"""Poisson regression of counts, with the logarithm as link.

    .. math::

        w \sim \mathrm{N}(0, s^2), \qquad b \sim \mathrm{N}(0, t^2), \qquad
        y_n \sim \mathrm{Poisson}(\exp(b + w^\top x_n))

    The arguments are those of :class:`Regression`. Sites: weights (D,), intercept (), y. Counts that vary by more than
    their mean show in a posterior predictive check of their standard deviation.
    """

    def priors(self) -> dict[str, dist.TorchDistribution]:
        return {}

    def noise(self, mean: Tensor, *further: Tensor) -> dist.TorchDistribution:
        # Far outside, as at the first step of a chain, the rate would overflow.
        return dist.Poisson(mean.clamp(max=50.0).exp())

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and y has a count for each of its rows."""
        super().check(x, y)
        if y is not None:
            check_entries("y", y, (y < 0) | fractional(y), "counts (0, 1, 2, ...)")
