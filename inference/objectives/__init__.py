"""Objectives that ``fit`` minimises: Pyro's own, and ``Compiled``, which makes any of them one program. Each is a
subclass of ``pyro.infer.elbo.ELBO``.

Tables of methods should hold factories (``partial(fit, objective=Trace_ELBO)`` or a lambda), for an
instance remembers the plate nesting of the first pair it saw.
"""

from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from inference.compiled import Compiled

__all__ = [
    "Compiled",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "TraceEnum_ELBO",
    "TraceGraph_ELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
]
