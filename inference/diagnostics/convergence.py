r"""Convergence diagnostics of chains and guides, with advice.

R-hat and effective sample sizes follow Vehtari et al. 2021 (rank-normalised, split chains;
https://doi.org/10.1214/20-BA1221). As there, ``ess_tail`` is the smaller of the effective sample sizes of the 5 % and
95 % quantiles; ``arviz_stats.ess`` takes 11 % and 89 % by default.
Guides are judged by :mod:`inference.diagnostics.guides`.

R-hat of m half chains of n draws with variance W within and V of their means is :math:`\sqrt{1 - 1/n + V/W}`. Where the
chains agree V is their Monte Carlo error alone, so R-hat is about :math:`\sqrt{1 + m / S_e}` with the effective sample
size :math:`S_e`: 1.01 for the 8 halves of four chains and the 400 draws that are required, but 1.15 for 64 chains. For
more than four chains the limit therefore allows for the Monte Carlo error, estimated from the chains one by one, by the
difference of the means of their halves (:func:`r_hat_limit`).

What no diagnostic can see is what no chain has found: a narrow mode beside a wide one is missed by all chains, which
then agree.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from inference.core.lazy import azb, azs, pd, special, stats, xr
from inference.diagnostics.guides import FALSE_ALARMS, PARETO_K, GuideCheck, advise_guide, weigh
from inference.diagnostics.losses import still_falling

R_HAT = 1.01
"""R-hat above which up to four chains disagree; for more chains see :func:`r_hat_limit`."""


ESS_PER_CHAIN, ESS_CHAINS = 100, 4
"""Required effective sample size per chain, and the number of chains beyond which no more is required: 400 is enough to
estimate R-hat and the effective sample size itself (Vehtari et al. 2021)."""


TAILS = (0.05, 0.95)
"""Quantiles of which the smaller effective sample size is ``ess_tail``."""


MAX_QUANTITIES = 10_000
"""Number of quantities up to which a site of a guide has lines in the table."""


CUT_SHORT = 0.05
"""Share of transitions at the maximum tree depth from which it is said, as in PyMC."""


MIN_ACCEPTANCE = 0.05
"""Mean acceptance below which a chain hardly moves."""


MODE_GAP_SD = 3.0
"""Gap between two groups of chains, in standard deviations of a chain, above which they are at different modes."""


COLLAPSED_KL = 0.01
"""KL divergence, in nats per row, below which a dimension of a latent site has collapsed to its prior."""


POINT_ESTIMATE = "A point estimate: all draws are equal, and predictions ignore parameter uncertainty."


RAN_AWAY = (
    "All draws are equal, though the guide is no point mass: its scales are lost in the rounding of its locations. The "
    "fit ran away; take a lower learning_rate, or tighter priors."
)


@dataclass(frozen=True)
class Diagnosis:
    """Diagnostics of a posterior.

    A posterior that passes may still miss a narrow mode that no chain, and no draw of the guide, has found.

    Attributes:
        table: One row per scalar quantity: mean and sd; for chains also mcse_mean, ess_bulk, ess_tail and r_hat.
        divergences: Number of divergent transitions; None without chains.
        pareto_k: Pareto k of the guide; where all latent sites lie in the plate of rows, the 90 % quantile of those of
            its rows; None without a guide.
        latent_kl: KL divergence of the guide from the prior by dimension of the latent sites in the plate of rows, as
            returned by ``predict.latent_kl``; None without such sites.
        advice: One sentence per problem, with a remedy; empty if there is none.
        unjudged: What could not be judged, each with the reason.
        effective: Effective fraction of the guide's importance weights, in (0, 1]; the median over rows where Pareto k
            is a quantile over rows; None without a guide.
        weighted: Mean and sd of each quantity after importance weighting, where Pareto k is at most 0.7.
        omitted: Sites that the table leaves out: those of a guide with more than ``MAX_QUANTITIES`` quantities.
        converged: Whether the chains agree: R-hat is below its limit for every quantity. None without chains, and for
            one chain.
    """

    table: pd.DataFrame
    divergences: int | None
    pareto_k: float | None
    advice: tuple[str, ...]
    latent_kl: pd.DataFrame | None = None
    unjudged: tuple[str, ...] = ()
    effective: float | None = None
    weighted: pd.DataFrame | None = None
    omitted: tuple[str, ...] = ()
    converged: bool | None = None

    @property
    def worst_r_hat(self) -> float:
        """Largest R-hat; nan without chains."""
        return _extreme(self.table, "r_hat", np.nanmax)

    @property
    def min_ess_bulk(self) -> float:
        """Smallest bulk effective sample size; nan without chains."""
        return _extreme(self.table, "ess_bulk", np.nanmin)

    def __str__(self) -> str:
        return "\n".join([*self.advice, *(f"Not judged: {what}." for what in self.unjudged)]) or "No warning."


def diagnose(
    idata: xr.DataTree,
    pareto_k: float | GuideCheck | None = None,
    latent_kl: pd.DataFrame | None = None,
    *,
    losses: np.ndarray | None = None,
    unjudged: Sequence[str] = (),
) -> Diagnosis:
    """Diagnose the chains of a DataTree, or a guide by its importance weights.

    Narrow modes beside wide ones can be missed by every chain; the chains then agree, and nothing is reported.

    Args:
        idata: DataTree with a ``posterior`` group; with ``sample_stats`` it is diagnosed as chains. What
            ``arviz_base.convert_to_datatree`` takes is converted.
        pareto_k: Pareto k of the guide, as returned by :func:`pareto_k`, or its whole judgement; None for chains.
        latent_kl: KL divergence by dimension, as returned by ``predict.latent_kl``; None for chains.
        losses: Loss of each step of the fit. A guide is not judged by a large Pareto k where they still fall.
        unjudged: What could not be judged, each with the reason.
    """
    idata = azb.convert_to_datatree(idata)
    stats = idata.get("sample_stats")
    if pareto_k is not None or stats is None or "diverging" not in stats:
        check = pareto_k if isinstance(pareto_k, GuideCheck) else GuideCheck(pareto_k)
        unfinished = () if losses is None or _usable(check) else still_falling(losses)
        return _diagnose_guide(idata, check, latent_kl, unfinished, tuple(unjudged))
    table = _summary(_quantities_of(idata), chains=True)
    divergences = int(stats["diverging"].sum())
    chains, draws = idata["posterior"].sizes["chain"], idata["posterior"].sizes["draw"]
    method = idata["posterior"].attrs.get("method", "NUTS")
    apart = _disagreeing(table, _quantities_of(idata))
    advice = _advise_chains(table, divergences, chains, draws, method, apart, partial(_modes, _quantities_of(idata)))
    converged = None if chains == 1 else bool(table["r_hat"].notna().any()) and not len(apart)
    said = (*_advise_stuck(idata), *_advise_restarts(idata), *_advise_depth(idata), *advice)
    return Diagnosis(table, divergences, None, said, unjudged=tuple(unjudged), converged=converged)


def _diagnose_guide(
    idata: xr.DataTree,
    check: GuideCheck,
    latent_kl: pd.DataFrame | None,
    unfinished: tuple[str, ...],
    unjudged: tuple[str, ...],
) -> Diagnosis:
    whole = _quantities_of(idata)
    sizes = {str(n): int(np.prod(whole[n].shape[2:])) for n in whole.data_vars}
    omitted = tuple(n for n, size in sizes.items() if size > MAX_QUANTITIES)
    posterior = whole.drop_vars(omitted)
    table = _summary(posterior, chains=False)
    equal = bool(whole.data_vars) and all(bool((v.values == v.values[:1, :1]).all()) for v in whole.data_vars.values())
    weighted = _weigh(posterior, check) if _usable(check) and not equal else None
    if equal and check.point is False and whole.sizes["draw"] > 1:
        advice = (RAN_AWAY, *unfinished, *check.faults)
    elif equal and check.point is not False:
        advice = (*unfinished, *check.faults, POINT_ESTIMATE)
    else:
        unreliable = check.pareto_k is not None and check.pareto_k > PARETO_K[1]
        advice = unfinished if unfinished and unreliable else (*unfinished, *advise_guide(check, weighted))
    known = None if latent_kl is None or latent_kl.empty else latent_kl
    return Diagnosis(
        table,
        None,
        check.pareto_k,
        advice if known is None else (*advice, *_advise_latents(known)),
        known,
        unjudged=(*check.unjudged, *unjudged),
        effective=check.effective,
        weighted=None if weighted is None else weighted[["mean", "sd"]],
        omitted=omitted,
    )


def _usable(check: GuideCheck) -> bool:
    return check.pareto_k is not None and check.pareto_k <= PARETO_K[1]


def _weigh(posterior: xr.Dataset, check: GuideCheck) -> pd.DataFrame | None:
    """Moments after importance weighting of the quantities of a guide, in the order of the table."""
    if check.log_weights is None or not posterior.data_vars:
        return None
    count = len(check.log_weights)
    draws = np.concatenate([v.values.reshape(v.shape[1], -1)[:count] for v in posterior.data_vars.values()], 1)
    names = [name for v in posterior.data_vars.values() for name in _quantities(v)]
    return weigh(draws, check.log_weights).set_index(pd.Index(names, name="quantity"))


def _summary(posterior: xr.Dataset, chains: bool) -> pd.DataFrame:
    real = [str(n) for n in posterior.data_vars]
    if not real:
        return pd.DataFrame(columns=["mean", "sd"], index=pd.Index([], name="quantity"))
    draws, over = posterior[real], ("chain", "draw")
    with warnings.catch_warnings():
        # Draws that are not finite, or constant, give nan; the advice reports it.
        warnings.simplefilter("ignore", RuntimeWarning)
        # A constant quantity has a standard deviation of about 1e-17 by rounding.
        columns = {
            "mean": draws.mean(over),
            "sd": draws.std(over, ddof=1).where(draws.max(over) != draws.min(over), 0.0),
        }
        if chains:
            columns |= {
                "mcse_mean": azs.mcse(draws, method="mean"),
                "ess_bulk": azs.ess(draws, method="bulk"),
                "ess_tail": azs.ess(draws, method="tail", prob=TAILS),
                "r_hat": azs.rhat(draws),
            }
    names = [name for n in real for name in _quantities(posterior[n])]
    return pd.DataFrame({k: _flat(v, real) for k, v in columns.items()}, index=pd.Index(names, name="quantity"))


def with_intervals(table: pd.DataFrame, idata: xr.DataTree, prob: float) -> pd.DataFrame:
    """A table of quantities with their central intervals after mean and sd, under ArviZ's names of columns.

    Args:
        table: The table of a :class:`Diagnosis`.
        idata: The draws that it is of.
        prob: Posterior probability of an interval; as much lies below it as above.
    """
    tails, bounds = ((1 - prob) / 2, (1 + prob) / 2), dict[str, np.ndarray]()
    for array in _quantities_of(idata).data_vars.values():
        names = _quantities(array)
        if names and names[0] in table.index:
            limits = np.quantile(array.values.reshape(-1, len(names)), tails, axis=0)
            bounds |= dict(zip(names, limits.T, strict=True))
    columns = [f"eti{int(100 * prob)}_{end}" for end in ("lb", "ub")]
    found = pd.DataFrame.from_dict(bounds, orient="index", columns=columns).reindex(table.index)
    return pd.concat([table[["mean", "sd"]], found, table.drop(columns=["mean", "sd"])], axis=1)


def _quantities_of(idata: xr.DataTree) -> xr.Dataset:
    """Quantities to diagnose: the continuous ones, or the log density of chains that have none."""
    groups = {name: group.to_dataset() for name, group in idata.children.items()}
    posterior, stats = groups.get("posterior", xr.Dataset()), groups.get("sample_stats", xr.Dataset())
    real = posterior[[n for n in posterior.data_vars if np.issubdtype(posterior[n].dtype, np.floating)]]
    return stats[["lp"]] if not real and "lp" in stats else real


def _quantities(array: xr.DataArray) -> list[str]:
    """Names of all scalars of a posterior array, in the form of :func:`quantity`."""
    labels = [[str(v) for v in array[d].values] if d in array.coords else range(array.sizes[d]) for d in array.dims[2:]]
    if not labels:
        return [str(array.name)]
    return [f"{array.name}[{', '.join(map(str, at))}]" for at in itertools.product(*labels)]


def quantity(array: xr.DataArray, index: tuple[int, ...]) -> str:
    """Name of one scalar of a posterior array (chain, draw, ...): ``means[benign, mean radius]``."""
    places = zip(array.dims[2:], index, strict=True)
    at = [str(array[d].values[k]) if d in array.coords else str(k) for d, k in places]
    return f"{array.name}[{', '.join(at)}]" if at else str(array.name)


def _flat(dataset: xr.Dataset, names: list[str]) -> np.ndarray:
    return np.concatenate([np.ravel(dataset[n].values) for n in names]) if names else np.zeros(0)


def _extreme(table: pd.DataFrame, column: str, reduce: Callable[[np.ndarray], float]) -> float:
    values = table[column].to_numpy() if column in table else np.zeros(0)
    # A constant quantity (for instance a simplex of one element) has no R-hat and no effective sample size.
    values = values[table["sd"].to_numpy() > 0] if len(values) else values
    return float(reduce(values)) if len(values) and not np.isnan(values).all() else float("nan")


def _advise_latents(table: pd.DataFrame) -> tuple[str, ...]:
    """One sentence per site with collapsed dimensions."""
    said = []
    for name, part in table.groupby(lambda n: n.partition("[")[0], sort=False):
        collapsed, count = int((part["kl"] < COLLAPSED_KL).sum()), len(part)
        remedy = "fit with BetaELBO(warmup=...) or BetaELBO(free_bits=...)"
        if collapsed == count:
            said.append(
                f"{name}: posterior collapse: the guide equals the prior for every row (KL below {COLLAPSED_KL} nats), "
                f"so the model does not use {name}; {remedy}, or use a weaker decoder"
            )
        elif collapsed:
            said.append(
                f"{name}: {collapsed} of {count} dimensions have collapsed to the prior (KL below {COLLAPSED_KL} nats "
                f"per row); use fewer dimensions, or {remedy} to use more of them"
            )
    return tuple(said)


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
        ranks = stats.rankdata(values).reshape(values.shape)
        normal = special.ndtri((ranks - 0.375) / (values.size + 0.25))
        halves = np.stack([normal[:, :half], normal[:, -half:]], 1)
        within = halves.var(-1, ddof=1).mean()
        means = halves.mean(-1)
        # Where no chain moves there is nothing to allow for, and rounding to divide by.
        error = (means[:, 0] - means[:, 1]).var(ddof=1) / 2 / within if within > STILL else 0.0
        limits.append(R_HAT**2 + max(error - 1 / half, 0.0) + z * error / math.sqrt(chains - 1))
    return math.sqrt(max(limits))


def _disagreeing(table: pd.DataFrame, posterior: xr.Dataset) -> pd.Series:
    """Limits of R-hat of the quantities above it."""
    above = table.index[(table["sd"] != 0) & (table["r_hat"] > R_HAT)]
    limits = {n: r_hat_limit(v, len(table)) for n, v in _named(posterior, set(above))}
    return pd.Series({n: v for n, v in limits.items() if table["r_hat"][n] > v}, dtype=float)


def _named(posterior: xr.Dataset, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Draws (chain, draw) of the named quantities."""
    for array in posterior.data_vars.values():
        flat = array.values.reshape(*array.shape[:2], -1)
        yield from ((n, flat[..., k]) for k, n in enumerate(_quantities(array)) if n in names)


