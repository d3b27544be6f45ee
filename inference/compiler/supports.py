r"""Supports that depend on other latent sites, such as that of ``x ~ Uniform(0, a)`` with a latent ``a``, and those of
transformed distributions, such as ``x = a + Exponential(1)``.

Pyro takes the transform of a site onto its support from one draw of the model, and keeps it. Where the support moves
with another site, that density is wrong, and draws fall outside of the support. Here each site's transform is taken
from its distribution in the current run, site by site in the order of the model.

Torch says that the support of a ``TransformedDistribution`` is the codomain of its last transform: the real line for an
affine one, whatever its base. Here it is the image of the base's support (:class:`Image`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from pyro import poutine
from pyro.infer.mcmc.util import _PEMaker
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints, transform_to
from torch.distributions.transforms import ComposeTransform, Transform
from torch.func import functionalize

from inference.compiler.capture import Untraceable, traced

TRIES = 3
"""Random points at which supports are compared."""


POINTS_PER_PASS = 10_000
"""Points that are mapped at once."""


class Image(constraints.Constraint):
    """The image of a support under transforms.

    Args:
        base: The support of the base distribution.
        transforms: The transforms, in the order in which they are applied.
        event_dim: Number of dimensions of an event.
    """

    def __init__(self, base: Any, transforms: Sequence[Transform], event_dim: int) -> None:
        self.base, self.transforms, self._event_dim = base, list(transforms), event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        """Whether values are images of values on the support of the base."""
        for transform in reversed(self.transforms):
            value = transform.inv(value)
        inside, further = self.base.check(value), self.event_dim - self.base.event_dim
        return inside.flatten(-further).all(-1) if further > 0 else inside


@biject_to.register(Image)
@transform_to.register(Image)
def _onto_image(image: Image) -> ComposeTransform:
    return ComposeTransform([biject_to(image.base), *image.transforms])


_SAID = vars(TransformedDistribution)["support"]


def _support(fn: TransformedDistribution) -> Any:
    """The support of a distribution whose class leaves it to torch to say what it is."""
    base: Any = fn.base_dist.support
    said = _SAID.fget(fn)
    free = isinstance(_of_elements(base), type(constraints.real)) or base.is_discrete
    return said if free or not fn.transforms else Image(base, fn.transforms, said.event_dim)


@contextmanager
def images_as_supports() -> Iterator[None]:
    """Let transformed distributions of torch say that their support is the image of that of their base."""
    support = constraints.dependent_property(_support, is_discrete=False)
    with patch.object(TransformedDistribution, "support", support):
        yield


def support_of(fn: Any) -> Any:
    """The support of a distribution: of a transformed one, the image of that of its base."""
    with images_as_supports():
        return fn.support


def is_image(support: Any) -> bool:
    """Whether a support is the image of another."""
    return isinstance(_of_elements(support), Image)


def _of_elements(support: Any) -> Any:
    """The constraint on each element of an event, where they are independent."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


class MovingSupports:
    r"""The potential of a model some of whose supports move with other sites; call it as Pyro's potential.

    .. math:: U(u) = -\log p(x(u), y) - \sum_i \log |\partial x_i / \partial u_i|,
        \qquad x_i = T_i(u_i; x_{<i})

    Args:
        pyros: What makes Pyro's potential of the model.
        names: The sites whose supports move.
    """

    def __init__(self, pyros: _PEMaker, names: tuple[str, ...]) -> None:
        self._pyros, self.names = pyros, names
        self._mapped: Callable[..., Any] | None = None

    def __call__(self, values: dict[str, Tensor], *given: Tensor) -> Tensor:
        handler = self._constraining(values)
        trace = _run(self._pyros, handler)
        return -(self._pyros.trace_prob_evaluator.log_prob(trace) + handler.log_jacobian)

    def constrain(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        r"""Values on the supports (S, \*shape) of unconstrained values by name (S, \*shape)."""
        shapes = {n: v.shape[1:] for n, v in values.items()}
        rows = torch.cat([v.reshape(len(v), -1) for v in values.values()], -1)

        def one(row: Tensor) -> tuple[Tensor, ...]:
            parts = row.split([s.numel() for s in shapes.values()])
            handler = self._constraining({n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)})
            _run(self._pyros, handler)
            return tuple(handler.constrained[n] for n in shapes)

        if self._mapped is None:
            try:
                self._mapped = torch.vmap(traced(functionalize(traced(one, rows[0])), rows[0]))
            except Untraceable:
                self._mapped = lambda rows: tuple(torch.stack(v) for v in zip(*map(one, rows), strict=True))
        with torch.no_grad():
            passes = [self._mapped(part) for part in rows.split(POINTS_PER_PASS)]
        return dict(zip(shapes, map(torch.cat, zip(*passes, strict=True)), strict=True))

    def _constraining(self, values: Mapping[str, Tensor]) -> _Constraining:
        fixed = {n: t for n, t in self._pyros.transforms.items() if n not in self.names}
        return _Constraining(values, fixed)


