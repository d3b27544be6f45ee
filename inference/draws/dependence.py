r"""Which latent values one observation alone depends on, by derivatives, or by changes of finite ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.handlers import REFUSALS, preserved_rng
from inference.core.sites import Site
from inference.core.spacing import spaced
from inference.draws import engine

PROBED = 16
"""Observations of a site that are looked at."""


def of_observations(bound: BoundPair, posterior: Mapping[str, Tensor]) -> list[str]:
    """Latent sites with a value for each observation, in the order of the model, with the parameters in the store.

    Either a site lies in all plates of an observed one, or each observation depends on an element of the site on which
    no other one depends: an event of as many elements, or a plate of another name. The latter is looked for at the
    first draw.
    """
    known = by_plates(bound, posterior)
    rest = {n: s for n, s in bound.select("latent").items() if n in posterior and n not in known}
    found = {*known, *_by_derivatives(bound, posterior, rest), *_by_changes(bound, posterior, rest)}
    return [n for n in bound.sites if n in found]


def by_plates(bound: BoundPair, posterior: Mapping[str, Tensor]) -> list[str]:
    """Latent sites in all plates of an observed site, which is in one."""
    observed = [set(s.plates) - {None} for s in _observed(bound)]
    latent = bound.select("latent").items()
    return [n for n, s in latent if n in posterior and any(o and o <= set(s.plates) for o in observed)]


def _observed(bound: BoundPair) -> list[Site]:
    return [s for s in bound.select("observed").values() if _entries(s) > 1]


def _entries(site: Site) -> int:
    return torch.Size(site.shape[: site.batch]).numel()


def _scores(bound: BoundPair, values: Mapping[str, Tensor], observed: list[Site]) -> tuple[dict[str, Tensor], Any]:
    """Log density of each observation by site, flat, and the trace."""
    nodes = engine.trace(bound, bound.model, values).nodes
    return {s.name: nodes[s.name]["fn"].log_prob(nodes[s.name]["value"]).flatten() for s in observed}, nodes


def _by_derivatives(bound: BoundPair, posterior: Mapping[str, Tensor], among: Mapping[str, Site]) -> set[str]:
    latent = {n: s for n, s in among.items() if not s.discrete}
    sizes = {n: torch.Size(s.shape).numel() for n, s in latent.items()}
    observed = [s for s in _observed(bound) if any(size >= _entries(s) for size in sizes.values())]
    if not observed:
        return set()
    try:
        with preserved_rng(), torch.enable_grad():
            values = {n: v[0].detach().clone().to(bound.device) for n, v in posterior.items()}
            for n in latent:
                values[n].requires_grad_()
            scores, _ = _scores(bound, values, observed)
            large = {s.name: [values[n] for n in latent if sizes[n] >= _entries(s)] for s in observed}
            own = {s.name: _owned(scores[s.name], large[s.name]) for s in observed}
    except REFUSALS:
        # A model that cannot be differentiated says so where it is sampled.
        return set()
    names = {s.name: [n for n in latent if sizes[n] >= _entries(s)] for s in observed}
    return {n for site, owned in own.items() for n, is_own in zip(names[site], owned, strict=True) if is_own}


def _by_changes(bound: BoundPair, posterior: Mapping[str, Tensor], among: Mapping[str, Site]) -> set[str]:
    observed = _observed(bound)
    least = min(map(_entries, observed), default=0)
    names = [n for n, s in among.items() if s.units and least and torch.Size(s.shape).numel() >= least]
    if not names:
        return set()
    values = {n: v[0].detach().clone().to(bound.device) for n, v in posterior.items()}

    def scores(changed: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([*_scores(bound, {**values, **changed}, observed)[0].values()])

    with preserved_rng(), torch.no_grad():
        try:
            before, (_, nodes) = scores({}), _scores(bound, values, observed)
            return {n for n in names if _one_each(n, values[n], nodes[n]["fn"], before, scores)}
        except REFUSALS:
            return set()


def _one_each(name: str, value: Tensor, fn: Any, before: Tensor, scores: Callable[[dict[str, Tensor]], Tensor]) -> bool:
    """Whether another state of an element changes the density of one observation, whichever element it is."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    states = fn.enumerate_support(expand=False)
    if states.numel() != len(states):
        # A state is itself several numbers.
        return False
    counts = []
    for k in spaced(value.numel(), min(PROBED, value.numel())).tolist():
        other = next(s for s in states.flatten() if s != value.flatten()[k])
        changed = value.flatten().clone()
        changed[k] = other
        counts.append(int((scores({name: changed.reshape(value.shape)}) != before).sum()))
    return max(counts) == 1


def _owned(scores: Tensor, latent: list[Tensor]) -> list[bool]:
    """Whether each observation that is looked at has an element of a site to itself."""
    if not scores.requires_grad:
        return [False] * len(latent)
    owned = [True] * len(latent)
    # Derivatives of the others do not cancel under any weights.
    weights = torch.rand(len(scores), dtype=scores.dtype, device=scores.device) + 0.5
    for k in spaced(len(scores), min(PROBED, len(scores))).tolist():
        others = weights.clone()
        others[k] = 0.0
        mine, theirs = (
            torch.autograd.grad(s, latent, retain_graph=True, allow_unused=True)
            for s in (scores[k], (others * scores).sum())
        )
        for at, (m, t) in enumerate(zip(mine, theirs, strict=True)):
            alone = m is not None and bool(((m != 0) & (torch.zeros_like(m) if t is None else t).eq(0)).any())
            owned[at] = owned[at] and alone
    return owned
