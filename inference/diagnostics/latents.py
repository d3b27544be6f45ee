r"""What each latent site says of the data: its divergence from the prior, and whether it is active.

The divergence :math:`\mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))` is the information, in nats, that a row leaves in a
dimension of its latent site. A dimension without any has collapsed to the prior: the model does without it.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.core.bound import BoundPair
from inference.draws.kl import kl_by_site
from inference.draws.rows import is_point

ACTIVE = 0.01
"""Variance of the posterior's mean over rows above which a dimension is active (Burda et al. 2016)."""


ROWS = 1000
"""Rows that are looked at."""


def local_latent_kl(bound: BoundPair) -> pd.DataFrame:
    """:func:`latents` of a program, in the current parameter store."""
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        few = torch.randperm(bound.rows)[:ROWS] if bound.takes_rows and bound.rows > ROWS else None
        arguments = bound.arguments(few)
        guide = poutine.trace(bound.guide).get_trace(**arguments)
        local = [n for n in bound.guided if _is_local(guide.nodes[n], bound.rows)]
        if not local:
            return pd.DataFrame(columns=["kl", "variance", "active"])
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(**arguments)
        return pd.concat(_table(n, v, guide.nodes[n]) for n, v in kl_by_site(model, guide, local).items())


def _is_local(site: Any, rows: int) -> bool:
    """Whether a site of the guide is continuous, has a spread, and lies in the plate of rows alone."""
    plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.full_size == rows]
    fn = site["fn"]
    return len(fn.batch_shape) == 1 and bool(plates) and fn.has_rsample and not is_point(fn)


def _table(name: str, divergence: Tensor, site: Any) -> pd.DataFrame:
    """Mean over rows of the divergence (rows, *event), and variance of the guide's mean."""
    costs, means = (v.double().reshape(len(v), -1) for v in (divergence, site["fn"].mean))
    costs, spread = costs.mean(0), means.var(0)
    if len(costs) < len(spread):
        # The dimensions are not told apart: one line for all of them.
        spread = spread.amax()[None]
    names = [f"{name}[{k}]" for k in range(len(costs))] if site["fn"].event_shape else [name]
    columns = {"kl": costs.tolist(), "variance": spread.tolist(), "active": (spread > ACTIVE).tolist()}
    return pd.DataFrame(columns, index=pd.Index(names, name="quantity"))
