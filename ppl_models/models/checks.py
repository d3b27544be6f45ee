"""Checks of data and arguments; each raises ValueError with a message of one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

MAX_TABLE = 2**26
"""Largest table, in numbers, that an exact answer may build."""


def count_of(given: int | Sequence[str]) -> int:
    """Size of a dimension that is given as a number or as names."""
    return given if isinstance(given, int) else len(given)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless the value is an integer of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise unless the value is a positive number, or zero where that is allowed."""
    if not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name}: expected {'zero or ' if zero else ''}a positive number, got {value}")


def check_matrix(name: str, value: Any, width: int) -> None:
    """Raise unless the value is a finite float matrix (rows, width) with at least one row."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != width:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected (rows, {width}), got {got}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one row, got (0, {width})")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected floating point numbers, got {str(value.dtype).removeprefix('torch.')}")
    bad = ~value.isfinite()
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        got = f"{value[row, column].item()} at row {row}, column {column} ({int(bad.sum())} in all)"
        raise ValueError(f"{name}: expected finite numbers, got {got}")


def check_binary(name: str, value: Tensor | None) -> None:
    """Raise unless the value is None or all zeros and ones."""
    if value is not None:
        check_entries(name, value, (value != 0) & (value != 1), "zeros and ones")


def check_entries(name: str, value: Tensor, wrong: Tensor, expected: str) -> None:
    """Raise if any entry of the mask ``wrong`` is set, with the first wrong value."""
    if bool(wrong.any()):
        raise ValueError(f"{name}: expected {expected}, got {value[wrong][0].item():g}")


def known_labels(y: Tensor | None) -> Tensor:
    """Return the labels; raise if there are none."""
    if y is None:
        raise ValueError("y: expected the label of every row, got none")
    return y


def check_known_labels(x: Any, y: Any, classes: int) -> None:
    """Raise unless y has a label for every row of x, or is valid on its own where x is to be drawn."""
    if x is not None or y is not None:
        check_labels("y", known_labels(y), len(y) if x is None else len(x), classes, missing=False)


def check_labels(name: str, value: Any, length: int, classes: int, *, missing: bool) -> None:
    """Raise unless the value is a vector of labels 0 to ``classes`` - 1, or nan where a label may be missing."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (length,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected one label per row ({length},), got {got}")
    known = value[~value.isnan()] if value.is_floating_point() else value
    if not missing and len(known) < length:
        raise ValueError(f"{name}: expected a label for every row, got nan in {length - len(known)} rows")
    wrong = (known < 0) | (known >= classes)
    if value.is_floating_point():
        wrong |= known != known.floor()
    check_entries(name, known, wrong, f"labels 0 to {classes - 1}{', or nan where one is missing' if missing else ''}")
