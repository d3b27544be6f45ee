"""Linear factors against the full covariance, scikit-learn's PCA and FactorAnalysis, and autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.linalg
import sklearn.decomposition as sk
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inference
from inference import Result
from inference.core.bound import bind
from ppl_models.data.sets import load
from ppl_models.models.linear_factors import PPCA, Autoencoder, FactorAnalysis, FactorModel

pytestmark = pytest.mark.usefixtures("alone")

CLASSES: dict[str, type[FactorAnalysis]] = {"fa": FactorAnalysis, "ppca": PPCA}
kinds = pytest.mark.parametrize("kind", list(CLASSES))
close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def make(kind: str, features: Any = 5, factors: Any = 2, seed: int = 1) -> FactorAnalysis:
    """A pair away from its start: no parameter is 0 or 1, and no two features have the same noise."""
    pair = CLASSES[kind](features, factors).double()
    pair.loadings = random(pair.features, pair.factors, seed=seed)
    pair.mean = random(pair.features, seed=seed + 1)
    pair.noise = random(*pair.noise.shape, seed=seed + 2).exp()
    return pair


def autoencoder(features: int = 5, factors: int = 2, **networks: nn.Module) -> Autoencoder:
    return Autoencoder(features, factors, **networks).double()


def wine() -> Tensor:
    return load("wine", standardise=True, dtype=torch.float64).train["x"]


def covariance(pair: FactorAnalysis) -> Tensor:
    """Of x, with z integrated out: the D x D matrix that the pair never builds."""
    return pair.loadings @ pair.loadings.mT + torch.diag(pair.noise.expand(pair.features))


def by_full_covariance(pair: FactorAnalysis, x: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(pair.mean, covariance(pair)).log_prob(x)


def numpy(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def assert_moments_agree(draws: Tensor, mean: Tensor, covariance: Tensor, z: float = 5.0) -> None:
    """Mean and covariance of independent Gaussian draws (S, D), within z of their standard errors.

    Of a Gaussian, S times the variance of an entry of the sample covariance is C_ii C_jj + C_ij^2.
    """
    x, mean, covariance = numpy(draws), numpy(mean), numpy(covariance)
    variance = np.diag(covariance)
    np.testing.assert_array_less(abs(x.mean(0) - mean), z * np.sqrt(variance / len(x)))
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(x))
    np.testing.assert_array_less(abs(np.cov(x.T) - covariance), z * error)


# The exact guide and the evidence


@kinds
@pytest.mark.parametrize("factors", [1, 2, 5])
def test_the_evidence_is_that_of_the_full_covariance(kind: str, factors: int) -> None:
    pair, x = make(kind, factors=factors), random(3, 40, 5)
    found = pair.log_evidence(x)
    assert found.shape == (3, 40)
    close(numpy(found), numpy(by_full_covariance(pair, x)))
    close(numpy(pair.log_evidence(x[0, 0])), numpy(found[0, 0]))


def test_the_evidence_of_one_feature_and_one_factor() -> None:
    pair = make("fa", 1, 1)
    x = random(7, 1)
    scale = (pair.loadings[0, 0] ** 2 + pair.noise[0]).sqrt()
    close(numpy(pair.log_evidence(x)), numpy(torch.distributions.Normal(pair.mean, scale).log_prob(x)[:, 0]))


def test_the_evidence_keeps_single_precision_where_the_noise_is_small() -> None:
    """|x|^2 / noise is 1e7 there: a difference of two such numbers has lost all digits of float32 but one."""
    pair = make("fa")
    pair.noise = pair.noise * 1e-6
    x = random(40, 2, seed=9) @ pair.loadings.mT.detach() + pair.mean.detach() + 1e-3 * random(40, 5)
    exact = numpy(pair.log_evidence(x))
    close(exact, numpy(by_full_covariance(pair, x)), rtol=1e-6)
    # Rounding x moves a residual by 1e-4 of its standard deviation; the difference of squares would be off by a nat.
    np.testing.assert_allclose(numpy(pair.float().log_evidence(x.float())), exact, rtol=1e-3, atol=0.02)


def test_the_guide_is_a_distribution_in_single_precision() -> None:
    """Orthogonal loadings: where their products are rounded, the precision is not symmetric by itself."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        factors = torch.randn(100, 5, generator=generator) @ torch.randn(5, 30, generator=generator)
        x = factors + 0.1 * torch.randn(100, 30, generator=generator)
        assert PPCA(30, 5).closed_form(x).posterior(x).mean.isfinite().all()


