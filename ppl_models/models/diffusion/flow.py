r"""The fitted chain as a flow: without noise its steps become a differential equation, which has an exact density.

With :math:`\hat\sigma_t^2 = (1 - \bar\alpha_t) / \bar\alpha_t` and :math:`u = x_t / \sqrt{\bar\alpha_t}`,

.. math::

    \frac{du}{d\hat\sigma} = \epsilon_\theta(x_t, t), \qquad
    \log p(u_1) = \log p(u_T) + \int_{\hat\sigma_1}^{\hat\sigma_T} \nabla_u \cdot \epsilon_\theta \, d\hat\sigma

References: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations"
(https://arxiv.org/abs/2011.13456); Song, Meng and Ermon 2021 (https://arxiv.org/abs/2010.02502), whose deterministic
steps are those of the equation; Hutchinson 1990, for the trace.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ppl_models.models.checks import check_count, check_matrix
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.schedules import path
from ppl_models.models.parts.networks import evaluation

DIVERGENCES = ("exact", "hutchinson")


def log_density(
    pair: DiffusionChain,
    noised: Tensor,
    y: Tensor | None = None,
    *,
    divergence: str = "exact",
    tolerance: float = 1e-4,
    batch: int = 256,
    seed: int = 0,
) -> Tensor:
    r"""Log density (N,) in nats of rows (N, D) at step 1, :math:`x_1`, by the flow from the prior at step T.

    Args:
        noised: Rows as the chain holds them at its first step.
        divergence: ``exact``, at D gradients an evaluation, or ``hutchinson``: an unbiased estimate by one.
        tolerance: Of the solver (scipy's RK45), relative and absolute.
        batch: Rows that are solved for together.
        seed: Of Hutchinson's probes, one a row.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    check_matrix("noised", noised, pair.features)
    noised, probes = noised.detach(), None
    if divergence == "hutchinson":
        random = torch.Generator().manual_seed(seed)
        probes = torch.randint(2, noised.shape, generator=random).to(noised) * 2 - 1
    with evaluation(pair):
        parts = [
            _solve(pair, noised[k], None if y is None else y[k], None if probes is None else probes[k], tolerance)
            for k in torch.arange(len(noised), device=noised.device).split(batch)
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
    r"""A bound of log p(x) (N,) in nats whose prior over :math:`x_1` is the flow's, in place of the chain's.

    .. math:: \mathrm{E}_{q(x_1 \mid x)}[\log p(x \mid x_1) + \log p_\mathrm{flow}(x_1) - \log q(x_1 \mid x)]

    Rows of pixels need no other dequantisation: the noise of the first step is one. It is to be read beside
    :meth:`DiffusionChain.bound`, which has the same first and last steps.

    Args:
        draws: Draws of :math:`x_1` whose mean it is. The rest are those of :func:`log_density`.
    """
    pair.check(x, y)
    check_count("draws", draws)
    random = torch.Generator().manual_seed(seed)
    distribution = pair.noised(pair.scaled(x), 1)
    labels = None if y is None or not pair.classes else y.long()
    total = torch.zeros(len(x)).to(x)
    for k in range(draws):
        with torch.no_grad(), evaluation(pair):
            noised = distribution.mean + distribution.stddev * torch.randn(x.shape, generator=random).to(x)
            outer = pair.reconstruct(noised, labels).log_prob(x) - distribution.log_prob(noised)
        inner = log_density(
            pair, noised, labels, divergence=divergence, tolerance=tolerance, batch=batch, seed=seed + k
        )
        total += (outer + inner) / draws
    return total


@torch.no_grad()
def encode(pair: DiffusionChain, x: Tensor, y: Tensor | None = None, *, steps: int | None = None) -> Tensor:
    """Noise (N, D) at step T from which the deterministic sampler comes back to rows (N, D), nearly: the flow upwards.

    Args:
        steps: So many of the chain's steps, spread evenly; None: all.
    """
    check_matrix("x", x, pair.features)
    times = [0, *reversed(path(pair.steps, pair.steps if steps is None else steps))]
    z = pair.scaled(x)
    with evaluation(pair):
        for now, then in pairwise(times):
            # At step 0 the network has not been taught: its guess at step 1 stands for it.
            guess = pair.guess(z, max(now, 1), y)
            noise = guess.noise if now else (z - pair.signal(1).sqrt() * guess.clean) / pair.lost(1).sqrt()
            clean = guess.clean if now else z
            z = pair.signal(then).sqrt() * clean + pair.lost(then).sqrt() * noise
    return z


@torch.no_grad()
def decode(pair: DiffusionChain, z: Tensor, y: Tensor | None = None, *, steps: int | None = None) -> Tensor:
    """Rows (N, D) of noise (N, D) at step T, by the deterministic sampler."""
    chosen = pair.steps if steps is None else steps
    *_, clean = pair.walk(z, torch.Generator(), steps=chosen, y=y)
    return pair.unscaled(clean)


def interpolate(
    pair: DiffusionChain, a: Tensor, b: Tensor, count: int = 8, *, steps: int | None = None, y: Tensor | None = None
) -> Tensor:
    """Rows (N, count, D) on the way from rows a to rows b (N, D): the codes of both are joined along a great circle."""
    first, last = encode(pair, a, y, steps=steps), encode(pair, b, y, steps=steps)
    cosine = (first * last).sum(-1, keepdim=True) / (first.norm(dim=-1) * last.norm(dim=-1))[..., None]
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).arccos()[:, None]
    share = torch.linspace(0, 1, count).to(a)[:, None]
    between = ((1 - share) * angle).sin() * first[:, None] + (share * angle).sin() * last[:, None]
    labels = None if y is None else y[:, None].expand(-1, count)
    return decode(pair, between / angle.sin(), labels, steps=steps)


def _solve(pair: DiffusionChain, noised: Tensor, y: Tensor | None, probe: Tensor | None, tolerance: float) -> Tensor:
    """Log density of one batch. Time is the log of the noise, s = log sigma hat."""
    rows, width = noised.shape
    times = -0.5 * pair.ratio[1:].double()
    grid = torch.arange(1, pair.steps + 1, dtype=torch.float64, device=times.device)
    first, last = float(times[0]), float(times[-1])

    def velocity(s: float, state: np.ndarray) -> np.ndarray:
        at = float(np.interp(s, times.cpu().numpy(), grid.cpu().numpy()))
        t = torch.full((rows,), at, device=noised.device).to(noised)
        u = torch.as_tensor(state[: rows * width].reshape(rows, width)).to(noised)
        keep = pair.signal(t).sqrt()
        with torch.enable_grad():
            x = (keep * u).detach().requires_grad_(True)
            noise = pair.guess(x, t, y).noise
            trace = _trace(noise, x, probe)
        scale = math.exp(s)
        slope = np.concatenate([v.detach().double().cpu().numpy().ravel() for v in (noise, keep[:, 0] * trace)])
        return scale * slope

    start = (noised / pair.signal(1).sqrt()).double().cpu().numpy().ravel()
    found = solve_ivp(
        velocity, (first, last), np.concatenate([start, np.zeros(rows)]), rtol=tolerance, atol=tolerance, method="RK45"
    )
    if not found.success:
        raise RuntimeError(f"the flow could not be solved: {found.message}")
    end = torch.as_tensor(found.y[:, -1])
    signal = pair.signal(pair.steps).double().cpu()
    z = signal.sqrt() * end[: rows * width].reshape(rows, width)
    prior = -0.5 * (z.square().sum(1) + width * math.log(2 * math.pi))
    moved = 0.5 * width * (signal.log() - pair.signal(1).double().cpu().log())
    return (prior + moved + end[rows * width :]).to(noised)


def _trace(noise: Tensor, x: Tensor, probe: Tensor | None) -> Tensor:
    """Divergence (N,) of a field (N, D) at x: exact, or by a probe of signs (N, D)."""
    if probe is not None:
        return (torch.autograd.grad(noise, x, probe)[0] * probe).sum(1)
    each = torch.eye(x.shape[1]).to(x)[:, None].expand(-1, len(x), -1)
    slopes = torch.autograd.grad(noise, x, each, is_grads_batched=True)[0]
    return (slopes * each).sum((0, 2))
