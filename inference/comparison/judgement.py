r"""Judgement of a posterior without a truth: Stein discrepancy, leave-one-out, sensitivity to the prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_count
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import azb, azs, pd, xr
from inference.core.spacing import spaced
from inference.diagnostics.stein import Stein, stein
from inference.draws.dependence import of_observations
from inference.draws.scoring import log_joint, rowwise, sample_guide, scaled_sites
from inference.idata import seen_rows
from inference.result import Result


@exclusive
def ksd(result: Result, draws: int = 500, *, seed: int = 0) -> Stein:
    r"""Kernel Stein discrepancy of a posterior: how far its draws are from the density of the model.

    It takes the gradient of the log density at each draw, and no draws of the true posterior. Its p-value is that of
    independent draws of the posterior: chains are thinned to their effective sample size.

    Args:
        result: A Result of ``fit`` or ``sample`` with continuous latent sites.
        draws: Number of draws, at most: the cost grows with its square.
        seed: Seed of the bootstrap.

    Returns:
        A Stein: ``value``, ``p`` and ``draws``. A small p says that the draws are not of the posterior. It does not see
        modes that have the wrong weights, or that are missing.

    Raises:
        ValueError: There is no continuous site, a support moves with another site, or a draw is not finite.
        ArithmeticError: A gradient is not finite.
    """
    check_count("draws", draws, 2)
    if independent(result) < 2:
        raise ValueError("result: expected at least two independent draws, got fewer")
    with isolated(seed), result.state():
        return stein(result.bound, independent_draws(result, draws), torch.Generator().manual_seed(seed))


def independent(result: Result) -> int:
    """Number of independent draws: of chains the smallest bulk effective sample size, at most all of them."""
    if "sample_stats" not in result.groups:
        return result.size
    size = result.diagnosis.min_ess_bulk
    chains = result.groups["posterior"].sizes["chain"]
    return max(1, min(result.size, int(size) if math.isfinite(size) else chains))


def independent_draws(result: Result, most: int) -> dict[str, Tensor]:
    """Evenly spaced draws by site, as many as are independent, but no more than ``most``."""
    at = spaced(result.size, min(independent(result), most))
    return {n: v[at] for n, v in result.draws.items()}


@exclusive
def loo(result: Result, draws: int = 2000, *, seed: int = 1) -> Any:
    r"""Expected log predictive density by leave-one-out cross-validation, of chains or of a guide.

    Of chains it is ``arviz_stats.loo``. Of a guide the draws are weighted by the density of the model over that of the
    guide besides (Magnusson et al. 2019, https://arxiv.org/abs/1904.10679); ``arviz_stats.loo`` takes them for draws of
    the posterior, and is off by what the guide is off.

    Args:
        result: A Result of ``fit`` or ``sample`` whose latent sites lie outside of the plate of rows.
        draws: Draws of the guide.
        seed: Seed of the draws of the guide.

    Returns:
        ``ELPDData`` of ArviZ, with the Pareto k of each row.

    Raises:
        ValueError: Latent sites have a value for each row; ``log_evidence`` scores new rows then. Or a scale weighs
            the rows, so that leaving one out leaves out more or less than a row.
    """
    bound = result.bound
    rows = {p for s in bound.select("observed").values() for p in s.plates if p}
    local = [n for n in result.draws if rows & set(bound.sites[n].plates)]
    with isolated(seed), result.state():
        local = local or of_observations(bound, result.draws)
    if local:
        raise ValueError(
            f"result: expected latent sites outside of the plate of rows, got {', '.join(local)}; leaving a row out "
            "leaves out its latent; use log_evidence on held-out rows"
        )
    with isolated(seed), result.state():
        if weighed := scaled_sites(bound, result.draws):
            raise ValueError(f"result: expected rows that count once, got a scale of {', '.join(weighed)}")
        if "sample_stats" in result.groups:
            return azs.loo(_tree(result, _of_seen_rows(bound, result.draws)))
        values, density = sample_guide(bound, draws)
        tree = azb.from_dict({"log_likelihood": {"data": _numpy(_of_seen_rows(bound, values))[None]}})
        return azs.loo_approximate_posterior(tree, _numpy(log_joint(bound, values)), _numpy(density))


def _of_seen_rows(bound: BoundPair, draws: Mapping[str, Tensor]) -> Tensor:
    """Log likelihood (S, rows) of the rows that a mask does not hide: there is nothing to leave out of the others."""
    density = rowwise(bound, draws)
    return density[:, seen_rows(bound, draws).to(density.device)]


@exclusive
def sensitivity(result: Result, *, threshold: float = 0.05) -> pd.DataFrame:
    r"""How much each quantity depends on the prior and on the likelihood: power-scaling sensitivity.

    The draws are weighted as if the prior, or the likelihood, were taken to the power 0.99 and 1.01; the sensitivity is
    the distance by which the distribution of a quantity moves per unit of the base-2 logarithm of the power (Kallioinen
    et al. 2023, https://doi.org/10.1007/s11222-023-10366-5). A prior that matters as much as the likelihood and pulls
    elsewhere is a ``potential prior-data conflict``; one that matters where the likelihood does not, a ``potential
    strong prior / weak likelihood``.

    Args:
        result: A Result of ``fit`` or ``sample``. Draws of a guide are taken for those of the posterior.
        threshold: Sensitivity from which it is named.

    Returns:
        A line per quantity, with ``prior``, ``likelihood`` and ``diagnosis`` (``psense_summary`` of ArviZ).
    """
    with isolated(0), result.state():
        likelihood = rowwise(result.bound, result.draws, scaled=True)
        prior = log_joint(result.bound, result.draws) - likelihood.sum(1)
    if not np.isfinite(_numpy(prior)).all():
        raise ArithmeticError("the log density of the prior is not finite at some draws")
    return azs.psense_summary(_tree(result, likelihood, prior), threshold=threshold, round_to=6)


def _tree(result: Result, likelihood: Tensor, prior: Tensor | None = None) -> xr.DataTree:
    """The posterior of a Result with the log likelihood of its rows, and the log prior."""
    posterior = result.groups["posterior"]
    shape = posterior.sizes["chain"], posterior.sizes["draw"]
    groups = {"log_likelihood": {"data": _numpy(likelihood).reshape(*shape, -1)}}
    if prior is not None:
        groups["log_prior"] = {"prior": _numpy(prior).reshape(shape)}
    tree = azb.from_dict(groups)
    tree["posterior"] = xr.DataTree(posterior)
    return tree


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
