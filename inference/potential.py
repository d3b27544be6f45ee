r"""The potential energy of a model and its gradient as one program.

The gradients of one call are computed in the same graph as its value: a kernel asks for both at every leapfrog step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from inference.tracing import Untraceable, fused, lifted, traced

TRACE_FROM, FUSE_FROM = 500, 10_000
"""Calls ahead from which a graph is traced, and fused: the cost of fusing and the dispatch that each call then saves
both grow with the operations of the graph. To decide by a clock would make the last digits of a result, and so a chain,
depend on how busy the machine was."""
Potential = Callable[[dict[str, Tensor]], Tensor]


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
        self.held = lifted(self.graph)
        self.run: Callable[..., Any] = self.graph
        self._check(potential, inputs)

    def fuse(self) -> None:
        """Compile the graph, and run it once so that the cost is paid here."""
        self.run = fused(self.graph, [*self._inputs, *self.held])
        with torch.no_grad():
            self.run(*self._inputs, *self.held)

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        return _Energy.apply(self.run, *[values[n] for n in self.names], *self.held)

    def _check(self, potential: Potential, inputs: list[Tensor]) -> None:
        """Hold the graph against the potential at another point: a frozen branch shows there."""
        self._inputs = inputs
        with torch.no_grad():
            moved = [v + 0.1 * torch.linspace(-1, 1, max(v.numel(), 1)).to(v).reshape(v.shape) for v in inputs]
            expected = potential(dict(zip(self.names, moved, strict=True)))
            got = self.graph(*moved, *self.held)[0]
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
        gradients = [outer[0] * g for g in ctx.saved_tensors]
        return None, *gradients, *[None] * (len(ctx.needs_input_grad) - 1 - len(gradients))


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
