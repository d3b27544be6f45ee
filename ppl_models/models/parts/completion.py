r"""Missing entries of rows of a mixture, drawn exactly from their distribution given the known entries.

A row comes from one of K components, whose parameters are known by S draws :math:`\theta_s` from their posterior. Given
its known entries o it belongs to draw s and component k with probability

.. math:: p(s, k \mid x_o) \propto \pi_{sk} \, p(x_o \mid \theta_{sk})

and its missing entries are those of :math:`p(x_m \mid x_o, \theta_{sk})`. Draws that explain the known entries better
thus count for more, as Bayes' rule has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    r"""What is seen of rows: :math:`v = A x` with noise.

    Attributes:
        sd: Standard deviation of Gaussian noise, or None.
        flips: Probability with which a binary entry is flipped, or None.
        matrix: A (M, D), or None for the identity.
    """

    sd: float | None = None
    flips: float | None = None
    matrix: Tensor | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> View:
        """The view of the arguments ``sd``, ``flips`` and ``matrix``; others are left out."""
        return cls(*(arguments.get(n) for n in ("sd", "flips", "matrix")))

    def gaussian(self) -> float:
        """The standard deviation of the noise of continuous rows."""
        if self.sd is None:
            raise ValueError(f"flips: expected a pair of binary rows, got {self.flips} for continuous ones; give sd")
        return self.sd

    def states(self, v: Tensor) -> Tensor:
        """Log density (2, ...) of what is seen of binary entries (...) if they are 0, and if they are 1."""
        if self.matrix is not None:
            raise ValueError(
                f"matrix: expected none for binary rows, whose sums have no closed form, got {len(self.matrix)} rows"
            )
        zero = torch.zeros_like(v)
        if self.sd is not None:
            return torch.stack([dist.Normal(mean, self.sd).log_prob(v) for mean in (zero, zero + 1)])
        flips = torch.as_tensor(self.flips, dtype=v.dtype, device=v.device)
        return torch.stack([torch.where(v == state, 1 - flips, flips).log() for state in (0, 1)])


class Components(ABC):
    """Distributions of a row, (S, K) of them.

    Attributes:
        binary: Whether its entries are 0 or 1.
    """

    binary = False

    @abstractmethod
    def score(self, row: Tensor, known: Tensor) -> Tensor:
        """Log density (S, K) of the known entries of a row (D,); ``known`` is a mask (D,)."""

    @abstractmethod
    def draw(self, row: Tensor, known: Tensor, s: Tensor, k: Tensor) -> Tensor:
        """The missing entries given the known ones, (draws, missing), each from the distribution (s, k)."""

    @abstractmethod
    def restore(self, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        """Log density (S, K) of what is seen of a row, (M,), and mean and variance (S, K, D) of the row given it."""


class Independent(Components):
    """Entries that are independent given the component.

    Args:
        family: From parameters to the distribution of an entry, such as ``dist.Normal``.
        parameters: Parameters (S, K, D).
    """

    def __init__(self, family: Callable[..., dist.TorchDistribution], *parameters: Tensor) -> None:
        self.family, self.parameters, self.binary = family, parameters, family is dist.Bernoulli

    def score(self, row: Tensor, known: Tensor) -> Tensor:
        return self.family(*(p[..., known] for p in self.parameters)).log_prob(row[known]).sum(-1)

    def draw(self, row: Tensor, known: Tensor, s: Tensor, k: Tensor) -> Tensor:
        return self.family(*(p[s, k][:, ~known] for p in self.parameters)).sample()

    def restore(self, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        if not self.binary:
            mean, sd = self.parameters
            if view.matrix is not None:
                return Correlated(mean, sd.square().diag_embed()).restore(v, view)
            noise = view.gaussian()
            precision = sd**-2 + noise**-2
            seen = dist.Normal(mean, (sd**2 + noise**2).sqrt()).log_prob(v).sum(-1)
            return seen, (mean * sd**-2 + v * noise**-2) / precision, 1 / precision
        probs = self.parameters[0]
        joint = torch.stack([torch.log1p(-probs), probs.log()]) + view.states(v)[:, None, None]
        mean = joint.softmax(0)[1]
        return joint.logsumexp(0).sum(-1), mean, mean * (1 - mean)


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

    def restore(self, v: Tensor, view: View) -> tuple[Tensor, Tensor, Tensor]:
        noise, size = view.gaussian(), self.mean.shape[-1]
        matrix = torch.eye(size).to(self.mean) if view.matrix is None else view.matrix.to(self.mean)
        across = self.covariance @ matrix.mT
        seen = matrix @ across + noise**2 * torch.eye(len(matrix)).to(self.mean)
        root, centre = torch.linalg.cholesky(seen), self.mean @ matrix.mT
        gain = torch.cholesky_solve(across.mT, root).mT
        mean = self.mean + (gain @ (v - centre)[..., None])[..., 0]
        variance = self.covariance.diagonal(dim1=-2, dim2=-1) - (gain * across).sum(-1)
        return dist.MultivariateNormal(centre, scale_tril=root).log_prob(v), mean, variance.clamp_min(0)


@torch.no_grad()
def restore(
    v: Tensor, weights: Tensor, components: Components, view: View, labels: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation (N, D) of rows given what is seen of them, exactly, and the error of the mean, zeros.

    Args:
        v: What is seen (N, M).
        weights: Log weights of the components (S, K).
        components: Their distributions.
        view: How rows are seen.
        labels: The component of each row (N,), nan where it is unknown.
    """
    means, squares = [], []
    for n, row in enumerate(v):
        score, mean, variance = components.restore(row, view)
        chances = (score + _allowed(weights, labels, n)).flatten().softmax(0)
        means.append(chances @ mean.flatten(0, 1))
        squares.append(chances @ (variance + mean.square()).flatten(0, 1))
    mean = torch.stack(means)
    return mean, (torch.stack(squares) - mean.square()).clamp_min(0).sqrt(), torch.zeros_like(mean)


def _allowed(weights: Tensor, labels: Tensor | None, n: int) -> Tensor:
    """Log weights (S, K) of the components of row n, whose label may be known."""
    if labels is None or labels[n].isnan():
        return weights
    return weights.masked_fill(torch.arange(weights.shape[-1], device=weights.device) != labels[n], -torch.inf)


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
        known, chances = ~x[n].isnan(), _allowed(weights, labels, n)
        if known.any():
            chances = chances + components.score(x[n], known)
        chosen = dist.Categorical(logits=chances.flatten()).sample((draws,))
        count = weights.shape[-1]
        rows[:, n, ~known] = components.draw(x[n], known, chosen // count, chosen % count).to(x)
    return rows
