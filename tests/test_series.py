"""Time series, Gaussian processes and an ODE as their users write them, by default ``sample``."""

import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from benchmarks import series, timeseries
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from inference.compiler.potential import BatchedPotential
from inference.compiler.supports import follow_supports
from ppl_models.ledger.recipes import posteriors

pytestmark = pytest.mark.usefixtures("alone")
stored = pytest.mark.skipif(not timeseries.folder().exists(), reason="PPL_MODELS_DATA has no posteriordb")
LENGTH = 12


def potential_of(model: Callable[..., Any], data: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    start, potential, _, trace = initialize_model(partial(model, **data))
    return start, follow_supports(potential, trace) or potential


def test_garch_has_the_density_of_numpy() -> None:
    """Beside the Jacobian of the transforms; beta1 has the support (0, 1 - alpha1)."""
    y = timeseries.garch_data()["y"][:LENGTH]
    start, potential = potential_of(timeseries.garch, {"y": torch.as_tensor(y)})
    many = BatchedPotential(potential, start, 6)
    points = {n: torch.randn(6).double() for n in start}
    values = potential.constrain(points)
    jacobian = values["alpha0"].log() + (values["alpha1"] * (1 - values["alpha1"])).log()
    share = values["beta1"] / (1 - values["alpha1"])
    jacobian += (share * (1 - share)).log() + (1 - values["alpha1"]).log()
    columns = np.stack([values[n].numpy() for n in ("mu", "alpha0", "alpha1", "beta1")], -1)
    ours = -many.run(many.pack(points))[0] - jacobian
    # NumPy takes the spread of the series as the first deviation, as the model does.
    off = ours.numpy() - timeseries.garch_density(columns, y)
    np.testing.assert_allclose(off, off[0], rtol=1e-9)


def test_a_hidden_markov_chain_has_the_density_of_numpy_as_a_loop_and_by_enumeration() -> None:
    y = timeseries.hmm_data()["y"][:LENGTH]
    offs = []
    for model in (timeseries.hmm_loop, timeseries.hmm_markov):
        start, potential, transforms, _ = initialize_model(partial(model, y=torch.as_tensor(y)))
        many = BatchedPotential(potential, start, 5)
        torch.manual_seed(0)
        points = {n: torch.randn(5, *start[n].shape).double() for n in ("rows", "mu", "gap")}
        values = {n: transforms[n].inv(v) for n, v in points.items()}
        jacobian = sum(
            transforms[n].inv.log_abs_det_jacobian(v, values[n]).reshape(5, -1).sum(-1) for n, v in points.items()
        )
        columns = timeseries.SERIES["hmm_loop"].columns({n: v.numpy() for n, v in values.items()})
        exact = timeseries.hmm_density(np.stack(list(columns.values()), -1), y)
        offs.append((-many.run(many.pack(points))[0] - jacobian).numpy() - exact)
    for off in offs:
        np.testing.assert_allclose(off, off[0], rtol=1e-9)


def judged(name: str, **settings: Any) -> dict[str, float]:
    case = timeseries.SERIES[name]
    before = torch.get_default_dtype()
    try:
        draws = series.ours(case, 1, **settings)
    finally:
        torch.set_default_dtype(before)
    return series.judge(case.columns(draws), case.reference())


@stored
def test_a_gaussian_process_has_its_reference() -> None:
    found = judged("gp_regr", compile=False, draws=150, warmup=150)
    assert found["r_hat"] < 1.03
    assert found["error"] < 5 * found["floor"]


@stored
@pytest.mark.slow
@pytest.mark.skipif("PPL_MODELS_SERIES" not in os.environ, reason="takes minutes: set PPL_MODELS_SERIES")
@pytest.mark.parametrize("name", timeseries.SERIES)
def test_a_default_run_has_its_reference(name: str) -> None:
    found = judged(name)
    assert found["r_hat"] < 1.03
    assert found["error"] < 5 * found["floor"]


def log_joint(model: Callable[..., Any], data: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> float:
    """Log density of data and values, without the masked priors."""
    given = {n: torch.as_tensor(v) for n, v in values.items()}
    trace = poutine.trace(poutine.condition(model, given)).get_trace(**{n: torch.as_tensor(v) for n, v in data.items()})
    assert given.keys() <= trace.nodes.keys()
    return float(trace.log_prob_sum())


def test_predators_and_prey_have_the_density_of_scipy() -> None:
    """The path by an adaptive solver, densities by scipy."""
    rng, stats = np.random.default_rng(0), scipy.stats
    theta, start, sigma = np.array([0.5, 0.03, 0.8, 0.02]), np.array([30.0, 5.0]), np.array([0.3, 0.2])
    y, y_init = rng.lognormal(2, 0.5, (12, 2)), np.array([28.0, 6.0])

    def rates(_: float, state: np.ndarray) -> list[float]:
        (u, v), (a, b, c, d) = state, theta
        return [(a - b * v) * u, (-c + d * u) * v]

    solved = scipy.integrate.solve_ivp(rates, (0, 12), start, t_eval=np.arange(1, 13), rtol=1e-9, atol=1e-9)
    exact = stats.norm([1, 0.05, 1, 0.05], [0.5, 0.05, 0.5, 0.05]).logpdf(theta).sum()
    exact += stats.lognorm(1, scale=10).logpdf(start).sum() + stats.lognorm(1, scale=np.exp(-1)).logpdf(sigma).sum()
    exact += stats.lognorm(sigma, scale=start).logpdf(y_init).sum()
    exact += stats.lognorm(sigma, scale=solved.y.T).logpdf(y).sum()
    found = log_joint(
        posteriors.lotka_volterra, {"y": y, "y_init": y_init}, {"theta": theta, "z_init": start, "sigma": sigma}
    )
    assert found == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("name", ["regression", "scores", "shrunk"])
def test_regressions_of_posteriordb_have_the_density_of_scipy(name: str) -> None:
    rng, stats = np.random.default_rng(0), scipy.stats
    x, beta, sigma = rng.normal(size=(9, 3)), rng.normal(size=3), 1.7
    y = rng.normal(size=9)
    prior = {
        "regression": 0.0,
        "scores": stats.halfcauchy(scale=2.5).logpdf(sigma),
        "shrunk": stats.norm(0, 10).logpdf(beta).sum() + stats.halfnorm(scale=10).logpdf(sigma),
    }[name]
    found = log_joint(getattr(posteriors, name), {"x": x, "y": y}, {"beta": beta, "sigma": np.array(sigma)})
    assert found == pytest.approx(prior + stats.norm(x @ beta, sigma).logpdf(y).sum(), rel=1e-9)


def test_two_ordered_states_of_drives_have_the_density_of_a_sum_over_paths() -> None:
    rng, stats = np.random.default_rng(0), scipy.stats
    u, v, alpha = rng.exponential(size=5), rng.exponential(size=5), np.array([[2.0, 3.0], [4.0, 1.5]])
    rows, phi, rate = np.array([[0.7, 0.3], [0.2, 0.8]]), np.array([0.6, 2.1]), np.array([0.9, 1.4])
    scores = stats.expon(scale=1 / phi).pdf(u[:, None]) * stats.expon(scale=1 / rate).pdf(v[:, None])
    total = sum(
        np.prod([scores[t, z] for t, z in enumerate(path)]) * np.prod([rows[a, b] for a, b in pairwise(path)])
        for path in product((0, 1), repeat=5)
    )
    exact = np.log(total) + sum(stats.dirichlet(a).logpdf(r) for a, r in zip(alpha, rows, strict=True))
    exact += sum(stats.norm([0, 3], 1).logpdf(pair).sum() for pair in (phi, rate))
    values = {"rows": rows, "phi1": phi[0], "lambda1": rate[0]}
    # Of the second number the site is its distance from the first.
    values |= {"phi_gap": phi[1] - phi[0], "lambda_gap": rate[1] - rate[0]}
    found = log_joint(posteriors.hmm_drive, {"u": u, "v": v, "alpha": alpha}, values)
    assert found == pytest.approx(exact, rel=1e-9)
