r"""Pair: a model and a guide over the same sites.

A model is :math:`p(x, z)`, a guide :math:`q(z)` or :math:`q(z \mid x)`. Both take data by name, and keep their rows in
the plate that :meth:`Pair.rows` returns. Two more arguments belong to every half, ``size`` (the full number of rows N;
without data, how many rows to draw) and ``rows`` (the indices of a minibatch): the base class takes them and gives them
to the plate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, NamedTuple

import pyro
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_models.models.checks import count_of
from ppl_models.models.parts.grids import Grid

HALVES = ("model", "guide", "exact")


class Minibatch(NamedTuple):
    """The full number of rows, and the indices of those at hand; None: all."""

    size: int | None = None
    rows: Tensor | None = None


class Pair(PyroModule):
    r"""Base of every pair in the zoo.

    A subclass has a method ``model`` and either a method ``guide`` or an attribute of that name, set in its
    constructor, such as ``self.guide = AutoNormal(continuous(self.model))``. Methods named ``model``, ``guide`` and
    ``exact`` become Pyro methods by themselves (gradients of one that is not would be None), and take ``size`` and
    ``rows`` beside their own arguments.

    Attributes:
        coords: Names along a dimension (a plate or one of ``dims``), for ArviZ.
        dims: Names of the event dimensions of a site, for ArviZ.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> class PoissonRate(Pair):
        ...     def model(self, x=None):
        ...         rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        ...         with self.rows(x):
        ...             return pyro.sample("x", dist.Poisson(rate), obs=x)
        ...     def guide(self, x=None):
        ...         pyro.sample("rate", dist.Gamma(2.0, 1.0))
        >>> pair = PoissonRate()
        >>> tuple(pair.model(size=3).shape), tuple(pair.model(torch.ones(2), size=10, rows=torch.tensor([0, 7])).shape)
        ((3,), (2,))
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]

    def __init__(self) -> None:
        super().__init__()
        self.coords: dict[str, list[str]] = {}
        self.dims: dict[str, tuple[str, ...]] = {}
        self._minibatches = [Minibatch()]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for half in HALVES:
            if half in cls.__dict__:
                setattr(cls, half, pyro_method(_with_rows(cls.__dict__[half])))

    @property
    def minibatch(self) -> Minibatch:
        """The arguments ``size`` and ``rows`` of the half that is running."""
        return self._minibatches[-1]

    def rows(self, *data: Tensor | None) -> Any:
        """Plate of the rows at hand: N is ``size``, or the length of the first of the data that is given.

        Entering it gives the indices of the rows, by which a parameter with an entry per row is read.
        """
        size, rows = self.minibatch
        given = next((x for x in data if x is not None), None)
        if size is None and given is None:
            raise ValueError("size: expected the number of rows to draw when x is not given, got None")
        count = len(given) if size is None else size  # type: ignore[arg-type]
        return pyro.plate("rows", count, subsample=rows if rows is None else rows.long(), dim=-1)

    def check(self, **data: Any) -> None:
        """Raise ValueError, one line, when the data do not fit the pair. The verbs call it before any work."""

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Grids of images by name, from rows of data by name: what a pair of images generates or reconstructs."""
        return {}

    def name_dimension(self, dimension: str, given: int | Sequence[str]) -> int:
        """Size of a dimension that is given as a number or as names; names become coordinates."""
        size = count_of(given)
        if size < 1:
            raise ValueError(f"{dimension}: expected at least one, got {given!r}")
        if not isinstance(given, int):
            self.coords[dimension] = [str(name) for name in given]
        return size


def _with_rows(half: Callable[..., Any]) -> Callable[..., Any]:
    """A half that takes ``size`` and ``rows`` beside its own arguments, and no data that its pair does not know."""
    signature = inspect.signature(half)
    own = signature.parameters
    rest = [p for p in own.values() if p.kind is p.VAR_KEYWORD]

    @wraps(half)
    def call(self: Pair, *args: Any, **named: Any) -> Any:
        given = {n: named.pop(n) for n in Minibatch._fields if n in named}
        # A half that runs the other one, or that of its base class, runs it on the rows at hand.
        at_hand = Minibatch(**given) if given else self.minibatch
        unknown = () if rest else named.keys() - own.keys() - _data_names(type(self))
        if unknown:
            raise TypeError(f"{half.__name__}() got an unexpected keyword argument {min(unknown)!r}")
        named |= {n: v for n, v in at_hand._asdict().items() if n in own}
        self._minibatches.append(at_hand)
        try:
            return half(self, *args, **{n: v for n, v in named.items() if rest or n in own})
        finally:
            self._minibatches.pop()

    extra = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in Minibatch._fields if n not in own
    ]
    parameters = [*(p for p in own.values() if p not in rest), *extra, *rest]
    # A signature of the call itself would be copied by functools.wraps from a bound method, with its ``self``.
    call.__wrapped__ = _Signature(signature.replace(parameters=parameters))  # type: ignore[attr-defined]
    return call


class _Signature:
    """What ``inspect.signature`` is to show of a function."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.__signature__ = signature

    def __call__(self) -> None:
        raise NotImplementedError


@cache
def _data_names(pair: type[Pair]) -> frozenset[str]:
    """Names of all arguments of a pair's halves: both halves are called with the same."""
    halves = (getattr(pair, half) for half in HALVES if callable(getattr(pair, half, None)))
    return frozenset(n for half in halves for n in inspect.signature(half).parameters)


def nothing(*_: Any, **__: Any) -> None:
    """The guide of a model without latent sites to fit."""


class Visible(Pair):
    """A pair without latent sites: rows x from one law, whose ELBO is the exact log likelihood."""

    distribution: Callable[[], Any]
    """p(x) of a row, an event; it reads all parameters when it is called."""
    guide = nothing

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score rows; return x."""
        with self.rows(x):
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