class _Constraining(Messenger):
    """Sets sites to the images of unconstrained values on their supports as they are in this run.

    Attributes:
        constrained: The images by name.
        log_jacobian: Sum of the log determinants of the transforms.
        bounds: Tensors in each site's support.
    """

    def __init__(self, values: Mapping[str, Tensor], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self._values, self._fixed = values, fixed
        self.constrained: dict[str, Tensor] = {}
        self.log_jacobian: Any = 0.0
        self.bounds: dict[str, list[Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self._values or msg["is_observed"]:
            return
        value, support = self._values[name], support_of(msg["fn"])
        transform = self._fixed[name].inv if name in self._fixed else biject_to(support)
        msg["value"] = self.constrained[name] = transform(value)
        msg["is_observed"] = True
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(value, msg["value"]).sum()
        self.bounds[name] = list(limits_of(support))


def follow_supports(
    potential: Any,
    trace: Any,
    held: dict[str, Tensor] | None = None,
    points: Sequence[Mapping[str, Tensor]] = (),
) -> MovingSupports | None:
    """The potential that Pyro has made of a model, following supports that move; None where none moves.

    Args:
        potential: A potential function of ``initialize_model``, or of a kernel of Pyro after ``setup``.
        trace: The run of the model that it was made from.
        held: Values on which the model is conditioned, to be replaced by those of ``points`` in turn.
        points: Values of the same sites.

    Raises:
        ValueError: A support depends on a held site.
    """
    pyros = getattr(potential, "__self__", None)
    if not isinstance(pyros, _PEMaker) or trace is None:
        return None
    latent = {n: trace.nodes[n] for n in pyros.transforms}
    supports = {n: support_of(node["fn"]) for n, node in latent.items()}
    start = {n: list(limits_of(support)) for n, support in supports.items()}
    if not any(start.values()):
        return None
    example = {n: biject_to(supports[n]).inv(node["value"]) for n, node in latent.items()}
    moving: set[str] = set()
    for _ in range(TRIES):
        moved = _bounds(pyros, {n: torch.empty_like(v).uniform_(-2, 2) for n, v in example.items()})
        moving |= {n for n in start if not _same(start[n], moved[n])}
    if held:
        _refuse_held(pyros, example, held, points)
    return MovingSupports(pyros, tuple(n for n in latent if n in moving)) if moving else None


def _bounds(pyros: _PEMaker, values: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The bounds of each site's support at unconstrained values."""
    handler = _Constraining(values, {})
    with torch.no_grad():
        _run(pyros, handler)
    return handler.bounds


def _run(pyros: _PEMaker, handler: _Constraining) -> Any:
    """A run of the model whose latent sites the handler sets."""
    with handler:
        return poutine.trace(pyros.model).get_trace(*pyros.model_args, **pyros.model_kwargs)


def _refuse_held(
    pyros: _PEMaker, example: Mapping[str, Tensor], held: dict[str, Tensor], points: Sequence[Mapping[str, Tensor]]
) -> None:
    before, at_start = dict(held), _bounds(pyros, example)
    for point in points:
        held.update(point)
        for name, bounds in _bounds(pyros, example).items():
            if not _same(bounds, at_start[name]):
                raise ValueError(
                    f"{name}: expected a support that depends on continuous sites, got one that moves with "
                    f"{', '.join(held)}; write {name} as a function of a site whose support is fixed"
                )
    held.update(before)


def taken_limits(potential: Any) -> tuple[tuple[str, ...], list[Tensor]] | None:
    """What a potential of a model took from the run that it was made from: the sites whose supports move, and the
    tensors in the transforms of the others; None if that is not known."""
    moving = potential.names if isinstance(potential, MovingSupports) else ()
    pyros = potential._pyros if isinstance(potential, MovingSupports) else getattr(potential, "__self__", None)
    if not isinstance(pyros, _PEMaker):
        return None
    return moving, [v for n, t in pyros.transforms.items() if n not in moving for v in limits_of(t)]


def limits_of(support: Any, _within: tuple[Any, ...] = ()) -> Iterator[Tensor]:
    """The tensors in a constraint: its bounds, and what the transforms of an image move them by."""
    for value in vars(support).values() if isinstance(support, constraints.Constraint | Transform) else support:
        if isinstance(value, Tensor):
            yield value
        # A transform and its inverse hold one another.
        elif isinstance(value, constraints.Constraint | Transform | list | tuple) and id(value) not in _within:
            yield from limits_of(value, (*_within, id(support)))


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
