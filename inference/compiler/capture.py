r"""A computation recorded as one graph of tensor operations, and fused into one program.

Pyro's cost on small and medium models is Python. Here the whole computation, handlers and gradients included,
runs once under ``make_fx``, which records the tensor operations alone; inductor fuses them. Host reads of Pyro (a
loss as a number, checks for nan) are out of the way meanwhile, and the random state stays where it was. Random
numbers come from torch's own generator, so that a fused program draws what the eager one draws.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.ops.provenance import extract_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from inference.compiler.passes import masks_to_indices, normalise_noise
from inference.core.handlers import preserved_rng


@contextmanager
def collect_gradients(params: list[Tensor]) -> Iterator[Callable[[], Gradients]]:
    """Collect what ``backward`` would leave with the parameters."""

    def backward(loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False) -> None:
        found = torch.autograd.grad(
            loss, params, gradient, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        for p, g in zip(params, found, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else p.grad + g

    with patch.object(Tensor, "backward", backward):
        yield lambda: [None if p.grad is None else torch.as_tensor(extract_provenance(p.grad)[0]) for p in params]


LIBRARIES = ("torch", "pyro", "inference")


Gradients = list[Tensor | None]


class Untraceable(RuntimeError):
    """A program whose course depends on the values of its tensors."""


def traced(function: Callable[..., Any], *inputs: Any) -> GraphModule:
    """Record the tensor operations of a function of tensors.

    Raises:
        Untraceable: The function reads a value back to steer itself; the message has torch's reason, the line and
            the last site before it.
    """
    with preserved_rng(), host_reads_away(), _Last() as last:
        try:
            graph = make_fx(function)(*inputs)
        except RuntimeError as error:
            raise Untraceable(f"{_first_sentence(error)}{_place(error, last.name)}") from error
    normalise_noise(graph)
    masks_to_indices(graph)
    graph.recompile()
    return graph


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