def test_the_evidence_builds_no_matrix_of_all_pairs_of_features() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in tree_leaves(found) if torch.is_tensor(t))])
            return found

    pair = make("fa", 1000, 3)
    x = random(4, 1000)
    with Watch(), torch.no_grad():
        pair.log_evidence(x)
    assert largest == 4000


@kinds
def test_the_guide_is_the_conditional_of_the_joint_gaussian(kind: str) -> None:
    pair, x = make(kind), random(6, 5)
    gain = pair.loadings.mT @ torch.linalg.inv(covariance(pair))
    posterior = pair.posterior(x)
    close(numpy(posterior.mean), numpy((x - pair.mean) @ gain.mT))
    spread = numpy(torch.eye(2) - gain @ pair.loadings)
    for row in posterior.covariance_matrix:
        close(numpy(row), spread)


@kinds
@pytest.mark.parametrize("particles", [{}, {"num_particles": 7}, {"num_particles": 7, "vectorize_particles": True}])
def test_the_elbo_of_every_draw_is_the_log_evidence(kind: str, particles: dict[str, Any]) -> None:
    pair, x = make(kind), random(40, 5)
    elbo = Trace_ELBO(**particles)
    found = [-elbo.loss(pair.model, pair.guide, x) for _ in range(20)]
    close(found, by_full_covariance(pair, x).sum().item())


@kinds
def test_the_weight_of_every_row_and_draw_is_its_log_evidence(kind: str) -> None:
    """No error of one row, or of one draw, is made good by another."""
    pair, x = make(kind), random(6, 5)
    particles = pyro.plate("particles", 50, dim=-2)
    guide = poutine.trace(particles(pair.guide)).get_trace(x)
    model = poutine.trace(poutine.replay(particles(pair.model), guide)).get_trace(x)
    guide.compute_log_prob()
    model.compute_log_prob()
    z: Any = guide.nodes["z"]
    assert z["value"].shape == (50, 6, 2)
    assert (z["value"].std(0) > 0).all()
    nodes: dict[str, Any] = dict(model.nodes)
    weights = nodes["z"]["log_prob"] + nodes["x"]["log_prob"] - z["log_prob"]
    close(numpy(weights), np.broadcast_to(numpy(by_full_covariance(pair, x)), (50, 6)))


@kinds
def test_the_gradients_of_elbo_and_evidence_are_those_of_the_full_covariance(kind: str) -> None:
    pair, x = make(kind), random(40, 5)
    expected = torch.autograd.grad(by_full_covariance(pair, x).sum(), list(pair.parameters()))
    found = torch.autograd.grad(pair.log_evidence(x).sum(), list(pair.parameters()))
    Trace_ELBO().loss_and_grads(pair.model, pair.guide, x)
    names = [name for name, _ in pair.named_parameters()]
    assert names == ["loadings_unconstrained", "mean_unconstrained", "noise_unconstrained"]
    for parameter, gradient, direct in zip(pair.parameters(), expected, found, strict=True):
        assert gradient.abs().min() > 0
        close(numpy(direct), numpy(gradient), rtol=1e-9)
        close(-numpy(parameter.grad), numpy(gradient), rtol=1e-9)


@pytest.mark.parametrize("kind", ["fa", "ppca", "autoencoder"])
def test_the_mean_of_the_elbos_of_all_minibatches_is_the_elbo_of_all_rows(kind: str) -> None:
    pair: FactorModel = autoencoder() if kind == "autoencoder" else make(kind)
    x = random(40, 5)

    def loss(batch: Tensor, **arguments: Any) -> float:
        return Trace_ELBO().loss(pair.model, pair.guide, batch, **arguments)

    parts = [loss(x[rows], size=40, rows=rows) for rows in torch.randperm(40).split(8)]
    assert np.std(parts) > 1
    close(np.mean(parts), loss(x))


@kinds
def test_a_pair_starts_where_standardised_data_lie(kind: str) -> None:
    pair = CLASSES[kind](4000, 4)
    assert_moments_agree(pair.loadings, torch.zeros(4), torch.eye(4) / 4)
    assert (pair.mean == 0).all()
    assert (pair.noise == 1).all()
    assert tuple(pair.noise.shape) == ((4000,) if kind == "fa" else ())


