"""Checks of arguments: one form of error, ``name: expected ..., got ...``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a ValueError unless the value is an integer and at least ``least``."""
    if not isinstance(value, int | Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise a ValueError unless the value is a finite number above zero."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_not_negative(**values: Any) -> None:
    """Raise a ValueError unless all values are finite numbers from zero."""
    for name, value in values.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected zero or a positive number, got {value!r}")


def check_chance(name: str, value: Any, *, ends: bool = True) -> None:
    """Raise a ValueError unless the value is a number between 0 and 1, which may be either of them or not."""
    if not _is_number(value) or not (0 <= value <= 1 if ends else 0 < value < 1):
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}")


def _is_number(value: Any) -> bool:
    """Whether the value is a real number, also one of NumPy or a tensor of one."""
    return isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def made_of(name: str, value: Any, kind: type, what: str) -> Any:
    """An instance of a class, or what a factory without arguments makes, if that is one.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(value, type) and not issubclass(value, kind):
        raise TypeError(f"{name}: expected {what}, got {value.__name__}")
    made = value() if callable(value) and not isinstance(value, kind) else value
    if not isinstance(made, kind):
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    return made


def check_one_of(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise a ValueError unless the value is one of those known."""
    known = list(known)
    if not any(value is k or (value == k and type(value) is type(k)) for k in known):
        shown = [f'"{k}"' if isinstance(k, str) else str(k) for k in known]
        raise ValueError(f"{name}: expected {', '.join(shown[:-1])} or {shown[-1]}, got {value!r}")


def reason_of(error: BaseException, limit: int = 200) -> str:
    """What an error says, in one line of limited length; its class if it says nothing."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def check_device(device: Any) -> torch.device | None:
    """A device as torch knows it, or None for None.

    Raises:
        ValueError: It is no device, or one that torch cannot use on this machine.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        why = " ".join(str(error).split("\n")[0].split())
        expected = f"a device that torch can use here ({', '.join(_usable())})"
        raise ValueError(f"device: expected {expected}, got {str(device)!r} ({why[:60]})") from None


def _usable() -> list[str]:
    """The kinds of devices of this machine that torch can use."""
    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(name for name, usable in known.items() if usable)]
