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

from ppl_models.models.parts.labels import one_hot, rows_by_label

DESIGN = 2_000_000
"""Numbers that a matrix of data may hold to save a gradient a pass over the rows."""


FAR = 1e6
"""Standard deviations beyond which nothing is: infinity has no gradient."""


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


class LabelledGaussians(Rowwise):
    r"""Independent normal features of rows of several classes, by their labels.

    In double precision all rows are scored under all classes by two products of matrices,

    .. math:: \sum_j s_{kj}^2 \mu_{kj} x_{nj} - \tfrac12 \sum_j s_{kj}^2 x_{nj}^2
        - \tfrac12 \sum_j s_{kj}^2 \mu_{kj}^2 - \mathrm{level}_k

    with x and mu less the mean of x, and the label's score is taken: a matrix for each class, where :class:`Gaussians`
    has a row of its own for each row of data. In single precision the squares would cancel: there it is that which
    scores.

    Args:
        mean: Means (..., K, D).
        inverse_scale: One over the standard deviations, s (..., K, D).
        level: :math:`\tfrac12 \sum_j \log 2 \pi \sigma_j^2` (..., K).
        labels: The class of each row (..., N).
    """

    arg_constraints: ClassVar = {"level": dist.constraints.real}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, inverse_scale: Tensor, level: Tensor, labels: Tensor) -> None:
        self.tables, self.labels = (mean, inverse_scale, level), labels
        batch = torch.broadcast_shapes(labels.shape, (*level.shape[:-1], 1))
        super().__init__(batch, mean.shape[-1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if value.dtype != torch.float64:
            return self._repeat(self._rows().log_prob(value))
        mean, inverse_scale, level = self.tables
        centre = value.flatten(0, -2).mean(0)
        centred, offset = value - centre, mean - centre
        precision = inverse_scale.square()
        drift = precision * offset
        alone = 0.5 * (drift * offset).sum(-1) + level
        weights = torch.cat([drift, precision, alone[..., None]], -1)
        data = torch.cat([centred, -0.5 * centred.square(), -torch.ones_like(centred[..., :1])], -1)
        member = one_hot(self.labels, level.shape[-1], value.dtype)
        if self.labels.dim() == 1 and value.dim() == 2 and len(value) * weights.shape[-2:].numel() <= DESIGN:
            # Each row's numbers at the place of its class: of data alone, and one product for all that is scored.
            design = (member[..., None] * data[:, None]).flatten(1)
            return self._repeat(weights.flatten(-2) @ design.mT)
        return self._repeat(((data @ weights.mT) * member).sum(-1))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._rows().expand(self.batch_shape).rsample(sample_shape)

    def _rows(self) -> Gaussians:
        mean, inverse_scale, level = self.tables
        labels = self.labels
        return Gaussians(
            rows_by_label(mean, labels),
            rows_by_label(inverse_scale, labels),
            rows_by_label(level[..., None], labels)[..., 0],
        )


class Labels(dist.Categorical):
    """Labels of rows that share their log odds: scored by a product with one-hot labels, which is one for all rows.

    Torch's own repeats the log odds for each row and indexes them, whose gradient is a row's too.

    Args:
        logits: Log odds (..., K).
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits, validate_args=False)
        self._shared: Tensor = self.logits

    def expand(self, batch_shape: Any, _instance: Any = None) -> Labels:
        wide = super().expand(batch_shape, self._get_checked_instance(Labels, _instance))
        wide._shared = self._shared
        return wide

    def log_prob(self, value: Tensor) -> Tensor:
        table = self._shared
        if table.dim() > 1 and table.shape[-2] > 1:
            return super().log_prob(value)
        table = table if table.dim() == 1 else table[..., 0, :]
        score = rows_by_label(table[..., None], value)[..., 0] if value.dim() else table[..., value]
        return score.expand(torch.broadcast_shapes(self.batch_shape, score.shape))


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


class Pixels(dist.TorchDistribution):
    r"""Pixels :math:`k / (K - 1)` in [0, 1], of K levels: a normal between the borders of the bin of each level.

    .. math:: p(x) = \Phi\big((x + h - \mu) / \sigma\big) - \Phi\big((x - h - \mu) / \sigma\big), \qquad
        h = \tfrac{1}{2 (K - 1)}

    The tails belong to the first and the last level, so that the probabilities of all levels sum to one.

    Args:
        loc: :math:`\mu`.
        scale: :math:`\sigma`.
        levels: K.

    Reference: Ho, Jain and Abbeel 2020, equation 13.
    """

    arg_constraints: ClassVar = {"loc": dist.constraints.real, "scale": dist.constraints.positive}
    support = dist.constraints.unit_interval

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, False)

    @property
    def mean(self) -> Tensor:
        """Of the normal, kept within [0, 1]."""
        return self.loc.clamp(0, 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            drawn = torch.normal(*(v.expand(*sample_shape, *self.batch_shape) for v in (self.loc, self.scale)))
            return (drawn * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        half = 0.5 / (self.levels - 1)
        low = torch.where(value < half, -FAR, (value - half - self.loc) / self.scale)
        high = torch.where(value > 1 - half, FAR, (value + half - self.loc) / self.scale)
        # By symmetry a bin above the mean is one below it, where differences lose no digits.
        above = low + high > 0
        low, high = torch.where(above, -high, low), torch.where(above, -low, high)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-7)))
