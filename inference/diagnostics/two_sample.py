r"""Do two samples come from one law? For models that can be drawn from and not scored.

Every figure comes with a standard error over the rows at hand. Distances are Euclidean, of the features as they are
given: scale them, or map images to features of a classifier, before rows are compared.

References: Gretton et al. 2012, "A Kernel Two-Sample Test" (MMD); Szekely and Rizzo 2013 (energy distance); Lopez-Paz
and Oquab 2017 (https://arxiv.org/abs/1610.06545; classifier test); Kynkaanniemi et al. 2019
(https://arxiv.org/abs/1904.06991; precision and recall); Naeem et al. 2020 (https://arxiv.org/abs/2002.09797;
coverage); Srivastava et al. 2017 and Lin et al. 2018 (https://arxiv.org/abs/1712.04086; modes and quality).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sklearn.base import ClassifierMixin


MIN_COVERAGE = 0.5
"""Coverage below which generated rows are said to leave out modes."""


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Modes:
    """What a sample makes of modes that are known.

    Attributes:
        found: Number of modes that at least one row of high quality lies at.
        total: Number of modes.
        quality: Share of rows of high quality: within so many standard deviations of a mode.
        reverse_kl: Divergence of the shares of rows whose nearest mode is each from equal shares, in nats.
        shares: Those shares (modes,).
    """

    found: int
    total: int
    quality: Estimate
    reverse_kl: float
    shares: np.ndarray


def modes(x: Tensor, centres: Tensor, sd: float, *, within: float = 3.0) -> Modes:
    """Modes found, share of high quality and reverse KL of rows (N, D) against modes (K, D) of one standard deviation.

    Args:
        within: Standard deviations from a mode up to which a row is of high quality, in Euclidean distance.
    """
    _check(x, centres)
    distance, nearest = torch.cdist(x.double(), centres.double()).min(1)
    good = distance <= within * sd
    count = len(centres)
    shares = nearest.bincount(minlength=count).double() / len(x)
    return Modes(
        found=len(nearest[good].unique()),
        total=count,
        quality=_share(good.double().cpu().numpy()),
        reverse_kl=reverse_kl(shares),
        shares=shares.cpu().numpy(),
    )


def reverse_kl(shares: Tensor, target: Tensor | None = None) -> float:
    """Divergence of shares (K,) from target shares, equal ones by default, in nats."""
    aim = torch.full_like(shares, 1 / len(shares)) if target is None else target
    return float(torch.special.xlogy(shares, shares / aim).sum())


def mmd(x: Tensor, y: Tensor, *, bandwidths: tuple[float, ...] | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy of rows (N, D) and (M, D), unbiased: about 0 for samples of one law.

    .. math:: \mathrm{E}\,k(x, x') - 2\,\mathrm{E}\,k(x, y) + \mathrm{E}\,k(y, y')

    Args:
        bandwidths: Of the Gaussian kernels whose mean k is. None: the median distance, a quarter and four times of it.
    """
    _check(x, y)
    a, b, between = (torch.cdist(u.double(), v.double()) for u, v in ((x, x), (y, y), (x, y)))
    if bandwidths is None:
        middle = float(between.median())
        bandwidths = (middle / 4, middle, 4 * middle)

    def kernel(distance: Tensor) -> Tensor:
        return torch.stack([(-0.5 * (distance / max(w, 1e-300)).square()).exp() for w in bandwidths]).mean(0)

    return _discrepancy(kernel(a), kernel(b), kernel(between))


def energy_distance(x: Tensor, y: Tensor) -> Estimate:
    r"""Energy distance :math:`2\,\mathrm{E}|x - y| - \mathrm{E}|x - x'| - \mathrm{E}|y - y'|` of rows, unbiased."""
    _check(x, y)
    return _discrepancy(*(-torch.cdist(u.double(), v.double()) for u, v in ((x, x), (y, y), (x, y))))


