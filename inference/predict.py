r"""Predictions from a pair or a Result: prior and posterior predictive draws, log likelihoods, classes, latent KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from inference.core.bound import BoundPair, bind
from inference.core.checks import check_count
from inference.core.handlers import REFUSALS, exclusive, isolated
from inference.core.lazy import pd, xr
from inference.diagnostics.latents import local_latent_kl
from inference.draws.engine import Draws
from inference.draws.scoring import draw_sites, log_joint, rowwise, sample_guide
from inference.idata import prior_idata
from inference.result import Result


class PriorDraws(dict[str, Tensor]):
    r"""Draws of the sites of a model from the prior, (S, \*shape) by name.

    Attributes:
        bound: The pair and its data.
    """

    def __init__(self, draws: Mapping[str, Tensor], bound: BoundPair) -> None:
        super().__init__(draws)
        self.bound = bound

    @property
    def idata(self) -> xr.DataTree:
        """The draws as ArviZ reads them: ``prior`` (latent and deterministic sites) and ``prior_predictive``.

        Sites with the name of an argument of the model are taken as predictive, as those that the data observe are;
        the latter's data are the group ``observed_data``. ``result.idata.update(prior.idata)`` adds the groups to those
        of a Result.
        """
        return prior_idata(self.bound, self)


@exclusive
def prior_predictive(
    pair: Any, data: Any = None, *, size: int | None = None, draws: int = 500, seed: int = 0
) -> PriorDraws:
    r"""Sample every site of the model from the prior.

    Args:
        pair: A pair, a ``(model, guide)`` tuple or a model.
        data: Inputs of the model. Observed sites are drawn anew.
        size: Number of rows, for a model that draws its rows without data.
        draws: Number of draws S.

    Returns:
        A dictionary with a tensor (S, \*shape of the site) for each site. Its ``idata`` has the groups ``prior``,
        ``prior_predictive`` and ``observed_data`` of ArviZ.
    """
    check_count("draws", draws)
    bound = bind(pair, data)
    if size is not None:
        check_count("size", size)
        bound = replace(bound, data={**bound.data, "size": size}, guide=None, memo={})
    with isolated(seed):
        drawn = draw_sites(bound.generator(), {}, draws)
    return PriorDraws({n: v.cpu() for n, v in drawn.items()}, bound)


@exclusive
def posterior_predictive(
    result: Result, data: Any = None, *, size: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    r"""Sample the observed sites for each posterior draw of a Result.

    Latent sites with a value per row are drawn from the guide at the new data if these hold all that the fit observed
    (a reconstruction of each row), and from the prior otherwise.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Other inputs. Default: the data of the fit; of rows that are read by minibatches those that
            ``idata.attrs["rows"]`` names. Observed sites are drawn anew.
        size: Number of rows, for a model that draws its rows without data (``data={}``).

    Returns:
        A tensor (S, \*shape of the site) for each site that the fit observed.

    Raises:
        ValueError: The data are new rows, and the chains, or a guide with a parameter per row, know the latent sites of
            the fitted rows only.
    """
    bound = result.bound if data is None else result.bound.with_data(data)
    with isolated(seed), result.state():
        draws = result.draws if data is None else _draws_at(result, data)
        sites = draw_sites(bound.generator(size), draws, result.size, result.bound.select("observed"))
    return {k: v.cpu() for k, v in sites.items()}


def _draws_at(result: Result, data: Any) -> Draws:
    """The posterior draws for other data: those of the Result, without the latent sites that have a value per row."""
    old = result.bound
    rows = {p for s in old.select("observed").values() for p in s.plates if p}
    local = {n for n, s in old.select("latent").items() if n in result.draws and rows & set(s.plates)}
    new = old.rebound(data)
    if not local or not set(old.select("observed")) <= set(new.data):
        return {n: v for n, v in result.draws.items() if n not in local}
    names = ", ".join(sorted(local))
    if "sample_stats" in result.groups:
        raise ValueError(f"data: expected the rows of the chains, which have no {names} of other rows; fit a guide")
    try:
        # One run shows whether the guide takes other rows.
        new.guided  # noqa: B018
    except REFUSALS:
        raise ValueError(
            f"data: expected the {old.rows} rows of the fit, whose guide has no {names} of other rows, got {new.rows}"
        ) from None
    return sample_guide(new, result.size)[0]


@exclusive
def pointwise_log_likelihood(result: Result, data: Any = None) -> Tensor:
    """Log density of each row under each posterior draw, all observed sites together.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Other rows. Default: the data of the fit.

    Returns:
        A tensor (S, rows).

    Raises:
        ValueError: The observed sites share no plate of rows, the rows are new and a latent site has a value for each
            row, or the rows of the fit are read by minibatches and there are no others.
    """
    bound = result.bound if data is None else result.bound.with_data(data)
    with isolated(), result.state():
        return rowwise(bound, result.draws).cpu()


@exclusive
def log_weights(result: Result, draws: int = 1000, *, seed: int = 1) -> Tensor:
    r"""Log importance weights :math:`\log p(x, z_s) - \log q(z_s)` of new draws of a fitted guide: (draws,).

    The mean of their exponentials estimates the evidence p(x). ``pareto_k`` of them tells whether to trust it.
    """
    check_count("draws", draws)
    with isolated(seed), result.state():
        values, density = sample_guide(result.bound, draws)
        return (log_joint(result.bound, values) - density).cpu()


@exclusive
def classify(result: Result, data: Any, *, label: str = "y") -> Tensor:
    r"""Class probabilities of new rows, averaged over the posterior by Bayes' rule.

    .. math:: p(y \mid x, D) \propto \mathrm{E}_{\theta \mid D}[p(x, y \mid \theta)]

    For a generative pair each draw is weighted by the likelihood of x. For a discriminative pair, whose model does not
    observe x, this is the mean of :math:`p(y \mid x, \theta)`.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Rows to classify: a mapping of names to tensors, or a tensor (``x``). Labels in it are ignored.
        label: Name of the finite site to classify by.

    Returns:
        Probabilities (rows, classes).
    """
    known = [s.name for s in result.bound.sites.values() if s.finite]
    if label not in known:
        raise ValueError(f"label: expected a finite site of the model ({', '.join(known) or 'none'}), got {label!r}")
    bound = result.bound.with_data(data)
    inputs = {k: v for k, v in bound.data.items() if k != label}
    blank = bound.with_data({**inputs, label: torch.zeros(bound.rows, dtype=torch.long)})
    with isolated(), result.state():
        states = _states(blank, label)
        labelled = (bound.with_data({**inputs, label: state.expand(bound.rows)}) for state in states)
        scores = [rowwise(rows, result.draws) for rows in labelled]
    joint = torch.stack(scores, -1).logsumexp(0) - math.log(result.size)
    return joint.softmax(-1).cpu()


def _states(bound: BoundPair, label: str) -> Tensor:
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(bound.model).get_trace(**bound.arguments())
    distribution: Any = trace.nodes[label]["fn"]
    return distribution.enumerate_support(expand=False).flatten()


@exclusive
def latent_kl(result: Result, data: Any = None, *, seed: int = 0) -> pd.DataFrame:
    r"""KL divergence from the prior of each dimension of the latent sites that have a value per row.

    Args:
        result: A Result of ``fit``.
        data: Rows, of which at most a thousand are used. Default: the data of the fit.

    Returns:
        A table with one line per dimension: ``kl``, the mean over rows in nats; ``variance``, that of the guide's mean
        over rows; ``active``, whether the variance is above 0.01 (Burda et al. 2016). Empty where no continuous site
        lies in the plate of rows, or where the guide is a point.
    """
    bound = result.bound if data is None else result.bound.rebound(data)
    with isolated(seed), result.state():
        return local_latent_kl(bound)
