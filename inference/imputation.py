r"""Missing entries of rows, drawn from their distribution given the known entries of the same row.

A pair that knows this distribution has ``impute`` (:class:`inference.core.contracts.Pair`). Otherwise model and guide
alternate, for a model whose entries are independent given latent sites z in the plate of rows, and a guide of new rows.
With the row as it is completed at present, z is drawn from :math:`q(z \mid x)` and accepted with probability

.. math:: \min\Big(1, \frac{p(x, z') \, q(z \mid x)}{p(x, z) \, q(z' \mid x)}\Big)

and the missing entries are drawn from :math:`p(x_m \mid z)`. This Metropolis-within-Gibbs chain (Mattei and Frellsen
2018) has :math:`p(x_m, z \mid x_o)` as its distribution whatever the guide; taking every proposal, as pseudo-Gibbs
sampling (Rezende, Mohamed and Wierstra 2014) does, has not.

References: Rezende, Mohamed and Wierstra 2014 (https://arxiv.org/abs/1401.4082); Mattei and Frellsen 2018, "Leveraging
the Exact Likelihood of Deep Latent Variable Models" (https://arxiv.org/abs/1802.04826).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Independent
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_count
from inference.core.given import by_name, names_in, to_tensor
from inference.core.halves import accepted_by, halves_of
from inference.core.handlers import REFUSALS, exclusive, isolated
from inference.draws import engine
from inference.draws.rows import LocalLatents, guide_sites, probe
from inference.result import Result

CHAIN_NUMBERS = 50_000_000
"""Numbers of the data of all chains at once."""

MIXED = 1.05
"""R-hat above which chains are said to be too short."""


@dataclass(frozen=True, eq=False)
class Imputation:
    """Draws of the missing entries of rows.

    Attributes:
        draws: Completed rows, (S, rows, columns); independent of one another.
        missing: Which entries are drawn, (rows, columns).
        method: ``conditional``: by the pair itself; ``Metropolis within Gibbs``: by its model and guide.
        acceptance: Fraction of accepted proposals of each row, (rows,); None for ``conditional``.
        r_hat: Largest R-hat of a missing entry over the later half of the chains; nan for ``conditional``.
    """

    draws: Tensor
    missing: Tensor
    method: str = "conditional"
    acceptance: Tensor | None = None
    r_hat: float = math.nan

    @property
    def mean(self) -> Tensor:
        """Mean of each entry, (rows, columns); known ones are as they came."""
        return torch.where(self.missing, self.draws.double().mean(0), self.draws[0].double())

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each entry given the known ones, (rows, columns); 0 for known ones."""
        if len(self.draws) < 2:
            return torch.where(self.missing, math.nan, 0.0).double()
        return torch.where(self.missing, self.draws.double().std(0), 0.0)

    @property
    def error(self) -> Tensor:
        """Monte Carlo standard error of the mean of each entry, (rows, columns)."""
        return self.sd / math.sqrt(len(self.draws))

    def __str__(self) -> str:
        said = f"{int(self.missing.sum())} of {self.missing.numel()} entries, {len(self.draws)} draws ({self.method}"
        if self.acceptance is None:
            return said + ")"
        said += f", R-hat {self.r_hat:.2f}, {float(self.acceptance.mean()):.0%} of proposals accepted)"
        return f"{said}; the chains are too short: raise steps" if self.r_hat >= MIXED else said


