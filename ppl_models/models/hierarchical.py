r"""Hierarchical models with partial pooling: groups differ, and what is common to them is learnt from all.

- :class:`NormalMeans`: an estimate and its standard error per group, as of the eight schools (Rubin 1981).
- :class:`HierarchicalRegression`: rows in groups, with coefficients that vary from group to group.

Reference: Gelman et al. 2013, *Bayesian Data Analysis*, chapters 5 and 15.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor, nn
from torch.distributions.transforms import CumulativeDistributionTransform

from ppl_models.models.checks import check_count, check_guide, check_labels, check_matrix, check_numbers, check_positive
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked
from ppl_models.models.parts.weighted import moments_of, weighted_draws


class NormalMeans(Pair):
    r"""Estimates with known standard errors, partially pooled: the eight schools.

    .. math::

        \mu \sim \mathrm{N}(0, m^2), \quad \tau \sim \mathrm{HalfCauchy}(t), \quad z_n \sim \mathrm{N}(0, 1), \quad
        \theta_n = \mu + \tau z_n, \quad y_n \sim \mathrm{N}(\theta_n, e_n^2)

    The guide is exact for z given mu and tau; these two are jointly normal, tau on the scale of its prior's quantiles:
    :math:`\tau = F^{-1}(\Phi(u))`, so that the guide can be the prior where the data say nothing.

    Args:
        mean_scale: m, prior standard deviation of the common mean, in units of y.
        spread_scale: t, prior scale of the standard deviation between groups, in units of y.

    Data: y (N,) estimates, error (N,) their standard errors. Sites: mu (), tau (), z (N,), theta (N,) deterministic,
    y.
    """

    def __init__(self, *, mean_scale: float = 5.0, spread_scale: float = 5.0) -> None:
        super().__init__()
        check_positive("mean_scale", mean_scale)
        check_positive("spread_scale", spread_scale)
        self.register_buffer("mean_scale", torch.tensor(float(mean_scale)))
        self.register_buffer("spread_scale", torch.tensor(float(spread_scale)))
        self.register_buffer("unit", torch.tensor([0.0, 1.0]))
        self.loc = nn.Parameter(torch.zeros(2))
        self.log_scale = nn.Parameter(torch.zeros(2))
        self.slope = nn.Parameter(torch.zeros(()))

    def model(self, error: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw or score means and estimates; return y."""
        zero, one = self.unit.unbind()
        mu = pyro.sample("mu", dist.Normal(zero, self.mean_scale))
        tau = pyro.sample("tau", dist.HalfCauchy(self.spread_scale))
        with self.rows(error):
            z = pyro.sample("z", dist.Normal(zero, one))
            theta = pyro.deterministic("theta", mu + tau * z)
            return pyro.sample("y", dist.Normal(theta, error), obs=y)

    def guide(self, error: Tensor, y: Tensor | None = None) -> None:
        """Draw mu, tau given mu, and z from its posterior given both."""
        if y is None:
            raise ValueError("y: expected an estimate for every row, got none")
        zero, one = self.unit.unbind()
        scales = self.log_scale.exp()
        # A parameter in units of the prior.
        mu = pyro.sample("mu", dist.Normal(self.loc[0] * self.mean_scale, scales[0] * self.mean_scale))
        centre = self.loc[1] + self.slope * (mu / self.mean_scale - self.loc[0])
        quantile = [
            CumulativeDistributionTransform(dist.Normal(zero, one)),
            CumulativeDistributionTransform(dist.HalfCauchy(self.spread_scale)).inv,
        ]
        tau = pyro.sample("tau", dist.TransformedDistribution(dist.Normal(centre, scales[1]), quantile))
        with self.rows(error):
            total = tau**2 + error**2
            pyro.sample("z", dist.Normal(tau * (y - mu) / total, error / total.sqrt()))

    def check(self, error: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless each row has a positive standard error and a finite estimate."""
        check_numbers("error", error, len(error) if isinstance(error, Tensor) and error.dim() else 0)
        if not bool((error > 0).all()):
            raise ValueError(f"error: expected positive standard errors, got {float(error.min()):g}")
        if y is not None:
            check_numbers("y", y, len(error))

    @checked
    def moments(self, error: Tensor, y: Tensor, *, points: int = 4001) -> Moments:
        """Exact posterior mean and standard deviation of each site: normal given tau, and quadrature over tau."""
        check_count("points", points, 101)
        u = torch.linspace(-8.0, 8.0, points, dtype=torch.float64, device=y.device)
        error, y = error.double(), y.double()
        # tau at the quantiles of a standard normal, whose upper tail is that of its complement.
        tau = self.spread_scale.double() / torch.tan(math.pi / 2 * torch.special.ndtr(-u))
        total = tau[:, None] ** 2 + error**2
        precision = (1 / total).sum(1) + 1 / self.mean_scale.double() ** 2
        mean, variance = (y / total).sum(1) / precision, 1 / precision
        logs = -(u**2) / 2 - total.log().sum(1) / 2 + variance.log() / 2 - (y**2 / total).sum(1) / 2
        weights = (logs + mean**2 * precision / 2).softmax(0)
        share = tau[:, None] / total
        z, spread = share * (y - mean[:, None]), error**2 / total + share**2 * variance[:, None]

        def both(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
            centre, between = moments_of(mean, weights)
            return centre, (between**2 + torch.tensordot(weights, variance, 1)).sqrt()

        return {"mu": both(mean, variance), "tau": moments_of(tau, weights), "z": both(z, spread)}


class HierarchicalRegression(Pair):
    r"""Linear regression in groups, whose coefficients vary from group to group.

    .. math::

        m \sim \mathrm{N}(0, a^2), \qquad s \sim \mathrm{HalfNormal}(t), \qquad z_g \sim \mathrm{N}(0, I), \qquad
        c_g = m + s \odot z_g

    .. math:: \sigma \sim \mathrm{HalfNormal}(r), \qquad y_n \sim \mathrm{N}((1, x_n)^\top c_{g(n)}, \sigma^2)

    Args:
        features: Number of features D, or their names; the first coefficient is the intercept.
        groups: Number of groups G, or their names.
        scale: a, prior standard deviation of a mean coefficient, in units of y per unit of x.
        spread_scale: t, prior scale of the standard deviation of a coefficient between groups, in the same units.
        noise_scale: r, prior scale of the noise, in units of y.
        guide: From the model without z to a guide of the other sites. Default: AutoMultivariateNormal.

    The guide is exact for z given the other sites. It reads the rows of all groups, so there are no minibatches.

    Data: x (N, D), group (N,) integers, y (N,). Sites: mean (1 + D,), spread (1 + D,), sigma (), z (G, 1 + D),
    coefficients (G, 1 + D) deterministic, y.
    """

    by_rows = False

    def __init__(
        self,
        features: int | Sequence[str],
        groups: int | Sequence[str],
        *,
        scale: float = 2.0,
        spread_scale: float = 1.0,
        noise_scale: float = 1.0,
        guide: GuideFactory = AutoMultivariateNormal,
    ) -> None:
        super().__init__()
        check_guide(guide)
        for name, value in (("scale", scale), ("spread_scale", spread_scale), ("noise_scale", noise_scale)):
            check_positive(name, value)
            self.register_buffer(name, torch.tensor(float(value)))
        self.register_buffer("zero", torch.tensor(0.0))
        self.features = self.name_dimension("features", features)
        self.groups = self.name_dimension("groups", groups)
        if "features" in self.coords:
            self.coords["coefficients"] = ["intercept", *self.coords.pop("features")]
        self.dims = {n: ("coefficients",) for n in ("mean", "spread", "z")}
        self.dims["coefficients"] = ("groups", "coefficients")
        self.common = guide(poutine.block(self.model, hide=["z"]))

    def model(self, x: Tensor, group: Tensor, y: Tensor | None = None) -> Tensor:
        """Draw or score coefficients and y; return y."""
        width = (1 + self.features,)
        mean = pyro.sample("mean", dist.Normal(self.zero, self.scale).expand(width).to_event(1))
        spread = pyro.sample("spread", dist.HalfNormal(self.spread_scale).expand(width).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(self.noise_scale))
        with pyro.plate("groups", self.groups, dim=-1):
            z = pyro.sample("z", dist.Normal(self.zero, self.zero + 1).expand(width).to_event(1))
            coefficients = pyro.deterministic("coefficients", mean + spread * z, event_dim=1)
        with self.rows(x):
            own = coefficients[..., group.long(), :]
            return pyro.sample("y", dist.Normal(own[..., 0] + (own[..., 1:] * x).sum(-1), sigma), obs=y)

    def check(self, x: Any = None, group: Any = None, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a finite matrix (rows, D), and each row has a group and a finite number."""
        check_matrix("x", x, self.features)
        check_labels("group", group, len(x), self.groups, missing=False)
        if y is not None:
            check_numbers("y", y, len(x))

    def guide(self, x: Tensor, group: Tensor, y: Tensor | None = None) -> None:
        """Draw mean, spread and sigma, and z from its posterior given them."""
        if y is None:
            raise ValueError("y: expected a number for every row, got none")
        drawn = self.common(x=x, group=group, y=y)
        z, factor, _ = self._given(x, group, y)(drawn["mean"], drawn["spread"], drawn["sigma"])
        with pyro.plate("groups", self.groups, dim=-1):
            pyro.sample("z", dist.MultivariateNormal(z, precision_matrix=factor @ factor.mT))

    @checked
    def moments(self, x: Tensor, group: Tensor, y: Tensor, *, draws: int = 40_000) -> Moments:
        """Posterior mean and standard deviation of each site.

        The coefficients of the groups are integrated out exactly; the other sites are weighted draws of a multivariate
        t around their mode, of positive ones on the log scale.

        Raises:
            ArithmeticError: The effective sample size is below 5,000.
        """
        check_count("draws", draws, 5000)
        given, width = self._given(x, group, y), 1 + self.features

        def parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return theta[:, :width], theta[:, width:-1].exp(), theta[:, -1].exp()

        def density(theta: Tensor) -> Tensor:
            mean, spread, sigma = parts(theta)
            total = -(mean**2).sum(1) / (2 * self.scale**2) - sigma**2 / (2 * self.noise_scale**2)
            total = total - (spread**2).sum(1) / (2 * self.spread_scale**2)
            return total + theta[:, width:].sum(1) + given(mean, spread, sigma)[2]

        inputs = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        start = torch.cat([torch.linalg.lstsq(inputs, y[:, None]).solution[:, 0], x.new_full((width + 1,), -1.0)])
        theta, weights = weighted_draws(density, start, draws, block=200_000 // (self.groups * width**2))
        kept: list[tuple[Tensor, Tensor]] = []
        for part in theta.split(max(1, 200_000 // (self.groups * width**2))):
            z, factor, _ = given(*parts(part))
            kept.append((z, torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)))
        z, variance = (torch.cat(v) for v in zip(*kept, strict=True))
        centre, between = moments_of(z, weights)
        mean, spread, sigma = parts(theta)
        return {
            "mean": moments_of(mean, weights),
            "spread": moments_of(spread, weights),
            "sigma": moments_of(sigma, weights),
            "z": (centre, (between**2 + torch.tensordot(weights, variance, 1)).sqrt()),
        }

    def _given(self, x: Tensor, group: Tensor, y: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        r"""From mean, spread (..., P) and sigma (...) to the posterior of z given them.

        .. math::

            \Lambda_g = I + S X_g^\top X_g S / \sigma^2, \qquad
            \hat z_g = \Lambda_g^{-1} S X_g^\top (y_g - X_g m) / \sigma^2

        Returns:
            A function that returns the means (..., G, P), the Cholesky factors of the precisions (..., G, P, P), and
            log p(y | mean, spread, sigma) (...), up to a constant.
        """
        inputs = torch.cat([torch.ones_like(x[:, :1]), x], 1)
        member = (group[:, None] == torch.arange(self.groups, device=x.device)).to(x.dtype)
        # What the rows of a group say: X'X, X'y, y'y and their number.
        square = torch.einsum("ng,ni,nj->gij", member, inputs, inputs)
        cross, norm, size = torch.einsum("ng,ni,n->gi", member, inputs, y), member.mT @ y**2, member.sum(0)
        identity = torch.eye(1 + self.features, dtype=x.dtype, device=x.device)

        def given(mean: Tensor, spread: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            variance = sigma[..., None] ** 2
            moved = torch.einsum("gij,...j->...gi", square, mean)
            scaled = square * (spread[..., :, None] * spread[..., None, :])[..., None, :, :]
            factor = torch.linalg.cholesky(identity + scaled / variance[..., None, None])
            score = (cross - moved) * spread[..., None, :] / variance[..., None]
            z = torch.cholesky_solve(score[..., None], factor)[..., 0]
            rest = norm - 2 * torch.einsum("gi,...i->...g", cross, mean) + torch.einsum("...gi,...i->...g", moved, mean)
            logs = (score * z).sum(-1) / 2 - rest / (2 * variance) - size * variance.log() / 2
            return z, factor, (logs - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum(-1)

        return given
