r"""Can this posterior be trusted? Every number comes with what to do about it.

R-hat and effective sample sizes are those of Vehtari et al. 2021 (rank-normalised, split chains;
https://doi.org/10.1214/20-BA1221). Pareto k is that of Yao et al. 2018 ("Yes, but did it work?"): the
shape of the tail of the importance weights :math:`p(x, z_s) / q(z_s)` of a guide against the model.
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


ESS_PER_CHAIN, CHAINS = 100, 4
"""Effective draws a chain, and chains up to which each adds to what is asked: R-hat and the effective sizes themselves
are known well enough from 400 (Vehtari et al. 2021)."""


MIN_ACCEPTANCE = 0.05
"""Mean acceptance below which a chain hardly moves."""


MODE_GAP_SD = 3.0
"""Gap between two groups of chains, in standard deviations of a chain, from which they sit at different modes."""


PARETO_K = (0.5, 0.7)


COLLAPSED_KL = 0.01
"""Nats a row below which a dimension of a latent site has collapsed to its prior."""


POINT = "A point estimate: its draws have no spread, and predictions from it ignore what is not known."


@dataclass(frozen=True)
class Diagnosis:
    """What is known of the quality of a posterior.

    Attributes:
        table: One row a scalar quantity: mean, sd, mcse_mean, ess_bulk, ess_tail, r_hat.
        divergences: Number of divergent transitions; None without chains.
        pareto_k: Pareto k of the guide against the model; None without a guide.
        latent_kl: What each dimension of a latent site in the plate of rows says of the data, as ``predict.latent_kl``
            gives it; None without a guide of such sites.
        advice: One sentence for each thing that is wrong, with what to do; empty when all is well.
    """

    table: pd.DataFrame
    divergences: int | None
    pareto_k: float | None
    advice: tuple[str, ...]
    latent_kl: pd.DataFrame | None = None

    @property
    def worst_r_hat(self) -> float:
        """Largest R-hat, nan without chains."""
        return _extreme(self.table, "r_hat", np.nanmax)

    @property
    def min_ess_bulk(self) -> float:
        """Smallest bulk effective sample size, nan without chains."""
        return _extreme(self.table, "ess_bulk", np.nanmin)

    def __str__(self) -> str:
        return "\n".join(self.advice) or "No warning."


def diagnose(
    idata: az.InferenceData, pareto_k: float | None = None, latent_kl: pd.DataFrame | None = None
) -> Diagnosis:
    """Judge the chains of an InferenceData, or the guide by its Pareto k.

    Args:
        idata: With a ``posterior`` group; chains are judged when it has ``sample_stats``.
        pareto_k: What :func:`pareto_k` gave for the guide; None for chains.
        latent_kl: What ``predict.latent_kl`` gave for the guide's sites in the plate of rows.
    """
    table = _summary(idata)
    stats = idata.get("sample_stats")
    if pareto_k is not None or stats is None or "diverging" not in stats:
        point = len(table) > 0 and not table["sd"].any()
        advice = (POINT,) if point else _judge_guide(pareto_k)
        if latent_kl is None or latent_kl.empty:
            return Diagnosis(table, None, pareto_k, advice)
        return Diagnosis(table, None, pareto_k, (*advice, *_judge_latents(latent_kl)), latent_kl)
    divergences = int(stats["diverging"].sum())
    chains, draws = idata["posterior"].sizes["chain"], idata["posterior"].sizes["draw"]
    method = idata["posterior"].attrs.get("method", "NUTS")
    advice = _judge_chains(table, divergences, chains, draws, method, partial(_modes, _judged(idata)))
    return Diagnosis(table, divergences, None, (*_judge_stuck(idata), *_judge_restarts(idata), *advice))


def pareto_k(log_weights: Tensor) -> float:
    """Pareto k of importance weights (Yao et al. 2018).

    Args:
        log_weights: Log density of the model less that of the guide, one a draw (S,), S at least 25.

    Returns:
        k: below 0.5 the guide is good, below 0.7 usable with reweighting, above it not to be trusted;
        -inf when all weights are equal (the guide is the posterior); nan when they are not finite.
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
    posterior = _judged(idata)
    real = [str(n) for n in posterior.data_vars]
    if not real:
        return pd.DataFrame(columns=["mean", "sd"], index=pd.Index([], name="quantity"))
    draws, over = posterior[real], ("chain", "draw")
    with warnings.catch_warnings():
        # Draws that are not finite, or that never move, give nan; the advice says so.
        warnings.simplefilter("ignore", RuntimeWarning)
        # Rounding leaves a spread of 1e-17 to a quantity that never moves.
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


def _judged(idata: az.InferenceData) -> xr.Dataset:
    """What is judged: all that is continuous; of chains over labels alone their log density."""
    posterior = idata.get("posterior", xr.Dataset())
    real = posterior[[n for n in posterior.data_vars if np.issubdtype(posterior[n].dtype, np.floating)]]
    return idata["sample_stats"][["lp"]] if not real and "lp" in idata.get("sample_stats", ()) else real


def _quantities(array: xr.DataArray) -> list[str]:
    """Names of all scalars of a posterior array, as :func:`quantity` names one."""
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
    # A quantity that never moves (the last entry of a one-element simplex) has no R-hat and no ESS.
    values = values[table["sd"].to_numpy() > 0] if len(values) else values
    return float(reduce(values)) if len(values) and not np.isnan(values).all() else float("nan")


