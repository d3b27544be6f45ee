r"""Markov chains: one loop for every kernel.

A kernel is a subclass of ``pyro.infer.mcmc.mcmc_kernel.MCMCKernel``. A batched kernel (``ChEES``) holds all chains
in one tensor. Chains of another run side by side in processes of our own, one a core (Pyro's own keep a core back),
and each has a seed of its own, so that the draws do not depend on how many cores there are.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import NUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from inference.diagnostics import diagnose
from inference.kernels.chees import ChEES
from inference.kernels.trajectory import Moves
from inference.potential import choose, compile_kernel
from inference.program import Program, bind, isolated
from inference.result import Result, State, to_idata
from inference.tracing import Untraceable

LEAPFROGS = 12
"""Gradients that a transition is taken to cost when the work ahead is estimated."""
SMALL = 10_000_000
"""Numbers of the data times chains up to which one thread runs a batched kernel: to meet at the end of every operation
costs several threads more than the operation, and many times more on a busy machine."""
HEAVY = 100_000
"""Numbers of the data times chains at which a traced gradient spends as long in arithmetic as in dispatch: a fused one,
which passes over the numbers once, saves both."""
FEWEST = 8
"""Chains from which the default kernel is ChEES: fewer have little to learn from each other."""
LENGTHS = {True: (250, 300, 64), False: (1000, 1000, 4)}
"""Draws, warmup and chains that a batched kernel, and another, choose."""
KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


@dataclass
class Chain:
    """One chain's draws (draws, \\*shape), statistics (draws,), and where and how it stands."""

    draws: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    setup: float
    position: dict[str, np.ndarray]
    adaptation: dict[str, Any]


@dataclass
class Made:
    r"""What the chains made: draws (chains * draws, \*shape), statistics (chains, draws), and how to go on."""

    draws: dict[str, Tensor]
    stats: dict[str, np.ndarray]
    chains: int
    setup: float
    program: str
    method: str
    more: Callable[[int, int], dict[str, Tensor]]
    restarted: int = 0


def sample(
    pair: Any,
    data: Any = None,
    kernel: KernelFactory | None = None,
    *,
    draws: int | None = None,
    warmup: int | None = None,
    chains: int | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool = True,
) -> Result:
    r"""Sample the posterior of a model by Markov chains.

    Finite latent sites are summed out exactly; their posterior is drawn afterwards. The guide, if there
    is one, is not used.

    Args:
        pair: A pair, a ``(model, guide)`` tuple or a bare model.
        data: A tensor (the model's first argument) or a mapping of names to tensors.
        kernel: A factory from the model to an MCMCKernel: ``ChEES``, ``NUTS``, ``HMC``, or
            ``partial(NUTS, target_accept_prob=0.95)``. None: ChEES, or NUTS where fewer than eight chains are asked
            for or the model cannot be traced (one warning says why).
        draws: Draws a chain to keep. None: 250 of ChEES, 1000 of another kernel.
        warmup: Draws a chain to adapt with and drop. None: 300 of ChEES, 1000 of another kernel.
        chains: Number of chains. None: 64 of ChEES, which holds them in one tensor, 4 of another kernel, as many at
            once as there are cores.
        seed: Seed of all randomness; the global random state is left as it was.
        compile: True: run the kernel's potential and its gradient, and whole transitions of ChEES, as one compiled
            program. "auto": where the work ahead is worth the cost of compiling. False: as Pyro runs it (ChEES runs
            the traced graph then).
        progress: Show a bar a chain, or one for all chains of ChEES, with step size and acceptance (on a terminal).

    Returns:
        A Result with ``sample_stats`` (acceptance_rate, diverging, step_size, n_steps, lp).

    Raises:
        ValueError: An argument does not fit, or a site cannot be sampled by the kernel.
        RuntimeError: A chain failed; the message is that of the chain.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> y = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])
        >>> result = sample(model, y, draws=500, warmup=200, chains=2, progress=False)
        >>> print(f"{result.draws['rate'].mean():.0f}", result.diagnosis.divergences)  # the exact mean is 16 / 6
        3 0
    """
    program = bind(pair, data)
    _check(program, kernel, compile, draws=draws, warmup=warmup, chains=chains)
    started = perf_counter()
    with isolated(seed):
        if kernel is None and (chains is None or chains >= FEWEST):
            try:
                made = _many(program, partial(ChEES, eager=False), draws, warmup, chains, compile, progress)
                return _conclude(program, made, perf_counter() - started)
            except Untraceable as error:
                warnings.warn(f"{program.name}: NUTS in place of ChEES, for it cannot be traced: {error}", stacklevel=2)
        factory = kernel or NUTS
        if isinstance(factory(partial(program.model, **program.arguments())), ChEES):
            made = _many(program, factory, draws, warmup, chains, compile, progress)
        else:
            made = _single(program, factory, draws, warmup, chains, seed, compile, progress)
        return _conclude(program, made, perf_counter() - started)


