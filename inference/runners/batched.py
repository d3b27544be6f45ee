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

from inference.compiler import policy
from inference.core.bound import BoundPair
from inference.core.handlers import preserved_rng
from inference.core.private import tree_flatten, tree_leaves, tree_unflatten
from inference.kernels import NUTS, ChEES, Gibbs
from inference.result import RESTORED, FurtherDraws
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
    more = ChainDraws(run, kernel.state, factory)
    return ChainRun(values, stats, chains, setup, kernel.execution, method_of(factory), more, kernel.restarted)


KERNELS: dict[str, Any] = {"ChEES": ChEES, "Gibbs": Gibbs, "NUTS": NUTS}
"""Kernels whose chains can go on from a file, by the names that stand there."""


@dataclass(frozen=True)
class ChainDraws(FurtherDraws):
    """Further draws of a batched kernel: its chains go on.

    Attributes:
        run: The kernel that ran.
        state: Its state at the end of the run.
        factory: What made the kernel.
    """

    run: _Run
    state: Any
    factory: KernelFactory

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """Draws of the latent sites."""
        return self.run.more(self.state, size, seed)

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
        leaves = tree_leaves(self.state)
        numbers = {str(k): v for k, v in enumerate(leaves) if not isinstance(v, Tensor)}
        tensors = [v for v in leaves if isinstance(v, Tensor)]
        return {"kind": "chains", "kernel": kernel, "settings": settings, **about, "numbers": numbers}, tensors


@dataclass
class _Restored(FurtherDraws):
    """Chains of a file that go on: the kernel is set up when it is first asked."""

    bound: BoundPair
    about: Mapping[str, Any]
    tensors: list[Tensor]
    _draws: ChainDraws | None = None

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """Draws of the latent sites."""
        if self._draws is None:
            with preserved_rng(), torch.enable_grad():
                self._draws = self._set_up()
        return self._draws(size, seed)

    def record(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What a file has to hold."""
        return dict(self.about), self.tensors

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
                kernel.fuse()
        run.fused = about["fused"]
        leaves, form = tree_flatten(kernel.state)
        tensors = (v.to(self.bound.device) for v in self.tensors)
        held = [about["numbers"][str(k)] if str(k) in about["numbers"] else next(tensors) for k in range(len(leaves))]
        return ChainDraws(run, tree_unflatten(held, form), factory)


RESTORED["chains"] = lambda bound, about, tensors: _Restored(bound, about, tensors)


class _Run:
    """A batched kernel that runs block by block, and is fused as soon as the work ahead is worth it."""

    def __init__(self, kernel: Any, mode: bool | str, warmup: int, threads: int) -> None:
        self.kernel, self.mode, self.warmup, self.threads = kernel, mode, warmup, threads
        self.fused = False

    def setup(self, draws: int) -> None:
        """Set the kernel up for the warmup and so many draws."""
        with threads_set(self.threads):
            self.kernel.setup(self.warmup)
            self._fuse_if_worth_it(self.kernel.expected * (self.warmup + draws))

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
        if not self.fused and policy.worth_fusing(gradients, kernel.operations, self.mode, kernel.nodes):
            self.fused = True
            kernel.fuse()
