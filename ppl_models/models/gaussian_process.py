r"""Gaussian process regression, with its hyperparameters as latent sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from ppl_models.models.checks import check_count, check_guide, check_matrix, check_numbers, check_one_of, check_positive
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked
from ppl_models.models.parts.weighted import moments_of, weighted_draws

JITTER = 1e-6
"""Part of the noise that cannot vanish, in units of y squared: without it a covariance may not be positive."""


LEAST = 2000.0
"""Effective draws of :meth:`GaussianProcess.moments`, each of which factors a covariance."""


class GaussianProcess(Pair):
    r"""A smooth function with normal noise.

    .. math::

        \rho \sim \mathrm{InverseGamma}(5, 5 r), \qquad \alpha \sim \mathrm{HalfNormal}(s), \qquad
        \sigma \sim \mathrm{HalfNormal}(s), \qquad
        y \sim \mathrm{N}(0, \alpha^2 k(x, x) + \sigma^2 I)

    with the squared exponential :math:`k = \exp(-d^2 / 2 \rho^2)`, or Matérn's with smoothness 3/2,
    :math:`k = (1 + \sqrt{3} d / \rho) \exp(-\sqrt{3} d / \rho)`, of the Euclidean distance d. The function is
    integrated out, so all rows are one observation; predictions without conditioning on y are other functions, and
    :meth:`predict` conditions on y.

    Args:
        features: Number of inputs D, or their names.
        kernel: "matern32" or "squared_exponential".
        length: r, about the prior mean of the length scale, in units of x.
        scale: s, prior scale of function and noise, in units of y.
        guide: From the model to a guide. Default: AutoMultivariateNormal.

    Data: x (N, D), y (N,). Sites: length (), amplitude (), sigma (), y.

    Reference: Rasmussen and Williams 2006, *Gaussian Processes for Machine Learning*.
    """

    by_rows = False

    def __init__(
        self,
        features: int | Sequence[str] = 1,
        *,
        kernel: str = "matern32",
        length: float = 1.0,
        scale: float = 1.0,
        guide: GuideFactory = AutoMultivariateNormal,
    ) -> None:
        super().__init__()
        check_guide(guide)
        check_one_of("kernel", kernel, ("matern32", "squared_exponential"))
        check_positive("length", length)
        check_positive("scale", scale)
        self.features = self.name_dimension("features", features)
        self.rough = kernel == "matern32"
        self.register_buffer("shape", torch.tensor(5.0))
        self.register_buffer("rate", torch.tensor(5.0 * length))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("zero", torch.tensor(0.0))
        self.dims = {"y": ("rows",)}
        self.guide = guide(self.model)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw or score hyperparameters and y; return y."""
        length = pyro.sample("length", dist.InverseGamma(self.shape, self.rate))
        amplitude = pyro.sample("amplitude", dist.HalfNormal(self.scale))
        sigma = pyro.sample("sigma", dist.HalfNormal(self.scale))
        mean = self.zero.expand(len(x))
        return pyro.sample("y", dist.MultivariateNormal(mean, self._covariance(x, length, amplitude, sigma)), obs=y)

    def _covariance(self, x: Tensor, length: Tensor, amplitude: Tensor, sigma: Tensor) -> Tensor:
        """Covariance of y (..., N, N) at hyperparameters (...)."""
        amplitude, sigma = amplitude[..., None, None], sigma[..., None, None]
        noise = (sigma**2 + JITTER) * torch.eye(len(x), dtype=x.dtype, device=x.device)
        return amplitude**2 * self._kernel(x, x, length) + noise

    def _kernel(self, one: Tensor, other: Tensor, length: Tensor) -> Tensor:
        square = (one[:, None] - other).square().sum(-1) / length[..., None, None] ** 2
        if not self.rough:
            return torch.exp(-square / 2)
        # The root has no gradient at zero, where the kernel has one.
        reach = math.sqrt(3.0) * square.clamp_min(1e-24).sqrt()
        return (1 + reach) * torch.exp(-reach)

    def check(self, x: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D) and y has a finite number for each of its rows."""
        check_matrix("x", x, self.features)
        if y is not None:
            check_numbers("y", y, len(x))

    @checked
    def predict(self, x: Tensor, y: Tensor, new: Tensor, draws: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Mean and standard deviation (M,) of the function at new inputs, given y, over posterior draws.

        .. math:: \mathrm{E} f_* = k_*^\top K^{-1} y, \qquad \mathrm{Var} f_* = k_{**} - k_*^\top K^{-1} k_*

        Args:
            x: Inputs (N, D) of the data.
            y: Their values (N,).
            new: Inputs (M, D).
            draws: Draws of the hyperparameters, ``result.draws``.
        """
        check_matrix("new", new, self.features)
        means, variances = [], []
        with torch.no_grad():
            for length, amplitude, sigma in zip(*(draws[n] for n in ("length", "amplitude", "sigma")), strict=True):
                factor = torch.linalg.cholesky(self._covariance(x, length, amplitude, sigma))
                across = amplitude**2 * self._kernel(x, new, length)
                white = torch.linalg.solve_triangular(factor, across, upper=False)
                means.append(across.mT @ torch.cholesky_solve(y[:, None], factor)[:, 0])
                variances.append((amplitude**2 - white.square().sum(0)).clamp_min(0.0))
        mean = torch.stack(means)
        return mean.mean(0), (torch.stack(variances).mean(0) + mean.var(0, correction=0)).sqrt()

    @checked
    def moments(self, x: Tensor, y: Tensor, *, draws: int = 12_000) -> Moments:
        """Posterior mean and standard deviation of each site by importance sampling.

        The proposal is a multivariate t around the mode of the logarithms. Neither a guide nor a chain has a part in
        it.

        Raises:
            ArithmeticError: The effective sample size is below 2,000.
        """
        check_count("draws", draws, 2000)

        def density(theta: Tensor) -> Tensor:
            length, amplitude, sigma = theta.exp().unbind(1)
            total = theta.sum(1) - (amplitude**2 + sigma**2) / (2 * self.scale**2)
            total = total - (self.shape + 1) * length.log() - self.rate / length
            factor = torch.linalg.cholesky(self._covariance(x, length, amplitude, sigma))
            white = torch.linalg.solve_triangular(factor, y[:, None].expand(len(theta), -1, 1), upper=False)
            return total - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - white.square().sum((-1, -2)) / 2

        start = torch.stack([self.rate.log() - math.log(5.0), y.std().log(), y.std().log() - 1]).to(y)
        # Length scales and amplitudes have heavy tails where the data say little.
        block = 4_000_000 // len(x) ** 2
        theta, weights = weighted_draws(density, start, draws, freedom=4, block=block, least=LEAST)
        names = ("length", "amplitude", "sigma")
        return {n: moments_of(v, weights) for n, v in zip(names, theta.exp().unbind(1), strict=True)}
