r"""A computation recorded as one graph of tensor operations, and fused into one program.

Pyro's cost on small and medium models is Python. Here the whole computation, handlers and gradients included,
runs once under ``make_fx``, which records the tensor operations alone; ``torch.compile`` fuses them. Host reads
of Pyro (a loss as a number, checks for nan) are out of the way meanwhile, and the random state stays where it was.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from inference.program import aside


class Untraceable(RuntimeError):
    """A program whose course depends on the values of its tensors."""


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Record the tensor operations of a function of tensors.

    Raises:
        Untraceable: The function reads a value back to steer itself; the message is torch's.
    """
    with aside(), host_reads_away():
        try:
            return make_fx(function)(*inputs)
        except RuntimeError as error:
            raise Untraceable(" ".join(str(error).split())) from error


def fused(graph: GraphModule) -> Callable[..., Any]:
    """The graph as one compiled program; the graph itself where the machine has no C++ compiler."""
    if not has_compiler():
        return graph
    with quietly():
        return torch.compile(graph, dynamic=False)


@contextmanager
def host_reads_away() -> Iterator[None]:
    """Pyro's host reads out of the way: it asks torch whether it is being traced, and takes items as tensors."""
    state, item = torch._C._get_tracing_state, Tensor.item
    try:
        torch._C._get_tracing_state = lambda: True  # type: ignore
        Tensor.item = lambda self: self.detach()  # type: ignore
        with pyro.validation_enabled(False), warnings.catch_warnings():
            # Shapes are constants of a graph made for these shapes: what torch warns of is meant.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            yield
    finally:
        torch._C._get_tracing_state = state
        Tensor.item = item  # type: ignore[method-assign]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # Inductor speaks to its own developers through Python's warnings.
        warnings.simplefilter("ignore")
        yield


@cache
def has_compiler() -> bool:
    if any(shutil.which(c) for c in ("c++", "g++", "clang++", "cl")):
        return True
    warnings.warn("no C++ compiler was found: programs run traced, but not fused", stacklevel=3)
    return False