def _lengths(batched: bool, *asked: int | None) -> tuple[int, ...]:
    return tuple(own if n is None else n for n, own in zip(asked, LENGTHS[batched], strict=True))


def _many(
    program: Program,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    mode: bool | str,
    progress: bool,
) -> Made:
    """Run a kernel that holds all chains in one tensor."""
    started = perf_counter()
    kernel: Any = factory(partial(program.model, **program.arguments()))
    draws, warmup, chains = _lengths(True, draws, warmup, chains or kernel.num_chains)
    kernel.num_chains, kernel.jit_compile = chains, False
    threads = 1 if chains * program.numel < SMALL else torch.get_num_threads()
    with _threads(threads):
        kernel.setup(warmup)
        calls = LEAPFROGS * (warmup + draws)
        if choose(int(calls * (1 + chains * program.numel / HEAVY)), mode) == "fused":
            kernel.fuse()
    setup = perf_counter() - started

    def run(size: int, say: Callable[[int, int, str], None]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        blocks: list[Moves] = []
        done = 0
        with pyro.validation_enabled(False), _threads(threads):
            while (left := size - sum(len(b.energy) for b in blocks)) > 0:
                warming = kernel.warming
                block = kernel.advance()
                done += len(block.energy)
                say(0, done, ", ".join(f"{k} {v}" for k, v in kernel.logging().items()))
                if not warming:
                    blocks.append(Moves(*(v[:left] for v in block)))
        whole = Moves(*(torch.cat(v) for v in zip(*blocks, strict=True)))
        values = {n: v.transpose(0, 1).flatten(0, 1).cpu() for n, v in kernel.constrain(whole.position).items()}
        return values, _batch_statistics(whole)

    with _bars(program, 1, warmup + draws, progress) as show:
        values, stats = run(draws, show)
    state = kernel.state

    def more(size: int, seed: int) -> dict[str, Tensor]:
        kernel.state = state
        # One block's first draw of all chains, then the next: the last chains are not left out of a short answer.
        each = -(-size // chains)
        on = run(each, lambda *_: None)[0]
        return {n: v.unflatten(0, (chains, each)).transpose(0, 1).flatten(0, 1)[:size] for n, v in on.items()}

    return Made(values, stats, chains, setup, kernel.program, _method(factory), more, kernel.restarted)


def _batch_statistics(moves: Moves) -> dict[str, np.ndarray]:
    """Statistics (chains, draws) of moves (draws, chains)."""
    chains = moves.energy.shape[1]
    each = {
        "n_steps": moves.leapfrogs[:, None].expand(-1, chains).long(),
        "step_size": moves.step_size[:, None].expand(-1, chains),
        "lp": -moves.energy,
        "acceptance_rate": moves.acceptance,
        "diverging": moves.diverging,
    }
    return {n: v.T.cpu().numpy() for n, v in each.items()}


def _single(
    program: Program,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    seed: int,
    mode: bool | str,
    progress: bool,
) -> Made:
    """Run a kernel of one chain once a chain."""
    started = perf_counter()
    draws, warmup, chains = _lengths(False, draws, warmup, chains)
    workers = min(chains, _cores()) if _can_fork(program) else 1
    potential, how = _prepare(program, factory, warmup, -(-chains // workers) * (warmup + draws), mode, workers)
    run = partial(_run_chain, program, factory, draws=draws, warmup=warmup, potential=potential)
    prepared = perf_counter() - started
    done = _run_all(program, run, chains, workers, seed, warmup + draws, progress)
    names = [n for n in program.sites if n in done[0].draws]

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
    return Made(joined(done), stats, chains, setup, how, _method(factory), more)


def _method(factory: Any) -> str:
    return getattr(getattr(factory, "func", factory), "__name__", "MCMC")


def _run_chain(
    program: Program,
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
    kernel = factory(partial(program.model, **program.arguments()))
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
    program: Program, factory: KernelFactory, warmup: int, transitions: int, mode: bool | str, workers: int
) -> tuple[Any, str]:
    """Compile the potential once for all chains: the program, or None, and what was chosen."""
    if mode is False:
        return None, "eager"
    # A process that was forked can run no program that was compiled for several threads.
    with _threads(1 if workers > 1 else torch.get_num_threads()), _quiet_start():
        kernel = factory(partial(program.model, **program.arguments()))
        kernel.setup(warmup)
        how = compile_kernel(kernel, LEAPFROGS * transitions, mode)
    return (None if how == "eager" else kernel.potential_fn), how  # type: ignore[attr-defined]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    program: Program, run: Callable[..., Chain], chains: int, workers: int, seed: int, length: int, progress: bool
) -> list[Chain]:
    seeds = [int(s.generate_state(1)[0]) for s in np.random.SeedSequence(seed).spawn(chains)]
    with _bars(program, chains, length, progress) as show:
        if workers == 1:
            return [run(partial(show, k), s) for k, s in enumerate(seeds)]
        return list(_in_processes(run, seeds, workers, show))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_fork(program: Program) -> bool:
    # A forked process shares no accelerator, and macOS aborts forks that touch its frameworks.
    on_cpu = all(v.device.type == "cpu" for v in program.data.values() if isinstance(v, Tensor))
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


class _bars:
    """A progress bar for each chain."""

    def __init__(self, program: Program, chains: int, length: int, progress: bool) -> None:
        self._make = lambda k: tqdm(
            total=length, desc=f"{program.name} chain {k}", disable=None if progress else True, leave=False
        )
        self._chains, self._stack = chains, ExitStack()

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._bars = [self._stack.enter_context(self._make(k)) for k in range(self._chains)]
        return self._show

    def _show(self, chain: int, step: int, text: str) -> None:
        bar = self._bars[chain]
        if not bar.disable:
            bar.set_postfix_str(text, refresh=False)
            bar.update(step - bar.n)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _check(program: Program, factory: Any, compile: Any, **lengths: int | None) -> None:
    for name, least in (("draws", 4), ("warmup", 0), ("chains", 1)):
        value = lengths[name]
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile: expected True, False or "auto", got {compile!r}')
    if factory is not None and (isinstance(factory, MCMCKernel) or not callable(factory)):
        kind = type(factory).__name__
        raise TypeError(f"kernel: expected a factory such as NUTS or partial(NUTS, ...), got an instance of {kind}")
    latent = program.select("latent").values()
    endless = [s.name for s in latent if s.discrete and not s.finite]
    if endless:
        raise ValueError(f"model: {', '.join(endless)} has infinitely many discrete states; a kernel cannot sum it out")
    if all(s.finite for s in latent):
        raise ValueError("model: expected a continuous latent site to sample, got none")


def _conclude(program: Program, made: Made, elapsed: float) -> Result:
    started = perf_counter()
    state = State(tuple(m for m in [program.pair] if isinstance(m, torch.nn.Module)))
    draws = {n: made.draws[n] for n in program.sites if n in made.draws}
    attrs = {"method": made.method, "program": made.program, "restarted": made.restarted}
    with state():
        idata = to_idata(program, draws, made.stats, chains=made.chains, attrs=attrs)
    return Result(
        idata=idata,
        params=state.values(),
        losses=np.zeros(0),
        seconds={"setup": made.setup, "run": elapsed - made.setup, "draws": perf_counter() - started},
        method=made.method,
        diagnosis=diagnose(idata),
        draws=draws,
        program=program,
        state=state,
        more=made.more,
    )
