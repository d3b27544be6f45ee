r"""Item response: the Rasch model of binary answers of persons to items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.models.checks import check_binary, check_count, check_matrix, check_positive
from ppl_models.models.pair import Moments, Pair, checked
from ppl_models.models.parts.weighted import moments_of, weighted_draws

NODES = 41
"""Points of the Gauss-Hermite quadrature over an ability."""


STEPS = 5
"""Newton steps to a mode: the density is log-concave, and its curvature at least that of the prior."""


class RaschModel(Pair):
    r"""The Rasch model with a common discrimination: who knows more answers more, and some items are harder.

    .. math::

        a \sim \mathrm{LogNormal}(0, t^2), \qquad b_j \sim \mathrm{N}(0, s^2), \qquad
        \theta_n \sim \mathrm{N}(0, 1), \qquad
        x_{nj} \sim \mathrm{Bernoulli}(\mathrm{logit}^{-1}(a (\theta_n - b_j)))

    The guide has a full-rank normal distribution of log a and of the logits a b. Given these, the posterior of an
    ability depends on the number of right answers alone, and is close to normal: the guide has its mode and its
    curvature there.

    Args:
        items: Number of items J, or their names.
        scale: s, prior standard deviation of a difficulty, in standard deviations of the abilities.
        spread: t, prior standard deviation of the logarithm of the discrimination.

    Data: x (N, J), zeros and ones. Sites: discrimination (), difficulty (J,), ability (N,), x.

    Reference: Rasch 1960; Thissen 1982, "Marginal maximum likelihood estimation for the one-parameter logistic model".
    """

    def __init__(self, items: int | Sequence[str], *, scale: float = 3.0, spread: float = 1.0) -> None:
        super().__init__()
        check_positive("scale", scale)
        check_positive("spread", spread)
        self.items = self.name_dimension("items", items)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("spread", torch.tensor(float(spread)))
        self.register_buffer("zero", torch.tensor(0.0))
        self.dims = {"difficulty": ("items",), "x": ("items",)}
        self.log_loc = nn.Parameter(torch.zeros(()))
        self.log_scale = nn.Parameter(torch.tensor(-1.0))
        self.loc = nn.Parameter(torch.zeros(self.items))
        self.slope = nn.Parameter(torch.zeros(self.items))
        self.factor = nn.Parameter(torch.zeros(self.items, self.items))
        self.diagonal = nn.Parameter(torch.full((self.items,), -1.0))

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score items, abilities and answers; return the answers."""
        discrimination = pyro.sample("discrimination", dist.LogNormal(self.zero, self.spread))
        prior = dist.Normal(self.zero, self.scale).expand((self.items,))
        difficulty = pyro.sample("difficulty", prior.to_event(1))
        with self.rows(x):
            ability = pyro.sample("ability", dist.Normal(self.zero, self.zero + 1))
            logits = discrimination[..., None] * (ability[..., None] - difficulty)
            return pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None) -> None:
        """Draw the discrimination, the difficulties given it, and abilities given the number of right answers."""
        if x is None:
            raise ValueError("x: expected the answers of every person, got none")
        discrimination = pyro.sample("discrimination", dist.LogNormal(self.log_loc, self.log_scale.exp()))
        # The logit of an average person, a b, depends little on a.
        centre = self.loc + self.slope * (discrimination.log() - self.log_loc)[..., None]
        factor = self.factor.tril(-1) + torch.diag_embed(self.diagonal.exp())
        law = dist.MultivariateNormal(
            centre / discrimination[..., None], scale_tril=factor / discrimination[..., None, None]
        )
        difficulty = pyro.sample("difficulty", law)
        mode, scale = self.laplace(discrimination, difficulty)
        with self.rows(x):
            score = x.sum(-1).long()
            pyro.sample("ability", dist.Normal(mode[..., score], scale[..., score]))

    def laplace(self, discrimination: Tensor, difficulty: Tensor) -> tuple[Tensor, Tensor]:
        r"""Mode of the posterior of an ability, and its standard deviation there, by the number of right answers.

        .. math:: \log p(\theta \mid s) = -\theta^2 / 2 + a s \theta - \sum_j \log(1 + e^{a (\theta - b_j)}) + c

        Args:
            discrimination: a (...).
            difficulty: b (..., J).

        Returns:
            Both (..., J + 1), for 0 to J right answers.
        """
        slope = discrimination[..., None]
        score = torch.arange(self.items + 1, dtype=slope.dtype, device=slope.device)
        mode = (slope * (score - self.items / 2)) / (1 + slope**2 * self.items / 4)
        for _ in range(STEPS):
            chance = torch.sigmoid(slope[..., None] * (mode[..., None] - difficulty[..., None, :]))
            curvature = 1 + slope**2 * (chance * (1 - chance)).sum(-1)
            mode = mode + (slope * (score - chance.sum(-1)) - mode) / curvature
        chance = torch.sigmoid(slope[..., None] * (mode[..., None] - difficulty[..., None, :]))
        return mode, (1 + slope**2 * (chance * (1 - chance)).sum(-1)).rsqrt()

    def check(self, x: Any = None, **_: Any) -> None:
        """Raise ValueError unless x is a matrix (rows, J) of zeros and ones."""
        if x is not None:
            check_matrix("x", x, self.items)
            check_binary("x", x)

    @checked
    def moments(self, x: Tensor, *, draws: int = 40_000) -> Moments:
        """Posterior mean and standard deviation of each site.

        Abilities are integrated out by Gauss-Hermite quadrature; discrimination and difficulties are weighted draws of
        a multivariate t around their mode. Neither a guide nor a chain has a part in it.

        Raises:
            ArithmeticError: The effective sample size is below 5,000.
        """
        check_count("draws", draws, 5000)
        points = np.polynomial.hermite_e.hermegauss(NODES)
        nodes, masses = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in points)
        patterns, member, count = x.unique(dim=0, return_inverse=True, return_counts=True)

        def scores(theta: Tensor) -> Tensor:
            """Log density (S, patterns, nodes) of answers and ability."""
            logits = theta[:, None, :1].exp() * (nodes[:, None] - theta[:, None, 1:])
            norm = torch.nn.functional.softplus(logits).sum(-1)
            return torch.einsum("pj,sqj->spq", patterns, logits) + (masses.log() - norm)[:, None]

        def density(theta: Tensor) -> Tensor:
            prior = -(theta[:, 0] ** 2) / (2 * self.spread**2) - (theta[:, 1:] ** 2).sum(1) / (2 * self.scale**2)
            return prior + scores(theta).logsumexp(-1) @ count.to(x.dtype)

        block = max(1, 2_000_000 // (NODES * len(patterns)))
        share = x.mean(0).clamp(0.01, 0.99)
        start = torch.cat([x.new_zeros(1), -(share / (1 - share)).log()])
        theta, weights = weighted_draws(density, start, draws, block=block)
        first, second = x.new_zeros(2, len(patterns))
        for part, weight in zip(theta.split(block), weights.split(block), strict=True):
            chance = scores(part).softmax(-1)
            first = first + torch.einsum("s,spq,q->p", weight, chance, nodes)
            second = second + torch.einsum("s,spq,q->p", weight, chance, nodes**2)
        return {
            "discrimination": moments_of(theta[:, 0].exp(), weights),
            "difficulty": moments_of(theta[:, 1:], weights),
            "ability": (first[member], (second - first**2).sqrt()[member]),
        }
