r"""Two-sample metrics, for models that can be sampled but have no likelihood.

Metrics come with a standard error over rows of both samples. Distances are Euclidean: scale the features, or map images
to the features of a classifier, before comparing rows.

References: Gretton et al. 2012, "A Kernel Two-Sample Test" (MMD); Szekely and Rizzo 2013 (energy distance); Lopez-Paz
and Oquab 2017 (https://arxiv.org/abs/1610.06545; classifier test); Kynkaanniemi et al. 2019
(https://arxiv.org/abs/1904.06991; precision and recall); Naeem et al. 2020 (https://arxiv.org/abs/2002.09797;
coverage); Srivastava et al. 2017 and Lin et al. 2018 (https://arxiv.org/abs/1712.04086; modes and quality).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inference.core.checks import check_count, check_positive

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin


BLOCK_NUMBERS = 4_000_000
"""Distances that are held at once."""


MEDIAN_ROWS = 2000
"""Rows of each sample whose median distance is taken."""


BLOCKS, PARTITIONS = 5, 4
"""Disjoint blocks whose spread gives a standard error, and random partitions into blocks to average over."""


MIN_COVERAGE = 0.5
"""Coverage below which generated rows are reported to miss modes."""


class Estimate(NamedTuple):
    """A value and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Modes:
    """Coverage of known modes by a sample.

    Attributes:
        found: Number of modes with at least one high-quality row.
        total: Number of modes.
        quality: Fraction of high-quality rows, those close to a mode.
        reverse_kl: KL divergence, in nats, of ``fractions`` from the uniform distribution over modes.
        fractions: Fraction of rows nearest to each mode, (modes,).
    """

    found: int
    total: int
    quality: Estimate
    reverse_kl: float
    fractions: np.ndarray


def modes(x: Tensor, centres: Tensor, sd: float, *, within: float = 3.0) -> Modes:
    """Count the modes that a sample covers, with the fraction of high-quality rows and the reverse KL.

    Args:
        x: Rows (N, D).
        centres: Modes (K, D).
        sd: Standard deviation of every mode.
        within: Maximum Euclidean distance of a high-quality row from its mode, in standard deviations.

    Raises:
        ValueError: There are fewer than two rows, or rows and modes are not finite or differ in shape.
    """
    _check(x=x, centres=centres)
    check_positive("sd", sd)
    check_positive("within", within)
    distance, nearest = torch.cdist(x.double(), centres.double()).min(1)
    good = distance <= within * sd
    count = len(centres)
    fractions = nearest.bincount(minlength=count).double() / len(x)
    return Modes(
        found=len(nearest[good].unique()),
        total=count,
        quality=_fraction(good.double().cpu().numpy()),
        reverse_kl=reverse_kl(fractions),
        fractions=fractions.cpu().numpy(),
    )


def reverse_kl(fractions: Tensor, target: Tensor | None = None) -> float:
    """KL divergence, in nats, of fractions (K,) from target fractions, by default uniform."""
    expected = torch.full_like(fractions, 1 / len(fractions)) if target is None else target
    return float(torch.special.xlogy(fractions, fractions / expected).sum())


def mmd(x: Tensor, y: Tensor, *, bandwidths: tuple[float, ...] | None = None) -> Estimate:
    r"""Unbiased squared maximum mean discrepancy; near 0 for two samples of the same distribution.

    .. math:: \mathrm{E}\,k(x, x') - 2\,\mathrm{E}\,k(x, y) + \mathrm{E}\,k(y, y')

    Args:
        x: Rows (N, D).
        y: Rows (M, D).
        bandwidths: Bandwidths of the Gaussian kernels whose mean is k. Default: a quarter of the median distance, the
            median distance, and four times the median distance (of at most 2,000 rows of each sample).
    """
    _check(x=x, y=y)
    if bandwidths is not None and not (isinstance(bandwidths, Sequence) and len(bandwidths)):
        raise ValueError(f"bandwidths: expected positive numbers, got {bandwidths!r}")
    for width in bandwidths or ():
        check_positive("bandwidths", width)
    if bandwidths is None:
        middle = _middle(x, y)
        bandwidths = (middle / 4, middle, 4 * middle)

    def kernel(distance: Tensor) -> Tensor:
        return torch.stack([(-0.5 * (distance / max(w, 1e-300)).square()).exp() for w in bandwidths]).mean(0)

    return _discrepancy(kernel, x, y)


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    r"""Unbiased energy distance of rows (N, D) and (M, D); near 0 for two samples of the same distribution.

    .. math:: 2\,\mathrm{E}|x - y| - \mathrm{E}|x - x'| - \mathrm{E}|y - y'|
    """
    _check(x=x, y=y)
    return _discrepancy(torch.neg, x, y)


