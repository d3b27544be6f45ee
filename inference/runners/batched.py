r"""Run a batched kernel, which holds all chains in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.checkpoint import Checkpoint
from inference.compiler import policy
from inference.core.bound import BoundPair
from inference.core.handlers import called_by_exclusive, preserved_rng, set_random_state, threads_set
from inference.core.packing import pack, unpack
from inference.further import RESTORED, Continuation, FurtherDraws, NoDraws
from inference.kernels import NUTS, ChEES, Gibbs
from inference.runners.asked import named
from inference.runners.base import (
    Bars,
    ChainRun,
    KernelFactory,
    interrupts_deferred,
    kernel_of,
    lengths,
    method_of,
    most_threads,
)
from inference.runners.drawn import Drawn, KeptDrawn


def run_batched(
    bound: BoundPair,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    mode: bool | str,
    progress: bool,
    checkpoint: Checkpoint | None = None,
    asked: Mapping[str, Any] | None = None,
) -> ChainRun:
    """Run a ``BatchedKernel``.

    Lengths that are None are its defaults, ``mode`` says whether to compile, and ``asked`` what the run was asked for,
    for its checkpoint.
    """
    started = perf_counter()
    kernel = kernel_of(bound, factory)
    kernel.adopt(bound.asked)
    draws, warmup, chains = lengths(kernel.lengths, draws, warmup, chains or kernel.num_chains)
    kernel.num_chains, kernel.jit_compile = chains, False
    run = _Run(kernel, mode, warmup, policy.threads_for(bound.numel, chains, most_threads()))
    drawn, held = Drawn(kernel, draws), None
    if checkpoint is not None:
        drawn = KeptDrawn(kernel, draws, checkpoint, bound, method_of(factory))
        held = drawn.begin({**(asked or {}), "kernel": named(factory)})
    run.setup(draws, held)
    setup = perf_counter() - started if held is None else held["setup"]
    before = 0.0 if held is None else held["seconds"]
    with Bars(bound, 1, warmup + draws, progress) as show:
        values, stats = run.draw(drawn, show, setup, before - started)
    values = {n: v.to(bound.device) for n, v in values.items()}
    more = ChainDraws(bound, run, kernel.state, factory)
    count = drawn.count
    ended = "" if count == draws else f"interrupted at draw {count} of {draws}"
    how = kernel.execution
    return ChainRun(values, stats, chains, setup, how, method_of(factory), more, kernel.restarted, before, ended)


LEAST_DRAWS = 4
"""Draws per chain that chains have to have made when they are interrupted, for what they are to be of use."""


KERNELS: dict[str, Any] = {"ChEES": ChEES, "Gibbs": Gibbs, "NUTS": NUTS}
"""Kernels whose chains can go on from a file, by the names that stand there."""


@dataclass(frozen=True)
class ChainDraws(FurtherDraws):
    """Further draws of a batched kernel: its chains go on.

    Attributes:
        bound: The pair and its data.
        run: The kernel that ran.
        state: Its state at the end of the run.
        factory: What made the kernel.
    """

    bound: BoundPair
    run: _Run
    state: Any
    factory: KernelFactory

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """Draws of the latent sites."""
        chains = self.run.kernel.num_chains
        per_chain = -(-size // chains)
        values = self.run.go_on(self.state, per_chain)[0]
        # The first draw of every chain, then the second: a few draws come from as many chains as possible.
        return {n: v.unflatten(0, (chains, per_chain)).transpose(0, 1).flatten(0, 1)[:size] for n, v in values.items()}

    def extend(self, draws: int) -> Continuation:
        """Let the chains go on by so many draws each."""
        started = perf_counter()
        values, stats = self.run.go_on(self.state, draws)
        more = ChainDraws(self.bound, self.run, self.run.kernel.state, self.factory)
        return Continuation(values, stats, perf_counter() - started, more)

    def __reduce__(self) -> tuple[Any, ...]:
        # Graphs and programs stay in their process: another one makes them again where the chains go on.
        about, tensors = self.record()
        if about["kind"] == "none":
            return NoDraws, (method_of(self.factory),)
        return _Restored, (self.bound, about, tensors)

    def record(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What a file has to hold so that the chains can go on: JSON, and tensors."""
        settings = getattr(self.factory, "keywords", {})
        kernel = method_of(self.factory)
        plain = not getattr(self.factory, "args", None) and all(
            isinstance(v, bool | int | float | str | None) for v in settings.values()
        )
        made = getattr(self.factory, "func", self.factory)
        if KERNELS.get(kernel) is not made or not plain:
            return {"kind": "none"}, []
        run = self.run
        about = {"chains": run.kernel.num_chains, "mode": run.mode, "fused": run.fused, "threads": run.threads}
        state, tensors = pack(self.state)
        return {"kind": "chains", "kernel": kernel, "settings": settings, **about, "state": state}, tensors


