r"""A block of Hamiltonian transitions of many chains, and what they teach about step and length, as tensors alone.

Positions :math:`q` (D, chains) move under :math:`H(q, p) = U(q) + \tfrac12 p^\top \Sigma p` by leapfrogs of step
:math:`\epsilon`; every chain takes the same number, so that all of them are one tensor. Chains are neighbours in
memory, for then a loop over them is vectorised. Nothing here reads a value back but the number of leapfrogs: the same
functions run as they stand and inside one compiled program, where a loop costs no Python.

Reference: Hoffman, Radul and Sountsov 2021, "An Adaptive-MCMC Scheme for Setting Trajectory Lengths in Hamiltonian
Monte Carlo" (https://proceedings.mlr.press/v130/hoffman21a.html).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

DIVERGENCE = 1000.0
"""Energy error from which a trajectory has diverged, as in Stan and Pyro."""


FLOOR = 0.01
"""Least acceptance that one chain adds to the harmonic mean: a chain that is stuck must not stop all others."""


RATE, MEMORY = 0.025, 0.95
"""Learning rate and decay of Adam on the log trajectory length (without momentum, as in the paper)."""


Density = Callable[[Tensor], tuple[Tensor, Tensor]]


class Chains(NamedTuple):
    """Where the chains stand: positions (D, chains), energies (chains,), their gradients (D, chains)."""

    position: Tensor
    energy: Tensor
    gradient: Tensor


class Metric(NamedTuple):
    r"""Covariance :math:`\Sigma`, whitener :math:`W^\top W = \Sigma^{-1}`, its transpose: (D,) if diagonal, or (D, D).

    The transpose draws momenta, and stands here because a compiled loop takes no view of an input.
    """

    covariance: Tensor
    whitener: Tensor
    root: Tensor


class Tuning(NamedTuple):
    """Logarithms of step and length, their running means, and the state of both optimisers; scalars."""

    taken: Tensor
    anchor: Tensor
    error: Tensor
    step: Tensor
    log_step_mean: Tensor
    square: Tensor
    length: Tensor
    length_mean: Tensor


class Rules(NamedTuple):
    """What holds during a block: acceptance aimed at, most leapfrogs, and whether to learn (1 or 0); scalars."""

    target: Tensor
    limit: Tensor
    learning: Tensor


class Noise(NamedTuple):
    """Randomness of a block of T transitions: (T, D, chains) normal, (T, chains) log uniform, (T,) in (0, 1]."""

    momentum: Tensor
    log_uniform: Tensor
    jitter: Tensor


class Moves(NamedTuple):
    """What a block did: positions (T, D, chains); statistics (T, chains); leapfrogs and step sizes (T,)."""

    position: Tensor
    energy: Tensor
    acceptance: Tensor
    diverging: Tensor
    leapfrogs: Tensor
    step_size: Tensor


def run_block(
    density: Density, chains: Chains, tuning: Tensor, metric: Metric, rules: Tensor, noise: Noise
) -> tuple[Chains, Tensor, Moves]:
    """Run a block of transitions, each learning from the last; ``Tuning`` and ``Rules`` go as one vector each."""

    def step(carry: Any, now: Any) -> Any:
        chains, learnt, moves = _transition(
            density, Chains(*carry[:3]), Tuning(*carry[3].unbind()), metric, Rules(*rules.unbind()), Noise(*now)
        )
        return (*chains, torch.stack(learnt)), tuple(moves)

    carry, moves = _scan(step, (*chains, tuning), tuple(noise))
    return Chains(*carry[:3]), carry[3], Moves(*moves)


def fresh_tuning(step: float, length: float, like: Tensor) -> Tensor:
    """Start to learn from a step size and a trajectory length."""
    step, length = math.log(step), math.log(length)
    values = {"anchor": step, "step": step, "step_mean": step, "length": length, "length_mean": length}
    return like.new_tensor([values.get(name, 0.0) for name in Tuning._fields])


def _transition(
    density: Density, chains: Chains, tuning: Tuning, metric: Metric, rules: Rules, noise: Noise
) -> tuple[Chains, Tuning, Moves]:
    step, length = tuning.step.exp(), tuning.length.exp() * noise.jitter
    count = (length / step).ceil().clamp(min=1).minimum(rules.limit)
    momentum = _times(noise.momentum, metric.root)
    end, out = _integrate(density, chains, momentum, metric.covariance, step, count)
    kinetic = 0.5 * (out * _times(out, metric.covariance)).sum(0) - 0.5 * noise.momentum.square().sum(0)
    gain = chains.energy - end.energy - kinetic
    gain = torch.where(gain.isfinite() & end.gradient.isfinite().all(0), gain, -torch.inf)
    acceptance = gain.clamp(max=0).exp()
    slope = _slope(metric, chains.position, end.position, out, acceptance) * length
    accept = noise.log_uniform < gain
    kept = Chains(*(torch.where(accept, b, a) for a, b in zip(chains, end, strict=True)))
    moves = Moves(kept.position.clone(), kept.energy.clone(), acceptance, gain < -DIVERGENCE, count, step)
    return kept, _learn(tuning, rules, acceptance, slope), moves


def _integrate(
    density: Density, chains: Chains, momentum: Tensor, covariance: Tensor, step: Tensor, count: Tensor
) -> tuple[Chains, Tensor]:
    """Leapfrogs from ``chains``: where they end, and with what momentum."""

    def leap(k: Tensor, q: Tensor, energy: Tensor, gradient: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        q = q + step * _times(p, covariance)
        energy, gradient = density(q)
        return k + 1, q, energy, gradient, p - step * gradient

    # The two half kicks between leapfrogs are one whole kick: half a kick too much is taken back at the end.
    p = momentum - 0.5 * step * chains.gradient
    _, q, energy, gradient, p = _repeat(count, leap, (torch.zeros_like(count), *chains, p))
    return Chains(q, energy, gradient), p + 0.5 * step * gradient


def _slope(metric: Metric, before: Tensor, after: Tensor, momentum: Tensor, acceptance: Tensor) -> Tensor:
    r"""Slope of the ChEES criterion in time, over chains weighted by acceptance, in whitened coordinates.

    .. math:: \tfrac14 \mathrm{E}\big[(\|q' - \mu'\|^2 - \|q - \mu\|^2)^2\big]
    """
    valid = acceptance > 0
    weight = acceptance / acceptance.sum().clamp(min=1e-20)
    after = torch.where(valid, after, before)
    momentum = torch.where(valid, momentum, 0.0)
    x0, x1 = before - before.mean(1, keepdim=True), after - (weight * after).sum(1, keepdim=True)
    change = _times(x1, metric.whitener).square().sum(0) - _times(x0, metric.whitener).square().sum(0)
    return (weight * change * (x1 * momentum).sum(0)).sum()


def _learn(tuning: Tuning, rules: Rules, acceptance: Tensor, slope: Tensor) -> Tuning:
    """Dual averaging of the log step on the harmonic mean acceptance; Adam of the log length on the slope."""
    taken = tuning.taken + 1
    weight = taken**-0.75
    harmonic = 1 / (1 / acceptance.clamp(min=FLOOR)).mean()
    error = tuning.error + (rules.target - harmonic - tuning.error) / (taken + 10)
    step = tuning.anchor - taken.sqrt() / 0.05 * error
    square = MEMORY * tuning.square + (1 - MEMORY) * slope.square()
    root = (square / (1 - MEMORY**taken)).sqrt().clamp(min=1e-20)
    length = tuning.length + RATE * slope / root
    # No shorter than a step, no longer than the steps allowed.
    length = length.maximum(step).minimum(step + rules.limit.log())
    log_step_mean = tuning.log_step_mean + weight * (step - tuning.log_step_mean)
    length_mean = tuning.length_mean + weight * (length - tuning.length_mean)
    learnt = Tuning(taken, tuning.anchor, error, step, log_step_mean, square, length, length_mean)
    return Tuning(*(torch.where(rules.learning > 0, new, old) for new, old in zip(learnt, tuning, strict=True)))


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    return x * matrix[:, None] if matrix.dim() == 1 else matrix @ x


def _repeat(count: Tensor, body: Callable[..., Any], carried: Any) -> Any:
    """Run the body, whose first value counts, ``count`` times."""
    if torch.compiler.is_compiling():
        return while_loop(lambda k, *_: k < count, body, carried)
    # One read a trajectory, none a leapfrog: an accelerator runs ahead of Python.
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
