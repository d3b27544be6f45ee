"""Plots of a posterior: densities, intervals, traces, ranks, energies, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from inference.core.lazy import azs, stats
from inference.report.blocks import Figure, number
from inference.report.drawing import COLOURS, FILL, INK, MUTED, RULE, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEPARATE = 4
"""Number of chains up to which each has a line of its own."""

CENTRAL = (0.055, 0.5, 0.945)
"""Quantiles of the median and of the central interval of 89 %, which is ArviZ's."""

Interval = tuple[float, float, float, float, float]
"""Quantiles 5.5 %, 25 %, 50 %, 75 % and 94.5 %."""


def interval(draws: np.ndarray) -> Interval:
    """Median and central intervals of 50 % and 89 %."""
    low, lower, middle, upper, high = map(float, np.quantile(draws, sorted((*CENTRAL, 0.25, 0.75))))
    return low, lower, middle, upper, high


def density(
    name: str, draws: Mapping[str, np.ndarray], colours: Mapping[str, str], truth: tuple[float, float] | None = None
) -> Figure:
    """Marginal densities of one quantity under several methods, over the mean and sd of the truth."""

    def draw(axes: Axes) -> None:
        if truth is not None:
            axes.axvspan(truth[0] - truth[1], truth[0] + truth[1], color=FILL, lw=0)
            axes.axvline(truth[0], color=MUTED, lw=1, ls=(0, (4, 3)))
        for method, values in draws.items():
            curve(axes, values.ravel(), colours[method])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)

    said = [f"{m}: {number(float(v.mean()))} ± {number(float(v.std()))}" for m, v in draws.items()]
    if truth is not None:
        said.append(f"truth: {number(truth[0])} ± {number(truth[1])}")
    return panel(draw, name, f"Density of {name}. {'; '.join(said)}", size=(3.3, 1.7))


def curve(axes: Axes, values: np.ndarray, colour: str, *, width: float = 1.4, alpha: float = 1.0) -> None:
    """A kernel density; a dotted line where all values are equal."""
    values = values[np.isfinite(values)]
    if len(values) and np.ptp(values) > 1e-9 * abs(values).max():
        x, y, _ = azs.kde(values)
        axes.plot(x, y, color=colour, lw=width, alpha=alpha)
    elif len(values):
        axes.axvline(values[0], color=colour, lw=width, ls=":", alpha=alpha)


def forest(
    site: str,
    lines: Sequence[tuple[str, Mapping[str, np.ndarray]]],
    colours: Mapping[str, str],
    truth: Mapping[str, float],
) -> Figure:
    """Intervals of the quantities of one site, a line each, of several methods below one another."""
    methods = list(dict.fromkeys(m for _, draws in lines for m in draws))
    pitch = max(1.0, 0.55 * len(methods))

    def draw(axes: Axes) -> None:
        for k, (name, draws) in enumerate(lines):
            for m, values in draws.items():
                at = k * pitch + (methods.index(m) - (len(methods) - 1) / 2) * 0.42
                low, lower, middle, upper, high = interval(values)
                axes.plot([low, high], [at, at], color=colours[m], lw=1.1, solid_capstyle="round")
                axes.plot([lower, upper], [at, at], color=colours[m], lw=3, solid_capstyle="round")
                axes.plot([middle], [at], "o", color=colours[m], ms=5.5, mec="none")
            if name in truth:
                reach = 0.21 * len(methods) + 0.1
                axes.plot([truth[name]] * 2, [k * pitch - reach, k * pitch + reach], color=INK, lw=1.2)
        left, right = axes.get_xlim()
        if left < 0 < right:
            axes.axvline(0, color=RULE, lw=0.8, zorder=0)
        axes.set_yticks([k * pitch for k in range(len(lines))], [short(name, site) for name, _ in lines])
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_ylim((len(lines) - 0.4) * pitch, -0.6 * pitch)

    alts = []
    for name, draws in lines[:12]:
        for m, v in draws.items():
            low, _, middle, _, high = interval(v)
            alts.append(f"{name} {m if len(methods) > 1 else ''}: {number(middle)} ({number(low)} to {number(high)})")
    alt = f"Medians and 89 % intervals of {site}. {'; '.join(alts)}"
    height = 0.55 + 0.21 * pitch * len(lines)
    return panel(draw, site, alt, size=(3.5, height))


def short(name: str, site: str) -> str:
    """A quantity without the name of its site: ``B`` for ``theta[B]``."""
    inner = name.removeprefix(site).strip("[]") or name
    return inner if len(inner) <= 32 else inner[:31] + "…"


