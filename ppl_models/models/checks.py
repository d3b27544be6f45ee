r"""Checks of data and arguments, each with a message of one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def count_of(given: int | Sequence[str]) -> int:
    """Size of a dimension that is given as a number or as names."""
    return given if isinstance(given, int) else len(given)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless the value is an integer and large enough."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_matrix(name: str, value: Any, width: int) -> None:
    """Raise unless the value is a finite, non-empty float matrix (rows, width)."""
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
    """Raise unless the value, where there is one, holds zeros and ones."""
    if value is not None and bool(((value != 0) & (value != 1)).any()):
        wrong = value[(value != 0) & (value != 1)][0].item()
        raise ValueError(f"{name}: expected zeros and ones, got {wrong}")


def known_labels(y: Tensor | None) -> Tensor:
    """The labels, of a pair that needs that of every row."""
    if y is None:
        raise ValueError("y: expected the label of every row, got none")
    return y


def check_known_labels(x: Any, y: Any, classes: int) -> None:
    """Raise unless y has a class for every row of x, or x is to be drawn of the labels y."""
    if x is not None or y is not None:
        check_labels("y", known_labels(y), len(y) if x is None else len(x), classes, missing=False)


def check_labels(name: str, value: Any, length: int, classes: int, *, missing: bool) -> None:
    """Raise unless the value holds a label below ``classes`` for each row (nan where missing, if it may be)."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (length,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected one label a row ({length},), got {got}")
    known = value[~value.isnan()] if value.is_floating_point() else value
    if not missing and len(known) < length:
        raise ValueError(f"{name}: expected a label for every row, got nan in {length - len(known)} rows")
    wrong = known[(known < 0) | (known >= classes) | (known != known.floor() if value.is_floating_point() else False)]
    if len(wrong):
        hint = "; mark a missing label by nan" if missing else ""
        raise ValueError(f"{name}: expected labels 0 to {classes - 1}, got {wrong[0].item()}{hint}")
