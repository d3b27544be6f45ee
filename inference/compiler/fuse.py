r"""Compile a graph into one program by inductor."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_PROGRAMS: dict[Any, Callable[..., Any]] = {}
"""Fused programs of this process by the text of their graph: a fit of the same shape compiles nothing anew."""


OPTIONS: dict[str, Any] = {"fallback_random": True, "cpp.min_chunk_size": 16_384}
"""How inductor compiles: with torch's own random numbers, and on several cores only what is worth their meeting."""


def fused(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """The graph as one compiled program of tensors; the graph itself where the machine has no C++ compiler.

    The graph holds no tensors (see :func:`lift_constants`); call the program under ``torch.no_grad``.
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
