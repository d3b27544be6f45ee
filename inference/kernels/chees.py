r"""ChEES-HMC: Hamiltonian Monte Carlo of many chains in one tensor, adapted across chains.

The step size is adapted by dual averaging on the harmonic mean of the chains' acceptance probabilities, the trajectory
length by gradient ascent on the ChEES criterion (the change in the squared distance from the mean over a trajectory),
and the metric by the covariance of the draws of all chains in growing windows. Trajectory lengths are jittered by a
Halton sequence.

Reference: Hoffman, Radul and Sountsov 2021 (https://proceedings.mlr.press/v130/hoffman21a.html).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.core.checks import check_count, check_positive
from inference.kernels.hamiltonian import Hamiltonian
from inference.kernels.metric import learn, log_volume, positive_sd
from inference.kernels.trajectory import Chains, Moves, Noise, fresh_tuning, packed, run_block, tuning_of

BLOCK = 10
"""Transitions per call of the program."""


TRAJECTORY_JITTER = 0.6
"""Maximum fraction by which jitter shortens a trajectory. The paper uses 1; short trajectories are mostly wasted where
the metric is good (on a normal posterior 0.6 gives twice the effective draws for 1.3 times the gradients)."""


BEST_FRACTION = 1 / 8
"""Fraction of chains with the lowest energy that a chain is compared with before it is restarted."""


RESTART_SD = 6.0
"""Excess energy from which a chain is restarted during the warmup, in standard deviations of the energy of a normal
posterior (the root of half its dimensions, at least 4)."""


class ChEES(Hamiltonian):
    r"""ChEES-HMC: Hamiltonian Monte Carlo of many chains at once, adapted across chains.

    Under plain ``pyro.infer.MCMC`` a draw of a site has shape (chains, \*shape), so chains are the second dimension of
    its draws; ``inference.sample`` returns them as chains.

    During the warmup a chain whose energy is far above that of the others restarts at the position of another chain;
    the attribute ``restarted`` counts these chains.

    Args:
        model: A Pyro model; finite sites are summed out.
        potential_fn: In place of a model, a function from the unconstrained values of one chain, by name, to minus the
            log density. ``initial_params`` (chains, \*shape) must then be set.
        num_chains: Number of chains; adaptation across chains works well from about 16.
        step_size: Initial step size.
        trajectory_length: Initial maximum trajectory length, in units of the metric.
        target_accept_prob: Target of the harmonic mean of the acceptance probabilities.
        full_mass: Whether the metric is dense. Default: dense up to 200 dimensions.
        max_steps: Maximum number of leapfrog steps per trajectory.
        jit_compile: Whether to compile blocks of transitions into one program; otherwise the traced graph runs.
        eager: Whether to run a model that cannot be traced eagerly, one chain after another, with a warning; if False,
            such a model raises ``Untraceable``.
        transforms: Transforms from constrained to unconstrained values by site. Default: Pyro's.
        max_plate_nesting: Number of dimensions used by plates. Default: found by running the model.
        given: Values of further sites of the model, (chains, \*shape), that stay fixed while the chains move. Assign
            the attribute ``given`` to replace them by others of the same shapes.
        block: Transitions per call of the program.

    Raises:
        ValueError: An argument is out of range, ``setup`` finds no start of finite density, or ``initial_params`` are
            missing.

    Reference: Hoffman, Radul and Sountsov 2021 (https://proceedings.mlr.press/v130/hoffman21a.html).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 100.0])).to_event(1))
        >>> pyro.set_rng_seed(0)
        >>> mcmc = pyro.infer.MCMC(
        ...     ChEES(model, num_chains=32, jit_compile=False), num_samples=100, warmup_steps=200, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([100, 32, 2])
    """

    least_chains, step_size, target_accept_prob = 2, 0.1, 0.651
    block = BLOCK
    transitions, moves = staticmethod(run_block), Moves

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        trajectory_length: float = 1.0,
        max_steps: int = 512,
        **settings: Any,
    ) -> None:
        super().__init__(model, potential_fn, **settings)
        check_count("max_steps", max_steps)
        check_positive("trajectory_length", trajectory_length)
        self.max_steps, self._first_length = max_steps, trajectory_length

    def logging(self) -> OrderedDict[str, str]:
        """Step size, maximum number of leapfrog steps and acceptance probability, for a progress bar."""
        learnt = tuning_of(self._tuning)
        step, steps = float(learnt.step.log_step.exp()), float((learnt.log_length - learnt.step.log_step).exp())
        acceptance = float(self._latest.acceptance.mean())
        return OrderedDict({"step size": f"{step:.2e}", "steps": f"{steps:.0f}", "acc. prob": f"{acceptance:.3f}"})

    def _plan(self) -> None:
        like = self._density.like
        self._tuning = fresh_tuning(self._first_step, self._first_length, like)
        self._renewals = _renewals(self._warmup)

    def _rules(self, learning: bool) -> Tensor:
        # Before the metric is known, trajectories from remote starts are kept short.
        limit = self.max_steps if self._ended else min(self.max_steps, 4 + self._taken)
        return self._density.like.new_tensor([self._target, limit, learning])

    def _noise(self) -> Noise:
        like, shape = self._density.like, (self.block, *self._chains.position.shape)
        jitter = like.new_tensor([1 - TRAJECTORY_JITTER * _halton(self._taken + t + 1) for t in range(self.block)])
        normal = torch.randn(shape, dtype=like.dtype, device=like.device)
        uniform = torch.rand((self.block, shape[-1]), dtype=like.dtype, device=like.device).log()
        return Noise(normal, uniform, jitter)

    def _adapt(self) -> None:
        if self._taken in self._renewals:
            self._renew(self._restart() if 7 * self._taken >= self._warmup else None)

    def _settle(self) -> None:
        learnt = tuning_of(self._tuning)
        step = learnt.step._replace(log_step=learnt.step.log_step_mean)
        self._tuning = packed(learnt._replace(step=step, log_length=learnt.log_length_mean))

    def _restart(self) -> Tensor:
        """Move chains of far too high energy to the positions of others, so that they do not spoil the adaptation.

        Returns:
            Mask (chains,) of the chains that did not move.
        """
        energy = self._latest.energy.double().mean(0).nan_to_num(torch.inf, torch.inf)
        excess = energy - energy.kthvalue(max(1, int(len(energy) * BEST_FRACTION))).values
        allowed = RESTART_SD * max(self._density.dim / 2, 16.0) ** 0.5
        lost = excess > allowed
        if lost.any():
            # A mode of low density may be wide: its volume makes up for part of the difference. A few chains that have
            # not yet crossed their mode show too little of it, so it is taken to be as wide as the others' marginals.
            recent = torch.cat(self._window[len(self._window) // 2 :]).double()
            theirs, others = (recent[:, c] for c in (lost, ~lost))
            marginal = float(positive_sd(others).median(0).values.log().sum())
            wide = max(log_volume(theirs.flatten(0, 1), least=False), marginal)
            lost = excess > allowed + max(wide - log_volume(others.flatten(0, 1), least=True), 0.0)
        targets = (energy <= energy[~lost].median()).nonzero().flatten()
        count = int(lost.sum())
        if count:
            # A chain may be moved several times.
            self._moved = self._moved | lost
            others = targets[torch.randint(len(targets), (count,), device=targets.device)]
            self._chains = Chains(*(v.clone() for v in self._chains))
            for value in self._chains:
                value[..., lost] = value[..., others]
        return ~lost

    def _renew(self, keep: Tensor | None = None) -> None:
        """Estimate the metric from the second half of the window, and restart the adaptation of step and length.

        Args:
            keep: Mask (chains,) of the chains to use; None: all.
        """
        blocks = self._window[len(self._window) // 2 :]
        self._window.clear()
        if keep is not None and keep.any():
            blocks = [b[:, keep] for b in blocks]
        draws = torch.cat([b.flatten(0, 1) for b in blocks]).double()
        draws = draws[draws.isfinite().all(-1)]
        self._metric, slowest = learn(draws, self._metric)
        step = 1.5 * self._density.dim**-0.25
        self._tuning = fresh_tuning(step, max(2.0, math.pi / 2 * slowest), self._density.like)


def _renewals(warmup: int) -> set[int]:
    """Transitions after which the metric is renewed: windows grow by half and end at four fifths of the warmup."""
    last = 4 * warmup // 5 // BLOCK * BLOCK
    times, window = {last} - {0}, float(BLOCK)
    while window + BLOCK <= last:
        times.add(int(window) // BLOCK * BLOCK)
        window = max(1.5 * window, window + BLOCK)
    return times


def _halton(n: int) -> float:
    """Element n of the Halton sequence of base 2, in (0, 1)."""
    value, part = 0.0, 0.5
    while n:
        value, n, part = value + part * (n & 1), n >> 1, part / 2
    return value
