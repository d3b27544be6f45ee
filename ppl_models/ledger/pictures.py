"""The picture of a recipe's run: the learning curve of its pair, and rows that the pair makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference import write_whole
from ppl_models.ledger.recipes.trained import Judged, Shown
from ppl_models.models.pair import Pair
from ppl_models.zoo.pictures import show

POINTS = 300
"""Points of a learning curve: each is a mean of equally many steps."""


def write(shown: Shown | Judged, title: str, path: Path) -> Path:
    """Draw a run and write it as a small PNG file.

    Args:
        shown: The fit to draw, or the cases that were judged.
        title: The title of the picture.
        path: The file; its folder is created.
    """
    figure = judgements(shown) if isinstance(shown, Judged) else fitting(shown)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, partial(figure.savefig, dpi=80))


def fitting(shown: Shown) -> Figure:
    """The learning curve of a fit, and the rows that its pair makes."""
    with torch.no_grad(), shown.result.state():
        draw = rows_made(shown.result.bound.pair, shown.rows, shown.points)
    figure = Figure(figsize=(8 if draw else 4.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if draw else 1, squeeze=False)[0]
    learning_curve(panels[0], shown)
    if draw:
        draw(panels[1])
    return figure


def judgements(judged: Judged) -> Figure:
    """The figures of each case, a panel per measure, with a line at the limit; what is beyond it is red.

    An arrow at twice the limit stands for what is not finite.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, len(judged.figures), sharey=True, squeeze=False)[0]
    for axes, (measure, cases) in zip(panels, judged.figures.items(), strict=True):
        limit = judged.limits[measure]
        for row, value in enumerate(cases.values()):
            at, marker = (value, "o") if math.isfinite(value) else (2 * limit, ">")
            axes.scatter(at, row, color="C0" if value < limit else "C3", marker=marker, s=25, zorder=3)
        axes.axvline(limit, color="0.4", lw=1, ls="--")
        axes.set_xlabel(f"{measure}, limit {limit:g}", fontsize=9)
        axes.set_yticks(range(len(cases)), [name.split("-")[0] for name in cases], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure


def learning_curve(axes: Axes, shown: Shown) -> None:
    """Draw the losses per row of training, of both players of a game, and those of validation rows after each stage."""
    losses = shown.losses.reshape(len(shown.losses), -1)
    width = max(1, len(losses) // POINTS)
    means = losses[: len(losses) // width * width].reshape(-1, width, losses.shape[1]).mean(1)
    steps = (np.arange(len(means)) + 0.5) * width
    names = ("training",) if losses.shape[1] == 1 else ("guide", "model")
    for k, (name, column) in enumerate(zip(names, means.T, strict=True)):
        axes.plot(steps, column, color=f"C{k}", lw=1, label=name)
    if shown.valid:
        axes.plot(*zip(*shown.valid, strict=True), "o", color="C3", ms=4, label="validation, after a stage")
    if shown.valid or len(names) > 1:
        axes.legend(frameon=False, fontsize=8)
    # The first steps lie far above the others.
    late = means[len(means) // 50 :].ravel()
    low, high = (f([f(late), *(v for _, v in shown.valid)]) for f in (min, max))
    if math.isfinite(low) and math.isfinite(high) and low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("step", fontsize=9)
    axes.locator_params(axis="x", nbins=5)
    axes.set_ylabel("loss per row", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def rows_made(
    pair: Pair, data: Mapping[str, Tensor], points: Sequence[tuple[Tensor, str]] = ()
) -> Callable[[Axes], None] | None:
    """What draws the rows that a pair makes: as images, or as points in the plane over those of the data.

    Args:
        pair: The pair.
        data: The data by name.
        points: Points (N, 2) to draw in their place, and what they are.

    Returns:
        A function of axes; None where there is nothing that could be drawn.
    """
    x = next(iter(data.values()))
    if not points and x.dim() == 2 and x.shape[1] == 2 and hasattr(pair, "generate"):
        points = ((x[:2000], "data"), (pair.generate(2000, seed=0), "generated"))
        return partial(_scatter, points=points, aspect="equal")
    if points:
        return partial(_scatter, points=points, labels=("first parameter", "second parameter"))
    grids = pair.pictures(**data) if hasattr(pair, "pictures") else {}
    # Planes of an image stand one above the other.
    sides = {(planes * side) * side: (planes * side, side) for planes in (3, 1) for side in range(2, 65)}
    images, title = next(iter(grids.values()), (x, ""))
    if not grids or images.shape[-1] not in sides:
        return None

    def draw(axes: Axes) -> None:
        show(axes, images, sides[images.shape[-1]])
        axes.set_title(title, fontsize=9, loc="left")

    return draw


def _scatter(
    axes: Axes,
    points: Sequence[tuple[Tensor, str]],
    labels: tuple[str, str] = ("", ""),
    aspect: Literal["auto", "equal"] = "auto",
) -> None:
    """Draw two sets of points, the second over the first, so that both are seen."""
    for (rows, label), colour, size in zip(points, ("0.6", "C3"), (10, 2), strict=True):
        across, up = rows.cpu().numpy().T
        axes.scatter(across, up, s=size, color=colour, label=label, linewidths=0)
    axes.set_aspect(aspect)
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, markerscale=2)
