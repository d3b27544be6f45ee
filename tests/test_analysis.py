"""Models of Bayesian data analysis against quadrature, dense linear algebra, NumPy, SciPy and scikit-learn."""

import math
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from sklearn.decomposition import LatentDirichletAllocation
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from torch import Tensor

from inference import fit, sample
from ppl_models.data.classics import answers
from ppl_models.data.simulate import simulate_returns
from ppl_models.models.gaussian_process import JITTER, GaussianProcess
from ppl_models.models.hierarchical import HierarchicalRegression, NormalMeans
from ppl_models.models.item_response import RaschModel
from ppl_models.models.linear_models import LinearRegression, PoissonRegression
from ppl_models.models.time_series import GARCH, HiddenMarkovModel, Returns
from ppl_models.models.topics import LDA
from ppl_models.zoo.entries import ZOO

pytestmark = pytest.mark.usefixtures("alone")


def weighted(logs: np.ndarray, *values: np.ndarray) -> list[tuple[float, float]]:
    """Means and standard deviations of values on a grid of equal cells, by log densities."""
    chance = np.exp(logs - logs.max())
    chance /= chance.sum()
    means = [float((chance * v).sum()) for v in values]
    return [(m, float(np.sqrt((chance * (v - m) ** 2).sum()))) for m, v in zip(means, values, strict=True)]


def near(found: Any, mean: float, sd: float, rtol: float) -> None:
    """A mean within so many standard deviations, and a standard deviation within as many hundredths."""
    assert abs(float(found[0]) - mean) < rtol * sd
    assert float(found[1]) == pytest.approx(sd, rel=rtol)


def test_normal_means_have_the_moments_of_a_grid() -> None:
    y, error = torch.tensor([3.0, -1.0, 8.0]).double(), torch.tensor([2.0, 4.0, 3.0]).double()
    found = NormalMeans(mean_scale=4.0, spread_scale=2.0).double().moments(error=error, y=y)
    mu, u = np.meshgrid(np.linspace(-20, 20, 801), np.linspace(-12, 12, 2401), indexing="ij")
    tau = np.exp(u)
    logs = scipy.stats.norm(0, 4).logpdf(mu) + scipy.stats.halfcauchy(0, 2).logpdf(tau) + u
    for value, scale in zip(y.numpy(), error.numpy(), strict=True):
        logs += scipy.stats.norm(mu, np.hypot(tau, scale)).logpdf(value)
    near(found["mu"], *weighted(logs, mu)[0], rtol=0.005)
    near(found["tau"], *weighted(logs, np.minimum(tau, 1e4))[0], rtol=0.03)
    total = tau**2 + float(error[0]) ** 2
    centre, between = weighted(logs, tau * (float(y[0]) - mu) / total)[0]
    rest = weighted(logs, float(error[0]) ** 2 / total)[0][0]
    near((found["z"][0][0], found["z"][1][0]), centre, math.hypot(between, math.sqrt(rest)), rtol=0.005)