@exclusive
def impute(
    result: Result, data: Any, draws: int = 100, *, name: str | None = None, steps: int = 200, seed: int = 0
) -> Imputation:
    """Draw the missing entries of rows given the known entries of the same row and the data of the fit.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Rows in which nan marks what is missing, by name with other data, or alone.
        draws: Number of draws S of each row.
        name: Name of the data with missing entries. Default: the first argument of the model.
        steps: Transitions of each chain, where model and guide alternate: each draw is the end of a chain of its own.
        seed: Seed of all randomness.

    Returns:
        An Imputation with draws, mean and sd.

    Raises:
        ValueError: The pair does not know the conditional distribution, and its model and guide cannot alternate.

    Example:
        >>> import torch
        >>> from inference import fit
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 0.5).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(4 / 9 * x.sum(-1), 1 / 3))
        >>> import pyro, pyro.distributions as dist
        >>> result = fit((model, guide), torch.randn(20, 2), steps=0, progress=False)
        >>> found = impute(result, torch.tensor([[2.0, torch.nan]]), draws=4000)
        >>> print(f"{found.mean[0, 1]:.1f} {found.sd[0, 1]:.1f}")  # 2 / 1.25, and the root of 1.25 - 1 / 1.25
        1.6 0.7
    """
    check_count("draws", draws)
    check_count("steps", steps, 2)
    if not result.bound.observes:
        raise ValueError(f"result: expected a model with a likelihood, got {result.bound.name}, which observes nothing")
    bound, x, name = _bind(result.bound, data, name)
    with isolated(seed), result.state():
        own = bound.asked.impute
        if own is not None:
            latents = {n: v.to(bound.device) for n, v in result.draws.items()}
            rows = own(**{**bound.data, name: x}, draws=draws, latents=latents)
            return Imputation(rows.cpu(), x.isnan().cpu())
        return _alternate(bound, x, name, draws, steps)


def _bind(fitted: BoundPair, data: Any, name: str | None) -> tuple[BoundPair, Tensor, str]:
    """The pair bound to the rows with zeros for what is missing, the rows with nan, and their name."""
    accepted, _ = accepted_by(halves_of(fitted.pair)[0])
    first = next(iter(accepted), "x")
    given = by_name(data, accepted)
    names_in(given).check(fitted.names)
    named = {n: to_tensor(v, n) for n, v in given.items()}
    x, got = named.get(first if name is None else name), ", ".join(named) or "none"
    if not isinstance(x, Tensor):
        if name is None:
            raise ValueError(f"data: expected {first}, in which nan marks what is missing, got {got}")
        raise ValueError(f"name: expected the data in which nan marks what is missing ({got}), got {name!r}")
    name = first if name is None else name
    missing = x.isnan()
    bound = fitted.rebound({**named, name: x.masked_fill(missing, 0)})
    filled = bound.data[name]
    return bound, filled.masked_fill(missing.to(filled.device), math.nan) if missing.any() else filled, name


