r"""Time series and Gaussian processes as their users write them: loops over time, summed-out states, an ODE solver.

- ``garch``: GARCH(1,1) of 200 simulated returns, a loop over time.
- ``arma``: ARMA(1,1), 200 observations (posteriordb, arma-arma11), a loop over time.
- ``hmm_loop``, ``hmm_markov``: a hidden Markov chain of two states, 200 simulated observations, by the forward
  algorithm in a loop, and by ``pyro.markov`` with enumeration.
- ``hmm_example``, ``hmm_drive_0``: two hidden Markov chains of posteriordb (100 and 416 observations), in a loop.
- ``gp_regr``: a Gaussian process with latent hyperparameters (posteriordb, gp_pois_regr-gp_regr).
- ``lotka_volterra``: an ODE by fixed steps of Runge and Kutta (posteriordb, hudson_lynx_hare-lotka_volterra).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Series:
    """A posterior, its models and its reference.

    Attributes:
        data: Makes the data by name, float64.
        pyro: Makes the Pyro model of these data.
        numpyro: Makes the NumPyro model; None: not written.
        columns: From draws by site (chain, draw, ...) to the quantities that are judged, (chain, draw).
        reference: Makes reference draws of the quantities: (chain, draw) each.
    """

    data: Callable[[], Arrays]
    pyro: Callable[[], Callable[..., Any]]
    numpyro: Callable[[], Callable[..., Any]] | None
    columns: Callable[[Arrays], Arrays]
    reference: Callable[[], Arrays]


def folder() -> Path:
    """Folder of the reference draws: ``PPL_MODELS_DATA/posteriordb``."""
    return Path(os.environ.get("PPL_MODELS_DATA", "shared/data")) / "posteriordb"


def _read(name: str) -> Any:
    with zipfile.ZipFile(folder() / f"{name}.json.zip") as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def _stored(name: str, *keys: str) -> Arrays:
    data = _read(f"{name}.data")
    return {k: np.asarray(data[k], dtype=np.float64) for k in keys}


def _stored_draws(name: str, names: dict[str, str]) -> Arrays:
    chains = _read(f"{name}.draws")
    return {ours: np.array([c[theirs] for c in chains]) for ours, theirs in names.items()}


def _of_the_ledger(name: str) -> Callable[[], Callable[..., Any]]:
    """A model that the ledger has too, imported where it is run: the peers go without torch."""

    def make() -> Callable[..., Any]:
        from ppl_models.ledger.recipes import posteriors

        return getattr(posteriors, name)

    return make


def _plain(*names: str) -> Callable[[Arrays], Arrays]:
    return lambda draws: {n: draws[n] for n in names}


def ensemble(density: Callable[[np.ndarray], np.ndarray], start: np.ndarray, rounds: int, keep: int) -> np.ndarray:
    """Draws (walkers, keep, D) by the affine-invariant ensemble sampler of Goodman and Weare 2010.

    It shares nothing with the samplers under test, and needs no gradient.

    Args:
        density: From points (walkers, D) to log densities (walkers,); -inf outside of the support.
        start: Walkers (walkers, D).
        rounds: Rounds, of which the first half is dropped.
        keep: Rounds to keep, equally spaced.
    """
    rng = np.random.default_rng(0)
    walkers, logs = start.copy(), density(start)
    half, kept = len(start) // 2, []
    for turn in range(rounds):
        for mine, others in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
            stretch = (rng.random(half) + 1) ** 2 / 2
            partners = walkers[others][rng.integers(half, size=half)]
            proposals = partners + stretch[:, None] * (walkers[mine] - partners)
            proposed = density(proposals)
            gain = (start.shape[1] - 1) * np.log(stretch) + proposed - logs[mine]
            accept = np.log(rng.random(half)) < gain
            walkers[mine] = np.where(accept[:, None], proposals, walkers[mine])
            logs[mine] = np.where(accept, proposed, logs[mine])
        if turn >= rounds // 2 and (turn - rounds // 2) % (rounds // 2 // keep) == 0:
            kept.append(walkers.copy())
    return np.stack(kept, 1)


# GARCH(1,1): alpha0, alpha1, beta1 with flat priors on their intervals, as in Stan's user guide.


def garch_data() -> Arrays:
    rng, variance, y = np.random.default_rng(1), 1.0, []
    for _ in range(200):
        y.append(0.2 + np.sqrt(variance) * rng.normal())
        variance = 0.2 + 0.3 * (y[-1] - 0.2) ** 2 + 0.5 * variance
    return {"y": np.array(y)}


def garch(y: Any) -> None:
    import pyro
    import pyro.distributions as dist

    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
    alpha0 = pyro.sample("alpha0", dist.HalfNormal(y.new_tensor(1.0)))
    alpha1 = pyro.sample("alpha1", dist.Uniform(y.new_tensor(0.0), 1.0))
    beta1 = pyro.sample("beta1", dist.Uniform(y.new_tensor(0.0), 1 - alpha1))
    sigma = y.std()
    for t in range(len(y)):
        if t:
            sigma = (alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * sigma**2).sqrt()
        pyro.sample(f"y_{t}", dist.Normal(mu, sigma), obs=y[t])


def garch_numpyro() -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        alpha0 = numpyro.sample("alpha0", dist.HalfNormal(1.0))
        alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
        beta1 = numpyro.sample("beta1", dist.Uniform(0.0, 1 - alpha1))

        def step(sigma: Any, before: Any) -> Any:
            sigma = jnp.sqrt(alpha0 + alpha1 * (before - mu) ** 2 + beta1 * sigma**2)
            return sigma, sigma

        first = jnp.std(y, ddof=1)
        rest = jax.lax.scan(step, first, y[:-1])[1]
        numpyro.sample("y", dist.Normal(mu, jnp.append(first, rest)), obs=y)

    return model


def garch_density(points: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log density (walkers,) of points (walkers, 4) up to a constant, in NumPy."""
    mu, alpha0, alpha1, beta1 = points.T
    inside = (alpha0 > 0) & (alpha1 > 0) & (beta1 > 0) & (alpha1 + beta1 < 1)
    total = np.where(inside, -(mu**2) / 2 - alpha0**2 / 2, -np.inf)
    variance = np.full(len(points), y.std(ddof=1) ** 2)
    with np.errstate(all="ignore"):
        # beta1 is uniform on (0, 1 - alpha1).
        total = total - np.log(1 - alpha1)
        for t in range(len(y)):
            if t:
                variance = alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance
            total = total - 0.5 * np.log(variance) - 0.5 * (y[t] - mu) ** 2 / variance
    return np.where(inside, total, -np.inf)


