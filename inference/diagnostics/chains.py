r"""Whether chains agree, and advice on them.

R-hat of m half chains of n draws with variance W within and V of their means is :math:`\sqrt{1 - 1/n + V/W}`. Where the
chains agree V is their Monte Carlo error alone, so R-hat is about :math:`\sqrt{1 + m / S_e}` with the effective sample
size :math:`S_e`: 1.01 for the 8 halves of four chains and the 400 draws that are required, but 1.15 for 64 chains. For
more than four chains the limit therefore allows for the Monte Carlo error, estimated from the chains one by one, by the
difference of the means of their halves (:func:`r_hat_limit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from inference.core.lazy import pd, stats, xr
from inference.diagnostics.advice import FALSE_ALARMS
from inference.diagnostics.quantities import draws_of, quantities_of
from inference.diagnostics.ranks import normal_scores

R_HAT = 1.01
"""R-hat above which up to four chains disagree; for more chains see :func:`r_hat_limit`."""


ESS_PER_CHAIN, ESS_CHAINS = 100, 4
"""Required effective sample size per chain, and the number of chains beyond which no more is required: 400 is enough to
estimate R-hat and the effective sample size itself (Vehtari et al. 2021)."""


CUT_SHORT = 0.05
"""Share of transitions at the maximum tree depth from which it is said, as in PyMC."""


MIN_ACCEPTANCE = 0.05
"""Mean acceptance below which a chain hardly moves."""


MODE_GAP_SD = 3.0
"""Gap between two groups of chains, in standard deviations of a chain, above which they are at different modes."""


STILL = 1e-12
"""Variance of normal scores within half chains up to which they do not move: that of all scores is 1."""


def r_hat_limit(draws: np.ndarray, quantities: int = 1) -> float:
    r"""R-hat up to which chains agree: 1.01 for up to four of them, more for more.

    .. math:: \hat R^2 \le 1.01^2 + \Big(\frac{V}{W} - \frac{1}{n}\Big)_+ + z \frac{V}{W \sqrt{C - 1}}

    where n is half the number of draws, W the mean variance of the 2 C half chains, and V the variance of a half's mean
    as each chain tells alone: half the variance over chains of the difference of its halves' means. The excess over V
    is the covariance over chains of these two means, whose standard error is :math:`V / \sqrt{C - 1}` for chains that
    agree; z makes the probability of a report by chance :math:`10^{-3}` over all quantities. Draws are rank-normalised,
    and also folded around the median; the limit is the larger one, as R-hat is the larger one.

    Args:
        draws: Draws (chains, draws) of one quantity.
        quantities: Number of quantities that are judged.
    """
    chains, half = len(draws), draws.shape[1] // 2
    if chains <= ESS_CHAINS or half < 2:
        return R_HAT
    z = math.sqrt(2 * math.log(4 * quantities / FALSE_ALARMS))
    limits = []
    for values in (draws, abs(draws - np.median(draws))):
        normal = normal_scores(values)
        halves = np.stack([normal[:, :half], normal[:, -half:]], 1)
        within = halves.var(-1, ddof=1).mean()
        means = halves.mean(-1)
        # Where no chain moves there is nothing to allow for, and rounding to divide by.
        error = (means[:, 0] - means[:, 1]).var(ddof=1) / 2 / within if within > STILL else 0.0
        limits.append(R_HAT**2 + max(error - 1 / half, 0.0) + z * error / math.sqrt(chains - 1))
    return math.sqrt(max(limits))


def disagreeing(table: pd.DataFrame, posterior: xr.Dataset) -> pd.Series:
    """Limits of R-hat of the quantities above it."""
    above = table.index[(table["sd"] != 0) & (table["r_hat"] > R_HAT)]
    limits = {n: r_hat_limit(v, len(table)) for n, v in draws_of(posterior, set(above))}
    return pd.Series({n: v for n, v in limits.items() if table["r_hat"][n] > v}, dtype=float)


def advise_ensembles(table: pd.DataFrame, ensembles: int) -> list[str]:
    r"""Advice where the ensembles of several processes disagree: nested R-hat is above its limit.

    Nested R-hat of K ensembles is :math:`\sqrt{1 + B/W}` with the variance B of their means. Where they agree B is
    Monte Carlo error, and :math:`(K - 1) S_e B / W` is chi-square with K - 1 degrees of freedom for an effective sample
    size :math:`S_e` of an ensemble. The limit, 1.01 without it, allows for that with a probability of :math:`10^{-3}`
    over all quantities.
    """
    nested = table.get("r_hat_nested")
    if nested is None:
        return []
    chance = stats.chi2.isf(FALSE_ALARMS / len(nested), ensembles - 1) / (ensembles - 1)
    limit = np.sqrt(R_HAT**2 + chance / (table["ess_bulk"] / ensembles))
    if not (nested > limit).any():
        return []
    worst = (nested / limit).idxmax()
    return [
        f"Nested R-hat is {nested[worst]:.3f} for {worst}, above {limit[worst]:.3f}: the ensembles of the processes "
        "disagree; run a longer warmup and more draws."
    ]


def advise_chains(idata: xr.DataTree, table: pd.DataFrame, apart: pd.Series) -> tuple[str, ...]:
    """One sentence per problem of chains, with a remedy.

    Args:
        idata: The chains, with ``sample_stats``.
        table: The table of their quantities.
        apart: Limits of R-hat of the quantities above it, as :func:`disagreeing` returns them.
    """
    moving = table[table["sd"] != 0]
    return (
        *_advise_stuck(idata),
        *_advise_restarts(idata),
        *_advise_depth(idata),
        *_advise_agreement(idata, moving, apart),
        *_advise_size(moving, idata["posterior"].sizes["chain"]),
        *_advise_divergences(idata),
    )


def _advise_stuck(idata: xr.DataTree) -> tuple[str, ...]:
    """Advice about chains that hardly ever accept."""
    stats = idata["sample_stats"].to_dataset()
    if "acceptance_rate" not in stats:
        return ()
    stuck = np.flatnonzero(stats["acceptance_rate"].mean("draw").values < MIN_ACCEPTANCE)
    if not len(stuck):
        return ()
    return (
        f"{_chains(stuck).capitalize()} hardly moved (mean acceptance below {MIN_ACCEPTANCE}), so their draws do not "
        "represent the posterior; run a longer warmup, or look for a region where the density is flat or not finite.",
    )


def _advise_depth(idata: xr.DataTree) -> tuple[str, ...]:
    """Advice about trajectories that were cut short."""
    cut = idata["sample_stats"].to_dataset().get("reached_max_treedepth")
    if cut is None or float(cut.mean()) <= CUT_SHORT:
        return ()
    return (
        f"{int(cut.sum())} of {cut.size} transitions reached the maximum tree depth, which cut their trajectories "
        "short; raise max_tree_depth (partial(NUTS, max_tree_depth=12)), or bring sites to similar scales.",
    )


def _advise_restarts(idata: xr.DataTree) -> tuple[str, ...]:
    count = idata["posterior"].attrs.get("restarted", 0)
    if not count:
        return ()
    return (
        "In the warmup chains reached regions of far too low density and restarted at the positions of others, "
        f"{count} times in all; this could miss a low but very wide mode; kernel=NUTS restarts no chains.",
    )


def _advise_agreement(idata: xr.DataTree, table: pd.DataFrame, apart: pd.Series) -> Iterator[str]:
    """Advice about draws that are not finite, and chains that disagree or cannot be compared."""
    chains, draws = (idata["posterior"].sizes[d] for d in ("chain", "draw"))
    broken = table[~np.isfinite(table["sd"])]
    if len(broken):
        yield f"Draws of {broken.index[0]} are not finite: the density overflows there; check priors and data."
    if chains == 1:
        yield "One chain has no R-hat: run at least two to see whether they agree."
    elif table["r_hat"].isna().any() and not len(broken):
        yield f"{draws} draws per chain are too few to compute R-hat: run more."
    elif len(apart):
        worst = str(table["r_hat"][apart.index].idxmax())
        yield (
            f"R-hat is {table['r_hat'][worst]:.3f} for {worst}, above {apart[worst]:.4g}: the chains disagree; "
            + _modes(quantities_of(idata), worst)
        )


def _advise_size(table: pd.DataFrame, chains: int) -> Iterator[str]:
    """Advice about too small an effective sample size."""
    least = table[["ess_bulk", "ess_tail"]].min(axis=1).dropna()
    said = f"{ESS_PER_CHAIN} per chain" if chains <= ESS_CHAINS else str(ESS_PER_CHAIN * ESS_CHAINS)
    if len(least) and least.min() < ESS_PER_CHAIN * min(chains, ESS_CHAINS):
        yield (
            f"Effective sample size is {least.min():.0f} for {least.idxmin()}, below {said}: "
            "run more draws, or reparameterise correlated sites."
        )


def _advise_divergences(idata: xr.DataTree) -> Iterator[str]:
    diverging = idata["sample_stats"]["diverging"]
    if diverging.any():
        method = idata["posterior"].attrs.get("method", "NUTS")
        yield (
            f"{int(diverging.sum())} of {diverging.size} transitions diverged: parts of the posterior were not "
            f"reached; raise target_accept_prob (partial({method}, target_accept_prob=0.95)), or use a non-centred "
            "parameterisation."
        )


def _modes(posterior: xr.Dataset, name: str) -> str:
    """Remedy for chains that disagree in a scalar; two groups with a wide gap are at different modes."""
    ((_, draws),) = draws_of(posterior, {name})
    means, sd = draws.mean(1), np.median(draws.std(1))
    order = np.argsort(means)
    gaps = np.diff(means[order])
    cut = int(gaps.argmax()) + 1
    if not gaps[cut - 1] > MODE_GAP_SD * sd:
        return "run a longer warmup and more draws, and look for several modes."
    low, high = np.sort(order[:cut]), np.sort(order[cut:])
    return (
        f"{len(low)} stay near {means[low].mean():.3g} and {len(high)} near {means[high].mean():.3g} "
        f"({_chains(min(low, high, key=len))}), at different modes whose weights the chains cannot estimate; "
        "use a tighter prior, or an ordering constraint on exchangeable components."
    )


def _chains(which: np.ndarray) -> str:
    shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    return f"chain{'s' if len(which) > 1 else ''} {shown}"
