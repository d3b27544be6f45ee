r"""Compile a graph into one program by inductor."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from inference.compiler import policy, store
from inference.compiler.package import SUFFIX, Package, write_package
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


LOOP_OPTIONS: dict[str, Any] = {**OPTIONS, "use_joint_graph_passes": False}
"""Options for loops. The passes over joint graphs are left out: they remove copies from the body of a loop, after which
inductor (torch 2.13) writes into the values that the loop carries where ``clone().mT`` is written to by indices."""


def make_cache() -> None:
    """Make the folder that ``TORCHINDUCTOR_CACHE_DIR`` names; where that fails, take a temporary one, with a warning.

    Torch makes it when its compiler is imported, which even an optimizer does, and fails where it cannot.
    """
    asked = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if not asked or "torch._dynamo" in sys.modules:
        return
    try:
        os.makedirs(asked, exist_ok=True)
    except OSError as error:
        folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = mkdtemp(prefix="torchinductor_")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        warnings.warn(
            f"TORCHINDUCTOR_CACHE_DIR: expected a folder that can be made, got {asked} ({reason_of(error)}); programs "
            "are kept in a temporary one",
            stacklevel=2,
        )


make_cache()


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


def looped(
    function: Callable[..., Any], key: Any, example: Any, result: Callable[[list[Tensor]], Any], *, lasting: bool = True
) -> Callable[..., Any]:
    """Compile a function of nested tensors, its loops included.

    Args:
        function: The function.
        key: What decides the program, of texts, numbers, shapes and types; programs are kept by it.
        example: Its arguments, of the shapes, strides and types of all calls.
        result: Its results from a list of their tensors.
        lasting: Whether the program is kept on the disk too, for other processes (:mod:`store`).
    """

    def build() -> Callable[..., Any]:
        path = store.place(_threaded(key)) if lasting else None
        program = None if path is None else store.load(path, lambda file: Package(file, example, result))
        if program is not None:
            return program  # type: ignore[no-any-return]

        with TemporaryDirectory() as folder:
            made = Path(folder) / f"program{SUFFIX}"
            with quietly():
                write_package(function, example, made, LOOP_OPTIONS)
            if path is not None:
                # A full disk costs later processes the time to compile, and this one nothing.
                with suppress(OSError):
                    store.save(path, made)
            return Package(made, example, result)

    try:
        return _kept(key, build)
    except Exception:
        # As much again is to be spent without it before the next attempt.
        _SPENT.pop(_threaded(key), None)
        raise


def is_compiled(key: Any) -> bool:
    """Whether the program of a key that :func:`looped` takes is there, in this process or on the disk."""
    return _threaded(key) in _PROGRAMS or store.holds(_threaded(key))


def agrees(key: Any) -> bool:
    """Whether this process has found the program of a key that :func:`looped` takes to agree with its function."""
    return bool(getattr(_PROGRAMS.get(_threaded(key)), "agrees", False))


_SPENT: OrderedDict[Any, float] = OrderedDict()
"""Operations that were computed without a program, by its key; at most ``policy.SPENT_KEYS``, the last counted last."""


def spend(key: Any, operations: float) -> None:
    """Count operations that were computed without the program of a key."""
    _SPENT[_threaded(key)] = spent(key) + operations
    _SPENT.move_to_end(_threaded(key))
    while len(_SPENT) > policy.SPENT_KEYS:
        _SPENT.popitem(last=False)


def spent(key: Any) -> float:
    """Operations that this process has computed without the program of a key."""
    return _SPENT.get(_threaded(key), 0.0)


def keeps_programs() -> bool:
    """Whether programs are kept for other processes."""
    return store.folder() is not None


def _threaded(key: Any) -> Any:
    """A key with the number of threads, for which a program is compiled."""
    return key, torch.get_num_threads()


def _kept(key: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """The program of a key for the current number of threads, built if it is not there."""
    key = _threaded(key)
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
