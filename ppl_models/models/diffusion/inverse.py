r"""Posterior draws from a trained chain of rows that are observed in part, at low resolution or with noise.

Rows with Gaussian noise of the level of step t are scaled x_t: running the chain down from there is exact. Rows
observed through a matrix, :math:`v = A x + \mathrm{noise}`, are drawn by twisted sequential Monte Carlo: the chain's
steps are guided towards v and weighted for it. It is exact for the trained chain as the number of particles grows, and
reconstruction guidance with one.

References: Song, Vahdat, Mardani and Kautz 2023, "Pseudoinverse-Guided Diffusion Models"; Wu, Trippe, Naesseth, Blei
and Cunningham 2023 (https://arxiv.org/abs/2306.17775), the twisted sampler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ppl_models.models.checks import (
    check_count,
    check_labels,
    check_matrix,
    check_positive,
    known_labels,
    random_source,
)
from ppl_models.models.diffusion.noising import noise_like
from ppl_models.models.parts.networks import evaluation

if TYPE_CHECKING:
    from ppl_models.models.diffusion.chain import DiffusionChain


class Restored(NamedTuple):
    """Draws of rows given their observations.

    Attributes:
        draws: (N, particles, D), equally weighted.
        ess: Effective sample size (N,) of the particles before the last resampling.
    """

    draws: Tensor
    ess: Tensor


def mask_matrix(observed: Tensor) -> Tensor:
    """The matrix (M, D) that selects the observed features, given as booleans (D,): for inpainting."""
    if observed.dim() != 1 or observed.dtype != torch.bool or not observed.any():
        got = f"{tuple(observed.shape)} {observed.dtype}"
        raise ValueError(f"observed: expected booleans (D,), at least one true, got {got}")
    return torch.eye(len(observed), device=observed.device)[observed]


def pooling_matrix(shape: tuple[int, int], side: int) -> Tensor:
    """The matrix (M, D) of average pooling over squares of ``side`` pixels: for super-resolution."""
    height, width = shape
    check_count("side", side)
    if height % side or width % side:
        raise ValueError(f"side: expected a divisor of {height} and {width}, got {side}")
    row, column = torch.arange(height) // side, torch.arange(width) // side
    block = (row[:, None] * (width // side) + column).flatten()
    return torch.nn.functional.one_hot(block).mT.float() / side**2


@torch.no_grad()
def denoise(
    pair: DiffusionChain, x: Tensor, sd: float, *, draws: int = 1, y: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Posterior draws of rows (N, draws, D) given noisy rows (N, D), by the chain from the step of that noise.

    Args:
        x: Noisy rows; pixels may lie outside of [0, 1].
        sd: Standard deviation of the noise, in the units of x; the chain needs one ``scale`` for all features.

    Raises:
        ValueError: The chain has no step of that noise level.
    """
    check_matrix("x", x, pair.features)
    check_count("draws", draws)
    _check_labels(pair, y, len(x))
    t, gain = _step_of_noise(pair, sd)
    x_t = (gain * pair.scaled(x))[:, None].expand(-1, draws, -1)
    labels = None if y is None else y[:, None].expand(-1, draws)
    *_, x0 = pair.denoise_steps(x_t, random_source(seed), start=t, y=labels)
    return pair.unscaled(x0)


@torch.no_grad()
def posterior_mean(pair: DiffusionChain, x: Tensor, sd: float, *, y: Tensor | None = None) -> Tensor:
    """The mean (N, D) of the draws of :func:`denoise`, by one call of the network (Tweedie's formula)."""
    check_matrix("x", x, pair.features)
    _check_labels(pair, y, len(x))
    t, gain = _step_of_noise(pair, sd)
    with evaluation(pair):
        return pair.unscaled(pair.predict(gain * pair.scaled(x), t, y).x0)


@torch.no_grad()
def restore(
    pair: DiffusionChain,
    observed: Tensor,
    matrix: Tensor,
    sd: float = 0.01,
    *,
    particles: int = 16,
    y: Tensor | None = None,
    seed: int = 0,
) -> Restored:
    r"""Posterior draws of rows x given :math:`v = A x + \mathrm{N}(0, s^2)`, by twisted sequential Monte Carlo.

    The mean of each step is moved by :math:`\sigma_t^2 \nabla_{x_t} \log \tilde p(v \mid x_t)`, where

    .. math:: \tilde p(v \mid x_t) = \mathrm{N}\big(A \hat x_0(x_t), (1 - \bar\alpha_t) A A^\top + s^2 I\big),

    and the weights correct for it; the particles of a row are resampled when its effective sample size is below half.

    Args:
        observed: v (N, M), in the units of x.
        matrix: A (M, D), such as ``mask_matrix(observed)`` or ``pooling_matrix((28, 28), 4)``.
        sd: s, in the units of x.
        particles: Number per row. A single particle is guided without correction.
        y: Labels (N,), if the pair has classes.
    """
    if matrix.dim() != 2 or matrix.shape[1] != pair.features:
        raise ValueError(f"matrix: expected (M, {pair.features}), got {tuple(matrix.shape)}")
    if observed.dim() != 2 or observed.shape[1] != len(matrix):
        raise ValueError(
            f"observed: expected (rows, {len(matrix)}), one column per row of the matrix, got {tuple(observed.shape)}"
        )
    check_positive("sd", sd)
    check_count("particles", particles)
    observed, matrix = observed.to(pair.origin), matrix.to(pair.origin)
    check_matrix("observed", observed, len(matrix))
    check_matrix("matrix", matrix, pair.features)
    _check_labels(pair, y, len(observed))
    random = random_source(seed)
    view = _View(matrix * pair.scale, (observed - matrix @ pair.shift)[:, None], sd)
    labels = None if y is None else y.long()[:, None].expand(-1, particles)
    x_T = noise_like(pair.origin.expand(len(observed), particles, -1), random)
    with evaluation(pair):
        x0, log_weight = _filter(pair, x_T, labels, view, random)
    weight = log_weight.softmax(1)
    chosen = torch.multinomial(weight.cpu(), particles, replacement=True, generator=random).to(x0.device)
    draws = x0.gather(1, chosen[..., None].expand_as(x0))
    return Restored(pair.unscaled(draws), 1 / weight.square().sum(1))


