r"""Run a batched kernel, which holds all chains in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from inference.compiler import policy
from inference.core.bound import BoundPair
from inference.runners.base import (
    Bars,
    ChainRun,
    KernelFactory,
    kernel_of,
    lengths,
    method_of,
    most_threads,
    threads_set,
)


def run_batched(
    bound: BoundPair,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    mode: bool | str,
    progress: bool,
) -> ChainRun:
    """Run a ``BatchedKernel``; lengths that are None are its defaults, and ``mode`` says whether to compile."""
    started = perf_counter()
    kernel = kernel_of(bound, factory)
    kernel.adopt(bound.asked)
    draws, warmup, chains = lengths(kernel.lengths, draws, warmup, chains or kernel.num_chains)
    kernel.num_chains, kernel.jit_compile = chains, False
    run = _Run(kernel, mode, warmup, policy.threads_for(bound.numel, chains, most_threads()))
    run.setup(draws)
    setup = perf_counter() - started
    with Bars(bound, 1, warmup + draws, progress) as show:
        values, stats = run.draw(draws, show)
    method, more = method_of(factory), partial(run.more, kernel.state)
    return ChainRun(values, stats, chains, setup, kernel.execution, method, more, kernel.restarted)


class _Run:
    """A batched kernel that runs block by block, and is fused as soon as the work ahead is worth it."""

    def __init__(self, kernel: Any, mode: bool | str, warmup: int, threads: int) -> None:
        self.kernel, self.mode, self.warmup, self.threads = kernel, mode, warmup, threads
        self._fused = False

    def setup(self, draws: int) -> None:
        """Set the kernel up for the warmup and so many draws."""
        with threads_set(self.threads):
            self.kernel.setup(self.warmup)
            self._fuse_if_worth_it(policy.HMC_GRADIENTS * (self.warmup + draws))

    def draw(
        self, draws: int, show: Callable[[int, int, str], None]
    ) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        r"""Finish the warmup and make draws: values (chains * draws, \*shape), statistics (chains, draws)."""
        kernel, blocks = self.kernel, list[Any]()
        done, before = 0, kernel.gradients
        with pyro.validation_enabled(False), threads_set(self.threads):
            while len(blocks) * kernel.block < draws:
                warming = kernel.warming
                block = kernel.advance()
                done += kernel.block
                show(0, done, ", ".join(f"{k} {v}" for k, v in kernel.logging().items()))
                if not warming:
                    blocks.append(block)
                ahead = draws - len(blocks) * kernel.block + (self.warmup - done if kernel.warming else 0)
                # The first trajectories may be longer than later ones: expect at most as much again as was needed.
                gradients = kernel.gradients - before
                self._fuse_if_worth_it(min(2 * gradients, ahead * gradients / done))
            values, stats = kernel.collect(blocks)
        # The last block may have made too many draws.
        flat = {n: v[:draws].transpose(0, 1).flatten(0, 1) for n, v in values.items()}
        return flat, {n: v[:draws].T.cpu().numpy() for n, v in stats.items()}

    def more(self, state: Any, size: int, seed: int) -> dict[str, Tensor]:
        """Further draws from a state of the kernel."""
        chains = self.kernel.num_chains
        self.kernel.state = state
        per_chain = -(-size // chains)
        values = self.draw(per_chain, lambda *_: None)[0]
        # The first draw of every chain, then the second: a few draws come from as many chains as possible.
        return {n: v.unflatten(0, (chains, per_chain)).transpose(0, 1).flatten(0, 1)[:size] for n, v in values.items()}

    def _fuse_if_worth_it(self, gradients: float) -> None:
        kernel = self.kernel
        if not self._fused and policy.worth_fusing(gradients, kernel.operations, self.mode, kernel.nodes):
            self._fused = True
            kernel.fuse()
