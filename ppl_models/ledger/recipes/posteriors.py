r"""The recipe whose figure is how many of nine posteriors of posteriordb a method gets right.

The models are those of the database (Magnusson et al. 2024) as plain Pyro programs, written for one draw. An improper
flat prior is a proper one whose density is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median
from torch import Tensor

from inference import Result, isolated, sample
from ppl_models import data
from ppl_models.ledger.recipes.trained import Judged, fitted, placed, show_judged

ODE_STEPS = 10
"""Steps per year of the ODE solver: its error is far below the noise of the data."""

WORST_Z, SPREAD, R_HAT = 4.0, 0.1, 1.01
"""What a posterior that is right has at most: the largest difference of a mean from that of the reference draws in its
standard errors, the largest relative difference of a standard deviation, and the largest R-hat."""


Columns = Mapping[str, np.ndarray]


Worst = tuple[float, float, float]


@dataclass(frozen=True)
class Posterior:
    """A posterior of the database.

    Attributes:
        model: Its model.
        data: Arguments of the model from the data of the database.
        columns: From draws by site (chain, draw, ...) to the parameters of the reference draws, by their names.
    """

    model: Callable[..., Any]
    data: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    columns: Callable[[Columns], dict[str, np.ndarray]]


def posteriors(quick: bool, seed: int, *, kernel: Any = None) -> dict[str, float]:
    """Number of posteriors that chains of the default size get right, and the worst figures of each."""
    size: dict[str, Any] = {"draws": 8, "warmup": 8, "chains": 8} if quick else {}
    found: dict[str, float] = {"figure": 0}
    for name, model, rows, judge in _cases(quick):
        z, spread, r_hat = judge(sample(model, rows, kernel, seed=seed, **size))
        found["figure"] += z < WORST_Z and spread < SPREAD and r_hat < R_HAT
        found |= {f"{name}: worst z": z, f"{name}: sd off by": spread, f"{name}: R-hat": r_hat}
    show_judged(by_measure(found))
    return found


def guided(quick: bool, seed: int) -> dict[str, float]:
    """Number of posteriors that a normal guide of full rank gets right, and the worst figures of each."""
    found: dict[str, float] = {"figure": 0}
    for name, model, rows, judge in _cases(quick):
        guide = AutoMultivariateNormal(model, init_loc_fn=init_to_median)
        with isolated(seed):
            guide(**rows)
        z, spread, _ = judge(fitted((model, guide), rows, steps=20 if quick else 30_000, draws=10_000, seed=seed))
        found["figure"] += z < WORST_Z and spread < SPREAD
        found |= {f"{name}: worst z": z, f"{name}: sd off by": spread}
    show_judged(by_measure(found))
    return found


def by_measure(found: Mapping[str, float]) -> Judged:
    """The worst figures of each posterior beside their limits."""
    limits = {"worst z": WORST_Z, "sd off by": SPREAD, "R-hat": R_HAT}
    figures = {
        measure: {n.removesuffix(f": {measure}"): v for n, v in found.items() if n.endswith(f": {measure}")}
        for measure in limits
    }
    measured = {measure: cases for measure, cases in figures.items() if cases}
    return Judged(measured, {measure: limits[measure] for measure in measured})


def _cases(quick: bool) -> Iterator[tuple[str, Callable[..., Any], dict[str, Tensor], Callable[[Result], Worst]]]:
    """Name, model and data of each posterior, the first one for tests, and what judges a Result of it."""
    for name, entry in list(POSTERIORS.items())[: 1 if quick else None]:
        stored = data.load(f"posteriordb/{name}", dtype=torch.float64)

        def judge(
            result: Result, entry: Posterior = entry, reference: Mapping[str, Tensor] = stored.reference
        ) -> Worst:
            return judged(entry.columns(by_chain(result)), reference)

        yield name, entry.model, {n: placed(v) for n, v in entry.data(stored.train).items()}, judge


def by_chain(result: Result) -> dict[str, np.ndarray]:
    """Draws (chain, draw, ...) of chains."""
    chains = result.groups["posterior"].sizes["chain"]
    return {n: v.reshape(chains, -1, *v.shape[1:]).numpy() for n, v in result.draws.items()}


def judged(draws: Columns, reference: Mapping[str, Tensor]) -> Worst:
    """Worst z of a mean, worst relative difference of an sd, and worst R-hat; infinite if a draw is not finite."""
    worst = np.zeros(3)
    for name, ours in draws.items():
        theirs = reference[name].double().numpy()
        if not np.isfinite(ours).all():
            return math.inf, math.inf, math.inf
        error = np.hypot(azs.mcse(ours, method="mean"), azs.mcse(theirs, method="mean"))
        z = abs(ours.mean() - theirs.mean()) / error
        # One chain has no R-hat. What is not a number is not right.
        r_hat = azs.rhat(ours) if len(ours) > 1 else 0.0
        worst = np.maximum(worst, [z, abs(ours.std() / theirs.std() - 1), r_hat])
    return float(worst[0]), float(worst[1]), float(worst[2])


def _flat(name: str, like: Tensor, size: int | None = None) -> Any:
    """Numbers without a prior."""
    normal = dist.Normal(like.new_zeros(() if size is None else (size,)), 1.0)
    return pyro.sample(name, (normal if size is None else normal.to_event(1)).mask(False))


def _positive(name: str, like: Tensor) -> Any:
    """A positive number without a prior."""
    return pyro.sample(name, dist.HalfNormal(like.new_tensor(1.0)).mask(False))


def regression(x: Tensor, y: Tensor) -> None:
    """y by the columns of x, all priors flat."""
    beta, sigma = _flat("beta", y, x.shape[1]), _positive("sigma", y)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def scores(x: Tensor, y: Tensor) -> None:
    """y by the columns of x with flat weights and a half Cauchy prior of the noise."""
    beta = _flat("beta", y, x.shape[1])
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def shrunk(x: Tensor, y: Tensor) -> None:
    """y by the columns of x with normal priors of the weights."""
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(10.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def arma(y: Tensor) -> None:
    """ARMA(1, 1), in a loop over time."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 10.0))
    phi = pyro.sample("phi", dist.Normal(y.new_tensor(0.0), 2.0))
    theta = pyro.sample("theta", dist.Normal(y.new_tensor(0.0), 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    error = y[0] - (mu + phi * mu)
    pyro.sample("y_0", dist.Normal(mu + phi * mu, sigma), obs=y[0])
    for t in range(1, len(y)):
        mean = mu + phi * y[t - 1] + theta * error
        error = y[t] - mean
        pyro.sample(f"y_{t}", dist.Normal(mean, sigma), obs=y[t])


def forward(rows: Tensor, scores: Tensor) -> None:
    """The forward algorithm in a loop over time: scores (T, 2) of both states, which weigh 1 at the start."""
    alpha = scores[0]
    for t in range(1, len(scores)):
        alpha = (alpha[..., None] + rows.log()).logsumexp(-2) + scores[t]
    pyro.factor("y", alpha.logsumexp(-1))


def _positive_ordered(name: str, first: Any, second: Any) -> Tensor:
    """Two ordered positive numbers with a normal density on each, as Stan's ``positive_ordered`` has it."""
    low = pyro.sample(f"{name}1", dist.HalfNormal(first[1]).mask(False))
    # The second by its distance from the first: the support of a site is fixed.
    high = low + pyro.sample(f"{name}_gap", dist.HalfNormal(second[1]).mask(False))
    for value, (mean, sd) in ((low, first), (high, second)):
        pyro.factor(f"{name}_{mean}", dist.Normal(mean, sd).log_prob(value))
    return torch.stack([low, high], -1)


def hmm_example(y: Tensor) -> None:
    """A hidden Markov chain of two states with normal observations."""
    rows = pyro.sample("rows", dist.Dirichlet(y.new_ones(2, 2)).to_event(1))
    one = y.new_tensor(1.0)
    means = _positive_ordered("mu", (3 * one, one), (10 * one, one))
    forward(rows, dist.Normal(means, 1.0).log_prob(y[:, None]))


def hmm_drive(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """A hidden Markov chain of two states with two exponential observations."""
    rows = pyro.sample("rows", dist.Dirichlet(alpha).to_event(1))
    one = u.new_tensor(1.0)
    phi = _positive_ordered("phi", (0 * one, one), (3 * one, one))
    rate = _positive_ordered("lambda", (0 * one, one), (3 * one, one))
    scores = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(rate).log_prob(v[:, None])
    forward(rows, scores)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """A Gaussian process with latent hyperparameters; sigma is added as a variance."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(1.0)))
    square = (x[:, None] - x) ** 2
    covariance = alpha**2 * torch.exp(-square / (2 * rho**2)) + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


def _rates(state: Any, theta: Any) -> tuple[Any, Any]:
    (u, v), (a, b, c, d) = state, theta
    return (a - b * v) * u, (-c + d * u) * v


def runge_kutta(state: Any, theta: Any, step: float) -> tuple[Any, Any]:
    """A step of the predators and their prey."""

    def moved(by: Any, size: float) -> tuple[Any, Any]:
        return state[0] + size * by[0], state[1] + size * by[1]

    one = _rates(state, theta)
    two = _rates(moved(one, step / 2), theta)
    three = _rates(moved(two, step / 2), theta)
    four = _rates(moved(three, step), theta)
    total = (one[k] + 2 * two[k] + 2 * three[k] + four[k] for k in (0, 1))
    return tuple(s + step / 6 * t for s, t in zip(state, total, strict=True))  # type: ignore[return-value]


def lotka_volterra(y: Tensor, y_init: Tensor) -> None:
    """Predators and prey; the truncated normal priors of the rates are normal by a factor: constants do not matter."""
    like = y.new_tensor
    theta = pyro.sample("theta", dist.LogNormal(like([0.0, -3.0, 0.0, -3.0]), 1.0).to_event(1))
    prior = dist.Normal(like([1.0, 0.05, 1.0, 0.05]), like([0.5, 0.05, 0.5, 0.05])).log_prob(theta)
    pyro.factor("theta_prior", (prior - dist.LogNormal(like([0.0, -3.0, 0.0, -3.0]), 1.0).log_prob(theta)).sum(-1))
    start = pyro.sample("z_init", dist.LogNormal(like([10.0, 10.0]).log(), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(like([-1.0, -1.0]), 1.0).to_event(1))
    state, path = start.unbind(-1), []
    for _ in range(len(y)):
        for _ in range(ODE_STEPS):
            state = runge_kutta(state, theta.unbind(-1), 1.0 / ODE_STEPS)
        path.append(torch.stack(state, -1))
    pyro.sample("y_init", dist.LogNormal(start.log(), sigma).to_event(1), obs=y_init)
    pyro.sample("y", dist.LogNormal(torch.stack(path, -2).log(), sigma).to_event(2), obs=y)


def _named(*names: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {n: stored[n] for n in names}


def _columns(target: str, *features: str, log: bool = False) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A column of ones and the features as x, all but ``group`` by their logarithms where that is asked for."""

    def arguments(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taken = {n: stored[n].log() if log and n != "group" else stored[n] for n in (*features, target)}
        return {
            "x": torch.stack([torch.ones_like(taken[target]), *(taken[n] for n in features)], 1),
            "y": taken[target],
        }

    return arguments


def _parameters(**elements: str) -> Callable[[Columns], dict[str, np.ndarray]]:
    """Parameters by name: sites as they are, or with their elements where ``site="name{}"`` names them from 1."""

    def columns(draws: Columns) -> dict[str, np.ndarray]:
        found = {}
        for site, name in elements.items():
            if "{}" not in name:
                found[name] = draws[site]
            else:
                found |= {name.format(k + 1): draws[site][..., k] for k in range(draws[site].shape[-1])}
        return found

    return columns


def _transitions(*sites: str) -> Callable[[Columns], dict[str, np.ndarray]]:
    """Parameters of a hidden Markov chain: the probabilities of staying, and pairs of ordered numbers."""

    def columns(draws: Columns) -> dict[str, np.ndarray]:
        stays = {f"theta{k + 1}[{k + 1}]": draws["rows"][..., k, k] for k in (0, 1)}
        low = {f"{n}[1]": draws[f"{n}1"] for n in sites}
        return stays | low | {f"{n}[2]": draws[f"{n}1"] + draws[f"{n}_gap"] for n in sites}

    return columns


_BETA = _parameters(beta="beta[{}]", sigma="sigma")
_MESQUITE = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
POSTERIORS: dict[str, Posterior] = {
    "kidiq-kidscore_momhsiq": Posterior(scores, _columns("kid_score", "mom_hs", "mom_iq"), _BETA),
    "sblri-blr": Posterior(shrunk, lambda stored: {"x": stored["X"], "y": stored["y"]}, _BETA),
    "mesquite-logmesquite": Posterior(regression, _columns("weight", *_MESQUITE, log=True), _BETA),
    "earnings-earn_height": Posterior(regression, _columns("earn", "height"), _BETA),
    "arma-arma11": Posterior(arma, _named("y"), _parameters(mu="mu", phi="phi", theta="theta", sigma="sigma")),
    "gp_pois_regr-gp_regr": Posterior(
        gaussian_process, _named("x", "y"), _parameters(rho="rho", alpha="alpha", sigma="sigma")
    ),
    "hmm_example-hmm_example": Posterior(hmm_example, _named("y"), _transitions("mu")),
    "bball_drive_event_0-hmm_drive_0": Posterior(hmm_drive, _named("u", "v", "alpha"), _transitions("phi", "lambda")),
    "hudson_lynx_hare-lotka_volterra": Posterior(
        lotka_volterra, _named("y", "y_init"), _parameters(theta="theta[{}]", z_init="z_init[{}]", sigma="sigma[{}]")
    ),
}
