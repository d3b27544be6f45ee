r"""Blocks of Hamiltonian transitions of many chains, with adaptation of step size and trajectory length.

Positions :math:`q` (D, chains) move under :math:`H(q, p) = U(q) + \tfrac12 p^\top \Sigma p` by leapfrog steps of size
:math:`\epsilon`. All chains take the same number of steps, so they form one tensor; chains are the last dimension, so
loops over them are vectorised. The functions run eagerly or inside one compiled program: they use tensors only, and
read nothing back to Python but the number of leapfrog steps.

Reference: Hoffman, Radul and Sountsov 2021, "An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian
Monte Carlo" (https://proceedings.mlr.press/v130/hoffman21a.html).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.core.private import scan, while_loop
from inference.kernels.stepsize import DECAY, StepSize, average

MAX_ENERGY_ERROR = 1000.0
"""Energy error above which a trajectory has diverged, as in Stan and Pyro."""


ACCEPTANCE_FLOOR = 0.01
"""Smallest acceptance that a chain contributes to the harmonic mean, so that one stuck chain does not stop the rest."""


LENGTH_RATE, LENGTH_DECAY = 0.025, 0.95
"""Learning rate and decay of Adam on the log trajectory length (without momentum, as in the paper)."""


Density = Callable[[Tensor], tuple[Tensor, Tensor]]


class Chains(NamedTuple):
    """State of the chains: positions (D, chains), energies (chains,) and their gradients (D, chains)."""

    position: Tensor
    energy: Tensor
    gradient: Tensor


class Metric(NamedTuple):
    r"""Covariance :math:`\Sigma`, whitener :math:`W` with :math:`W^\top W = \Sigma^{-1}`, and root :math:`W^\top`.

    Each is (D,) if diagonal and (D, D) if dense. Momenta are drawn with the root, which is stored because a compiled
    loop accepts no view of an input.
    """

    covariance: Tensor
    whitener: Tensor
    root: Tensor


class Tuning(NamedTuple):
    """The step size, the log trajectory length, its mean, and the state of its optimizer; scalars.

    Attributes:
        step: The step size and the state of dual averaging.
        square: Running mean of the squared slope of the criterion (Adam's second moment).
        log_length: Logarithm of the trajectory length.
        log_length_mean: Running mean of ``log_length``, used after the warmup.
    """

    step: StepSize
    square: Tensor
    log_length: Tensor
    log_length_mean: Tensor


class Rules(NamedTuple):
    """Settings of a block: target acceptance, maximum number of leapfrog steps, whether to adapt (1 or 0); scalars."""

    target: Tensor
    limit: Tensor
    learning: Tensor


class Noise(NamedTuple):
    """Random numbers of a block of T transitions.

    Attributes:
        momentum: Standard normal, (T, D, chains).
        log_uniform: Logarithms of uniform numbers, (T, chains).
        jitter: Factors of the trajectory length in (0, 1], (T,).
    """

    momentum: Tensor
    log_uniform: Tensor
    jitter: Tensor


class Moves(NamedTuple):
    """Draws of a block: positions (T, D, chains), statistics (T, chains), leapfrog steps and step sizes (T,).

    ``energy`` is the potential energy of the draw, ``total`` potential and kinetic energy at the start of its
    trajectory.
    """

    position: Tensor
    energy: Tensor
    acceptance: Tensor
    diverging: Tensor
    leapfrogs: Tensor
    step_size: Tensor
    total: Tensor


def run_block(
    density: Density, chains: Chains, tuning: Tensor, metric: Metric, rules: Tensor, noise: Noise
) -> tuple[Chains, Tensor, Moves]:
    """Run a block of transitions that adapt step size and trajectory length.

    Args:
        density: Maps positions (D, chains) to energies (chains,) and their gradients (D, chains).
        chains: State of the chains.
        tuning: The ``Tuning`` as one vector.
        metric: The metric.
        rules: The fields of ``Rules`` as one vector.
        noise: Random numbers of the block.

    Returns:
        The new state of the chains, the new tuning as one vector, and the draws.
    """

    def step(carry: Any, now: Any) -> Any:
        chains, learnt, moves = _transition(
            density, Chains(*carry[:3]), tuning_of(carry[3]), metric, Rules(*rules.unbind()), Noise(*now)
        )
        return (*chains, learnt), tuple(moves)

    carry, moves = _scan(step, (*chains, tuning), tuple(noise))
    return Chains(*carry[:3]), carry[3], Moves(*moves)


def fresh_tuning(step: float, length: float, like: Tensor) -> Tensor:
    """Initial ``Tuning``, as one vector, for a step size and a trajectory length."""
    log_step, log_length = like.new_tensor([math.log(step), math.log(length)])
    blank = torch.zeros_like(log_step)
    return packed(Tuning(StepSize(blank, log_step, blank, log_step, log_step), blank, log_length, log_length))


def tuning_of(vector: Tensor) -> Tuning:
    """A ``Tuning`` from its vector."""
    parts = vector.unbind()
    return Tuning(StepSize(*parts[:5]), *parts[5:])


def packed(tuning: Tuning) -> Tensor:
    """A ``Tuning`` as one vector."""
    return torch.stack((*tuning.step, *tuning[1:]))


def _transition(
    density: Density, chains: Chains, tuning: Tuning, metric: Metric, rules: Rules, noise: Noise
) -> tuple[Chains, Tensor, Moves]:
    step, length = tuning.step.log_step.exp(), tuning.log_length.exp() * noise.jitter
    count = (length / step).ceil().clamp(min=1).minimum(rules.limit)
    momentum = times(noise.momentum, metric.root)
    end, out = _integrate(density, chains, momentum, metric.covariance, step, count)
    start = 0.5 * noise.momentum.square().sum(0)
    gain = chains.energy - end.energy - (0.5 * (out * times(out, metric.covariance)).sum(0) - start)
    gain = torch.where(gain.isfinite() & end.gradient.isfinite().all(0), gain, -torch.inf)
    acceptance = gain.clamp(max=0).exp()
    slope = _slope(metric, chains.position, end.position, out, acceptance) * length
    accept = noise.log_uniform < gain
    kept = Chains(*(torch.where(accept, b, a) for a, b in zip(chains, end, strict=True)))
    diverging = gain < -MAX_ENERGY_ERROR
    moves = Moves(kept.position.clone(), kept.energy.clone(), acceptance, diverging, count, step, chains.energy + start)
    return kept, _learn(tuning, rules, acceptance, slope), moves


def _integrate(
    density: Density, chains: Chains, momentum: Tensor, covariance: Tensor, step: Tensor, count: Tensor
) -> tuple[Chains, Tensor]:
    """Run ``count`` leapfrog steps from ``chains``; return the end state and its momentum."""

    def leap(k: Tensor, q: Tensor, energy: Tensor, gradient: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        q = q + step * times(p, covariance)
        energy, gradient = density(q)
        return k + 1, q, energy, gradient, p - step * gradient

    # Half steps of the momentum between leapfrog steps are merged; the surplus half step is undone at the end.
    p = momentum - 0.5 * step * chains.gradient
    _, q, energy, gradient, p = _repeat(count, leap, (torch.zeros_like(count), *chains, p))
    return Chains(q, energy, gradient), p + 0.5 * step * gradient


def _slope(metric: Metric, before: Tensor, after: Tensor, momentum: Tensor, acceptance: Tensor) -> Tensor:
    r"""Derivative of the ChEES criterion with respect to the trajectory length.

    .. math:: \tfrac14 \mathrm{E}\big[(\|q' - \mu'\|^2 - \|q - \mu\|^2)^2\big]

    The expectation is over chains weighted by acceptance, in whitened coordinates.
    """
    valid = acceptance > 0
    weight = acceptance / acceptance.sum().clamp(min=1e-20)
    after = torch.where(valid, after, before)
    momentum = torch.where(valid, momentum, 0.0)
    x0, x1 = before - before.mean(1, keepdim=True), after - (weight * after).sum(1, keepdim=True)
    change = times(x1, metric.whitener).square().sum(0) - times(x0, metric.whitener).square().sum(0)
    return (weight * change * (x1 * momentum).sum(0)).sum()


def _learn(tuning: Tuning, rules: Rules, acceptance: Tensor, slope: Tensor) -> Tensor:
    """The next tuning, as one vector.

    The log step size by dual averaging on the harmonic mean acceptance, the log length by Adam on its slope.
    """
    harmonic = 1 / (1 / acceptance.clamp(min=ACCEPTANCE_FLOOR)).mean()
    step = average(tuning.step, rules.target - harmonic)
    taken, log_step = step.taken, step.log_step
    square = LENGTH_DECAY * tuning.square + (1 - LENGTH_DECAY) * slope.square()
    root = (square / (1 - LENGTH_DECAY**taken)).sqrt().clamp(min=1e-20)
    log_length = tuning.log_length + LENGTH_RATE * slope / root
    # At least one step, at most the maximum number of steps.
    log_length = log_length.maximum(log_step).minimum(log_step + rules.limit.log())
    log_length_mean = tuning.log_length_mean + taken**-DECAY * (log_length - tuning.log_length_mean)
    learnt = Tuning(step, square, log_length, log_length_mean)
    return torch.where(rules.learning > 0, packed(learnt), packed(tuning))


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """The product of a matrix, diagonal (D,) or dense (D, D), with vectors (D, chains)."""
    return x * matrix[:, None] if matrix.dim() == 1 else matrix @ x


def _repeat(count: Tensor, body: Callable[..., Any], carried: Any) -> Any:
    """Run the body ``count`` times; the first carried value is the loop counter."""
    if torch.compiler.is_compiling():
        return while_loop(lambda k, *_: k < count, body, carried)
    # The count is read once per trajectory, so an accelerator runs ahead of Python.
    for _ in range(int(count)):
        carried = body(*carried)
    return carried


def _scan(body: Callable[..., Any], carry: Any, inputs: tuple[Tensor, ...]) -> Any:
    if torch.compiler.is_compiling():
        return scan(body, carry, inputs)
    outputs = []
    for t in range(len(inputs[0])):
        carry, output = body(carry, tuple(v[t] for v in inputs))
        outputs.append(output)
    return carry, tuple(torch.stack(v) for v in zip(*outputs, strict=True))
