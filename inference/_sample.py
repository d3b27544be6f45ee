r"""``sample``: Markov chains by any kernel.

A kernel is a subclass of ``pyro.infer.mcmc.mcmc_kernel.MCMCKernel``. A batched kernel (``ChEES``, ``Gibbs``) holds all
chains in one tensor. Chains of another kernel run side by side in worker processes.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

from inference.checkpoint import Checkpoint, NoCheckpoint
from inference.compiler.capture import Untraceable
from inference.core.bound import BoundPair, bind
from inference.core.checks import check_count, check_one_of
from inference.core.contracts import Kernel
from inference.core.group import check_same, part_ways, ranks
from inference.core.halves import parameters_of
from inference.core.handlers import evaluating, exclusive, first_valid, isolated, preserved_rng
from inference.core.private import lacking
from inference.kernels.chees import ChEES
from inference.kernels.gibbs import Gibbs
from inference.kernels.nuts import NUTS
from inference.result import Posterior, Result, conclude
from inference.runners.asked import asked_of, named, networks_of
from inference.runners.base import ChainRun, KernelFactory, method_of
from inference.runners.batched import run_batched
from inference.runners.processes import run_processes
from inference.runners.ranks import checkpoint_of_rank, joined, seed_of_rank

MIN_CHAINS = 8
"""Number of chains from which the default kernel is ChEES, which adapts across chains."""


@exclusive
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
    device: str | torch.device | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> Result:
    r"""Sample the posterior of a model by Markov chains.

    Finite latent sites are summed out exactly, and drawn from their posterior afterwards; ``Gibbs`` draws them in the
    chains. The guide, if there is one, is not used. Modules run in evaluation mode, as in predictions. A narrow mode
    beside a wide one may be missed by every chain; the chains then agree, and no diagnostic reports it.

    In a process group (``torchrun``) each process runs ``chains`` chains of its own, the first one those of a single
    process, and all return the Result of all chains, which are judged by nested R-hat too.

    Args:
        pair: A pair, a ``(model, guide)`` tuple or a bare model.
        data: A tensor, array or frame (the model's first argument) or a mapping of names to them, as for ``fit``.
        kernel: A factory from the model to an MCMCKernel: ``ChEES``, ``NUTS``, ``HMC``, or
            ``partial(NUTS, target_accept_prob=0.95)``. Default: ChEES; NUTS for fewer than eight chains; Pyro's own
            NUTS where the model cannot be traced (a warning says why); Gibbs where all latent sites are finite, or one
            has too many joint states to sum over.
        draws: Draws to keep per chain. Default: 250 for ChEES and Gibbs, 1000 for others.
        warmup: Draws per chain that adapt the kernel and are dropped. Default: 300 for ChEES and Gibbs, 1000 for
            others.
        chains: Number of chains. Default: 64 for ChEES and Gibbs, 4 for others. ``ChEES``, ``Gibbs`` and ``NUTS`` hold
            them in one tensor. Of other kernels as many run at once as there are cores, in worker processes (new
            interpreters, not forks; they stay for a minute), if there is work for more than seconds. On cuda, and of a
            model that cannot be pickled by cloudpickle (a warning says why), they run one after another. Draws are the
            same either way.
        seed: Seed of all randomness. The global random state is left as it was. Last digits depend on whether a program
            is compiled, and with them all draws: see ``compile``.
        compile: True: run the kernel's potential and its gradient, and whole transitions of ChEES and NUTS, as one
            compiled program. "auto": do so where the work ahead is worth the cost of compiling, or where the program
            was compiled before, here or in another process of this machine. False: run as Pyro does (ChEES and NUTS run
            the traced graph).
        device: Where to run, such as "cuda". The modules of the pair are moved there, in place, and so are the data;
            the draws of the Result are on the CPU. Default: where pair and data are.
        checkpoint: A folder that holds where the chains are and what they have drawn, renewed every half minute
            (``Checkpoint(folder, every=...)``: as often as you say). Called again with the same arguments, ``sample``
            goes on from there, and returns what it would have returned; chains that have ended are not run again.
            Draws go to NetCDF files in it, which ``open_draws`` reads at any time; memory does not grow with them, and
            where they are many the Result maps them from the disk. For ``ChEES``, ``Gibbs`` and ``NUTS``. Default:
            none.
        progress: Show a progress bar per chain, or one for a batched kernel, on a terminal.

    Returns:
        A Result with ``sample_stats`` (acceptance_rate, diverging, step_size, n_steps, lp, and ``energy``: minus lp and
        the kinetic energy at the start of the transition). An interrupt (Ctrl-C) after the warmup of ``ChEES``,
        ``Gibbs`` or ``NUTS`` ends it early with the draws that there are; ``result.ended`` and the diagnosis say so. In
        the warmup, and of other kernels, it raises KeyboardInterrupt.

    Raises:
        ValueError: An argument is out of its range, or the kernel cannot sample a site.
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
    bound = bind(pair, data, device)
    _check(bound, kernel, compile, draws=draws, warmup=warmup, chains=chains)
    if kernel is None and _only_drawn(bound):
        kernel = Gibbs
    started, kept = perf_counter(), checkpoint_of_rank(Checkpoint.of(checkpoint))
    lengths = {"draws": draws, "warmup": warmup, "chains": chains}
    if ranks()[1] > 1:
        networks = {"networks": networks_of(bound)}
        check_same({**bound.data, **lengths, "seed": seed, "compile": compile, "kernel": named(kernel), **networks})
    asked: dict[str, Any] = {}
    if kept is not None:
        asked = asked_of(bound, method="sample", **lengths, seed=seed, compile=compile)
        asked["networks"] = networks_of(bound)
        if ranks()[1] > 1:
            asked["processes"] = ranks()[1]
    progress = progress and ranks()[0] == 0
    further: dict[str, Any] = {**lengths, "mode": compile, "progress": progress, "checkpoint": kept, "asked": asked}
    with isolated(seed), evaluating(bound.modules), kept or nullcontext():
        if ranks()[1] > 1:
            # Parameters that start at random are those of rank 0 in all processes.
            with preserved_rng():
                first_valid(partial(bound.model, **bound.arguments()))
        part_ways()
        if kernel is None:
            batched: Any = ChEES if chains is None or chains >= MIN_CHAINS else NUTS
            try:
                made = run_batched(bound, partial(batched, eager=False), **further)
                return _conclude(bound, made, perf_counter() - started)
            except Untraceable as error:
                name = method_of(batched)
                warnings.warn(
                    f"{bound.name}: Pyro's NUTS in place of {name}, because it cannot be traced: {error}", stacklevel=3
                )
                # What tracing lacks was said.
                compile = False if lacking() else compile
        factory = kernel or PyroNUTS
        example = factory(partial(bound.model, **bound.arguments()))
        if not Kernel.of(example).draws_finite:
            _check_summed(bound)
        if kept is not None and not Kernel.of(example).resumes:
            name = "Pyro's NUTS" if factory is PyroNUTS else method_of(factory)
            got = f"{name}, whose chains cannot go on from a file"
            raise NoCheckpoint(f"checkpoint: expected ChEES, Gibbs or NUTS, got {got}")
        if Kernel.of(example).batched:
            made = run_batched(bound, factory, **further)
        else:
            made = run_processes(bound, factory, draws, warmup, chains, seed_of_rank(seed), compile, progress)
        return _conclude(bound, made, perf_counter() - started)


def _check(bound: BoundPair, factory: Any, compile: Any, **lengths: int | None) -> None:
    for name, least in (("draws", 4), ("warmup", 0), ("chains", 1)):
        if lengths[name] is not None:
            check_count(name, lengths[name], least)
    check_one_of("compile", compile, (True, False, "auto"))
    if factory is not None and (isinstance(factory, MCMCKernel) or not callable(factory)):
        kind = type(factory).__name__
        raise TypeError(f"kernel: expected a factory such as NUTS or partial(NUTS, ...), got an instance of {kind}")
    latent = bound.select("latent").values()
    endless = [s.name for s in latent if s.discrete and not s.units]
    if endless:
        raise ValueError(f"model: {', '.join(endless)} has infinitely many discrete states; a kernel cannot sum it out")
    if not latent:
        raise ValueError("model: expected a latent site to sample, got none")
    bound.check_whole()
    _check_observes(bound)


def _check_observes(bound: BoundPair) -> None:
    """Raise where data were forgotten; a model that takes none is a density by itself, which may be sampled."""
    left = [n for n, p in parameters_of(bound.model).items() if p.default is None and n not in bound.data]
    if bound.observes or not (bound.data or left):
        return
    given = ", ".join(bound.data) or f"none for {', '.join(left)}"
    raise ValueError(
        f"data: the model observes nothing, so its posterior is the prior; got {given}; use prior_predictive() to draw "
        "from the prior"
    )


def _only_drawn(bound: BoundPair) -> bool:
    """Whether the finite sites have to be drawn: there is nothing else, or they cannot be summed over."""
    latent = bound.select("latent").values()
    return all(s.units for s in latent) or any(s.units > 1 for s in latent)


def _check_summed(bound: BoundPair) -> None:
    latent = bound.select("latent").values()
    for site in latent:
        if site.units > 1:
            raise ValueError(
                f"{site.name}: an event of {site.units} finite units cannot be summed out; use kernel=Gibbs"
            )
    if all(s.units for s in latent):
        named = ", ".join(s.name for s in latent)
        raise ValueError(f"model: expected a continuous latent site to sample, got {named}; use kernel=Gibbs")


def _conclude(bound: BoundPair, run: ChainRun, elapsed: float) -> Result:
    run, count = joined(run), ranks()[1]
    draws = {n: run.draws[n] for n in bound.sites if n in run.draws}
    attrs = {"restarted": run.restarted} | ({"processes": count} if count > 1 else {})
    posterior = Posterior(draws, run.chains, run.stats, attrs=attrs)
    seconds = {"setup": run.setup, "run": run.before + elapsed - run.setup}
    if run.ended:
        warnings.warn(f"sample of {bound.name} {run.ended}", stacklevel=4)
    return conclude(
        bound,
        lambda: posterior,
        run.more,
        seconds,
        method=run.method,
        execution=run.execution,
        ended=run.ended,
    )
