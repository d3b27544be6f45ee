"""Grids of images that a pair generates or reconstructs: (rows, columns, pixels), with a title."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Grid = tuple[Tensor, str]
"""Images (rows, columns, pixels) in [0, 1], and a title."""


def prior_samples(
    pair: Any, rows: int = 8, columns: int = 12, *, seed: int = 0, image: Callable[[Tensor], Tensor] | None = None
) -> Grid:
    """Means of x at codes drawn from N(0, I), by ``pair.decode`` or another ``image`` of codes."""
    z = _normal((rows, columns, pair.factors), seed).to(pair.origin)
    return (image or pair.decode)(z), "samples from the prior"


def reconstructions(pair: Any, x: Tensor, columns: int = 12) -> Grid:
    """Rows of data, evenly spaced, each above its reconstruction from the mean of its code."""
    return beside(x, lambda block: pair.decode(pair.encode(block)), "data, each above its reconstruction", columns)


def beside(x: Tensor, image: Callable[[Tensor], Tensor], title: str, columns: int = 12) -> Grid:
    """Rows of data, evenly spaced, each above its image under a map."""
    columns = min(columns, len(x))
    lines = min(4, len(x) // columns)
    # Evenly spaced: a data set may be sorted.
    blocks = x[_evenly(lines * columns, len(x))].unflatten(0, (lines, columns))
    return torch.stack([blocks, image(blocks)], 1).flatten(0, 1), title


def traversals(pair: Any, x: Tensor, columns: int = 11, rows: int = 8) -> Grid:
    """The code of one row of data with one factor moved from -3 to 3: the factors that vary most over the data."""
    codes = pair.encode(x)
    chosen = codes.var(0).argsort(descending=True)[:rows]
    z = codes[0].expand(len(chosen), columns, -1).clone()
    for k, factor in enumerate(chosen):
        z[k, :, factor] = torch.linspace(-3, 3, columns).to(z)
    return pair.decode(z), "one row of data; each line moves one factor from -3 to 3"


def manifold(pair: Any, side: int = 16) -> Grid:
    """Means of x over the quantiles of a prior of two factors."""
    if pair.factors != 2:
        raise ValueError(f"factors: expected 2 for a manifold, got {pair.factors}")
    at = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side).to(pair.origin)
    z = torch.stack([at.expand(side, side), at.flip(0)[:, None].expand(side, side)], -1)
    return pair.decode(z), "the plane of the two factors, at quantiles of the prior"


def by_class(pair: Any, columns: int = 12, *, seed: int = 0) -> Grid:
    """Means of x for each class (one line per class) at the same codes drawn from N(0, I)."""
    z = _normal((columns, pair.factors), seed).to(pair.origin).expand(pair.classes, columns, -1)
    one_hot = torch.eye(pair.classes).to(z)[:, None].expand(-1, columns, -1)
    return pair.decode(torch.cat([z, one_hot], -1)), "one line per class; each column is one code"


def samples(pair: Any, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows that ``pair.generate`` draws."""
    return pair.generate(rows * columns, seed=seed).unflatten(0, (rows, columns)), "generated"


def samples_by(pair: Any, name: str, states: int, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows that ``pair.generate`` draws given a label, one line per state.

    Args:
        pair: Its ``generate`` takes the labels (count,) as an argument.
        name: Name of that argument.
        states: Number of states of the label.
        columns: Rows per state.
        seed: Seed of ``generate``.
    """
    labels = torch.arange(states).repeat_interleave(columns)
    images = pair.generate(len(labels), seed=seed, **{name: labels})
    return images.unflatten(0, (-1, columns)), f"generated; one line per {'class' if name == 'y' else 'code'}"


def drawn(
    draw: Callable[[int, torch.Generator], Tensor], title: str, rows: int = 8, columns: int = 12, *, seed: int = 0
) -> Grid:
    """Rows (count, pixels) of a function of the count and a random source."""
    return draw(rows * columns, torch.Generator().manual_seed(seed)).unflatten(0, (rows, columns)), title


def fields(pair: Any, rows: int = 8, columns: int = 12) -> Grid:
    """Weights from each unit of the lowest layer of a belief net to the pixels: grey is zero."""
    weights = pair.weights[0].mT
    strongest = weights.square().sum(1).argsort(descending=True)[: rows * columns]
    count = len(strongest) // columns * columns or len(strongest)
    shown = weights[strongest[:count]].unflatten(0, (-1, min(columns, count)))
    return 0.5 + 0.5 * shown / weights.abs().max(), "weights of the units of the lowest layer: dark adds ink"


def chain(pair: Any, x: Tensor, rows: int = 8, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows of data at rising noise levels, and below them rows that a diffusion chain generates, both left to right."""
    few = x[_evenly(rows // 2, len(x))]
    noise = _normal(few.shape, seed).to(few)
    times = [round(k * pair.steps / (columns - 1)) for k in range(columns)]
    rising = [pair.alpha_bar(t).sqrt() * pair.scaled(few) + pair.noise_variance(t).sqrt() * noise for t in times]
    random = torch.Generator().manual_seed(seed)
    start = torch.randn(few.shape, generator=random).to(few)
    y = torch.arange(len(few), device=few.device) % pair.classes if pair.classes else None
    falling = [start, *pair.denoise_steps(start, random, y=y)]
    shown = [falling[pair.steps - t] for t in reversed(times)]
    grid = torch.cat([torch.stack(rising, 1), torch.stack(shown, 1)])
    return pair.unscaled(grid), f"above: noise added in {pair.steps} steps; below: the chain back from noise"


def by_steps(pair: Any, columns: int = 12, *, seed: int = 0) -> Grid:
    """Rows that a diffusion chain generates from the same noise: one line per number of deterministic steps."""
    counts = [s for s in (2, 5, 10, 20, 50, 100, 200) if s < pair.steps] + [pair.steps]
    lines = [pair.generate(columns, steps=s, seed=seed) for s in counts]
    return torch.stack(lines), f"from the same noise, by {', '.join(map(str, counts))} deterministic steps"


def _evenly(count: int, size: int) -> Tensor:
    """Indices (count,) from 0 to size - 1, evenly spaced."""
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape))