def _judge_latents(table: pd.DataFrame) -> tuple[str, ...]:
    """One sentence for each site of which dimensions have collapsed, with what to do."""
    said = []
    for name, part in table.groupby(lambda n: n.partition("[")[0], sort=False):
        silent, count = int((part["kl"] < COLLAPSED_KL).sum()), len(part)
        remedy = "fit with BetaELBO(warmup=...) or BetaELBO(free_bits=...)"
        if silent == count:
            said.append(
                f"{name}: posterior collapse, the guide is the prior for every row (KL below {COLLAPSED_KL} nats); the "
                f"model does without {name}; {remedy}, or a weaker decoder"
            )
        elif silent:
            said.append(
                f"{name}: {silent} of {count} dimensions have collapsed to the prior (KL below {COLLAPSED_KL} nats a "
                f"row); fewer would do, or {remedy} to use more"
            )
    return tuple(said)


def _judge_guide(k: float | None) -> tuple[str, ...]:
    good, usable = PARETO_K
    if k is None:
        return ()
    if np.isnan(k):
        return ("Pareto k could not be computed: the log density is not finite at some draws of the guide.",)
    if k > usable:
        return (
            f"Pareto k of the guide is {k:.2f}, above {usable}: its posterior is not to be trusted; "
            "use sample(), or a richer guide (AutoMultivariateNormal, a flow).",
        )
    if k > good:
        return (
            f"Pareto k of the guide is {k:.2f}, above {good}: usable for means after importance weighting; "
            "train longer, or use a richer guide for variances and tails.",
        )
    return ()


def _judge_stuck(idata: az.InferenceData) -> tuple[str, ...]:
    """Chains that hardly ever accept."""
    stats = idata["sample_stats"]
    if "acceptance_rate" not in stats:
        return ()
    stuck = np.flatnonzero(stats["acceptance_rate"].mean("draw").values < MIN_ACCEPTANCE)
    if not len(stuck):
        return ()
    return (
        f"{_chains(stuck).capitalize()} hardly moved (mean acceptance below {MIN_ACCEPTANCE}): their draws are where "
        "they got stuck; run a longer warmup, or look for a place where the density is flat or not finite.",
    )


def _judge_restarts(idata: az.InferenceData) -> tuple[str, ...]:
    count = idata["posterior"].attrs.get("restarted", 0)
    if not count:
        return ()
    return (
        f"{count} chains went astray in the warmup, to where the density is hopelessly low, and were put beside "
        "others: a mode that is low but very wide would be missed; kernel=NUTS moves none.",
    )


def _modes(posterior: xr.Dataset, name: str) -> str:
    """What to do about chains that disagree in a scalar: two groups further apart than a chain is wide are modes."""
    draws = _by_name(posterior, name)
    means, spread = draws.mean(1), np.median(draws.std(1))
    order = np.argsort(means)
    gaps = np.diff(means[order])
    cut = int(gaps.argmax()) + 1
    if not gaps[cut - 1] > MODE_GAP_SD * spread:
        return "run a longer warmup and more draws, and look for several modes."
    low, high = np.sort(order[:cut]), np.sort(order[cut:])
    return (
        f"{len(low)} stay near {means[low].mean():.3g} and {len(high)} near {means[high].mean():.3g} "
        f"({_chains(min(low, high, key=len))}), at different modes, whose weights they cannot tell; "
        "use a tighter prior, or order what can be exchanged."
    )


def _by_name(posterior: xr.Dataset, name: str) -> np.ndarray:
    """Draws (chain, draw) of one scalar by the name that the table gives it."""
    site = name.split("[")[0] if name not in posterior else name
    array = posterior[site]
    at = next(k for k in np.ndindex(array.shape[2:]) if quantity(array, k) == name)
    return array.values[(slice(None), slice(None), *at)]


def _chains(which: np.ndarray) -> str:
    shown = ", ".join(map(str, which[:8])) + (", ..." if len(which) > 8 else "")
    return f"chain{'s' if len(which) > 1 else ''} {shown}"


def _judge_chains(
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
        advice.append(f"{draws} draws a chain are too few for any R-hat: run more.")
    elif (moving["r_hat"] > R_HAT).any():
        worst = moving["r_hat"].idxmax()
        advice.append(
            f"R-hat is {moving['r_hat'].max():.3f} for {worst}, above {R_HAT}: the chains disagree; "
            + modes(str(worst))
        )
    least = moving[["ess_bulk", "ess_tail"]].min(axis=1).dropna()
    enough = ESS_PER_CHAIN * min(chains, CHAINS)
    said = f"{ESS_PER_CHAIN} a chain" if chains <= CHAINS else str(enough)
    if len(least) and least.min() < enough:
        advice.append(
            f"Effective sample size is {least.min():.0f} for {least.idxmin()}, below {said}: "
            "run more draws, or reparameterise what is correlated."
        )
    if divergences:
        advice.append(
            f"{divergences} of {chains * draws} transitions diverged: parts of the posterior were not reached; "
            f"raise target_accept_prob (partial({method}, target_accept_prob=0.95)), or use a non-centred form."
        )
    return tuple(advice)
