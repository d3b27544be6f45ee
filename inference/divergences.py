r"""What each latent site says of the data: its divergence from the prior, and whether it is active.

The divergence :math:`\mathrm{KL}(q(z_j \mid x_n) \,\|\, p(z_j))` is the information, in nats, that a row leaves in a
dimension of its latent site. A dimension without any has collapsed to the prior: the model does without it.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from inference.local import is_point
from inference.program import Program, bind, isolated

ACTIVE = 0.01
"""Variance of the posterior's mean over rows above which a dimension is active (Burda et al. 2016)."""
ROWS = 1000
"""Rows that are looked at."""


def divergences(model_trace: Any, guide_trace: Any, names: Collection[str] | None = None) -> dict[str, Tensor]:
    r"""Divergence of each of the guide's latent sites from the model's, (\*plates, \*event), masked but not scaled.

    In closed form where torch knows one and where no site that the model draws before it is drawn after it by the
    guide; else the difference of log densities at the draw, whose mean is the divergence. Dimensions are told apart
    where both distributions are products over them; else the event is one number.

    Args:
        model_trace: A trace of the model, replayed against the guide's.
        guide_trace: A trace of the guide.
        names: Sites to look at; None: all that the guide draws.
    """
    drawn = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
    found: dict[str, Tensor] = {}
    before: set[str] = set()
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if name in (drawn if names is None else names):
            ancestral = before <= set(drawn[: drawn.index(name)])
            found[name] = _divergence(guide_trace.nodes[name], site, ancestral)
        before.add(name)
    return found


def latents(result: Any, data: Any = None, *, seed: int = 0) -> pd.DataFrame:
    r"""What each dimension of a Result's latent sites says of the rows of data.

    Args:
        result: What ``fit`` returned, of a pair with continuous latent sites in its plate of rows.
        data: Rows to look at, a thousand at most; those of the fit when None.

    Returns:
        One row a dimension: ``kl``, its mean divergence from the prior in nats a row; ``variance`` of the guide's mean
        over the rows; ``active``, whether that is above 0.01 (Burda et al. 2016). Empty where no site lies in a
        plate of rows, or where the guide is a point.
    """
    program = result.program if data is None else bind(result.program.pair, data)
    with isolated(seed), result.state():
        return local_latents(program)


def local_latents(program: Program) -> pd.DataFrame:
    """:func:`latents` of a program, in the current parameter store."""
    with torch.no_grad(), poutine.block(), pyro.validation_enabled(False):
        few = torch.randperm(program.rows)[:ROWS] if program.takes_rows and program.rows > ROWS else None
        arguments = program.arguments(few)
        guide = poutine.trace(program.guide).get_trace(**arguments)
        local = [n for n in program.guided if _is_local(guide.nodes[n], program.rows)]
        if not local:
            return pd.DataFrame(columns=["kl", "variance", "active"])
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**arguments)
        return pd.concat(_table(n, v, guide.nodes[n]) for n, v in divergences(model, guide, local).items())


def _divergence(guide: Any, model: Any, ancestral: bool) -> Tensor:
    q, p = guide["fn"], model["fn"]
    batch, value = q.batch_shape, guide["value"]
    while isinstance(q, Independent) and isinstance(p, Independent):
        shared = min(q.reinterpreted_batch_ndims, p.reinterpreted_batch_ndims)
        q, p = _strip(q, shared), _strip(p, shared)
    found: Any = None
    if ancestral:
        with suppress(NotImplementedError):
            found = kl_divergence(q, p)
    found = torch.as_tensor(q.log_prob(value) - p.log_prob(value) if found is None else found)
    found = found.expand(torch.broadcast_shapes(found.shape, batch)) if found.dim() <= len(batch) else found
    mask = guide["mask"]
    if isinstance(mask, Tensor):
        mask = mask.expand(batch).reshape(*batch, *[1] * (found.dim() - len(batch)))
    return scale_and_mask(found, mask=mask)


def _strip(fn: Any, dims: int) -> Any:
    left = fn.reinterpreted_batch_ndims - dims
    return fn.base_dist.to_event(left) if left else fn.base_dist


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
