r"""Chains of a kernel that runs one: side by side in processes of our own, one a core (Pyro's own keep a core back).

Each has a seed of its own, so that the draws do not depend on how many cores there are.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.compiler.potential import compile_kernel
from inference.core.bound import BoundPair
from inference.runners.base import Bars, ChainRun, KernelFactory, lengths, method_of, threads_set

LEAPFROGS = 12
"""Gradients that a transition is taken to cost: a tree of NUTS has mostly 7 or 15."""


@dataclass
class Chain:
    """One chain's draws (draws, \\*shape), statistics (draws,), and where and how it stands."""

    draws: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    setup: float
    position: dict[str, np.ndarray]
    adaptation: dict[str, Any]


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
    """Run a kernel of one chain once a chain."""
    started = perf_counter()
    draws, warmup, chains = lengths(False, draws, warmup, chains)
    workers = min(chains, _cores()) if _can_fork(bound) else 1
    potential, how = _prepare(bound, factory, warmup, -(-chains // workers) * (warmup + draws), mode, workers)
    run = partial(_run_chain, bound, factory, draws=draws, warmup=warmup, potential=potential)
    prepared = perf_counter() - started
    done = _run_all(bound, run, chains, workers, seed, warmup + draws, progress)
    names = [n for n in bound.sites if n in done[0].draws]

    def joined(chains: list[Chain]) -> dict[str, Tensor]:
        return {n: torch.cat([torch.as_tensor(c.draws[n]) for c in chains]) for n in names}

    def more(size: int, seed: int) -> dict[str, Tensor]:
        each = -(-size // len(done))
        seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence([seed, 1]).spawn(len(done))]
        with torch.enable_grad():
            silent = partial(run, lambda *_: None, draws=each, warmup=0)
            on = [silent(s, start=c) for s, c in zip(seeds, done, strict=True)]
        return {n: v[:size] for n, v in joined(on).items()}

    stats = {n: np.stack([c.stats[n] for c in done]) for n in done[0].stats}
    setup = prepared + max(chain.setup for chain in done)
    return ChainRun(joined(done), stats, chains, setup, how, method_of(factory), more)


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
    """Run one chain from its own seed, or on from where ``start`` stands."""
    started = perf_counter()
    pyro.set_rng_seed(seed)
    kernel = factory(partial(bound.model, **bound.arguments()))
    if start is not None:
        kernel.initial_params = {n: torch.as_tensor(v) for n, v in start.position.items()}
    with _quiet_start():
        kernel.setup(warmup)
    if start is not None:
        _readapt(kernel, start.adaptation)
    if potential is not None:
        kernel.potential_fn = potential  # type: ignore[attr-defined]
    steps = _count_steps(kernel)
    params, kept = kernel.initial_params, []
    set_up = perf_counter()
    # The set-up has validated the model; validating every leapfrog step would cost as much as the step.
    with pyro.validation_enabled(False):
        for t in range(warmup + draws):
            if t == warmup:
                kernel.end_warmup()
            params = kernel.sample(params)
            say(t + 1, ", ".join(f"{k} {v}" for k, v in (kernel.logging() or {}).items()))
            statistics = _statistics(kernel, steps)
            if t >= warmup:
                kept.append((params, statistics))
    transforms = getattr(kernel, "transforms", None) or {}
    values = {n: torch.stack([p[n] for p, _ in kept]) for n in params}
    position = {n: v.detach().cpu().numpy() for n, v in params.items()}
    stats = {n: np.array([s[n] for _, s in kept]) for n in (kept[0][1] if kept else ())}
    stats["diverging"] = np.isin(np.arange(draws), kernel.diagnostics().get("divergences", []))
    if "mean_acceptance" in stats:
        counts = np.arange(1, draws + 1)
        sums = stats.pop("mean_acceptance") * counts
        stats["acceptance_rate"] = np.diff(sums, prepend=0.0).clip(0, 1)
    drawn = {n: (transforms[n].inv(v) if n in transforms else v).detach().cpu().numpy() for n, v in values.items()}
    return Chain(drawn, stats, set_up - started, position, _adaptation(kernel))


def _prepare(
    bound: BoundPair, factory: KernelFactory, warmup: int, transitions: int, mode: bool | str, workers: int
) -> tuple[Any, str]:
    """Compile the potential once for all chains: the program, or None, and what was chosen."""
    if mode is False:
        return None, "eager"
    # A process that was forked can run no program that was compiled for several threads.
    with threads_set(1 if workers > 1 else torch.get_num_threads()), _quiet_start():
        kernel = factory(partial(bound.model, **bound.arguments()))
        kernel.setup(warmup)
        how = compile_kernel(kernel, LEAPFROGS * transitions, mode)
    return (None if how == "eager" else kernel.potential_fn), how  # type: ignore[attr-defined]


@contextmanager
def _quiet_start() -> Iterator[None]:
    with warnings.catch_warnings():
        # Random starts of a badly scaled model overflow; Pyro tries again, and says so if it gives up.
        warnings.filterwarnings("ignore", message="Encountered")
        yield


def _count_steps(kernel: Any) -> list[int]:
    """Count the calls of the kernel's potential: one a leapfrog step."""
    count = [0]
    potential = getattr(kernel, "potential_fn", None)
    if potential is not None:

        def counted(params: Any) -> Tensor:
            count[0] += 1
            return potential(params)

        kernel.potential_fn = counted
    return count


def _statistics(kernel: Any, steps: list[int]) -> dict[str, float]:
    taken, steps[0] = steps[0], 0
    stats: dict[str, float] = {"n_steps": taken} if hasattr(kernel, "potential_fn") else {}
    if hasattr(kernel, "step_size"):
        stats["step_size"] = float(kernel.step_size)
    # Pyro keeps the acceptance as a running mean and the last energy in its cache only.
    if hasattr(kernel, "_mean_accept_prob"):
        stats["mean_acceptance"] = float(kernel._mean_accept_prob)
    if getattr(kernel, "_potential_energy_last", None) is not None:
        stats["lp"] = -float(kernel._potential_energy_last)
    return stats


def _adaptation(kernel: Any) -> dict[str, Any]:
    if not hasattr(kernel, "mass_matrix_adapter"):
        return {}
    metric = {k: v.detach().cpu().numpy() for k, v in kernel.inverse_mass_matrix.items()}
    return {"step_size": kernel.step_size, "inverse_mass_matrix": metric}


def _readapt(kernel: Any, adaptation: Mapping[str, Any]) -> None:
    if adaptation:
        metric = adaptation["inverse_mass_matrix"]
        kernel.mass_matrix_adapter.inverse_mass_matrix = {k: torch.as_tensor(v) for k, v in metric.items()}
        kernel._adapter.step_size = adaptation["step_size"]


def _run_all(
    bound: BoundPair, run: Callable[..., Chain], chains: int, workers: int, seed: int, length: int, progress: bool
) -> list[Chain]:
    seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(chains)]
    with Bars(bound, chains, length, progress) as show:
        if workers == 1:
            return [run(partial(show, k), s) for k, s in enumerate(seeds)]
        return list(_in_processes(run, seeds, workers, show))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_fork(bound: BoundPair) -> bool:
    # A forked process shares no accelerator, and macOS aborts forks that touch its frameworks.
    on_cpu = all(v.device.type == "cpu" for v in bound.data.values() if isinstance(v, Tensor))
    return sys.platform.startswith("linux") and on_cpu and not torch.cuda.is_initialized()


def _in_processes(
    run: Callable[..., Chain], seeds: list[int], workers: int, show: Callable[[int, int, str], None]
) -> Iterator[Chain]:
    context = mp.get_context("fork")
    waiting = list(enumerate(seeds))
    running: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Chain] = {}
    threads = max(1, _cores() // workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                k, seed = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(run, seed, theirs, threads), daemon=True)
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


def _work(run: Callable[..., Chain], seed: int, out: Connection, threads: int) -> None:
    """Body of a chain's process: progress goes out as tuples, the chain at the end, or an error's text."""
    torch.set_num_threads(threads)
    last = [perf_counter()]

    def say(step: int, text: str) -> None:
        if perf_counter() - last[0] > 0.1:
            last[0] = perf_counter()
            out.send((step, text))

    try:
        out.send(run(say, seed))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        kind = type(error).__name__
        out.send(f"{kind}: {error}" if str(error) else traceback.format_exc(limit=-1))
    finally:
        out.close()
