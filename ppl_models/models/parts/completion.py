r"""Missing entries of rows of a mixture, drawn exactly from their distribution given the known entries.

A row comes from one of K components, whose parameters are known by S draws :math:`\theta_s` from their posterior. Given
its known entries o it belongs to draw s and component k with probability

.. math:: p(s, k \mid x_o) \propto \pi_{sk} \, p(x_o \mid \theta_{sk})

and its missing entries are those of :math:`p(x_m \mid x_o, \theta_{sk})`. Draws that explain the known entries better
thus count for more, as Bayes' rule has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator

import pyro.distributions as dist
import torch
from torch import Tensor


class Components(ABC):
    """Distributions of a row, (S, K) of them."""

    @abstractmethod
    def score(self, row: Tensor, known: Tensor) -> Tensor:
        """Log density (S, K) of the known entries of a row (D,); ``known`` is a mask (D,)."""

    @abstractmethod
    def draw(self, row: Tensor, known: Tensor, s: Tensor, k: Tensor) -> Tensor:
        """The missing entries given the known ones, (draws, missing), each from the distribution (s, k)."""


class Independent(Components):
    """Entries that are independent given the component.

    Args:
        family: From parameters to the distribution of an entry, such as ``dist.Normal``.
        parameters: Parameters (S, K, D).
    """

    def __init__(self, family: Callable[..., dist.TorchDistribution], *parameters: Tensor) -> None:
        self.family, self.parameters = family, parameters

    def score(self, row: Tensor, known: Tensor) -> Tensor:
        return self.family(*(p[..., known] for p in self.parameters)).log_prob(row[known]).sum(-1)

    def draw(self, row: Tensor, known: Tensor, s: Tensor, k: Tensor) -> Tensor:
        return self.family(*(p[s, k][:, ~known] for p in self.parameters)).sample()


class Correlated(Components):
    """Gaussian rows.

    Args:
        mean: Means (S, K, D).
        covariance: Covariances (S, K, D, D).
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance

    def score(self, row: Tensor, known: Tensor) -> Tensor:
        covariance = self.covariance[..., known, :][..., known]
        return dist.MultivariateNormal(self.mean[..., known], covariance).log_prob(row[known])

    def draw(self, row: Tensor, known: Tensor, s: Tensor, k: Tensor) -> Tensor:
        # Draws of one component share their factors.
        pairs, which = torch.stack([s, k], -1).unique(dim=0, return_inverse=True)
        mean, covariance = self.mean[pairs[:, 0], pairs[:, 1]], self.covariance[pairs[:, 0], pairs[:, 1]]
        across, root = covariance[:, ~known][..., known], torch.linalg.cholesky(covariance[:, known][..., known])
        gain = torch.cholesky_solve(across.mT, root).mT
        centre = mean[:, ~known] + (gain @ (row[known] - mean[:, known])[..., None])[..., 0]
        rest = covariance[:, ~known][..., ~known] - gain @ across.mT
        return dist.MultivariateNormal(centre[which], scale_tril=torch.linalg.cholesky(rest)[which]).sample()


@torch.no_grad()
def in_turn(rows: int, weights: Tensor, probs: Tensor) -> Generator[tuple[int, Tensor], Tensor, None]:
    """Binary features of rows one after another: each with its log weights (rows, 2) given those sent before.

    What is known of the component of a row is updated by each feature, so that these are the exact conditionals.

    Args:
        rows: Number of rows.
        weights: Log weights of the components (S, K).
        probs: Probability of a one (S, K, D).
    """
    weights, probs = weights.double(), probs.double()
    if (weights == weights[:1]).all() and (probs == probs[:1]).all():
        # Draws of a guide that is a point.
        weights, probs = weights[:1], probs[:1]
    chances = weights.flatten().softmax(0).repeat(rows, 1)
    for d, one in enumerate(probs.flatten(0, 1).mT):
        states = torch.stack([1 - one, one])
        joint = chances @ states.mT
        x = yield d, joint.log()
        seen = x.long()[:, None]
        chances *= states[seen[:, 0]]
        chances /= joint.gather(-1, seen)


@torch.no_grad()
def complete(x: Tensor, draws: int, weights: Tensor, components: Components, labels: Tensor | None = None) -> Tensor:
    """Rows with their missing entries (nan) drawn given the known ones.

    Args:
        x: Rows (N, D).
        draws: Number of draws per row.
        weights: Log weights of the components (S, K).
        components: Their distributions.
        labels: The component of each row (N,), nan where it is unknown.

    Returns:
        Completed rows (draws, N, D).
    """
    rows = x.expand(draws, *x.shape).clone()
    for n in x.isnan().any(-1).nonzero().flatten().tolist():
        known, chances = ~x[n].isnan(), weights
        if labels is not None and not labels[n].isnan():
            others = torch.arange(weights.shape[-1], device=x.device) != labels[n]
            chances = chances.masked_fill(others, -torch.inf)
        if known.any():
            chances = chances + components.score(x[n], known)
        chosen = dist.Categorical(logits=chances.flatten()).sample((draws,))
        count = weights.shape[-1]
        rows[:, n, ~known] = components.draw(x[n], known, chosen // count, chosen % count).to(x)
    return rows
