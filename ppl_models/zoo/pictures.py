"""Figures of fitted pairs: grids of images, and rows and densities in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference import write_whole
from ppl_models.models.pair import Pair
from ppl_models.models.parts.grids import Grid


def trajectories(pair: Any, x: Tensor, *, count: int = 60, seed: int = 0) -> Figure:
    """Paths of a diffusion chain in the plane from noise to rows: with its noise, and by deterministic steps."""
    if pair.features != 2:
        raise ValueError(f"features: expected 2 for paths in the plane, got {pair.features}")
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(count, 2, generator=random).to(pair.origin)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    paths = {"the chain": None, f"{pair.steps} deterministic steps": pair.steps}
    for axes, (title, steps) in zip(figure.subplots(1, 2), paths.items(), strict=True):
        passed = torch.stack([pair.unscaled(z) for z in (start, *pair.denoise_steps(start, random, steps=steps))]).cpu()
        axes.scatter(*x[:2000].cpu().T, s=2, color="0.75", label="data")
        axes.plot(passed[..., 0].numpy(), passed[..., 1].numpy(), color="C0", lw=0.5, alpha=0.6)
        for rows, colour, label in ((passed[0], "C1", "noise"), (passed[-1], "C3", "drawn")):
            axes.scatter(rows[:, 0].numpy(), rows[:, 1].numpy(), s=8, color=colour, label=label, zorder=3)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xticks=[], yticks=[], aspect="equal")
    axes.legend(frameon=False, fontsize=8)
    return figure


def odds(axes: Axes, pair: Any, x: Tensor, *, count: int = 500, seed: int = 0) -> Any:
    """Probability in the plane that the discriminator of a GAN gives to a row being real, under data and samples.

    Returns:
        The filled contours, for a colour bar.
    """
    if pair.features != 2 or pair.pack != 1:
        raise ValueError(f"pair: expected 2 features and no packs, got {pair.features} and packs of {pair.pack}")
    generated, real = pair.generate(count, seed=seed).cpu(), x[:count].cpu()
    low, high = real.amin(0), real.amax(0)
    margin = 0.3 * (high - low)
    sides = [torch.linspace(float(a), float(b), 120) for a, b in zip(low - margin, high + margin, strict=True)]
    with torch.no_grad():
        chance = pair.discriminate(torch.cartesian_prod(*sides).to(pair.origin)).probs.cpu().reshape(120, 120).T
    filled = axes.contourf(*(s.numpy() for s in sides), chance.numpy(), levels=np.linspace(0, 1, 21), cmap="PuOr")
    for rows, colour, label in ((real, "black", "data"), (generated, "tab:green", "generated")):
        axes.scatter(rows[:, 0].numpy(), rows[:, 1].numpy(), s=4, color=colour, label=label)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=sides[0][[0, -1]].tolist(), ylim=sides[1][[0, -1]].tolist())
    return filled


def show(axes: Axes, images: Tensor, shape: tuple[int, int]) -> None:
    """Draw a grid of images in axes, ink on white.

    Args:
        axes: Axes, whose ticks are removed.
        images: Images (rows, columns, height * width) in [0, 1].
        shape: Height and width of an image, in pixels.

    Raises:
        ValueError: The images have another number of pixels.
    """
    rows, columns, pixels = images.shape
    height, width = shape
    if pixels != height * width:
        raise ValueError(f"shape: expected {pixels} pixels, got {height} x {width}")
    tiles = images.detach().cpu().clamp(0, 1).reshape(rows, columns, height, width)
    framed = torch.nn.functional.pad(tiles, (1, 1, 1, 1))
    sheet = framed.permute(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2)).numpy()
    axes.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def draw(grid: Grid, shape: tuple[int, int]) -> Figure:
    """Draw a grid as one figure: images as in :func:`show`, and a title."""
    images, title = grid
    rows, columns, _ = images.shape
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows * (shape[0] + 2) / (shape[1] + 2) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    show(axes, images, shape)
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def save(pair: Pair, data: Mapping[str, Tensor], shape: tuple[int, int], folder: Path) -> list[Path]:
    """Write the pictures of a pair of images as PNG files into a folder; return their paths.

    Args:
        pair: Its ``pictures`` gives the grids.
        data: Rows of data by name, x (N, height * width) for most pairs.
        shape: Height and width of an image, in pixels.
        folder: An existing directory.
    """
    with torch.no_grad():
        grids = pair.pictures(**data)
    paths = {name: folder / f"{name}.png" for name in grids}
    for name, path in paths.items():
        write_whole(path, partial(draw(grids[name], shape).savefig, dpi=120))
    return list(paths.values())