def _check_labels(pair: DiffusionChain, y: Tensor | None, rows: int) -> None:
    if pair.classes:
        check_labels("y", known_labels(y), rows, pair.classes, missing=False)


class _View:
    """The observation model, in scaled units."""

    def __init__(self, matrix: Tensor, observed: Tensor, sd: float) -> None:
        self.matrix, self.observed, self.variance = matrix, observed, sd**2
        eigenvalues, self.axes = torch.linalg.eigh(matrix @ matrix.mT)
        self.eigenvalues = eigenvalues.clamp(min=0)

    def log_density(self, x0: Tensor, uncertainty: Tensor | float) -> Tensor:
        """Log density (...,) of the observation, up to a constant, given x_0 ~ N(x0, uncertainty I)."""
        variance = uncertainty * self.eigenvalues + self.variance
        residual = (self.observed - x0 @ self.matrix.mT) @ self.axes
        return -0.5 * (residual.square() / variance + variance.log()).sum(-1)


class _Step(NamedTuple):
    """Particles at one step: p(x_{t-1} | x_t), the twist log p~(v | x_t) (N, K), its gradient, and predicted x_0."""

    mean: Tensor
    stddev: Tensor
    twist: Tensor
    gradient: Tensor
    x0: Tensor

    def select(self, index: Tensor) -> _Step:
        """The particles of an index (N, K)."""
        wide = index[..., None].expand_as(self.mean)
        return _Step._make(v.gather(1, index if v.dim() == 2 else wide) for v in self)


def _filter(
    pair: DiffusionChain, x_t: Tensor, y: Tensor | None, view: _View, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Clean rows (N, K, D) and their log weights (N, K), from noise (N, K, D) at step T."""
    step = _twisted_step(pair, x_t, pair.steps, y, view)
    log_weight = step.twist
    for t in range(pair.steps, 1, -1):
        noise = noise_like(x_t, random)
        x_t = step.mean + step.stddev.square() * step.gradient + step.stddev * noise
        proposal = -0.5 * noise.square().sum(-1)
        transition = -0.5 * ((x_t - step.mean) / step.stddev).square().sum(-1)
        log_weight = log_weight + transition - proposal - step.twist
        step = _twisted_step(pair, x_t, t - 1, y, view)
        log_weight = log_weight + step.twist
        index, resampled = _resample(log_weight, random)
        log_weight = torch.where(resampled[:, None], 0.0, log_weight)
        step = step.select(index)
    return step.x0, log_weight + view.log_density(step.x0, 0.0) - step.twist


def _twisted_step(pair: DiffusionChain, x_t: Tensor, t: int, y: Tensor | None, view: _View) -> _Step:
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        prediction = pair.predict(x_t, t, y)
        twist = view.log_density(prediction.x0, pair.noise_variance(t))
        gradient = torch.autograd.grad(twist.sum(), x_t)[0]
    reverse = pair.step_distribution(x_t, prediction, t)
    return _Step(*(v.detach() for v in (reverse.mean, reverse.stddev, twist, gradient, prediction.x0)))


def _resample(log_weight: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Systematic resampling: the particles (N, K) that go on, and for which rows (N,) they were resampled."""
    weight = log_weight.softmax(1)
    count = weight.shape[1]
    resampled = 1 / weight.square().sum(1) < count / 2
    points = (torch.rand(len(weight), 1, generator=random).to(weight) + torch.arange(count).to(weight)) / count
    drawn = torch.searchsorted(weight.cumsum(1), points).clamp(max=count - 1)
    unchanged = torch.arange(count, device=weight.device).expand_as(drawn)
    return torch.where(resampled[:, None], drawn, unchanged), resampled


def _step_of_noise(pair: DiffusionChain, sd: float) -> tuple[int, Tensor]:
    """The step whose noise level is nearest on the log scale, and sqrt(alpha_bar) there."""
    scale = pair.scale
    if not bool((scale == scale[0]).all()):
        raise ValueError(f"pair: expected one scale for all features, got {scale.min():g} to {scale.max():g}")
    check_positive("sd", sd)
    levels = (-0.5 * pair.log_snr[1:]).exp() * scale[0]
    if not levels[0] / 1.5 <= sd <= levels[-1] * 1.5:
        raise ValueError(
            f"sd: expected a noise level between those of the first and the last step, {levels[0]:.3g} and "
            f"{levels[-1]:.3g}, got {sd:g}"
        )
    t = int((levels.log() - torch.tensor(sd).log()).abs().argmin()) + 1
    return t, pair.alpha_bar(t).sqrt()
