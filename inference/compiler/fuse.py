r"""Compile a graph into one program by inductor."""

from __future__ import annotations

import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from inference.compiler import policy
from inference.core.checks import reason_of
from inference.core.private import compile_graph

_PROGRAMS: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
"""Fused programs of this process by the text of their graphs, the last used last: a fit of the same shapes compiles
nothing again. At most ``policy.FUSED_PROGRAMS`` are kept."""


OPTIONS: dict[str, Any] = {
    "fallback_random": True,
    "cpp.min_chunk_size": policy.FUSED_CHUNK,
    "cpp.vec_isa_ok": os.environ.get("TORCHINDUCTOR_VEC_ISA_OK") != "0",
}
"""Options of inductor: torch's own random numbers, threads only for loops that are worth them, and the instructions
that the processor names, without compiling a test of each: the first program of a machine takes 7 s in place of 17."""


LOOP_OPTIONS: dict[str, Any] = {**OPTIONS, "cpp_wrapper": True, "use_joint_graph_passes": False}
"""Options for loops. A round costs no Python, as the wrapper is C++. The passes over joint graphs are left out: they
remove copies from the body of a loop, after which inductor (torch 2.13) writes into the values that the loop carries
where ``clone().mT`` is written to by indices."""


LOOPS = ("scan", "while_loop")
"""Loops that torch's cache on the disk leaves out unless it is told (:func:`_loop_options`)."""


def fused(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph to a program of tensors; where that cannot be done, warn and return the graph itself.

    The graph must hold no tensors (see :func:`lift_constants`). Call the program under ``torch.no_grad``.
    """
    if not has_compiler():
        return graph

    def build() -> Callable[..., Any]:
        with quietly(), torch.no_grad():
            return compile_graph(graph, list(inputs), options=OPTIONS)  # type: ignore[no-any-return]

    try:
        return _kept((graph.code, tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)), build)
    except Exception as error:  # whatever a compiler may raise, and a cache folder that cannot be written
        reason = reason_of(error)
        warnings.warn(f"the program runs traced, but not fused ({type(error).__name__}: {reason})", stacklevel=3)
        return graph


def looped(function: Callable[..., Any], key: Any) -> Callable[..., Any]:
    """Compile a function of tensors, its loops included; programs are kept by ``key``."""

    def build() -> Callable[..., Any]:
        # A code object of its own: Dynamo keeps programs by code object, and gives up at the eighth.
        code = function.__code__.replace()
        copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
        made: list[Callable[..., Any]] = []

        def run(*inputs: Any) -> Any:
            # Made at the first call, so that whatever a compiler may raise is raised where the call is made.
            if not made:
                made.append(torch.compile(copy, dynamic=False, fullgraph=True, options=_loop_options()))
            return made[0](*inputs)

        return run

    return _kept(key, build)


def _loop_options() -> dict[str, Any]:
    """``LOOP_OPTIONS``, with which another process takes a program from torch's cache on the disk.

    Its key holds the code of a loop's body, as a test shows, and programs are compared with what they were made from
    before they are used.
    """
    cacheable = "unsafe_marked_cacheable_functions"
    if not hasattr(import_module("torch._inductor.config"), cacheable):
        return LOOP_OPTIONS
    return {**LOOP_OPTIONS, cacheable: {f"torch.ops.higher_order.{n}": torch.__version__ for n in LOOPS}}


def _kept(key: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The program of a key for the current number of threads, built if it is not there."""
    key = key, torch.get_num_threads()
    if key not in _PROGRAMS:
        _PROGRAMS[key] = build()
    _PROGRAMS.move_to_end(key)
    while len(_PROGRAMS) > policy.FUSED_PROGRAMS:
        _PROGRAMS.popitem(last=False)
    return _PROGRAMS[key]


@contextmanager
def quietly() -> Iterator[None]:
    """Run without warnings: inductor's are addressed to its own developers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler to fuse programs with; warns once if there is none."""
    if any(shutil.which(c) for c in ("c++", "g++", "clang++", "cl")):
        return True
    warnings.warn("no C++ compiler was found: programs run traced, but not fused", stacklevel=3)
    return False
