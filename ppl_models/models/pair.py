r"""Base class of all pairs: a model :math:`p(x, z)` and a guide :math:`q(z \mid x)` or :math:`q(z)` of the same sites.

Both halves take their data by name and keep their rows in the plate that :meth:`Pair.rows` returns. The base class adds
two keyword arguments to every half and passes them to that plate: ``size``, the full number of rows N (without data,
the number of rows to draw), and ``rows``, the indices of a minibatch.
"""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, pyro_method
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppl_models.models.checks import count_of
from ppl_models.models.parts.grids import Grid

HALVES = ("model", "guide", "exact")

GuideFactory = Callable[[Callable[..., Any]], Callable[..., Any]]
"""From a model to its guide: an autoguide class such as ``AutoNormal``."""

Moments = dict[str, tuple[Tensor, Tensor]]
"""Mean and standard deviation of each site."""


Method = TypeVar("Method", bound=Callable[..., Any])


class Minibatch(NamedTuple):
    """Full number of rows N, and the indices of the rows of a minibatch (None: all rows)."""

    size: int | None = None
    rows: Tensor | None = None


class _PairType(ABCMeta, type(PyroModule)):  # type: ignore[misc]
    """The metaclass of Pyro modules, with abstract methods."""


class Pair(PyroModule, metaclass=_PairType):  # type: ignore[metaclass]
    r"""Base class of every pair.

    A subclass defines a method ``model``, and either a method ``guide`` or an attribute ``guide`` that its constructor
    sets, such as ``self.guide = AutoNormal(continuous(self.model))``. The methods ``model``, ``guide`` and ``exact``
    become Pyro methods (without that their parameters get no gradients) that also take ``size`` and ``rows``. A half
    that calls another half of the same pair without these two passes its own on.

    Attributes:
        coords: Names along a dimension (a plate or one of ``dims``), for ArviZ.
        dims: Names of the event dimensions of a site, for ArviZ.

    Example:
        >>> import torch
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

    guide: Callable[..., Any]
    rowwise = True
    by_rows = True
    """Whether the halves take ``size`` and ``rows``: not where the data are one observation, such as a series."""

    def __init__(self) -> None:
        super().__init__()
        self.coords: dict[str, list[str]] = {}
        self.dims: dict[str, tuple[str, ...]] = {}
        self._minibatches = [Minibatch()]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for half in HALVES:
            if half in cls.__dict__:
                setattr(cls, half, pyro_method(_with_rows(cls.__dict__[half], cls.by_rows)))

    @abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Draw or score all sites, given data by name."""
        raise TypeError(f"pair: expected a method model, got none in {type(self).__name__}")

    @property
    def minibatch(self) -> Minibatch:
        """The arguments ``size`` and ``rows`` of the half that is running."""
        return self._minibatches[-1]

    def rows(self, *data: Tensor | None) -> Any:
        """Plate of the rows, to be entered by a half.

        Entering the plate returns the row indices, which select the entries of a parameter that has one per row.

        Args:
            data: Tensors with one entry per row. The first that is not None gives N where ``size`` does not.

        Raises:
            ValueError: There is neither ``size`` nor data.
        """
        size, rows = self.minibatch
        if size is None:
            size = next((len(x) for x in data if x is not None), None)
        if size is None:
            raise ValueError("size: expected the number of rows to draw when x is not given, got None")
        return pyro.plate("rows", size, subsample=None if rows is None else rows.long(), dim=-1)

    def check(self, **data: Any) -> None:
        """Raise ValueError, in one line, if the data do not fit the pair.

        ``fit`` and ``sample`` call it first, and so does every method that is :func:`checked`.
        """

    def halves(self) -> tuple[Half, Half]:
        """Model and guide as modules, for a loop of your own by torch's optimizers.

        Both hold the pair, so that ``Trace_ELBO()(*pair.halves())`` is a module whose ``parameters()`` are those of the
        pair. An autoguide makes its parameters in its first call: call the guide once before you ask for them.

        Example:
            >>> import torch
            >>> from pyro.infer import Trace_ELBO
            >>> class Location(Visible):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.loc = torch.nn.Parameter(torch.zeros(2))
            ...     def distribution(self):
            ...         return dist.Normal(self.loc, 1.0).to_event(1)
            >>> pair, x = Location(), torch.randn(100, 2) + 3.0
            >>> loss = Trace_ELBO()(*pair.halves())
            >>> optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
            >>> for _ in range(300):
            ...     optimizer.zero_grad()
            ...     loss(x).backward()
            ...     optimizer.step()
            >>> torch.allclose(pair.loc, x.mean(0), atol=1e-2)
            True
        """
        return Half(self, "model"), Half(self, "guide")

    def pictures(self, *_: Any, **__: Any) -> dict[str, Grid]:
        """Grids of images by name, from rows of data by name: what a pair of images generates or reconstructs."""
        return {}

    def name_dimension(self, dimension: str, given: int | Sequence[str]) -> int:
        """Size of a dimension that is given as a number or as names; names become coordinates."""
        size = count_of(dimension, given)
        if not isinstance(given, int | Integral):
            self.coords[dimension] = [str(name) for name in given]
        return size


