r"""What ``calibrate`` simulates: parameters from the prior, and data given them in the places of those at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.core.bound import BoundPair, bind
from inference.core.handlers import isolated
from inference.draws.scoring import draw_sites, sample_guide
from inference.result import Result

READ = 5
"""Data sets on which the guide of a Result has to differ: two may be equal, of few binary rows."""


Restore = Callable[[], AbstractContextManager[None]]
"""Puts the parameters of a Result into their places."""


Place = tuple[str, int | None]
"""Name of data, and the column of them, where it is one of several."""


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        bound: The pair and the data whose shapes are simulated.
        state: Restores the parameters of a Result; does nothing for a new pair.
        around: A Result from whose posterior parameters are drawn, in place of the prior.
        fitted: Whether it is a Result, whose guide is used at all data sets.
        places: Where in the data the observed sites are.
        latent: Names of the latent sites that are ranked.
        axes: Dimension of the plate of rows by site, where all latent sites lie in it and rows are ranked one by one;
            else empty.
    """

    bound: BoundPair
    state: Restore
    around: Result | None
    fitted: bool
    places: dict[str, Place]
    latent: tuple[str, ...]
    axes: dict[str, int]


def setting_of(make_pair: Callable[[], Any] | Result, data: Any, around: Result | None, seed: int) -> Setting:
    """The setting of a Result, or of a new pair.

    Raises:
        ValueError: The model observes nothing, an observed site is not found in the data, there is nothing to rank, or
            rows cannot be added to the data of ``around``.
    """
    state: Restore
    if fitted := isinstance(make_pair, Result):
        bound, state = make_pair.bound if data is None else make_pair.bound.rebound(data), make_pair.state
    else:
        with isolated(seed):
            bound = bind(make_pair(), around.bound.data if around is not None and data is None else data)
        state = nullcontext if around is None else around.state
    (bound if around is None else around.bound).check_in_memory("simulated data of its shapes")
    if not bound.select("observed"):
        raise ValueError("make_pair: expected a model that observes data, got one that observes nothing")
    latent, axes = _ranked(bound, bound.guided if fitted else bound.select("latent"), around is not None)
    if around is not None and not around.bound.cut:
        raise ValueError("around: expected data with a row per element of a plate, to which rows are added, got others")
    return Setting(bound, state, around, fitted, _places(bound), latent, axes)


def _ranked(bound: BoundPair, drawn: Collection[str], around: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    """The latent sites that are ranked, and the dimension of the plate of rows in each, if all of them lie in it."""
    rows = _row_plates(bound)
    sites = {n: s for n, s in bound.select("latent").items() if n in drawn}
    of_rows = {n for n, s in sites.items() if rows & set(s.plates)}
    kept = [n for n in sites if not (around and n in of_rows)]
    if not kept:
        raise ValueError("make_pair: expected latent sites to rank, got none")
    if of_rows.issuperset(kept):
        return tuple(kept), {n: next(k for k, p in enumerate(sites[n].plates) if p in rows) for n in kept}
    # States of rows beside global sites: the log density sees them.
    return tuple(n for n in kept if not (sites[n].discrete and n in of_rows)), {}


def _row_plates(bound: BoundPair) -> set[str]:
    """Plates that all observed sites share and that have as many elements as there are rows."""
    observed = bound.select("observed").values()
    shared = [{p for p, size in zip(s.plates, s.shape, strict=False) if p and size == bound.rows} for s in observed]
    return set.intersection(*shared) if shared else set()


def _places(bound: BoundPair) -> dict[str, Place]:
    """Where in the data the observed sites are: data of their own, or else columns of a matrix."""
    found: dict[str, Place] = {}
    for site, value in bound.observations.items():
        same = [site] if site in bound.data else [n for n, v in bound.data.items() if _equal(v, value)]
        found[site] = (same[0], None) if len(same) == 1 else _column(bound.data, site, value)
    return found


def _column(data: Mapping[str, Any], site: str, value: Tensor) -> Place:
    """The one column of a matrix among the data that is the value of an observed site."""
    matrices = {n: v for n, v in data.items() if isinstance(v, Tensor) and v.dim() == 2}
    same = [(n, k) for n, v in matrices.items() for k, column in enumerate(v.mT) if _equal(column, value)]
    if len(same) != 1:
        got = "several" if same else ", ".join(data) or "none"
        raise ValueError(f"data: expected one, or one column, that is the value of the observed site {site}, got {got}")
    return same[0]


def _equal(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and torch.equal(one, other.to(one))


def simulate(setting: Setting, count: int) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """True parameters (count, ...) by site, and as many data sets."""
    around, bound = setting.around, setting.bound if setting.around is None else setting.around.bound
    known: dict[str, Tensor] = {}
    if around is not None:
        chosen = torch.randint(around.size, (count,)) if around.size < count else torch.randperm(around.size)[:count]
        known = {n: around.draws[n][chosen] for n in setting.latent}
    with setting.state(), torch.no_grad():
        sites = draw_sites(bound.generator(), known, count)
    data = [_with_drawn(bound.data, {n: sites[n][k] for n in setting.places}, setting.places) for k in range(count)]
    if around is not None:
        data = [{n: torch.cat([v, new[n]]) if n in bound.cut else v for n, v in bound.data.items()} for new in data]
    return {n: v.cpu() for n, v in sites.items() if n in bound.select("latent")}, data


def _with_drawn(data: Mapping[str, Any], sites: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Any]:
    """The data with observed sites in their places."""
    found = dict(data)
    for site, (name, column) in places.items():
        value = sites[site].to(data[name].dtype)
        if column is None:
            found[name] = value
        else:
            found[name] = data[name].clone() if found[name] is data[name] else found[name]
            found[name][:, column] = value
    return found


def check_reads(setting: Setting, data: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ValueError where the guide of a Result draws the same whatever the data."""
    if not setting.fitted or len(data) < 2:
        return
    drawn = []
    for given in data[:READ]:
        with isolated(0), setting.state():
            drawn.append(sample_guide(setting.bound.rebound(given), 2))
    first, density = drawn[0]
    if all(torch.equal(d, density) and all(torch.equal(first[n], v[n]) for n in first) for v, d in drawn[1:]):
        raise ValueError(
            "make_pair: expected a Result with an amortized guide, got one whose draws are the same for all data; give "
            "a function that builds a pair, and a method that fits it to each data set"
        )
