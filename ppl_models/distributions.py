"""Distributions that torch has in a slower or a less useful form.

Those of a row take their logarithms once a class, where torch takes them once an entry; that of the means of a mixture
has one order of its components.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform, Transform, biject_to, transform_to
from torch import Tensor


class Rowwise(dist.TorchDistribution):
    """A distribution of a row whose parameters stay as they are where a plate repeats it, as its score broadcasts."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        wide = copy(self)
        wide._batch_shape = torch.Size(batch_shape)
        return wide

    def _repeat(self, score: Tensor) -> Tensor:
        return score.expand(torch.broadcast_shapes(self.batch_shape, score.shape))


class Gaussians(Rowwise):
    r"""Independent normal features, scored as :math:`-\tfrac12 \sum_j ((x_j - \mu_j) s_j)^2 - \mathrm{level}`.

    Torch's Normal takes a logarithm and divides for each entry of x; here both are done once a class. With a whitener S
    in place of s they are correlated: :math:`-\tfrac12 \lVert S (x - \mu) \rVert^2 - \mathrm{level}`.

    Args:
        mean: Means (..., D).
        inverse_scale: One over the standard deviations, s (..., D), or a whitener, flattened (..., D * D).
        level: :math:`\tfrac12 \sum_j \log 2 \pi \sigma_j^2` (...).
    """

    arg_constraints: ClassVar = {"level": dist.constraints.real}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, inverse_scale: Tensor, level: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(mean.shape[:-1], inverse_scale.shape[:-1], level.shape)
        self.mean_vector, self.inverse_scale, self.level = mean, inverse_scale, level
        self._correlated = inverse_scale.shape[-1] != mean.shape[-1]
        super().__init__(batch, mean.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        white = self._whiten(value - self.mean_vector)
        return self._repeat(-0.5 * white.square().sum(-1) - self.level)

    def _whiten(self, centred: Tensor) -> Tensor:
        if not self._correlated:
            return centred * self.inverse_scale
        if self.inverse_scale.dim() > 1 and self.inverse_scale.shape[-2] == 1:
            # One whitener for all rows: a product of matrices, and not a matrix a row.
            return centred @ self._whitener[..., 0, :, :].mT
        return (self._whitener @ centred[..., None])[..., 0]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        noise = torch.randn(shape, dtype=self.mean_vector.dtype, device=self.mean_vector.device)
        if self._correlated:
            return self.mean_vector + torch.linalg.solve(self._whitener, noise[..., None])[..., 0]
        return self.mean_vector + noise / self.inverse_scale

    @property
    def _whitener(self) -> Tensor:
        return self.inverse_scale.unflatten(-1, (*self.event_shape, *self.event_shape))


class Occurrences(Rowwise):
    r"""Independent Bernoulli features, scored as :math:`x \cdot \mathrm{logits} + \sum_j \log(1 - p_j)`.

    Torch's Bernoulli takes a logarithm and an exponential of each entry of x; here they are taken once a class.

    Args:
        logits: Log odds (..., D).
        absent: Log probability of a row of zeros (...).
    """

    arg_constraints: ClassVar = {"logits": dist.constraints.real_vector}
    support = dist.constraints.independent(dist.constraints.boolean, 1)

    def __init__(self, logits: Tensor, absent: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(logits.shape[:-1], absent.shape)
        self.logits, self.absent = logits, absent
        super().__init__(batch, logits.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        alike = self.logits.dim() > 1 and self.logits.shape[-2] == 1 and value.dim() == 2
        rows = self.logits[..., 0, :] @ value.mT if alike else (value * self.logits).sum(-1)
        return self._repeat(rows + self.absent)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.logits.detach().sigmoid().expand(*sample_shape, *self.batch_shape, *self.event_shape).bernoulli()


class Counts(Rowwise):
    """Multinomial whose rows have lengths of their own (torch's has one length for all).

    Args:
        probs: Probabilities (..., D).
        length: Number of trials of each row, broadcast against the batch.
    """

    arg_constraints: ClassVar = {"probs": dist.constraints.simplex}
    support = dist.constraints.independent(dist.constraints.nonnegative_integer, 1)

    def __init__(self, probs: Tensor, length: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(probs.shape[:-1], length.shape)
        self.probs, self.length = probs, length
        super().__init__(batch, probs.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        # Clamped for a word that a class never has: maximum likelihood gives it the probability 0.
        score = (value * self.probs.clamp_min(1e-30).log()).sum(-1)
        return self._repeat(score + (value.sum(-1) + 1).lgamma() - (value + 1).lgamma().sum(-1))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        probs = self.probs.detach().expand(*shape, self.event_shape[0]).reshape(-1, self.event_shape[0])
        length = self.length.expand(shape).reshape(-1, 1)
        longest = int(length.max()) if length.numel() else 0
        words = torch.multinomial(probs, max(longest, 1), replacement=True)
        counted = (torch.arange(max(longest, 1), device=words.device) < length).to(probs.dtype)
        return torch.zeros_like(probs).scatter_add_(1, words, counted).reshape(*shape, -1)


class _FirstOrdered(dist.constraints.Constraint):  # type: ignore[misc, name-defined]
    """Matrices (K, D) whose first column increases."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        first = value[..., 0]
        return (first[..., 1:] > first[..., :-1]).all(-1) & value.isfinite().all(-1).all(-1)


first_ordered = _FirstOrdered()


class _OrderFirst(Transform):
    """From all matrices to those whose first column increases."""

    domain = dist.constraints.independent(dist.constraints.real, 2)
    codomain = first_ordered
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([OrderedTransform()(x[..., 0])[..., None], x[..., 1:]], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([OrderedTransform().inv(y[..., 0])[..., None], y[..., 1:]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return OrderedTransform().log_abs_det_jacobian(x[..., 0], y[..., 0])


@biject_to.register(_FirstOrdered)
@transform_to.register(_FirstOrdered)
def _order_first(_: Any) -> Transform:
    return _OrderFirst()


class SortedNormals(dist.TorchDistribution):
    r"""K rows of independent normals, sorted by their first entry: one order of K! that a mixture cannot tell apart.

    .. math:: \log p(\mu) = \log K! + \sum_{kj} \log \mathrm{N}(\mu_{kj}; m_j, s_j^2), \quad \mu_{11} < \dots < \mu_{K1}

    Args:
        mean: m (K, D).
        scale: s (K, D), the same in every row, as is m.
    """

    arg_constraints: ClassVar = {"mean": dist.constraints.real, "scale": dist.constraints.positive}
    support = first_ordered

    def __init__(self, mean: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self._normal = dist.Normal(mean, scale)
        shape = self._normal.batch_shape
        super().__init__(shape[:-2], shape[-2:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of the rows before they are sorted."""
        return self._normal.mean

    def expand(self, batch_shape: Any, _instance: Any = None) -> SortedNormals:
        wide = (*batch_shape, *self.event_shape)
        return SortedNormals(self._normal.loc.expand(wide), self._normal.scale.expand(wide))

    def log_prob(self, value: Tensor) -> Tensor:
        return self._normal.log_prob(value).sum((-2, -1)) + math.lgamma(self.event_shape[0] + 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        rows = self._normal.sample(sample_shape)
        return rows.gather(-2, rows[..., :1].argsort(-2).expand_as(rows))
