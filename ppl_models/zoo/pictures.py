"""What a pair with a code generates, as grids of images: prior samples, reconstructions, traversals, a manifold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Grid = tuple[Tensor, str]
"""Images (rows of the grid, columns, pixels), and what they show."""


def prior_samples(pair: Any, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """Means of x at codes drawn from the prior."""
    z = _normal((rows, columns, pair.factors), seed).to(pair.origin)
    return pair.decode(z), "samples from the prior"


def reconstructions(pair: Any, x: Tensor, columns: int = 12) -> Grid:
    """Rows of data, taken from all over, each above its reconstruction from the means of its causes."""
    columns = min(columns, len(x))
    lines = min(4, len(x) // columns)
    # From all over: a data set may be sorted.
    spread = torch.arange(lines * columns) * (len(x) - 1) // max(lines * columns - 1, 1)
    blocks = x[spread].unflatten(0, (lines, columns))
    again = pair.decode(pair.encode(blocks))
    return torch.stack([blocks, again], 1).flatten(0, 1), "data, each above its reconstruction"


def traversals(pair: Any, x: Tensor, columns: int = 11, rows: int = 8) -> Grid:
    """The codes of a row of data with one factor moved from -3 to 3: the factors that vary most over the data."""
    codes = pair.encode(x)
    chosen = codes.var(0).argsort(descending=True)[:rows]
    z = codes[0].expand(len(chosen), columns, -1).clone()
    for k, factor in enumerate(chosen):
        z[k, :, factor] = torch.linspace(-3, 3, columns).to(z)
    return pair.decode(z), "one row of data; each line moves one factor from -3 to 3"


def manifold(pair: Any, side: int = 16) -> Grid:
    """Images over the quantiles of a prior of two factors."""
    if pair.factors != 2:
        raise ValueError(f"factors: expected 2 for a manifold, got {pair.factors}")
    at = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side).to(pair.origin)
    z = torch.stack([at.expand(side, side), at.flip(0)[:, None].expand(side, side)], -1)
    return pair.decode(z), "the plane of the two factors, at quantiles of the prior"


def by_class(pair: Any, columns: int = 12, *, seed: int = 0) -> Grid:
    """Images of each class, a line each, at the same codes drawn from the prior."""
    z = _normal((columns, pair.factors), seed).to(pair.origin).expand(pair.classes, columns, -1)
    one_hot = torch.eye(pair.classes).to(z)[:, None].expand(-1, columns, -1)
    return pair.decode(torch.cat([z, one_hot], -1)), "a line a class; each column is one code"


def samples(pair: Any, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows of a generator; of one that reads labels, a line a class."""
    if getattr(pair, "classes", 0):
        y = torch.arange(pair.classes).repeat_interleave(columns)
        return pair.generate(len(y), seed=seed, y=y).unflatten(0, (-1, columns)), "generated; a line a class"
    return pair.generate(rows * columns, seed=seed).unflatten(0, (rows, columns)), "generated"