def garch_reference(rounds: int = 4000) -> Arrays:
    y, rng = garch_data()["y"], np.random.default_rng(2)

    start = np.array([0.2, 0.2, 0.3, 0.4]) + np.array([0.05, 0.05, 0.05, 0.05]) * rng.normal(size=(200, 4)).clip(-2, 2)
    return dict(
        zip(
            ("mu", "alpha0", "alpha1", "beta1"),
            np.moveaxis(ensemble(partial(garch_density, y=y), start, rounds, 100), -1, 0),
            strict=True,
        )
    )


def arma_numpyro() -> Callable[..., Any]:
    import jax
    import numpyro
    import numpyro.distributions as dist

    def model(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
        theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

        def step(error: Any, pair: Any) -> Any:
            error = pair[1] - (mu + phi * pair[0] + theta * error)
            return error, error

        first = y[0] - (mu + phi * mu)
        rest = jax.lax.scan(step, first, (y[:-1], y[1:]))[1]
        errors = jax.numpy.append(first, rest)
        numpyro.sample("errors", dist.Normal(0.0, sigma), obs=errors)

    return model


# Hidden Markov chains of two states. Both states weigh 1 at the first observation.


def hmm_data() -> Arrays:
    rng, state, y = np.random.default_rng(3), 0, []
    for _ in range(200):
        state = int(rng.random() < (0.1, 0.8)[state])
        y.append((0.0, 2.0)[state] + rng.normal())
    return {"y": np.array(y)}


def _hmm_priors(y: Any) -> tuple[Any, Any]:
    import pyro
    import pyro.distributions as dist
    import torch

    rows = pyro.sample("rows", dist.Dirichlet(y.new_ones(2, 2)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 2.0))
    gap = pyro.sample("gap", dist.LogNormal(y.new_tensor(0.5), 0.5))
    return rows, torch.stack([mu, mu + gap], -1)


def hmm_loop(y: Any) -> None:
    import pyro.distributions as dist

    from ppl_models.ledger.recipes.posteriors import forward

    rows, means = _hmm_priors(y)
    forward(rows, dist.Normal(means, 1.0).log_prob(y[:, None]))


def hmm_markov(y: Any) -> None:
    import pyro
    import pyro.distributions as dist
    from pyro.ops.indexing import Vindex

    rows, means = _hmm_priors(y)
    state = None
    for t in pyro.markov(range(len(y))):
        # Half and half at the first observation: that weighs both states alike.
        law = y.new_ones(2) / 2 if state is None else Vindex(rows)[..., state, :]
        state = pyro.sample(f"z_{t}", dist.Categorical(law), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(Vindex(means)[..., state], 1.0), obs=y[t])


def _hmm_scan(rows: Any, scores: Any) -> None:
    import jax
    import numpyro

    def step(alpha: Any, score: Any) -> Any:
        return jax.nn.logsumexp(alpha[:, None] + jax.numpy.log(rows), 0) + score, None

    alpha = jax.lax.scan(step, scores[0], scores[1:])[0]
    numpyro.factor("y", jax.nn.logsumexp(alpha))


def hmm_numpyro() -> Callable[..., Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(y: Any) -> None:
        rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones((2, 2))).to_event(1))
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        gap = numpyro.sample("gap", dist.LogNormal(0.5, 0.5))
        _hmm_scan(rows, dist.Normal(jnp.stack([mu, mu + gap]), 1.0).log_prob(y[:, None]))

    return model


