r"""Convergence diagnostics of chains and guides, with advice.

R-hat and effective sample sizes follow Vehtari et al. 2021 (rank-normalised, split chains;
https://doi.org/10.1214/20-BA1221). Pareto k follows Yao et al. 2018 ("Yes, but did it work?"): the tail shape of the
importance weights :math:`p(x, z_s) / q(z_s)` of a guide.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import arviz as az
import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

R_HAT = 1.01


ESS_PER_CHAIN, ESS_CHAINS = 100, 4
"""Required effective sample size per chain, and the number of chains beyond which no more is required: 400 is enough to
estimate R-hat and the effective sample size itself (Vehtari et al. 2021)."""


MIN_ACCEPTANCE = 0.05
"""Mean acceptance below which a chain hardly moves."""


MODE_GAP_SD = 3.0
"""Gap between two groups of chains, in standard deviations of a chain, above which they are at different modes."""


PARETO_K = (0.5, 0.7)


COLLAPSED_KL = 0.01
"""KL divergence, in nats per row, below which a dimension of a latent site has collapsed to its prior."""


POINT_ESTIMATE = "A point estimate: all draws are equal, and predictions ignore parameter uncertainty."


@dataclass(frozen=True)
class Diagnosis:
    """Diagnostics of a posterior.

    Attributes:
        table: One row per scalar quantity: mean and sd; for chains also mcse_mean, ess_bulk, ess_tail and r_hat.
        divergences: Number of divergent transitions; None without chains.
        pareto_k: Pareto k of the guide; None without a guide.
        latent_kl: KL divergence of the guide from the prior by dimension of the latent sites in the plate of rows, as
            returned by ``predict.latent_kl``; None without such sites.
        advice: One sentence per problem, with a remedy; empty if there is none.
    """

    table: pd.DataFrame
    divergences: int | None
    pareto_k: float | None
    advice: tuple[str, ...]
    latent_kl: pd.DataFrame | None = None

    @property
    def worst_r_hat(self) -> float:
        """Largest R-hat; nan without chains."""
        return _extreme(self.table, "r_hat", np.nanmax)

    @property
    def min_ess_bulk(self) -> float:
        """Smallest bulk effective sample size; nan without chains."""
        return _extreme(self.table, "ess_bulk", np.nanmin)

    def __str__(self) -> str:
        return "\n".join(self.advice) or "No warning."


def diagnose(
    idata: az.InferenceData, pareto_k: float | None = None, latent_kl: pd.DataFrame | None = None
) -> Diagnosis:
    """Diagnose the chains of an InferenceData, or a guide by its Pareto k.

    Args:
        idata: InferenceData with a ``posterior`` group; with ``sample_stats`` it is diagnosed as chains.
        pareto_k: Pareto k of the guide, as returned by :func:`pareto_k`; None for chains.
        latent_kl: KL divergence by dimension, as returned by ``predict.latent_kl``; None for chains.
    """
    table = _summary(idata)
    stats = idata.get("sample_stats")
    if pareto_k is not None or stats is None or "diverging" not in stats:
        point = len(table) > 0 and not table["sd"].any()
        advice = (POINT_ESTIMATE,) if point else _advise_guide(pareto_k)
        if latent_kl is None or latent_kl.empty:
            return Diagnosis(table, None, pareto_k, advice)
        return Diagnosis(table, None, pareto_k, (*advice, *_advise_latents(latent_kl)), latent_kl)
    divergences = int(stats["diverging"].sum())
    chains, draws = idata["posterior"].sizes["chain"], idata["posterior"].sizes["draw"]
    method = idata["posterior"].attrs.get("method", "NUTS")
    advice = _advise_chains(table, divergences, chains, draws, method, partial(_modes, _quantities_of(idata)))
    return Diagnosis(table, divergences, None, (*_advise_stuck(idata), *_advise_restarts(idata), *advice))


def pareto_k(log_weights: Tensor) -> float:
    """Pareto k of importance weights (Yao et al. 2018, "Yes, but did it work?").

    Args:
        log_weights: Log density of the model minus that of the guide, per draw (S,), with S at least 25.

    Returns:
        k. Below 0.5 the guide is good; below 0.7 it is usable with importance weighting; above 0.7 it is unreliable.
        -inf if all weights are equal (the guide is the posterior), nan if some are not finite.

    Raises:
        ValueError: There are fewer than 25 draws.
    """
    weights = log_weights.detach().double().cpu().numpy()
    if len(weights) < 25:
        raise ValueError(f"log_weights: expected at least 25 draws, got {len(weights)}")
    if not np.isfinite(weights).all():
        return float("nan")
    if np.ptp(weights) < 1e-6 * max(1.0, abs(weights).max()):
        return float("-inf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(az.psislw(weights)[1])


def _summary(idata: az.InferenceData) -> pd.DataFrame:
    posterior = _quantities_of(idata)
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
        if "sample_stats" in idata.groups() and "diverging" in idata["sample_stats"]:
            columns |= {
                "mcse_mean": az.mcse(draws, method="mean"),
                "ess_bulk": az.ess(draws, method="bulk"),
                "ess_tail": az.ess(draws, method="tail"),
                "r_hat": az.rhat(draws),
            }
    names = [name for n in real for name in _quantities(posterior[n])]
    return pd.DataFrame({k: _flat(v, real) for k, v in columns.items()}, index=pd.Index(names, name="quantity"))


def _quantities_of(idata: az.InferenceData) -> xr.Dataset:
    """Quantities to diagnose: the continuous ones, or the log density of chains that have none."""
    posterior = idata.get("posterior", xr.Dataset())
    real = posterior[[n for n in posterior.data_vars if np.issubdtype(posterior[n].dtype, np.floating)]]
    return idata["sample_stats"][["lp"]] if not real and "lp" in idata.get("sample_stats", ()) else real


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


def _advise_guide(k: float | None) -> tuple[str, ...]:
    good, usable = PARETO_K
    if k is None:
        return ()
    if np.isnan(k):
        return ("Pareto k could not be computed: the log density is not finite at some draws of the guide.",)
    if k > usable:
        return (
            f"Pareto k of the guide is {k:.2f}, above {usable}: its posterior is unreliable; "
            "use sample(), or a richer guide (AutoMultivariateNormal, a flow).",
        )
    if k > good:
        return (
            f"Pareto k of the guide is {k:.2f}, above {good}: usable for means after importance weighting; "
            "train longer, or use a richer guide for variances and tails.",
        )
    return ()


def _advise_stuck(idata: az.InferenceData) -> tuple[str, ...]:
    """Advice about chains that hardly ever accept."""
    stats = idata["sample_stats"]
    if "acceptance_rate" not in stats:
        return ()
    stuck = np.flatnonzero(stats["acceptance_rate"].mean("draw").values < MIN_ACCEPTANCE)
    if not len(stuck):
        return ()
    return (
        f"{_chains(stuck).capitalize()} hardly moved (mean acceptance below {MIN_ACCEPTANCE}), so their draws do not "
        "represent the posterior; run a longer warmup, or look for a region where the density is flat or not finite.",
    )


def _advise_restarts(idata: az.InferenceData) -> tuple[str, ...]:
    count = idata["posterior"].attrs.get("restarted", 0)
    if not count:
        return ()
    return (
        f"{count} chains reached regions of far too low density in the warmup and restarted at the positions of "
        "others; this could miss a low but very wide mode; kernel=NUTS restarts no chains.",
    )


def _modes(posterior: xr.Dataset, name: str) -> str:
    """Remedy for chains that disagree in a scalar; two groups with a wide gap are at different modes."""
    draws = _by_name(posterior, name)
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


def _by_name(posterior: xr.Dataset, name: str) -> np.ndarray:
    """Draws (chain, draw) of one scalar, by its name in the table."""
    site = name.split("[")[0] if name not in posterior else name
    array = posterior[site]
    at = next(k for k in np.ndindex(array.shape[2:]) if quantity(array, k) == name)
    return array.values[(slice(None), slice(None), *at)]


def _chains(which: np.ndarray) -> str:
    shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    return f"chain{'s' if len(which) > 1 else ''} {shown}"


def _advise_chains(
    table: pd.DataFrame, divergences: int, chains: int, draws: int, method: str, modes: Callable[[str], str]
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
    elif (moving["r_hat"] > R_HAT).any():
        worst = moving["r_hat"].idxmax()
        advice.append(
            f"R-hat is {moving['r_hat'].max():.3f} for {worst}, above {R_HAT}: the chains disagree; "
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
