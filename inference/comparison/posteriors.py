r"""The plot of the posteriors of several methods, in the quantities in which they differ most."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import torch

from inference.comparison.progress import Compared
from inference.comparison.scores import draws_sd, standardised_errors
from inference.core.checks import reason_of
from inference.core.handlers import REFUSALS, isolated
from inference.core.lazy import azs
from inference.core.spacing import spaced
from inference.diagnostics.quantities import quantity as named
from inference.draws.dependence import by_plates
from inference.draws.scoring import log_joint
from inference.result import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DENSITY_DRAWS, DENSITY_NUMBERS = 200, 20_000_000
"""Draws per method whose log density is plotted, and numbers of data that these may read."""


def quantity(result: Result, name: str, index: int) -> str:
    """Name of an element of a latent site, as in the table of the posterior."""
    arrays = result.groups["posterior"].data_vars
    # A name that NetCDF does not take is written otherwise.
    array = next(v for n, v in arrays.items() if v.attrs.get("site", n) == name)
    place = tuple(map(int, np.unravel_index(index, array.shape[2:]))) if array.shape[2:] else ()
    return named(array, place)


def picks(comparison: Compared, quantities: int) -> list[tuple[str, int]]:
    """The scalar quantities in which the methods differ most, evenly divided over the sites."""
    draws = [r.draws for r in comparison.results.values()]
    names = list(dict.fromkeys(n for d in draws for n in d))
    own = {n for r in comparison.results.values() for n in by_plates(r.bound, r.draws)}
    names = [n for n in names if n not in own] or names
    ranked = []
    for name in names:
        have = [d[name] for d in draws if name in d]
        means = torch.stack([v.double().mean(0).flatten() for v in have])
        sd = torch.stack([draws_sd(v).flatten() for v in have]).amax(0).clamp_min(1e-12)
        difference = (means.amax(0) - means.amin(0)) / sd
        ranked.append([(name, int(k)) for k in difference.argsort(descending=True)[:quantities]])
    # The sites take turns, so that one with few elements leaves its places to the others.
    turns = [pick for turn in zip_longest(*ranked) for pick in turn if pick is not None]
    return sorted(turns[:quantities], key=lambda pick: names.index(pick[0]))


def posteriors(comparison: Compared, quantities: int) -> Figure:
    """The figure: a panel per quantity, and the errors of all of them where there is a truth."""
    chosen, densities = picks(comparison, quantities), log_densities(comparison)
    columns, errors, first = 4, bool(comparison.truth), int(bool(densities))
    rows = max(-(-(len(chosen) + first) // columns), 1 - errors)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 2.5 * rows + 3.2 * errors + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows + errors, columns, height_ratios=[1.0] * rows + [1.3] * errors)
    colours = {n: f"C{k}" for k, n in enumerate(comparison.results)}
    if densities:
        axes = figure.add_subplot(grid[0, 0])
        for method, values in densities.items():
            _plot_draws(axes, values, colours[method], method)
        _finish(axes, "log density of draws and data")
    for k, (name, index) in enumerate(chosen, first):
        _plot_density(figure.add_subplot(grid[k // columns, k % columns]), comparison, name, index, colours)
    if errors:
        _plot_errors(figure.add_subplot(grid[rows, :]), comparison, colours)
    seen = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    shown = sorted((n for n in seen if not n.startswith("_")), key=lambda n: not n.startswith("truth: "))
    named = {label: seen[label] for label in shown}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=6, frameon=False)
    bound = next(iter(comparison.results.values())).bound
    said = f"{bound.name}: the quantities in which the methods differ most"
    if densities:
        said += "\n(signs and labels that the data leave open may differ; the log density does not depend on them)"
    figure.suptitle(said, x=0.01, ha="left", fontsize=10)
    return figure


def log_densities(comparison: Compared) -> dict[str, np.ndarray]:
    """Log density of draws and data, of evenly spaced draws of each method that has all latent sites."""
    found = {}
    for name, result in comparison.results.items():
        count = min(DENSITY_DRAWS, DENSITY_NUMBERS // max(result.bound.numel, 1))
        if not result.draws or not count:
            continue
        at = spaced(result.size, count)
        try:
            with isolated(0), result.state():
                values = log_joint(result.bound, {n: v[at] for n, v in result.draws.items()})
        except REFUSALS as error:
            warnings.warn(f"{name}: log density not plotted: {reason_of(error)}", stacklevel=4)
            continue
        if values.isfinite().all():
            found[name] = values.double().cpu().numpy()
    return found


def _plot_density(axes: Axes, comparison: Compared, name: str, index: int, colours: Mapping[str, str]) -> None:
    if name in comparison.truth:
        mean, sd = (float(v.flatten()[index]) for v in comparison.truth[name])
        axes.axvspan(mean - sd, mean + sd, color="0.9", lw=0)
        axes.axvline(mean, color="0.3", lw=1, ls="--", label="truth: mean, ±1 sd")
    having = {method: result for method, result in comparison.results.items() if name in result.draws}
    for method, result in having.items():
        draws = result.draws[name].double().reshape(result.size, -1)[:, index].cpu().numpy()
        _plot_draws(axes, draws, colours[method], method)
    _finish(axes, quantity(next(iter(having.values())), name, index))


def _plot_draws(axes: Axes, draws: np.ndarray, colour: str, label: str) -> None:
    if np.ptp(draws) > 1e-9 * abs(draws).max():
        x, density, _ = azs.kde(draws)
        axes.plot(x, density, color=colour, lw=1.4, label=label)
    else:
        axes.axvline(draws[0], color=colour, lw=1.4, ls=":", label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)


def _plot_errors(axes: Axes, comparison: Compared, colours: Mapping[str, str]) -> None:
    rng = np.random.default_rng(0)
    axes.axhspan(-0.1, 0.1, color="0.92", lw=0)
    axes.axhline(0, color="0.5", lw=0.8)
    for k, (method, result) in enumerate(comparison.results.items()):
        errors, _ = standardised_errors(result, comparison.truth)
        axes.scatter(k + rng.uniform(-0.25, 0.25, len(errors)), errors, s=9, color=colours[method], alpha=0.7, lw=0)
    axes.set_xticks(range(len(comparison.results)), list(comparison.results))
    axes.set_ylabel("error of the mean\n(posterior sd)", fontsize=9)
    axes.set_yscale("symlog", linthresh=0.1)
    reach = max(0.2, *(abs(v) for v in axes.get_ylim()))
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if t <= reach]
    axes.set_yticks(
        [*(-t for t in reversed(ticks)), 0, *ticks], [*(f"-{t}" for t in reversed(ticks)), "0", *map(str, ticks)]
    )
    axes.set_yticks([], minor=True)
    axes.set_title("all quantities against the truth; the band is ±0.1", fontsize=9, loc="left")
