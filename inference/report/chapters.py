"""Sections of a page about one pair and its Results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.idata import coordinates
from inference.report import plots
from inference.report.asked import Reported, quantities
from inference.report.blocks import Block, Figure, Figures, Table, Text, cell, frame, note
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
    group = result.groups["sample_stats"]
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


def origin(result: Reported, about: Mapping[str, Any], versions: Mapping[str, str], commit: str) -> Iterator[Block]:
    """How to repeat it: the command, the seed, the versions and the commit."""
    command = about.get("command")
    if command:
        yield Text(escape(str(command)), "code")
    skipped = {"command", "title", "source"}
    rows = [[cell(str(n)), cell(str(v))] for n, v in about.items() if n not in skipped]
    rows += [[cell("commit"), cell(commit)]] if commit else []
    rows += [[cell(n), cell(v)] for n, v in versions.items()]
    attrs = result.groups.attrs
    rows += [[cell("execution"), cell(str(attrs["execution"]))]] if "execution" in attrs else []
    place = "cuda" if torch.device(result.bound.device).type == "cuda" else "cpu"
    yield Table(["", ""], [*rows, [cell("device"), cell(place)]], "What made this page")
