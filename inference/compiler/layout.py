"""A graph of many chains rewritten so that its loops are vectorised.

Two things keep a compiler from it. What a model computes of expanded tensors (the logarithm of a scale that is the same
for all rows) it computes once an entry; here it is computed before it is expanded. And a short last dimension (the
components of a mixture) leaves most lanes of a vector empty, and a reduction over it none at all; here tensors that
end in one have their last two dimensions exchanged from where they come to be to where they are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

SHORT, LONGER = 8, 4
"""Entries of a short last dimension, and how many times as long the one before it is at least."""


aten = torch.ops.aten


REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default, aten.logsumexp.default)


def rearrange(graph: GraphModule) -> Callable[..., Any]:
    """A graph as a function, to be traced again: short last dimensions exchanged, nothing computed of what repeats."""
    return lambda *values: _Rearranging(graph).run(*values)


@dataclass(frozen=True)
class _Exchanged:
    """A tensor whose last two dimensions stand the other way round."""

    tensor: Tensor

    @property
    def plain(self) -> Tensor:
        return self.tensor.transpose(-1, -2)


class _Rearranging(Interpreter):
    """Runs a graph, and holds some of its tensors exchanged and some as what they repeat."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        # The tensors themselves are kept, too: what has gone leaves its number to another.
        self._repeated: dict[int, tuple[Tensor, Tensor]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        flat, form = tree_flatten((args, kwargs), is_leaf=_is_exchanged)
        tensors = [v for v in flat if isinstance(v, Tensor | _Exchanged)]
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags and tensors:
            if len(tensors) == 1 and id(tensors[0]) in self._repeated:
                whole, base = self._repeated[id(tensors[0])]
                out = self._call(target, [base if v is whole else v for v in flat], form)
                return self._repeat(out, whole.shape)
            shape = torch.broadcast_shapes(*(_plain(v).shape for v in tensors))
            if _is_short(shape):
                return _Exchanged(self._call(target, [_exchange(v, len(shape)) for v in flat], form))
        if target in REDUCTIONS and isinstance(args[0], _Exchanged):
            return _reduce(target, args[0].tensor, *args[1:], **kwargs)
        if target in (aten.view.default, aten._unsafe_view.default):
            target = aten.reshape.default
        flat = [_plain(v) for v in flat]
        if target is aten.expand.default and flat[0].dim() == len(args[1]):
            return self._repeat(flat[0], args[1])
        if target is aten._log_softmax.default and id(flat[0]) in self._repeated:
            whole, base = self._repeated[id(flat[0])]
            if base.shape[args[1]] == whole.shape[args[1]]:
                return self._repeat(self._call(target, [base, *flat[1:]], form), whole.shape)
        return self._call(target, flat, form)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(_plain, args[0], is_leaf=_is_exchanged)

    def _call(self, target: Any, flat: list[Any], form: Any) -> Any:
        args, kwargs = tree_unflatten(flat, form)
        return super().call_function(target, args, kwargs)

    def _repeat(self, base: Tensor, shape: Sequence[int]) -> Tensor:
        out = base.expand(shape)
        self._repeated[id(out)] = out, base
        return out


def _is_exchanged(value: Any) -> bool:
    return isinstance(value, _Exchanged)


def _is_short(shape: Sequence[int]) -> bool:
    return len(shape) > 1 and 1 < shape[-1] <= SHORT and shape[-2] >= LONGER * shape[-1]


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, _Exchanged) else value


def _exchange(value: Any, dims: int) -> Any:
    """An argument of a pointwise operation, exchanged, as one of so many dimensions."""
    if isinstance(value, _Exchanged):
        tensor = value.tensor
        return tensor[(None,) * (dims - tensor.dim())] if tensor.dim() < dims else tensor
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return value[(None,) * (dims - value.dim())].transpose(-1, -2)


def _reduce(target: Any, tensor: Tensor, dims: Sequence[int], keep: bool = False, **more: Any) -> Any:
    """A reduction of an exchanged tensor over dimensions of the plain one."""
    last = tensor.dim() - 1
    places = {last: last - 1, last - 1: last}
    over = {d % tensor.dim() for d in dims} or set(range(tensor.dim()))
    out = target(tensor, [places.get(d, d) for d in over], keep, **more)
    # Where one of the two is gone the other is the last, whichever way they stood.
    return out if not keep and over & {last, last - 1} else _Exchanged(out)
