r"""What the runners share: lengths, progress bars, threads, interrupts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.handlers import DrawMissing
from inference.core.progress import bar
from inference.further import FurtherDraws

LENGTHS = (1000, 1000, 4)
"""Default draws, warmup and chains of a kernel that runs a single chain."""


KernelFactory = Callable[[Callable[..., Any]], MCMCKernel]


@dataclass
class ChainRun:
    r"""A finished run of chains.

    Attributes:
        draws: Values by site, (chains * draws, \*shape), chain after chain.
        stats: Statistics by name, (chains, draws).
        chains: Number of chains.
        setup: Seconds of preparation, compiling included.
        execution: How the kernel ran: ``eager``, ``traced`` or ``fused``.
        method: Name of the kernel.
        more: Further draws, which go on where the chains ended.
        restarted: Number of chains that the warmup moved elsewhere.
        before: Seconds that earlier parts of the run took, if it goes on from a checkpoint.
        ended: Why and at which draw the run ended early; empty if it did not.
    """

    draws: dict[str, Tensor]
    stats: dict[str, np.ndarray]
    chains: int
    setup: float
    execution: str
    method: str
    more: FurtherDraws
    restarted: int = 0
    before: float = 0.0
    ended: str = ""


def lengths(defaults: tuple[int, ...], *asked: int | None) -> tuple[int, ...]:
    """Draws, warmup and chains as asked for, with defaults for None."""
    return tuple(default if n is None else n for n, default in zip(asked, defaults, strict=True))


def method_of(factory: Any) -> str:
    """Name of the kernel that a factory makes."""
    return getattr(getattr(factory, "func", factory), "__name__", "MCMC")


def kernel_of(bound: BoundPair, factory: KernelFactory) -> Any:
    """A kernel of a pair's model, in which missing entries are drawn from their distribution."""
    ends = ("_observed", "_unobserved")
    missing = any({n.removesuffix(ends[1]) + end for end in ends} <= set(bound.sites) for n in bound.sites)
    return factory(partial(DrawMissing()(bound.model) if missing else bound.model, **bound.arguments()))


def cores() -> int:
    """Cores that this process may use: by its affinity, the quota of its container, and ``LOKY_MAX_CPU_COUNT``."""
    # scikit-learn's own; half a second to import.
    import joblib

    return int(joblib.cpu_count())


def most_threads() -> int:
    """Threads that torch is set to, but no more than there are cores: in a container torch counts the machine's.

    How busy the cores are does not count: sums in another number of threads have other last digits, and a run would not
    be the same again.
    """
    return min(torch.get_num_threads(), cores())


class Interrupts:
    """How often Ctrl-C was pressed while it is deferred; a call raises KeyboardInterrupt if it was."""

    pressed = 0

    def __call__(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt


@contextmanager
def interrupts_deferred() -> Iterator[Interrupts]:
    """Defer Ctrl-C to a call of what is returned, which raises KeyboardInterrupt.

    Otherwise an interrupt may fall between a step and the record of it. A second Ctrl-C interrupts at once. Handlers
    of the user's own, and threads other than the main one, are left alone.
    """
    interrupts = Interrupts()

    def press(number: int, frame: Any) -> None:
        interrupts.pressed += 1
        if interrupts.pressed > 1:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Bars:
    """One progress bar per chain."""

    def __init__(self, bound: BoundPair, chains: int, length: int, progress: bool) -> None:
        self._make = lambda k: bar(length, f"{bound.name} chain {k}", shown=progress)
        self._chains, self._stack = chains, ExitStack()

    def __enter__(self) -> Callable[[int, int, str], None]:
        self._bars = [self._stack.enter_context(self._make(k)) for k in range(self._chains)]
        return self._show

    def _show(self, chain: int, step: int, text: str) -> None:
        shown = self._bars[chain]
        if not shown.disable:
            shown.set_postfix_str(text, refresh=False)
            shown.update(step - shown.n)

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
