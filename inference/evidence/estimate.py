r"""Log evidence of each row of data under a model whose latent sites have a value per row.

.. math:: \log p(x_n) = \log \int p(x_n, z_n) \, dz_n

``exact`` sums finite sites out, or calls the pair's own ``log_evidence``. ``importance`` weights draws of the guide,

.. math:: \log \frac1k \sum_{i=1}^{k} w_{ni}, \qquad
          w_{ni} = \frac{p(x_n, z_{ni})}{q(z_{ni} \mid x_n)}, \qquad z_{ni} \sim q(z \mid x_n)

``annealed`` uses the weights of annealed importance sampling instead (:mod:`inference.evidence.annealed`). By Jensen's
inequality both are lower bounds in expectation; annealing from exact posterior draws back to the prior gives an upper
bound.

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

from inference.compiler import policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.supports import support_of
from inference.core.bound import BoundPair, bind
from inference.core.checks import check_count, check_one_of, check_positive
from inference.core.handlers import exclusive, isolated
from inference.core.progress import bar
from inference.draws import engine
from inference.draws.engine import Draws, threads_by_size
from inference.draws.rows import LocalLatents, guide_sites, probe
from inference.evidence.annealed import Densities, anneal, schedule, tune
from inference.result import Result, State

TUNING_CHAINS = 4
"""Chains that tune the step sizes of annealing."""


SIGNS = {"exact": "=", "lower": ">=", "upper": "<="}


Tick = Callable[[int], object]


Estimate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Log evidence of each row, in nats.

    Attributes:
        values: Log evidence (rows,), in double precision.
        errors: Monte Carlo standard error of each value, (rows,); 0 if exact, nan for a single particle. It does not
            include the gap of a bound.
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
        """Standard error of the mean as an estimate for new rows: standard deviation over rows / sqrt(rows).

        It includes the Monte Carlo error.
        """
        return float(self.values.std() / math.sqrt(len(self.values))) if len(self.values) > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Monte Carlo standard error of the mean over these rows, due to the seed."""
        return float(self.errors.square().sum().sqrt() / len(self.errors))

    def __str__(self) -> str:
        noise = "" if self.kind == "exact" else f"; Monte Carlo error {self.monte_carlo_error:.2g}"
        return (
            f"log p(x) {SIGNS[self.kind]} {self.mean:.2f} ± {self.standard_error:.2g} nats per row "
            f"({len(self.values)} rows{noise})"
        )


