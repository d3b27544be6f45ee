"""Sections of a page about one pair and its Results."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.lazy import azs, pd
from inference.idata import coordinates
from inference.report import plots
from inference.report.asked import Reported, is_chains, quantities
from inference.report.blocks import Block, Cell, Figure, Figures, Table, Text, cell, frame, note
from inference.report.drawing import COLOURS
from inference.report.graph import MOST, graph
from inference.report.story import story

LINES, BRIEF, FOREST, TRACED = 200, 12, 16, 3
"""Lines of a table of quantities, in brief too, quantities of a site in a plot of intervals, and those with a trace."""

SUMMARY = {
    "mean": "posterior mean",
    "sd": "posterior standard deviation",
    "eti89_lb": "lower end of the central interval of 89 %",
    "eti89_ub": "its upper end",
    "mcse_mean": "Monte Carlo standard error of the mean",
    "ess_bulk": "effective sample size of the bulk",
    "ess_tail": "effective sample size of the tails",
    "r_hat": "R-hat: agreement of the chains, 1 at best",
}


def model(bound: BoundPair) -> Iterator[Block]:
    """The story of the pair, its graph and its sites."""
    yield from story(bound.pair)
    try:
        drawn = graph(bound)
    except Exception as error:
        # Sites whose dependences cannot be followed; the table has them all the same.
        drawn = None
        yield note(f"The graph cannot be drawn: {reason_of(error)}.")
    if drawn is not None:
        yield drawn
    elif len(bound.sites) > MOST:
        yield note(f"The model has {len(bound.sites)} sites, which are too many for a drawing.")
    with_names = [
        [cell(s.name), cell(s.role), cell(shape_of(s.shape)), cell(", ".join(p for p in s.plates if p) or "–")]
        for s in bound.sites.values()
    ]
    yield Table(["site", "role", "shape", "plates"], with_names, "Sites of the model")


def shape_of(shape: Any) -> str:
    """A shape as text: ``30 × 13``; ``scalar`` without dimensions."""
    return " × ".join(f"{n:,}" for n in shape) or "scalar"


def data(bound: BoundPair) -> Iterator[Block]:
    """What each tensor of the data holds."""
    rows = []
    for name, value in bound.data.items():
        if not isinstance(value, Tensor):
            rows.append([cell(name), cell(type(value).__name__), cell("–"), *[cell(math.nan)] * 5])
            continue
        numbers = value.detach().cpu().double().flatten()
        known = numbers[~numbers.isnan()]
        figures = [float(v) for v in (known.mean(), known.std(), known.min(), known.max())] if len(known) > 1 else []
        # Standardised columns have a mean of 1e-17 by rounding.
        figures = [0.0 if abs(v) < 1e-12 * float(known.abs().max()) else v for v in figures] or [math.nan] * 4
        kind = str(value.dtype).removeprefix("torch.")
        missing = int(numbers.isnan().sum())
        rows.append([cell(name), cell(kind), cell(shape_of(value.shape)), *map(cell, figures), cell(missing)])
    if not rows:
        yield note("The model takes no data.")
        return
    if bound.shown_rows:
        yield note(f"Rows are read by minibatches. What is shown here is of those in memory: {bound.shown_rows}.")
    yield Table(
        ["name", "type", "shape", "mean", "sd", "smallest", "largest", "missing"], rows, "What the model was given"
    )
    for name, labels in coordinates(bound).items():
        shown = ", ".join(map(str, list(labels)[:12])) + (f", … ({len(labels)} in all)" if len(labels) > 12 else "")
        yield note(f"{name}: {shown}")


def diagnosis(result: Reported) -> Iterator[Block]:
    """What the diagnostics say, what they mean and what to do."""
    found = result.diagnosis
    for sentence in found.advice:
        yield note(sentence, "advice")
    for what in found.unjudged:
        yield note(f"Not judged: {what}.", "advice")
    rows = _chain_rows(result) if is_chains(result) else _guide_rows(result)
    if not found.advice and not found.unjudged:
        yield note("No warning: every check below passes." if rows else "No warning.", "fine")
    if not rows:
        yield note("There is no posterior to judge: see the samples, and the measures of held-out rows.")
    else:
        yield Table(["check", "value", "wanted", "what it means", "what to do if it fails"], rows, prose=True)
    if found.latent_kl is not None:
        table = found.latent_kl.head(LINES)
        meanings = [("kl", "nats per row of the guide from the prior"), ("active", "variance of its mean above 0.01")]
        yield frame(table, caption="Information in each dimension of the latent sites", meanings=meanings)


def _row(name: str, value: float, wanted: str, good: bool | None, means: str, remedy: str) -> list[Cell]:
    return [cell(name), cell(value, {True: "good", False: "bad", None: ""}[good]), *map(cell, (wanted, means, remedy))]


def _chain_rows(result: Reported) -> list[list[Cell]]:
    found, group = result.diagnosis, result.idata["sample_stats"].to_dataset()
    chains, draws = group.sizes["chain"], group.sizes["draw"]
    table, wanted = found.table, 100 * min(chains, 4)
    rows = []
    if not math.isnan(found.worst_r_hat):
        rows.append(
            _row(
                "R-hat",
                found.worst_r_hat,
                "about 1.01" if chains <= 4 else "about 1.01, more for many short chains",
                found.converged,
                "Spread of all draws over the spread within chains, of the worst quantity: whether the chains agree.",
                "A longer warmup and more draws; look for several modes.",
            )
        )
    for name, means in (
        ("ess_bulk", "Independent draws that would tell the centre of the worst quantity as well."),
        ("ess_tail", "The same for its 5 % and 95 % quantiles."),
    ):
        moving = table.loc[table["sd"] != 0, name].dropna() if name in table else pd.Series(dtype=float)
        if len(moving):
            least = float(moving.min())
            title = "Effective sample size" + (", tails" if name == "ess_tail" else "")
            remedy = "More draws; reparameterise correlated sites."
            rows.append(_row(title, least, f"{wanted} or more", least >= wanted, means, remedy))
    if found.divergences is not None:
        rows.append(
            _row(
                "Divergent transitions",
                found.divergences,
                f"0 of {chains * draws:,}",
                found.divergences == 0,
                "Trajectories that left the region where the integrator is exact: parts of the posterior are missed.",
                "Raise target_accept_prob; use a non-centred parameterisation.",
            )
        )
    if "energy" in group:
        worst = float(np.nanmin(plots.bfmi(group["energy"].values)))
        rows.append(
            _row(
                "E-BFMI",
                worst,
                "0.3 or more",
                worst >= 0.3,
                "How much of the energy's spread one new momentum covers, of the worst chain.",
                "Reparameterise heavy tails and funnels.",
            )
        )
    if "acceptance_rate" in group:
        rate = float(group["acceptance_rate"].mean())
        means = "Mean acceptance of proposals."
        rows.append(_row("Acceptance", rate, "0.6 to 0.95", None, means, "A longer warmup, if it is far outside."))
    return rows


def _guide_rows(result: Reported) -> list[list[Cell]]:
    found, rows = result.diagnosis, []
    if found.pareto_k is not None:
        rows.append(
            _row(
                "Pareto k",
                found.pareto_k,
                "0.7 or less",
                found.pareto_k <= 0.7,
                "Tail of the importance weights of the guide's draws: how far the guide is from the posterior.",
                "A richer guide (AutoMultivariateNormal, a flow), or sample().",
            )
        )
    if found.effective is not None:
        rows.append(
            _row(
                "Effective share of weights",
                found.effective,
                "near 1",
                None,
                "Share of the draws that would be left after weighting them to the posterior.",
                "A richer guide; compare the weighted moments.",
            )
        )
    return rows


def posterior(result: Reported, *, brief: bool = False) -> Iterator[Block]:
    """The table of quantities, and their intervals; in brief the first lines of the table alone."""
    if result.diagnosis.table.empty:
        yield note("The method learns a model, and no posterior.")
        return
    table = result.summary()
    lines = BRIEF if brief else LINES
    if not brief:
        yield Figures(forests({"": quantities(result)}, {"": COLOURS[0]}, {}))
    shown = table.head(lines)
    left = f" (the first {lines} of {len(table):,})" if len(table) > lines else ""
    meanings = [(n, m) for n, m in SUMMARY.items() if n in table]
    yield frame(shown.rename_axis("quantity"), caption=f"Posterior of each quantity{left}", meanings=meanings)


def forests(
    draws: Mapping[str, Mapping[str, np.ndarray]], colours: Mapping[str, str], truth: Mapping[str, float]
) -> list[Figure]:
    """Intervals by site, of several methods."""
    names = list(dict.fromkeys(n for own in draws.values() for n in own))
    sites: dict[str, list[str]] = {}
    for name in names:
        sites.setdefault(name.partition("[")[0], []).append(name)
    scalars = [n for n, members in sites.items() if members == [n]]
    found = []
    for site, members in sites.items():
        if site in scalars and len(scalars) < len(sites) and len(scalars) > 8:
            continue
        lines = [(n, {m: own[n] for m, own in draws.items() if n in own}) for n in members[:FOREST]]
        figure = plots.forest(site, lines, colours, truth)
        more = len(members) - FOREST
        found.append(
            figure
            if more <= 0
            else Figure(f"{site} (the first {FOREST} of {len(members):,})", figure.alt, figure.image)
        )
    return found[:12]


def chains(result: Reported) -> Iterator[Block]:
    """Traces and ranks of the quantities that mix worst, and the energies."""
    draws, table = quantities(result), result.diagnosis.table
    order = [n for n in table["r_hat"].sort_values(ascending=False, na_position="last").index if n in draws]
    group = result.idata["sample_stats"].to_dataset()
    size = f"{group.sizes['chain']} chains of {group.sizes['draw']} draws"
    yield note(
        f"{size}; the quantities of the largest R-hat. Traces of chains that agree look alike and go nowhere; lines of "
        "a rank plot within the band are those of chains that draw from one distribution."
    )
    found = []
    for name in order[:TRACED]:
        found += [plots.trace(f"{name}: trace", draws[name]), plots.ranks(f"{name}: ranks", draws[name])]
    if "energy" in group:
        found.append(plots.energies(group["energy"].values))
    yield Figures(found)


def learning(results: Mapping[str, Reported], colours: Mapping[str, str]) -> Iterator[Block]:
    """Learning curves of the methods that took steps."""
    runs = {name: result.losses for name, result in results.items() if len(result.losses) > 1}
    yield note("The loss of each step, and its running mean; the first twentieth may lie outside of the plot.")
    yield Figures(plots.losses(runs, colours))


def loo(results: Mapping[str, Reported]) -> Iterator[Block]:
    """Leave-one-out cross-validation by importance sampling, with its warnings."""
    whole = {n: r for n, r in results.items() if not r.bound.shown_rows}
    scored = {n: r for n, r in whole.items() if "log_likelihood" in r.idata.children}
    for name, result in results.items():
        if name not in whole:
            yield note(
                f"{name}: rows are read by minibatches, and not all of them scored; score held-out rows instead."
            )
        elif name not in scored:
            why = result.idata.attrs.get("log_likelihood", "no log likelihood of observations")
            yield note(f"{name}: {why}.")
    guides = [n for n, r in scored.items() if not is_chains(r)]
    if guides:
        yield note(
            f"{', '.join(guides)}: draws of a guide are taken for those of the posterior, and the scores are off by "
            "what the guide is off; inference.loo(result) corrects them."
        )
    found: list[tuple[str, np.ndarray]] = []
    rows, figures = [], []
    for name, result in scored.items():
        sites = [str(n) for n in result.idata["log_likelihood"].data_vars]
        for site in sites:
            label = name if len(sites) == 1 else f"{name}, {site}"
            try:
                score = _loo(result, site)
            except ValueError as error:
                # All draws of a point estimate are equal.
                yield note(f"{label}: {error or 'no estimate'}")
                continue
            k = np.asarray(score.pareto_k).ravel()
            bad = int((k > 0.7).sum())
            found.append((site, np.asarray(score.elpd_i).ravel()))
            figures += [_titled(plots.pareto(k), label)] if bad or len(scored) == 1 else []
            numbers = (float(score.elpd), float(score.se), float(score.p), float(k.max()))
            rows.append([cell(label), *map(cell, numbers), cell(bad, "bad" if bad else "good")])
    if not rows:
        return
    for row, (site, values) in zip(rows, found, strict=True):
        # Only predictions of the same observations compare.
        best = max((v for other, v in found if other == site), key=np.sum)
        gap = values - best if len(values) == len(best) else np.full(1, np.nan)
        spread = float(gap.std(ddof=1)) * math.sqrt(len(gap)) if len(gap) > 1 else math.nan
        row[3:3] = [cell(float(gap.sum())), cell(spread)]
    columns = ["method", "elpd", "se", "less than the best", "se of that", "p", "largest k", "k above 0.7"]
    meanings = [
        ("elpd", "log predictive density of all observations, each left out in turn, in nats"),
        ("p", "effective number of parameters"),
        ("k above 0.7", "observations for which the estimate is not reliable: leave them out in fits of their own"),
    ]
    yield Table(columns, rows, "Leave-one-out by Pareto-smoothed importance sampling", meanings)
    if figures:
        yield Figures(figures)


def _loo(result: Reported, site: str) -> Any:
    draws = result.idata["log_likelihood"].to_dataset()[site].values
    if (draws == draws[:1, :1]).all():
        raise ValueError("a point estimate, whose draws are equal.")
    with warnings.catch_warnings():
        # What ArviZ warns of is in the table.
        warnings.simplefilter("ignore")
        return azs.loo(result.idata, var_name=site, pointwise=True)


def _titled(figure: Figure, title: str) -> Figure:
    return Figure(f"{title}: Pareto k", figure.alt, figure.image, figure.note)


def origin(result: Reported, about: Mapping[str, Any], versions: Mapping[str, str], commit: str) -> Iterator[Block]:
    """How to repeat it: the command, the seed, the versions and the commit."""
    command = about.get("command")
    if command:
        yield Text(escape(str(command)), "code")
    skipped = {"command", "title", "source"}
    rows = [[cell(str(n)), cell(str(v))] for n, v in about.items() if n not in skipped]
    rows += [[cell("commit"), cell(commit)]] if commit else []
    rows += [[cell(n), cell(v)] for n, v in versions.items()]
    attrs = result.idata.attrs
    rows += [[cell("execution"), cell(str(attrs["execution"]))]] if "execution" in attrs else []
    place = "cuda" if torch.device(result.bound.device).type == "cuda" else "cpu"
    yield Table(["", ""], [*rows, [cell("device"), cell(place)]], "What made this page")
