r"""Potentials that were recorded in this process: a second call with the same model records nothing.

A graph is used again where recording it once more would give the same: the model is the same function (or one of the
same code and the same closure, as when a cell of a notebook is run again), its arguments are equal, and all that it
takes from outside itself is known (:class:`Watch`) and unchanged. Models of which this cannot be told are recorded at
each call. What is used again is compared with the model where the chains are, as what is new.

Other data of the same shapes take the place of those in the graph, and what depends on them alone is computed anew,
unless their values had a part in how the graph came to be: they were read (a length of unique values, a boolean index),
something else in the graph may have been made of them, or a support has other bounds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import FunctionType, MethodType
from typing import Any

import pyro
import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from inference.compiler import policy
from inference.compiler.capture import Untraceable
from inference.compiler.form import Form
from inference.compiler.potential import BatchedPotential
from inference.compiler.supports import taken_limits
from inference.compiler.watch import FIXED, Watch
from inference.core.packing import fingerprints


@dataclass
class _Recorded:
    """A potential, what it was recorded from, and what tells whether that has changed.

    Attributes:
        density: The potential; it is never fused, and called through copies alone.
        model: The model with its arguments.
        settings: What else decides the graph.
        watch: What the model takes from outside.
        limits: What the potential took from the run of the model that it was made from.
        takes_data: Whether data of the same shapes may take the place of those in the graph.
        values: Fingerprints of the tensors on which the graph depends, but for data that others may replace.
    """

    density: BatchedPotential
    model: partial[Any]
    settings: Any
    watch: Watch
    limits: tuple[tuple[str, ...], list[Tensor]] | None
    takes_data: bool = field(init=False)
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data, places = data_of(self.model), {id(p.value) for p in self.watch.places}
        # A tensor that the model finds elsewhere too stays there, whatever the data are.
        apart = len({id(v) for v in data} - places) == len(data)
        limits = [] if self.limits is None else self.limits[1]
        known = places | {id(v) for v in (*limits, *_stored().values())}
        self.takes_data = self.limits is not None and apart and known.issuperset(map(id, self.density.unexplained))

    def fits(self, model: partial[Any], settings: Any, limits: Any) -> bool:
        """Whether a potential of this model is this one, or this one with other data."""
        if settings != self.settings:
            return False
        if not self.takes_data:
            return same(model, self.model)
        forms = [list(map(Form.of, data_of(m))) for m in (model, self.model)]
        return forms[0] == forms[1] and same((_without_data(model), limits), (_without_data(self.model), self.limits))

    def holds(self) -> bool:
        """Whether nothing has changed that the model takes from outside."""
        return not self.watch.changed() and self.values == fingerprints(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Tensors on which the graph depends, those of Pyro's store as they are now: memory may change."""
        given = (*self.model.args, *self.model.keywords.values(), *(p.value for p in self.watch.places))
        held = [*self.density.outside, *(v for v in given if isinstance(v, Tensor))]
        replaced = {id(v) for v in data_of(self.model)} if self.takes_data else set()
        kept = {id(v): v for v in held if id(v) not in replaced}
        return {str(k): v for k, v in enumerate(kept.values())} | _stored()


def _stored() -> dict[str, Tensor]:
    return {f"parameter {n}": v for n, v in pyro.get_param_store().named_parameters()}


def data_of(model: partial[Any]) -> list[Tensor]:
    """Arguments of a model that are tensors of numbers and nothing else."""
    return [v for v in (*model.args, *model.keywords.values()) if _is_data(v)]


def _is_data(value: Any) -> bool:
    return type(value) is Tensor and not value.requires_grad and Form.of(value) is not None


def _without_data(model: partial[Any]) -> Any:
    """What a model is made of besides its data."""
    kept = [None if _is_data(v) else v for v in model.args]
    return model.func, kept, {n: None if _is_data(v) else v for n, v in model.keywords.items()}


_RECORDED: OrderedDict[int, _Recorded] = OrderedDict()
"""Recorded potentials by numbers of their own, the last used last; at most ``policy.RECORDED_POTENTIALS``."""


_NUMBERS = count()


def recorded(
    model: partial[Any] | None,
    potential: Callable[..., Tensor],
    example: dict[str, Tensor],
    chains: int,
    given: tuple[Tensor, ...] = (),
) -> tuple[BatchedPotential, Callable[[], None] | None]:
    """The graph of a potential, recorded now or before.

    Args:
        model: The model with its arguments; None: it is not known, and the potential is recorded anew.
        potential: Its potential function.
        example: Unconstrained values of one chain by name.
        chains: Number of chains.
        given: Further arguments of the potential, with which it is recorded anew.

    Returns:
        The graph, and a function that forgets it if it was recorded before; None if it is new.

    Raises:
        Untraceable: The potential cannot be recorded.
    """
    if model is None or given or am_i_wrapped():
        return BatchedPotential(potential, example, chains, given=given), None
    shapes = tuple((n, Form.of(v)) for n, v in example.items())
    settings = shapes, chains, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    limits, data = taken_limits(potential), data_of(model)
    for number, known in [*_RECORDED.items()]:
        if not known.fits(model, settings, limits):
            continue
        if known.holds():
            _RECORDED.move_to_end(number)
            again = known.density.again(potential, example, data if known.takes_data else None)
            return again, partial(_forget, number)
        _forget(number)
    density = BatchedPotential(potential, example, chains, data=data)
    watch = Watch(model)
    if watch.whole:
        made = _Recorded(density.again(_forgotten, example), model, settings, watch, limits)
        if sum(v.numel() for v in (*data, *made.tensors().values())) <= policy.RECORDED_NUMBERS:
            made.values = fingerprints(made.tensors())
            _RECORDED[next(_NUMBERS)] = made
        while len(_RECORDED) > policy.RECORDED_POTENTIALS:
            _RECORDED.popitem(last=False)
    return density, None


def _forget(number: int) -> None:
    _RECORDED.pop(number, None)


def same(a: Any, b: Any) -> bool:
    """Whether two callables, or their arguments, are the same: one object, or equal in code, closures and values."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, FIXED):
        return bool(a == b)
    if isinstance(a, Tensor):
        alike = Form.of(a) == Form.of(b) is not None and not (a.requires_grad or b.requires_grad)
        return alike and type(a) is Tensor and fingerprints({"": a}) == fingerprints({"": b})
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, partial):
        return same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, MethodType):
        return a.__self__ is b.__self__ and same(a.__func__, b.__func__)
    if isinstance(a, FunctionType):
        return a.__code__ == b.__code__ and a.__globals__ is b.__globals__ and same(_parts(a), _parts(b))
    return False


def _parts(function: FunctionType) -> tuple[Any, ...]:
    """What a function has besides its code and its globals."""
    cells = [c.cell_contents for c in function.__closure__ or ()]
    return cells, function.__defaults__, function.__kwdefaults__, vars(function)


def _forgotten(*_: Any) -> Tensor:
    raise Untraceable("a recorded potential was called without its function")
