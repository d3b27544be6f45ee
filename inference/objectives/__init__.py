"""Objectives for ``fit``: Pyro's and ours.

An objective is a subclass of ``pyro.infer.elbo.ELBO``. ``Compiled`` runs any of them as one program. Tables of methods
should hold factories (``partial(fit, objective=Trace_ELBO)`` or a lambda), because an instance keeps the plate nesting
of the first pair it runs on.
"""

from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)

from inference.compiler.objective import Compiled
from inference.objectives.adversarial import Adversarial
from inference.objectives.beta import BetaELBO
from inference.objectives.denoising import Denoising
from inference.objectives.em import EM
from inference.objectives.importance import IWAE, VIMCO
from inference.objectives.predictability import Predictability
from inference.objectives.shared import Shared
from inference.objectives.wake_sleep import RWS, WakeSleep

__all__ = [
    "EM",
    "IWAE",
    "RWS",
    "VIMCO",
    "Adversarial",
    "BetaELBO",
    "Compiled",
    "Denoising",
    "Predictability",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "Shared",
    "TraceEnum_ELBO",
    "TraceGraph_ELBO",
    "TraceMeanField_ELBO",
    "Trace_ELBO",
    "WakeSleep",
]
