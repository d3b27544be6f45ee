r"""Which data a minibatch cuts: those with one entry per element of the plate of rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.core.handlers import REFUSALS, isolated

if TYPE_CHECKING:
    from inference.core.bound import BoundPair

TRIES = 32
"""Largest number of runs of a model to find out which data belong to its groups."""


PERMUTED_ROWS = 1_000_000
"""Rows up to which their order in an epoch is a permutation in memory."""


def some_rows(count: int, most: int) -> Tensor:
    """Indices of so many different rows at most, drawn at random."""
    if count <= PERMUTED_ROWS:
        return torch.randperm(count)[:most]
    return torch.randint(count, (most,)).unique()


class Permutation:
    r"""A random order of many rows, computed where it is asked for: memory does not grow with them.

    A Feistel network of four rounds permutes the numbers below the next power of four. One that is not below ``count``
    is permuted again, until it is: that permutes the numbers below ``count``.

    Args:
        count: Number of rows.
        random: Draws the keys of the rounds.

    Reference: Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (https://doi.org/10.1007/3-540-45760-7_9).

    Example:
        >>> order = Permutation(10, torch.Generator().manual_seed(0))
        >>> sorted(order(torch.arange(10)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, count: int, random: torch.Generator) -> None:
        self._count = count
        self._bits = max(1, ((count - 1).bit_length() + 1) // 2)
        self._keys: list[int] = torch.randint(2**31, (4,), generator=random).tolist()

    def __call__(self, places: Tensor) -> Tensor:
        """The rows at some places of the order."""
        rows = self._once(places)
        while len(outside := (rows >= self._count).nonzero().squeeze(-1)):
            rows[outside] = self._once(rows[outside])
        return rows

    def _once(self, numbers: Tensor) -> Tensor:
        half = (1 << self._bits) - 1
        left, right = numbers >> self._bits, numbers & half
        for key in self._keys:
            mixed = (right ^ key) * 0x9E3779B1 & 0xFFFFFFFF
            mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
            left, right = right, left ^ ((mixed ^ mixed >> 13) & half)
        return left << self._bits | right


def lengths(data: Mapping[str, Any]) -> dict[str, int]:
    """First dimension of each tensor of the data."""
    return {k: len(v) for k, v in data.items() if isinstance(v, Tensor) and v.dim()}


def count_rows(bound: BoundPair) -> int:
    """Number of rows: the size of the plate that the model's ``size`` sets, else of one that observed sites share."""
    known = lengths(bound.data)
    first = next(iter(known.values()), 0)
    if len(set(known.values())) < 2:
        return first
    plates = {n: size for n, size in _plates(bound).items() if size in known.values()}
    plate = row_plate(bound, plates)
    if plate is not None:
        return plates[plate]
    return plates.get("rows", first if first in plates.values() or not plates else next(iter(plates.values())))


def _plates(bound: BoundPair) -> dict[str, int]:
    """Sizes of the plates that observed sites are in, those that all of them share first."""
    sites = bound.select("observed").values()
    each = [{p: n for p, n in zip(s.plates, s.shape, strict=False) if p} for s in sites]
    merged = {p: n for one in each for p, n in one.items()}
    return dict(sorted(merged.items(), key=lambda item: not all(item[0] in one for one in each)))


def row_plate(bound: BoundPair, plates: Mapping[str, int]) -> str | None:
    """Name of the plate whose size and indices are the arguments ``size`` and ``rows`` of the model."""
    for name, size in plates.items() if bound.takes_rows else ():
        try:
            # Twice as many rows, of which these are the first half: only the plate of rows tells of the others.
            trace = _run(bound, {**bound.data, "size": 2 * size, "rows": torch.arange(size, device=bound.device)})
        except REFUSALS:
            continue
        frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ()) if f.name == name]
        if any((f.size, f.full_size) == (size, 2 * size) for f in frames):
            return name
    return None


def cut_by_rows(bound: BoundPair) -> frozenset[str]:
    """Names of the data that a minibatch cuts.

    They have as many entries as there are rows. Where several have, data of groups may have as many by chance: a
    minibatch is scored, and where its rows have other densities than among all rows, those data stay whole that make
    them equal.
    """
    same = frozenset(k for k, n in lengths(bound.data).items() if n == bound.rows)
    if bound.asked.rowwise or not bound.takes_rows or len(same) < 2 or bound.rows < 2:
        return same
    plate = row_plate(bound, {n: size for n, size in _plates(bound).items() if size == bound.rows})
    subsets = chain.from_iterable(combinations(sorted(same), count) for count in range(len(same)))
    for whole, _ in zip(subsets, range(TRIES), strict=False):
        if plate is None or _agrees(bound, plate, same - set(whole)):
            return same - set(whole)
    return same


def _agrees(bound: BoundPair, plate: str, cut: frozenset[str]) -> bool:
    """Whether the rows of a minibatch have the densities that they have among all rows, given the same latents."""
    rows = torch.arange(bound.rows - 1, bound.rows // 2 - 1, -1, device=bound.device)
    batch = {k: v[rows] if k in cut else v for k, v in bound.data.items()}
    try:
        with isolated(0):
            whole = _run(bound, bound.data, nested=True)
            latent = {n: s for n, s in whole.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
            given = {n: _take(s, s["value"], plate, rows) for n, s in latent.items() if not site_is_subsample(s)}
            part = _run(bound, {**batch, "size": bound.rows, "rows": rows}, given, nested=True)
        for name, site in whole.nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                expected = _take(site, _density(site), plate, rows, event=0)
                got = _density(part.nodes[name])
                if got.shape != expected.shape or not torch.allclose(got, expected, 1e-3, 1e-3, equal_nan=True):
                    return False
    except (KeyError, *REFUSALS):
        return False
    return True


def _run(
    bound: BoundPair, arguments: dict[str, Any], given: dict[str, Tensor] | None = None, nested: bool = False
) -> Any:
    with torch.no_grad(), poutine.block():
        if nested:
            return poutine.trace(poutine.condition(bound.model, given or {})).get_trace(**arguments)
        with isolated(0):
            return poutine.trace(poutine.mask(bound.model, mask=False)).get_trace(**arguments)


def _take(site: Any, value: Tensor, plate: str, rows: Tensor, event: int | None = None) -> Tensor:
    """The rows of a site's value, or of its density, in a plate."""
    dims = [f.dim for f in site["cond_indep_stack"] if f.name == plate and f.vectorized]
    event = len(site["fn"].event_shape) if event is None else event
    return value.index_select(dims[0] - event, rows) if dims else value


def _density(site: Any) -> Tensor:
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
