r"""How much each latent dimension encodes: its KL divergence from the prior, and whether it is active.

:math:`\mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))` is the information about row n in dimension j, in nats. A dimension
where it is zero for all rows has collapsed to the prior, and the model does not use it.
"""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.lazy import pd
from inference.core.minibatch import some_rows
from inference.draws.kl import kl_by_site
from inference.draws.rows import is_point

ACTIVE_VARIANCE = 0.01
"""Variance of the posterior mean over rows above which a dimension is active (Burda et al. 2016)."""


MEAN_DRAWS = 100
"""Draws of the guide that its mean is taken from where it has no formula."""


MAX_ROWS = 1000
"""Maximum number of rows to average over; more are subsampled."""


def local_latent_kl(bound: BoundPair) -> pd.DataFrame:
    """KL divergence of each dimension of the continuous latent sites in the plate of rows.

    Parameters are read from the current parameter store.

    Returns:
        One row per dimension: ``kl``, the mean over rows of the KL divergence of the guide from the prior in nats;
        ``variance``, the variance over rows of the guide's mean; and ``active``, whether it is above 0.01.
    """
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        many = bound.takes_rows and bound.rows > MAX_ROWS
        arguments = bound.arguments(some_rows(bound.rows, MAX_ROWS).to(bound.device) if many else None)
        guide = poutine.trace(bound.guide).get_trace(**arguments)
        local = [n for n in bound.guided if _is_local(guide.nodes[n], bound.rows)]
        if not local:
            return pd.DataFrame(columns=["kl", "variance", "active"])
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(**arguments)
        return pd.concat(_table(n, v, guide.nodes[n]) for n, v in kl_by_site(model, guide, local).items())


def _is_local(site: Any, rows: int) -> bool:
    """Whether a site of the guide is continuous, not a point mass, and only in the plate of rows."""
    plates = [f for f in site["cond_indep_stack"] if f.vectorized and f.full_size == rows]
    fn = site["fn"]
    return len(fn.batch_shape) == 1 and bool(plates) and fn.has_rsample and not is_point(fn)


def _mean(fn: Any) -> Tensor:
    """Mean of a distribution; of draws where it is not known, as of a flow."""
    try:
        return fn.mean
    except NotImplementedError:
        return fn.sample(torch.Size([MEAN_DRAWS])).mean(0)


def _table(name: str, divergence: Tensor, site: Any) -> pd.DataFrame:
    """Mean over rows of the KL divergence (rows, *event), and variance over rows of the guide's mean."""
    kl, means = (v.double().reshape(len(v), -1) for v in (divergence, _mean(site["fn"])))
    kl, variance = kl.mean(0), means.var(0)
    if len(kl) < len(variance):
        # The divergence is known for the whole site only: one line for all of its dimensions.
        variance = variance.amax()[None]
    names = [f"{name}[{k}]" for k in range(len(kl))] if site["fn"].event_shape else [name]
    active = (variance > ACTIVE_VARIANCE).tolist()
    columns = {"kl": kl.tolist(), "variance": variance.tolist(), "active": active}
    return pd.DataFrame(columns, index=pd.Index(names, name="quantity"))