def trace(name: str, draws: np.ndarray) -> Figure:
    """Draws over time: a line per chain, or of many chains the quantiles over chains."""
    chains, count = draws.shape

    def draw(axes: Axes) -> None:
        if chains <= SEPARATE:
            for k, values in enumerate(draws):
                axes.plot(values, color=COLOURS[k], lw=0.6, alpha=0.85, rasterized=True)
        else:
            band(axes, np.arange(count), draws, COLOURS[0])
        axes.set_xlim(0, max(count - 1, 1))
        axes.set_xlabel("draw")

    how = "a line per chain" if chains <= SEPARATE else f"median, 50 % and 90 % of {chains} chains at each draw"
    drift = float(draws[:, count // 2 :].mean() - draws[:, : max(count // 2, 1)].mean())
    alt = f"Trace of {name}, {chains} chains of {count} draws; the mean moves by {number(drift)} between the halves"
    return panel(draw, name, alt, note=how, size=(3.5, 1.9))


def band(axes: Axes, x: np.ndarray, draws: np.ndarray, colour: str) -> None:
    """Median, 50 % and 90 % of draws (many, x) along x."""
    low, lower, middle, upper, high = np.quantile(draws, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axes.fill_between(x, lower, upper, color=colour, alpha=0.3, lw=0)
    axes.plot(x, middle, color=colour, lw=0.9)


def ranks(name: str, draws: np.ndarray) -> Figure:
    """ECDF of each chain's ranks among all draws, less that of a uniform distribution."""
    chains, count = draws.shape
    uniform = (stats.rankdata(draws).reshape(draws.shape) - 0.5) / draws.size
    at = np.linspace(0, 1, 60)
    gaps = np.stack([np.searchsorted(np.sort(u), at) / count - at for u in uniform])
    # Of the chains one by one: where they disagree they have few effective draws together.
    centred = draws - draws.mean(1, keepdims=True)
    effective = float(azs.ess(centred, method="mean")) / chains if count > 3 else math.nan
    effective = max(effective, 1.0) if math.isfinite(effective) else float(count)
    z = float(stats.norm.isf(0.005 / chains))
    reach = z * np.sqrt(at * (1 - at) / min(effective, count)) * math.sqrt(1 - 1 / max(chains, 2))

    def draw(axes: Axes) -> None:
        axes.fill_between(at, -reach, reach, color=FILL, lw=0)
        axes.axhline(0, color=RULE, lw=0.8)
        for k, gap in enumerate(gaps):
            few = chains <= SEPARATE
            axes.plot(at, gap, color=COLOURS[k if few else 0], lw=1.0 if few else 0.5, alpha=0.9 if few else 0.45)
        axes.set_xlim(0, 1)
        axes.set_xlabel("rank among all draws")

    outside = int((np.abs(gaps) > reach + 1e-12).any(1).sum())
    alt = f"Rank plot of {name}: {outside} of {chains} chains leave the band"
    return panel(draw, name, alt, note=f"{outside} of {chains} chains leave the band", size=(3.5, 1.9))


def energies(energy: np.ndarray) -> Figure:
    """Marginal energy beside the changes of energy from transition to transition, and E-BFMI."""
    centred, change = (energy - energy.mean()).ravel(), np.diff(energy, axis=1).ravel()
    worst = float(bfmi(energy).min())

    def draw(axes: Axes) -> None:
        curve(axes, centred, COLOURS[0])
        curve(axes, change, COLOURS[1])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("energy")

    alt = f"Energy: sd {number(float(centred.std()))} of the energy, {number(float(change.std()))} of its changes; "
    note = f"Blue: the energy less its mean. Orange: its change per transition. Smallest E-BFMI: {number(worst)}."
    return panel(draw, "Energy", f"{alt}smallest E-BFMI {number(worst)}", note=note, size=(3.5, 1.9))


def bfmi(energy: np.ndarray) -> np.ndarray:
    """Energy Bayesian fraction of missing information of each chain (Betancourt 2016)."""
    variance = energy.var(1)
    return (np.diff(energy, axis=1) ** 2).mean(1) / np.where(variance > 0, variance, np.nan)


def losses(runs: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> list[Figure]:
    """Learning curves: the loss of each step, and its running mean; a panel per loss."""
    found = []
    for name, values in runs.items():
        columns = values if values.ndim > 1 else values[:, None]
        labels = ["guide", "model"] if columns.shape[1] == 2 else [""] * columns.shape[1]
        for label, loss in zip(labels, columns.T, strict=True):
            found.append(_loss(f"{name}{f': loss of the {label}' if label else ''}", loss, colours[name]))
    return found


def _loss(title: str, loss: np.ndarray, colour: str) -> Figure:
    width = max(1, len(loss) // 50)
    kept = np.nan_to_num(loss, nan=float("nan"), posinf=np.nan, neginf=np.nan)
    mean = np.convolve(kept, np.ones(width) / width, mode="valid")
    # The first steps are far above what matters later.
    later = kept[len(kept) // 20 :]
    low, high = (np.nanmin(later), np.nanquantile(later, 0.99)) if np.isfinite(later).any() else (0.0, 1.0)
    margin = 0.06 * (high - low) or 1.0

    def draw(axes: Axes) -> None:
        axes.plot(kept, color=colour, lw=0.5, alpha=0.35, rasterized=True)
        axes.plot(np.arange(width - 1, len(loss)) - width / 2, mean, color=colour, lw=1.4)
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(0, max(len(loss) - 1, 1))
        axes.set_xlabel("step")

    alt = f"Loss over {len(loss)} steps: {number(float(loss[0]))} at first, {number(float(mean[-1]))} at the end"
    return panel(draw, title, alt, note=f"mean of the last {width} steps: {number(float(mean[-1]))}", size=(3.5, 2.0))


def pareto(values: np.ndarray) -> Figure:
    """Pareto k of each left-out observation."""

    def draw(axes: Axes) -> None:
        bad = values > 0.7
        at = np.arange(len(values))
        axes.axhline(0.7, color=COLOURS[3], lw=0.9, ls=(0, (4, 3)))
        axes.plot(at[~bad], values[~bad], ".", color=COLOURS[0], ms=3, rasterized=True)
        axes.plot(at[bad], values[bad], "o", color=COLOURS[3], ms=3.5)
        axes.set_xlabel("observation")
        axes.set_ylabel("Pareto k")

    alt = f"Pareto k of {len(values)} observations: {int((values > 0.7).sum())} above 0.7, largest {values.max():.2f}"
    return panel(draw, "Pareto k of leave-one-out", alt, note="Above 0.7 the estimate is not reliable.")
