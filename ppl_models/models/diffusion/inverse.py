r"""What a fitted chain knows of rows that are seen in part, coarsely or through noise: draws given what is seen.

Rows seen through Gaussian noise are the chain's own at the step of that noise: running it down from there is exact.
Rows seen through a matrix, :math:`v = A x + \mathrm{noise}`, are drawn by the chain with its steps turned towards v
and its draws weighted for it, twisted sequential Monte Carlo: exact for the fitted chain as particles grow in number,
guidance by reconstruction with one.

References: Song, Vahdat, Mardani and Kautz 2023, "Pseudoinverse-Guided Diffusion Models"; Wu, Trippe, Naesseth, Blei
and Cunningham 2023 (https://arxiv.org/abs/2306.17775), the twisted sampler.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppl_models.models.checks import check_count, check_labels, check_matrix, known_labels
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.parts.networks import evaluation


class Restored(NamedTuple):
    """Draws of rows given what was seen of them.

    Attributes:
        draws: (N, particles, D), each as likely as another.
        effective: Number of particles (N,) that the last weights left.
    """

    draws: Tensor
    effective: Tensor


def kept(seen: Tensor) -> Tensor:
    """The matrix (M, D) that leaves those of D features that are seen (D,), true or false: for inpainting."""
    if seen.dim() != 1 or seen.dtype != torch.bool or not seen.any():
        raise ValueError(f"seen: expected true or false (D,), at least one true, got {tuple(seen.shape)} {seen.dtype}")
    return torch.eye(len(seen), device=seen.device)[seen]


def pooled(shape: tuple[int, int], side: int) -> Tensor:
    """The matrix (M, D) of the means of squares of so many pixels a side: for super-resolution."""
    height, width = shape
    if side < 1 or height % side or width % side:
        raise ValueError(f"side: expected a divisor of {height} and {width}, got {side}")
    row, column = torch.arange(height) // side, torch.arange(width) // side
    block = (row[:, None] * (width // side) + column).flatten()
    return torch.nn.functional.one_hot(block).mT.float() / side**2


@torch.no_grad()
def denoise(
    pair: DiffusionChain, x: Tensor, deviation: float, *, draws: int = 1, y: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Rows (N, draws, D) given rows (N, D) that are seen through noise, from the step of that noise downwards.

    Args:
        x: Rows with noise on them; pixels may lie outside of [0, 1].
        deviation: Standard deviation of the noise, in the units of x; every feature has the same spread.

    Raises:
        ValueError: The chain has no step of that much noise.
    """
    check_matrix("x", x, pair.features)
    check_count("draws", draws)
    _check_labels(pair, y, len(x))
    start, level = _step_of(pair, deviation)
    z = (level * pair.scaled(x))[:, None].expand(-1, draws, -1)
    labels = None if y is None else y[:, None].expand(-1, draws)
    random = torch.Generator().manual_seed(seed)
    *_, clean = pair.walk(z, random, start=start, y=labels)
    return pair.unscaled(clean)


@torch.no_grad()
def posterior_mean(pair: DiffusionChain, x: Tensor, deviation: float, *, y: Tensor | None = None) -> Tensor:
    """The mean (N, D) of what :func:`denoise` draws, by one call of the network (Tweedie's formula)."""
    check_matrix("x", x, pair.features)
    _check_labels(pair, y, len(x))
    start, level = _step_of(pair, deviation)
    with evaluation(pair):
        return pair.unscaled(pair.guess(level * pair.scaled(x), start, y).clean)


