r"""What is done with a trained chain: rows are generated, and their log likelihood is bounded.

:class:`~ppl_models.models.diffusion.chain.DiffusionChain` has these functions as its methods.

References: Ho, Jain and Abbeel 2020 (https://arxiv.org/abs/2006.11239), ancestral sampling and the bound; Song, Meng
and Ermon 2021 (https://arxiv.org/abs/2010.02502), the implicit sampler (DDIM).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_models.models.checks import (
    check_count,
    check_fraction,
    check_labels,
    check_matrix,
    check_number,
    random_source,
)
from ppl_models.models.diffusion.noising import draw, noise_like
from ppl_models.models.diffusion.schedules import timesteps
from ppl_models.models.pair import as_matrix
from ppl_models.models.parts.networks import evaluation

if TYPE_CHECKING:
    from ppl_models.models.diffusion.chain import DiffusionChain, Prediction


@dataclass(frozen=True)
class ChainBound:
    r"""The evidence lower bound of each row, term by term, in nats.

    .. math:: \log p(x) \ge \log p(x \mid x_1) - \sum_{t=2}^T \mathrm{KL}_t - \mathrm{KL}_{T+1}

    Attributes:
        prior_kl: KL of q(x_T | x) from the prior (N,).
        step_kl: KL of q(x_{t-1} | x_t, x) from the model's step, t = 2 to T (N, T - 1).
        reconstruction: log p(x | x_1) (N,).
        dimensions: D.
    """

    prior_kl: Tensor
    step_kl: Tensor
    reconstruction: Tensor
    dimensions: int

    @property
    def total(self) -> Tensor:
        """The bound of log p(x) of each row (N,), in nats."""
        return self.reconstruction - self.prior_kl - self.step_kl.sum(1)

    def row_bits(self) -> dict[str, Tensor]:
        """Bits per dimension of each row (N,): ``prior``, ``steps``, ``reconstruction``, and their sum ``total``."""
        terms = {
            "prior": self.prior_kl,
            "steps": self.step_kl.sum(1),
            "reconstruction": -self.reconstruction,
            "total": -self.total,
        }
        return {name: nats.double() / self.dimensions / math.log(2) for name, nats in terms.items()}

    def bits(self) -> dict[str, float]:
        """Means of :meth:`row_bits` over rows."""
        return {name: float(bits.mean()) for name, bits in self.row_bits().items()}


@torch.no_grad()
def bound(pair: DiffusionChain, x: Tensor, y: Tensor | None = None, *, draws: int = 1, seed: int = 0) -> ChainBound:
    """Evidence lower bound of each row (N, D), with the KL of each step in closed form, in evaluation mode.

    Args:
        draws: Draws of each x_t from the guide over which the terms are averaged.
    """
    pair.check(x, y)
    check_count("draws", draws)
    x0, labels = pair.scaled(x), pair.class_labels(y)
    random = random_source(seed)
    step_kl = torch.zeros(len(x), pair.steps - 1).to(x0)
    reconstruction = torch.zeros(len(x)).to(x0)
    with evaluation(pair):
        for _ in range(draws):
            for t in range(1, pair.steps + 1):
                x_t = draw(pair.noised(x0, t), random)
                if t == 1:
                    reconstruction += pair.reconstruct(x_t, labels).log_prob(x) / draws
                else:
                    posterior = pair.posterior(x_t, x0, t)
                    step_kl[:, t - 2] += kl_divergence(posterior, pair.reverse(x_t, t, labels)) / draws
    prior_kl = kl_divergence(pair.noised(x0, pair.steps), pair.prior())
    return ChainBound(prior_kl, step_kl, reconstruction, pair.features)


@torch.no_grad()
def generate(
    pair: DiffusionChain,
    count: int,
    *,
    steps: int | None = None,
    eta: float = 0.0,
    y: Tensor | None = None,
    guidance: float = 0.0,
    seed: int = 0,
) -> Tensor:
    r"""Generate rows (count, D) in evaluation mode.

    Args:
        count: Number of rows.
        steps: None: ancestral sampling, all T steps, with the mean of x given x_1 at the end. An integer S: the
            implicit sampler (DDIM) with S of the T steps, evenly spaced.
        eta: Noise of the implicit sampler, as a fraction of the standard deviation of ``variance="posterior"``: with 0
            it is deterministic given x_T, with 1 it is ancestral sampling.
        y: Labels (count,). Default: all classes in turn.
        guidance: w of classifier-free guidance, :math:`(1 + w) f(x_t, y) - w f(x_t)`.
        seed: A seed gives the same rows on every device.

    Raises:
        ValueError: More steps than the chain has, or an argument out of its range.
    """
    check_count("count", count)
    check_number("guidance", guidance)
    if guidance and not (pair.classes and pair.drop):
        raise ValueError("guidance: expected a pair with classes and drop above 0, got one without")
    if eta and steps is None:
        raise ValueError(f"eta: expected steps, as only the implicit sampler has it, got eta {eta!r} without steps")
    if y is not None and pair.classes:
        check_labels("y", y, count, pair.classes, missing=False)
    if y is None and pair.classes:
        y = torch.arange(count, device=pair.origin.device) % pair.classes
    random = random_source(seed)
    x_T = noise_like(pair.origin.expand(count, -1), random)
    *_, x0 = denoise_steps(pair, x_T, random, steps=steps, eta=eta, y=y, guidance=guidance)
    return pair.unscaled(x0)


@torch.no_grad()
def denoise_steps(
    pair: DiffusionChain,
    x_t: Tensor,
    random: torch.Generator,
    *,
    steps: int | None = None,
    eta: float = 0.0,
    y: Tensor | None = None,
    guidance: float = 0.0,
    start: int | None = None,
) -> Iterator[Tensor]:
    """Yield the scaled rows (..., D) after each reverse step; the last are x_0.

    Args:
        x_t: Scaled rows (..., D) at step ``start``.
        random: Source of the noise.
        start: Step of x_t. Default: T.

    The other arguments are those of :func:`generate`.
    """
    start = pair.steps if start is None else start
    check_fraction("eta", eta)
    check_matrix("x_t", as_matrix(x_t), pair.features)
    taken = timesteps(start, start if steps is None else steps)
    y = pair.class_labels(y)
    for t, s in zip(taken, [*taken[1:], 0], strict=True):
        with evaluation(pair):
            prediction = pair.predict(x_t, t, y, guidance=guidance)
        if s == 0:
            x_t = prediction.x0
        elif steps is None:
            x_t = draw(pair.step_distribution(x_t, prediction, t), random)
        else:
            x_t = _implicit_step(pair, prediction, t, s, eta, random)
        yield x_t


def _implicit_step(
    pair: DiffusionChain, prediction: Prediction, t: int, s: int, eta: float, random: torch.Generator
) -> Tensor:
    """Rows x_s from predictions at step t > s: equation 12 of Song et al. 2021."""
    noise = pair.noise_variance(s)
    sigma2 = eta**2 * noise / pair.noise_variance(t) * pair.added_variance(s, t)
    x_s = pair.alpha_bar(s).sqrt() * prediction.x0 + (noise - sigma2).clamp(min=0).sqrt() * prediction.eps
    return x_s + sigma2.sqrt() * noise_like(x_s, random) if eta else x_s
