"""Distributions that torch lacks, or has in a slower form.

The distributions of rows compute logarithms once per class where torch computes them once per entry of the data.
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

MAX_DESIGN = 2_000_000
"""Largest design matrix, in numbers, of :class:`LabelledGaussians`: it saves the gradient one pass over the rows."""

TAIL_SD = 1e6
"""Standard deviations that stand for infinity, which has no gradient."""


class Rowwise(dist.TorchDistribution):
    """Base class of distributions of a row: ``expand`` keeps the parameters as they are, and the score broadcasts."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        wide = copy(self)
        wide._batch_shape = torch.Size(batch_shape)
        return wide

    def _repeat(self, score: Tensor) -> Tensor:
        return score.expand(torch.broadcast_shapes(self.batch_shape, score.shape))


class Gaussians(Rowwise):
    r"""Independent normal features, scored as :math:`-\tfrac12 \sum_j ((x_j - \mu_j) s_j)^2 - \mathrm{level}`.

    Torch's Normal takes a logarithm and divides for each entry of x; here both are done once per class. With a whitener
    S in place of s the features are correlated: :math:`-\tfrac12 \lVert S (x - \mu) \rVert^2 - \mathrm{level}`.

    Args:
        mean: Means (..., D).
        inverse_scale: Inverse standard deviations s (..., D), or a flattened whitener S (..., D * D).
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
            # One whitener for all rows: one matrix product rather than one per row.
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
    r"""Independent normal features, given the class of each row.

    In double precision, matrix products score all rows under all classes,

    .. math:: \sum_j s_{kj}^2 \mu_{kj} x_{nj} - \tfrac12 \sum_j s_{kj}^2 x_{nj}^2
        - \tfrac12 \sum_j s_{kj}^2 \mu_{kj}^2 - \mathrm{level}_k

    with the mean of x subtracted from x and :math:`\mu`, and the score of the row's label is selected. In single
    precision the squares would cancel, so there :class:`Gaussians` scores each row with the parameters of its class.

    Args:
        mean: Means (..., K, D).
        inverse_scale: Inverse standard deviations s (..., K, D).
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
        if self.labels.dim() == 1 and value.dim() == 2 and len(value) * weights.shape[-2:].numel() <= MAX_DESIGN:
            # Each row's terms in the columns of its class: the design depends on data alone, one product scores it.
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
    """Categorical labels of rows that share their probabilities, scored by one product with one-hot labels.

    Torch's Categorical repeats the logits for each row and indexes them, and so does its gradient.

    Args:
        logits: Unnormalised log probabilities (..., K).
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

    Torch's Bernoulli takes a logarithm and an exponential for each entry of x; here they are taken once per class.

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


def log_odds_of_means(x: Tensor) -> Tensor:
    """Log odds (D,) of the means of binary rows (N, D), each with half a zero and half a one more."""
    return torch.logit((x.sum(0) + 0.5) / (len(x) + 1))


def occurrence_parameters(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds (..., D) and log probability of a row of zeros (..., 1), from probabilities (..., D)."""
    probs = probs.clamp(1e-7, 1 - 1e-7)
    absent = (-probs).log1p()
    return probs.log() - absent, absent.sum(-1, keepdim=True)


class Counts(Rowwise):
    """Multinomial with a number of trials for each row (torch's has one number for all).

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
        # Clamped: maximum likelihood gives probability 0 to a word that a class never has.
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
    """Bijection from all matrices to those whose first column increases."""

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
    r"""K rows of independent normals, sorted by their first entry: one of the K! equivalent orders of a mixture.

    .. math:: \log p(\mu) = \log K! + \sum_{kj} \log \mathrm{N}(\mu_{kj}; m_j, s_j^2), \quad \mu_{11} < \dots < \mu_{K1}

    Args:
        mean: m (K, D), the same in every row.
        scale: s (K, D), the same in every row.
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
    r"""Pixels :math:`k / (K - 1)` in [0, 1] of K levels: a normal, discretised to the bin of each level.

    .. math:: p(x) = \Phi\big((x + h - \mu) / \sigma\big) - \Phi\big((x - h - \mu) / \sigma\big), \qquad
        h = \tfrac{1}{2 (K - 1)}

    The first and the last level also get the tails, so that the probabilities of all levels sum to one.

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
        """Mean of the normal, clamped to [0, 1]."""
        return self.loc.clamp(0, 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            drawn = torch.normal(*(v.expand(*sample_shape, *self.batch_shape) for v in (self.loc, self.scale)))
            return (drawn * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        half = 0.5 / (self.levels - 1)
        low = torch.where(value < half, -TAIL_SD, (value - half - self.loc) / self.scale)
        high = torch.where(value > 1 - half, TAIL_SD, (value + half - self.loc) / self.scale)
        # Bins above the mean are mirrored below it, where the difference loses no digits.
        above = low + high > 0
        low, high = torch.where(above, -high, low), torch.where(above, -low, high)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-7)))
