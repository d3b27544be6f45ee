r"""Run a kernel of one chain several times, in one process per core (Pyro's own runner leaves one core idle).

Each chain has its own seed, so that draws do not depend on the number of cores.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc import HMC
from pyro.infer.mcmc.rwkernel import RandomWalkKernel
from torch import Tensor

from inference.compiler import policy
from inference.compiler.potential import compile_kernel, refuse_difference
from inference.compiler.supports import MovingSupports, follow_supports
from inference.core.bound import BoundPair
from inference.core.contracts import Kernel
from inference.core.handlers import first_valid
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
    threads_set,
)


@dataclass(frozen=True)
class _Further(FurtherDraws):
    """Further draws of chains in processes, of which a file holds nothing."""

    function: Callable[[int, int], dict[str, Tensor]]

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """So many draws of the latent sites."""
        return self.function(size, seed)


@dataclass
class Chain:
    """One chain: draws (draws, \\*shape), statistics (draws,), seconds of set-up, last state, adaptation, warnings."""

    draws: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    setup: float
    position: dict[str, np.ndarray]
    adaptation: dict[str, Any]
    warned: tuple[str, ...] = ()


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
    started = perf_counter()
    draws, warmup, chains = lengths(LENGTHS, draws, warmup, chains)
    workers = min(chains, cores()) if _can_fork(bound) else 1
    potential, how = _prepare(bound, factory, warmup, -(-chains // workers) * (warmup + draws), mode, workers)
    run = partial(_run_chain, bound, factory, draws=draws, warmup=warmup, potential=potential)
    prepared = perf_counter() - started
    finished = _run_all(bound, run, chains, workers, seed, warmup + draws, progress)
    names = [n for n in bound.sites if n in finished[0].draws]

    def joined(chains: list[Chain]) -> dict[str, Tensor]:
        return {n: torch.cat([torch.as_tensor(c.draws[n]) for c in chains]).to(bound.device) for n in names}

    def further(size: int, seed: int) -> dict[str, Tensor]:
        per_chain = -(-size // len(finished))
        seeds = _seeds([seed, 1], len(finished))
        with torch.enable_grad():
            silent = partial(run, lambda *_: None, draws=per_chain, warmup=0)
            finished_later = [silent(s, start=c) for s, c in zip(seeds, finished, strict=True)]
        return {n: v[:size] for n, v in joined(finished_later).items()}

    stats = {n: np.stack([c.stats[n] for c in finished]) for n in finished[0].stats}
    setup = prepared + max(chain.setup for chain in finished)
    return ChainRun(joined(finished), stats, chains, setup, how, method_of(factory), _Further(further))


def _run_chain(
    bound: BoundPair,
    factory: KernelFactory,
    say: Callable[[int, str], None],
    seed: int,
    *,
    draws: int,
    warmup: int,
    potential: Any = None,
    start: Chain | None = None,
) -> Chain:
    """Run one chain from its own seed, or continue the chain ``start``."""
    started = perf_counter()
    pyro.set_rng_seed(seed)
    kernel = kernel_of(bound, factory)
    if start is not None:
        kernel.initial_params = {n: torch.as_tensor(v).to(bound.device) for n, v in start.position.items()}
    moving = _set_up(kernel, warmup)
    watched = _Watched(kernel, potential, moving)
    if start is not None:
        watched.adapt(start.adaptation, bound.device)
    params, states, stats = kernel.initial_params, [], []
    watched.check(params)
    set_up = perf_counter()
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
    return Chain(watched.values(states), watched.columns(stats), set_up - started, position, watched.adaptation())


class _Watched:
    """A kernel of one chain after ``setup``, and what is read from it.

    What Pyro keeps in attributes of its own kernels is read here and in :func:`_set_up` alone. Calls of the potential
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


