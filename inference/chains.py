r"""Many chains in one tensor, and what every way to run chains shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from inference.kernels.gibbs import Gibbs
from inference.potential import worth_fusing
from inference.program import Program

LEAPFROGS = 4
"""Gradients that a transition is taken to cost before any has been made."""
SMALL = 10_000_000
"""Numbers of the data times chains up to which one thread runs a batched kernel: to meet at the end of every operation
costs several threads more than the operation, and many times more on a busy machine."""
LENGTHS = {True: (250, 300, 64), False: (1000, 1000, 4)}
"""Draws, warmup and chains that a batched kernel, and another, choose."""
KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


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


def run_together(
    program: Program,
    factory: KernelFactory,
    draws: int | None,
    warmup: int | None,
    chains: int | None,
    mode: bool | str,
    progress: bool,
) -> Made:
    """Run a ``Batched`` kernel."""
    started = perf_counter()
    kernel: Any = factory(partial(program.model, **program.arguments()))
    if isinstance(kernel, Gibbs) and kernel.conditional is None:
        kernel.conditional = getattr(program.pair, "conditional", None)
    draws, warmup, chains = lengths(True, draws, warmup, chains or kernel.num_chains)
    kernel.num_chains, kernel.jit_compile = chains, False
    threads = 1 if chains * program.numel < SMALL else torch.get_num_threads()
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

    with Bars(program, 1, warmup + draws, progress) as show:
        values, stats = run(draws, show)
    state = kernel.state

    def more(size: int, seed: int) -> dict[str, Tensor]:
        kernel.state = state
        # One block's first draw of all chains, then the next: the last chains are not left out of a short answer.
        each = -(-size // chains)
        on = run(each, lambda *_: None)[0]
        return {n: v.unflatten(0, (chains, each)).transpose(0, 1).flatten(0, 1)[:size] for n, v in on.items()}

    return Made(values, stats, chains, setup, kernel.program, method_of(factory), more, kernel.restarted)


def lengths(batched: bool, *asked: int | None) -> tuple[int, ...]:
    return tuple(own if n is None else n for n, own in zip(asked, LENGTHS[batched], strict=True))


def method_of(factory: Any) -> str:
    return getattr(getattr(factory, "func", factory), "__name__", "MCMC")


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bars:
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