def classifier_test(
    x: Tensor, y: Tensor, *, make: Callable[[], ClassifierMixin] | None = None, folds: int = 5, seed: int = 0
) -> Estimate:
    """Cross-validated accuracy of a classifier of the two samples; one half if the distributions are the same.

    Args:
        x: Rows (N, D); the larger sample is cut to the size of the smaller.
        y: Rows (M, D).
        make: Returns a scikit-learn classifier. Default: k nearest neighbours, with k the root of the sample size.
        folds: Number of folds of the cross-validation.
        seed: Seed of the folds.
    """
    _check(x=x, y=y)
    check_count("folds", folds, 2)
    check_count("seed", seed, 0)
    size = min(len(x), len(y))
    # Imported here because it takes half a second, in every new process.
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    split = StratifiedKFold(folds, shuffle=True, random_state=seed)

    def accuracy(a: Tensor, b: Tensor) -> float:
        count = min(len(a), len(b))
        rows = torch.cat([a[:count], b[:count]]).double().flatten(1).cpu().numpy()
        label = np.repeat([0, 1], count)
        classifier = KNeighborsClassifier(max(1, int(count**0.5))) if make is None else make()
        return float((cross_val_predict(classifier, rows, label, cv=split) == label).mean())

    return _with_error(accuracy, x[:size], y[:size], 4 * folds)


def precision(real: Tensor, generated: Tensor, *, k: int = 3) -> Estimate:
    """Fraction of generated rows (M, D) within the distance of some real row (N, D) to its k-th neighbour."""
    _check(real=real, generated=generated)
    return _precision(real, generated, k)


def _precision(real: Tensor, generated: Tensor, k: int) -> Estimate:
    _check_neighbours(k, real)
    return _with_error(lambda a, b: float(_inside(a, b, k).mean()), real, generated, 5 * (k + 1))


def _check_neighbours(k: int, rows: Tensor) -> None:
    check_count("k", k)
    if k >= len(rows):
        raise ValueError(f"k: expected fewer than the {len(rows)} rows, got {k}")


def recall(real: Tensor, generated: Tensor, *, k: int = 3) -> Estimate:
    """Fraction of real rows (N, D) within the distance of some generated row (M, D) to its k-th neighbour."""
    _check(real=real, generated=generated)
    return _precision(generated, real, k)


def coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> Estimate:
    """Fraction of real rows (N, D) with a generated row (M, D) no farther than their k-th real neighbour.

    For two samples of the same distribution and size its expectation is nearly :math:`1 - 2^{-k}`; a generator that
    misses modes fails to cover their rows.
    """
    _check(real=real, generated=generated)
    _check_neighbours(k, real)

    def covered(a: Tensor, b: Tensor) -> float:
        rows, others = (v.double().flatten(1).cpu().numpy() for v in (a, b))
        return float((_kth_distance(rows, others, 1) <= _kth_distance(rows, rows, k + 1)).mean())

    return _with_error(covered, real, generated, 5 * (k + 1))


def _inside(centres: Tensor, rows: Tensor, k: int, block: int = 2000) -> np.ndarray:
    """Whether each row is within the distance of any centre to its k-th neighbour."""
    c, r = (v.double().flatten(1).cpu() for v in (centres, rows))
    radius = torch.as_tensor(_kth_distance(c.numpy(), c.numpy(), k + 1))
    return np.concatenate([(torch.cdist(b, c) <= radius).any(1).double().numpy() for b in r.split(block)])


