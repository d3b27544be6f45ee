"""The picture of a recipe's run: the learning curve of its pair, and rows that the pair makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference import write_whole
from ppl_models.ledger.recipes.trained import Shown
from ppl_models.models.pair import Pair
from ppl_models.zoo.pictures import show

POINTS = 300
"""Points of a learning curve: each is a mean of equally many steps."""


def write(shown: Shown, title: str, path: Path) -> Path:
    """Draw a run and write it as a small PNG file.

    Args:
        shown: The fit to draw.
        title: The title of the picture.
        path: The file; its folder is created.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    curve, made = figure.subplots(1, 2)
    learning_curve(curve, shown)
    with torch.no_grad(), shown.result.state():
        rows_made(made, shown.result.bound.pair, shown.rows)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, partial(figure.savefig, dpi=80))


def learning_curve(axes: Axes, shown: Shown) -> None:
    """Draw the losses per row of training, and those of validation rows after each stage."""
    losses = shown.losses
    width = max(1, len(losses) // POINTS)
    means = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
    steps = (np.arange(len(means)) + 0.5) * width
    axes.plot(steps, means, color="C0", lw=1, label="training")
    if shown.valid:
        axes.plot(*zip(*shown.valid, strict=True), "o", color="C3", ms=4, label="validation, after a stage")
        axes.legend(frameon=False, fontsize=8)
    # The first steps lie far above the others.
    late = means[len(means) // 50 :]
    low, high = (f([f(late), *(v for _, v in shown.valid)]) for f in (min, max))
    if math.isfinite(low) and math.isfinite(high) and low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss per row", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def rows_made(axes: Axes, pair: Pair, data: Mapping[str, Tensor]) -> None:
    """Draw what a pair makes: images, or points in the plane over those of the data; nothing else."""
    x = next(iter(data.values()))
    if x.dim() == 2 and x.shape[1] == 2 and hasattr(pair, "generate"):
        made = pair.generate(2000, seed=0)
        for rows, colour, label in ((x[:2000], "0.7", "data"), (made, "C3", "generated")):
            across, up = rows.cpu().numpy().T
            axes.scatter(across, up, s=3, color=colour, label=label)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
        return
    grids = pair.pictures(**data) if hasattr(pair, "pictures") else {}
    # Planes of an image stand one above the other.
    sides = {(planes * side) * side: (planes * side, side) for planes in (3, 1) for side in range(2, 65)}
    images, title = next(iter(grids.values()), (x, ""))
    if not grids or images.shape[-1] not in sides:
        axes.set_axis_off()
        return
    show(axes, images, sides[images.shape[-1]])
    axes.set_title(title, fontsize=9, loc="left")
