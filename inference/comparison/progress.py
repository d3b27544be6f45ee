r"""The plot of loss and error against time and against gradient evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from inference.comparison.scores import gradients_of, standardised_errors
from inference.result import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 40
"""Places along chains at which the error is shown."""


SMOOTHED = 50
"""The loss is averaged over one part of so many."""


class Compared(Protocol):
    """What is plotted."""

    @property
    def results(self) -> dict[str, Result]:
        """Results by method."""

    @property
    def truth(self) -> dict[str, tuple[Tensor, Tensor]]:
        """True moments by site."""


def progress(comparison: Compared) -> Figure:
    """The figure: a row for the losses of fits, one for errors where there is a truth; seconds, then gradients."""
    losses = {n: r for n, r in comparison.results.items() if len(r.losses)}
    errors = comparison.results if comparison.truth else {}
    rows = [(kind, found) for kind, found in (("loss", losses), ("error", errors)) if found]
    if not rows:
        raise ValueError("plot_progress: expected a fit, or a truth, got neither")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.1 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False)
    colours = {n: f"C{k}" for k, n in enumerate(comparison.results)}
    for axes, (kind, found) in zip(grid, rows, strict=True):
        for name, result in found.items():
            seconds, gradients, values = _loss(result) if kind == "loss" else _error(result, comparison.truth)
            for place, at in zip(axes, (seconds, gradients), strict=True):
                style = {"marker": "o", "ls": ""} if len(values) == 1 else {"lw": 1.4}
                place.plot(at, values, color=colours[name], label=name, **style)
        for place, label in zip(axes, ("seconds, with set-up", "gradient evaluations"), strict=True):
            place.set_xlabel(label, fontsize=9)
            place.set_xscale("log")
            place.set_ylabel("loss" if kind == "loss" else "largest error of a mean\n(posterior sd)", fontsize=9)
            place.tick_params(which="both", labelsize=8)
            if kind == "error":
                place.set_yscale("log")
            elif found:
                place.set_ylim(*_reach(found))
    handles = {line.get_label(): line for place in grid.ravel() for line in place.get_lines()}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False)
    return figure


def _total(result: Result) -> np.ndarray:
    return result.losses.reshape(len(result.losses), -1).sum(1)


def _reach(found: Mapping[str, Result]) -> tuple[float, float]:
    """Limits that show where the losses end: the first tenth of the steps may lie far above."""
    ends = np.concatenate([_total(r)[len(r.losses) // 10 :] for r in found.values()])
    ends = ends[np.isfinite(ends)]
    low, high = (float(v) for v in np.quantile(ends, [0.001, 0.995])) if len(ends) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _loss(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, steps, and the smoothed loss."""
    total = _total(result)
    width = max(1, len(total) // SMOOTHED)
    values = np.convolve(total, np.ones(width) / width, "valid")
    steps = np.arange(width, len(total) + 1)
    return result.seconds["setup"] + result.seconds["run"] * steps / len(total), steps, values


def _error(result: Result, truth: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, gradients, and the error of the means of the draws until then: of a fit at its end alone."""
    setup, run, gradients = result.seconds["setup"], result.seconds["run"], gradients_of(result)
    errors = abs(standardised_errors(result, truth)[0])
    if "sample_stats" not in result.groups or not len(errors):
        return np.array([setup + run]), np.array([gradients]), np.array([errors.max(initial=0.0)])
    chains, draws = (result.groups["posterior"].sizes[d] for d in ("chain", "draw"))
    places = np.unique(np.geomspace(1, draws, POINTS).astype(int))
    found = np.zeros(len(places))
    for name, (mean, sd) in truth.items():
        if name in result.draws:
            values = result.draws[name].double().reshape(chains, draws, -1).sum(0).cumsum(0).numpy()
            means = values[places - 1] / (places[:, None] * chains)
            off = np.abs(means - mean.double().flatten().numpy()) / sd.double().flatten().numpy()
            found = np.maximum(found, off.max(1))
    # Gradients and seconds of the warmup are not known one by one: draws take equal shares.
    return setup + run * places / draws, gradients * places / draws, found
