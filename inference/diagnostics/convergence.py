r"""Convergence diagnostics of chains and guides, with advice.

R-hat and effective sample sizes follow Vehtari et al. 2021 (rank-normalised, split chains;
https://doi.org/10.1214/20-BA1221). As there, ``ess_tail`` is the smaller of the effective sample sizes of the 5 % and
95 % quantiles; ``arviz_stats.ess`` takes 11 % and 89 % by default.
Whether chains agree is judged by :mod:`inference.diagnostics.chains`, guides by :mod:`inference.diagnostics.guides`.

What no diagnostic can see is what no chain has found: a narrow mode beside a wide one is missed by all chains, which
then agree.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from inference.core.lazy import azb, azs, pd, xr
from inference.diagnostics.advice import advise_guide, advise_latents
from inference.diagnostics.chains import advise_chains, advise_ensembles, disagreeing
from inference.diagnostics.guides import PARETO_K, GuideCheck, usable
from inference.diagnostics.losses import diverged, still_falling
from inference.diagnostics.quantities import names_of, parts_of, quantities_of, side_by_side
from inference.diagnostics.ranks import can_be_ranked, ranked
from inference.diagnostics.weights import weigh

TAILS = (0.05, 0.95)
"""Quantiles of which the smaller effective sample size is ``ess_tail``."""


MAX_QUANTITIES = 10_000
"""Number of quantities up to which a site of a guide has lines in the table."""


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
        table: One row per scalar quantity: mean and sd; for chains also mcse_mean, ess_bulk, ess_tail and r_hat;
            for ensembles of several processes r_hat_nested (Margossian et al. 2024), with an ensemble as superchain.
        divergences: Number of divergent transitions; None without chains.
        pareto_k: Pareto k of the guide; where all latent sites lie in the plate of rows, the 90 % quantile of those of
            its rows, and so it is beside other sites where joint weights of so many rows say nothing; None without a
            guide.
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
        losses: Loss of each step of the fit. A guide is not judged by a large Pareto k where they still fall, or rise;
            and not at all where the fit ended early, as ``idata.attrs["ended"]`` says.
        unjudged: What could not be judged, each with the reason.
    """
    idata = azb.convert_to_datatree(idata)
    stats = idata.get("sample_stats")
    if pareto_k is not None or stats is None or "diverging" not in stats:
        check = pareto_k if isinstance(pareto_k, GuideCheck) else GuideCheck(pareto_k)
        unfinished = () if losses is None or usable(check) else diverged(losses) or still_falling(losses)
        return _diagnose_guide(idata, check, latent_kl, unfinished, tuple(unjudged))
    posterior = quantities_of(idata)
    ensembles = int(idata["posterior"].attrs.get("processes", 1))
    table = _summary(posterior, chains=True, ensembles=ensembles)
    apart = disagreeing(table, posterior)
    alone, nested = idata["posterior"].sizes["chain"] == 1, advise_ensembles(table, ensembles)
    return Diagnosis(
        table,
        int(stats["diverging"].sum()),
        None,
        (*advise_chains(idata, table, apart), *nested),
        unjudged=tuple(unjudged),
        converged=None if alone else bool(table["r_hat"].notna().any()) and not len(apart) and not nested,
    )


def _diagnose_guide(
    idata: xr.DataTree,
    check: GuideCheck,
    latent_kl: pd.DataFrame | None,
    unfinished: tuple[str, ...],
    unjudged: tuple[str, ...],
) -> Diagnosis:
    whole, ended = quantities_of(idata), bool(idata.attrs.get("ended"))
    sizes = {str(n): int(np.prod(whole[n].shape[2:])) for n in whole.data_vars}
    omitted = tuple(n for n, size in sizes.items() if size > MAX_QUANTITIES)
    posterior = whole.drop_vars(omitted)
    table = _summary(posterior, chains=False)
    equal = bool(whole.data_vars) and all(bool((v.values == v.values[:1, :1]).all()) for v in whole.data_vars.values())
    weighted = _weigh(posterior, check) if usable(check) and not equal else None
    if equal and check.point is False and whole.sizes["draw"] > 1:
        advice = (RAN_AWAY, *unfinished, *check.faults)
    elif equal and check.point is not False:
        advice = (*unfinished, *check.faults, POINT_ESTIMATE)
    else:
        unreliable = check.pareto_k is not None and check.pareto_k > PARETO_K[1]
        over = not ended and not (unfinished and unreliable)
        advice = (*unfinished, *(advise_guide(check, weighted) if over else check.faults))
    known = None if latent_kl is None or latent_kl.empty else latent_kl
    return Diagnosis(
        table,
        None,
        check.pareto_k,
        advice if known is None or ended else (*advice, *advise_latents(known)),
        known,
        unjudged=(*check.unjudged, *unjudged),
        effective=check.effective,
        weighted=None if weighted is None else weighted[["mean", "sd"]],
        omitted=omitted,
    )


