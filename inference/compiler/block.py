r"""Many steps of a small program in one call.

A call into a compiled program costs some tens of microseconds, a step of a small model less than that. Here the steps
are a loop inside the program: what a step changes is carried round, its noise is drawn beforehand, number for number
what the single steps would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.func import functionalize
from torch.fx import GraphModule

from inference.compiler.capture import Untraceable, traced
from inference.compiler.fuse import has_compiler, looped, quietly
from inference.compiler.passes import add_input
from inference.compiler.step import TracedStep, close
from inference.core.handlers import preserved_rng

STEPS = 50
"""Steps that one call makes."""


SMALL = 100_000
"""Numbers among a program's inputs up to which the call costs as much as the step."""


_FILL = {torch.ops.aten.randn.default: Tensor.normal_, torch.ops.aten.rand.default: Tensor.uniform_}


class Block:
    r"""``STEPS`` steps of a program with an update, as one call.

    Args:
        program: A program whose update changes its parameters and its own tensors.
        inputs: Its inputs, the same tensors at every step.

    Raises:
        Untraceable: The program draws other noise than normal and uniform, or does not run in a loop.
    """

    def __init__(self, program: TracedStep, inputs: list[Tensor]) -> None:
        if not has_compiler():
            raise Untraceable("no C++ compiler was found")
        if not program.single:
            raise Untraceable("the objective has more than one loss")
        self._program, self._inputs = program, inputs
        moving = program.moving(inputs)
        self._fixed = [k for k in range(len(inputs)) if k not in moving]
        # One vector for each type: a loop allocates anew what it carries, tensor by tensor, at every step.
        types = dict.fromkeys(inputs[k].dtype for k in moving)
        self._packs = [[k for k in moving if inputs[k].dtype == each] for each in types]
        self._graph = self._stepped()
        self._noise = [torch.empty((STEPS, *v.shape), dtype=v.dtype, device=v.device) for _, v in self._draws]
        fills = [_FILL[target] for target, _ in self._draws]
        self._fills = [part for rows in zip(*self._noise, strict=True) for part in zip(fills, rows, strict=True)]
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        self._run = looped(self._loop(), ("block", self._graph.code, shapes))
        self._hold_against_single_steps()

    def __call__(self) -> list[float]:
        """Take the steps: their losses."""
        if self._program.due(STEPS):
            self._program.hold_against_eager(self._program.call)
        with torch.no_grad():
            for fill, part in self._fills:
                fill(part)
            fixed = tuple(self._inputs[k].detach() for k in self._fixed)
            carried, losses = self._run(tuple(map(self._pack, self._packs)), fixed, tuple(self._noise))
            for places, vector in zip(self._packs, carried, strict=True):
                torch._foreach_copy_([self._inputs[k] for k in places], self._unpack(places, vector))
        self._program.calls += STEPS
        return losses.tolist()

    def _pack(self, places: list[int]) -> Tensor:
        return torch.cat([self._inputs[k].detach().flatten() for k in places])

    def _unpack(self, places: list[int], vector: Tensor) -> list[Tensor]:
        like = [self._inputs[k] for k in places]
        return [v.view(t.shape) for v, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]

    def _stepped(self) -> GraphModule:
        """The program's graph without in-place writes: from the packs and the rest to the loss and the new packs."""
        step = self._program.graph

        def run(*given: Tensor) -> list[Tensor]:
            inputs = dict(zip(self._fixed, given[len(self._packs) :], strict=True))
            for places, vector in zip(self._packs, given, strict=False):
                inputs |= zip(places, (v.clone() for v in self._unpack(places, vector)), strict=True)
            loss, *_ = step(*(inputs[k] for k in range(len(inputs))))
            return [loss, *(torch.cat([inputs[k].flatten() for k in places]) for places in self._packs)]

        with self._program.untouched():
            graph = traced(functionalize(run), *map(self._pack, self._packs), *(self._inputs[k] for k in self._fixed))
        self._draws = []
        for node in list(graph.graph.nodes):
            if node.target in _FILL:
                self._draws.append((node.target, node.meta["val"]))
                node.replace_all_uses_with(add_input(graph, f"noise_{len(self._draws)}"))
                graph.graph.erase_node(node)
            elif node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
                raise Untraceable("a step changes a buffer")
            elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Untraceable(f"{node.target} draws noise that depends on values")
        graph.recompile()
        return graph

    def _loop(self) -> Callable[..., Any]:
        # A module's call goes through hooks that a compiler cannot follow.
        step = self._graph.forward

        def loop(carried: Any, constants: Any, noise: Any) -> Any:
            def body(carry: Any, now: Any) -> Any:
                loss, *new = step(*carry, *constants, *now)
                return tuple(new), loss.clone()

            return scan(body, carried, noise)

        return loop

    def _hold_against_single_steps(self) -> None:
        """Compile, and raise Untraceable if the losses are not those of single steps under the same noise."""
        with preserved_rng(), self._program.untouched(), torch.no_grad():
            expected = torch.stack([self._program.graph(*self._inputs)[0] for _ in range(STEPS)])
        with preserved_rng(), self._program.untouched():
            try:
                with quietly():
                    got = torch.tensor(self(), dtype=expected.dtype)
            except Exception as error:  # whatever a compiler may raise
                raise Untraceable(f"no loop could be compiled ({type(error).__name__})") from error
        self._program.calls -= STEPS
        # Later ones follow their own rounding.
        if not close([got[:5]], [expected[:5]]):
            raise Untraceable("a loop of steps gives other losses than single steps")