def _kth_distance(rows: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest in ``among``, counting itself if it is one of them."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(among).kneighbors(rows)[0][:, -1]


class _Sums(NamedTuple):
    """What a discrepancy needs of a matrix of k: its row sums, its column sums and its sum of squares."""

    rows: Tensor
    columns: Tensor
    squares: Tensor

    def interaction(self) -> Tensor:
        """Mean square of the matrix after centring its rows and columns."""
        n, m = len(self.rows), len(self.columns)
        mean = self.rows.sum() / (n * m)
        of_means = (self.rows / m).square().mean() + (self.columns / n).square().mean()
        return (self.squares / (n * m) - of_means + mean.square()).clamp_min(0.0)


def _sums(kernel: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> _Sums:
    """Sums of k over all pairs of rows, by blocks of rows: the whole matrix may not fit into memory."""
    columns, squares, rows = y.new_zeros(len(y)), y.new_zeros(()), []
    for block in x.split(max(1, BLOCK_NUMBERS // len(y))):
        values = kernel(torch.cdist(block, y))
        rows.append(values.sum(1))
        columns += values.sum(0)
        squares += values.square().sum()
    return _Sums(torch.cat(rows), columns, squares)


def _discrepancy(kernel: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Estimate:
    """Unbiased E k(x, x') - 2 E k(x, y) + E k(y, y') for k of the distance, with its standard error over rows."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    n, m = len(x), len(y)
    xx, yy, xy = _sums(kernel, x, x), _sums(kernel, y, y), _sums(kernel, x, y)
    own = kernel(x.new_zeros(1, 1))
    within_x, within_y = ((s.rows - own.squeeze()) / (len(s.rows) - 1) for s in (xx, yy))
    value = within_x.mean() - 2 * xy.rows.sum() / (n * m) + within_y.mean()
    of_x, of_y = within_x - xy.rows / m, within_y - xy.columns / n
    # The variance of the U-statistic has a linear and a quadratic part; only the latter remains if both samples have
    # the same distribution. The variance of the row means holds twice the quadratic part besides the linear one.
    linear = 4 * of_x.var() / n + 4 * of_y.var() / m
    quadratic = 2 * xx.interaction() / n**2 + 2 * yy.interaction() / m**2 + 4 * xy.interaction() / (n * m)
    return Estimate(float(value), float((linear - quadratic).maximum(quadratic).sqrt()))


def _middle(x: Tensor, y: Tensor) -> float:
    """Median distance of rows of two samples; of evenly spaced ones where there are many."""
    a, b = (v[:: -(-len(v) // MEDIAN_ROWS)].double().flatten(1) for v in (x, y))
    return float(torch.cdist(a, b).median())


def _with_error(statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, least: int) -> Estimate:
    """A fraction of rows with its standard error, from its spread over disjoint blocks of both samples.

    The rows that count are not independent: they share neighbours, of one sample and of the other, and the folds of a
    classifier share training rows. A binomial error leaves this out, and is a third to four fifths of the true one. The
    variance of such a statistic falls as the number of rows grows, so that its variance over blocks of a fifth of both
    samples is five times that of the whole (Politis and Romano 1994).

    Args:
        statistic: From rows of both samples to the fraction.
        x: Rows (N, D).
        y: Rows (M, D).
        least: Rows that a block needs. Below two such blocks the error is binomial.
    """
    value = statistic(x, y)
    blocks = min(BLOCKS, len(x) // least, len(y) // least)
    if blocks < 2:
        return Estimate(value, float((value * (1 - value) / min(len(x), len(y))) ** 0.5))
    random = torch.Generator().manual_seed(0)
    variances = []
    for _ in range(PARTITIONS):
        parts = [torch.randperm(len(v), generator=random).to(v.device).chunk(blocks) for v in (x, y)]
        found = [statistic(x[a], y[b]) for a, b in zip(*parts, strict=True)]
        variances.append(float(np.var(found, ddof=1)) / blocks)
    return Estimate(value, float(np.mean(variances)) ** 0.5)


def _fraction(hits: np.ndarray) -> Estimate:
    fraction = float(hits.mean())
    return Estimate(fraction, float((fraction * (1 - fraction) / len(hits)) ** 0.5))


def _check(**samples: Tensor) -> None:
    """Raise unless both are rows of finite numbers of one shape."""
    for name, value in samples.items():
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) < 2:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected at least two rows (N, D), got {got}")
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got {int((~value.isfinite()).sum())} non-finite ones")
    (first, x), (second, y) = samples.items()
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{second}: expected rows of shape {tuple(x.shape[1:])} as in {first}, got {tuple(y.shape[1:])}"
        )
