r"""Chains of a batched kernel: all of them in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.compiler.potential import worth_fusing
from inference.core.bound import BoundPair
from inference.runners.base import Bars, ChainRun, KernelFactory, lengths, method_of, threads_set

LEAPFROGS = 4
"""Gradients that a transition is taken to cost before any has been made."""


SMALL = 10_000_000
"""Numbers of the data times chains up to which one thread runs a batched kernel: to meet at the end of every operation
costs several threads more than the operation, and many times more on a busy machine."""


def run_batched(
    bound: BoundPair,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    mode: bool | str,
    progress: bool,
) -> ChainRun:
    """Run a ``Batched`` kernel."""
    started = perf_counter()
    kernel: Any = factory(partial(bound.model, **bound.arguments()))
    kernel.adopt(bound.asked)
    draws, warmup, chains = lengths(True, draws, warmup, chains or kernel.num_chains)
    kernel.num_chains, kernel.jit_compile = chains, False
    threads = 1 if chains * bound.numel < SMALL else torch.get_num_threads()
    tried = False

    def fuse_if_worth_it(gradients: float) -> None:
        nonlocal tried
        # By counts, not by the clock, which would make two runs of one seed differ.
        if not tried and worth_fusing(gradients, kernel.operations, mode):
            tried = True
            kernel.fuse()

    with threads_set(threads):
        kernel.setup(warmup)
        fuse_if_worth_it(LEAPFROGS * (warmup + draws))
    setup = perf_counter() - started

    def run(size: int, say: Callable[[int, int, str], None]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        blocks: list[Any] = []
        done, before = 0, kernel.gradients
        with pyro.validation_enabled(False), threads_set(threads):
            while len(blocks) * kernel.block < size:
                warming = kernel.warming
                block = kernel.advance()
                done += kernel.block
                say(0, done, ", ".join(f"{k} {v}" for k, v in kernel.logging().items()))
                if not warming:
                    blocks.append(block)
                ahead = size - len(blocks) * kernel.block + (warmup - done if kernel.warming else 0)
                # The first trajectories may be longer than those to come: as much again as has been made, at most.
                so_far = kernel.gradients - before
                fuse_if_worth_it(min(2 * so_far, ahead * so_far / done))
            values, stats = kernel.collect(blocks)
        # What the last block made too much is dropped.
        flat = {n: v[:size].transpose(0, 1).flatten(0, 1).cpu() for n, v in values.items()}
        return flat, {n: v[:size].T.cpu().numpy() for n, v in stats.items()}

    with Bars(bound, 1, warmup + draws, progress) as show:
        values, stats = run(draws, show)
    state = kernel.state

    def more(size: int, seed: int) -> dict[str, Tensor]:
        kernel.state = state
        # One block's first draw of all chains, then the next: the last chains are not left out of a short answer.
        each = -(-size // chains)
        on = run(each, lambda *_: None)[0]
        return {n: v.unflatten(0, (chains, each)).transpose(0, 1).flatten(0, 1)[:size] for n, v in on.items()}

    return ChainRun(values, stats, chains, setup, kernel.execution, method_of(factory), more, kernel.restarted)
