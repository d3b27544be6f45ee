r"""The trained chain as a flow: without noise its steps become a differential equation, which has an exact density.

With :math:`\hat\sigma_t^2 = (1 - \bar\alpha_t) / \bar\alpha_t` and :math:`u = x_t / \sqrt{\bar\alpha_t}`,

.. math::

    \frac{du}{d\hat\sigma} = \epsilon_\theta(x_t, t), \qquad
    \log p(u_1) = \log p(u_T) + \int_{\hat\sigma_1}^{\hat\sigma_T} \nabla_u \cdot \epsilon_\theta \, d\hat\sigma

References: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations"
(https://arxiv.org/abs/2011.13456); Song, Meng and Ermon 2021 (https://arxiv.org/abs/2010.02502), whose deterministic
steps discretise the equation; Hutchinson 1990, for the trace.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ppl_models.models.checks import check_count, check_matrix, check_one_of, check_positive, random_source
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.noising import draw
from ppl_models.models.diffusion.schedules import timesteps
from ppl_models.models.pair import as_matrix
from ppl_models.models.parts.networks import evaluation

DIVERGENCES = ("exact", "hutchinson")


def log_density(
    pair: DiffusionChain,
    x_1: Tensor,
    y: Tensor | None = None,
    *,
    divergence: str = "exact",
    tolerance: float = 1e-4,
    batch: int = 256,
    seed: int = 0,
) -> Tensor:
    r"""Log density (N,) in nats of scaled rows (N, D) at step 1, by the flow from the prior at step T.

    Args:
        x_1: Scaled rows at step 1.
        divergence: ``exact``, with D gradients per evaluation, or ``hutchinson``, an unbiased estimate with one.
        tolerance: Relative and absolute tolerance of the solver (scipy's RK45).
        batch: Number of rows solved together.
        seed: Seed of Hutchinson's probes, one per row.
    """
    check_one_of("divergence", divergence, DIVERGENCES)
    check_positive("tolerance", tolerance)
    check_count("batch", batch)
    source = random_source(seed)
    check_matrix("x_1", x_1, pair.features)
    x_1, probes = x_1.detach(), None
    if divergence == "hutchinson":
        probes = torch.randint(2, x_1.shape, generator=source).to(x_1) * 2 - 1
    with evaluation(pair):
        parts = [
            _solve(pair, x_1[k], None if y is None else y[k], None if probes is None else probes[k], tolerance)
            for k in torch.arange(len(x_1), device=x_1.device).split(batch)
        ]
    return torch.cat(parts)


def log_evidence(
    pair: DiffusionChain,
    x: Tensor,
    y: Tensor | None = None,
    *,
    draws: int = 1,
    divergence: str = "exact",
    tolerance: float = 1e-4,
    batch: int = 256,
    seed: int = 0,
) -> Tensor:
    r"""A lower bound of log p(x) (N,) in nats, with the flow's density of :math:`x_1` in place of the chain's.

    .. math:: \mathrm{E}_{q(x_1 \mid x)}[\log p(x \mid x_1) + \log p_\mathrm{flow}(x_1) - \log q(x_1 \mid x)]

    The noise of the first step dequantises pixels. Compare with :meth:`DiffusionChain.bound`, which has the same
    likelihood p(x | x_1).

    Args:
        draws: Number of draws of :math:`x_1` that are averaged.

    The other arguments are those of :func:`log_density`.
    """
    pair.check(x, y)
    check_count("draws", draws)
    random = random_source(seed)
    noised = pair.noised(pair.scaled(x), 1)
    labels = pair.class_labels(y)
    total = torch.zeros(len(x)).to(x)
    for k in range(draws):
        with torch.no_grad(), evaluation(pair):
            x_1 = draw(noised, random)
            outer = pair.reconstruct(x_1, labels).log_prob(x) - noised.log_prob(x_1)
        inner = log_density(pair, x_1, labels, divergence=divergence, tolerance=tolerance, batch=batch, seed=seed + k)
        total += (outer + inner) / draws
    return total


@torch.no_grad()
def encode(pair: DiffusionChain, x: Tensor, y: Tensor | None = None, *, steps: int | None = None) -> Tensor:
    """Noise x_T (N, D) from which :func:`decode` approximately recovers rows (N, D): the implicit sampler in reverse.

    Args:
        steps: Number of the chain's steps to take, evenly spaced. Default: all.
    """
    check_matrix("x", x, pair.features)
    taken = [0, *reversed(timesteps(pair.steps, pair.steps if steps is None else steps))]
    x_t = pair.scaled(x)
    with evaluation(pair):
        for s, t in pairwise(taken):
            # The network is not trained at step 0: its prediction at step 1 is used.
            prediction = pair.predict(x_t, max(s, 1), y)
            x0, eps = prediction.x0, prediction.eps
            if s == 0:
                x0, eps = x_t, (x_t - pair.alpha_bar(1).sqrt() * x0) / pair.noise_variance(1).sqrt()
            x_t = pair.alpha_bar(t).sqrt() * x0 + pair.noise_variance(t).sqrt() * eps
    return x_t


@torch.no_grad()
def decode(pair: DiffusionChain, x_T: Tensor, y: Tensor | None = None, *, steps: int | None = None) -> Tensor:
    """Rows (N, D) from noise x_T (N, D) by the deterministic implicit sampler."""
    check_matrix("x_T", as_matrix(x_T), pair.features)
    taken = pair.steps if steps is None else steps
    *_, x0 = pair.denoise_steps(x_T, torch.Generator(), steps=taken, y=y)
    return pair.unscaled(x0)


def interpolate(
    pair: DiffusionChain, a: Tensor, b: Tensor, count: int = 8, *, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """Rows (N, count, D) between rows a and b (N, D), by spherical interpolation of their noise x_T."""
    check_count("count", count, 2)
    first, last = encode(pair, a, y, steps=steps), encode(pair, b, y, steps=steps)
    cosine = (first * last).sum(-1, keepdim=True) / (first.norm(dim=-1) * last.norm(dim=-1))[..., None]
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).arccos()[:, None]
    weight = torch.linspace(0, 1, count).to(a)[:, None]
    between = ((1 - weight) * angle).sin() * first[:, None] + (weight * angle).sin() * last[:, None]
    labels = None if y is None else y[:, None].expand(-1, count)
    return decode(pair, between / angle.sin(), labels, steps=steps)


def _solve(pair: DiffusionChain, x_1: Tensor, y: Tensor | None, probe: Tensor | None, tolerance: float) -> Tensor:
    """Log density of one batch. The time of the equation is log sigma hat."""
    rows, width = x_1.shape
    log_sigma = -0.5 * pair.log_snr[1:].double().cpu().numpy()
    steps = np.arange(1.0, pair.steps + 1)

    def velocity(time: float, state: np.ndarray) -> np.ndarray:
        t = torch.full((rows,), float(np.interp(time, log_sigma, steps))).to(x_1)
        u = torch.as_tensor(state[: rows * width].reshape(rows, width)).to(x_1)
        gain = pair.alpha_bar(t).sqrt()
        with torch.enable_grad():
            x_t = (gain * u).detach().requires_grad_(True)
            eps = pair.predict(x_t, t, y).eps
            trace = _trace(eps, x_t, probe)
        slope = np.concatenate([v.detach().double().cpu().numpy().ravel() for v in (eps, gain[:, 0] * trace)])
        return math.exp(time) * slope

    start = (x_1 / pair.alpha_bar(1).sqrt()).double().cpu().numpy().ravel()
    solution = solve_ivp(
        velocity,
        (log_sigma[0], log_sigma[-1]),
        np.concatenate([start, np.zeros(rows)]),
        rtol=tolerance,
        atol=tolerance,
        method="RK45",
    )
    if not solution.success:
        raise RuntimeError(f"flow: expected an equation that RK45 can solve, got: {solution.message}")
    end = torch.as_tensor(solution.y[:, -1])
    alpha_bar = pair.alpha_bar(pair.steps).double().cpu()
    x_T = alpha_bar.sqrt() * end[: rows * width].reshape(rows, width)
    prior = -0.5 * (x_T.square().sum(1) + width * math.log(2 * math.pi))
    scaling = 0.5 * width * (alpha_bar.log() - pair.alpha_bar(1).double().cpu().log())
    return (prior + scaling + end[rows * width :]).to(x_1)


def _trace(field: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Divergence (N,) of a vector field (N, D) at x: exact, or estimated by a probe of signs (N, D)."""
    if probe is not None:
        return (torch.autograd.grad(field, x, probe)[0] * probe).sum(1)
    basis = torch.eye(x.shape[1]).to(x)[:, None].expand(-1, len(x), -1)
    slopes = torch.autograd.grad(field, x, basis, is_grads_batched=True)[0]
    return (slopes * basis).sum((0, 2))
