r"""Model and guide in turn: chains of rows that are known in part, or through noise, and of their latent sites.

With the row as it stands at present, z is drawn from :math:`q(z \mid x)` and accepted with probability

.. math:: \min\Big(1, \frac{p(x, z') \, q(z \mid x)}{p(x, z) \, q(z' \mid x)}\Big)

and what is not known of x is drawn given z and what is known. This is a Metropolis-within-Gibbs chain, whatever the
guide. It needs entries of x that are independent given z, and a guide of new rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.handlers import REFUSALS
from inference.draws import engine
from inference.draws.rows import LocalLatents, guide_sites, probe

MIXED = 1.05
"""R-hat above which chains are said to be too short."""

CHAIN_NUMBERS = 50_000_000
"""Numbers of the data of all chains at once."""


class Given(NamedTuple):
    """Rows drawn given their latent sites and what is known of them, and the moments of such draws."""

    draw: Tensor
    mean: Tensor
    variance: Tensor | float


class View(Protocol):
    """What is known of rows.

    Attributes:
        unknown: Which entries are to be found, (rows, columns).
    """

    unknown: Tensor

    def start(self) -> Tensor | None:
        """Rows from which the guide draws the first latent sites; None: these come from the prior."""

    def given(self, fn: Any, count: int) -> Given:
        """The rows of ``count`` chains given their latent sites, whose distribution of x is ``fn``."""


@dataclass(frozen=True, eq=False)
class Alternated:
    """What chains found, from the later half of each.

    Attributes:
        draws: The last rows of each chain, (chains, rows, columns).
        means: Mean of each entry in each chain, (chains, rows, columns).
        squares: Mean of its square.
        acceptance: Fraction of accepted proposals of each row, (rows,).
        r_hat: Largest R-hat of an unknown entry.
    """

    draws: Tensor
    means: Tensor
    squares: Tensor
    acceptance: Tensor
    r_hat: float


def said_of(what: str, method: str, acceptance: Tensor | None, r_hat: float) -> str:
    """What was found and how, in words; whether chains were long enough."""
    if acceptance is None:
        return f"{what} ({method})"
    said = f"{what} ({method}, R-hat {r_hat:.2f}, {float(acceptance.mean()):.0%} of proposals accepted)"
    return f"{said}; the chains are too short: raise steps" if r_hat >= MIXED else said


def alternate(bound: BoundPair, view: View, name: str, count: int, steps: int) -> Alternated:
    """Run chains, as many at once as fit into memory.

    Raises:
        ValueError: Model and guide cannot alternate.
    """
    check_alternates(bound, view.unknown, name)
    together = max(1, CHAIN_NUMBERS // max(view.unknown.numel(), 1))
    sizes = [len(part) for part in torch.arange(count).tensor_split(math.ceil(count / together))]
    parts = [_run(bound, view, name, size, steps) for size in sizes]
    draws, means, squares = (torch.cat([getattr(p, n) for p in parts]) for n in ("draws", "means", "squares"))
    accepted = torch.stack([size * p.acceptance for size, p in zip(sizes, parts, strict=True)]).sum(0) / count
    r_hat = max((p.r_hat for p in parts if not math.isnan(p.r_hat)), default=math.nan)
    return Alternated(draws, means, squares, accepted, r_hat)


def _run(bound: BoundPair, view: View, name: str, count: int, steps: int) -> Alternated:
    chains = _Chains(bound, view, name, count)
    for step in range(steps):
        if step == steps // 2:
            chains.forget()
        chains.advance()
    rows = chains.x.reshape(chains.shape)
    moved = chains.accepted.reshape(count, -1).mean(0) / chains.counted
    means, squares = (v / chains.counted for v in (chains.total, chains.square))
    return Alternated(rows.cpu(), means.cpu(), squares.cpu(), moved.cpu(), chains.r_hat())


def check_alternates(bound: BoundPair, unknown: Tensor, name: str) -> None:
    """Raise a ValueError unless the entries can be drawn in turn with latent sites of a guide of any rows."""
    refused = f"result: expected a pair that knows its conditionals, or a guide of new rows, got {bound.name}"
    if bound.guide is None or not bound.select("latent"):
        raise ValueError(f"{refused}, which has neither")
    try:
        rows = probe(bound, True)
        sites = set(guide_sites(rows))
    except REFUSALS as error:
        raise ValueError(f"{refused} ({reason_of(error, 160)})") from None
    if sites != set(bound.select("latent")):
        raise ValueError(f"{refused}, whose guide does not draw the latent sites of the model alone")
    node = engine.trace(bound, bound.model, {}).nodes.get(name)
    if node is None or node["type"] != "sample":
        raise ValueError(f"name: expected an observed site of {bound.name}, got {name!r}")
    fn = node["fn"]
    if entries(fn).event_dim or _reads_unknown(bound, unknown, name):
        raise ValueError(f"{refused}, whose entries of {name} depend on one another given the latent sites")


def _reads_unknown(bound: BoundPair, unknown: Tensor, name: str) -> bool:
    """Whether the density of what is known, or of another site, depends on the unknown entries given the latents."""
    first = engine.trace(bound, bound.model, {})
    latents = {n: first.nodes[n]["value"] for n in bound.select("latent")}
    rows = bound.data[name]
    drawn = first.nodes[name]["fn"].sample().to(rows)
    other = replace(bound, data={**bound.data, name: torch.where(unknown, drawn, rows)}, memo={})
    second = engine.trace(other, other.model, latents)

    def differs(site: str) -> bool:
        one, two = (t.nodes[site] for t in (first, second))
        given = one["value"]
        return not torch.allclose(one["fn"].log_prob(given), two["fn"].log_prob(given), equal_nan=True)

    return any(differs(n) for n in engine.sample_names(first))


def entries(fn: Any) -> Any:
    """The distribution of the entries of a site: without ``to_event``."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


