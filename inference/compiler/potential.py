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
from torch.func import functionalize
from torch.fx import GraphModule

from inference.compiler.capture import Untraceable, traced
from inference.compiler.fuse import fused
from inference.compiler.layout import rearrange
from inference.compiler.passes import (
    chains_last,
    fold_constants,
    is_view,
    lift_constants,
    pack_constants,
    share_products,
)

TRACE_FROM = 500
"""Calls ahead from which a graph is traced."""


FUSE_FROM = 3_500_000
"""Operations ahead from which a graph is fused: 3 us each, against 4 to 10 s of fusing (20 with an empty disk cache).
To decide by a clock would make the last digits of a result, and so a chain, depend on how busy the machine was."""


DISPATCH = 2000
"""Numbers that are computed while one operation is dispatched."""


Potential = Callable[..., Tensor]


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
        self.held = lift_constants(self.graph)
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


class BatchedPotential:
    r"""Potential energies and gradients of many chains as one graph, at positions (chains, D) in one matrix.

    One chain's value and gradient are traced, and ``torch.vmap`` runs over the graph: in this order it is exact for
    summed-out sites and in-place writes, at which ``vmap`` of the potential itself fails. A position holds the
    unconstrained sites one after another, flattened.

    Args:
        potential: A potential function, as a kernel has it after its set-up.
        example: Unconstrained values of one chain by name, for their shapes.
        chains: Number of chains.
        given: Further arguments of the potential, (chains, \*shape): the first of ``held``, which may be exchanged.
        eager: Call the potential chain after chain: slow, for one that cannot be traced.

    Raises:
        Untraceable: The potential steers itself by the values of its tensors.
    """

    def __init__(
        self,
        potential: Potential,
        example: dict[str, Tensor],
        chains: int,
        *,
        given: tuple[Tensor, ...] = (),
        eager: bool = False,
    ) -> None:
        self._potential, self._example = potential, example
        self._sizes = [v.numel() for v in example.values()]
        first = torch.cat([v.detach().reshape(-1) for v in example.values()])
        many = first.expand(chains, -1).clone()
        self.dim = len(first)
        self.like = first
        self.traced, self._given = not eager, len(given)
        self.held: list[Tensor] = [*given]
        # Positions and gradients (D, chains): what stands side by side in memory are the chains.
        self.forward: Callable[..., Any] = chains_last(self._loop)
        self.code, self.operations = "", 0
        if not eager:
            # Without in-place writes: vmap would unroll some of them, and a compiled loop takes none.
            inputs = (first, *(g[0] for g in given))
            one = traced(functionalize(traced(lambda *inputs: self._one(*inputs), *inputs)), *inputs)
            graph = fold_constants(share_products(traced(functionalize(torch.vmap(one)), many, *given)))
            packed, call = pack_constants(rearrange(graph), len(given), lift_constants(graph))
            self.held = [*given, *packed]
            graph = traced(chains_last(call), many.mT.contiguous(), *self.held)
            self.code, self.operations = graph.code, count_operations(graph)
            # A module's call goes through hooks that a compiler cannot follow.
            self.forward = graph.forward
            self._check(many)

    def run(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (chains,) and gradients (chains, D) at positions (chains, D)."""
        energies, gradients = self.forward(positions.mT, *self.held)
        return energies, gradients.mT

    def unpack(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Values by name, (..., \*shape), of positions (..., D)."""
        parts = positions.split(self._sizes, -1)
        named = zip(self._example.items(), parts, strict=True)
        return {n: p.reshape((*p.shape[:-1], *v.shape)).to(v.dtype) for (n, v), p in named}

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        r"""Positions (chains, D) of values by name, (chains, \*shape)."""
        return torch.cat([values[n].reshape(len(values[n]), -1).to(self.like) for n in self._example], -1)

    def _one(self, position: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = position.detach().requires_grad_()
        with torch.enable_grad():
            energy = self._potential(self.unpack(leaf), *given)
            (gradient,) = torch.autograd.grad(energy, leaf)
        return energy.detach().to(position.dtype), gradient

    def _loop(self, positions: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        energies, gradients = zip(*map(self._one, positions, *given), strict=True)
        return torch.stack(energies), torch.stack(gradients)

    def _check(self, many: Tensor) -> None:
        """Hold the graph against the potential at other points, one a chain: a frozen branch shows there."""
        moved = many + 0.1 * torch.linspace(-1, 1, many.numel()).to(many).reshape(many.shape)
        pick = sorted({0, len(many) - 1})
        given = [g[pick] for g in self.held[: self._given]]
        expected, got = self._loop(moved[pick], *given)[0], self.run(moved)[0][pick]
        if not torch.allclose(got, expected, rtol=1e-4 if got.dtype == torch.float32 else 1e-8, equal_nan=True):
            raise Untraceable(f"the traced potential gives {got.tolist()}, the model {expected.tolist()}")


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


def count_operations(graph: GraphModule) -> int:
    """Operations of a call of a graph, the numbers that they compute counted as operations that take as long."""
    made = [n for n in graph.graph.nodes if n.op == "call_function"]
    values = [n.meta["val"] for n in made if not is_view(n) and isinstance(n.meta.get("val"), Tensor)]
    return len(made) + sum(v.numel() for v in values if v.device.type == "cpu") // DISPATCH


def worth_fusing(gradients: float, operations: int, mode: bool | str) -> bool:
    """Whether a graph of so many operations is to be fused before so many calls."""
    return mode is True or (mode == "auto" and gradients * operations >= FUSE_FROM)


def compile_kernel(kernel: MCMCKernel, calls: int, mode: bool | str) -> str:
    """Replace the potential of a kernel that has been set up by its program; return what was chosen.

    Args:
        kernel: A kernel with ``potential_fn`` and ``initial_params``; another is left as it is.
        calls: Calls of the potential that lie ahead.
        mode: True: compile. "auto": as far as the calls ahead are worth its cost. False: leave the kernel.
    """
    potential: Any = getattr(kernel, "potential_fn", None)
    example = kernel.initial_params if potential is not None else {}
    if not example or mode is False or (mode == "auto" and calls < TRACE_FROM):
        return "eager"
    try:
        program = CompiledPotential(potential, example)
    except Untraceable as error:
        warnings.warn(f"the potential runs eagerly, for it cannot be traced: {error}", stacklevel=4)
        return "eager"
    kernel.potential_fn = program  # type: ignore[attr-defined]
    if not worth_fusing(calls, count_operations(program.graph), mode):
        return "traced"
    program.fuse()
    return "traced" if program.run is program.graph else "fused"