def classifier_test(
    x: Tensor, y: Tensor, *, make: Callable[[], ClassifierMixin] | None = None, folds: int = 5, seed: int = 0
) -> Estimate:
    """Share of held-out rows that a classifier tells right, one half for samples of one law of equal size.

    Args:
        make: Makes a scikit-learn classifier. None: by nearest neighbours, as many as the root of the rows.
        folds: Of the cross-validation.
    """
    _check(x, y)
    size = min(len(x), len(y))
    rows = torch.cat([x[:size], y[:size]]).double().cpu().numpy()
    label = np.repeat([0, 1], size)
    # Imported where it is asked for: it takes half a second, which every new process would pay.
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(max(1, int(size**0.5))) if make is None else make()
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    right = cross_val_predict(classifier, rows, label, cv=split) == label
    return _share(right.astype(float))


def precision(real: Tensor, generated: Tensor, *, k: int = 3) -> Estimate:
    """Share of generated rows that lie in the ball of a real row that reaches to its k-th neighbour."""
    _check(real, generated)
    return _share(_inside(real, generated, k))


def recall(real: Tensor, generated: Tensor, *, k: int = 3) -> Estimate:
    """Share of real rows that lie in the ball of a generated row that reaches to its k-th neighbour."""
    return precision(generated, real, k=k)


def coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> Estimate:
    """Share of real rows in whose own ball, up to the k-th neighbour, a generated row lies.

    Its expectation for two samples of one law and size is :math:`1 - 2^{-k}`, nearly; a generator that leaves out modes
    leaves out their rows.
    """
    _check(real, generated)
    rows, others = (v.double().flatten(1).cpu().numpy() for v in (real, generated))
    return _share((_farthest(rows, others, 1) <= _farthest(rows, rows, k + 1)).astype(float))


def _inside(centres: Tensor, rows: Tensor, k: int, block: int = 2000) -> np.ndarray:
    """Whether each row lies in any centre's ball."""
    c, r = (v.double().flatten(1).cpu() for v in (centres, rows))
    reach = torch.as_tensor(_farthest(c.numpy(), c.numpy(), k + 1))
    return np.concatenate([(torch.cdist(b, c) <= reach).any(1).double().numpy() for b in r.split(block)])


def _farthest(rows: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    """Distance of each row to the k-th nearest of the others, itself included where it is one of them."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(among).kneighbors(rows)[0][:, -1]


def _discrepancy(xx: Tensor, yy: Tensor, xy: Tensor) -> Estimate:
    """Unbiased E k(x, x') - 2 E k(x, y) + E k(y, y') from matrices of k, with the error of what rows vary by."""
    n, m = xy.shape
    own = (xx.sum(1) - xx.diagonal()) / (n - 1), (yy.sum(1) - yy.diagonal()) / (m - 1)
    value = own[0].mean() - 2 * xy.mean() + own[1].mean()
    of_x, of_y = own[0] - xy.mean(1), own[1] - xy.mean(0)
    # The linear part of the U-statistic, and the rest, which is all where both samples have one law. The rows' means
    # vary by twice the rest beside the linear part.
    linear = 4 * of_x.var() / n + 4 * of_y.var() / m
    rest = 2 * _interaction(xx) / n**2 + 2 * _interaction(yy) / m**2 + 4 * _interaction(xy) / (n * m)
    return Estimate(float(value), float((linear - rest).maximum(rest).sqrt()))


def _interaction(matrix: Tensor) -> Tensor:
    """Mean square of a matrix less the means of its rows and columns."""
    return (matrix - matrix.mean(0) - matrix.mean(1, keepdim=True) + matrix.mean()).square().mean()


def _share(hits: np.ndarray) -> Estimate:
    share = float(hits.mean())
    return Estimate(share, float((share * (1 - share) / len(hits)) ** 0.5))


def _check(x: Tensor, y: Tensor) -> None:
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor) or value.dim() < 2 or len(value) < 2:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected at least two rows (N, D), got {got}")
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got {int((~value.isfinite()).sum())} that are not")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"y: expected rows like those of x {tuple(x.shape[1:])}, got {tuple(y.shape[1:])}")
