r"""KL divergence of a guide from the prior, site by site."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent, kl_divergence


def kl_by_site(
    model_trace: Any, guide_trace: Any, names: Collection[str] | None = None, *, masked: bool = True
) -> dict[str, Tensor]:
    r"""KL divergence of the guide from the model for each latent site, (\*plates, \*event), not scaled.

    The closed form is used where torch has one and the guide draws no site later that the model draws before this one.
    Otherwise it is the difference of log densities at the draw, whose mean is the divergence. Where both distributions
    are products over the dimensions of the event, each has a divergence of its own; otherwise the event has one.

    Args:
        model_trace: A trace of the model, replayed against that of the guide.
        guide_trace: A trace of the guide.
        names: Names of sites. Default: all that the guide draws.
        masked: Whether to set to zero what the masks of either half leave out.
    """
    drawn = [n for n, s in guide_trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
    found: dict[str, Tensor] = {}
    before: set[str] = set()
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
            continue
        if name in (drawn if names is None else names):
            ancestral = before <= set(drawn[: drawn.index(name)])
            guide = guide_trace.nodes[name]
            found[name] = _divergence(guide, site, ancestral)
            for mask in (guide["mask"], site["mask"]) if masked else ():
                found[name] = masked_by(found[name], mask, guide["fn"].batch_shape)
        before.add(name)
    return found


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
    return found.expand(torch.broadcast_shapes(found.shape, batch)) if found.dim() <= len(batch) else found


def masked_by(values: Tensor, mask: Any, batch: torch.Size) -> Tensor:
    r"""Values (\*batch, \*event) with zero where a site's mask, over its batch, leaves them out."""
    if isinstance(mask, Tensor):
        mask = mask.expand(batch).reshape(*batch, *[1] * (values.dim() - len(batch)))
    return scale_and_mask(values, mask=mask)


def _strip(fn: Any, dims: int) -> Any:
    left = fn.reinterpreted_batch_ndims - dims
    return fn.base_dist.to_event(left) if left else fn.base_dist