def test_the_guide_of_normal_means_draws_z_from_its_posterior() -> None:
    pair = NormalMeans().double()
    y, error = torch.tensor([3.0, -1.0, 8.0]).double(), torch.tensor([2.0, 4.0, 3.0]).double()
    guide = poutine.trace(pair.guide).get_trace(error=error, y=y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(error=error, y=y)
    guide.compute_log_prob()
    model.compute_log_prob()
    # p(z, y | mu, tau) / q(z | mu, tau) is p(y | mu, tau), whatever z is.
    ratio = model.nodes["z"]["log_prob"] + model.nodes["y"]["log_prob"] - guide.nodes["z"]["log_prob"]
    mu, tau = (guide.nodes[n]["value"].detach().numpy() for n in ("mu", "tau"))
    exact = scipy.stats.norm(mu, np.hypot(tau, error.numpy())).logpdf(y.numpy())
    np.testing.assert_allclose(ratio.detach().numpy(), exact, rtol=1e-9)


def grouped() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    x, group = rng.normal(size=(17, 2)), np.repeat(np.arange(4), (6, 1, 7, 3))
    return {"x": torch.tensor(x), "group": torch.tensor(group), "y": torch.tensor(x[:, 0] + rng.normal(size=17))}


def test_coefficients_given_the_rest_are_those_of_dense_algebra() -> None:
    data, pair = grouped(), HierarchicalRegression(2, 4).double()
    guide = poutine.trace(pair.guide).get_trace(**data)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(**data)
    guide.compute_log_prob()
    model.compute_log_prob()
    terms = [t.nodes[n]["log_prob"].sum() for t, n in ((model, "z"), (model, "y"), (guide, "z"))]
    ratio = float((terms[0] + terms[1] - terms[2]).detach())
    mean, spread, sigma = (guide.nodes[n]["value"].detach().numpy() for n in ("mean", "spread", "sigma"))
    inputs = np.concatenate([np.ones((17, 1)), data["x"].numpy()], 1)
    same = data["group"].numpy()[:, None] == data["group"].numpy()
    covariance = same * ((inputs * spread**2) @ inputs.T) + sigma**2 * np.eye(17)
    exact = scipy.stats.multivariate_normal(inputs @ mean, covariance).logpdf(data["y"].numpy())
    assert ratio == pytest.approx(exact, rel=1e-9)


def test_moments_of_coefficients_are_those_of_chains() -> None:
    rng, group = np.random.default_rng(0), np.arange(36) % 6
    x = np.linspace(-1.5, 1.5, 36)
    start, slope = np.array([-1, 0.5, 1.2, -0.4, 0.8, -1.1]), np.array([0.3, -1, 0.6, 1.3, -0.6, 0.9])
    y = start[group] + slope[group] * x + 0.3 * rng.normal(size=36)
    rows = {n: torch.tensor(v) for n, v in (("x", x[:, None]), ("group", group), ("y", y))}
    pair = HierarchicalRegression(1, 6).double()
    found = pair.moments(**rows)
    chains = sample(pair, rows, chains=32, draws=150, warmup=200, compile=False, progress=False)
    assert chains.diagnosis.worst_r_hat < 1.1
    for name in ("mean", "spread", "sigma"):
        mean, sd = (v.reshape(-1) for v in found[name])
        drawn = chains.draws[name].reshape(chains.size, -1)
        ess = chains.diagnosis.table["ess_bulk"].filter(like=name).min()
        assert ess > 1000
        assert float(((drawn.mean(0) - mean) / sd).abs().max()) < 5 / ess**0.5 + 5 / 5000**0.5


def test_rats_grow_as_published() -> None:
    """Gelfand et al. 1990: the mean rat weighs 106.6 g at birth and grows by 6.19 g a day, with noise of 6.1 g."""
    entry = ZOO["hierarchical_regression"]
    whole = entry.load()
    data = {n: torch.cat([whole.train[n], whole.test[n]]) for n in whole.train}
    raw = entry.make  # the units of the data set are standard deviations of its training rows
    assert raw is HierarchicalRegression
    found = entry.pair(whole).moments(**data)
    from ppl_models.data.loaders import read

    numbers = read("rats")
    day, gram = numbers.x["train"][:, 0], numbers.columns["y"]["train"]
    slope = found["mean"][0][1] * gram.std() / day.std()
    start = gram.mean() + gram.std() * (found["mean"][0][0] - found["mean"][0][1] * day.mean() / day.std())
    assert float(slope) == pytest.approx(6.19, abs=0.05)
    assert float(start) == pytest.approx(106.6, abs=1.5)
    assert float(found["sigma"][0] * gram.std()) == pytest.approx(6.09, abs=0.3)


def test_linear_regression_has_the_moments_of_quadrature_over_the_noise() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(25, 2))
    y = x @ [1.0, -0.5] + 0.3 + rng.normal(size=25)
    pair = LinearRegression(2, scale=1.5, intercept_scale=3.0, noise_scale=2.0).double()
    found = pair.moments(torch.tensor(x), torch.tensor(y))
    inputs, prior = np.concatenate([x, np.ones((25, 1))], 1), np.diag([1.5**2, 1.5**2, 9.0])
    sigmas = np.linspace(0.3, 3.0, 2000)
    logs, means, squares = [], [], []
    for sigma in sigmas:
        covariance = np.linalg.inv(inputs.T @ inputs / sigma**2 + np.linalg.inv(prior))
        mean = covariance @ inputs.T @ y / sigma**2
        total = inputs @ prior @ inputs.T + sigma**2 * np.eye(25)
        logs.append(scipy.stats.multivariate_normal(np.zeros(25), total).logpdf(y) - sigma**2 / 8)
        means.append(mean)
        squares.append(np.diag(covariance) + mean**2)
    near(found["sigma"], *weighted(np.array(logs), sigmas)[0], rtol=0.03)
    for k, (name, at) in enumerate((("weights", 0), ("weights", 1), ("intercept", ...))):
        mean = weighted(np.array(logs), np.array(means)[:, k])[0][0]
        sd = math.sqrt(weighted(np.array(logs), np.array(squares)[:, k])[0][0] - mean**2)
        near((found[name][0][at], found[name][1][at]), mean, sd, rtol=0.03)