@dataclass
class _Restored(FurtherDraws):
    """Chains of a file that go on: the kernel is set up when it is first asked."""

    bound: BoundPair
    about: Mapping[str, Any]
    tensors: list[Tensor]
    _draws: ChainDraws | None = None

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """Draws of the latent sites."""
        return self._chains()(size, seed)

    def extend(self, draws: int) -> Continuation:
        """Let the chains go on by so many draws each."""
        return self._chains().extend(draws)

    def record(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What a file has to hold."""
        return dict(self.about), self.tensors

    def _chains(self) -> ChainDraws:
        if self._draws is None:
            with preserved_rng(), torch.enable_grad():
                self._draws = self._set_up()
        return self._draws

    def _set_up(self) -> ChainDraws:
        about = self.about
        if about["kernel"] not in KERNELS:
            raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {about['kernel']!r}")
        factory = partial(KERNELS[about["kernel"]], **about["settings"])
        kernel = kernel_of(self.bound, factory)
        kernel.adopt(self.bound.asked)
        kernel.num_chains, kernel.jit_compile = about["chains"], False
        run = _Run(kernel, about["mode"], 0, about["threads"])
        with threads_set(run.threads):
            kernel.setup(0)
            if about["fused"]:
                kernel.fuse(about["fused"])
        run.fused = about["fused"]
        state = unpack(about["state"], [v.to(self.bound.device) for v in self.tensors])
        return ChainDraws(self.bound, run, state, factory)


RESTORED["chains"] = lambda bound, about, tensors: _Restored(bound, about, tensors)


class _Run:
    """A batched kernel that runs block by block, and is fused as soon as the work ahead is worth it."""

    def __init__(self, kernel: Any, mode: bool | str, warmup: int, threads: int) -> None:
        self.kernel, self.mode, self.warmup, self.threads = kernel, mode, warmup, threads
        self.fused = 0.0  # gradients that lay ahead when the kernel was compiled; 0: it was not
        self.done = self.before = 0

    def setup(self, draws: int, held: Mapping[str, Any] | None = None) -> None:
        """Set the kernel up for the warmup and so many draws, or to go on from what a checkpoint holds."""
        kernel = self.kernel
        with threads_set(self.threads):
            kernel.setup(self.warmup)
            if held is None:
                self._fuse_if_worth_it(kernel.expected * (self.warmup + draws))
                return
            kernel.state, self.fused = held["kernel"], held["fused"]
            if held["execution"] == "fused":
                kernel.fuse(self.fused)
            self.done, self.before = held["done"], held["before"]
            set_random_state(held["random"])

    def draw(
        self, drawn: Drawn, show: Callable[[int, int, str], None], setup: float = 0.0, clock: float = 0.0
    ) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        r"""Finish the warmup and make draws: values (chains * draws, \*shape), statistics (chains, draws).

        Args:
            drawn: Takes the draws, and keeps them where there is a checkpoint.
            show: Shows progress.
            setup: Seconds that the setup took, for the checkpoint.
            clock: What makes ``perf_counter`` the seconds of the run.
        """
        kernel = self.kernel

        def keep() -> None:
            at = {"kernel": kernel.state, "done": self.done, "before": self.before}
            how = {"fused": self.fused, "execution": kernel.execution}
            drawn.keep({**at, **how, "setup": setup, "seconds": clock + perf_counter()})

        validated, threads = pyro.validation_enabled(False), threads_set(self.threads)
        with validated, threads, interrupts_deferred() as interrupts:
            try:
                while drawn.made < drawn.draws:
                    self._advance(drawn, show)
                    if drawn.made >= drawn.draws or drawn.due:
                        keep()
                    interrupts()
            except KeyboardInterrupt:
                if interrupts.pressed == 1:
                    keep()
                if called_by_exclusive() or interrupts.pressed != 1 or drawn.made < LEAST_DRAWS:
                    raise
            if kernel.execution == "traced":
                kernel.spend(kernel.gradients - self.before)
            kernel.check()
            return drawn.joined()

    def _advance(self, drawn: Drawn, show: Callable[[int, int, str], None]) -> None:
        """Run one block of transitions."""
        kernel = self.kernel
        warming = kernel.warming
        block = kernel.advance()
        self.done += kernel.block
        show(0, self.done, ", ".join(f"{k} {v}" for k, v in kernel.logging().items()))
        if not warming:
            drawn.add(block)
        ahead = drawn.draws - drawn.made + (self.warmup - self.done if kernel.warming else 0)
        # The first trajectories may be longer than later ones: expect at most as much again as was needed.
        gradients = kernel.gradients - self.before
        self._fuse_if_worth_it(min(2 * gradients, ahead * gradients / self.done))

    def go_on(self, state: Any, draws: int) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        """Further draws per chain from a state of the kernel, as :meth:`draw` returns them."""
        self.kernel.state = state
        self.done, self.before = 0, self.kernel.gradients
        values, stats = self.draw(Drawn(self.kernel, draws), lambda *_: None)
        if next(iter(stats.values())).shape[1] < draws:
            raise KeyboardInterrupt
        return values, stats

    def _fuse_if_worth_it(self, gradients: float) -> None:
        kernel = self.kernel
        # What other runs have done decides before the first block alone, so that a run does not depend on its pauses.
        begins = self.mode == "auto" and self.done == 0
        spent = kernel.spent if begins else 0.0
        if not self.fused and (
            policy.worth_fusing(gradients, kernel.operations, self.mode, kernel.nodes, kernel.kept, spent)
            or (begins and kernel.compiled)
        ):
            self.fused = max(gradients, 1.0 if self.mode == "auto" else policy.PIECE_CALLS)
            kernel.fuse(self.fused)
