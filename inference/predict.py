r"""Ask a fitted pair."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from torch import Tensor

from inference.core.bound import BoundPair, bind
from inference.core.handlers import isolated
from inference.diagnostics.latents import local_latent_kl
from inference.draws.engine import REFUSALS, Draws
from inference.draws.scoring import draw_sites, log_joint, rowwise, sample_guide


def prior_predictive(
    pair: Any, data: Any = None, *, size: int | None = None, draws: int = 500, seed: int = 0
) -> dict[str, Tensor]:
    r"""Sample every site of the model from the prior.

    Args:
        pair: A pair, a ``(model, guide)`` tuple or a model.
        data: The model's inputs; what the model observes is drawn afresh.
        size: Number of rows, for a model that draws its rows without data.
        draws: Number of draws S.

    Returns:
        A tensor (S, \*shape of the site) for each site.
    """
    for name, value in (("size", size), ("draws", draws)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    with isolated(seed):
        return draw_sites(bind(pair, data).generator(size), {}, draws)


def posterior_predictive(result: Any, data: Any = None, *, size: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    r"""Sample the observed sites for each posterior draw of a Result.

    Latent sites of a row are drawn from the guide at other data, if these hold all that the fit observed (a replicate,
    or reconstruction, of each row), and else from the prior.

    Args:
        result: What ``fit`` or ``sample`` returned.
        data: Other inputs; the data of the fit when None. What the model observes is drawn afresh.
        size: Number of rows, for a model that draws its rows without data (``data={}``).

    Returns:
        A tensor (S, \*shape of the site) for each site that the fit observed.

    Raises:
        ValueError: The data are rows of their own and the Result is of chains, or its guide has a value for each row
            of the fit.
    """
    bound = result.bound if data is None else result.bound.with_data(data)
    with isolated(seed), result.state():
        draws = result.draws if data is None else _draws_at(result, data)
        sites = draw_sites(bound.generator(size), draws, result.size)
    observed = set(result.bound.select("observed"))
    return {k: v for k, v in sites.items() if k in observed}


def _draws_at(result: Any, data: Any) -> Draws:
    """The posterior draws for other data: a Result's own, but for latent sites of a row."""
    old = result.bound
    rows = {p for s in old.select("observed").values() for p in s.plates if p}
    local = {n for n, s in old.select("latent").items() if n in result.draws and rows & set(s.plates)}
    new = bind(old.pair, data)
    if not local or not set(old.select("observed")) <= set(new.data):
        return {n: v for n, v in result.draws.items() if n not in local}
    named = ", ".join(sorted(local))
    if "sample_stats" in result.idata.groups():
        raise ValueError(f"data: expected the rows of the chains, which know {named} of no others; fit a guide")
    try:
        # One run says whether the guide takes other rows.
        new.guided  # noqa: B018
    except REFUSALS:
        asked = f"expected the {old.rows} rows of the fit, for its guide has {named} of no others, got {new.rows}"
        raise ValueError(f"data: {asked}") from None
    return sample_guide(new, result.size)[0]


def pointwise_log_likelihood(result: Any, data: Any = None) -> Tensor:
    """Log density of each row under each posterior draw, all observed sites together.

    Args:
        result: What ``fit`` or ``sample`` returned.
        data: Other rows; the data of the fit when None.

    Returns:
        A tensor (S, rows).

    Raises:
        ValueError: The observed sites share no plate, so that rows cannot be told apart, or a
            latent site has a value per row and the rows are new.
    """
    bound = result.bound if data is None else result.bound.with_data(data)
    with isolated(), result.state():
        return rowwise(bound, result.draws)


def log_weights(result: Any, draws: int = 1000, *, seed: int = 1) -> Tensor:
    """Log importance weights of fresh draws of a fitted guide against its model: (draws,).

    Their mean in the exponential is the evidence; ``diagnostics.pareto_k`` reads how far to trust it.
    """
    with isolated(seed), result.state():
        values, density = sample_guide(result.bound, draws)
        return log_joint(result.bound, values) - density


def classify(result: Any, data: Any, *, label: str = "y") -> Tensor:
    r"""Class probabilities of new rows, averaged over the posterior by Bayes' rule.

    .. math:: p(y \mid x, D) \propto \mathrm{E}_{\theta \mid D}[p(x, y \mid \theta)]

    For a generative pair this weighs each draw by how well it explains x; for a discriminative one, whose
    model does not observe x, it is the mean of :math:`p(y \mid x, \theta)`.

    Args:
        result: What ``fit`` or ``sample`` returned.
        data: The rows to classify: a mapping of names to tensors, or a tensor (``x``). Labels in it are ignored.
        label: Name of the finite site to classify by.

    Returns:
        Probabilities (rows, classes).
    """
    bound: BoundPair = result.bound.with_data(data)
    given = {k: v for k, v in bound.data.items() if k != label}
    rows = bound.rows
    blank = bound.with_data({**given, label: torch.zeros(rows, dtype=torch.long)})
    with isolated(), result.state():
        states = _states(blank, label)
        scores = [rowwise(bound.with_data({**given, label: state.expand(rows)}), result.draws) for state in states]
    joint = torch.stack(scores, -1).logsumexp(0) - math.log(result.size)
    return joint.softmax(-1)


def _states(bound: BoundPair, label: str) -> Tensor:
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(bound.model).get_trace(**bound.arguments())
    site = bound.sites.get(label)
    if site is None or not site.finite:
        finite = ", ".join(s.name for s in bound.sites.values() if s.finite) or "none"
        raise ValueError(f"label: expected a finite site of the model ({finite}), got {label!r}")
    distribution: Any = trace.nodes[label]["fn"]
    return distribution.enumerate_support(expand=False).flatten()


def latent_kl(result: Any, data: Any = None, *, seed: int = 0) -> pd.DataFrame:
    r"""What each dimension of a Result's latent sites says of the rows of data.

    Args:
        result: What ``fit`` returned, of a pair with continuous latent sites in its plate of rows.
        data: Rows to look at, a thousand at most; those of the fit when None.

    Returns:
        One row a dimension: ``kl``, its mean divergence from the prior in nats a row; ``variance`` of the guide's mean
        over the rows; ``active``, whether that is above 0.01 (Burda et al. 2016). Empty where no site lies in a
        plate of rows, or where the guide is a point.
    """
    bound = result.bound if data is None else bind(result.bound.pair, data)
    with isolated(seed), result.state():
        return local_latent_kl(bound)
