"""Leave-one-out cross-validation of one or several Results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from inference.core.lazy import azs
from inference.diagnostics.guides import PARETO_K
from inference.report import plots
from inference.report.asked import Reported, is_chains
from inference.report.blocks import Block, Cell, Figure, Figures, Table, cell, note

COLUMNS = ("method", "elpd", "se", "less than the best", "se of that", "p", "largest k", "k above 0.7")


MEANINGS = [
    ("elpd", "log predictive density of all observations, each left out in turn, in nats"),
    ("p", "effective number of parameters"),
    ("k above 0.7", "observations for which the estimate is not reliable: leave them out in fits of their own"),
]
"""What columns mean."""


@dataclass(frozen=True)
class Score:
    """The score of a method for the observations of a site.

    Attributes:
        label: Name of the method, with that of the site where there are several.
        site: Name of the site.
        elpd: Log predictive density of all observations, in nats.
        se: Its standard error.
        parameters: Effective number of parameters.
        values: Log predictive density of each observation.
        k: Pareto k of each observation.
    """

    label: str
    site: str
    elpd: float
    se: float
    parameters: float
    values: np.ndarray
    k: np.ndarray

    @property
    def bad(self) -> int:
        """Number of observations whose estimate is not reliable."""
        return int((self.k > PARETO_K[1]).sum())


def loo(results: Mapping[str, Reported]) -> Iterator[Block]:
    """Leave-one-out cross-validation by importance sampling, with its warnings."""
    scored = {
        n: r
        for n, r in results.items()
        if not r.bound.shown_rows and "log_likelihood" in r.groups and "log_likelihood" not in r.groups.attrs
    }
    yield from _reservations(results, scored)
    scores = []
    for name, result in scored.items():
        sites = [str(n) for n in result.groups["log_likelihood"].data_vars]
        for site in sites:
            label = name if len(sites) == 1 else f"{name}, {site}"
            try:
                scores.append(_score(label, result, site))
            except ValueError as error:
                # All draws of a point estimate are equal.
                yield note(f"{label}: {error or 'no estimate'}")
    if scores:
        rows = [_row(score, scores) for score in scores]
        yield Table(COLUMNS, rows, "Leave-one-out by Pareto-smoothed importance sampling", MEANINGS)
    figures = [_figure(score) for score in scores if score.bad or len(scored) == 1]
    if figures:
        yield Figures(figures)


def _reservations(results: Mapping[str, Reported], scored: Mapping[str, Reported]) -> Iterator[Block]:
    """Methods that have no score, and those whose score is off."""
    for name, result in results.items():
        if result.bound.shown_rows:
            yield note(
                f"{name}: rows are read by minibatches, and not all of them scored; score held-out rows instead."
            )
        elif name not in scored:
            why = result.groups.attrs.get("log_likelihood", "no log likelihood of observations")
            yield note(f"{name}: {why}.")
    guides = [n for n, r in scored.items() if not is_chains(r)]
    if guides:
        yield note(
            f"{', '.join(guides)}: draws of a guide are taken for those of the posterior, and the scores are off by "
            "what the guide is off; inference.loo(result) corrects them."
        )


def _score(label: str, result: Reported, site: str) -> Score:
    draws = result.groups["log_likelihood"][site].values
    if (draws == draws[:1, :1]).all():
        raise ValueError("a point estimate, whose draws are equal.")
    with warnings.catch_warnings():
        # What ArviZ warns of is in the table.
        warnings.simplefilter("ignore")
        found = azs.loo(result.groups.joined(("posterior", "log_likelihood")), var_name=site, pointwise=True)
    values, k = (np.asarray(v).ravel() for v in (found.elpd_i, found.pareto_k))
    return Score(label, site, float(found.elpd), float(found.se), float(found.p), values, k)


def _row(score: Score, scores: Sequence[Score]) -> list[Cell]:
    """A line of the table; only predictions of the same observations compare."""
    best = max((s.values for s in scores if s.site == score.site), key=np.sum)
    gap = score.values - best if len(score.values) == len(best) else np.full(1, np.nan)
    spread = float(gap.std(ddof=1)) * math.sqrt(len(gap)) if len(gap) > 1 else math.nan
    numbers = (score.elpd, score.se, float(gap.sum()), spread, score.parameters, float(score.k.max()))
    return [cell(score.label), *map(cell, numbers), cell(score.bad, "bad" if score.bad else "good")]


def _figure(score: Score) -> Figure:
    figure = plots.pareto(score.k)
    return Figure(f"{score.label}: Pareto k", figure.alt, figure.image, figure.note)