def _weigh(posterior: xr.Dataset, check: GuideCheck) -> pd.DataFrame | None:
    """Moments after importance weighting of the quantities of a guide, in the order of the table."""
    if check.log_weights is None or not posterior.data_vars:
        return None
    count = len(check.log_weights)
    draws = np.concatenate([v.values.reshape(v.shape[1], -1)[:count] for v in posterior.data_vars.values()], 1)
    names = [name for v in posterior.data_vars.values() for name in names_of(v)]
    return weigh(draws, check.log_weights).set_index(pd.Index(names, name="quantity"))


def _summary(posterior: xr.Dataset, chains: bool, ensembles: int = 1) -> pd.DataFrame:
    real = [str(n) for n in posterior.data_vars]
    if not real:
        return pd.DataFrame(columns=["mean", "sd"], index=pd.Index([], name="quantity"))
    names = [name for n in real for name in names_of(posterior[n])]
    with warnings.catch_warnings():
        # Draws that are not finite, or constant, give nan; the advice reports it.
        warnings.simplefilter("ignore", RuntimeWarning)
        parts = side_by_side(partial(_columns, chains=chains, ensembles=ensembles), parts_of(posterior))
    return pd.concat(parts).set_axis(pd.Index(names, name="quantity"))


def _columns(draws: xr.Dataset, chains: bool, ensembles: int) -> pd.DataFrame:
    """The table of some quantities."""
    over, names = ("chain", "draw"), [str(n) for n in draws.data_vars]
    if len(names) > 1:
        # One array of all: what is computed of each array costs more to begin than to do.
        flat = np.concatenate([v.values.reshape(*v.shape[:2], -1) for v in draws.data_vars.values()], -1)
        draws, names = xr.Dataset({"all": ((*over, "quantity"), flat)}), ["all"]
    # A constant quantity has a standard deviation of about 1e-17 by rounding.
    columns = {"mean": draws.mean(over), "sd": draws.std(over, ddof=1).where(draws.max(over) != draws.min(over), 0.0)}
    if chains:
        bulk, r_hat = ranked(draws) if can_be_ranked(draws) else (azs.ess(draws, method="bulk"), azs.rhat(draws))
        columns |= {
            "mcse_mean": azs.mcse(draws, method="mean"),
            "ess_bulk": bulk,
            "ess_tail": azs.ess(draws, method="tail", prob=TAILS),
            "r_hat": r_hat,
        }
    each = draws.sizes["chain"] // ensembles
    if ensembles > 1 and each > 1:
        columns["r_hat_nested"] = azs.rhat_nested(draws, superchain_ids=np.repeat(np.arange(ensembles), each))
    return pd.DataFrame({k: _flat(v, names) for k, v in columns.items()})


def with_intervals(table: pd.DataFrame, idata: xr.DataTree, prob: float) -> pd.DataFrame:
    """A table of quantities with their central intervals after mean and sd, under ArviZ's names of columns.

    Args:
        table: The table of a :class:`Diagnosis`.
        idata: The draws that it is of.
        prob: Posterior probability of an interval; as much lies below it as above.
    """
    tails, bounds = ((1 - prob) / 2, (1 + prob) / 2), dict[str, np.ndarray]()
    for array in quantities_of(idata).data_vars.values():
        names = names_of(array)
        if names and names[0] in table.index:
            limits = np.quantile(array.values.reshape(-1, len(names)), tails, axis=0)
            bounds |= dict(zip(names, limits.T, strict=True))
    columns = [f"eti{int(100 * prob)}_{end}" for end in ("lb", "ub")]
    found = pd.DataFrame.from_dict(bounds, orient="index", columns=columns).reindex(table.index)
    return pd.concat([table[["mean", "sd"]], found, table.drop(columns=["mean", "sd"])], axis=1)


def _flat(dataset: xr.Dataset, names: list[str]) -> np.ndarray:
    return np.concatenate([np.ravel(dataset[n].values) for n in names]) if names else np.zeros(0)


def _extreme(table: pd.DataFrame, column: str, reduce: Callable[[np.ndarray], float]) -> float:
    values = table[column].to_numpy() if column in table else np.zeros(0)
    # A constant quantity (for instance a simplex of one element) has no R-hat and no effective sample size.
    values = values[table["sd"].to_numpy() > 0] if len(values) else values
    return float(reduce(values)) if len(values) and not np.isnan(values).all() else float("nan")