def chain(pair: Any, x: Tensor, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """A diffusion chain: rows of data as noise comes over them, and rows that it leaves, both from left to right."""
    few = x[torch.arange(rows // 2) * (len(x) - 1) // max(rows // 2 - 1, 1)]
    noise = _normal(few.shape, seed).to(few)
    times = [round(k * pair.steps / (columns - 1)) for k in range(columns)]
    rising = [pair.alpha_bar(t).sqrt() * pair.scaled(few) + pair.noise_variance(t).sqrt() * noise for t in times]
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(few.shape, generator=random).to(few)
    y = torch.arange(len(few), device=few.device) % pair.classes if pair.classes else None
    falling = [start, *pair.denoise_steps(start, random, y=y)]
    shown = [falling[pair.steps - t] for t in reversed(times)]
    grid = torch.cat([torch.stack(rising, 1), torch.stack(shown, 1)])
    return pair.unscaled(grid), f"above: noise over data in {pair.steps} steps; below: the chain back from noise"


def trajectories(pair: Any, x: Tensor, *, count: int = 60, seed: int = 0) -> Figure:
    """Ways of a diffusion chain in the plane from noise to rows: with its noise, and by its deterministic steps."""
    if pair.features != 2:
        raise ValueError(f"features: expected 2 for ways in the plane, got {pair.features}")
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(count, 2, generator=random).to(pair.origin)
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ways = {"the chain": None, f"{pair.steps} deterministic steps": pair.steps}
    for axes, (title, steps) in zip(figure.subplots(1, 2), ways.items(), strict=True):
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
    """Where in the plane the discriminator of a GAN believes rows to be real, under data and rows of fixed noise.

    Returns:
        The surface, for a colour bar.
    """
    if pair.features != 2 or pair.pack != 1:
        raise ValueError(f"pair: expected 2 features and no packs, got {pair.features} and packs of {pair.pack}")
    made, real = pair.generate(count, seed=seed).cpu(), x[:count].cpu()
    low, high = real.amin(0), real.amax(0)
    margin = 0.3 * (high - low)
    sides = [torch.linspace(float(a), float(b), 120) for a, b in zip(low - margin, high + margin, strict=True)]
    with torch.no_grad():
        judged = pair.discriminate(torch.cartesian_prod(*sides).to(pair.origin)).probs.cpu().reshape(120, 120).T
    filled = axes.contourf(*(s.numpy() for s in sides), judged.numpy(), levels=np.linspace(0, 1, 21), cmap="PuOr")
    for rows, colour, label in ((real, "black", "data"), (made, "tab:green", "generated")):
        axes.scatter(rows[:, 0].numpy(), rows[:, 1].numpy(), s=4, color=colour, label=label)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=sides[0][[0, -1]].tolist(), ylim=sides[1][[0, -1]].tolist())
    return filled


def by_steps(pair: Any, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows of a diffusion chain from the same noise, a line a number of steps of its deterministic sampler."""
    counts = [s for s in (2, 5, 10, 20, 50, 100, 200) if s < pair.steps] + [pair.steps]
    lines = [pair.generate(columns, steps=s, seed=seed) for s in counts]
    said = ", ".join(map(str, counts))
    return torch.stack(lines), f"from the same noise, by {said} deterministic steps"


def fantasies(pair: Any, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """Means of x given causes drawn from the model, of a belief net."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pair.fantasies(rows * columns).unflatten(0, (rows, columns)), "what the model dreams"


def fields(pair: Any, rows: int = 8, columns: int = 12) -> Grid:
    """What each unit of the lowest layer of a belief net sends to the pixels: grey where it sends nothing."""
    weights = pair.weights[0].mT
    strongest = weights.square().sum(1).argsort(descending=True)[: rows * columns]
    count = len(strongest) // columns * columns or len(strongest)
    shown = weights[strongest[:count]].unflatten(0, (-1, min(columns, count)))
    return 0.5 + 0.5 * shown / weights.abs().max(), "what a unit of the lowest layer adds: dark more, bright less ink"


def draw(grid: Grid, shape: tuple[int, int]) -> Figure:
    """A grid as one figure, ink on white.

    Args:
        grid: Images (rows, columns, height * width) in [0, 1], and a title.
        shape: Height and width of an image, in pixels.

    Raises:
        ValueError: The images have not that many pixels.
    """
    images, title = grid
    rows, columns, pixels = images.shape
    height, width = shape
    if pixels != height * width:
        raise ValueError(f"shape: expected {pixels} pixels, got {height} x {width}")
    tiles = images.detach().cpu().clamp(0, 1).reshape(rows, columns, height, width)
    framed = torch.nn.functional.pad(tiles, (1, 1, 1, 1))
    sheet = framed.permute(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2)).numpy()
    figure = Figure(figsize=(0.6 * columns, 0.6 * rows * (height + 2) / (width + 2) + 0.4), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_axis_off()
    return figure


def save(pair: Any, x: Tensor, folder: Path) -> list[Path]:
    """Write all pictures of a pair whose rows are square images as PNG files into a folder; return their paths.

    Args:
        pair: With ``factors``, ``encode`` and ``decode``; of one with ``classes``, whose decoder reads the label after
            the code, a picture by class; a belief net, which has ``fantasies``; a GAN, which has a ``generator``; or a
            diffusion chain, which has ``denoise_steps``.
        x: Rows of data (N, pixels).
        folder: An existing directory.
    """
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        return []
    with torch.no_grad():
        if hasattr(pair, "denoise_steps"):
            grids = {"samples": samples(pair), "chain": chain(pair, x), "steps": by_steps(pair)}
        elif hasattr(pair, "generator"):
            grids = {"samples": samples(pair)}
        elif hasattr(pair, "fantasies"):
            grids = {
                "prior": fantasies(pair),
                "reconstructions": reconstructions(pair, x),
                "fields": fields(pair),
            }
        elif hasattr(pair, "classes"):
            grids = {"classes": by_class(pair)}
        else:
            grids = {
                "prior": prior_samples(pair),
                "reconstructions": reconstructions(pair, x),
                "traversals": traversals(pair, x),
            }
            if pair.factors == 2:
                grids["manifold"] = manifold(pair)
    paths = []
    for name, grid in grids.items():
        paths.append(folder / f"{name}.png")
        draw(grid, (side, side)).savefig(paths[-1], dpi=120)
    return paths


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape))
