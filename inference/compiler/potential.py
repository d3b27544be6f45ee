r"""The potential energy of a model and its gradient as one program.

Value and gradient are computed in one graph, because a kernel needs both in every leapfrog step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import copy
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule

from inference.compiler import policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.constants import fold_constants, held_besides, lift_constants, pack_constants
from inference.compiler.failures import failures_to_nan
from inference.compiler.form import Form
from inference.compiler.fuse import fused
from inference.compiler.layout import rearrange
from inference.compiler.passes import chains_last, is_pure, is_view, share_products
from inference.compiler.pieces import Pieces, cut
from inference.core.contracts import Kernel

Potential = Callable[..., Tensor]

CHECKED = 4
"""Chains whose energies are compared with the model's at the start, at the end of the warmup and of the run."""


REACHES = (0.1, 2.0)
"""Distances from its start at which a potential is compared with its graph: nearby, and as far as chains start."""


class CompiledPotential:
    r"""Potential energy and gradient of a model as one program, in the form that Pyro's HMC and NUTS take.

    A call maps unconstrained values by name to the energy, a tensor whose backward pass returns the gradient that the
    same call has computed. Calls 1, 2, 4, 8, ... compare the program with the potential; where they differ, the
    potential runs from then on, and a warning says so.

    Args:
        potential: A potential function, for instance that of a kernel after ``setup``.
        example: Unconstrained values by name, for their shapes.

    Raises:
        Untraceable: The potential reads values of its tensors, or its graph differs from it around ``example``.
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
        self.graph = failures_to_nan(traced(value_and_gradient, *inputs))
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
        try:
            self._refuse_difference(self.run, [values[n].detach() for n in self.names])
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
            self._refuse_difference(self.graph, moved)

    def _refuse_difference(self, run: Callable[..., Any], inputs: list[Tensor]) -> None:
        differ = ""
        # A model that fails at remote positions says nothing about its graph.
        with torch.no_grad(), suppress(RuntimeError, ValueError):
            expected = _value_or_nan(self._potential, dict(zip(self.names, inputs, strict=True)))
            differ = difference(run(*inputs, *self.held)[0], expected)
        if differ:
            raise Untraceable(differ)


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
        data: Tensors from outside the potential that others may replace (:meth:`again`).
        eager: Call the potential for one chain after another; slow, for potentials that cannot be traced.

    Attributes:
        outside: Tensors from outside the potential that its graph holds, or whose values were read.
        unexplained: Those of ``outside`` of which it is not known that other data leave them as they are: all but the
            data and numbers of the model's code. Values of data that were read are among them.

    Raises:
        Untraceable: The potential reads values of its tensors, or its graph differs from it around ``example``.
    """

    def __init__(
        self,
        potential: Potential,
        example: dict[str, Tensor],
        chains: int,
        *,
        given: tuple[Tensor, ...] = (),
        data: Sequence[Tensor] = (),
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
        self.code, self.operations, self.nodes = "", 0, 0
        self.pieces: Pieces | None = None
        self.outside: list[Tensor] = []
        self.unexplained: list[Tensor] = []
        if not eager:
            # Without in-place writes: vmap would unroll some of them, and a compiled loop cannot contain any.
            inputs = (first, *(g[0] for g in given))
            recorded = failures_to_nan(traced(lambda *inputs: self._one(*inputs), *inputs))
            read = [v for v, _ in recorded.meta["read"]]
            self.outside = [*recorded.parameters(), *recorded.buffers(), *read]
            self.unexplained = [*read, *held_besides(recorded, data)]
            self.pieces = self._cut(recorded, (many, *given), data)
        if not eager and self.pieces is None:
            one = recorded if is_pure(recorded) else traced(functionalize(recorded), *inputs)
            graph = share_products(traced(functionalize(torch.vmap(one)), many, *given))
            # Whatever tracing has copied is not known for what it was.
            self.unexplained += held_besides(graph, [*data, *self.outside])
            self._derive = fold_constants(graph, data)
            constants = lift_constants(graph)
            self._pack, call = pack_constants(rearrange(graph), len(given), constants)
            self.held = [*given, *self._pack(constants)]
            graph = traced(chains_last(call), many.mT.contiguous(), *self.held)
            self.code, self.operations, self.nodes = graph.code, count_operations(graph), count_nodes(graph)
            # The call of a module goes through hooks that the compiler cannot follow.
            self.forward = graph.forward
        self._traced = self.forward
        if not eager:
            steps = torch.linspace(-1, 1, many.numel()).to(many).reshape(many.shape)
            for reach in REACHES:
                self.check(many + reach * steps)

    def _cut(self, recorded: GraphModule, inputs: tuple[Tensor, ...], data: Sequence[Tensor]) -> Pieces | None:
        """The graph of one chain in pieces, if it is long and repeats itself."""
        if count_nodes(recorded) < policy.PIECED_NODES:
            return None
        bounds = cut(recorded)
        if bounds is None:
            return None
        pieces = Pieces(recorded, bounds, inputs, data)
        self.forward = chains_last(pieces)
        self.operations, self.nodes = pieces.operations, pieces.nodes
        return pieces

    def again(
        self, potential: Potential, example: dict[str, Tensor], data: Sequence[Tensor] | None = None
    ) -> BatchedPotential:
        """The graph for a potential function from which the same would be recorded; pieces of it are not compiled.

        Args:
            potential: The potential function.
            example: Unconstrained values of one chain by name.
            data: Tensors in the place of the argument ``data``. Default: those.
        """
        made = copy(self)
        made._potential, made._example, made.held = potential, example, list(self.held)
        if self.pieces is not None:
            made.pieces = self.pieces.again(data)
            made.forward = made._traced = chains_last(made.pieces)
        elif data is not None:
            made.held[self._given :] = self._pack(self._derive(*data))
        return made

    def unfuse(self) -> None:
        """Run the graph, or the graphs of its pieces, again."""
        self.forward = self._traced
        if self.pieces is not None:
            self.pieces.unfuse()

    def run(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (chains,) and gradients (chains, D) at positions (chains, D)."""
        energies, gradients = self.forward(positions.mT, *self.held)
        return energies, gradients.mT

    def check(self, positions: Tensor) -> None:
        """Compare the graph with the potential at positions (chains, D) from the lowest energy to the highest.

        A branch that the graph has frozen may lie far from the point at which it was recorded, where the chains go.

        Raises:
            Untraceable: They differ.
        """
        if not self.traced:
            return
        energies = self.run(positions)[0]
        order = energies.nan_to_num(math.inf, math.inf).argsort()
        pick = order[torch.linspace(0, len(order) - 1, CHECKED).long()].unique()
        try:
            given = (g[pick] for g in self.held[: self._given])
            expected = torch.stack([self._energy_or_nan(*one) for one in zip(positions[pick], *given, strict=True)])
        except (RuntimeError, ValueError):
            # A model that fails at remote positions says nothing about its graph.
            return
        refuse_difference(energies[pick], expected)

    def unpack(self, positions: Tensor) -> dict[str, Tensor]:
        r"""Values by name (..., \*shape) from positions (..., D)."""
        parts = positions.split(self._sizes, -1)
        named = zip(self._example.items(), parts, strict=True)
        return {n: p.reshape((*p.shape[:-1], *v.shape)).to(v.dtype) for (n, v), p in named}

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        r"""Positions (chains, D) from values by name (chains, \*shape)."""
        return torch.cat([values[n].reshape(len(values[n]), -1).to(self.like) for n in self._example], -1)

    def _energy(self, leaf: Tensor, *given: Tensor) -> Tensor:
        energy = self._potential(self.unpack(leaf), *given)
        # Pyro's kernels take an energy (1,) too.
        return energy.reshape(()) if energy.dim() else energy

    def _one(self, position: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        leaf = position.detach().requires_grad_()
        with torch.enable_grad():
            energy = self._energy(leaf, *given)
            (gradient,) = torch.autograd.grad(energy, leaf)
        return energy.detach().to(position.dtype), gradient

    def _energy_or_nan(self, position: Tensor, *given: Tensor) -> Tensor:
        try:
            # A model may differentiate by itself.
            with torch.enable_grad():
                return self._energy(position.detach().requires_grad_(), *given).detach().to(position.dtype)
        except torch.linalg.LinAlgError:
            return position.new_tensor(math.nan)

    def _one_or_nan(self, position: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return self._one(position, *given)
        except torch.linalg.LinAlgError:
            return position.new_tensor(math.nan), torch.full_like(position, math.nan)

    def _loop(self, positions: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        energies, gradients = zip(*map(self._one_or_nan, positions, *given), strict=True)
        return torch.stack(energies), torch.stack(gradients)


def _value_or_nan(potential: Potential, values: dict[str, Tensor]) -> Tensor:
    try:
        return potential(values)
    except torch.linalg.LinAlgError:
        return torch.full_like(next(iter(values.values())).sum(), math.nan)


def difference(got: Tensor, expected: Tensor, rtol: float = 0.0, where: str = "") -> str:
    """What tells energies of a program from those of the model; empty where they are equal up to rounding.

    Where the model has none, because a matrix just cannot be factorised, rounding decides.
    """
    rtol = rtol or (1e-4 if got.dtype == torch.float32 else 1e-8)
    known = ~expected.isnan()
    if torch.allclose(got[known], expected[known].to(got), rtol=rtol, atol=rtol):
        return ""
    return f"the traced potential gives {got.tolist()}{where}, the model {expected.tolist()}"


def refuse_difference(got: Tensor, expected: Tensor) -> None:
    """Raise Untraceable where energies of a program at draws of the chains are not those of the model."""
    # Rounding of large matrices, far from the start, is no branch.
    rtol = 1e-3 if got.dtype == torch.float32 else 1e-5
    differ = difference(got, expected, rtol, " at draws of the chains")
    if differ:
        hint = "it may read values back to Python (item, tolist, numpy); pass compile=False with kernel=NUTS"
        raise Untraceable(f"{differ}; {hint}")


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


def count_nodes(graph: GraphModule) -> int:
    """Operations in a graph, each counted once."""
    return sum(n.op == "call_function" for n in graph.graph.nodes)


def count_operations(graph: GraphModule) -> int:
    """Operations in a call of a graph, counted by :func:`policy.operations_of`."""
    calls = [n for n in graph.graph.nodes if n.op == "call_function"]
    values = [n.meta["val"] for n in calls if not is_view(n) and isinstance(n.meta.get("val"), Form)]
    return policy.operations_of(len(calls), sum(v.shape.numel() for v in values if v.device.type == "cpu"))


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
    if not policy.worth_fusing(calls, count_operations(program.graph), mode, count_nodes(program.graph)):
        return "traced"
    program.fuse()
    return "traced" if program.run is program.graph else "fused"
