r"""Many steps of a small program in one call.

A call into a compiled program takes longer than a step of a small model. Here the steps are a loop inside the program:
parameters and optimizer state are carried from step to step, and the noise of all steps is drawn beforehand, with the
same numbers as single steps would draw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule

from inference.compiler import policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.fuse import has_compiler, looped, quietly
from inference.compiler.passes import is_noise
from inference.compiler.step import TracedStep, close
from inference.core.handlers import preserved_rng
from inference.core.private import copy_all, scan


class Block:
    r"""``policy.BLOCK_STEPS`` steps of a program with an update, in one call.

    Args:
        program: A program with an update, which changes its parameters and the update's own tensors.
        inputs: Its inputs, the same tensors in each step.

    Raises:
        Untraceable: The program has a sampler that cannot be split into noise and what is made of it, or cannot run in
            a loop.
    """

    def __init__(self, program: TracedStep, inputs: list[Tensor]) -> None:
        if not has_compiler():
            raise Untraceable("no C++ compiler was found")
        if not program.single:
            raise Untraceable("the objective has more than one loss")
        self._program, self._inputs = program, inputs
        moving = program.moving(inputs)
        self._fixed = [k for k in range(len(inputs)) if k not in moving]
        # One vector per dtype: in every step a loop allocates each tensor that it carries.
        types = dict.fromkeys(inputs[k].dtype for k in moving)
        self._packs = [[k for k in moving if inputs[k].dtype == dtype] for dtype in types]
        self._graph = self._stepped()
        with preserved_rng():
            self._noise = [v.new_empty((policy.BLOCK_STEPS, *v.shape)) for v in program.noise()]
        self._rows = [part for rows in zip(*self._noise, strict=True) for part in zip(program.draws, rows, strict=True)]
        self._compare_with_single_steps()

    def __call__(self) -> list[float]:
        """Take the steps and return their losses."""
        if self._program.due(policy.BLOCK_STEPS):
            self._program.compare_with_eager(self._program.call)
        with torch.no_grad():
            for draw, row in self._rows:
                draw.into(row)
            carried, losses = self._run(*self._arguments())
            for places, vector in zip(self._packs, carried, strict=True):
                copy_all([self._inputs[k] for k in places], self._unpack(places, vector))
        self._program.calls += policy.BLOCK_STEPS
        return losses.tolist()

    def _arguments(self) -> tuple[tuple[Tensor, ...], ...]:
        """Arguments of the loop: what it carries, constants, noise of all steps."""
        fixed = tuple(self._inputs[k].detach() for k in self._fixed)
        return tuple(map(self._pack, self._packs)), fixed, tuple(self._noise)

    def _compiled(self) -> Callable[..., Any]:
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in self._inputs)
        packs = len(self._packs)
        key = "block", policy.BLOCK_STEPS, self._graph.code, shapes
        return looped(self._loop(), key, self._arguments(), lambda tensors: (tensors[:packs], tensors[packs]))

    def _pack(self, places: list[int]) -> Tensor:
        return torch.cat([self._inputs[k].detach().flatten() for k in places])

    def _unpack(self, places: list[int], vector: Tensor) -> list[Tensor]:
        tensors = [self._inputs[k] for k in places]
        return [v.view(t.shape) for v, t in zip(vector.split([t.numel() for t in tensors]), tensors, strict=True)]

    def _stepped(self) -> GraphModule:
        """The program's graph without in-place writes: a map from packs and other inputs to loss and new packs."""
        step, last = self._program.graph, len(self._packs) + len(self._fixed)

        def run(*tensors: Tensor) -> list[Tensor]:
            fixed, noise = tensors[len(self._packs) : last], tensors[last:]
            inputs = dict(zip(self._fixed, fixed, strict=True))
            for places, vector in zip(self._packs, tensors, strict=False):
                inputs |= zip(places, (v.clone() for v in self._unpack(places, vector)), strict=True)
            loss, *_ = step(*(inputs[k] for k in range(len(inputs))), *noise)
            return [loss, *(torch.cat([inputs[k].flatten() for k in places]) for places in self._packs)]

        fixed = [self._inputs[k] for k in self._fixed]
        with self._program.untouched(), preserved_rng():
            graph = traced(functionalize(run), *map(self._pack, self._packs), *fixed, *self._program.noise())
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
                raise Untraceable("a step changes a buffer")
            elif is_noise(node):
                raise Untraceable(f"{node.target} draws noise that depends on values")
        return graph.compiled()

    def _loop(self) -> Callable[..., Any]:
        # The call of a module goes through hooks that the compiler cannot follow.
        step = self._graph.forward

        def loop(carried: Any, constants: Any, noise: Any) -> Any:
            def body(carry: Any, draws: Any) -> Any:
                loss, *new = step(*carry, *constants, *draws)
                return tuple(new), loss.clone()

            return scan(body, carried, noise)

        return loop

    def _compare_with_single_steps(self) -> None:
        """Compile, and raise Untraceable if the losses differ from those of single steps under the same noise."""
        with preserved_rng(), self._program.untouched(), torch.no_grad():
            expected = torch.stack(
                [self._program.graph(*self._inputs, *self._program.noise())[0] for _ in range(policy.BLOCK_STEPS)]
            )
        calls = self._program.calls
        with preserved_rng(), self._program.untouched():
            try:
                self._run = self._compiled()
                with quietly():
                    got = torch.tensor(self(), dtype=expected.dtype)
            except Exception as error:  # whatever a compiler may raise
                raise Untraceable(f"no loop could be compiled ({type(error).__name__})") from error
            finally:
                self._program.calls = calls
        # Rounding errors accumulate in later steps.
        if not close([got[:5]], [expected[:5]], self._program.rounding):
            raise Untraceable("a loop of steps gives other losses than single steps")
