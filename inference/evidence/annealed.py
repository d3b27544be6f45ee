r"""Annealed importance sampling along a path from a distribution that is drawn from to one that is not.

.. math::

    f_\beta(z) = f_0(z)^{1 - \beta} f_1(z)^\beta, \qquad
    \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log \frac{f_1(z_{t-1})}{f_0(z_{t-1})}, \qquad
    \mathrm{E}[w] = Z_1 / Z_0

where :math:`z_0 \sim f_0`, and :math:`z_t` comes from :math:`z_{t-1}` by a Hamiltonian transition that leaves
:math:`f_{\beta_t}` alone. The same chain run backwards from an exact draw of :math:`f_1` has
:math:`\mathrm{E}[1 / w] = Z_0 / Z_1`. Positions are (chains, rows, D): the rows of the data and their chains know
nothing of each other, so that one gradient of the sum of all densities serves all of them.

Wu et al. adapt the step sizes while they measure; a chain whose steps depend on its own past leaves no distribution
alone. Here chains of a run before tune the steps, and the measured ones take them as they are: the bounds are bounds.

References: Neal 2001, "Annealed importance sampling" (https://arxiv.org/abs/physics/9803008); Wu et al. 2017, "On the
Quantitative Analysis of Decoder-Based Generative Models" (https://arxiv.org/abs/1611.04273); Grosse, Ghahramani and
Adams 2015, "Sandwiching the marginal likelihood using bidirectional Monte Carlo" (https://arxiv.org/abs/1511.02543).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPTANCE = 0.65
"""Acceptance that the steps aim at, as in Wu et al."""


RATE = 0.3
"""How far one transition's acceptance moves the logarithm of the step."""


JITTER = 0.2
"""Share by which a step is longer or shorter at random: trajectories of one length may return to where they began."""


SHARPNESS = 4.0
"""How much denser the temperatures lie near both ends: the schedule is a sigmoid between minus and plus this."""


Densities = Callable[[Tensor], tuple[Tensor, Tensor]]


class Place(NamedTuple):
    """Positions (chains, rows, D) and both log densities there, (chains, rows)."""

    position: Tensor
    start: Tensor
    target: Tensor


def schedule(temperatures: int) -> Tensor:
    r"""Inverse temperatures from 0 to 1 on a sigmoid, with so many between: (temperatures + 2,).

    Example:
        >>> [round(beta, 3) for beta in schedule(3).tolist()]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    curve = torch.linspace(-SHARPNESS, SHARPNESS, temperatures + 2, dtype=torch.float64).sigmoid()
    return (curve - curve[0]) / (curve[-1] - curve[0])


def tune(
    densities: Densities, start: Tensor, betas: Tensor, leapfrogs: int, step: float, tick: Callable[[], object]
) -> Tensor:
    """Step size of each row at each temperature between the ends, (temperatures, rows), learnt by chains of their own.

    Args:
        densities: Log densities (chains, rows) of start and target at positions (chains, rows, D).
        start: Draws of the start, (chains, rows, D).
        betas: Inverse temperatures with both ends.
        leapfrogs: Leapfrogs of a transition.
        step: Step size to begin with.
        tick: Called after each transition.
    """
    place = Place(start, *densities(start))
    log_step = torch.full_like(place.target[0], math.log(step))
    steps = []
    for beta in betas[1:-1]:
        place, acceptance = _transition(densities, place, float(beta), log_step.exp(), leapfrogs)
        log_step = log_step + RATE * (acceptance.mean(0) - ACCEPTANCE)
        steps.append(log_step.exp())
        tick()
    return torch.stack(steps)


def anneal(
    densities: Densities, start: Tensor, betas: Tensor, leapfrogs: int, steps: Tensor, tick: Callable[[], object]
) -> Tensor:
    r"""Log weights (chains, rows) of chains from the first temperature to the last.

    Betas and steps in reverse, from exact draws of the target, give the logarithm of :math:`1 / w`.

    Args:
        densities: Log densities (chains, rows) of start and target at positions (chains, rows, D).
        start: Draws of the distribution at the first beta, (chains, rows, D).
        betas: Inverse temperatures with both ends.
        leapfrogs: Leapfrogs of a transition.
        steps: Step sizes (temperatures, rows), as :func:`tune` returns them.
        tick: Called after each transition.

    Example:
        >>> from torch.distributions import Normal
        >>> def densities(z):
        ...     return Normal(0.0, 1.0).log_prob(z).sum(-1), Normal(1.0, 0.5).log_prob(z).sum(-1) + 2.0
        >>> _ = torch.manual_seed(0)
        >>> weights = anneal(densities, torch.randn(100, 1, 1), schedule(50), 5, torch.full((50, 1), 0.5), lambda: None)
        >>> f"{weights.logsumexp(0).item() - math.log(100):.2f}"  # the target's normaliser is exp(2)
        '2.03'
    """
    place = Place(start, *densities(start))
    weights = torch.zeros_like(place.target, dtype=torch.float64)
    for k, change in enumerate(betas.diff().tolist()):
        weights = weights + change * (place.target - place.start)
        if k < len(steps):
            place, _ = _transition(densities, place, float(betas[k + 1]), steps[k], leapfrogs)
            tick()
    return weights


def _transition(densities: Densities, place: Place, beta: float, step: Tensor, leapfrogs: int) -> tuple[Place, Tensor]:
    """One trajectory of each chain at a temperature, accepted or not: where they stand, acceptance (chains, rows)."""
    step = (step * (1 + JITTER * (2 * torch.rand_like(step) - 1)))[:, None]
    momentum = torch.randn_like(place.position)
    before = _between(place, beta) - _kinetic(momentum)
    end, slope = _look(densities, place.position, beta)
    for _ in range(leapfrogs):
        momentum = momentum + 0.5 * step * slope
        end, slope = _look(densities, end.position + step * momentum, beta)
        momentum = momentum + 0.5 * step * slope
    gain = _between(end, beta) - _kinetic(momentum) - before
    gain = torch.where(gain.isfinite(), gain, -torch.inf)
    accept = torch.rand_like(gain).log() < gain
    kept = (torch.where(accept if a.dim() == 2 else accept[..., None], b, a) for a, b in zip(place, end, strict=True))
    return Place(*kept), gain.clamp(max=0).exp()


def _look(densities: Densities, position: Tensor, beta: float) -> tuple[Place, Tensor]:
    """Both densities at positions, and the slope of the one between them."""
    leaf = position.detach().requires_grad_()
    with torch.enable_grad():
        place = Place(leaf, *densities(leaf))
        (slope,) = torch.autograd.grad(_between(place, beta).sum(), leaf)
    return Place(*(v.detach() for v in place)), slope


def _between(place: Place, beta: float) -> Tensor:
    return (1 - beta) * place.start + beta * place.target


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)
