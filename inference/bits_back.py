r"""Bits back: a code of rows by a model with latent variables and a guide of new rows, row by row on one stack.

A site's entries are coded independently of one another, given the sites before it: finite ones as they are, and normal
ones as the middle of one of :data:`BINS` bins of equal mass under the prior, which may not depend on other sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.alternation import entries
from inference.coder import Stack
from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.handlers import REFUSALS
from inference.draws import engine
from inference.draws.rows import guide_sites, probe

BINS = 2**12
"""Bins of a continuous latent variable."""

SPARE = 4
"""Words by which the random bits at the bottom of the stack grow, until the latent variables of a row fit in."""

LEAST = 2.0**-24
"""Smallest probability of the coder."""


def push(bound: BoundPair, x: Tensor, name: str) -> tuple[Stack, float]:
    """The rows on a stack, the last first, and their net cost in bits under the model and the guide."""
    rows = _Rows(bound, name, *_sites(bound, name))
    rows.check(x)
    words = 0
    while True:
        words += max(SPARE, words // 4)
        random = np.random.default_rng(0).integers(0, 2**32, words, dtype=np.uint32)
        stack, bits = Stack(random, sealed=True), 0.0
        for n in reversed(range(len(x))):
            bits += rows.push(stack, n, x[n])
            if stack.is_low:
                break
        else:
            return stack, bits


def pop(bound: BoundPair, x: Tensor, name: str, stack: Stack) -> None:
    """Write the rows of a stack into x."""
    rows = _Rows(bound, name, *_sites(bound, name))
    for n, row in enumerate(x):
        row.copy_(rows.pop(stack, n))


@dataclass(frozen=True)
class _Rows:
    """Rows that are coded one by one.

    Attributes:
        bound: The pair and its data; those of ``name`` are not read.
        name: Name of the rows, and of their site.
        falling: Latent sites in the order of the model.
        rising: Latent sites in the order of the guide.
        bins: Middles and edges of the bins of continuous sites, (entries, BINS) and (entries, BINS + 1).
    """

    bound: BoundPair
    name: str
    falling: tuple[str, ...]
    rising: tuple[str, ...]
    bins: Mapping[str, tuple[Tensor, Tensor]]

    def push(self, stack: Stack, n: int, row: Tensor) -> float:
        """Code row n; return its net cost in bits."""
        z: dict[str, Tensor] = {}
        symbols: dict[str, Tensor] = {}
        bits = 0.0
        for site in self.rising:
            fn = self._guide(n, row, z)[site]["fn"]
            probs = self._probs(site, fn)
            symbols[site] = stack.pop(probs)
            bits += _log2(probs, symbols[site])
            z[site] = self._value(site, fn, symbols[site])
            if stack.is_low:
                return bits
        nodes = self._model(n, z)
        states, probs = finite(nodes[self.name]["fn"])
        seen = (row.flatten()[:, None] == states).long().argmax(-1)
        stack.push(seen, probs)
        bits -= _log2(probs, seen)
        for site in reversed(self.falling):
            if site in self.bins:
                stack.push_even(symbols[site], BINS)
                bits += len(symbols[site]) * math.log2(BINS)
            else:
                probs = finite(nodes[site]["fn"])[1]
                stack.push(symbols[site], probs)
                bits -= _log2(probs, symbols[site])
        return bits

    def pop(self, stack: Stack, n: int) -> Tensor:
        """The next row, which is row n."""
        z: dict[str, Tensor] = {}
        symbols: dict[str, Tensor] = {}
        for site in self.falling:
            fn = self._model(n, z)[site]["fn"]
            if site in self.bins:
                symbols[site] = stack.pop_even(len(self.bins[site][0]), BINS)
            else:
                symbols[site] = stack.pop(finite(fn)[1])
            z[site] = self._value(site, fn, symbols[site])
        fn = self._model(n, z)[self.name]["fn"]
        states, probs = finite(fn)
        row = states[stack.pop(probs)].reshape(fn.shape())[0]
        guide = self._guide(n, row, z)
        for site in reversed(self.rising):
            stack.push(symbols[site], self._probs(site, guide[site]["fn"]))
        return row

    def check(self, x: Tensor) -> None:
        """Raise a ValueError unless x has states of its site, whose distribution does not depend on x."""
        nodes = self._model(0, {})
        states, probs = finite(nodes[self.name]["fn"])
        wrong = ~torch.isin(x, states)
        if wrong.any():
            known = ", ".join(f"{v:g}" for v in states.tolist())
            raise ValueError(f"{self.name}: expected {known} to code without loss, got {float(x[wrong][0]):g}")
        z = {n: nodes[n]["value"] for n in self.falling}
        told = finite(engine.trace(*self._half("model", 0, x[0]), z).nodes[self.name]["fn"])[1]
        if probs.shape != told.shape or not torch.equal(probs, told):
            raise _refused(self.bound, f"whose entries of {self.name} depend on one another given the latent sites")

    def _model(self, n: int, z: Mapping[str, Tensor]) -> Any:
        return engine.trace(*self._half("model", n, torch.zeros_like(self.bound.data[self.name][0])), z).nodes

    def _guide(self, n: int, row: Tensor, z: Mapping[str, Tensor]) -> Any:
        return engine.trace(*self._half("guide", n, row), z).nodes

    def _half(self, half: str, n: int, row: Tensor) -> tuple[BoundPair, Any]:
        """A half on row n alone, in memory of its own: coder and decoder have to sum alike."""
        cut = {k: v[n : n + 1].clone() if k in self.bound.cut else v for k, v in self.bound.data.items()}
        cut[self.name] = row[None].to(cut[self.name]).clone()
        one = replace(self.bound, data=cut, memo={})
        return one, getattr(one, half)

    def _probs(self, site: str, fn: Any) -> Tensor:
        """Probabilities (entries, states) of a latent site under the guide."""
        if site not in self.bins:
            return finite(fn)[1]
        return mass(entries(fn), self.bins[site][1])

    def _value(self, site: str, fn: Any, symbols: Tensor) -> Tensor:
        if site not in self.bins:
            return finite(fn)[0][symbols].reshape(fn.shape())
        middles = self.bins[site][0].gather(-1, symbols[:, None])
        return middles.reshape(fn.shape()).to(entries(fn).loc)


def _sites(bound: BoundPair, name: str) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, tuple[Tensor, Tensor]]]:
    """Latent sites in the orders of model and guide, and the bins of continuous ones.

    Raises:
        ValueError: The pair has no code of this kind.
    """
    latent = bound.select("latent")
    if bound.guide is None or not latent:
        raise _refused(bound, "which has neither")
    try:
        rising = guide_sites(probe(bound, True))
    except REFUSALS as error:
        raise _refused(bound, f"whose guide has none ({reason_of(error, 160)})") from None
    if set(rising) != set(latent) or set(bound.select("observed")) != {name}:
        raise _refused(bound, f"which has other sites than {name} and the latent ones of both halves")
    first, second = (engine.trace(bound, bound.model, {}).nodes for _ in range(2))
    bins = {}
    for site in latent:
        prior, other, guide = (entries(nodes[site]["fn"]) for nodes in (first, second, rising))
        if prior.has_enumerate_support and guide.has_enumerate_support:
            continue
        if not all(isinstance(v, torch.distributions.Normal) for v in (prior, guide)):
            raise _refused(bound, f"whose {site} is neither finite nor independent and normal")
        if not (torch.equal(prior.loc, other.loc) and torch.equal(prior.scale, other.scale)):
            raise _refused(bound, f"where the prior of {site}, which is continuous, depends on another site")
        bins[site] = _bins(prior)
    if entries(first[name]["fn"]).event_dim:
        raise _refused(bound, f"whose entries of {name} depend on one another")
    falling = tuple(n for n in engine.sample_names(engine.trace(bound, bound.model, {})) if n in latent)
    return falling, tuple(rising), bins


def _bins(prior: Any) -> tuple[Tensor, Tensor]:
    """Middles and edges of bins of equal mass of the entries of one row."""
    loc, scale = (v.expand(prior.batch_shape)[0].flatten()[:, None].double() for v in (prior.loc, prior.scale))
    edges = torch.special.ndtri(torch.arange(BINS + 1, device=loc.device).double() / BINS)
    middles = torch.special.ndtri((torch.arange(BINS, device=loc.device).double() + 0.5) / BINS)
    return loc + scale * middles, loc + scale * edges


def mass(normal: Any, edges: Tensor) -> Tensor:
    """Probabilities (entries, BINS) of the bins between edges (entries, BINS + 1) under normals of one row."""
    loc, scale = (v.expand(normal.batch_shape).flatten()[:, None].double() for v in (normal.loc, normal.scale))
    edges = (edges - loc) / scale
    # Mass beyond each edge, away from the mean: differences of numbers near one would have no digits.
    beyond = torch.special.ndtr(-edges.abs())
    left, right = beyond[:, :-1], beyond[:, 1:]
    above, below = edges[:, :-1] > 0, edges[:, 1:] <= 0
    return torch.where(above, left - right, torch.where(below, right - left, 1 - left - right)).clamp_min(0)


def finite(fn: Any) -> tuple[Tensor, Tensor]:
    """States (K,) of a site, and their probabilities (entries, K)."""
    base = entries(fn)
    states = base.enumerate_support(expand=False)
    return states.flatten(), base.log_prob(states).double().flatten(1).mT.softmax(-1)


def _log2(probs: Tensor, symbols: Tensor) -> float:
    return float(probs.gather(-1, symbols[:, None]).clamp_min(LEAST).log2().sum())


def _refused(bound: BoundPair, why: str) -> ValueError:
    return ValueError(
        "result: expected a pair that gives each column given those before it, or independent latent sites of new "
        f"rows, got {bound.name}, {why}"
    )