class _Chains:
    """A chain for each count and row; all of them are rows of one data set."""

    def __init__(self, bound: BoundPair, view: View, name: str, count: int) -> None:
        start = view.start()
        data = bound.data if start is None else {**bound.data, name: start}
        tiled = {n: v.repeat(count, *[1] * (v.dim() - 1)) if n in bound.cut else v for n, v in data.items()}
        whole = bound.rebound(tiled)
        self.x = whole.data[name] = whole.data[name].clone()
        self.shape, self.name, self.view = (count, *view.unknown.shape), name, view
        self.pair: LocalLatents = probe(whole, True)
        self.z: Mapping[str, Tensor] = self.pair.prior(1) if start is None else self.pair.guide({}, 1)[0]
        self.draw()
        self.forget()

    def forget(self) -> None:
        """Start counting anew."""
        self.accepted = torch.zeros(len(self.x), device=self.x.device)
        self.total = torch.zeros(self.shape, dtype=torch.float64, device=self.x.device)
        self.square, self.counted = torch.zeros_like(self.total), 0

    def advance(self) -> None:
        """Propose z from the guide, accept it or not in each row, and draw what is unknown of x."""
        pair = self.pair
        proposal, forward = pair.guide({}, 1)
        backward = pair.guide(self.z, 1)[1]
        ratio = pair.model(proposal, 1)[0] - pair.model(self.z, 1)[0] + backward - forward
        # A state of density 0, in which the prior may start, is left for any other.
        taken = ratio[0].nan_to_num(nan=-math.inf, posinf=math.inf).exp() > torch.rand_like(ratio[0])
        self.z = {n: torch.where(self._by_row(n, taken), v, self.z[n]) for n, v in proposal.items()}
        self.accepted += taken
        mean, variance = self.draw()
        self.counted += 1
        self.total += mean
        self.square += variance + mean**2

    def draw(self) -> tuple[Tensor, Tensor | float]:
        """Draw what is unknown of x given z, in place; return the mean and the variance of such draws."""
        trace = engine.trace(self.pair.bound, self.pair.bound.model, {n: v[0] for n, v in self.z.items()})
        found = self.view.given(trace.nodes[self.name]["fn"], self.shape[0])
        self.x.copy_(found.draw)
        variance = found.variance
        wide = variance.reshape(self.shape).double() if isinstance(variance, Tensor) else variance
        return found.mean.reshape(self.shape).double(), wide

    def _by_row(self, name: str, taken: Tensor) -> Tensor:
        """A mask of rows in the shape of a site's draws."""
        site = self.pair.bound.sites[name]
        return taken.reshape([-1 if k == self.pair.axis(name) else 1 for k in range(-1, len(site.shape))])

    def r_hat(self) -> float:
        """Largest R-hat of an unknown entry since the last time that was forgotten; nan for a single chain."""
        count, unknown = self.counted, self.view.unknown
        mean = self.total / count
        within = ((self.square / count - mean**2).clamp_min(0) * count / max(count - 1, 1)).mean(0)[unknown]
        between = mean.var(0)[unknown] if len(mean) > 1 else torch.full_like(within, math.nan)
        constant = (within <= 0) & (between <= 0)
        ratio = ((count - 1) / count + between / within).sqrt()
        return float(torch.where(constant, 1.0, ratio).max()) if unknown.any() else 1.0
