r"""One chain of a kernel that runs a single chain, and what is read from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc import HMC
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from torch import Tensor

from inference.compiler.potential import refuse_difference
from inference.compiler.supports import MovingSupports, follow_supports, images_as_supports
from inference.core.bound import BoundPair
from inference.core.contracts import Kernel
from inference.core.handlers import first_valid
from inference.runners.base import KernelFactory, kernel_of


@dataclass
class Chain:
    """One chain: draws (draws, \\*shape), statistics (draws,), when it began to move, last state, adaptation."""

    draws: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    began: float
    position: dict[str, np.ndarray]
    adaptation: dict[str, Any]


def run_chain(
    bound: BoundPair,
    factory: KernelFactory,
    say: Callable[[int, str], None],
    *,
    draws: int,
    warmup: int,
    potential: Any = None,
    start: Chain | None = None,
) -> Chain:
    """Run one chain, or continue the chain ``start``."""
    kernel = kernel_of(bound, factory)
    if start is not None:
        kernel.initial_params = {n: torch.as_tensor(v).to(bound.device) for n, v in start.position.items()}
    moving = set_up(kernel, warmup)
    watched = _Watched(kernel, potential, moving)
    if start is not None:
        watched.adapt(start.adaptation, bound.device)
    params, states, stats = kernel.initial_params, [], []
    watched.check(params)
    began = time()
    # The set-up has validated the model; validating every leapfrog step would cost as much as the step.
    with pyro.validation_enabled(False):
        for t in range(warmup + draws):
            if t == warmup:
                watched.check(params)
                kernel.end_warmup()
            params = kernel.sample(params)
            say(t + 1, ", ".join(f"{k} {v}" for k, v in (kernel.logging() or {}).items()))
            last = watched.statistics()
            if t >= warmup:
                states.append(params)
                stats.append(last)
        watched.check(params)
    position = {n: v.detach().cpu().numpy() for n, v in params.items()}
    return Chain(watched.values(states), watched.columns(stats), began, position, watched.adaptation())


class _Watched:
    """A kernel of one chain after ``setup``, and what is read from it.

    What Pyro keeps in attributes of its own kernels is read here and in :func:`set_up` alone. Calls of the potential
    are counted: there is one per leapfrog step.

    Args:
        kernel: The kernel.
        potential: Potential in place of the kernel's own.
        moving: The potential of a model whose supports move.
    """

    def __init__(self, kernel: Any, potential: Any = None, moving: MovingSupports | None = None) -> None:
        self._kernel, self._moving = kernel, moving
        self._hmc: Any = kernel if isinstance(kernel, HMC) else None
        self._averages = isinstance(kernel, HMC | RandomWalkKernel)
        self._own: Any = Kernel.of(kernel).potential_fn
        self._potential: Any = potential or self._own
        self._calls, self._energies = 0, list[float]()
        if self._hmc is not None:
            self._kinetic: Any = self._hmc._kinetic_energy
            self._hmc._kinetic_energy = self._measured  # type: ignore[method-assign]
        if self._potential is not None:
            self._kernel.potential_fn = self._counted

    def _counted(self, values: Any) -> Tensor:
        self._calls += 1
        return self._potential(values)

    def _measured(self, momenta: Any) -> Tensor:
        """Kinetic energy; that at the start of a transition, whose potential energy is known, is kept with it."""
        kinetic = self._kinetic(momenta)
        if not self._energies:
            self._energies.append(float(kinetic) + float(self._hmc._potential_energy_last))
        return kinetic

    def check(self, values: dict[str, Tensor]) -> None:
        """Compare a program in place of the kernel's own potential with that, where the chain is.

        A program compares itself with the potential that it was made of, but not at its last calls. This one was set up
        by the chain.

        Raises:
            Untraceable: They differ.
        """
        if self._potential is not self._own:
            with torch.no_grad():
                got, expected = (p(values).reshape(1) for p in (self._potential, self._own))
            refuse_difference(got, expected)

    def statistics(self) -> dict[str, float]:
        """Statistics of the last transition."""
        stats: dict[str, float] = {} if self._potential is None else {"n_steps": self._calls}
        self._calls = 0
        if self._hmc is not None:
            stats |= {"step_size": float(self._hmc.step_size), "lp": -float(self._hmc._potential_energy_last)}
            stats["energy"] = self._energies.pop() if self._energies else math.nan
        if self._averages:
            stats["mean_acceptance"] = float(self._kernel._mean_accept_prob)
        return stats

    def columns(self, stats: list[dict[str, float]]) -> dict[str, np.ndarray]:
        """Statistics of all draws (draws,): the acceptance from its running mean, divergences from the kernel."""
        columns = {n: np.array([s[n] for s in stats]) for n in (stats[0] if stats else ())}
        columns["diverging"] = np.isin(np.arange(len(stats)), self._kernel.diagnostics().get("divergences", []))
        if "mean_acceptance" in columns:
            sums = columns.pop("mean_acceptance") * np.arange(1, len(stats) + 1)
            columns["acceptance_rate"] = np.diff(sums, prepend=0.0).clip(0, 1)
        return columns

    def values(self, states: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
        r"""Constrained values by site (draws, \*shape) of unconstrained states."""
        transforms = Kernel.of(self._kernel).transforms or {}
        stacked = {n: torch.stack([s[n] for s in states]) for n in (states[0] if states else ())}
        if self._moving is not None and stacked:
            values = self._moving.constrain(stacked)
        else:
            values = {n: transforms[n].inv(v) if n in transforms else v for n, v in stacked.items()}
        return {n: v.detach().cpu().numpy() for n, v in values.items()}

    def adaptation(self) -> dict[str, Any]:
        """Step size and inverse mass matrix of HMC and NUTS."""
        if self._hmc is None:
            return {}
        metric = {k: v.detach().cpu().numpy() for k, v in self._hmc.inverse_mass_matrix.items()}
        return {"step_size": self._hmc.step_size, "inverse_mass_matrix": metric}

    def adapt(self, adaptation: Mapping[str, Any], device: torch.device) -> None:
        """Take over the :meth:`adaptation` of another kernel."""
        if self._hmc is not None:
            metric = adaptation["inverse_mass_matrix"]
            moved = {k: torch.as_tensor(v).to(device) for k, v in metric.items()}
            self._hmc.mass_matrix_adapter.inverse_mass_matrix = moved
            self._hmc._adapter.step_size = adaptation["step_size"]


def set_up(kernel: Any, warmup: int) -> MovingSupports | None:
    """Set a kernel up; return its potential where supports move and Pyro chose the transforms."""
    moving: MovingSupports | None = None

    def follow(*arguments: Any) -> None:
        nonlocal moving
        chosen = kernel.transforms
        first_valid(partial(initialize, *arguments))
        moving = None if chosen else follow_supports(kernel.potential_fn, kernel._prototype_trace)
        kernel.potential_fn = moving or kernel.potential_fn

    if isinstance(kernel, HMC):
        # Pyro's set-up looks for a step size: already that has to follow the supports.
        initialize = kernel._initialize_model_properties
        kernel._initialize_model_properties = follow  # type: ignore[method-assign]
    with quiet_start(), images_as_supports():
        kernel.setup(warmup)
    if isinstance(kernel, RandomWalkKernel):
        moving = follow_supports(kernel.potential_fn, kernel._prototype_trace)
        kernel.potential_fn = moving or kernel.potential_fn
    return moving


@contextmanager
def quiet_start() -> Iterator[None]:
    with warnings.catch_warnings():
        # Random starts of a badly scaled model overflow; Pyro tries again, and raises an error if it gives up.
        warnings.filterwarnings("ignore", message="Encountered")
        yield
