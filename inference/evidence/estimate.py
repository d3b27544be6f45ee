r"""Log evidence of each row of data under a model whose latent sites have a value per row.

.. math:: \log p(x_n) = \log \int p(x_n, z_n) \, dz_n

``exact``: finite sites are summed out, or the pair knows its evidence. ``importance``: with draws of the guide,

.. math:: \log \frac1k \sum_{i=1}^{k} w_{ni}, \qquad
          w_{ni} = \frac{p(x_n, z_{ni})}{q(z_{ni} \mid x_n)}, \qquad z_{ni} \sim q(z \mid x_n)

``annealed``: the same with weights of annealed importance sampling (see :mod:`inference.annealed`). Jensen's
inequality makes both lower bounds in expectation; annealing from exact posterior draws back to the prior gives an upper
one.

References: Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders" (https://arxiv.org/abs/1509.00519);
Wu et al. 2017, "On the Quantitative Analysis of Decoder-Based Generative Models" (https://arxiv.org/abs/1611.04273).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints
from tqdm.auto import tqdm

from inference.compiler import policy
from inference.core.bound import BoundPair, bind
from inference.core.checks import check_count, check_one_of, check_positive
from inference.core.handlers import isolated
from inference.draws import engine
from inference.draws.engine import Draws
from inference.draws.rows import LocalLatents, device_of, guide_sites, probe
from inference.evidence.annealed import anneal, schedule, tune
from inference.result import Result, State

PILOTS = 4
"""Chains that tune the step sizes of annealing."""


SIGNS = {"exact": "=", "lower": ">=", "upper": "<="}


Tick = Callable[[int], object]


Estimate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log evidence of each row, in nats.

    Attributes:
        values: Log evidence (rows,), in double precision.
        errors: Standard error (rows,) of each value, of the particles or chains alone; 0 where exact, nan of one
            particle. It does not cover the gap of a bound.
        kind: ``exact``, or a ``lower`` or ``upper`` bound in expectation.
    """

    values: Tensor
    errors: Tensor
    kind: str

    @property
    def mean(self) -> float:
        """Mean over rows."""
        return float(self.values.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, as an estimate for new rows: the rows' standard deviation over the root of their number.

        The rows' spread has the Monte Carlo error in it.
        """
        return float(self.values.std() / math.sqrt(len(self.values))) if len(self.values) > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Of the mean over these very rows: what another seed would change."""
        return float(self.errors.square().sum().sqrt() / len(self.errors))

    def __str__(self) -> str:
        noise = "" if self.kind == "exact" else f"; Monte Carlo error {self.monte_carlo_error:.2g}"
        return (
            f"log p(x) {SIGNS[self.kind]} {self.mean:.2f} ± {self.standard_error:.2g} nats a row "
            f"({len(self.values)} rows{noise})"
        )


def log_evidence(
    pair: Any,
    data: Any = None,
    estimator: str = "importance",
    *,
    k: int = 1000,
    chains: int = 16,
    temperatures: int = 1000,
    leapfrogs: int = 10,
    step_size: float = 0.1,
    start: str = "prior",
    reverse: bool = False,
    latents: Mapping[str, Tensor] | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    r"""Estimate log p(x) of each row under a model whose latent sites lie in the plate of rows.

    x is all that the model observes in a row. Finite sites that are not drawn are summed out exactly. Masks count;
    scales, that of a minibatch's plate and any other, do not.

    Args:
        pair: A pair, a ``(model, guide)`` tuple, a model (for ``exact`` and ``annealed``), or the Result of a fit,
            whose trained parameters are then used. ``pyro.param`` of another pair begin anew.
        data: A tensor or a mapping of names to tensors; None: the data of the Result.
        estimator: ``exact``: sum out all latent sites, or ask the pair's ``log_evidence(x)`` (in nats a row) where it
            has one. ``importance``: weigh particles of the guide; sites that it leaves out come from the prior.
            ``annealed``: weigh chains of Hamiltonian transitions from the prior to the posterior; unconstrained
            continuous sites only.
        k: Particles a row.
        chains: Annealed chains a row.
        temperatures: Intermediate distributions, on a sigmoidal schedule.
        leapfrogs: Leapfrogs of the transition at each of them.
        step_size: Step size at the first of them; chains of a run before adapt it to each row and temperature.
        start: Where chains begin: ``prior``, or ``guide``.
        reverse: Anneal from the posterior back to the start, for an upper bound. The data must be simulated from the
            model itself, by the ``latents``: these are then exact draws of the posterior. All chains of a row begin at
            its one draw, whose own spread ``errors`` leave out.
        latents: Values by site that the data were simulated from, for ``reverse``.
        batch: Rows a pass. None: as many as the memory allows; all, if the pair does not take ``rows`` and ``size``.
        seed: Seed of all randomness; the global random state is left as it was.
        progress: Show a progress bar (on a terminal).

    Returns:
        An Evidence with values and errors (rows,).

    Raises:
        ValueError: An argument does not fit; a site lies outside of the plate of rows, or the estimator cannot take it.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("rows", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("z", dist.Normal(0.5 * x, 1.0))
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> print(log_evidence((model, guide), x, k=5000, progress=False))
        log p(x) >= -1.68 ± 0.3 nats a row (3 rows; Monte Carlo error 0.0032)
        >>> print(f"{dist.Normal(0.0, 2.0**0.5).log_prob(x).mean():.2f}")  # the exact one
        -1.68
    """
    bound = _bind(pair, data)
    _check(bound, estimator, start, reverse, latents, step_size)
    counts = {
        "k": k,
        "chains": chains,
        "temperatures": temperatures,
        "leapfrogs": leapfrogs,
        "batch": 1 if batch is None else batch,
    }
    for name, value in counts.items():
        check_count(name, value)
    with isolated(seed), _state(pair, bound)():
        if estimator == "exact" and bound.asked.log_evidence is not None:
            values = bound.asked.log_evidence(**bound.data).double()
            return Evidence(values, torch.zeros_like(values), "exact")
        if estimator == "importance":
            together = min(k, policy.PARTICLES_FIRST)
            return _over(probe(bound, True), partial(_importance, k=k), "lower", together, k, batch, progress)
        rows = probe(bound, estimator == "annealed" and start == "guide")
        if estimator == "exact":
            _check_finite(rows)
            return _over(rows, _exact, "exact", 1, 1, batch, progress)
        own = _check_annealed(rows, start, latents)
        run = partial(_annealed, chains=chains, betas=schedule(temperatures), leapfrogs=leapfrogs, step=step_size)
        run = partial(run, start=start, latents=own)
        kind = "upper" if reverse else "lower"
        return _over(rows, run, kind, max(chains, PILOTS), 2 * temperatures, batch, progress)


def _over(
    whole: LocalLatents, run: Estimate, kind: str, together: int, rounds: int, batch: int | None, progress: bool
) -> Evidence:
    """Run an estimator over minibatches of rows, small enough to hold so many draws of each."""
    count, name = whole.bound.rows, whole.bound.name
    if batch is not None and batch < count and not whole.splits:
        raise ValueError("batch: expected a model and a guide that take size and rows (their plate's), got one without")
    fitting = policy.latents_per_pass(whole.width * together) if whole.splits else count
    found = []
    with tqdm(total=count * rounds, desc=f"log p(x) of {name}", disable=None if progress else True, leave=False) as bar:
        for rows in torch.arange(count, device=device_of(whole.bound)).split(batch or fitting):
            part = whole.take(rows)
            # One validated draw finds what is wrong with these rows; the passes check nothing.
            part.model(part.prior(1), 1)
            with pyro.validation_enabled(False):
                found.append(run(part, rows, bar.update))
    values, errors = (torch.cat(v) for v in zip(*found, strict=True))
    return Evidence(values, errors, kind)


def _exact(part: LocalLatents, rows: Tensor, tick: Tick) -> tuple[Tensor, Tensor]:
    values = part.model({}, 1)[0][0].double()
    tick(len(rows))
    return values, torch.zeros_like(values)


def _importance(part: LocalLatents, rows: Tensor, tick: Tick, *, k: int) -> tuple[Tensor, Tensor]:
    step = policy.latents_per_pass(part.width * len(rows))
    total = square = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=rows.device)
    for done in range(0, k, step):
        count = min(step, k - done)
        draws, density = part.guide({}, count)
        weights = part.model(draws, count)[0].double() - density
        total = torch.logaddexp(total, weights.logsumexp(0))
        square = torch.logaddexp(square, (2 * weights).logsumexp(0))
        tick(count * len(rows))
    return _mean(total, square, k)


def _annealed(
    part: LocalLatents,
    rows: Tensor,
    tick: Tick,
    *,
    chains: int,
    betas: Tensor,
    leapfrogs: int,
    step: float,
    start: str,
    latents: Draws | None,
) -> tuple[Tensor, Tensor]:
    def begin(count: int) -> Tensor:
        return _pack(part, part.guide({}, count)[0] if start == "guide" else part.prior(count))

    def densities(positions: Tensor) -> tuple[Tensor, Tensor]:
        draws = _unpack(part, positions)
        joint, prior = part.model(draws, len(positions))
        return part.guide(draws, len(positions))[1] if start == "guide" else prior, joint

    def done() -> None:
        tick(len(rows))

    steps = tune(densities, begin(PILOTS), betas, leapfrogs, step, done)
    if latents is None:
        weights = anneal(densities, begin(chains), betas, leapfrogs, steps, done)
    else:
        own = {n: v.index_select(part.axis(n), rows)[None] for n, v in latents.items()}
        posterior = _pack(part, own).expand(chains, -1, -1)
        weights = anneal(densities, posterior, betas.flip(0), leapfrogs, steps.flip(0), done)
    values, errors = _mean(weights.logsumexp(0), (2 * weights).logsumexp(0), chains)
    return values if latents is None else -values, errors


def _mean(total: Tensor, square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logarithm of the mean weight and its standard error, from log sums of weights and of their squares.

    The error of a logarithm is the relative error of what it is taken of (the delta method).
    """
    spread = ((square - 2 * total).exp() - 1 / count).clamp(min=0)
    errors = (spread * count / (count - 1)).sqrt() if count > 1 else torch.full_like(total, torch.nan)
    return total - math.log(count), errors


def _pack(part: LocalLatents, draws: Draws) -> Tensor:
    """Values by site as positions (count, rows, D)."""
    moved = [draws[n].movedim(1 + part.axis(n), 1) for n in part.drawn]
    return torch.cat([v.reshape(*v.shape[:2], -1) for v in moved], -1)


def _unpack(part: LocalLatents, positions: Tensor) -> dict[str, Tensor]:
    r"""Positions (count, rows, D) as values by site, (count, \*shape)."""
    shapes = {n: list(part.bound.sites[n].shape) for n in part.drawn}
    for name, shape in shapes.items():
        del shape[part.axis(name)]
    parts = positions.split([math.prod(shape) for shape in shapes.values()], -1)
    named = zip(shapes.items(), parts, strict=True)
    return {n: v.reshape(*v.shape[:2], *shape).movedim(1, 1 + part.axis(n)) for (n, shape), v in named}


def _bind(pair: Any, data: Any) -> BoundPair:
    if not isinstance(pair, Result):
        return bind(pair, data)
    return pair.bound if data is None else bind(pair.bound.pair, data)


def _state(pair: Any, bound: BoundPair) -> State:
    """What the pair's parameters are: those of a fit, or as they stand, with modules in evaluation mode."""
    return pair.state if isinstance(pair, Result) else State(bound.modules)


def _check(
    bound: BoundPair, estimator: str, start: str, reverse: bool, latents: Draws | None, step_size: float
) -> None:
    check_one_of("estimator", estimator, ("exact", "importance", "annealed"))
    check_one_of("start", start, ("prior", "guide"))
    if not bound.rows:
        raise ValueError("data: expected at least one row, got none")
    if bound.guide is None and (estimator == "importance" or (estimator, start) == ("annealed", "guide")):
        raise ValueError(f"pair: expected a guide to draw from for {estimator}, got a model alone")
    if reverse != (latents is not None) or (reverse and estimator != "annealed"):
        got = f"reverse={reverse}, {'no latents' if latents is None else 'latents'} and {estimator}"
        raise ValueError(f"reverse: expected annealed with the latents that the data were simulated from, got {got}")
    check_positive("step_size", step_size)


def _check_finite(rows: LocalLatents) -> None:
    for name in rows.drawn:
        raise ValueError(
            f"{name}: expected a finite site, or a pair with log_evidence, got one that cannot be summed out"
        )


def _check_annealed(rows: LocalLatents, start: str, latents: Draws | None) -> dict[str, Tensor] | None:
    """The latents as tensors; raises unless chains can move in all drawn sites and begin where they are asked to."""
    if not rows.drawn:
        raise ValueError(
            "model: expected a continuous latent site to anneal, got none; estimator exact sums finite ones"
        )
    trace = engine.trace(rows.bound, rows.bound.model, {}, None)
    for name in rows.drawn:
        support = trace.nodes[name]["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support is not constraints.real:
            raise ValueError(f"{name}: expected an unconstrained continuous site to anneal, got one on {support}")
    guided = guide_sites(rows) if start == "guide" else rows.drawn
    if set(guided) != set(rows.drawn):
        raise ValueError(f"start: expected a guide of {', '.join(rows.drawn)}, got {', '.join(guided) or 'nothing'}")
    return None if latents is None else {n: _latent(rows, latents, n) for n in rows.drawn}


def _latent(rows: LocalLatents, latents: Draws, name: str) -> Tensor:
    shape = rows.bound.sites[name].shape
    given = torch.as_tensor(latents[name]) if name in latents else None
    if given is None or tuple(given.shape) != shape:
        got = ", ".join(latents) or "none" if given is None else tuple(given.shape)
        raise ValueError(f"latents: expected {name} of shape {shape}, got {got}")
    return given