def _prepare(
    bound: BoundPair, factory: KernelFactory, warmup: int, transitions: int, mode: bool | str, workers: int
) -> tuple[Any, str]:
    """Compile the potential once for all chains; return it, or None, and how it runs."""
    if mode is False:
        return None, "eager"
    # A forked process cannot run a program that was compiled for several threads.
    with threads_set(1 if workers > 1 else most_threads()), _quiet_start():
        kernel = kernel_of(bound, factory)
        _set_up(kernel, warmup)
        how = compile_kernel(kernel, policy.NUTS_GRADIENTS * transitions, mode)
    return (None if how == "eager" else kernel.potential_fn), how  # type: ignore[attr-defined]


def _set_up(kernel: Any, warmup: int) -> MovingSupports | None:
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
    with _quiet_start():
        kernel.setup(warmup)
    if isinstance(kernel, RandomWalkKernel):
        moving = follow_supports(kernel.potential_fn, kernel._prototype_trace)
        kernel.potential_fn = moving or kernel.potential_fn
    return moving


@contextmanager
def _quiet_start() -> Iterator[None]:
    with warnings.catch_warnings():
        # Random starts of a badly scaled model overflow; Pyro tries again, and raises an error if it gives up.
        warnings.filterwarnings("ignore", message="Encountered")
        yield


def _run_all(
    bound: BoundPair, run: Callable[..., Chain], chains: int, workers: int, seed: int, length: int, progress: bool
) -> list[Chain]:
    seeds = _seeds(seed, chains)
    with Bars(bound, chains, length, progress) as show:
        if workers == 1:
            return [run(partial(show, k), s) for k, s in enumerate(seeds)]
        return list(_in_processes(run, seeds, workers, show))


def _seeds(seed: int | list[int], count: int) -> list[int]:
    return [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(count)]


def _can_fork(bound: BoundPair) -> bool:
    # A forked process cannot use its parent's accelerator, and macOS aborts forks that touch its frameworks.
    return sys.platform.startswith("linux") and bound.device.type == "cpu" and not torch.cuda.is_initialized()


def _in_processes(
    run: Callable[..., Chain], seeds: list[int], workers: int, show: Callable[[int, int, str], None]
) -> Iterator[Chain]:
    context = mp.get_context("fork")
    waiting = list(enumerate(seeds))
    running: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Chain] = {}
    threads = max(1, cores() // workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                k, seed = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                work = partial(_work, run, seed, theirs, threads, [ours, *running])
                process = context.Process(target=work, daemon=True)
                process.start()
                theirs.close()
                running[ours] = (k, process)
            for ready in wait(list(running)):
                k, process = running[ready]
                answer = _receive(ready, k, process)
                if isinstance(answer, tuple):
                    show(k, *answer)
                else:
                    done[k] = answer
                    for text in answer.warned:
                        warnings.warn(f"chain {k}: {text}", stacklevel=2)
                    process.join()
                    running.pop(ready)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return (done[k] for k in range(len(seeds)))


def _receive(ours: Any, chain: int, process: Any) -> Any:
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"chain {chain} ended without an answer (exit code {process.exitcode})") from None
    if isinstance(answer, str):
        raise RuntimeError(f"chain {chain}: {answer}")
    return answer


def _work(run: Callable[..., Chain], seed: int, out: Connection, threads: int, parents: list[Any]) -> None:
    """Body of a chain's process: sends progress as tuples, and then the chain, or the text of an error.

    Warnings go to the parent with the chain: on the standard error of a process nobody may see them, as in a notebook.
    The parent's ends of the pipes, ``parents``, are closed: then writing fails when the parent is gone, and the process
    ends; with a reader of its own it would wait for ever.
    """
    for end in parents:
        end.close()
    # Ctrl-C reaches every process of a terminal: the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    last = [perf_counter()]

    def say(step: int, text: str) -> None:
        if perf_counter() - last[0] > 0.1:
            last[0] = perf_counter()
            out.send((step, text))

    try:
        with warnings.catch_warnings(record=True) as caught:
            chain = run(say, seed)
        out.send(replace(chain, warned=tuple(str(w.message) for w in caught)))
    except BrokenPipeError:
        pass
    except Exception as error:
        kind = type(error).__name__
        out.send(f"{kind}: {error}" if str(error) else traceback.format_exc(limit=-1))
    finally:
        out.close()
