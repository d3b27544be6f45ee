r"""A program of one draw, mapped over many by ``torch.vmap``.

The program runs once, in Python, on tensors that hide a leading dimension of draws: what it computes of a draw it
computes of each, and nothing that it does can mix them. Reading a value that differs between draws (``if``, ``item``,
``tolist``, ``numpy``) raises an error. What does not depend on a draw is computed once.

Three things that torch's distributions do have no rule under ``vmap`` and are replaced here: random numbers written
into a new tensor, samplers that are autograd functions, and checks of parameters and values. The checks are collected
and read when all draws are done.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pyro
import torch
from pyro.ops import special
from torch import Tensor
from torch.distributions import Distribution, constraints, dirichlet
from torch.overrides import TorchFunctionMode

from inference.compiler.reads import is_library
from inference.core.private import sample_dirichlet

Function = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From the values of one draw to results of one draw."""

_IN_PLACE = {
    Tensor.exponential_,
    Tensor.cauchy_,
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.geometric_,
    Tensor.log_normal_,
    Tensor.random_,
    Tensor.bernoulli_,
}
_NEW = {
    Tensor.new,
    Tensor.new_empty,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    Tensor.new_tensor,
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.empty_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_WARNINGS = {pyro.util.warn_if_nan.__code__, pyro.util.warn_if_inf.__code__}
_POSITIVE_DEFINITE = type(constraints.positive_definite).check.__code__
_CHECKS = {Distribution.__init__.__code__, Distribution._validate_sample.__code__}


class InvalidDraw(ValueError):
    """Parameters or a value that a distribution refuses at some draw."""


def mapped(
    function: Function, draws: Mapping[str, Tensor], count: int, device: torch.device, *, buffers: bool = False
) -> dict[str, Tensor]:
    r"""Results of a function of one draw for many draws, each with noise of its own.

    Args:
        function: From values by name to results by name.
        draws: Values (count, \*shape) by name.
        count: Number of draws.
        device: Device of noise.
        buffers: Whether new tensors (``torch.zeros(3)``) have a copy per draw, so that they can be written to.

    Returns:
        Results (count, \*shape) by name.

    Raises:
        RuntimeError: The function reads a value that differs between draws, or does what ``vmap`` has no rule for.
        InvalidDraw: A distribution refuses its parameters or its value at some draw.
    """
    names: list[str] = []
    refusals: list[str] = []
    # What all draws share, such as a point estimate, is computed once.
    varies = {n: v.requires_grad or bool((v != v[:1]).any()) for n, v in draws.items()}

    def one(tick: Tensor, *values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        with _Rules(tick, buffers) as rules:
            results = function(dict(zip(draws, values, strict=True)))
        names[:], refusals[:] = results, [text for text, _ in rules.checks]
        return list(results.values()), [valid for _, valid in rules.checks]

    inputs = [v if varies[n] else v[0] for n, v in draws.items()]
    state = _other_generators()
    with _samplers(), warnings.catch_warnings():
        # An operation without a rule of its own runs draw by draw, which is slow and right.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        run = torch.vmap(one, in_dims=(0, *(0 if v else None for v in varies.values())), randomness="different")
        results, checks = run(torch.zeros(count, device=device), *inputs)
    if _other_generators() != state:
        raise RuntimeError("it draws random numbers by NumPy or Python, which all draws would share")
    for text, valid in zip(refusals, checks, strict=True):
        if not valid.all():
            raise InvalidDraw(f"{text}, got another at {int((~valid).sum())} of {count} draws")
    return dict(zip(names, results, strict=True))


class _Rules(TorchFunctionMode):
    """What ``vmap`` has no rule for.

    Attributes:
        checks: What distributions check of their parameters and values: a text, and whether it holds.
    """

    def __init__(self, tick: Tensor, buffers: bool) -> None:
        super().__init__()
        self.tick, self.buffers = tick, buffers
        self.checks: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE and is_library(_module(1)):
            # Libraries write noise to a tensor that they have just made, and use what is returned.
            return func(_per_draw(torch.empty_like(args[0]), self.tick), *args[1:], **kwargs)
        if func == _DATA and is_library(_module(1)):
            return args[0].detach()
        if func is Tensor.clamp_:
            return args[0].copy_(args[0].clamp(*args[1:], **kwargs))
        if func is torch.binomial:
            return _Binomial.apply(self.tick, *args)
        if func is Tensor.__setitem__ and _is_mask(args[1]) and not (isinstance(args[2], Tensor) and args[2].dim()):
            mask = args[1].reshape(args[1].shape + (1,) * (args[0].dim() - args[1].dim()))
            return args[0].copy_(torch.where(mask, torch.as_tensor(args[2], dtype=args[0].dtype), args[0]))
        if func is Tensor.__bool__:
            return self._bool(args[0])
        result = func(*args, **kwargs)
        return _per_draw(result, self.tick) if self.buffers and func in _NEW else result

    def _bool(self, value: Tensor) -> bool:
        frame = sys._getframe(2)
        if frame.f_code in _WARNINGS:
            return False
        if frame.f_code is _POSITIVE_DEFINITE:
            self.checks.append(("expected a symmetric matrix", torch.as_tensor(frame.f_locals["sym_check"]).all()))
            return True
        if frame.f_code not in _CHECKS:
            return Tensor.__bool__(value)
        known = frame.f_locals
        limit = type(known["constraint" if "param" in known else "support"]).__name__.strip("_")
        what = f"{known['param']} in {limit}" if "param" in known else f"a value in {limit}"
        self.checks.append((f"{type(known['self']).__name__}: expected {what}", torch.as_tensor(known["valid"]).all()))
        return True


class _Binomial(torch.autograd.Function):
    """Binomial draws; torch's own rule under ``vmap`` resizes its output, with a warning."""

    @staticmethod
    def forward(tick: Tensor, count: Tensor, probability: Tensor) -> Tensor:
        return torch.binomial(count, probability)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, tick: Tensor, *parameters: Tensor) -> tuple[Tensor, int]:
        full = [p if d is None else p.movedim(d, 0) for p, d in zip(parameters, in_dims[1:], strict=True)]
        full = [p.expand(info.batch_size, *p.shape) if d is None else p for p, d in zip(full, in_dims[1:], strict=True)]
        rank = max(p.dim() for p in full)
        aligned = [p.reshape(len(p), *(1,) * (rank - p.dim()), *p.shape[1:]) for p in full]
        count, probability = (p.contiguous() for p in torch.broadcast_tensors(*aligned))
        return torch.binomial(count, probability), 0


class _Dirichlet:
    """torch's sampler of Dirichlet without its gradient, which is an autograd function that ``vmap`` refuses."""

    apply = staticmethod(sample_dirichlet)


class _SafeLog(torch.autograd.Function):
    """Pyro's logarithm with a bounded gradient, as ``vmap`` takes it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.log()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] / x.clamp(min=torch.finfo(x.dtype).eps)


@contextmanager
def _samplers() -> Iterator[None]:
    ours = _Dirichlet if sample_dirichlet else dirichlet._Dirichlet
    with patch.object(dirichlet, "_Dirichlet", ours), patch.object(special, "_SafeLog", _SafeLog):
        yield


def _other_generators() -> tuple[Any, ...]:
    """State of the random generators that torch does not know."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return name, np.asarray(keys).tobytes(), *rest, random.getstate()


def _per_draw(value: Tensor, tick: Tensor) -> Tensor:
    """A tensor with a copy per draw."""
    return value.masked_fill(tick.bool(), 0)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _module(depth: int) -> str:
    """Name of the module that called the function of torch at this depth."""
    return str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