# Draws


@kinds
def test_rows_drawn_without_data_have_the_mean_and_covariance_of_the_evidence(kind: str) -> None:
    pair = make(kind)
    with torch.no_grad():
        x = pair.model(size=200_000)
    assert x.shape == (200_000, 5)
    assert_moments_agree(x, pair.mean, covariance(pair))


@kinds
def test_draws_of_the_prior_are_independent_over_rows(kind: str) -> None:
    pair = make(kind)
    drawn = inference.prior_predictive(pair, size=2, draws=50_000)
    assert {name: tuple(v.shape) for name, v in drawn.items()} == {"z": (50_000, 2, 2), "x": (50_000, 2, 5)}
    both = torch.block_diag(covariance(pair), covariance(pair))
    assert_moments_agree(drawn["x"].flatten(1), pair.mean.repeat(2), both)
    assert_moments_agree(drawn["z"].flatten(1), torch.zeros(4), torch.eye(4))
    # x - W z - mu is the noise alone.
    rest = drawn["x"] - drawn["z"] @ pair.loadings.mT - pair.mean
    assert_moments_agree(rest[:, 0], torch.zeros(5), torch.diag(pair.noise.expand(5)))


def test_replicates_have_the_moments_of_the_predictive() -> None:
    """E[x'] = W E[z | x] + mu, and its covariance is W Cov[z | x] W^T + Psi."""
    pair, x = make("fa"), random(3, 5)
    result = inference.fit(pair, x, steps=0, draws=50_000, progress=False)
    posterior = pair.posterior(x)
    drawn = inference.posterior_predictive(result)
    assert set(drawn) == {"x"}
    mean = posterior.mean @ pair.loadings.mT + pair.mean
    spread = pair.loadings @ posterior.covariance_matrix @ pair.loadings.mT + torch.diag(pair.noise)
    for row in range(3):
        assert_moments_agree(result.draws["z"][:, row], posterior.mean[row], posterior.covariance_matrix[row])
        assert_moments_agree(drawn["x"][:, row], mean[row], spread[row])


# Under inference.fit


def fit(pair: FactorModel, x: Tensor, **arguments: Any) -> Result:
    return inference.fit(pair, x, **{"objective": Trace_ELBO, "draws": 50, "progress": False, **arguments})


@kinds
def test_a_fit_has_the_dimensions_and_the_exact_guide(kind: str) -> None:
    pair = make(kind, ["a", "b", "c", "d", "e"], ["first", "second"])
    x = random(40, 5)
    result = fit(pair, x, steps=20, batch=16)
    assert set(result.params) == {"loadings", "mean", "noise"}
    assert (result.params["noise"] > 0).all()
    posterior = result.idata.posterior["z"]
    assert posterior.dims == ("chain", "draw", "rows", "factors")
    assert posterior.coords["factors"].values.tolist() == ["first", "second"]
    replicates = result.idata.posterior_predictive["x"]
    assert replicates.dims == ("chain", "draw", "rows", "features")
    assert replicates.coords["features"].values.tolist() == ["a", "b", "c", "d", "e"]
    assert result.diagnosis.pareto_k == -np.inf
    weights = inference.predict.log_weights(result, draws=30)
    close(numpy(weights), pair.log_evidence(x).sum().item())
    pointwise = inference.pointwise_log_likelihood(result)
    expected = torch.stack([pair.likelihood(z).log_prob(x) for z in result.draws["z"]])
    close(numpy(pointwise), numpy(expected))


