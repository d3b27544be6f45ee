r"""A computation recorded as one graph of tensor operations, and fused into one program.

Pyro's cost on small and medium models is Python. Here the whole computation, handlers and gradients included,
runs once under ``make_fx``, which records the tensor operations alone; inductor fuses them. Host reads of Pyro (a
loss as a number, checks for nan) are out of the way meanwhile, and the random state stays where it was. Random
numbers come from torch's own generator, so that a fused program draws what the eager one draws.
"""

from __future__ import annotations

import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import patch

import pyro
import pyro.util
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from inference.program import aside

_PROGRAMS: dict[Any, Callable[..., Any]] = {}
"""Fused programs of this process by the text of their graph: a fit of the same shape compiles nothing anew."""
OPTIONS: dict[str, Any] = {"fallback_random": True, "cpp.min_chunk_size": 16_384}
"""How inductor compiles: with torch's own random numbers, and on several cores only what is worth their meeting."""
LIBRARIES = ("torch", "pyro", "inference")


class Untraceable(RuntimeError):
    """A program whose course depends on the values of its tensors."""


def traced(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Record the tensor operations of a function of tensors.

    Raises:
        Untraceable: The function reads a value back to steer itself; the message has torch's reason, the line and
            the last site before it.
    """
    with aside(), host_reads_away(), _Last() as last:
        try:
            graph = make_fx(function)(*inputs)
        except RuntimeError as error:
            raise Untraceable(f"{_first_sentence(error)}{_place(error, last.name)}") from error
    _plain_noise(graph)
    _plain_masks(graph)
    graph.recompile()
    return graph


def lifted(graph: GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its last inputs, in place, and return them: they may change."""
    held: dict[str, Node] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            held[name] = last_input(graph, f"held_{len(held)}")
            held[name].meta = dict(node.meta)
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    tensors = [_attribute(graph, name) for name in held]
    graph.recompile()
    return tensors


def last_input(graph: GraphModule, name: str) -> Node:
    """A further input of a graph, after those that it has."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    with graph.graph.inserting_after(inputs[-1]) if inputs else graph.graph.inserting_before():
        return graph.graph.placeholder(name)


def fused(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph as one compiled program of tensors; the graph itself where the machine has no C++ compiler.

    The graph holds no tensors (see :func:`lifted`); call the program under ``torch.no_grad``.
    """
    if not has_compiler():
        return graph
    shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
    key = (graph.code, shapes, torch.get_num_threads())
    if key not in _PROGRAMS:
        with quietly(), torch.no_grad():
            _PROGRAMS[key] = torch._inductor.compile(graph, list(inputs), options=OPTIONS)  # type: ignore[attr-defined]
    return _PROGRAMS[key]


def looped(function: Callable[..., Any], key: Any) -> Callable[..., Any]:
    """A function of tensors, loops of theirs included, as one compiled program; kept for the process by ``key``.

    The wrapper of the program is C++: it makes a round of a loop cost no Python.
    """
    key = key, torch.get_num_threads()
    if key not in _PROGRAMS:
        # A code object of its own: Dynamo keeps programs by code object, and gives up at the eighth.
        code = function.__code__.replace()
        own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
        options = {**OPTIONS, "cpp_wrapper": True}
        _PROGRAMS[key] = torch.compile(own, dynamic=False, fullgraph=True, options=options)
    return _PROGRAMS[key]


@contextmanager
def host_reads_away() -> Iterator[None]:
    """Pyro's host reads out of the way: it asks torch whether it is being traced, and takes items as tensors."""
    aim: list[Any] = [
        # torch.distributions asks too, and would draw other random numbers than it draws eagerly.
        patch.object(torch._C, "_get_tracing_state", lambda: _caller().startswith("pyro") or None),
        patch.object(Tensor, "item", lambda self: self.detach()),
        patch.object(pyro.util, "torch_isnan", lambda value: False),
        patch.object(pyro.util, "torch_isinf", lambda value: False),
        patch.object(torch.nn.functional, "one_hot", _one_hot),
        patch.object(Tensor, "masked_select", _masked_select),
    ]
    with ExitStack() as stack, warnings.catch_warnings():
        for each in aim:
            stack.enter_context(each)
        # Shapes are constants of a graph made for these shapes: what torch warns of is meant.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        with pyro.validation_enabled(False):
            yield


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # Inductor speaks to its own developers through Python's warnings.
        warnings.simplefilter("ignore")
        yield


@cache
def has_compiler() -> bool:
    """Whether programs can be fused; the first time that they cannot, one line says so."""
    if any(shutil.which(c) for c in ("c++", "g++", "clang++", "cl")):
        return True
    warnings.warn("no C++ compiler was found: programs run traced, but not fused", stacklevel=3)
    return False


class _Last(Messenger):
    """Remembers the last sample site that was entered."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def _one_hot(index: Tensor, num_classes: int) -> Tensor:
    """torch's own, which reads its input back to check it."""
    return (index[..., None] == torch.arange(num_classes, device=index.device)).long()


def _masked_select(value: Tensor, mask: Tensor) -> Tensor:
    """What TraceEnum_ELBO takes out of a sum, as zeros in it: its shape would depend on the values."""
    if not _caller().startswith("pyro.infer"):
        return torch.masked_select(value, mask)
    return torch.where(mask, value, 0.0).flatten()


def _caller() -> str:
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "get value out of a tracing tensor" in text:
        return "a value of a tensor decides its course"
    return text[:300]


def _place(error: BaseException, site: str | None) -> str:
    """Where the user's own code was: file, line and the last site."""
    roots = {str(Path(sys.modules[m].__file__ or "").parent) for m in LIBRARIES if m in sys.modules}
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<", *roots))]
    at = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"{at}{f', after site {site}' if site else ''}"


def _plain_noise(graph: GraphModule) -> None:
    """Write noise in the one form in which inductor draws torch's own numbers, and fastest."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        value = node.meta.get("val")
        if node.target is aten.normal_.default and len(node.args) == 1 and not node.kwargs:
            empty = node.args[0]
            if empty.target in (aten.empty.memory_format, aten.new_empty.default) and len(empty.users) == 1:
                with graph.graph.inserting_before(node):
                    noise = _call(graph, aten.randn.default, list(value.shape), dtype=value.dtype, device=value.device)
                node.replace_all_uses_with(noise)
                graph.graph.erase_node(node)
                graph.graph.erase_node(empty)
        elif node.target is aten.bernoulli.default and len(node.args) == 1 and value.device.type == "cpu":
            chance = node.args[0]
            with graph.graph.inserting_before(node):
                noise = _call(graph, aten.rand.default, list(value.shape), dtype=value.dtype, device=value.device)
                below = _call(graph, aten.lt.Tensor, noise, chance)
                hit = _call(graph, aten._to_copy.default, below, dtype=value.dtype)
            node.replace_all_uses_with(hit)
            graph.graph.erase_node(node)


def _call(graph: GraphModule, target: Any, *args: Any, **kwargs: Any) -> Node:
    return graph.graph.call_function(target, args, kwargs)


def _plain_masks(graph: GraphModule) -> None:
    """Write an index by a constant mask as one by numbers: a mask's result has no shape that inductor would know."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            continue
        places: list[Any] = []
        for index in node.args[1]:
            mask = _constant(index) if isinstance(index, Node) and _is_mask(index) else None
            if mask is None:
                places.append(index)
                continue
            for numbers in mask.nonzero(as_tuple=True):
                name = f"_places_{len(list(graph.buffers()))}"
                graph.register_buffer(name, numbers)
                with graph.graph.inserting_before(node):
                    places.append(graph.graph.get_attr(name))
        node.args = (node.args[0], places, *node.args[2:])
    graph.graph.eliminate_dead_code()


def _is_mask(node: Node) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _constant(node: Node) -> Tensor | None:
    """Value of a node that neither inputs, held tensors nor noise reach."""
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    if node.target is torch.ops.aten.lift_fresh_copy.default:
        return _attribute(node.graph.owning_module, str(node.args[0].target))  # type: ignore[arg-type, union-attr]
    values = {n: _constant(n) for n in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _attribute(graph: GraphModule, name: str) -> Tensor:
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    return value
