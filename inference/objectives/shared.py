r"""``Shared``: an objective whose rows are shared among the processes of a group.

With :math:`B_r` of the B rows of a step on rank r, whose loss :math:`L_r` the model scales up to all rows, loss and
gradients of the step are

.. math::

    L = \sum_r \frac{B_r}{B} L_r, \qquad \nabla L = \sum_r \frac{B_r}{B} \nabla L_r ,

those of one process with all B rows, whatever the shares: terms of the rows are added, and terms that concern no row
(a prior of global sites) are averaged over equal ones, or over independent draws of their noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from torch import Tensor, distributed

from inference.compiler.objective import Compiled
from inference.core.group import gathered, place, ranks, reduced
from inference.core.sites import unconstrained
from inference.objectives.game import Game, by_name

HEADER = 4
"""Numbers before the losses: the weight of a share, and whether it has news, has failed, has no rows."""


class Shared(ELBO):
    r"""An objective on this process's share of the rows; loss and gradients are those of all processes together.

    Each step sums one vector over the processes of torch's default group: losses and gradients, by the names of the
    parameters. All processes then take the same step. Values of a parameter that is new are those of rank 0. Model and
    guide take ``size``, the number of all rows, and ``rows``, the indices of this process's share of the step, by which
    their plate scales. A share may be empty, but for the first step. Without a group it is the inner objective.

    ``fit`` wraps its objective so wherever a process group is initialised. In a program of your own, seed the noise of
    each process differently, and wrap compiled objectives: ``Shared(Compiled(objective))``. Objectives that are no sum
    over rows (free bits, weights over a minibatch) see the share of each process as a minibatch of their own.

    Args:
        objective: Any objective: a subclass of ``pyro.infer.elbo.ELBO`` with ``loss_and_grads``.

    Raises:
        ValueError: ``size`` or ``rows`` is missing, or the first share is empty.
        RuntimeError: In a step: another process has failed, has ended or does not answer, or a parameter is not there
            in all processes.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y, size, rows):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", size, subsample=rows):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> y, share = torch.randn(100), torch.arange(0, 100, 2)  # share: arange(rank, 100, processes)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), loss=Shared(Trace_ELBO()))
        >>> losses = [svi.step(y[share], size=100, rows=share) for _ in range(10)]
    """

    shares_rows = True

    def __init__(self, objective: ELBO) -> None:
        if not hasattr(objective, "loss_and_grads"):
            raise TypeError(f"objective: expected an ELBO with loss_and_grads, got {type(objective).__name__}")
        self.objective = objective
        self._layout = _Layout()

    def __getattr__(self, name: str) -> Any:
        """What the objective has, such as ``num_particles``."""
        if name == "objective":
            raise AttributeError(name)
        return getattr(self.objective, name)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of all rows, without gradients."""
        own: Any = self.objective
        if ranks()[1] == 1:
            return own.loss(model, guide, *args, **kwargs)
        weight = _weight(model, args, kwargs)
        held: list[Any] = gathered((weight, own.loss(model, guide, *args, **kwargs) if weight else None))
        mean = sum(w * np.asarray(x) for w, x in held if w) / sum(w for w, _ in held)
        return tuple(mean.tolist()) if np.ndim(mean) else float(mean)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of all rows; its gradients are added to those of the parameters, which are the same everywhere."""
        if ranks()[1] == 1:
            return self.objective.loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
        before = [] if self._layout.shapes else _state(self.objective)
        share = self._own(model, guide, args, kwargs)
        vector = reduced(self._layout.pack(share))
        if vector[1:3].any():
            if self._agree(share):
                # The gradients are those of other values.
                for p in share.params.values():
                    p.grad = None
                _put(before, self.objective)
                return self.loss_and_grads(model, guide, *args, **kwargs)
            vector = reduced(self._layout.pack(share))
        if vector[3]:
            # A process without rows has not run the objective, whose turns and counters are those of the others.
            states = gathered(_state(self.objective) if share.weight else None)
            if not share.weight:
                _put(next(s for s in states if s is not None), self.objective)
        losses = self._layout.unpack(vector, share)
        inner = next(_within(self.objective))
        if isinstance(inner, Game):
            # A player that rests reports the loss of its last step, which is that of all processes.
            inner.latest.copy_(torch.as_tensor(losses))
        return losses

    def _own(self, model: Any, guide: Any, args: Any, kwargs: Any) -> _Share:
        """Loss and gradients of this process's rows, or how they failed."""
        try:
            weight = _weight(model, args, kwargs)
            if not weight and self._layout.shapes:
                return _Share(0.0)
            if not weight:
                raise ValueError("rows: expected at least one row per process in the first step, got none")
            with poutine.trace(param_only=True) as capture:
                losses = self.objective.loss_and_grads(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
        except BaseException as error:
            # The others wait for this process: all of them end.
            return _Share(0.0, failure=error)
        single = not isinstance(losses, tuple)
        # A moving baseline of TraceGraph_ELBO is no parameter that has gradients.
        params = {n: p for n, p in unconstrained(capture.trace).items() if not n.startswith("__baseline")}
        return _Share(weight, (losses,) if single else losses, params, single)

    def _agree(self, share: _Share) -> bool:
        """Take up what is new in any process; return whether a value here or elsewhere was not that of rank 0.

        Raises:
            RuntimeError: A process has failed, or a parameter is not there in all of them.
        """
        failed = "" if share.failure is None else f"{type(share.failure).__name__}: {share.failure}"
        shapes = {n: tuple(p.shape) for n, p in share.params.items()}
        double = any(p.dtype == torch.float64 for p in share.params.values())
        everyone = gathered((failed, shapes, len(share.losses), share.single, double))
        if share.failure is not None:
            raise share.failure
        for rank, (text, *_) in enumerate(everyone):
            if text:
                raise RuntimeError(f"rank {rank} failed, and with it the group: {' '.join(text.split())[:500]}")
        self._layout.losses, self._layout.single = next((k, one) for _, _, k, one, _ in everyone if k)
        self._layout.double |= any(double for *_, double in everyone)
        news = {n: s for _, theirs, *_ in everyone for n, s in theirs.items() if self._layout.shapes.get(n) != s}
        self._layout.shapes |= news
        store = pyro.get_param_store()._params
        held = gathered({n: tuple(store[n].shape) for n in news if n in store})
        for name, shape in news.items():
            where = [k for k, theirs in enumerate(held) if theirs.get(name) != shape]
            if where:
                raise RuntimeError(
                    f"{name}: expected a parameter {shape} in all processes, got none on rank {where[0]}"
                )
        return _take_values([store[n] for n in news])


@dataclass
class _Share:
    """What one process has of a step: the weight of its rows, losses, and parameters with their gradients."""

    weight: float
    losses: tuple[float, ...] = ()
    params: dict[str, Tensor] = field(default_factory=dict)
    single: bool = True
    failure: BaseException | None = None


@dataclass
class _Layout:
    """Where losses and gradients stand in the vector that processes sum.

    Attributes:
        shapes: Shapes of the parameters by name; each has a number that says in how many processes it has a gradient.
        losses: Number of losses.
        single: Whether the objective returns a number, and not a tuple.
        double: Whether a parameter has double precision.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    losses: int = 0
    single: bool = True
    double: bool = False

    def pack(self, share: _Share) -> Tensor:
        """The vector of a share: the header, weighted losses, counts, weighted gradients."""
        news = any(self.shapes.get(n) != tuple(p.shape) for n, p in share.params.items())
        news = news or (bool(share.losses) and len(share.losses) != self.losses)
        grads = [_gradient(share.params.get(n)) for n in self.shapes]
        known = share.losses if len(share.losses) == self.losses else (0.0,) * self.losses
        dtype, where = torch.float64 if self.double or not self.shapes else torch.float32, place()
        head = [share.weight, *map(float, (news, share.failure is not None, not share.weight))]
        head += [share.weight * x for x in known] + [float(g is not None) for g in grads]
        sizes = [torch.Size(s).numel() for s in self.shapes.values()]
        parts = [
            torch.zeros(size, dtype=dtype, device=where) if g is None else g.to(where, dtype).reshape(size)
            for g, size in zip(grads, sizes, strict=True)
        ]
        return torch.cat([torch.tensor(head, dtype=dtype, device=where), *(p.mul(share.weight) for p in parts)])

    def unpack(self, vector: Tensor, share: _Share) -> Any:
        """Set the gradients to their weighted mean, and return that of the losses."""
        start = HEADER + self.losses + len(self.shapes)
        mean = vector.div_(vector[0].clone())
        losses = tuple(mean[HEADER : HEADER + self.losses].tolist())
        counts = mean[HEADER + self.losses : start].tolist()
        store = pyro.get_param_store()._params
        parts = mean[start:].split([torch.Size(s).numel() for s in self.shapes.values()])
        for (name, shape), count, part in zip(self.shapes.items(), counts, parts, strict=True):
            if count:
                p = share.params[name] if name in share.params else store[name]
                p.grad = part.reshape(shape).to(p)
                if name not in share.params:
                    # Handlers around the objective, such as that of SVI, have to see it.
                    pyro.param(name)
        return losses[0] if self.single else losses


def _gradient(param: Tensor | None) -> Tensor | None:
    return None if param is None else param.grad


def _weight(model: Any, args: Any, kwargs: Mapping[str, Any]) -> float:
    """Rows of this process as a fraction of all."""
    named = by_name(model, args, kwargs)
    size, rows = named.get("size"), named.get("rows")
    if size is None or rows is None:
        missing = "size" if size is None else "rows"
        raise ValueError(
            f"{missing}: Shared expected the number of all rows (size) and the indices of this process's (rows), by "
            f"which the plate of the model scales; got no {missing}"
        )
    return len(rows) / int(size)


def _take_values(params: list[Tensor]) -> bool:
    """Give parameters the values that they have on rank 0; return whether those of any process were others."""
    if not params:
        return False
    with torch.no_grad():
        values = torch.cat([p.detach().flatten().to(place(), torch.float64) for p in params])
        first = values.clone()
        distributed.broadcast(first, 0)
        # Not-a-number is no other value than itself.
        changed = not torch.allclose(values, first, rtol=0, atol=0, equal_nan=True)
        for p, v in zip(params, first.split([p.numel() for p in params]), strict=True) if changed else ():
            p.copy_(v.reshape(p.shape))
    return bool(reduced(torch.tensor([float(changed)], device=place())))


def _within(objective: ELBO) -> Iterator[ELBO]:
    """An objective and those that it has, none of them compiled."""
    if not isinstance(objective, Compiled):
        yield objective
    for inner in [v for v in vars(objective).values() if isinstance(v, ELBO)]:
        yield from _within(inner)


def _state(objective: ELBO) -> list[dict[str, Any]]:
    """Numbers, strings and tensors of an objective and of those that it has: what its steps change."""
    return [
        {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in vars(own).items() if _is_state(v)}
        for own in _within(objective)
    ]


def _is_state(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def _put(state: list[dict[str, Any]], objective: ELBO) -> None:
    for own, values in zip(_within(objective), state, strict=False):
        now = vars(own)
        now.update(
            {
                n: v.to(now[n]) if isinstance(v, Tensor) and isinstance(now.get(n), Tensor) else v
                for n, v in values.items()
            }
        )


def over_processes(objective: ELBO) -> ELBO:
    """The objective, shared among processes where there is a group."""
    return Shared(objective) if ranks()[1] > 1 else objective
