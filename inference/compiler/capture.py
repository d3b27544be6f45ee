r"""Record a computation as one graph of tensor operations.

Pyro's cost on small and medium models is Python. Here the whole computation, effect handlers and gradients included,
runs once under a mode that records the tensor operations alone. Meanwhile what Pyro reads back to the host (a
loss as a number, checks for nan) is patched out, and the random state is preserved. Random numbers come from torch's
own generator, so that a program draws what the eager computation draws.
"""

from __future__ import annotations

import gc
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

from inference.compiler.noise import Draw
from inference.compiler.passes import is_noise
from inference.compiler.reads import ReadsValue, is_library, reads_refused
from inference.compiler.recorder import Recording
from inference.core.handlers import preserved_rng, random_state, set_random_state
from inference.core.private import lacking

Gradients = list[Tensor | None]


class Untraceable(RuntimeError):
    """A computation that cannot be recorded: it reads the values of its tensors, for instance to branch on them."""


def traced(function: Callable[..., Any], *inputs: Any, lift: bool = False) -> Recording:
    """Record the tensor operations of a function of tensors.

    Args:
        function: Maps tensors to tensors, which may be nested in tuples, lists and dictionaries.
        inputs: Tensors to call it with.
        lift: Whether noise becomes inputs of the graph, after the others; ``meta["draws"]`` draws it.

    Returns:
        The graph. Its ``meta["read"]`` holds the tensors from outside whose values were read, with their versions.

    Raises:
        Untraceable: The function reads the value of a tensor that depends on its inputs; the message has the line of
            the user's code and the last site before it. Or it fails, where it does not fail outside a trace.
    """
    if lacking():
        raise Untraceable(lacking())
    with preserved_rng(), without_host_reads(), _uncollected(), _LastSite() as last:
        before = random_state()
        try:
            with reads_refused(lift=lift) as reads:
                graph = reads.record(function, *inputs)
        except ReadsValue as error:
            # Not the text of this error: Pyro adds the shapes of its trace to that.
            told = f"{reads.refused}{_after(last.name)}; use torch.where in place of a branch on it"
            raise Untraceable(told) from error
        except Exception as error:
            # Whatever else: the function has run before, and what is its own fault shows again where it runs eagerly.
            raise Untraceable(f"{_first_sentence(error)}{_place(error)}{_after(last.name)}") from error
        if lift and not any(map(is_noise, graph.graph.nodes)):
            _refuse_seeds(before, graph.meta["draws"])
    graph.meta["read"] = reads.allowed
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _refuse_seeds(before: dict[str, Any], draws: list[Draw]) -> None:
    """Raise Untraceable if a run that began in a random state did more to torch's generators than to draw.

    A run that seeds them draws the same noise each time; as an input of a program the noise would be new.
    """
    after = random_state()
    set_random_state(before)
    for draw in draws:
        draw()
    drawn = random_state()
    states = [(after["torch"], drawn["torch"]), *zip(after.get("cuda", ()), drawn.get("cuda", ()), strict=True)]
    if not all(torch.equal(a, b) for a, b in states):
        raise Untraceable("it sets the state of torch's generator in each run")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Run without Python's garbage collection: a full one looks at all of torch and Pyro, for as long as a trace."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_host_reads() -> Iterator[None]:
    """Run without Pyro's host reads: it believes that it is being traced by torch, and takes items as tensors."""
    with _patched("host reads"), warnings.catch_warnings():
        # The shapes are constants of the graph on purpose, which torch warns about.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        with pyro.validation_enabled(False):
            yield


@contextmanager
def collect_gradients(params: list[Tensor]) -> Iterator[Callable[[], Gradients]]:
    """Collect the gradients that ``backward`` accumulates, as tensors that can be traced."""
    _COLLECTING.append(params)
    try:
        with _patched("backward"):
            yield lambda: [None if p.grad is None else torch.as_tensor(extract_provenance(p.grad)[0]) for p in params]
    finally:
        _COLLECTING.pop()


_COLLECTING: list[list[Tensor]] = []
"""Parameters whose gradients are being collected, the innermost last."""


def _backward(loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False) -> None:
    # Parameters may be frozen.
    params = [p for p in _COLLECTING[-1] if p.requires_grad]
    if not params:
        return
    gradients = torch.autograd.grad(
        loss, params, gradient, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    for p, g in zip(params, gradients, strict=True):
        if g is not None:
            p.grad = g if p.grad is None else p.grad + g


def _tracing_state() -> bool | None:
    # torch.distributions asks too, and would draw other random numbers than it draws eagerly.
    return _caller().startswith("pyro.") or None


def _one_hot(index: Tensor, num_classes: int) -> Tensor:
    # torch's own reads its input back to check it.
    return (index[..., None] == torch.arange(num_classes, device=index.device)).long()


def _masked_select(value: Tensor, mask: Tensor) -> Tensor:
    # TraceEnum_ELBO leaves terms out of a sum, by a shape that depends on the values; zeros do the same.
    if not _caller().startswith("pyro.infer."):
        return torch.masked_select(value, mask)
    return torch.where(mask, value, 0.0).flatten()


PATCHES: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "host reads": (
        (torch._C, "_get_tracing_state", _tracing_state),
        (pyro.util, "torch_isnan", lambda value: False),
        (pyro.util, "torch_isinf", lambda value: False),
        (torch.nn.functional, "one_hot", _one_hot),
        (Tensor, "masked_select", _masked_select),
    ),
    "backward": ((Tensor, "backward", _backward),),
}
"""All that is replaced in torch and Pyro, by occasion: owner, name, replacement. The patches are global and therefore
not thread-safe: while one thread traces, no other may run torch or Pyro."""


@contextmanager
def _patched(occasion: str) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, replacement in PATCHES[occasion]:
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _caller() -> str:
    """Name of the module that called the function which asks."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


class _LastSite(Messenger):
    """Remembers the last sample site that was entered."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def _first_sentence(error: BaseException) -> str:
    # Pyro adds the shapes of the trace.
    text = " ".join(str(error).partition("Trace Shapes:")[0].split())
    return text[:300]


def _place(error: BaseException) -> str:
    """Where the error arose in the user's code: file, line and code."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    frames = zip(modules, traceback.extract_tb(error.__traceback__), strict=True)
    lines = [line for module, line in frames if not line.filename.startswith("<") and not is_library(module)]
    return f" at {Path(lines[-1].filename).name}:{lines[-1].lineno} ({lines[-1].line})" if lines else ""


def _after(site: str | None) -> str:
    return f", after site {site}" if site else ""
