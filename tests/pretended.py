"""A device that only pretends: its tensors compute on the CPU, and meeting a tensor of the CPU is an error, as on cuda.

``on_a_pretended_device()`` runs a block in which ``torch.device("pretend")`` exists: factories, ``.to``, modules,
autograd and ``vmap`` know it. An operation on tensors of both devices raises ``MixedDevices``. Torch allows some on
cuda, and so does this: a copy, an index on the CPU, and a number (a tensor without dimensions) beside tensors of the
device. Nothing can be traced there: a graph would hold the tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from inference.compiler.recorder import Recorder

aten = torch.ops.aten
NAME = "pretend"
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
JOINED = {aten.stack.default, aten.cat.default}


class MixedDevices(RuntimeError):
    """An operation met tensors of two devices."""


class Pretended(Tensor):
    """A tensor of the pretended device, which holds a tensor of the CPU."""

    held: Tensor
    __slots__ = ("held",)

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    asked = kwargs.get("device")
    tensors = [v for v in tree_flatten((args, kwargs))[0] if isinstance(v, Tensor)]
    there = [v for v in tensors if isinstance(v, Pretended)]
    if there:
        _refuse_mixed(func, args, tensors)
    to_device = asked is not None and torch.device(asked).type == NAME
    if to_device:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        generator = kwargs.get("generator")
        if generator is not None:
            raise MixedDevices(f"{func}: a generator of the CPU for a tensor of the device")
    args_in, kwargs_in = tree_map(lambda v: v.held if isinstance(v, Pretended) else v, (args, kwargs))
    out = func(*args_in, **kwargs_in)
    if to_device or (there and asked is None and (func not in COPIES or isinstance(args[0], Pretended | list))):
        out = tree_map(lambda v: Pretended(v) if isinstance(v, Tensor) else v, out)
    if not there:
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def _refuse_mixed(func: Any, args: Any, tensors: list[Tensor]) -> None:
    if func in COPIES:
        return
    if func in INDEXED and isinstance(args[0], Pretended):
        tensors = [v for v in (args[0], *args[2:3]) if isinstance(v, Tensor)]
    least = 0 if func in JOINED else 1
    for v in tensors:
        if not isinstance(v, Pretended) and v.dim() >= least:
            raise MixedDevices(f"{func}: a tensor of the CPU of shape {tuple(v.shape)} beside tensors of the device")


def _refuse(*_: Any) -> Any:
    raise RuntimeError("computations on a pretended device cannot be traced")


@contextmanager
def on_a_pretended_device() -> Iterator[torch.device]:
    """Run a block in which the device exists."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)
    before = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
    # ``torch.tensor(1.0, device=...)`` then goes through the mode.
    torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
    try:
        with _Device(), patch.object(Recorder, "record", _refuse):
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)  # type: ignore[attr-defined]
