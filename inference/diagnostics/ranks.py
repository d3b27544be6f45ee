r"""Rank-normalised R-hat and bulk effective sample size of many quantities, by two rankings of them all.

``arviz_stats.rhat`` and ``arviz_stats.ess(method="bulk")`` rank the draws of each quantity three times, one quantity
after another. Here all quantities are ranked at once, and ArviZ computes both from the scores. The figures are equal
to its own.

Reference: Vehtari et al. 2021 (https://doi.org/10.1214/20-BA1221).
"""

from __future__ import annotations

import numpy as np
from scipy import special

from inference.core.lazy import azs, xr


def can_be_ranked(draws: xr.Dataset) -> bool:
    """Whether R-hat and bulk effective sizes are those of the scores: two chains, halves of four draws, all finite."""
    long = draws.sizes["chain"] >= 2 and draws.sizes["draw"] >= 8
    return long and all(bool(np.isfinite(v.values).all()) for v in draws.data_vars.values())


def ranked(draws: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Bulk effective sample size and R-hat of the quantities of chains (chain, draw, ...) that can be ranked."""
    halves = xr.Dataset({n: (v.dims, split(v.values.astype(float))) for n, v in draws.data_vars.items()})
    scores, folded = halves.copy(), halves.copy()
    for name, values in halves.data_vars.items():
        scores[name] = values.dims, normal_scores(values.values)
        folded[name] = values.dims, normal_scores(abs(values.values - np.median(values.values, axis=(0, 1))))
    r_hat, tail = (azs.rhat(z, method="identity") for z in (scores, folded))
    # The larger one; that of all values where the folded ones are constant, as ArviZ has it.
    return azs.ess(scores, method="identity"), r_hat.where(~(tail > r_hat), tail)


def split(draws: np.ndarray) -> np.ndarray:
    """The halves of chains (M, N, ...) as chains of their own, (2M, N // 2, ...)."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def normal_scores(draws: np.ndarray) -> np.ndarray:
    r"""Normal quantiles at the ranks of each quantity over all chains and draws, in the shape of the draws.

    .. math:: z = \Phi^{-1}\left(\frac{r - 3/8}{S + 1/4}\right)

    Args:
        draws: Draws (M, N, ...), finite; r is the mean rank of equal ones among S = M N.
    """
    count = draws.shape[0] * draws.shape[1]
    rows = np.ascontiguousarray(draws.reshape(count, -1).T)
    order = rows.argsort(1)
    ordered = np.take_along_axis(rows, order, 1)
    # Equal draws stand side by side now, and have the rank of the middle of their run.
    begins = np.ones(rows.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    begin = np.flatnonzero(begins)
    length = np.diff(begin, append=rows.size)
    middle = np.repeat(begin % count + (length + 1) / 2, length)
    ranks = np.empty(rows.shape)
    np.put_along_axis(ranks, order, middle.reshape(rows.shape), 1)
    return special.ndtri((ranks - 3 / 8) / (count + 1 / 4)).T.reshape(draws.shape)
