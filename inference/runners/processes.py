r"""Run a kernel of one chain several times: side by side in worker processes, or one after another in this one.

Each chain has its own seed, as many threads, and the same parameters to start with: draws do not depend on how many
chains run at once, nor on where.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc import HMC
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from torch import Tensor

from inference.compiler import policy
from inference.compiler.potential import compile_kernel
from inference.core.bound import BoundPair
from inference.core.handlers import first_valid, isolated, threads_set
from inference.core.private import lacking
from inference.further import FurtherDraws
from inference.runners.base import (
    LENGTHS,
    Bars,
    ChainRun,
    KernelFactory,
    cores,
    kernel_of,
    lengths,
    method_of,
    most_threads,
)
from inference.runners.chain import Chain, quiet_start, run_chain, set_up
from inference.runners.work import Counted
from inference.runners.workers import Say, side_by_side, start_workers


def run_processes(
    bound: BoundPair,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    seed: int,
    mode: bool | str,
    progress: bool,
) -> ChainRun:
    """Run a kernel of one chain once per chain; lengths that are None are its defaults."""
    started = time()
    draws, warmup, chains = lengths(LENGTHS, draws, warmup, chains)
    state, operations = _first_run(bound)
    most = min(chains, cores())
    threads = policy.threads_of_fit(bound.numel, max(1, most_threads() // most))
    calls = policy.NUTS_GRADIENTS * chains * (warmup + draws)
    run = _Chains(bound, factory, draws, warmup, seed, state, mode, calls)
    gradients = _gradients(kernel_of(bound, factory), chains * (warmup + draws))
    workers = most if _pays(bound, gradients, operations, most) else 1
    start_workers(workers)
    with threads_set(threads):
        how = run.prepare()
    with Bars(bound, chains, warmup + draws, progress) as show:
        seeds = _seeds(seed, chains)
        finished = side_by_side(run, seeds, workers, threads=threads, show=show, name="chain")
    names = [n for n in bound.sites if n in finished[0].draws]
    stats = {n: np.stack([c.stats[n] for c in finished]) for n in finished[0].stats}
    setup = min(c.began for c in finished) - started
    more = _Further(replace(run, warmup=0), seed, threads, finished, tuple(names))
    return ChainRun(more.joined(finished), stats, chains, setup, how, method_of(factory), more)


@dataclass
class _Chains:
    """Runs chains of a kernel, in any process.

    Attributes:
        bound: The pair and its data.
        factory: Builds the kernel.
        draws: Draws of a chain.
        warmup: Draws before them.
        seed: Seed of the start at which a program in place of the potential is made.
        state: Parameters of the model, with which every chain starts.
        mode: How the potential runs: ``compile`` of the verb.
        calls: Calls of the potential, in all chains, for which it is compiled. How many of them a process makes would
            depend on the number of processes, and what is compiled has other last digits.
        program: In place of the potential; each process makes its own, once.
    """

    bound: BoundPair
    factory: KernelFactory
    draws: int
    warmup: int
    seed: int
    state: Any
    mode: bool | str
    calls: int
    program: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "program": None}

    def prepare(self) -> str:
        """Make the program; return how it runs."""
        if self.mode is False:
            return "eager"
        with isolated(self.seed), quiet_start():
            pyro.get_param_store().set_state(self.state)
            kernel = kernel_of(self.bound, self.factory)
            set_up(kernel, self.warmup)
            how = compile_kernel(kernel, self.calls, self.mode)
        if how == "eager":
            self.mode = False
        else:
            self.program = kernel.potential_fn
        return how

    def __call__(self, seed: int, say: Say, start: Chain | None = None) -> Chain:
        """Run one chain from its own seed, or continue the chain ``start``."""
        if self.program is None:
            self.prepare()
        with isolated(seed):
            pyro.get_param_store().set_state(self.state)
            lengths = {"draws": self.draws, "warmup": self.warmup}
            return run_chain(self.bound, self.factory, say, **lengths, potential=self.program, start=start)


@dataclass(frozen=True)
class _Further(FurtherDraws):
    """Further draws of chains in processes, of which a file holds nothing."""

    run: _Chains
    seed: int
    threads: int
    finished: list[Chain]
    names: tuple[str, ...]

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """So many draws of the latent sites."""
        run = replace(self.run, draws=-(-size // len(self.finished)))
        with torch.enable_grad(), threads_set(self.threads):
            chains = zip(_seeds([seed, 1], len(self.finished)), self.finished, strict=True)
            later = [run(s, lambda *_: None, start=chain) for s, chain in chains]
        return {n: v[:size] for n, v in self.joined(later).items()}

    def joined(self, chains: list[Chain]) -> dict[str, Tensor]:
        """The draws of chains by site, chain after chain."""
        place = self.run.bound.device
        return {n: torch.cat([torch.as_tensor(c.draws[n]) for c in chains]).to(place) for n in self.names}


def _first_run(bound: BoundPair) -> tuple[Any, int]:
    """Parameters as the first run of the model makes them, and operations of that run; 0 where they are not counted."""

    def scored() -> Any:
        trace = poutine.trace(bound.model).get_trace(**bound.arguments())
        trace.compute_log_prob()
        return trace

    if lacking():
        first_valid(scored)
        return pyro.get_param_store().get_state(), 0
    with Counted() as counted:
        first_valid(scored)
    return pyro.get_param_store().get_state(), counted.operations


def _gradients(kernel: Any, transitions: int) -> int:
    """Gradients that lie ahead; 0 where nothing is known of them."""
    if isinstance(kernel, HMC):
        return policy.NUTS_GRADIENTS * transitions
    return transitions if isinstance(kernel, RandomWalkKernel) else 0


def _pays(bound: BoundPair, gradients: int, operations: int, workers: int) -> bool:
    """Whether the chains are to run in processes."""
    # Processes would share the device, and each hold its own context and copy of the data.
    if bound.device.type != "cpu" or workers == 1:
        return False
    return not gradients or not operations or policy.worth_processes(gradients, operations, workers)


def _seeds(seed: int | list[int], count: int) -> list[int]:
    return [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(count)]
