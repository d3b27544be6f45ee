r"""Sample sites as a run of a model shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import Independent


@dataclass(frozen=True)
class Site:
    """A sample site, as seen in one run of the model.

    Attributes:
        role: ``latent``, ``observed`` or ``deterministic``.
        shape: Shape of one value, batch and event dimensions.
        batch: Number of batch dimensions of the value.
        plates: Name of the plate of each batch dimension, from left to right; None where there is no plate.
        finite: Whether the site can be enumerated.
        discrete: Whether its values are discrete.
        units: Number of parts of its event that have finitely many states each: 0 where the states are not finite, 1
            where the site can be enumerated.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    batch: int
    plates: tuple[str | None, ...]
    finite: bool
    discrete: bool
    units: int = 0


def sites_of(trace: poutine.Trace) -> dict[str, Site]:
    """The sites of a trace, without those of plates and factors."""
    found = {}
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or site_is_factor(node):
            continue
        deterministic = bool(node["infer"].get("_deterministic"))
        value, fn = node["value"], node["fn"]
        frames = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
        batch = _batch_of_deterministic(node) if deterministic else len(fn.batch_shape)
        role = "deterministic" if deterministic else "observed" if node["is_observed"] else "latent"
        found[name] = Site(
            name=name,
            role=role,
            shape=tuple(value.shape),
            batch=batch,
            plates=tuple(frames.get(d - batch) for d in range(batch)),
            finite=not deterministic and bool(fn.has_enumerate_support),
            discrete=not deterministic and fn.support.is_discrete,
            units=0 if deterministic else _units(fn),
        )
    return found


def _batch_of_deterministic(node: Any) -> int:
    """Number of batch dimensions of a deterministic value: those of its plates, whose sizes it has.

    ``pyro.deterministic`` takes all dimensions as those of an event, unless it is told otherwise.
    """
    shape = tuple(node["value"].shape)
    frames = {f.dim: f.size for f in node["cond_indep_stack"] if f.vectorized}
    given = len(shape) - len(node["fn"].event_shape)
    batch = given if given > 0 else min(len(shape), max((-d for d in frames), default=0))
    fits = all(shape[batch + d] == size for d, size in frames.items() if batch + d >= 0)
    return batch if fits else 0


def _units(fn: Any) -> int:
    """Number of finite parts that ``to_event`` has joined to one event."""
    count = 1
    while hasattr(fn, "base_dist"):
        if isinstance(fn, Independent):
            dims = fn.reinterpreted_batch_ndims
            count *= fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - dims :].numel()
        fn = fn.base_dist
    return count if fn.has_enumerate_support else 0


def unconstrained(trace: Any) -> dict[str, Tensor]:
    """The parameters that a run met, as they are optimised: each once, by the first name that it has in the store.

    Two names may stand for one tensor, as those of tied weights do, and an optimizer would move it twice.
    """
    names = {id(p): n for n, p in reversed(pyro.get_param_store()._params.items())}
    met = {n: node["value"].unconstrained() for n, node in trace.nodes.items()}
    return {names.get(id(p), n): p for n, p in met.items()}
