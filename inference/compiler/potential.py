r"""The potential energy of a model and its gradient as one program.

Value and gradient are computed in one graph, because a kernel needs both in every leapfrog step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule

from inference.compiler import policy
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
from inference.core.contracts import Kernel

Potential = Callable[..., Tensor]

REACHES = (0.1, 2.0)
"""How far from its start a potential is held against its graph: nearby, and as far as chains start."""


class CompiledPotential:
    r"""Potential energy and gradient of a model as one program, in the form that Pyro's HMC and NUTS take.

    A call maps unconstrained values by name to the energy, a tensor whose backward pass returns the gradient that the
    same call has computed.

    Args:
        potential: A potential function, for instance that of a kernel after ``setup``.
        example: Unconstrained values by name, for their shapes.

    Raises:
        Untraceable: The potential branches on values of its tensors.
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
        self._potential, self._calls, self._differs = potential, 0, False
        self._check(inputs)

    def fuse(self) -> None:
        """Compile the graph and run it once, so that the cost arises here."""
        self.run = fused(self.graph, [*self._inputs, *self.held])
        with torch.no_grad():
            self.run(*self._inputs, *self.held)

    def __call__(self, values: dict[str, Tensor]) -> Tensor:
        self._calls += 1
        if self._calls & (self._calls - 1) == 0 and not self._differs:
            self._compare(values)
        if self._differs:
            return self._potential(values)
        return _Energy.apply(self.run, *[values[n] for n in self.names], *self.held)

    def _compare(self, values: dict[str, Tensor]) -> None:
        """Compare the program with the potential where the chain is, at calls that are powers of two."""
        energies: list[Tensor] = []
        with torch.no_grad(), suppress(RuntimeError, ValueError):
            energies.append(self._potential(values))
            energies.append(self.run(*(values[n].detach() for n in self.names), *self.held)[0])
        try:
            _hold_against(energies)
        except Untraceable as error:
            self._differs = True
            warnings.warn(
                f"call {self._calls}: {error}; it runs eagerly from now on, and draws since call {self._calls // 2} "
                "may be wrong",
                stacklevel=3,
            )

    def _check(self, inputs: list[Tensor]) -> None:
        """Compare the graph with the potential near the start and far from it, where a frozen branch shows."""
        self._inputs = inputs
        for reach in REACHES:
            moved = [v + reach * torch.linspace(-1, 1, max(v.numel(), 1)).to(v).reshape(v.shape) for v in inputs]
            energies: list[Tensor] = []
            with torch.no_grad(), suppress(RuntimeError, ValueError):
                energies.append(self._potential(dict(zip(self.names, moved, strict=True))))
                energies.append(self.graph(*moved, *self.held)[0])
            _hold_against(energies)


class BatchedPotential:
    r"""Potential energies and gradients of many chains as one graph, at positions (chains, D) in one matrix.

    Value and gradient of one chain are traced, and ``torch.vmap`` maps the graph over chains. In this order it is exact
    for enumerated sites and in-place writes, where ``vmap`` of the potential itself fails. A position is the
    concatenation of the flattened unconstrained sites, of length D.

    Args:
        potential: A potential function, for instance that of a kernel after ``setup``.
        example: Unconstrained values of one chain by name, for their shapes.
        chains: Number of chains.
        given: Further arguments of the potential, (chains, \*shape): the first entries of ``held``, which may be
            replaced.
        eager: Call the potential for one chain after another; slow, for potentials that cannot be traced.

    Raises:
        Untraceable: The potential branches on values of its tensors.
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
        # Positions and gradients (D, chains): chains are contiguous in memory.
        self.forward: Callable[..., Any] = chains_last(self._loop)
        self.code, self.operations = "", 0
        if not eager:
            # Without in-place writes: vmap would unroll some of them, and a compiled loop cannot contain any.
            inputs = (first, *(g[0] for g in given))
            one = traced(functionalize(traced(lambda *inputs: self._one(*inputs), *inputs)), *inputs)
            graph = fold_constants(share_products(traced(functionalize(torch.vmap(one)), many, *given)))
            packed, call = pack_constants(rearrange(graph), len(given), lift_constants(graph))
            self.held = [*given, *packed]
            graph = traced(chains_last(call), many.mT.contiguous(), *self.held)
            self.code, self.operations = graph.code, count_operations(graph)
            # The call of a module goes through hooks that the compiler cannot follow.
            self.forward = graph.forward
            steps = torch.linspace(-1, 1, many.numel()).to(many).reshape(many.shape)
            for reach in REACHES:
                self.check(many + reach * steps)

    def run(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (chains,) and gradients (chains, D) at positions (chains, D)."""
        energies, gradients = self.forward(positions.mT, *self.held)
        return energies, gradients.mT

    def unpack(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Values by name (..., \*shape) from positions (..., D)."""
        parts = positions.split(self._sizes, -1)
        named = zip(self._example.items(), parts, strict=True)
        return {n: p.reshape((*p.shape[:-1], *v.shape)).to(v.dtype) for (n, v), p in named}

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        r"""Positions (chains, D) from values by name (chains, \*shape)."""
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

    def check(self, positions: Tensor) -> None:
        """Compare the graph with the potential at the first and last of some positions (chains, D).

        Raises:
            Untraceable: They differ.
        """
        pick = sorted({0, len(positions) - 1})
        given = [g[pick] for g in self.held[: self._given]]
        # A model that fails at remote positions says nothing about its graph.
        energies: list[Tensor] = []
        with suppress(RuntimeError, ValueError):
            energies.append(self._loop(positions[pick], *given)[0])
            energies.append(self.run(positions)[0][pick])
        _hold_against(energies)


def _hold_against(energies: list[Tensor]) -> None:
    """Raise Untraceable unless the energies of a model and its graph are equal up to rounding, where both are known."""
    if len(energies) < 2:
        return
    expected, got = energies
    tolerance = 1e-4 if got.dtype == torch.float32 else 1e-8
    if not torch.allclose(got, expected.to(got), rtol=tolerance, atol=tolerance, equal_nan=True):
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
    """Operations in a call of a graph, counted by :func:`policy.operations_of`."""
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    values = [n.meta["val"] for n in calls if not is_view(n) and isinstance(n.meta.get("val"), Tensor)]
    return policy.operations_of(len(calls), sum(v.numel() for v in values if v.device.type == "cpu"))


def compile_kernel(kernel: MCMCKernel, calls: int, mode: bool | str) -> str:
    """Replace the potential of a kernel by its program, if that pays; return ``eager``, ``traced`` or ``fused``.

    Args:
        kernel: A kernel after ``setup``. One without ``potential_fn`` is left as it is.
        calls: Calls of the potential that lie ahead.
        mode: True: fuse. "auto": trace or fuse if the calls ahead are worth its cost. False: leave the kernel.
    """
    potential: Any = Kernel.of(kernel).potential_fn
    example = kernel.initial_params if potential is not None else {}
    if not example or not policy.worth_tracing(calls, mode):
        return "eager"
    try:
        program = CompiledPotential(potential, example)
    except Untraceable as error:
        warnings.warn(f"the potential runs eagerly, because it cannot be traced: {error}", stacklevel=4)
        return "eager"
    kernel.potential_fn = program  # type: ignore[attr-defined]
    if not policy.worth_fusing(calls, count_operations(program.graph), mode):
        return "traced"
    program.fuse()
    return "traced" if program.run is program.graph else "fused"