@torch.no_grad()
def restore(
    pair: DiffusionChain,
    seen: Tensor,
    matrix: Tensor,
    deviation: float = 0.01,
    *,
    particles: int = 16,
    y: Tensor | None = None,
    seed: int = 0,
) -> Restored:
    r"""Rows given :math:`v = A x + \mathrm{N}(0, s^2)`.

    Each step is drawn from the chain's law moved by :math:`\sigma_t^2 \nabla_{x_t} \log \tilde p(v \mid x_t)`, where

    .. math:: \tilde p(v \mid x_t) = \mathrm{N}\big(A \hat x(x_t), (1 - \bar\alpha_t) A A^\top + s^2 I\big),

    and weighted by what the move leaves out; the particles of a row are drawn anew where their weights are uneven.

    Args:
        seen: v (N, M), in the units of x.
        matrix: A (M, D), such as ``kept(mask)`` and ``pooled((28, 28), 4)``.
        deviation: s, in the units of x.
        particles: Of each row. With one the draws are guided and not corrected.
        y: Labels (N,), of a pair with classes.
    """
    if matrix.dim() != 2 or matrix.shape[1] != pair.features:
        raise ValueError(f"matrix: expected (M, {pair.features}), got {tuple(matrix.shape)}")
    if seen.dim() != 2 or seen.shape[1] != len(matrix):
        raise ValueError(
            f"seen: expected (rows, {len(matrix)}), as many columns as the matrix has rows, got {tuple(seen.shape)}"
        )
    if not deviation > 0:
        raise ValueError(f"deviation: expected a positive number, got {deviation!r}")
    check_count("particles", particles)
    seen, matrix = seen.to(pair.origin), matrix.to(pair.origin)
    check_matrix("seen", seen, len(matrix))
    _check_labels(pair, y, len(seen))
    random = torch.Generator().manual_seed(seed)
    view = _View(matrix * pair.spread, (seen - matrix @ pair.shift)[:, None], deviation)
    labels = None if y is None else y.long()[:, None].expand(-1, particles)
    z = torch.randn(len(seen), particles, pair.features, generator=random).to(pair.origin)
    with evaluation(pair):
        distribution, twist, pull, clean = _turned(pair, z, pair.steps, labels, view)
        weight = twist
        for t in range(pair.steps, 0, -1):
            if t == 1:
                weight = weight + view.score(clean, 0.0) - twist
                break
            moved = distribution.mean + distribution.variance * pull
            noise = torch.randn(z.shape, generator=random).to(z)
            z = moved + distribution.stddev * noise
            drawn = -0.5 * noise.square().sum(-1)
            own = -0.5 * ((z - distribution.mean) / distribution.stddev).square().sum(-1)
            weight = weight + own - drawn - twist
            distribution, twist, pull, clean = _turned(pair, z, t - 1, labels, view)
            weight = weight + twist
            chosen = _again(weight, random)
            weight = torch.where(chosen.again[:, None], 0.0, weight)
            take = chosen.which[..., None].expand_as(z)
            z, clean, pull, mean, scale = (
                v.expand_as(z).gather(1, take) for v in (z, clean, pull, distribution.mean, distribution.stddev)
            )
            distribution, twist = _Moments(mean, scale), twist.gather(1, chosen.which)
    share = weight.softmax(1)
    last = torch.multinomial(share.cpu(), particles, replacement=True, generator=random).to(z.device)
    draws = clean.gather(1, last[..., None].expand_as(clean))
    return Restored(pair.unscaled(draws), 1 / share.square().sum(1))


def _check_labels(pair: DiffusionChain, y: Tensor | None, rows: int) -> None:
    if pair.classes:
        check_labels("y", known_labels(y), rows, pair.classes, missing=False)


class _Moments(NamedTuple):
    mean: Tensor
    stddev: Tensor

    @property
    def variance(self) -> Tensor:
        return self.stddev.square()


class _View:
    """How likely what is seen is, given clean rows as the chain holds them and how uncertain they are."""

    def __init__(self, matrix: Tensor, seen: Tensor, deviation: float) -> None:
        self.matrix, self.seen, self.noise = matrix, seen, deviation**2
        values, self.axes = torch.linalg.eigh(matrix @ matrix.mT)
        self.values = values.clamp(min=0)

    def score(self, clean: Tensor, doubt: Tensor | float) -> Tensor:
        """Log density of what is seen (..., ), but for a constant."""
        variance = doubt * self.values + self.noise
        off = (self.seen - clean @ self.matrix.mT) @ self.axes
        return -0.5 * (off.square() / variance + variance.log()).sum(-1)


def _turned(
    pair: DiffusionChain, z: Tensor, t: int, y: Tensor | None, view: _View
) -> tuple[_Moments, Tensor, Tensor, Tensor]:
    """The chain's law of the next rows, how likely they make what is seen, its slope, and the clean rows."""
    with torch.enable_grad():
        x = z.detach().requires_grad_(True)
        guess = pair.guess(x, t, y)
        twist = view.score(guess.clean, pair.lost(t))
        pull = torch.autograd.grad(twist.sum(), x)[0]
    distribution = pair.step_distribution(z, guess, t)
    return (
        _Moments(distribution.mean.detach(), distribution.stddev.detach()),
        twist.detach(),
        pull,
        guess.clean.detach(),
    )


class _Chosen(NamedTuple):
    which: Tensor
    again: Tensor


def _again(weight: Tensor, random: torch.Generator) -> _Chosen:
    """Which particles (N, K) go on: all, or, of rows whose weights are uneven, as many as their weights say."""
    share = weight.softmax(1)
    count = share.shape[1]
    uneven = 1 / share.square().sum(1) < count / 2
    at = (torch.rand(len(share), 1, generator=random).to(share) + torch.arange(count).to(share)) / count
    drawn = torch.searchsorted(share.cumsum(1), at).clamp(max=count - 1)
    same = torch.arange(count, device=share.device).expand_as(drawn)
    return _Chosen(torch.where(uneven[:, None], drawn, same), uneven)


def _step_of(pair: DiffusionChain, deviation: float) -> tuple[int, Tensor]:
    """The step whose noise is nearest, in log, and by how much rows are shrunk there."""
    spread = pair.spread
    if not bool((spread == spread[0]).all()):
        raise ValueError("pair: expected one spread for all features, where noise has one deviation")
    if not deviation > 0:
        raise ValueError(f"deviation: expected a positive number, got {deviation!r}")
    noises = (-0.5 * pair.ratio[1:]).exp() * spread[0]
    if not noises[0] / 1.5 <= deviation <= noises[-1] * 1.5:
        raise ValueError(
            f"deviation: expected one between the first and the last step's noise, {noises[0]:.3g} and "
            f"{noises[-1]:.3g}, got {deviation:g}"
        )
    t = int((noises.log() - torch.tensor(deviation).log()).abs().argmin()) + 1
    return t, pair.signal(t).sqrt()