class Half(nn.Module):
    """One half of a pair as a module: it holds the pair, and its call is that of the half.

    It is no Pyro module, which would change the names of the pair's parameters. The call leaves Pyro's parameter store
    alone, which by name would give a second pair the parameters of the first.

    Attributes:
        pair: The pair.
        name: Name of the half, ``model`` or ``guide``.
    """

    def __init__(self, pair: Pair, name: str) -> None:
        super().__init__()
        self.pair, self.name = pair, name

    def forward(self, *args: Any, **named: Any) -> Any:
        """Call the half."""
        # Pyro reads this setting when a module is made, and again at each call.
        vars(self.pair._pyro_context).setdefault("param_state", {"params": {}, "constraints": {}})
        with pyro.settings.context(module_local_params=True):
            return getattr(self.pair, self.name)(*args, **named)


def checked(method: Method, *, leading: bool = False) -> Method:
    """Let a method check its data first, by :meth:`Pair.check`: those of its arguments that the check knows by name.

    Within a model or guide that runs under handlers nothing is checked: it runs at every step, may be traced, and its
    data have been checked by its verb. Nor is anything checked under ``torch.vmap``, where no value can be read.

    Args:
        method: A method of a pair.
        leading: Whether it takes rows with any leading dimensions (..., D), rather than a matrix.
    """
    signature = inspect.signature(method)

    @wraps(method)
    def call(self: Pair, *args: Any, **named: Any) -> Any:
        given = signature.bind(self, *args, **named).arguments
        if not am_i_wrapped() and not any(map(_is_mapped, _tensors(given))):
            known = inspect.signature(self.check).parameters
            self.check(**{n: as_matrix(v) if leading else v for n, v in given.items() if n in known})
        return method(self, *args, **named)

    return call  # type: ignore[return-value]


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is one of many in ``torch.vmap``, where its values cannot be read."""
    asks = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return asks is not None and bool(asks(tensor))


def _tensors(given: Mapping[str, Any]) -> list[Tensor]:
    return [v for v in given.values() if isinstance(v, Tensor)]


def as_matrix(rows: Any) -> Any:
    """Rows (..., D) as a matrix."""
    return rows.reshape(-1, rows.shape[-1]) if isinstance(rows, Tensor) and rows.dim() and rows.numel() else rows


def _with_rows(half: Callable[..., Any], by_rows: bool) -> Callable[..., Any]:
    """Let a half take ``size`` and ``rows`` as well, and drop the arguments that only another half knows."""
    signature = inspect.signature(half)
    own = signature.parameters
    rest = [p for p in own.values() if p.kind is p.VAR_KEYWORD]

    @wraps(half)
    def call(self: Pair, *args: Any, **named: Any) -> Any:
        passed = {n: named.pop(n) for n in Minibatch._fields if n in named} if by_rows else {}
        minibatch = Minibatch(**passed) if passed else self.minibatch
        if not rest and named.keys() - own.keys():
            unknown = named.keys() - own.keys() - _arguments(self)
            if unknown:
                raise TypeError(f"{half.__qualname__}() got an unexpected keyword argument {min(unknown)!r}")
            named = {n: v for n, v in named.items() if n in own}
        # A half that declares these two itself gets them as arguments.
        named |= {n: v for n, v in minibatch._asdict().items() if n in own} if by_rows else {}
        self._minibatches.append(minibatch)
        try:
            return half(self, *args, **named)
        finally:
            self._minibatches.pop()

    extra = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
        for n in (Minibatch._fields if by_rows else ())
        if n not in own
    ]
    parameters = [*(p for p in own.values() if p not in rest), *extra, *rest]
    # Not ``call.__signature__``: functools.wraps would copy it from the bound method, with its ``self``.
    shown: Any = partial(half)
    shown.__signature__ = signature.replace(parameters=parameters)
    call.__wrapped__ = shown  # type: ignore[attr-defined]
    return call


def _arguments(pair: Pair) -> frozenset[str]:
    """Names of the arguments of all halves: the model and the guide are called with the same data."""
    halves = (getattr(pair, name, None) for name in HALVES)
    return frozenset(n for half in halves if callable(half) for n in inspect.signature(half).parameters)


def nothing(*_: Any, **__: Any) -> None:
    """The guide of a model without latent sites."""


class Visible(Pair):
    """A pair without latent sites: independent rows x from one distribution. The ELBO is the exact log likelihood."""

    guide = nothing

    @abstractmethod
    def distribution(self) -> dist.TorchDistribution:
        """p(x) of one row, as an event. Reads all parameters when called: Pyro does not see those read later."""

    def model(self, x: Tensor | None = None) -> Tensor:
        """Draw or score the rows; return x."""
        with self.rows(x):
            return pyro.sample("x", self.distribution(), obs=x)

    @checked
    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of each row, in nats: (N,)."""
        return self.distribution().log_prob(x)


def continuous(model: Callable[..., Any]) -> Callable[..., Any]:
    """Hide the finite latent sites of a model from an autoguide; the objective sums them out."""

    def hidden(site: Any) -> bool:
        latent = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        return latent and bool(site["fn"].has_enumerate_support)

    return poutine.block(model, hide_fn=hidden)