def hmm_columns(draws: Arrays) -> Arrays:
    return {
        "stay0": draws["rows"][..., 0, 0],
        "stay1": draws["rows"][..., 1, 1],
        "mu": draws["mu"],
        "gap": draws["gap"],
    }


def hmm_density(points: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Log density (walkers,) of points (walkers, 4) up to a constant, in NumPy."""
    stay0, stay1, mu, gap = points.T
    inside = (stay0 > 0) & (stay0 < 1) & (stay1 > 0) & (stay1 < 1) & (gap > 0)
    with np.errstate(all="ignore"):
        total = -(mu**2) / 8 - np.log(gap) - (np.log(gap) - 0.5) ** 2 / 0.5
        scores = [np.exp(-0.5 * (y[:, None] - m) ** 2) for m in (mu, mu + gap)]
        one, two = scores[0][0], scores[1][0]
        for t in range(1, len(y)):
            one, two = one * stay0 + two * (1 - stay1), one * (1 - stay0) + two * stay1
            one, two = one * scores[0][t], two * scores[1][t]
            size = one + two
            total, one, two = total + np.log(size), one / size, two / size
        return np.where(inside, total + np.log(one + two), -np.inf)


def hmm_reference(rounds: int = 4000) -> Arrays:
    y, rng = hmm_data()["y"], np.random.default_rng(4)

    start = np.array([0.85, 0.8, 0.0, 2.0]) + 0.05 * rng.normal(size=(200, 4)).clip(-2, 2)
    drawn = np.moveaxis(ensemble(partial(hmm_density, y=y), start, rounds, 100), -1, 0)
    return dict(zip(("stay0", "stay1", "mu", "gap"), drawn, strict=True))


def gp_numpyro() -> Callable[..., Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x: Any, y: Any) -> None:
        rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
        alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        square = (x[:, None] - x) ** 2
        covariance = alpha**2 * jnp.exp(-square / (2 * rho**2)) + sigma * jnp.eye(len(x))
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)

    return model


def lotka_volterra_numpyro() -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from ppl_models.ledger.recipes.posteriors import ODE_STEPS, runge_kutta

    def model(y: Any, y_init: Any) -> None:
        location, scale = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
        theta = numpyro.sample("theta", dist.TruncatedNormal(location, scale, low=0.0).to_event(1))
        start = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0) * jnp.ones(2), 1.0).to_event(1))
        sigma = numpyro.sample("sigma", dist.LogNormal(-jnp.ones(2), 1.0).to_event(1))

        def step(state: Any, _: Any) -> Any:
            state = runge_kutta(state, theta, 1.0 / ODE_STEPS)
            return state, jnp.stack(state)

        path = jax.lax.scan(step, (start[0], start[1]), None, length=len(y) * ODE_STEPS)[1][ODE_STEPS - 1 :: ODE_STEPS]
        numpyro.sample("y_init", dist.LogNormal(jnp.log(start), sigma).to_event(1), obs=y_init)
        numpyro.sample("y", dist.LogNormal(jnp.log(path), sigma).to_event(2), obs=y)

    return model


def _elements(**sizes: int) -> Callable[[Arrays], Arrays]:
    """Columns of vectors: ``theta1``, ``theta2``, ..."""
    return lambda draws: {f"{n}{k + 1}": draws[n][..., k] for n, size in sizes.items() for k in range(size)}


def _stays(*names: str) -> Callable[[Arrays], Arrays]:
    """Columns of a hidden Markov chain: the probabilities of staying, and further sites as they are."""

    def columns(draws: Arrays) -> Arrays:
        rows = draws["rows"]
        return {"stay0": rows[..., 0, 0], "stay1": rows[..., 1, 1], **{n: draws[n] for n in names}}

    return columns


def _ordered(*names: str) -> Callable[[Arrays], Arrays]:
    """The same with pairs of ordered numbers, of which the second is drawn as a distance from the first."""

    def columns(draws: Arrays) -> Arrays:
        low = {f"{n}1": draws[f"{n}1"] for n in names}
        return {**_stays()(draws), **low, **{f"{n}2": draws[f"{n}1"] + draws[f"{n}_gap"] for n in names}}

    return columns


_STAYS = {"stay0": "theta1[1]", "stay1": "theta2[2]"}
_LOTKA = {f"theta{k}": f"theta[{k}]" for k in range(1, 5)}
_LOTKA |= {f"{n}{k}": f"{n}[{k}]" for n in ("z_init", "sigma") for k in (1, 2)}
SERIES = {
    "garch": Series(
        garch_data, lambda: garch, garch_numpyro, _plain("mu", "alpha0", "alpha1", "beta1"), garch_reference
    ),
    "arma": Series(
        partial(_stored, "arma", "y"),
        _of_the_ledger("arma"),
        arma_numpyro,
        _plain("mu", "phi", "theta", "sigma"),
        partial(_stored_draws, "arma-arma11", {n: n for n in ("mu", "phi", "theta", "sigma")}),
    ),
    "hmm_loop": Series(hmm_data, lambda: hmm_loop, hmm_numpyro, _stays("mu", "gap"), hmm_reference),
    "hmm_markov": Series(hmm_data, lambda: hmm_markov, hmm_numpyro, _stays("mu", "gap"), hmm_reference),
    "hmm_example": Series(
        partial(_stored, "hmm_example", "y"),
        _of_the_ledger("hmm_example"),
        None,
        _ordered("mu"),
        partial(_stored_draws, "hmm_example-hmm_example", {**_STAYS, "mu1": "mu[1]", "mu2": "mu[2]"}),
    ),
    "hmm_drive_0": Series(
        partial(_stored, "bball_drive_event_0", "u", "v", "alpha"),
        _of_the_ledger("hmm_drive"),
        None,
        _ordered("phi", "lambda"),
        partial(
            _stored_draws,
            "bball_drive_event_0-hmm_drive_0",
            {**_STAYS, **{f"{n}{k}": f"{n}[{k}]" for n in ("phi", "lambda") for k in (1, 2)}},
        ),
    ),
    "gp_regr": Series(
        partial(_stored, "gp_pois_regr", "x", "y"),
        _of_the_ledger("gaussian_process"),
        gp_numpyro,
        _plain("rho", "alpha", "sigma"),
        partial(_stored_draws, "gp_pois_regr-gp_regr", {n: n for n in ("rho", "alpha", "sigma")}),
    ),
    "lotka_volterra": Series(
        partial(_stored, "hudson_lynx_hare", "y", "y_init"),
        _of_the_ledger("lotka_volterra"),
        lotka_volterra_numpyro,
        _elements(theta=4, z_init=2, sigma=2),
        partial(_stored_draws, "hudson_lynx_hare-lotka_volterra", _LOTKA),
    ),
}
