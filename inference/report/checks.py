"""Predictive checks: replicated data beside the observed, from the prior and from the posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference.core.handlers import isolated
from inference.core.spacing import spaced
from inference.draws.scoring import draw_sites
from inference.idata import seen_of
from inference.report.asked import Reported
from inference.report.blocks import Block, Cell, Figure, Figures, Table, cell, note, number
from inference.report.drawing import COLOURS, INK, image, panel
from inference.report.plots import CENTRAL, curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPLICAS, NUMBERS, STATES = 50, 4_000_000, 20
"""Replicated data sets that are drawn, numbers that they may have, and states up to which values are counted."""

STATISTICS: Mapping[str, Callable[[np.ndarray], float]] = {
    "mean": lambda v: float(np.nanmean(v)),
    "standard deviation": lambda v: float(np.nanstd(v)),
    "smallest": lambda v: float(np.nanmin(v)),
    "largest": lambda v: float(np.nanmax(v)),
}
"""Test statistics of a data set."""


def replicas(result: Reported, *, prior: bool) -> dict[str, np.ndarray]:
    """Replicated data (replicas, ...) of each observed site, and of each site that a pair generates."""
    bound = result.bound
    names = [*bound.select("observed"), *bound.generated]
    numbers = sum(torch.Size(bound.sites[n].shape).numel() for n in names)
    count = max(2, min(REPLICAS, NUMBERS // max(numbers, 1)))
    if not names:
        return {}
    if not prior and "posterior_predictive" in result.groups and not bound.generated:
        group = result.groups["posterior_predictive"]
        # A name may be written otherwise for NetCDF; the order is that of the sites.
        arrays = [v.values.reshape(-1, *v.shape[2:]) for v in group.data_vars.values()]
        at = spaced(len(arrays[0]), count).numpy()
        return {n: v[at] for n, v in zip(names, arrays, strict=True)}
    size = len(next(iter(result.draws.values()))) if result.draws else 1
    given = {} if prior else {n: v[spaced(size, count)] for n, v in result.draws.items()}
    with isolated(0), result.state():
        drawn = draw_sites(bound.generator(), given, min(size, count) if given else count)
    return {n: drawn[n].cpu().numpy() for n in names}


def checks(result: Reported) -> list[Block]:
    """Prior and posterior predictive checks of each observed site."""
    found: list[Block] = []
    figures: list[Figure] = []
    rows: list[list[Cell]] = []
    titles = {True: "prior predictive", False: "posterior predictive"}
    generated, seen = not result.draws, _seen(result)
    for prior in (False,) if generated else (True, False):
        title = "generated" if generated else titles[prior]
        for name, drawn in replicas(result, prior=prior).items():
            values = result.bound.data[name] if name in result.bound.generated else result.bound.observations[name]
            observed, replicated = values.detach().cpu().double().numpy(), drawn.astype(float)
            if name in seen:
                observed, replicated = observed[seen[name]], replicated[:, seen[name]]
            figures.append(compared(f"{name}: {title}", observed, replicated))
            rows += [] if prior else _statistics(name, observed, replicated)
    if not figures:
        return [note("The model observes nothing that could be replicated.")]
    shown = result.bound.shown_rows
    rows_of = f"in the same rows, {shown}" if shown else "as many rows as there are"
    hidden = " What masks hide is left out." if seen else ""
    found.append(note(f"Black: the data. Blue: data that the model draws, {rows_of}.{hidden}"))
    found.append(Figures(figures))
    found.append(
        Table(
            ["site", "statistic", "observed", "replicated", "89 % from", "89 % to", "p"],
            rows,
            "Statistics of the data among those of replicated data",
            [("p", "fraction of replicated data sets with a larger value; near 0 or 1 the model does not explain it")],
        )
    )
    return found


def _seen(result: Reported) -> dict[str, np.ndarray]:
    r"""Whether each entry (\*plates) of a site is observed, of sites of which masks hide a part."""
    with isolated(0), result.state():
        seen = {n: v.cpu().numpy() for n, v in seen_of(result.bound, result.draws).items()}
    return {n: v for n, v in seen.items() if v.any() and not v.all()}


def compared(title: str, observed: np.ndarray, drawn: np.ndarray) -> Figure:
    """Distribution of all values of the data, and of each replicated data set."""
    flat, replicated = observed.ravel(), drawn.reshape(len(drawn), -1)
    flat = flat[np.isfinite(flat)]
    states = np.unique(flat)
    whole = len(states) <= STATES and bool((flat == flat.round()).all() and (replicated == replicated.round()).all())
    low, high = (float(v) for v in np.nanquantile(replicated, (0.05, 0.95)))
    alt = (
        f"{title}: observed mean {number(float(flat.mean()))}, sd {number(float(flat.std()))}; replicated mean "
        f"{number(float(np.nanmean(replicated)))}, central 90 % from {number(low)} to {number(high)}"
    )
    draw = _counted(states, flat, replicated) if whole else _smooth(flat, replicated, (low, high))
    return panel(draw, title, alt)


def _counted(states: np.ndarray, flat: np.ndarray, replicated: np.ndarray) -> Callable[[Axes], None]:
    everything = np.union1d(states, np.unique(replicated)[:STATES])[: 2 * STATES]
    share = np.stack([(replicated == s).mean(1) for s in everything], 1)
    low, middle, high = np.quantile(share, CENTRAL, axis=0)

    def draw(axes: Axes) -> None:
        axes.bar(everything, [(flat == s).mean() for s in everything], width=0.7, color=INK, alpha=0.18, lw=0)
        axes.vlines(everything, low, high, color=COLOURS[0], lw=2)
        axes.plot(everything, middle, "o", color=COLOURS[0], ms=4, mec="none")
        axes.set_xlim(everything[0] - 0.7, everything[-1] + 0.7)
        axes.set_ylim(0)
        if len(everything) <= 10:
            axes.set_xticks(everything)

    return draw


def _smooth(flat: np.ndarray, replicated: np.ndarray, middle: tuple[float, float]) -> Callable[[Axes], None]:
    low, high = min(middle[0], flat.min()), max(middle[1], flat.max())
    margin = 0.05 * (high - low)

    def draw(axes: Axes) -> None:
        for values in replicated:
            inside = values[(values > low - margin) & (values < high + margin)]
            curve(axes, inside, COLOURS[0], width=0.6, alpha=0.35)
        curve(axes, flat, INK, width=1.5)
        tops = [float(np.max(line.get_ydata())) for line in axes.lines if len(line.get_xdata()) > 2]  # type: ignore[arg-type]
        if tops:
            # A replica that is nearly constant has a peak that would flatten all others.
            axes.set_ylim(0, 1.15 * max(float(np.quantile(tops, 0.8)), tops[-1]))
        axes.set_xlim(low - margin, high + margin)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)

    return draw


def _statistics(name: str, observed: np.ndarray, drawn: np.ndarray) -> list[list[Cell]]:
    rows = []
    for what, statistic in STATISTICS.items():
        of_data, of_replicas = statistic(observed), np.array([statistic(v) for v in drawn])
        # Replicas that are equal to the data count half.
        p = float((of_replicas > of_data).mean() + 0.5 * (of_replicas == of_data).mean())
        low, middle, high = np.quantile(of_replicas, CENTRAL)
        mark = "bad" if min(p, 1 - p) < 0.01 else ""
        rows.append([cell(name), cell(what), *map(cell, (of_data, middle, low, high)), Cell(f"{p:.2f}", p, mark)])
    return rows


def pictures(result: Reported, shape: tuple[int, int] | None) -> list[Block]:
    """Grids of images that a pair generates or reconstructs; rows in the plane as points."""
    bound = result.bound
    found: list[Block] = []
    with isolated(0), result.state():
        drawn = bound.asked.pictures(**bound.data) if bound.asked.pictures is not None else {}
    for grid, title in drawn.values():
        pixels = grid.shape[-1]
        side = round(pixels**0.5)
        height, width = shape or (side, side)
        if height * width == pixels:
            found.append(_sheet(grid.detach().cpu().clamp(0, 1), title, height, width))
    planes = [n for n in bound.generated if bound.data[n].dim() == 2 and bound.data[n].shape[1] == 2]
    return found + ([] if not planes else [_plane(result, n) for n in planes])


def _sheet(grid: Any, title: str, height: int, width: int) -> Figure:
    rows, columns, _ = grid.shape
    tiles = torch.nn.functional.pad(grid.reshape(rows, columns, height, width), (1, 1, 1, 1))
    sheet = tiles.permute(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2))
    scale = max(1, round(900 / sheet.shape[1]))
    alt = f"{title[0].upper()}{title[1:]}: {rows} lines of {columns} images of {height} x {width} pixels"
    return image(1 - sheet.numpy(), title[0].upper() + title[1:], alt, scale=scale)


def _plane(result: Reported, name: str) -> Figure:
    real = result.bound.data[name].cpu().numpy()[:1000]
    made = replicas(result, prior=True)[name][0][:1000]

    def draw(axes: Axes) -> None:
        axes.plot(*real.T, ".", color=INK, alpha=0.35, ms=2.5, rasterized=True)
        axes.plot(*made.T, ".", color=COLOURS[0], alpha=0.6, ms=2.5, rasterized=True)
        axes.set_aspect("equal")

    alt = f"Rows of {name} in the plane: data around {real.mean(0).round(2)}, generated around {made.mean(0).round(2)}"
    return panel(draw, f"{name} in the plane", alt, note="Black: data. Blue: generated.", size=(4.5, 3.6))