def _alternate(bound: BoundPair, x: Tensor, name: str, draws: int, steps: int) -> Imputation:
    """Chains of Metropolis within Gibbs, as many at once as fit into memory."""
    together = max(1, CHAIN_NUMBERS // max(x.numel(), 1))
    _check_alternates(bound, x, name)
    sizes = [len(part) for part in torch.arange(draws).tensor_split(math.ceil(draws / together))]
    parts = [_chains(bound, x, name, size, steps) for size in sizes]
    rows = torch.cat([p.draws for p in parts])
    accepted = [size * p.acceptance for size, p in zip(sizes, parts, strict=True) if p.acceptance is not None]
    r_hat = max((p.r_hat for p in parts if not math.isnan(p.r_hat)), default=math.nan)
    return replace(parts[0], draws=rows, acceptance=torch.stack(accepted).sum(0) / draws, r_hat=r_hat)


def _check_alternates(bound: BoundPair, x: Tensor, name: str) -> None:
    """Raise a ValueError unless the entries can be drawn in turn with latent sites of a guide of any rows."""
    refused = f"result: expected a pair that knows its conditionals, or a guide of new rows, got {bound.name}"
    if bound.guide is None or not bound.select("latent"):
        raise ValueError(f"{refused}, which has neither")
    try:
        rows = probe(bound, True)
        sites = set(guide_sites(rows))
    except REFUSALS as error:
        raise ValueError(f"{refused} ({' '.join(str(error).split())[:160]})") from None
    if sites != set(bound.select("latent")):
        raise ValueError(f"{refused}, whose guide does not draw the latent sites of the model alone")
    node = engine.trace(bound, bound.model, {}).nodes.get(name)
    if node is None or node["type"] != "sample":
        raise ValueError(f"name: expected an observed site of {bound.name}, got {name!r}")
    fn = node["fn"]
    while isinstance(fn, Independent):
        fn = fn.base_dist
    if fn.event_dim or _reads_missing(bound, x, name):
        raise ValueError(f"{refused}, whose entries of {name} depend on one another given the latent sites")


def _reads_missing(bound: BoundPair, x: Tensor, name: str) -> bool:
    """Whether the density of what is known, or of another site, depends on the missing entries given the latents."""
    first = engine.trace(bound, bound.model, {})
    latents = {n: first.nodes[n]["value"] for n in bound.select("latent")}
    drawn = first.nodes[name]["fn"].sample().to(x)
    other = replace(bound, data={**bound.data, name: torch.where(x.isnan(), drawn, bound.data[name])}, memo={})
    second = engine.trace(other, other.model, latents)

    def differs(site: str) -> bool:
        one, two = (t.nodes[site] for t in (first, second))
        given = one["value"]
        return not torch.allclose(one["fn"].log_prob(given), two["fn"].log_prob(given), equal_nan=True)

    return any(differs(n) for n in engine.sample_names(first))


def _chains(bound: BoundPair, x: Tensor, name: str, count: int, steps: int) -> Imputation:
    chains = _Chains(bound, x, name, count)
    for step in range(steps):
        if step == steps // 2:
            chains.forget()
        chains.advance()
    rows = chains.x.reshape(count, *x.shape)
    moved = chains.accepted.reshape(count, -1).mean(0) / (steps - steps // 2)
    return Imputation(rows.cpu(), x.isnan().cpu(), "Metropolis within Gibbs", moved.cpu(), chains.r_hat())


class _Chains:
    """A chain for each draw and row, started from the prior; all of them are rows of one data set."""

    def __init__(self, bound: BoundPair, x: Tensor, name: str, count: int) -> None:
        tiled = {n: v.repeat(count, *[1] * (v.dim() - 1)) if n in bound.cut else v for n, v in bound.data.items()}
        whole = bound.rebound(tiled)
        self.x = whole.data[name] = whole.data[name].clone()
        self.shape, self.name = (count, *x.shape), name
        self.missing = x.isnan().repeat(count, *[1] * (x.dim() - 1))
        self.pair: LocalLatents = probe(whole, True)
        self.z: Mapping[str, Tensor] = self.pair.prior(1)
        self.draw()
        self.forget()

    def forget(self) -> None:
        """Start counting anew."""
        self.accepted = torch.zeros(len(self.x), device=self.x.device)
        self.total = torch.zeros(self.shape, dtype=torch.float64, device=self.x.device)
        self.square, self.counted = torch.zeros_like(self.total), 0

    def advance(self) -> None:
        """Propose z from the guide, accept it or not in each row, and draw the missing entries."""
        pair = self.pair
        proposal, forward = pair.guide({}, 1)
        backward = pair.guide(self.z, 1)[1]
        ratio = pair.model(proposal, 1)[0] - pair.model(self.z, 1)[0] + backward - forward
        # A state of density 0, in which the prior may start, is left for any other.
        taken = ratio[0].nan_to_num(nan=-math.inf, posinf=math.inf).exp() > torch.rand_like(ratio[0])
        self.z = {n: torch.where(self._by_row(n, taken), v, self.z[n]) for n, v in proposal.items()}
        self.accepted += taken
        self.draw()
        self.counted += 1
        values = self.x.reshape(self.shape).double()
        self.total += values
        self.square += values**2

    def draw(self) -> None:
        """Draw the missing entries given z, in place."""
        trace = engine.trace(self.pair.bound, self.pair.bound.model, {n: v[0] for n, v in self.z.items()})
        drawn = trace.nodes[self.name]["fn"].sample()
        self.x.copy_(torch.where(self.missing, drawn.to(self.x), self.x))

    def _by_row(self, name: str, taken: Tensor) -> Tensor:
        """A mask of rows in the shape of a site's draws."""
        site = self.pair.bound.sites[name]
        return taken.reshape([-1 if k == self.pair.axis(name) else 1 for k in range(-1, len(site.shape))])

    def r_hat(self) -> float:
        """Largest R-hat of a missing entry since the last time that was forgotten; nan for a single chain."""
        count, missing = self.counted, self.missing[: len(self.missing) // self.shape[0]]
        mean = self.total / count
        within = ((self.square / count - mean**2).clamp_min(0) * count / max(count - 1, 1)).mean(0)[missing]
        between = mean.var(0)[missing] if len(mean) > 1 else torch.full_like(within, math.nan)
        constant = (within <= 0) & (between <= 0)
        ratio = ((count - 1) / count + between / within).sqrt()
        return float(torch.where(constant, 1.0, ratio).max()) if missing.any() else 1.0
