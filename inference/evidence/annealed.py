r"""Annealed importance sampling from a distribution with known draws to an unnormalised target.

.. math::

    f_\beta(z) = f_0(z)^{1 - \beta} f_1(z)^\beta, \qquad
    \log w = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log \frac{f_1(z_{t-1})}{f_0(z_{t-1})}, \qquad
    \mathrm{E}[w] = Z_1 / Z_0

where :math:`z_0 \sim f_0`, and a Hamiltonian transition that leaves :math:`f_{\beta_t}` invariant takes
:math:`z_{t-1}` to :math:`z_t`. The same chain run backwards from an exact draw of :math:`f_1` has
:math:`\mathrm{E}[1 / w] = Z_0 / Z_1`. Positions are (chains, rows, D). Rows and chains are independent, so one gradient
of the sum of all log densities serves all of them.

Wu et al. adapt the step sizes of the chains that they average over. Transitions whose step size depends on the chain's
past leave no distribution invariant, so here separate chains tune the step sizes beforehand, and the estimates are
valid bounds.

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

TARGET_ACCEPTANCE = 0.65
"""Target acceptance probability, as in Wu et al."""


STEP_SIZE_RATE = 0.3
"""Learning rate of the log step size on the acceptance of a transition."""


STEP_SIZE_JITTER = 0.2
"""Maximum relative change of a step size at random; trajectories of fixed length may return to their start."""


SIGMOID_RANGE = 4.0
"""The schedule is a sigmoid between minus and plus this: the larger, the denser the temperatures at both ends."""


Densities = Callable[[Tensor], tuple[Tensor, Tensor]]


class Place(NamedTuple):
    """Positions (chains, rows, D) with the log densities of start and target, (chains, rows)."""

    position: Tensor
    start: Tensor
    target: Tensor


def schedule(temperatures: int) -> Tensor:
    r"""Inverse temperatures from 0 to 1 on a sigmoid, both ends included: (temperatures + 2,).

    Args:
        temperatures: Number of intermediate distributions.

    Example:
        >>> [round(beta, 3) for beta in schedule(3).tolist()]
        [0.0, 0.105, 0.5, 0.895, 1.0]
    """
    curve = torch.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, temperatures + 2, dtype=torch.float64).sigmoid()
    return (curve - curve[0]) / (curve[-1] - curve[0])


def tune(
    densities: Densities, start: Tensor, betas: Tensor, leapfrogs: int, step: float, tick: Callable[[], object]
) -> Tensor:
    """Tune the step size of each row at each intermediate temperature.

    Args:
        densities: Log densities (chains, rows) of start and target at positions (chains, rows, D).
        start: Draws of the start, (chains, rows, D).
        betas: Inverse temperatures, both ends included.
        leapfrogs: Leapfrog steps per transition.
        step: Initial step size.
        tick: Called after each transition.

    Returns:
        Step sizes (temperatures, rows).
    """
    place = Place(start, *densities(start))
    log_step = torch.full_like(place.target[0], math.log(step))
    steps = []
    for beta in betas[1:-1]:
        place, acceptance = _transition(densities, place, float(beta), log_step.exp(), leapfrogs)
        log_step = log_step + STEP_SIZE_RATE * (acceptance.mean(0) - TARGET_ACCEPTANCE)
        steps.append(log_step.exp())
        tick()
    return torch.stack(steps)


def anneal(
    densities: Densities, start: Tensor, betas: Tensor, leapfrogs: int, steps: Tensor, tick: Callable[[], object]
) -> Tensor:
    r"""Log importance weights of chains annealed from the first inverse temperature to the last.

    With betas and steps reversed and exact draws of the target, the result is the logarithm of :math:`1 / w`.

    Args:
        densities: Log densities (chains, rows) of start and target at positions (chains, rows, D).
        start: Draws of the distribution at the first beta, (chains, rows, D).
        betas: Inverse temperatures, both ends included.
        leapfrogs: Leapfrog steps per transition.
        steps: Step sizes (temperatures, rows), as returned by :func:`tune`.
        tick: Called after each transition.

    Returns:
        Log weights (chains, rows), in double precision.

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
    """One Hamiltonian transition of each chain; return the new places and the acceptance (chains, rows)."""
    step = (step * (1 + STEP_SIZE_JITTER * (2 * torch.rand_like(step) - 1)))[:, None]
    momentum = torch.randn_like(place.position)
    before = _intermediate(place, beta) - _kinetic(momentum)
    end, slope = _evaluate(densities, place.position, beta)
    for _ in range(leapfrogs):
        momentum = momentum + 0.5 * step * slope
        end, slope = _evaluate(densities, end.position + step * momentum, beta)
        momentum = momentum + 0.5 * step * slope
    gain = _intermediate(end, beta) - _kinetic(momentum) - before
    gain = torch.where(gain.isfinite(), gain, -torch.inf)
    accept = torch.rand_like(gain).log() < gain
    kept = (torch.where(accept if a.dim() == 2 else accept[..., None], b, a) for a, b in zip(place, end, strict=True))
    return Place(*kept), gain.clamp(max=0).exp()


def _evaluate(densities: Densities, position: Tensor, beta: float) -> tuple[Place, Tensor]:
    """Evaluate both log densities, and the gradient of the intermediate one."""
    leaf = position.detach().requires_grad_()
    with torch.enable_grad():
        place = Place(leaf, *densities(leaf))
        (slope,) = torch.autograd.grad(_intermediate(place, beta).sum(), leaf)
    return Place(*(v.detach() for v in place)), slope


def _intermediate(place: Place, beta: float) -> Tensor:
    return (1 - beta) * place.start + beta * place.target


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)
