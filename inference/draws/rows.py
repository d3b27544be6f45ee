r"""Latent sites with a value per row, and a pair run for many draws of them.

Where all latent sites lie in the plate of rows, the rows are independent: a log density is one number per draw and row,
and any minibatch can be run alone. Draws are the leftmost dimension, as in :mod:`inference.draws.engine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.handlers import REFUSALS
from inference.draws import engine
from inference.draws.engine import Draws
from inference.draws.scoring import unscale, values_of


@dataclass(frozen=True, eq=False)
class LocalLatents:
    """A pair whose latent sites have a value per row, and its halves run for many draws of them.

    Attributes:
        bound: The pair, bound to these rows.
        plate: Name of the plate of rows.
        drawn: Latent sites that are drawn; the others are summed out.
        splits: Whether they can be run on a minibatch.
        width: Size of the largest site for one row and one draw, in numbers.
    """

    bound: BoundPair
    plate: str
    drawn: tuple[str, ...]
    splits: bool
    width: int = 1

    def take(self, rows: Tensor) -> LocalLatents:
        """The same for a part of the rows."""
        return replace(self, bound=self.bound.minibatch(rows)) if len(rows) < self.bound.rows else self

    def axis(self, name: str) -> int:
        """Dimension of the rows in a site's value."""
        return self.bound.sites[name].plates.index(self.plate)

    def guide(self, draws: Draws, count: int) -> tuple[dict[str, Tensor], Tensor]:
        r"""Sites that the guide draws, (count, \*shape), and their log density, (count, rows); ``draws`` are given."""
        names = [n for n in self.bound.sites if n in self.bound.guided]

        def read(trace: Any) -> dict[str, Tensor]:
            return {"": self._density(trace, engine.sample_names(trace)), **self._values(trace, names)}

        values = self._run(self.bound.guide, draws, count, read)
        return values, values.pop("")

    def prior(self, count: int) -> dict[str, Tensor]:
        r"""The drawn sites, (count, \*shape), from the model."""
        return self._run(self.bound.model, {}, count, lambda trace: self._values(trace, self.drawn))

    def model(self, draws: Draws, count: int) -> tuple[Tensor, Tensor]:
        """Log density (count, rows) of draws and data, and of draws alone.

        Drawn sites without values are drawn from the prior, and their density is left out.
        """
        latent = self.bound.select("latent")

        def read(trace: Any) -> dict[str, Tensor]:
            names = [n for n in engine.sample_names(trace) if n in draws or n not in self.drawn]
            prior = [n for n in names if n in latent]
            return {"joint": self._density(trace, names), "prior": self._density(trace, prior)}

        density = self._run(self.bound.model, draws, count, read, summed=True)
        return density["joint"], density["prior"]

    def _run(
        self, half: Any, draws: Draws, count: int, read: engine.Read, *, summed: bool = False
    ) -> dict[str, Tensor]:
        wrap = engine.enumerated if summed else None
        return engine.run(self.bound, half, draws, count, lambda trace: read(unscale(trace)), wrap=wrap)

    def _values(self, trace: Any, names: Sequence[str]) -> dict[str, Tensor]:
        return values_of(trace, {n: self.bound.sites[n] for n in names})

    def _density(self, trace: Any, names: list[str]) -> Tensor:
        if not names:
            return torch.zeros(self.bound.rows, device=self.bound.device)
        return engine.contract(trace, names, [self.plate])


def probe(bound: BoundPair, guided: bool) -> LocalLatents:
    """Run model and guide on two rows, to check that each site has a value per row and to see how they can be run."""
    # An autoguide takes its shapes from its first run, which must see all rows.
    by_guide = bound.guided if guided else frozenset()
    drawn = tuple(n for n, s in bound.select("latent").items() if n in by_guide or not s.finite)
    start = torch.arange(min(2, bound.rows), device=bound.device)
    part = bound.minibatch(start) if bound.takes_rows else bound
    rows = LocalLatents(part, "", drawn, splits=bound.takes_rows)
    trace = engine.trace(part, part.model, {n: v[0] for n, v in rows.prior(1).items()}, engine.enumerated)
    nodes = {n: trace.nodes[n] for n in engine.sample_names(trace)}
    numbers = max(math.prod((*node["fn"].batch_shape, *node["fn"].event_shape)) for node in nodes.values())
    rows = replace(rows, plate=_plate(nodes, bound), width=-(-numbers // part.rows))
    if guided:
        rows = _with_guide(rows, bound)
    return replace(rows, bound=bound)


def _plate(nodes: dict[str, Any], bound: BoundPair) -> str:
    """Name of the plate of rows."""
    latent = bound.select("latent")
    within = {n: {p: f.dim for p, f in _frames(v).items() if f.full_size == bound.rows} for n, v in nodes.items()}
    observed = [n for n in nodes if n not in latent]
    shared = set.intersection(*(set(within[n]) for n in observed)) if observed else set()
    if not shared:
        got = ", ".join(n for n in observed if not within[n]) or "nothing"
        raise ValueError(f"model: expected observed sites in a plate of rows, got {got} outside of one")
    plate = "rows" if "rows" in shared else min(shared, key=within[observed[0]].__getitem__)
    for name in latent:
        if plate not in within[name]:
            raise ValueError(f"{name}: expected a latent site in the plate {plate}, got a global one outside of it")
    return plate


def _with_guide(rows: LocalLatents, bound: BoundPair) -> LocalLatents:
    """Check the sites of the guide; a guide that cannot be run on a minibatch is run on all rows."""
    whole = replace(rows, bound=bound, splits=False)
    try:
        sites = guide_sites(rows)
    except REFUSALS:
        # A guide with a parameter per row of the data may fail on two rows.
        if not rows.splits:
            raise
        return _with_guide(whole, bound)
    for name, node in sites.items():
        _check_guided(name, node, rows, any(n["infer"].get("is_auxiliary") for n in sites.values()))
    return rows if all(_frames(n)[rows.plate].size == rows.bound.rows for n in sites.values()) else whole


def _check_guided(name: str, node: Any, rows: LocalLatents, auxiliary: bool) -> None:
    site = rows.bound.select("latent").get(name)
    if rows.plate not in _frames(node):
        raise ValueError(f"{name}: expected a site of the guide in the plate {rows.plate}, got one outside of it")
    if site is None and not node["infer"].get("is_auxiliary"):
        raise ValueError(f"{name}: expected a latent site of the model, got one of the guide alone")
    if site is not None and not site.discrete and not auxiliary and is_point(node["fn"]):
        raise ValueError(f"{name}: expected a guide with a density to weigh by, got a point mass (Delta)")


def _frames(node: Any) -> dict[str, Any]:
    return {f.name: f for f in node["cond_indep_stack"] if f.vectorized}


def guide_sites(rows: LocalLatents) -> dict[str, Any]:
    """Nodes of the guide's sites."""
    trace = engine.trace(rows.bound, rows.bound.guide, {})
    return {n: trace.nodes[n] for n in engine.sample_names(trace)}


def is_point(fn: Any) -> bool:
    """Whether a distribution is a Delta, however it is wrapped."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)