@pytest.mark.parametrize("factors", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_fit_reaches_scikit_learns_maximum_likelihood(factors: int) -> None:
    """Theirs by EM, until a step gains less than 1e-10 nats; ours by gradients, within 1e-6 nats a row.

    The likelihood of three factors has a second maximum, 0.1 nats a row lower, in which about one start of fifteen
    ends: the best of three starts is held to the highest.
    """
    x = wine()
    theirs = sk.FactorAnalysis(factors, tol=1e-10, max_iter=10_000, svd_method="lapack").fit(x.numpy())
    expected = theirs.score(x.numpy())

    def fitted(seed: int) -> tuple[FactorAnalysis, Result]:
        torch.manual_seed(seed)
        pair = FactorAnalysis(x.shape[1], factors).double()
        assert pair.log_evidence(x).mean().item() < expected - 1
        return pair, fit(pair, x, steps=1500, learning_rate=0.05, seed=seed)

    pair, result = max((fitted(seed) for seed in range(3 if factors == 3 else 1)), key=lambda f: -f[1].losses[-1])
    assert pair.log_evidence(x).mean().item() == pytest.approx(expected, abs=1e-6)
    assert -result.losses[-1] / len(x) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(numpy(covariance(pair)), theirs.get_covariance(), atol=2e-3)


def test_the_evidence_is_scikit_learns_score_at_its_parameters() -> None:
    data = load("wine", standardise=True, dtype=torch.float64)
    x, unseen = data.train["x"], data.test["x"]
    theirs = sk.FactorAnalysis(3).fit(x.numpy())
    pair = FactorAnalysis(13, 3).double()
    pair.loadings = torch.tensor(theirs.components_.T)
    pair.mean = torch.tensor(theirs.mean_)
    pair.noise = torch.tensor(theirs.noise_variance_)
    for rows in (x, unseen):
        close(numpy(pair.log_evidence(rows)), theirs.score_samples(rows.numpy()))
        close(numpy(pair.posterior(rows).mean), theirs.transform(rows.numpy()))


# Probabilistic PCA


def shrunk(x: Tensor) -> np.ndarray:
    """Rows whose covariance divided by N - 1, which scikit-learn scores with, is that of x divided by N."""
    return numpy(x.mean(0) + (x - x.mean(0)) * np.sqrt((len(x) - 1) / len(x)))


@pytest.mark.parametrize("factors", [1, 2, 5, 12])
def test_the_closed_form_is_scikit_learns_pca(factors: int) -> None:
    data = load("wine", standardise=True, dtype=torch.float64)
    x, unseen = data.train["x"] + torch.arange(13), data.test["x"] + torch.arange(13)
    pair = PPCA(13, factors).double()
    assert pair.closed_form(x) is pair
    theirs = sk.PCA(factors).fit(shrunk(x))
    for rows in (x, unseen):
        close(numpy(pair.log_evidence(rows)), theirs.score_samples(rows.numpy()))
    close(numpy(covariance(pair)), theirs.get_covariance())
    close(numpy(pair.mean), theirs.mean_)
    assert pair.noise.item() == pytest.approx(theirs.noise_variance_, rel=1e-12)
    directions = numpy(pair.loadings / pair.loadings.norm(dim=0))
    close(abs((directions.T * theirs.components_).sum(-1)), 1)  # column by column, in the order of their variance
    # Their own divisor, N - 1, is a covariance N / (N - 1) times as wide.
    pair.loadings = pair.loadings * np.sqrt(len(x) / (len(x) - 1))
    pair.noise = pair.noise * len(x) / (len(x) - 1)
    close(numpy(pair.log_evidence(x)), sk.PCA(factors).fit(x.numpy()).score_samples(x.numpy()))


def test_the_closed_form_is_a_stationary_point_and_above_scikit_learns() -> None:
    x = wine()
    pair = PPCA(13, 3).double().closed_form(x)
    loss = Trace_ELBO().loss_and_grads(pair.model, pair.guide, x)
    for parameter in pair.parameters():
        np.testing.assert_allclose(numpy(parameter.grad), 0, atol=1e-10)
    assert -loss > sk.PCA(3).fit(x.numpy()).score_samples(x.numpy()).sum() + 1e-3


def test_a_fit_reaches_the_closed_form() -> None:
    x = wine()
    best = PPCA(13, 2).double().closed_form(x)
    pair = PPCA(13, 2).double()
    fit(pair, x, steps=1000, learning_rate=0.05)
    np.testing.assert_allclose(numpy(covariance(pair)), numpy(covariance(best)), atol=1e-6)
    assert pair.log_evidence(x).mean().item() == pytest.approx(best.log_evidence(x).mean().item(), abs=1e-9)


def test_the_closed_form_moves_the_parameters_that_are_there() -> None:
    """An optimizer, or Pyro's parameter store, that holds them sees the move; their precision stays."""
    pair = PPCA(13, 2)
    held = dict(pair.named_parameters())
    pair.model(size=1)  # into the parameter store
    pair.closed_form(wine())
    assert all(p is held[name] and p.dtype == torch.float32 for name, p in pair.named_parameters())
    assert pyro.param("noise").item() == pair.noise.item() != 1
    expected = sk.PCA(2).fit(shrunk(wine())).score_samples(wine().numpy())
    np.testing.assert_allclose(numpy(pair.log_evidence(wine().float())), expected, rtol=1e-4)


def test_equal_variances_in_all_directions_leave_nothing_to_the_factors() -> None:
    """The mean of 0.2 three times is above 0.2 by rounding, so that what is left for the factors is below 0."""
    x = torch.cat([torch.eye(5), -torch.eye(5)]).double()
    pair = PPCA(5, 2).double().closed_form(x)
    assert pair.noise.item() == pytest.approx(0.2)
    np.testing.assert_allclose(numpy(pair.loadings), 0, atol=1e-7)


# The autoencoder


def test_the_elbo_of_the_autoencoder_is_half_the_squared_error_and_a_constant() -> None:
    networks = {
        "encoder": nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)),
        "decoder": nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 5)),
    }
    pair, x = autoencoder(**networks), random(40, 5)
    z = networks["encoder"](x)
    assert torch.equal(pair.encode(x), z)
    assert torch.equal(pair.decode(z), networks["decoder"](z))
    error = (networks["decoder"](z) - x).square().sum()
    expected = -error / 2 - x.numel() / 2 * np.log(2 * np.pi)
    gradient = torch.autograd.grad(expected, list(pair.parameters()))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True)):
        pair.zero_grad()
        close(-elbo.loss_and_grads(pair.model, pair.guide, x), expected.item())
        for (name, parameter), by_hand in zip(pair.named_parameters(), gradient, strict=True):
            assert by_hand.abs().sum() > 0, name
            close(-numpy(parameter.grad), numpy(by_hand))


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_a_linear_autoencoder_spans_the_subspace_of_pca(factors: int) -> None:
    x = wine()
    pair = Autoencoder(13, factors).double()
    theirs = sk.PCA(factors).fit(x.numpy())

    def angle() -> float:
        return scipy.linalg.subspace_angles(numpy(pair.decoder.weight), theirs.components_.T).max()

    assert angle() > 0.1
    result = fit(pair, x, steps=1000, learning_rate=0.05)
    assert angle() < 1e-6
    assert set(result.params) == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    best = theirs.inverse_transform(theirs.transform(x.numpy()))
    np.testing.assert_allclose(numpy(pair.decode(pair.encode(x))), best, atol=1e-6)
    error = ((x.numpy() - best) ** 2).sum()
    assert -result.losses[-1] == pytest.approx(-error / 2 - x.numel() / 2 * np.log(2 * np.pi), rel=1e-9)
    assert torch.equal(result.draws["z"], pair.encode(x).detach().expand(50, -1, -1))
    assert result.idata.posterior["z"].dims == ("chain", "draw", "rows", "factors")
    assert result.diagnosis.pareto_k is None
    drawn = inference.posterior_predictive(result)["x"]
    assert_moments_agree((drawn - torch.tensor(best)).flatten(0, 1), torch.zeros(13), torch.eye(13))


