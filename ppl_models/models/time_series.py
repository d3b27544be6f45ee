r"""Time series: a hidden Markov model, and a GARCH model of volatility.

The whole series is one observation: its entries are not exchangeable, so there are no minibatches and no held-out rows.
Predictions of a fitted pair are other series of the same length.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

from ppl_models.models.checks import (
    check_count,
    check_entries,
    check_guide,
    check_numbers,
    check_one_of,
    check_positive,
    fractional,
)
from ppl_models.models.pair import GuideFactory, Moments, Pair, checked
from ppl_models.models.parts.distributions import Rowwise
from ppl_models.models.parts.weighted import moments_of, weighted_draws


class Series(Pair):
    """Base class: a series y of T numbers, which is one observation."""

    by_rows = False

    def check(self, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless y is a series of finite numbers."""
        if y is not None:
            check_numbers("y", y, len(y) if isinstance(y, Tensor) and y.dim() else 0)


def length_of(y: Tensor | None, size: int | None) -> int:
    """Length of a series: that of the data, or of one that is to be drawn."""
    if y is not None:
        return len(y)
    if size is None:
        raise ValueError("size: expected the length of the series to draw when y is not given, got None")
    return int(size)


class HiddenMarkovModel(Series):
    r"""A hidden Markov chain of states with ordered levels, of counts or of numbers.

    .. math::

        A_k \sim \mathrm{Dirichlet}(1 + c\,e_k), \qquad g_k \sim \mathrm{HalfNormal}(s), \qquad
        l_k = g_1 + \dots + g_k

    .. math::

        z_0 \sim \mathrm{Uniform}, \qquad z_t \sim \mathrm{Categorical}(A_{z_{t-1}}), \qquad
        y_t \sim \mathrm{Poisson}(l_{z_t})

    With ``noise="normal"`` the first level is :math:`l_1 \sim \mathrm{N}(0, s^2)`, and
    :math:`y_t \sim \mathrm{N}(l_{z_t}, \sigma^2)` with :math:`\sigma \sim \mathrm{HalfNormal}(s)`. The states are
    summed out by Pyro's DiscreteHMM, in a number of steps that grows as log T.

    Args:
        states: Number of states K.
        noise: "poisson" or "normal".
        scale: s, prior scale of the levels and of their distances, in units of y.
        stickiness: c, prior weight of staying in a state.
        guide: From the model to a guide. Default: AutoMultivariateNormal.

    Data: y (T,). Sites: transitions (K, K); gaps (K,), or for normal noise first (), gaps (K - 1,) and sigma (); levels
    (K,) deterministic; y.

    Reference: Zucchini, MacDonald and Langrock 2016, *Hidden Markov Models for Time Series*.
    """

    def __init__(
        self,
        states: int = 2,
        *,
        noise: str = "poisson",
        scale: float = 10.0,
        stickiness: float = 0.0,
        guide: GuideFactory = AutoMultivariateNormal,
    ) -> None:
        super().__init__()
        check_guide(guide)
        check_count("states", states, 2)
        check_one_of("noise", noise, ("poisson", "normal"))
        check_positive("scale", scale)
        check_positive("stickiness", stickiness, zero=True)
        self.states, self.counts = int(states), noise == "poisson"
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("zero", torch.tensor(0.0))
        self.register_buffer("concentration", 1 + float(stickiness) * torch.eye(self.states))
        self.register_buffer("uniform", torch.zeros(self.states))
        names = [f"state_{k + 1}" for k in range(self.states)]
        self.coords |= {"from": names, "to": names, "states": names}
        self.dims |= {"transitions": ("from", "to"), "levels": ("states",), "y": ("time",)}
        self.guide = guide(self.model)

    def model(self, y: Tensor | None = None, size: int | None = None) -> Tensor:
        """Draw or score transitions, levels and the series; return the series."""
        transitions = pyro.sample("transitions", dist.Dirichlet(self.concentration).to_event(1))
        first = () if self.counts else (pyro.sample("first", dist.Normal(self.zero, self.scale))[..., None],)
        width = (self.states - len(first),)
        gaps = pyro.sample("gaps", dist.HalfNormal(self.scale).expand(width).to_event(1))
        levels = pyro.deterministic("levels", torch.cat([*first, gaps], -1).cumsum(-1), event_dim=1)[..., None, :]
        if self.counts:
            emissions: Any = dist.Poisson(levels)
        else:
            sigma = pyro.sample("sigma", dist.HalfNormal(self.scale))
            emissions = dist.Normal(levels, sigma[..., None, None])
        logs = transitions.log()[..., None, :, :]
        return pyro.sample("y", dist.DiscreteHMM(self.uniform, logs, emissions, duration=length_of(y, size)), obs=y)

    def check(self, y: Any = None, **_: Any) -> None:
        """Raise ValueError unless y is a series of finite numbers, of counts for Poisson noise."""
        super().check(y)
        if y is not None and self.counts:
            check_entries("y", y, (y < 0) | fractional(y), "counts (0, 1, 2, ...)")

    @checked
    def moments(self, y: Tensor, *, draws: int = 20_000) -> Moments:
        """Posterior mean and standard deviation of each site, by importance sampling with the forward algorithm.

        The proposal is a multivariate t around the mode of the unconstrained parameters. Neither a guide nor a chain
        has a part in it.

        Raises:
            ArithmeticError: The effective sample size is below 5,000.
        """
        check_count("draws", draws, 5000)
        count, free = self.states, self.states - 1
        middle = 0 if self.counts else 1

        def parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Logarithms of the transitions (S, K, K), the first level, further gaps, and sigma."""
            free_logits = theta[:, : count * free].unflatten(1, (count, free))
            logs = torch.cat([free_logits, torch.zeros_like(free_logits[..., :1])], -1).log_softmax(-1)
            rest = theta[:, count * free :]
            first = rest[:, :middle]
            return logs, first, rest[:, middle : middle + count - middle].exp(), rest[:, count:].exp()

        def density(theta: Tensor) -> Tensor:
            logs, first, gaps, sigma = parts(theta)
            # The Jacobian of a softmax is the product of its probabilities.
            total = (self.concentration * logs).sum((1, 2)) - (first**2).sum(1) / (2 * self.scale**2)
            for positive in (gaps, sigma):
                total = total + positive.log().sum(1) - (positive**2).sum(1) / (2 * self.scale**2)
            levels = torch.cat([first, gaps], 1).cumsum(1)[..., None, :]
            emission = dist.Poisson(levels) if self.counts else dist.Normal(levels, sigma[..., None])
            scores, alpha = emission.log_prob(y[:, None]), logs.new_zeros(len(theta), count)
            for t in range(len(y)):
                alpha = (alpha[..., None] + logs).logsumexp(1) + scores[:, t]
            return total + alpha.logsumexp(1)

        low, high = y.quantile(0.25), y.quantile(0.75)
        steps = ((high - low).clamp_min(0.1) / free).expand(free).log()
        head = low.clamp_min(0.1).log()[None] if self.counts else low[None]
        tail = y.new_zeros(0) if self.counts else ((high - low).clamp_min(0.1) / 2).log()[None]
        stay = 2.0 * torch.eye(count, dtype=y.dtype, device=y.device)
        start = torch.cat([(stay[:, :-1] - stay[:, -1:]).flatten(), head, steps, tail])
        theta, weights = weighted_draws(density, start, draws, block=2_000_000 // len(y))
        logs, first, gaps, sigma = parts(theta)
        found = {"transitions": logs.exp(), "gaps": gaps}
        found |= {} if self.counts else {"first": first[:, 0], "sigma": sigma[:, 0]}
        return {name: moments_of(value, weights) for name, value in found.items()}

    @checked
    def state_probabilities(self, y: Tensor, transitions: Tensor, levels: Tensor, sigma: Any = None) -> Tensor:
        r"""p(z_t | y) at given parameters, (T, K), by the forward and the backward recursion.

        Args:
            y: The series (T,).
            transitions: (K, K), such as one draw of the posterior.
            levels: (K,).
            sigma: Standard deviation of normal noise.
        """
        emission: Any = dist.Poisson(levels) if self.counts else dist.Normal(levels, sigma)
        scores, logs = emission.log_prob(y[:, None]), transitions.log()
        forward, alpha = [], torch.zeros_like(levels)
        for score in scores:
            alpha = (alpha[:, None] + logs).logsumexp(0) + score
            forward.append(alpha)
        backward = [torch.zeros_like(levels)]
        for score in scores.flip(0)[:-1]:
            backward.append((logs + score + backward[-1]).logsumexp(1))
        return (torch.stack(forward) + torch.stack(backward[::-1])).softmax(1)


class GARCH(Series):
    r"""GARCH(1, 1): returns whose variance follows its own past and the last return.

    .. math::

        \mu \sim \mathrm{N}(0, s^2), \qquad \log v \sim \mathrm{N}(2 \log s, 1), \qquad
        (a, b, c) \sim \mathrm{Dirichlet}(1, 1, 1)

    .. math::

        v_1 = v, \qquad v_t = a (y_{t-1} - \mu)^2 + b v_{t-1} + c v, \qquad y_t \sim \mathrm{N}(\mu, v_t)

    Written with the variance v to which the process returns: Bollerslev's :math:`\alpha_0` is c v, :math:`\alpha_1` is
    a and :math:`\beta_1` is b, whose sum is below one.

    Args:
        scale: s, prior scale of the returns.
        guide: From the model to a guide. Default: AutoMultivariateNormal.

    Data: y (T,). Sites: mu (), variance (), shares (3,), y.

    Reference: Bollerslev 1986, "Generalized autoregressive conditional heteroskedasticity".
    """

    def __init__(self, *, scale: float = 1.0, guide: GuideFactory = AutoMultivariateNormal) -> None:
        super().__init__()
        check_guide(guide)
        check_positive("scale", scale)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("zero", torch.tensor(0.0))
        self.register_buffer("ones", torch.ones(3))
        self.coords["share"] = ["last return", "last variance", "level"]
        self.dims |= {"shares": ("share",), "y": ("time",)}
        self.guide = guide(self.model)

    def model(self, y: Tensor | None = None, size: int | None = None) -> Tensor:
        """Draw or score parameters and returns; return the returns."""
        mu = pyro.sample("mu", dist.Normal(self.zero, self.scale))
        variance = pyro.sample("variance", dist.LogNormal(2 * self.scale.log(), self.zero + 1))
        shares = pyro.sample("shares", dist.Dirichlet(self.ones))
        return pyro.sample("y", Returns(mu, variance, shares, length_of(y, size)), obs=y)

    @checked
    def moments(self, y: Tensor, *, draws: int = 100_000) -> Moments:
        """Posterior mean and standard deviation of each site, by importance sampling with the recursion in a loop.

        The proposal is a multivariate t around the mode of the unconstrained parameters. Neither a guide nor a chain
        has a part in it.

        Raises:
            ArithmeticError: The effective sample size is below 5,000.
        """
        check_count("draws", draws, 5000)

        def parts(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = torch.cat([theta[:, 2:], torch.zeros_like(theta[:, :1])], 1)
            return theta[:, 0], theta[:, 1].exp(), logits.softmax(1)

        def density(theta: Tensor) -> Tensor:
            mu, variance, shares = parts(theta)
            total = -(mu**2) / (2 * self.scale**2) - (theta[:, 1] - 2 * self.scale.log()) ** 2 / 2
            total, now = total + shares.log().sum(1), variance
            for t, value in enumerate(y):
                if t:
                    now = shares[:, 0] * (y[t - 1] - mu) ** 2 + shares[:, 1] * now + shares[:, 2] * variance
                total = total - now.log() / 2 - (value - mu) ** 2 / (2 * now)
            return total

        start = torch.stack([y.mean(), y.var().log(), *y.new_tensor([0.0, 1.0])])
        # The tail of the variance is heavy where the shares of the past are near one.
        theta, weights = weighted_draws(density, start, draws, freedom=4, block=draws)
        mu, variance, shares = parts(theta)
        found = {"mu": mu, "variance": variance, "shares": shares}
        return {name: moments_of(value, weights) for name, value in found.items()}


class Returns(Rowwise):
    r"""A GARCH(1, 1) series (T,), as :class:`GARCH` writes it.

    The variances are a sum over the past, :math:`v_t = \sum_{k \le t} b^{t-k} u_k` with :math:`u_1 = v` and
    :math:`u_k = a (y_{k-1} - \mu)^2 + c v`, which doubles its reach with each of log T steps.

    Args:
        mu: Mean return (...).
        variance: v (...).
        shares: a, b and c (..., 3).
        length: T.
    """

    arg_constraints: ClassVar = {"base": dist.constraints.positive, "shares": dist.constraints.simplex}
    support = dist.constraints.real_vector

    def __init__(
        self, mu: Tensor, variance: Tensor, shares: Tensor, length: int, validate_args: bool | None = None
    ) -> None:
        self.mu, self.base, self.shares = mu, variance, shares
        batch = torch.broadcast_shapes(mu.shape, variance.shape, shares.shape[:-1])
        super().__init__(batch, torch.Size([length]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of a series (..., T)."""
        news, old, level = (v[..., None] for v in self.shares.unbind(-1))
        base, off = self.base[..., None], value - self.mu[..., None]
        moved = news * off[..., :-1] ** 2 + level * base
        variance = torch.cat([base.expand(*moved.shape[:-1], 1), moved], -1)
        reach, power = 1, old
        while reach < self.event_shape[0]:
            variance = variance + power * torch.nn.functional.pad(variance[..., :-reach], (reach, 0))
            reach, power = 2 * reach, power**2
        return self._repeat(dist.Normal(self.mu[..., None], variance.sqrt()).log_prob(value).sum(-1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """One return after another."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn((*shape, *self.event_shape), dtype=self.base.dtype, device=self.base.device)
        news, old, level = self.shares.unbind(-1)
        now, drawn = self.base, list[Tensor]()
        for step in noise.unbind(-1):
            drawn.append(self.mu + now.sqrt() * step)
            now = news * (drawn[-1] - self.mu) ** 2 + old * now + level * self.base
        return torch.stack(drawn, -1).detach()