def test_student_noise_and_counts_have_the_moments_of_a_grid() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 1))
    y = rng.poisson(np.exp(0.5 + 0.4 * x[:, 0])).astype(float)
    found = PoissonRegression(1, scale=1.0, intercept_scale=2.0).double().moments(torch.tensor(x), torch.tensor(y))
    w, b = np.meshgrid(np.linspace(-1, 1.5, 301), np.linspace(-1, 2, 301), indexing="ij")
    logs = (
        -(w**2) / 2
        - b**2 / 8
        + sum(scipy.stats.poisson(np.exp(b + w * u)).logpmf(v) for (u,), v in zip(x, y, strict=True))
    )
    near((found["weights"][0][0], found["weights"][1][0]), *weighted(logs, w)[0], rtol=0.03)
    near(found["intercept"], *weighted(logs, b)[0], rtol=0.03)
    # Without a feature that says anything, three parameters are left: b, sigma and nu.
    z = np.array([0.1, -0.4, 0.9, 0.3, -1.2, 0.5, 12.0, 0.0, -0.2, 0.6])
    pair = LinearRegression(1, scale=1e-3, intercept_scale=2.0, noise="student", noise_scale=1.0).double()
    found = pair.moments(torch.zeros(10, 1).double(), torch.tensor(z), draws=300_000)
    b, u, v = np.meshgrid(np.linspace(-2, 3, 81), np.linspace(-3, 2, 81), np.linspace(-3, 6, 91), indexing="ij")
    sigma, nu = np.exp(u), np.exp(v)
    logs = -(b**2) / 8 + scipy.stats.halfnorm(0, 1).logpdf(sigma) + scipy.stats.gamma(2, scale=10).logpdf(nu) + u + v
    logs = logs + sum(scipy.stats.t(nu, b, sigma).logpdf(value) for value in z)
    for name, (mean, sd) in zip(("intercept", "sigma", "nu"), weighted(logs, b, sigma, nu), strict=True):
        # Few rows and an outlier: the weights have heavy tails.
        near(found[name], mean, sd, rtol=0.15)
    assert float(found["nu"][0]) < 3


def test_abilities_have_the_mode_and_the_curvature_of_their_posterior() -> None:
    pair = RaschModel(3).double()
    a, b = torch.tensor(1.3).double(), torch.tensor([-1.0, 0.2, 2.0]).double()
    mode, scale = pair.laplace(a, b)
    line = np.linspace(-4, 4, 80_001)
    for score in range(4):
        logs = -(line**2) / 2 + 1.3 * score * line - np.logaddexp(0, 1.3 * (line[:, None] - b.numpy())).sum(1)
        best = logs.argmax()
        assert float(mode[score]) == pytest.approx(line[best], abs=1e-3)
        second = (logs[best + 1000] - 2 * logs[best] + logs[best - 1000]) / 0.1**2
        assert float(scale[score]) == pytest.approx((-second) ** -0.5, rel=1e-3)


