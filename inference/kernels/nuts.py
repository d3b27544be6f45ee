r"""NUTS: the no-U-turn sampler, all chains in one tensor.

Every chain has a step size of its own, adapted by dual averaging; the metric is the covariance of the draws of all
chains in the windows of Stan's warmup, each twice as long as the one before. Trees are those of
:mod:`inference.kernels.tree`.

Reference: Hoffman and Gelman 2014 (https://jmlr.org/papers/v15/hoffman14a.html).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inference.compiler import policy
from inference.core.checks import check_count
from inference.kernels.hamiltonian import Hamiltonian
from inference.kernels.metric import learn
from inference.kernels.stepsize import StepSize
from inference.kernels.trajectory import times
from inference.kernels.tree import OPERATIONS, TreeMoves, TreeNoise, fresh_steps, run_trees

BLOCK = 25
"""Transitions per call of the program."""


START, FIRST_WINDOW, END = 75, 25, 50
"""Transitions of the warmup before the first window, of the first window, and after the last, as in Stan."""


STEP_ACCEPTANCE = 0.8
"""Acceptance of one leapfrog step on both sides of which the first step size is looked for, as in Stan."""


DOUBLINGS = 60
"""Maximum number of times that the first step size is doubled or halved."""


class NUTS(Hamiltonian):
    r"""The no-U-turn sampler, with all chains in one tensor.

    Under plain ``pyro.infer.MCMC`` a draw of a site has shape (chains, \*shape), so chains are the second dimension of
    its draws; ``inference.sample`` returns them as chains.

    Args:
        model: A Pyro model; finite sites are summed out.
        potential_fn: In place of a model, a function from the unconstrained values of one chain, by name, to minus the
            log density. ``initial_params`` (chains, \*shape) must then be set.
        num_chains: Number of chains. They share the metric, and are independent given it.
        step_size: Step size from which the first one is looked for.
        target_accept_prob: Target of the acceptance probability, averaged over the trajectory.
        full_mass: Whether the metric is dense. Default: dense up to 200 dimensions.
        max_tree_depth: Maximum number of times that a trajectory is doubled.
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

    Further statistics under ``sample``: ``tree_depth`` and ``reached_max_treedepth``.

    References: Hoffman and Gelman 2014 (https://jmlr.org/papers/v15/hoffman14a.html); Betancourt 2017
    (https://arxiv.org/abs/1701.02434); Phan, Pradhan and Jankowiak 2019 (https://arxiv.org/abs/1912.11554).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([1.0, 3.0])).to_event(1))
        >>> pyro.set_rng_seed(0)
        >>> mcmc = pyro.infer.MCMC(NUTS(model, jit_compile=False), num_samples=50, warmup_steps=100,
        ...     disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([50, 4, 2])
    """

    lengths = (1000, 1000, 4)
    block = BLOCK
    transitions, moves = staticmethod(run_trees), TreeMoves
    overhead, expected = OPERATIONS, policy.NUTS_GRADIENTS

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        max_tree_depth: int = 10,
        **settings: Any,
    ) -> None:
        super().__init__(model, potential_fn, **settings)
        check_count("max_tree_depth", max_tree_depth)
        self.max_tree_depth = max_tree_depth

    def logging(self) -> OrderedDict[str, str]:
        """Mean step size, leapfrog steps and acceptance probability, for a progress bar."""
        step, steps, acceptance = (
            float(getattr(self._latest, n).mean()) for n in ("step_size", "leapfrogs", "acceptance")
        )
        return OrderedDict({"step size": f"{step:.2e}", "steps": f"{steps:.0f}", "acc. prob": f"{acceptance:.3f}"})

    def _plan(self) -> None:
        self._renewals = _renewals(self._warmup, self.block)
        self._restart_steps(torch.full((self.num_chains,), math.log(self._first_step)).to(self._density.like))

    def _rules(self, learning: bool) -> Tensor:
        return self._density.like.new_tensor([self._target, learning])

    def _noise(self) -> TreeNoise:
        like, dim, chains = self._density.like, *self._chains.position.shape
        uniforms = like.new_empty((3, self.block, self.max_tree_depth, chains)).uniform_().unbind()
        return TreeNoise(like.new_empty((self.block, dim, chains)).normal_(), *(u.clone() for u in uniforms))

    def _adapt(self) -> None:
        if self._taken not in self._renewals:
            return
        # What came before the first window is not of the posterior.
        if self._taken > min(self._renewals):
            draws = torch.cat([b.flatten(0, 1) for b in self._window]).double()
            self._metric, _ = learn(draws[draws.isfinite().all(-1)], self._metric)
            self._restart_steps(StepSize(*self._tuning).log_step)
        self._window.clear()

    def _settle(self) -> None:
        learnt = StepSize(*self._tuning)
        self._tuning = torch.stack(learnt._replace(log_step=learnt.log_step_mean))

    def _sizes(self) -> tuple[Any, ...]:
        return self.block, self.max_tree_depth

    def _statistics(self, moves: TreeMoves) -> dict[str, Tensor]:
        depth = moves.depth.long()
        cut = depth >= self.max_tree_depth
        return {**super()._statistics(moves), "tree_depth": depth, "reached_max_treedepth": cut}

    def _restart_steps(self, log_step: Tensor) -> None:
        """Double or halve step sizes until the acceptance of one step crosses its bound, and adapt from there."""
        chains, metric = self._chains, self._metric
        normal = torch.randn_like(chains.position)
        momentum = times(normal, metric.root)
        up: Tensor | None = None
        found = torch.zeros_like(log_step, dtype=torch.bool)
        for _ in range(DOUBLINGS):
            step = log_step.exp()
            half = momentum - 0.5 * step * chains.gradient
            energy, gradient = self._density.run((chains.position + step * times(half, metric.covariance)).mT)
            end = half - 0.5 * step * gradient.mT
            velocity = times(end, metric.covariance)
            gain = chains.energy - energy - 0.5 * ((end * velocity).sum(0) - normal.square().sum(0))
            good = gain.nan_to_num(-math.inf, -math.inf, -math.inf) > math.log(STEP_ACCEPTANCE)
            up = good if up is None else up
            found = found | (good != up)
            if bool(found.all()):
                break
            log_step = torch.where(found, log_step, log_step + torch.where(up, 1.0, -1.0) * math.log(2.0))
        self._tuning = fresh_steps(log_step)


def _renewals(warmup: int, block: int) -> set[int]:
    """Transitions after which the metric is renewed, the first of them the start of the first window.

    As in Stan: a start, windows each twice as long as the one before, and an end. In a short warmup they are 15, 75 and
    10 percent.
    """
    start, window, end = START, FIRST_WINDOW, END
    if start + window + end > warmup:
        start, end = int(0.15 * warmup), int(0.1 * warmup)
        window = warmup - start - end
    last = (warmup - end) // block * block
    times, at = [], -(-start // block) * block
    if at >= last:
        return set()
    while at < last:
        times.append(at)
        # A window that would leave less than the next one needs takes all.
        at = at + window if at + 3 * window <= last else last
        at, window = -(-at // block) * block, 2 * window
    return {*times, last}
