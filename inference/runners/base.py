r"""What every way to run chains shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from inference.core.bound import BoundPair

LENGTHS = {True: (250, 300, 64), False: (1000, 1000, 4)}
"""Draws, warmup and chains that a batched kernel, and another, choose."""


KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


@dataclass
class ChainRun:
    r"""What the chains made: draws (chains * draws, \*shape), statistics (chains, draws), and how to go on."""

    draws: dict[str, Tensor]
    stats: dict[str, np.ndarray]
    chains: int
    setup: float
    execution: str
    method: str
    more: Callable[[int, int], dict[str, Tensor]]
    restarted: int = 0


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

    def __init__(self, bound: BoundPair, chains: int, length: int, progress: bool) -> None:
        self._make = lambda k: tqdm(
            total=length, desc=f"{bound.name} chain {k}", disable=None if progress else True, leave=False
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
