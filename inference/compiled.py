r"""One objective or log density, traced once and fused into one tensor program.

Pyro's cost on small and medium models is Python. Here the whole computation, handlers and gradients included,
runs once under ``make_fx``, which records the tensor operations alone; ``torch.compile`` fuses them. Parameters
are not inputs: the graph holds the very tensors that the optimizer moves.

What tracing would freeze is watched: random state is left where it was, host reads of Pyro (a loss as a
number, checks for nan) are out of the way, and a program that a condition on its data steers cannot be traced.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyro
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from inference.program import aside

TRACE_FROM, FUSE_FROM = 500, 10_000
"""Calls ahead from which a graph is traced, and fused: the cost of fusing and the dispatch that each call then saves
both grow with the operations of the graph. To decide by a clock would make the last digits of a result, and so a chain,
depend on how busy the machine was."""
Potential = Callable[[dict[str, Tensor]], Tensor]


class Untraceable(RuntimeError):
    """A program whose course depends on the values of its tensors."""


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Record the tensor operations of a function of tensors.

    Raises:
        Untraceable: The function reads a value back to steer itself; the message is torch's.
    """
    with aside(), _tracing():
        try:
            return make_fx(function)(*inputs)
        except RuntimeError as error:
            raise Untraceable(" ".join(str(error).split())) from error


def fused(graph: GraphModule) -> Callable[..., Any]:
    """The graph as one compiled program; the graph itself where the machine has no C++ compiler."""
    if not _has_compiler():
        return graph
    with _quietly():
        return torch.compile(graph, dynamic=False)


class CompiledPotential:
    r"""Potential energy and gradient of a model as one program, in the form that Pyro's HMC and NUTS take.

    Called with unconstrained values by name it returns the energy, a tensor whose backward pass hands out the
    gradient that the same call has computed.

    Args:
        potential: A potential function, as a kernel has it after its set-up.
        example: Unconstrained values by name, for their shapes.
    """

    def __init__(self, potential: Potential, example: dict[str, Tensor]) -> None:
        self.names = list(example)

        def value_and_gradient(*values: Tensor) -> tuple[Tensor, ...]:
            leaves = [v.detach().requires_grad_() for v in values]
            with torch.enable_grad():
                energy = potential(dict(zip(self.names, leaves, strict=True)))
                gradients = torch.autograd.grad(energy, leaves)
            return energy.detach(), *gradients

        inputs = [example[n].detach() for n in self.names]
        self.graph = traced(value_and_gradient, *inputs)
        self.run: Callable[..., Any] = self.graph
        self._check(potential, inputs)

    def fuse(self) -> None:
        """Compile the graph, and run it once so that the cost is paid here."""
        self.run = fused(self.graph)
        with torch.no_grad(), _quietly():
            self.run(*self._inputs)

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return _Energy.apply(self.run, *[values[n] for n in self.names])

    def _check(self, potential: Potential, inputs: list[Tensor]) -> None:
        """Hold the graph against the potential at another point: a frozen branch shows there."""
        self._inputs = inputs
        with torch.no_grad():
            moved = [v + 0.1 * torch.linspace(-1, 1, max(v.numel(), 1)).to(v).reshape(v.shape) for v in inputs]
            expected = potential(dict(zip(self.names, moved, strict=True)))
            got = self.graph(*moved)[0]
        if not torch.allclose(got, expected, rtol=1e-4 if got.dtype == torch.float32 else 1e-8, equal_nan=True):
            raise Untraceable(f"the traced potential gives {got.item()}, the model {expected.item()}")


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], *values: Tensor) -> Tensor:
        energy, *gradients = run(*[v.detach() for v in values])
        ctx.save_for_backward(*gradients)
        return energy

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(outer[0] * g for g in ctx.saved_tensors)


def compile_kernel(kernel: MCMCKernel, calls: int, mode: bool | str) -> str:
    """Replace the potential of a kernel that has been set up by its program; return what was chosen.

    Args:
        kernel: A kernel with ``potential_fn`` and ``initial_params``; another is left as it is.
        calls: Calls of the potential that lie ahead.
        mode: True: compile. "auto": as far as the calls ahead are worth its cost. False: leave the kernel.
    """
    potential: Any = getattr(kernel, "potential_fn", None)
    example = kernel.initial_params if potential is not None else {}
    if mode is False or not example or (mode == "auto" and calls < TRACE_FROM):
        return "eager"
    try:
        program = CompiledPotential(potential, example)
    except Untraceable as error:
        warnings.warn(f"the potential runs eagerly, for it cannot be traced: {error}", stacklevel=4)
        return "eager"
    kernel.potential_fn = program  # type: ignore[attr-defined]
    if mode == "auto" and calls < FUSE_FROM:
        return "traced"
    program.fuse()
    return "traced" if program.run is program.graph else "fused"


@contextmanager
def _tracing() -> Iterator[None]:
    """Pyro's host reads out of the way: it asks torch whether it is being traced, and takes items as tensors."""
    state, item = torch._C._get_tracing_state, Tensor.item
    try:
        torch._C._get_tracing_state = lambda: True  # type: ignore
        Tensor.item = lambda self: self.detach()  # type: ignore
        with pyro.validation_enabled(False), warnings.catch_warnings():
            # Shapes are constants of a graph made for these shapes: what torch warns of is meant.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            yield
    finally:
        torch._C._get_tracing_state = state
        Tensor.item = item  # type: ignore[method-assign]


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # Inductor speaks to its own developers through Python's warnings.
        warnings.simplefilter("ignore")
        yield


@cache
def _has_compiler() -> bool:
    if any(shutil.which(c) for c in ("c++", "g++", "clang++", "cl")):
        return True
    warnings.warn("no C++ compiler was found: programs run traced, but not fused", stacklevel=3)
    return False
