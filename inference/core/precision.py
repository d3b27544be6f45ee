r"""Mixed precision: the products of networks in bfloat16, everything else in the precision of the parameters.

``torch.autocast`` leaves the outputs of networks in bfloat16, and on the CPU log densities of them, and sums of those
over rows, would be computed in bfloat16 too. Here a product takes float32 and returns float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from pyro import poutine
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from inference.core.bound import BoundPair
from inference.core.handlers import first_valid, isolated

PRECISIONS = (None, "bfloat16")
"""What ``fit`` takes."""

_CONVOLUTIONS = {
    function: dimensions
    for dimensions in (1, 2, 3)
    for function in (getattr(functional, f"conv{dimensions}d"), getattr(functional, f"conv_transpose{dimensions}d"))
}


class Bfloat16(TorchFunctionMode):
    """Runs float32 products of linear and convolutional layers in bfloat16; biases are added in float32.

    Attributes:
        products: How many there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.linear and func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if {x.dtype, weight.dtype} != {torch.float32}:
            return func(*args, **kwargs)
        self.products += 1
        out = func(x.bfloat16(), weight.bfloat16(), None, *args[3:], **given).float()
        return out if bias is None else out + bias.reshape(-1, *[1] * _CONVOLUTIONS.get(func, 0))


def with_precision(bound: BoundPair, precision: str | None) -> BoundPair:
    """The pair with both halves in a precision of ``PRECISIONS``.

    Raises:
        ValueError: It changes nothing: no product of a network takes float32.
    """
    if precision is None:
        return bound
    _check(bound, precision)
    guide = None if bound.guide is None else _in_bfloat16(bound.guide)
    return replace(bound, model=_in_bfloat16(bound.model), guide=guide)


def _in_bfloat16(half: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(half)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Bfloat16():
            return half(*args, **kwargs)

    return call


def _check(bound: BoundPair, precision: str) -> None:
    with isolated(0), torch.no_grad(), poutine.block(), Bfloat16() as mode:
        for half in (bound.model, bound.guide):
            if half is not None:
                first_valid(partial(half, **bound.arguments()))
    if not mode.products:
        kinds = sorted({str(p.dtype).removeprefix("torch.") for m in bound.modules for p in m.parameters()})
        got = f"none that runs; parameters of modules: {', '.join(kinds) or 'none'}"
        raise ValueError(f"precision: expected linear or convolutional layers in float32 for {precision!r}, got {got}")