def _modes(posterior: xr.Dataset, name: str) -> str:
    """Remedy for chains that disagree in a scalar; two groups with a wide gap are at different modes."""
    ((_, draws),) = _named(posterior, {name})
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


def _advise_chains(
    table: pd.DataFrame,
    divergences: int,
    chains: int,
    draws: int,
    method: str,
    apart: pd.Series,
    modes: Callable[[str], str],
) -> tuple[str, ...]:
    advice = []
    moving = table[table["sd"] != 0]
    broken = moving[~np.isfinite(moving["sd"])]
    if len(broken):
        advice.append(f"Draws of {broken.index[0]} are not finite: the density overflows there; check priors and data.")
    if chains == 1:
        advice.append("One chain has no R-hat: run at least two to see whether they agree.")
    elif moving["r_hat"].isna().any() and not len(broken):
        advice.append(f"{draws} draws per chain are too few to compute R-hat: run more.")
    elif len(apart):
        worst = moving["r_hat"][apart.index].idxmax()
        advice.append(
            f"R-hat is {moving['r_hat'][worst]:.3f} for {worst}, above {apart[worst]:.4g}: the chains disagree; "
            + modes(str(worst))
        )
    least = moving[["ess_bulk", "ess_tail"]].min(axis=1).dropna()
    enough = ESS_PER_CHAIN * min(chains, ESS_CHAINS)
    said = f"{ESS_PER_CHAIN} per chain" if chains <= ESS_CHAINS else str(enough)
    if len(least) and least.min() < enough:
        advice.append(
            f"Effective sample size is {least.min():.0f} for {least.idxmin()}, below {said}: "
            "run more draws, or reparameterise correlated sites."
        )
    if divergences:
        advice.append(
            f"{divergences} of {chains * draws} transitions diverged: parts of the posterior were not reached; "
            f"raise target_accept_prob (partial({method}, target_accept_prob=0.95)), or use a non-centred "
            "parameterisation."
        )
    return tuple(advice)
