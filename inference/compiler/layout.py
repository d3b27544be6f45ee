"""Rewrite a graph of many chains so that the compiler can vectorise its loops.

Two things prevent vectorisation. A model computes with expanded tensors (the logarithm of a scale that is the same for
all rows) once per entry; here the computation comes before the expansion. And a short last dimension (the components
of a mixture) leaves most lanes of a vector register empty, and a reduction over it cannot be vectorised at all; here
the last two dimensions of such a tensor are transposed from where it arises to where it is reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from inference.core.private import tree_flatten, tree_map, tree_unflatten

SHORT, LONGER = 8, 4
"""Largest size of a short last dimension, and the least ratio of the size of the dimension before it to that."""


aten = torch.ops.aten


REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default, aten.logsumexp.default)


def rearrange(graph: GraphModule) -> Callable[..., Any]:
    """A graph as a function to be traced again, with short last dimensions transposed and expansions postponed."""
    return lambda *values: _Rearranging(graph).run(*values)


@dataclass(frozen=True)
class _Transposed:
    """A tensor whose last two dimensions are stored transposed."""

    tensor: Tensor

    @property
    def plain(self) -> Tensor:
        return self.tensor.transpose(-1, -2)


class _Rearranging(Interpreter):
    """Runs a graph with some tensors transposed, and remembers which tensors are expansions."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        # The tensors are kept too, so that no id is used again.
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        flat, form = tree_flatten((args, kwargs), is_leaf=_is_transposed)
        tensors = [v for v in flat if isinstance(v, Tensor | _Transposed)]
        if torch.Tag.pointwise in getattr(target, "tags", ()) and tensors:
            if len(tensors) == 1 and id(tensors[0]) in self._expanded:
                whole, base = self._expanded[id(tensors[0])]
                out = self._call(target, [base if v is whole else v for v in flat], form)
                return self._expand(out, whole.shape)
            shape = torch.broadcast_shapes(*(_plain(v).shape for v in tensors))
            if _is_short(shape):
                return _Transposed(self._call(target, [_transpose(v, len(shape)) for v in flat], form))
        if target in REDUCTIONS and isinstance(args[0], _Transposed):
            return _reduce(target, args[0].tensor, *args[1:], **kwargs)
        if target in (aten.view.default, aten._unsafe_view.default):
            target = aten.reshape.default
        flat = [_plain(v) for v in flat]
        if target is aten.expand.default and flat[0].dim() == len(args[1]):
            return self._expand(flat[0], args[1])
        if target is aten._log_softmax.default and id(flat[0]) in self._expanded:
            whole, base = self._expanded[id(flat[0])]
            if base.shape[args[1]] == whole.shape[args[1]]:
                return self._expand(self._call(target, [base, *flat[1:]], form), whole.shape)
        return self._call(target, flat, form)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(_plain, args[0], is_leaf=_is_transposed)

    def _call(self, target: Any, flat: list[Any], form: Any) -> Any:
        args, kwargs = tree_unflatten(flat, form)
        return super().call_function(target, args, kwargs)

    def _expand(self, base: Tensor, shape: Sequence[int]) -> Tensor:
        out = base.expand(shape)
        self._expanded[id(out)] = out, base
        return out


def _is_transposed(value: Any) -> bool:
    return isinstance(value, _Transposed)


def _is_short(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and 1 < shape[-1] <= SHORT and shape[-2] >= LONGER * shape[-1]


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _Transposed) else value


def _transpose(value: Any, dims: int) -> Any:
    """An argument of a pointwise operation, transposed, with ``dims`` dimensions."""
    if isinstance(value, _Transposed):
        tensor = value.tensor
        return tensor[(None,) * (dims - tensor.dim())] if tensor.dim() < dims else tensor
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[(None,) * (dims - value.dim())].transpose(-1, -2)


def _reduce(target: Any, tensor: Tensor, dims: Sequence[int], keep: bool = False, **more: Any) -> Any:
    """A reduction of a transposed tensor over dimensions of the plain one."""
    last = tensor.dim() - 1
    places = {last: last - 1, last - 1: last}
    over = {d % tensor.dim() for d in dims} or set(range(tensor.dim()))
    out = target(tensor, [places.get(d, d) for d in over], keep, **more)
    # If one of the two dimensions is gone, the other is last in either order.
    return out if not keep and over & {last, last - 1} else _Transposed(out)
