r"""A mode that records the operations on tensors that run under it as a graph.

``make_fx`` does the same in its own generality: subclasses of tensors, symbolic sizes, nested tracers. What is recorded
here are real tensors of known sizes, in 0.1 ms for each operation in place of 0.5: where a model loops over time, its
graph has tens of thousands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from inference.compiler.form import Form
from inference.compiler.noise import IN_PLACE, Draw, Result, split
from inference.core.private import TorchDispatchMode, is_mapped, tree_leaves, unmapped

CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments that stand in a graph as they are."""


EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)
"""Operations that make a tensor to be filled."""


INDEXED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)
"""Operations that select by indices, their second argument."""


def is_mask(index: Any) -> bool:
    """Whether an index is a boolean mask."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class Recording(GraphModule):
    """A graph that becomes code when it is run: passes change it often, and a large one takes a second each time."""

    _stale = False

    def recompile(self) -> Any:
        """Note that the code is not that of the graph any more."""
        self._stale = True

    def compiled(self) -> Recording:
        """This graph, with its ``forward`` that of the graph as it is now."""
        if self._stale:
            self._stale = False
            super().recompile()
        return self

    @property
    def code(self) -> str:
        """The code of the graph."""
        return GraphModule.code.fget(self.compiled())  # type: ignore[attr-defined, no-any-return]

    def forward(self, *inputs: Any) -> Any:
        """Run the graph."""
        return type(self.compiled()).forward(self, *inputs)


class Recorder(TorchDispatchMode):
    """Records what runs under it, operation by operation, as a graph.

    A tensor that is neither an input nor a result of an operation before is a constant of the graph: it is held as it
    is, so that the graph sees later changes of its values in place.

    Args:
        watch: Called with each operation and its arguments before it runs; returns whether the operation is to run
            without being recorded, because its result is a number.
        depends: Whether a tensor depends on an input or on noise, as far as its node tells.
        lift: Whether the noise that the function draws becomes inputs of the graph, after its others.

    Attributes:
        draws: What draws these inputs, in their order; None where they are not lifted.
        after_writes: Nodes that read memory into which something was written that depends on an input or on noise: a
            node does not tell what was written into a view of it.
    """

    def __init__(
        self, watch: Callable[[Any, Any], bool], depends: Callable[[Tensor], bool], *, lift: bool = False
    ) -> None:
        super().__init__()
        self.graph, self.root = Graph(), nn.Module()
        self.draws: list[Draw] | None = [] if lift else None
        self._nodes = WeakTensorKeyDictionary()
        self._constants: dict[int, tuple[Tensor, Node]] = {}
        self._last: Node | None = None
        self._drawing = False
        self._watch, self._depends = watch, depends
        self.after_writes: set[Node] = set()
        self._written: dict[int, Any] = {}

    def record(self, function: Callable[..., Any], *inputs: Tensor) -> Recording:
        """The graph of a call of a function of tensors; its results may be nested in tuples, lists and dictionaries."""
        places = [self.graph.placeholder(f"x{k}") for k in range(len(inputs))]
        for place, value in zip(places, inputs, strict=True):
            self._note(value, place)
        self._last = places[-1] if places else None
        # Autocast keeps the low-precision copies of parameters, which no graph would make.
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with self:
                results = function(*inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.graph.output(self._argument(results))
        return Recording(self.root, self.graph)

    def node_of(self, value: Tensor) -> Node | None:
        """The node of a tensor; None for one that is no input and no result of an operation."""
        while is_mapped(value):
            value = unmapped(value)
        return self._nodes.get(value)  # type: ignore[no-any-return]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add it to the graph."""
        kwargs = kwargs or {}
        if any(t not in (Tensor, nn.Parameter) for t in types):
            return NotImplemented
        if torch.is_inference_mode_enabled():
            # Elsewhere autograd has taken composite operations apart before.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if self._watch(func, args):
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and not self._drawing:
            parts = split(func, args, kwargs)
            out = self._drawn(func, args, *parts) if parts is not None else None
            if out is not None:
                return out
        if func in INDEXED[1:] and args[2].numel() == 1 and len(args[1]) == 1 and not any(args[3:4]):
            (mask,) = args[1]
            if is_mask(mask) and self._depends(mask):
                with self:
                    return self._fill(func, args[0], mask, args[2])
        # The tensor that torch.tensor has made may be changed in place, the constant of a graph may not.
        target = torch.ops.aten.lift_fresh_copy.default if func is torch.ops.aten.lift_fresh.default else func
        node = self.graph.call_function(target, self._argument(self._places(func, args)), self._argument(kwargs))
        if self._written or func._schema.is_mutable:
            self._follow_writes(func, args, kwargs, node)
        out = target(*args, **kwargs)
        self._note(out, node)
        return out

    def _places(self, func: Any, args: Any) -> Any:
        """Arguments with boolean masks as integer indices: a compiler knows the shape of what those select.

        A mask that depends on an input or on noise, through which something is written, stays.
        """
        if func not in INDEXED:
            return args
        places: list[Any] = []
        for index in args[1]:
            constant = is_mask(index) and not self._depends(index)
            places += index.nonzero(as_tuple=True) if constant else [index]
        return (args[0], places, *args[2:])

    def _fill(self, func: Any, out: Tensor, mask: Tensor, value: Tensor) -> Tensor:
        """Write one number where a mask is true, by an operation that ``vmap`` maps, whatever the mask."""
        mask = mask.bool().reshape(*mask.shape, *[1] * (out.dim() - mask.dim()))
        in_place = func is not torch.ops.aten.index_put.default
        return (out.masked_fill_ if in_place else out.masked_fill)(mask, value.reshape(()))

    def was_written(self, value: Tensor) -> bool:
        """Whether something that depends on an input or on noise was written into the memory of a tensor."""
        return bool(self._written) and self._memory(value)[0] in self._written

    def _memory(self, value: Tensor) -> tuple[int, Any]:
        """Where a tensor lies, and what keeps other memory from getting that place; 0 where it lies nowhere."""
        while is_mapped(value):
            value = unmapped(value)
        if value.layout is not torch.strided:
            return 0, None
        memory = value.untyped_storage()
        return memory.data_ptr(), memory

    def _follow_writes(self, func: Any, args: Any, kwargs: Any, node: Node) -> None:
        """Note what an operation writes into memory, and whether it reads what was written."""
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if any(map(self.was_written, tensors)):
            self.after_writes.add(node)
        if not func._schema.is_mutable or not (node in self.after_writes or any(map(self._depends, tensors))):
            return
        given = {place.name: value for place, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for place in func._schema.arguments:
            if place.alias_info is not None and place.alias_info.is_write:
                targets = [v for v in tree_leaves(given.get(place.name)) if isinstance(v, Tensor)]
                self._written |= {where: memory for where, memory in map(self._memory, targets) if where}

    def _drawn(self, func: Any, args: Any, draw: Draw, result: Result) -> Any:
        """Record an operation as noise and what makes its result of it; None if it is to be recorded as it is."""
        into = self._filled(func, args)
        if self.draws is not None:
            noise: Tensor | None = self._lifted(draw, self.draws)
        elif into is not None or (func is torch.ops.aten.bernoulli.default and args[0].device.type == "cpu"):
            # Elsewhere Bernoulli draws are not those of uniform ones.
            self._drawing = True
            with self:
                noise = draw.plainly()
            self._drawing = False
        else:
            noise = None
        if noise is None:
            return None
        if into is not None:
            # The tensor was made to be filled: it is the noise.
            into.copy_(noise)
            self._nodes[into] = self._nodes[noise]
            return into
        with self:
            return result(noise)

    def _lifted(self, draw: Draw, draws: list[Draw]) -> Tensor:
        """Noise as an input of the graph."""
        noise = draw()
        with self.graph.inserting_after(self._last) if self._last else self.graph.inserting_before():
            self._last = self.graph.placeholder(f"noise_{len(draws)}")
        draws.append(draw)
        self._note(noise, self._last)
        return noise

    def _filled(self, func: Any, args: Any) -> Tensor | None:
        """The tensor that an operation fills with noise, if it was made for that and nobody has seen it."""
        if func not in IN_PLACE:
            return None
        node = self._nodes.get(args[0])
        made = node is not None and node.target in EMPTY and not node.users
        return args[0] if made and args[0].is_contiguous() else None

    def _note(self, out: Any, node: Node) -> None:
        if isinstance(out, Tensor):
            node.meta["val"] = Form.of(out)
            self._nodes[out] = node
        elif isinstance(out, tuple | list):
            node.meta["val"] = tuple(Form.of(v) if isinstance(v, Tensor) else v for v in out)
            for k, value in enumerate(out):
                if value is not None:
                    self._note(value, self.graph.call_function(operator.getitem, (node, k)))

    def _argument(self, value: Any) -> Any:
        """A value as an argument of a node: tensors by their nodes."""
        if isinstance(value, Tensor):
            return self._nodes.get(value) or self._constant(value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._argument, value)) if type(value) in (tuple, list) else self._plain(value)
        if isinstance(value, dict):
            return {k: self._argument(v) for k, v in value.items()}
        if isinstance(value, CONSTANTS):
            return value
        raise TypeError(f"an argument of type {type(value).__name__} of an operation cannot be recorded")

    def _plain(self, value: Any) -> Any:
        """A tuple or list of a class of its own, such as a torch.Size."""
        return (tuple if isinstance(value, tuple) else list)(map(self._argument, value))

    def _constant(self, value: Tensor) -> Node:
        if id(value) not in self._constants:
            name = f"_constant_{len(self._constants)}"
            if isinstance(value, nn.Parameter):
                self.root.register_parameter(name, value)
            else:
                self.root.register_buffer(name, value)
            node = self.graph.get_attr(name)
            node.meta["val"] = Form.of(value)
            self._constants[id(value)] = value, node
        return self._constants[id(value)][1]