def test_the_prior_of_the_autoencoder_scores_nothing_and_draws_standard_normals() -> None:
    pair = autoencoder()
    drawn = inference.prior_predictive(pair, size=2, draws=20_000)
    assert_moments_agree(drawn["z"].flatten(1), torch.zeros(4), torch.eye(4))
    noise = drawn["x"] - pair.decode(drawn["z"])
    assert_moments_agree(noise.flatten(1), torch.zeros(10), torch.eye(10))
    trace = poutine.trace(pair.model).get_trace(random(3, 5))
    assert trace.log_prob_sum(lambda name, _: name == "z") == 0


def test_a_code_may_be_wider_than_the_rows_and_a_network_without_parameters() -> None:
    pair = autoencoder(2, 3, encoder=nn.Linear(2, 3), decoder=nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    assert pair.model(size=4).shape == (4, 2)
    plain = Autoencoder(4, 4, encoder=nn.Identity(), decoder=nn.Identity())
    x = random(6, 4).float()
    assert Trace_ELBO().loss(plain.model, plain.guide, x) == pytest.approx(6 * 4 / 2 * np.log(2 * np.pi), rel=1e-6)


def test_trying_a_network_leaves_it_as_it_was() -> None:
    """Batch statistics, training mode, random state; one row in training mode would be refused."""
    encoder = nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    encoder[0].eval()
    decoder = PyroModule[nn.Linear](2, 5)
    before = {name: v.clone() for name, v in encoder.state_dict().items()}
    state = torch.get_rng_state()
    Autoencoder(5, 2, encoder=encoder, decoder=decoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in encoder] == [False, True, True]
    assert encoder.training
    assert all(torch.equal(v, before[name]) for name, v in encoder.state_dict().items())


# Bad input: one clear line


def refuses(act: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$") as raised:
        act()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("build", [lambda: make("fa"), lambda: make("ppca"), autoencoder])
def test_data_that_do_not_fit_are_refused_in_one_line(build: Callable[[], FactorModel]) -> None:
    x = random(6, 5)
    x[2, 3] = torch.nan
    for data, line in (
        (random(6, 4), r"x: expected \(rows, 5\), got \(6, 4\)"),
        (random(5), r"x: expected \(rows, 5\), got \(5,\)"),
        (random(0, 5), r"x: expected at least one row, got \(0, 5\)"),
        (x, r"x: expected finite numbers, got nan at row 2, column 3 \(1 in all\)"),
    ):
        refuses(lambda data=data: fit(build(), data), line)
        refuses(lambda data=data: inference.sample(build(), data, progress=False), line)
    refuses(lambda: build().model(), "size: expected the number of rows to draw when x is not given, got None")


@kinds
def test_numbers_of_factors_that_do_not_fit_are_refused(kind: str) -> None:
    refuses(lambda: CLASSES[kind](3, 4), r"factors: expected at most 3 \(the features\), got 4")
    refuses(lambda: CLASSES[kind](2, ["a", "b", "c"]), r"factors: expected at most 2 \(the features\), got 3")
    refuses(lambda: CLASSES[kind](0, 0), "features: expected at least one, got 0")
    refuses(lambda: CLASSES[kind](3, 0), "factors: expected at least one, got 0")
    assert bind(CLASSES[kind](3, 3), random(6, 3)).sites["z"].shape == (6, 3)


def test_a_closed_form_without_noise_is_refused_and_changes_nothing() -> None:
    pair = make("ppca")
    before = {name: v.clone() for name, v in pair.state_dict().items()}
    flat = random(40, 2) @ random(2, 5, seed=1)
    same = torch.ones(3, 5).double()
    for x in (flat, same, random(1, 5), flat.float()):
        line = "x: expected rows that vary in more than 2 directions, got no other"
        refuses(lambda x=x: pair.closed_form(x), line)
    refuses(lambda: pair.closed_form(random(6, 4)), r"x: expected \(rows, 5\), got \(6, 4\)")
    line = r"factors: expected fewer than 3 \(the features\), got 3"
    refuses(lambda: PPCA(3, 3).closed_form(random(6, 3)), line)
    refuses(lambda: PPCA(1, 1).closed_form(random(6, 1)), line.replace("3", "1"))
    assert all(torch.equal(v, before[name]) for name, v in pair.state_dict().items())


class Pairwise(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("networks", "line"),
    [
        ({"encoder": nn.Linear(5, 3)}, r"encoder: expected outputs of width 2, got \(1, 3\)"),
        ({"encoder": nn.Linear(5, 3).double()}, r"encoder: expected outputs of width 2, got \(1, 3\)"),
        ({"decoder": nn.Linear(2, 4)}, r"decoder: expected outputs of width 5, got \(1, 4\)"),
        ({"encoder": nn.Linear(4, 2)}, "encoder: expected inputs of width 5, got an error: mat1 and mat2 .*"),
        ({"decoder": nn.Linear(3, 5)}, "decoder: expected inputs of width 2, got an error: mat1 and mat2 .*"),
        ({"encoder": Pairwise()}, "encoder: expected outputs of width 2, got tuple"),
        ({"encoder": nn.Sequential(nn.Linear(5, 2), nn.Flatten(0))}, r"encoder: .* of width 2, got \(2,\)"),
    ],
)
def test_networks_that_do_not_fit_are_refused(networks: dict[str, nn.Module], line: str) -> None:
    refuses(lambda: Autoencoder(5, 2, **networks), line)