def test_rasch_moments_are_those_of_a_chain() -> None:
    x = torch.tensor(answers()[::10])
    pair = RaschModel(5).double()
    found = pair.moments(x)
    chains = sample(pair, x, chains=16, draws=100, warmup=200, compile=False, progress=False)
    assert chains.diagnosis.worst_r_hat < 1.1
    for name in ("discrimination", "difficulty"):
        mean, sd = (v.reshape(-1) for v in found[name])
        drawn = chains.draws[name].reshape(chains.size, -1)
        ess = chains.diagnosis.table["ess_bulk"].filter(like=name).min()
        assert float(((drawn.mean(0) - mean) / sd).abs().max()) < 5 / ess**0.5


def forward(y: np.ndarray, matrix: np.ndarray, scores: Any) -> float:
    alpha = np.zeros(len(matrix)) - np.log(len(matrix))
    for value in y:
        alpha = scipy.special.logsumexp(alpha[:, None] + np.log(matrix), axis=0) + scores(value)
    return float(scipy.special.logsumexp(alpha))


@pytest.mark.parametrize("noise", ["poisson", "normal"])
def test_a_hidden_markov_chain_has_the_forward_likelihood(noise: str) -> None:
    y = np.array([2.0, 3.0, 9.0, 12.0, 8.0, 1.0])
    pair = HiddenMarkovModel(3, noise=noise, scale=5.0).double()
    torch.manual_seed(0)
    trace = poutine.trace(pair.model).get_trace(torch.tensor(y))
    trace.compute_log_prob()
    levels, matrix = (trace.nodes[n]["value"].numpy() for n in ("levels", "transitions"))
    law = scipy.stats.poisson if noise == "poisson" else scipy.stats.norm
    named = (
        (lambda v: law(levels).logpmf(v))
        if noise == "poisson"
        else (lambda v: law(levels, trace.nodes["sigma"]["value"].numpy()).logpdf(v))
    )
    assert (np.diff(levels) > 0).all()
    assert float(trace.nodes["y"]["log_prob"]) == pytest.approx(forward(y, matrix, named), rel=1e-9)
    given = [torch.tensor(matrix), torch.tensor(levels)]
    sigma = [] if noise == "poisson" else [trace.nodes["sigma"]["value"]]
    smoothed = pair.state_probabilities(torch.tensor(y), *given, *sigma)
    # By brute force: the share of all paths through a state.
    paths = np.stack(np.meshgrid(*[np.arange(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
    logs = np.array([np.log(matrix.mean(0)[p[0]]) + np.log(matrix[p[:-1], p[1:]]).sum() for p in paths])
    logs += sum(np.array([named(v)[s] for s in paths[:, t]]) for t, v in enumerate(y))
    chance = np.exp(logs - scipy.special.logsumexp(logs))
    exact = [[chance[paths[:, t] == s].sum() for s in range(3)] for t in range(6)]
    np.testing.assert_allclose(smoothed.numpy(), exact, atol=1e-9)


def test_moments_of_a_hidden_markov_chain_of_normals_are_those_of_a_chain() -> None:
    rng = np.random.default_rng(3)
    states = (rng.random(80) < 0.1).cumsum() % 2
    y = torch.tensor(np.array([-1.0, 2.0])[states] + 0.7 * rng.normal(size=80))
    pair = HiddenMarkovModel(noise="normal", scale=2.0).double()
    found = pair.moments(y)
    chains = sample(pair, y, chains=16, draws=100, warmup=200, compile=False, progress=False)
    ess = chains.diagnosis.table["ess_bulk"].min()
    for name, (mean, sd) in found.items():
        drawn = chains.draws[name].reshape(chains.size, -1)
        assert float(((drawn.mean(0) - mean.reshape(-1)) / sd.reshape(-1)).abs().max()) < 5 / ess**0.5


@pytest.mark.parametrize("length", [1, 2, 13])
def test_returns_have_the_density_of_a_loop(length: int) -> None:
    y = simulate_returns(length, seed=4)
    mu, base, shares = 0.3, 1.7, np.array([0.2, 0.5, 0.3])
    variance, exact = base, 0.0
    for t, value in enumerate(y.numpy()):
        if t:
            variance = shares[0] * (float(y[t - 1]) - mu) ** 2 + shares[1] * variance + shares[2] * base
        exact += scipy.stats.norm(mu, variance**0.5).logpdf(value)
    law = Returns(*(torch.tensor(v, dtype=torch.float64) for v in (mu, base, shares)), length)
    assert float(law.log_prob(y)) == pytest.approx(exact, rel=1e-9)


def test_returns_are_drawn_as_they_are_scored() -> None:
    """The expectation of p'(y) / p(y) is one for any other density p'."""
    one, other = (
        Returns(torch.tensor(0.8), torch.tensor(v), torch.tensor(s), 6)
        for v, s in ((1.0, [0.2, 0.5, 0.3]), (0.9, [0.15, 0.5, 0.35]))
    )
    y = one.sample((40_000,))
    ratio = (other.log_prob(y) - one.log_prob(y)).exp().double()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 200
    assert float(ratio.std()) > 0.1


def test_moments_of_returns_are_those_of_weighted_prior_draws() -> None:
    rng, y = np.random.default_rng(0), np.array([0.3, -0.8, 1.1, 0.2, -1.6, 1.9, -0.4, 0.7])
    count = 200_000
    mu, variance, shares = rng.normal(size=count), np.exp(rng.normal(size=count)), rng.dirichlet(np.ones(3), count)
    logs, now = np.zeros(count), variance
    for t, value in enumerate(y):
        if t:
            now = (shares * np.stack([(y[t - 1] - mu) ** 2, now, variance], 1)).sum(1)
        logs += scipy.stats.norm(mu, np.sqrt(now)).logpdf(value)
    weights = np.exp(logs - scipy.special.logsumexp(logs))
    effective = 1 / (weights**2).sum()
    found = GARCH().double().moments(torch.tensor(y))
    for name, draws in (("mu", mu[:, None]), ("shares", shares)):
        exact = weights @ draws
        sd = np.sqrt(weights @ (draws - exact) ** 2)
        centre, width = (v.numpy().reshape(-1) for v in found[name])
        assert (abs(centre - exact) < 5 * sd * (effective**-0.5 + 5000**-0.5)).all(), name
        np.testing.assert_allclose(width, sd, rtol=0.1, err_msg=name)


def test_a_gaussian_process_is_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    x, new = rng.normal(size=(20, 2)), rng.normal(size=(7, 2))
    y = np.sin(x[:, 0]) + 0.1 * rng.normal(size=20)
    draws = {n: torch.tensor([v]).double() for n, v in (("length", 0.8), ("amplitude", 1.3), ("sigma", 0.2))}
    pair = GaussianProcess(2).double()
    kernel = ConstantKernel(1.3**2) * Matern(0.8, nu=1.5) + WhiteKernel(0.2**2 + JITTER)
    peer = GaussianProcessRegressor(kernel, optimizer=None).fit(x, y)
    mean, sd = pair.predict(torch.tensor(x), torch.tensor(y), torch.tensor(new), draws)
    expected, spread = peer.predict(new, return_std=True)
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-6)
    # scikit-learn's is that of a new observation.
    np.testing.assert_allclose(np.hypot(sd.numpy(), (0.2**2 + JITTER) ** 0.5), spread, atol=1e-6)
    values = {n: v[0] for n, v in draws.items()}
    trace = poutine.trace(poutine.condition(pair.model, data=values)).get_trace(torch.tensor(x), torch.tensor(y))
    trace.compute_log_prob()
    assert float(trace.nodes["y"]["log_prob"]) == pytest.approx(peer.log_marginal_likelihood_value_, rel=1e-6)


def test_moments_of_a_gaussian_process_are_those_of_a_grid() -> None:
    rng = np.random.default_rng(6)
    x = np.linspace(0, 4, 12)[:, None]
    y = np.sin(2 * x[:, 0]) + 0.3 * rng.normal(size=12)
    pair = GaussianProcess(kernel="squared_exponential").double()
    found = pair.moments(torch.tensor(x), torch.tensor(y), draws=60_000)
    axes = [np.linspace(a, b, 44) for a, b in ((-2.5, 3.0), (-3.0, 2.0), (-5.0, 1.5))]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    length, amplitude, sigma = np.exp(grid).T
    square = (x - x.T) ** 2
    kernels = amplitude[:, None, None] ** 2 * np.exp(-square / (2 * length[:, None, None] ** 2))
    kernels = kernels + (sigma[:, None, None] ** 2 + JITTER) * np.eye(12)
    logs = grid.sum(1) + scipy.stats.invgamma(5, scale=5).logpdf(length)
    logs += scipy.stats.halfnorm().logpdf(amplitude) + scipy.stats.halfnorm().logpdf(sigma)
    _, size = np.linalg.slogdet(kernels)
    logs -= size / 2 + np.einsum("n,snm,m->s", y, np.linalg.inv(kernels), y) / 2
    for name, (mean, sd) in zip(
        ("length", "amplitude", "sigma"), weighted(logs, length, amplitude, sigma), strict=True
    ):
        # Heavy tails: the length is inverse gamma where the data say little.
        near(found[name], mean, sd, rtol=0.1)


def documents() -> tuple[np.ndarray, np.ndarray]:
    """Documents of three topics that share no word, and the topics."""
    rng = np.random.default_rng(7)
    topics = np.zeros((3, 12))
    for k in range(3):
        topics[k, 4 * k : 4 * k + 4] = rng.dirichlet(np.ones(4) * 2)
    mixture = rng.dirichlet(np.ones(3) * 0.3, size=300)
    return np.stack([rng.multinomial(50, p) for p in mixture @ topics]).astype(float), topics


def test_topics_are_found_as_well_as_scikit_learn_finds_them() -> None:
    x, topics = documents()
    peer = LatentDirichletAllocation(3, doc_topic_prior=0.1, topic_word_prior=0.1, random_state=0).fit(x)
    torch.manual_seed(0)
    pair = LDA(12, 3, hidden=(20,)).double()
    fit(pair, torch.tensor(x), steps=1500, batch=100, learning_rate=0.02, draws=1, progress=False)

    def error(found: np.ndarray) -> float:
        """Largest distance of a true topic to the nearest one that was found, half of the sum of differences."""
        return float(max(np.abs(found - topic).sum(1).min() / 2 for topic in topics))

    theirs = error(peer.components_ / peer.components_.sum(1, keepdims=True))
    assert error(pair.mean_topics().numpy()) < theirs + 0.05


def test_documents_have_the_density_of_a_multinomial() -> None:
    x, _ = documents()
    pair = LDA(12, 3).double()
    trace = poutine.trace(pair.model).get_trace(torch.tensor(x[:4]))
    trace.compute_log_prob()
    chance = trace.nodes["mixture"]["value"] @ trace.nodes["topics"]["value"]
    exact = [scipy.stats.multinomial(50, p / p.sum()).logpmf(row) for p, row in zip(chance.numpy(), x, strict=False)]
    np.testing.assert_allclose(trace.nodes["x"]["log_prob"].numpy(), exact, rtol=1e-6)


def test_a_series_has_no_minibatches_and_needs_a_length() -> None:
    pair = GARCH().double()
    with pytest.raises(ValueError, match="^batch: expected a model with the arguments size and rows"):
        fit(pair, simulate_returns(20), batch=5, progress=False)
    with pytest.raises(
        ValueError, match="^size: expected the length of the series to draw when y is not given, got None"
    ):
        pair.model()
    assert pair.model(size=7).shape == (7,)
    assert len(pyro.get_param_store()) == 0
