"""Checks of data and arguments; each raises ValueError with a message of one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

MAX_TABLE = 2**26
"""Largest table, in numbers, that an exact answer may build."""


BLOCK_ROWS = 65_536
"""Rows whose entries are checked at once."""


def count_of(name: str, given: Any, least: int = 1) -> int:
    """Size of a dimension that is given as a number or as different names; raise unless it is at least ``least``."""
    if isinstance(given, str | bytes) or not (isinstance(given, Integral) or _listed(given)) or given is True:
        raise ValueError(f"{name}: expected a number or a sequence of names, got {given!r}")
    names = [] if isinstance(given, Integral) else list(map(str, given))
    size = int(given) if isinstance(given, Integral) else len(names)
    if size < least:
        raise ValueError(f"{name}: expected at least {'one' if least == 1 else least}, got {given!r}")
    twice = next((n for k, n in enumerate(names) if n in names[:k]), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"{name}: expected different names, got {twice!r} twice")
    return size


def _listed(given: Any) -> bool:
    return isinstance(given, Iterable) and hasattr(given, "__len__") and not isinstance(given, Tensor | dict | set)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise unless the value is an integer of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")


def check_widths(name: str, value: Any, least: int = 1) -> None:
    """Raise unless the value is a sequence of at least ``least`` widths, each a positive integer."""
    fits = isinstance(value, Sequence | torch.Size) and not isinstance(value, str) and len(value) >= least
    if not fits or any(not isinstance(v, Integral) or isinstance(v, bool) or v < 1 for v in value):
        many = f", at least {least}" if least else ""
        raise ValueError(f"{name}: expected a sequence of positive integers{many}, got {value!r}")


def check_number(name: str, value: Any, *, expected: str = "a finite number") -> None:
    """Raise unless the value is a finite number."""
    number = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
    if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{name}: expected {expected}, got {number!r}")


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless the value is a finite positive number, or zero where that is allowed."""
    expected = f"{'zero or ' if zero else ''}a positive number"
    check_number(name, value, expected=expected)
    if not (value > 0 or (zero and value == 0)):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def check_fraction(name: str, value: Any, *, one: bool = True) -> None:
    """Raise unless the value is a number from 0 to 1, or to below 1."""
    expected = f"a fraction from 0 to {'' if one else 'below '}1"
    check_number(name, value, expected=expected)
    if not 0 <= value <= 1 or (value == 1 and not one):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise unless the value is one of those known."""
    if value not in tuple(known):
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def random_source(seed: Any, name: str = "seed") -> torch.Generator:
    """A random generator on the CPU from a seed, an integer of at least 0."""
    check_count(name, seed, 0)
    return torch.Generator().manual_seed(int(seed))


def check_guide(make: Any) -> None:
    """Raise unless it may build a guide from a model."""
    if not callable(make):
        raise TypeError(f"guide: expected a function from the model to a guide, such as AutoNormal, got {make!r}")


def check_matrix(name: str, value: Any, width: int) -> None:
    """Raise unless the value is a finite float matrix (rows, width) with at least one row."""
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != width:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected (rows, {width}), got {got}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one row, got (0, {width})")
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected floating point numbers, got {str(value.dtype).removeprefix('torch.')}")
    # Unlike a mask of all entries, the ends take no memory; a nan is both of them.
    if not all(end.isfinite() for end in value.aminmax()):
        bad = ~value.isfinite()
        row, column = bad.nonzero()[0].tolist()
        got = f"{value[row, column].item()} at row {row}, column {column} ({int(bad.sum())} in all)"
        raise ValueError(f"{name}: expected finite numbers, got {got}")


def check_numbers(name: str, value: Any, length: int) -> None:
    """Raise ValueError unless the value is a finite float vector with an entry for each of so many rows."""
    if not isinstance(value, Tensor) or tuple(value.shape) != (length,):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a number per row ({length},), got {got}")
    check_matrix(name, value.reshape(-1, 1), 1)


def known_or_zero(value: Any) -> Any:
    """A tensor with zeros in place of nan, where these are no error; anything else as it is."""
    return value.nan_to_num() if isinstance(value, Tensor) and value.is_floating_point() else value


def fractional(value: Tensor) -> Tensor:
    """Which entries are no whole numbers."""
    return value != value.floor() if value.is_floating_point() else torch.zeros_like(value, dtype=torch.bool)


def check_binary(name: str, value: Tensor | None) -> None:
    """Raise unless the value is None or all zeros and ones."""
    for rows in () if value is None else value.split(BLOCK_ROWS):
        check_entries(name, rows, (rows != 0) & (rows != 1), "zeros and ones")


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
    wrong |= fractional(known)
    check_entries(name, known, wrong, f"labels 0 to {classes - 1}{', or nan where one is missing' if missing else ''}")