@exclusive
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
    r"""Estimate log p(x) of each row under a model whose latent sites are in the plate of rows.

    x stands for all observed sites of a row. Finite sites that are not drawn are summed out exactly. Masks apply;
    scales, such as that of a minibatch's plate, are ignored.

    Args:
        pair: A pair, a ``(model, guide)`` tuple, a model (for ``exact`` and ``annealed``), or the Result of a fit,
            whose trained parameters are used. Otherwise ``pyro.param`` statements start from their initial values.
        data: A tensor or a mapping of names to tensors. Default: the data of the Result.
        estimator: ``exact``: sum out all latent sites, or call the pair's ``log_evidence(x)`` (nats per row) if it has
            one. ``importance``: weight particles of the guide; sites that the guide leaves out are drawn from the
            prior. ``annealed``: weight chains of Hamiltonian transitions from the prior to the posterior, for
            unconstrained continuous sites only.
        k: Particles per row.
        chains: Annealed chains per row.
        temperatures: Number of intermediate distributions, on a sigmoid schedule.
        leapfrogs: Leapfrog steps per transition; there is one transition per intermediate distribution.
        step_size: Initial step size; separate chains adapt it to each row and temperature beforehand.
        start: Distribution that chains start from: ``prior`` or ``guide``.
        reverse: Whether to anneal from the posterior back to the start, for an upper bound. The data must be simulated
            from the model with the given ``latents``, which are then exact draws of the posterior. All chains of a row
            start at this one draw, whose sampling error ``errors`` does not include.
        latents: Values by site that the data were simulated from, for ``reverse``.
        batch: Rows per pass. Default: as many as fit into memory, or all if the pair does not take ``rows`` and
            ``size``.
        seed: Seed of all randomness; the global random state is restored.
        progress: Whether to show a progress bar (on a terminal).

    Returns:
        An Evidence with values and errors (rows,).

    Raises:
        ValueError: An argument is out of range, a site is outside the plate of rows, or the estimator does not support
            a site.

    References: Burda, Grosse and Salakhutdinov 2016 (https://arxiv.org/abs/1509.00519); Wu et al. 2017
    (https://arxiv.org/abs/1611.04273).

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
        log p(x) >= -1.69 ± 0.3 nats per row (3 rows; Monte Carlo error 0.0032)
        >>> print(f"{dist.Normal(0.0, 2.0**0.5).log_prob(x).mean():.2f}")  # exact
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
            values = bound.asked.log_evidence(**bound.data).double().cpu()
            return Evidence(values, torch.zeros_like(values), "exact")
        if estimator == "importance":
            together = min(k, policy.PARTICLES_FIRST)
            return _over(probe(bound, True), partial(_importance, k=k), "lower", together, k, batch, progress)
        rows = probe(bound, estimator == "annealed" and start == "guide")
        if estimator == "exact":
            _check_finite(rows)
            return _over(rows, _exact, "exact", 1, 1, batch, progress)
        tensors = _check_annealed(rows, start, latents)
        run = partial(_annealed, chains=chains, betas=schedule(temperatures), leapfrogs=leapfrogs, step=step_size)
        run = partial(run, start=start, latents=tensors)
        kind = "upper" if reverse else "lower"
        return _over(rows, run, kind, max(chains, TUNING_CHAINS), 2 * temperatures, batch, progress)


def _over(
    whole: LocalLatents, run: Estimate, kind: str, together: int, rounds: int, batch: int | None, progress: bool
) -> Evidence:
    """Run an estimator over minibatches of rows, each small enough to hold ``together`` draws per row."""
    count, name = whole.bound.rows, whole.bound.name
    if batch is not None and batch < count and not whole.splits:
        raise ValueError("batch: expected a model and a guide that take size and rows (their plate's), got one without")
    default = policy.latents_per_pass(whole.width * together) if whole.splits else count
    estimates = []
    with bar(count * rounds, f"log p(x) of {name}", shown=progress) as shown:
        for rows in torch.arange(count, device=whole.bound.device).split(batch or default):
            part = whole.take(rows)
            # One draw with validation checks these rows; the passes run without it.
            part.model(part.prior(1), 1)
            with pyro.validation_enabled(False), threads_by_size(part.bound, together):
                estimates.append(run(part, rows, shown.update))
    values, errors = (torch.cat(v).cpu() for v in zip(*estimates, strict=True))
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

    first = begin(TUNING_CHAINS)
    steps = tune(_traced(densities, first), first, betas, leapfrogs, step, done)
    if latents is None:
        positions = begin(chains)
    else:
        draws = {n: v.index_select(part.axis(n), rows)[None] for n, v in latents.items()}
        positions = _pack(part, draws).expand(chains, -1, -1)
        betas, steps = betas.flip(0), steps.flip(0)
    weights = anneal(_traced(densities, positions), positions, betas, leapfrogs, steps, done)
    values, errors = _mean(weights.logsumexp(0), (2 * weights).logsumexp(0), chains)
    return values if latents is None else -values, errors


def _traced(densities: Densities, like: Tensor) -> Densities:
    """The densities of positions like these as a graph of tensor operations, where they have one."""
    try:
        return traced(densities, like.detach().requires_grad_())
    except Untraceable:
        return densities


def _mean(total: Tensor, square: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logarithm of the mean weight and its standard error, from log sums of weights and of their squares.

    By the delta method the error of the logarithm is the relative error of the mean weight.
    """
    variance = ((square - 2 * total).exp() - 1 / count).clamp(min=0)
    errors = (variance * count / (count - 1)).sqrt() if count > 1 else torch.full_like(total, torch.nan)
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
    if data is None and pair.bound.source is not None:
        raise ValueError("data: expected the rows to score, got none, and those of the fit are read by minibatches")
    return pair.bound if data is None else pair.bound.rebound(data)


def _state(pair: Any, bound: BoundPair) -> State:
    """The pair's parameters: of the Result, or the current ones with modules in evaluation mode."""
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
    if not (latents is None or isinstance(latents, Mapping)):
        raise TypeError(f"latents: expected a mapping of sites to tensors, got {latents!r}")
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
    """The latents as tensors; raises unless all drawn sites can be annealed from ``start``."""
    if not rows.drawn:
        raise ValueError(
            "model: expected a continuous latent site to anneal, got none; estimator exact sums finite ones"
        )
    trace = engine.trace(rows.bound, rows.bound.model, {})
    for name in rows.drawn:
        support = support_of(trace.nodes[name]["fn"])
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
    value = torch.as_tensor(latents[name]).to(rows.bound.device) if name in latents else None
    if value is None or tuple(value.shape) != shape:
        got = ", ".join(latents) or "none" if value is None else tuple(value.shape)
        raise ValueError(f"latents: expected {name} of shape {shape}, got {got}")
    return value
