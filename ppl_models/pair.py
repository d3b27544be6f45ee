r"""Pair: a model and a guide over the same sites.

A model is :math:`p(x, z)`, a guide :math:`q(z)` or :math:`q(z \mid x)`. Both take the same arguments: data by
name, ``size`` (the full number of rows N; without data, how many to draw) and ``rows`` (the indices of this
minibatch), and keep their rows in ``pyro.plate("rows", ..., subsample=rows, dim=-1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class Pair(PyroModule):
    """Base of every pair in the zoo.

    A subclass has a method ``model`` and either a method ``guide`` or an attribute of that name, set in
    its constructor, such as ``self.guide = AutoNormal(continuous(self.model))``. Methods named ``model``,
    ``guide`` and ``exact`` become Pyro methods by themselves: one that is not has gradients of None.

    Attributes:
        coords: Names along a dimension (a plate or one of ``dims``), for ArviZ.
        dims: Names of the event dimensions of a site, for ArviZ.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.coords: dict[str, list[str]] = {}
        self.dims: dict[str, tuple[str, ...]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for half in ("model", "guide", "exact"):
            if half in cls.__dict__:
                setattr(cls, half, pyro_method(cls.__dict__[half]))

    def check(self, **data: Any) -> None:
        """Raise ValueError, one line, when the data do not fit the pair. The verbs call it before any work."""

    def name_dimension(self, dimension: str, given: int | Sequence[str]) -> int:
        """Size of a dimension that is given as a number or as names; names become coordinates."""
        size = count_of(given)
        if size < 1:
            raise ValueError(f"{dimension}: expected at least one, got {given!r}")
        if not isinstance(given, int):
            self.coords[dimension] = [str(name) for name in given]
        return size


def count_of(given: int | Sequence[str]) -> int:
    """Size of a dimension that is given as a number or as names."""
    return given if isinstance(given, int) else len(given)


def rows_plate(x: Tensor | None, size: int | None, rows: Tensor | None) -> Any:
    """The plate of rows: N is ``size`` or the length of x; ``rows`` are the indices at hand."""
    if size is None and x is None:
        raise ValueError("size: expected the number of rows to draw when x is not given, got None")
    count = len(x) if size is None else size  # type: ignore[arg-type]
    return pyro.plate("rows", count, subsample=rows if rows is None else rows.long(), dim=-1)


def nothing(*_: Any, **__: Any) -> None:
    """The guide of a model without latent sites to fit."""


class Visible(Pair):
    """A pair without latent sites: rows x from one law, whose ELBO is the exact log likelihood."""

    law: Callable[[], Any]
    """p(x) of a row, an event; it reads all parameters when it is called."""
    guide = nothing

    def model(
        self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Draw or score rows; return x."""
        with rows_plate(x, size, rows):
            return pyro.sample("x", self.law(), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each row: (N,)."""
        return self.law().log_prob(x)


def continuous(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose finite latent sites are hidden, for autoguides: those sites are summed out."""

    def hidden(site: Any) -> bool:
        stochastic = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        return stochastic and bool(site["fn"].has_enumerate_support)

    return poutine.block(model, hide_fn=hidden)


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


def choose(table: Tensor, labels: Tensor) -> Tensor:
    r"""Rows of a table by label: table (..., K, \*event of one dimension), labels (..., N) -> (..., N, event).

    A product with one-hot labels instead of an index: draws and enumerated labels broadcast on the left,
    and its gradient is one matrix product.
    """
    return members(labels, table.shape[-2], table.dtype) @ table


def members(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """One-hot labels (..., N, K). Torch's own reads the labels' range back, which no graph can trace."""
    return (labels[..., None] == torch.arange(classes, device=labels.device)).to(dtype)
