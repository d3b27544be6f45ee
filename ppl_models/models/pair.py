r"""Pair: a model and a guide over the same sites.

A model is :math:`p(x, z)`, a guide :math:`q(z)` or :math:`q(z \mid x)`. Both take the same arguments: data by
name, ``size`` (the full number of rows N; without data, how many to draw) and ``rows`` (the indices of this
minibatch), and keep their rows in ``pyro.plate("rows", ..., subsample=rows, dim=-1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_models.models.checks import count_of


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

    distribution: Callable[[], Any]
    """p(x) of a row, an event; it reads all parameters when it is called."""
    guide = nothing

    def model(
        self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Draw or score rows; return x."""
        with rows_plate(x, size, rows):
            return pyro.sample("x", self.distribution(), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each row: (N,)."""
        return self.distribution().log_prob(x)


def continuous(model: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose finite latent sites are hidden, for autoguides: those sites are summed out."""

    def hidden(site: Any) -> bool:
        stochastic = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        return stochastic and bool(site["fn"].has_enumerate_support)

    return poutine.block(model, hide_fn=hidden)
