"""Mixtures: EM against scikit-learn and by hand, the ordered prior, chains, labels, what is refused."""

import math
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as Theirs
from torch import Tensor
from torch.distributions import biject_to

from inference import classify, fit, pointwise_log_likelihood, prior_predictive, sample
from inference.core.handlers import isolated
from inference.kernels import NUTS
from inference.objectives import EM
from ppl_models.models.mixture import COVARIANCES, BernoulliMixture, GaussianMixture
from ppl_models.models.parts.distributions import Gaussians, Occurrences, SortedNormals
from ppl_models.zoo import methods

X = torch.tensor(load_iris().data)
X = (X - X.mean(0)) / X.std(0)
ZEROS_ONES = (X > 0).double()
THEIR_NAMES = {"diagonal": "diag"}


def em(pair, x: Tensor, steps: int = 30, start: Tensor | None = None, **arguments):
    objective = EM(pair.maximise, pair.start(x) if start is None else start, max_plate_nesting=1)
    return fit(pair, x, objective, steps=steps, draws=1, progress=False, **arguments)


def points(components: int, features: int = 4, **arguments) -> GaussianMixture:
    return GaussianMixture(features, components=components, prior=False, guide=AutoDelta, **arguments).double()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_is_that_of_scikit_learn_step_by_step(covariance: str) -> None:
    pair = points(3, covariance=covariance, floor=0.0)
    start = pair.start(X)

    class FromHere(Theirs):
        def _initialize_parameters(self, x, *_, **__):
            self._initialize(x, start.numpy())

    kind = THEIR_NAMES.get(covariance, covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs = FromHere(3, covariance_type=kind, reg_covar=0, tol=0, max_iter=25).fit(X.numpy())
    result = em(pair, X, 25, start)
    ours = {n: v[0].numpy() for n, v in result.draws.items() if n != "z"}
    order = theirs.means_[:, 0].argsort()
    np.testing.assert_allclose(ours["weights"], theirs.weights_[order], atol=1e-6)
    np.testing.assert_allclose(ours["means"], theirs.means_[order], atol=1e-6)
    expected = theirs.covariances_ if covariance == "tied" else theirs.covariances_[order]
    if "correlations" in ours:
        roots = ours["scales"][..., None] * ours["correlations"]
        covariances = roots @ np.swapaxes(roots, -1, -2)
    else:
        covariances = ours["scales"].reshape(expected.shape) ** 2
    np.testing.assert_allclose(covariances, expected, atol=1e-6)
    np.testing.assert_allclose(pointwise_log_likelihood(result)[0], theirs.score_samples(X.numpy()), atol=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_likelihood_never_falls(covariance: str) -> None:
    # Three groups of 200 rows, far enough apart that no component is left with a few rows.
    rows = torch.randn(3, 200, 4).double() + torch.tensor([-3.0, 0.0, 3.0])[:, None, None]
    # Responsibilities that are mostly right: at random ones EM starts near a saddle.
    random = torch.distributions.Dirichlet(torch.ones(3).double()).sample((600,))
    start = 0.3 * random + 0.7 * torch.eye(3).double().repeat_interleave(200, 0)
    losses = em(points(3, covariance=covariance), rows.flatten(0, 1), 60, start).losses
    assert (np.diff(losses) <= 1e-9 * abs(losses[0])).all()
    assert losses[0] - losses[-1] > 100


def test_two_components_in_one_dimension() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(4000, 1) * 0.5 - 2, torch.randn(6000, 1) + 1]).double()
    result = em(points(2, 1), x, 200)
    found = {n: v[0].flatten() for n, v in result.draws.items() if n != "z"}
    # Standard errors of these estimates at 10,000 rows are about 0.005, 0.01 to 0.02 and 0.01.
    torch.testing.assert_close(found["weights"], torch.tensor([0.4, 0.6]).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(found["means"], torch.tensor([-2.0, 1.0]).double(), atol=0.08, rtol=0)
    torch.testing.assert_close(found["scales"], torch.tensor([0.5, 1.0]).double(), atol=0.05, rtol=0)


@pytest.mark.parametrize("prior", [False, True])
def test_the_method_of_the_zoo_leaves_the_pair_as_it_was(prior: bool) -> None:
    pair = GaussianMixture(4, components=3, prior=prior).double()
    before = {n: v.clone() for n, v in pair.state_dict().items()}
    result = methods.em(pair, {"x": X}, steps=30, draws=1, progress=False)
    assert pair.prior is prior
    assert all(torch.equal(v, before[n]) for n, v in pair.state_dict().items())
    # With or without, the estimate is the maximum of the likelihood.
    direct = em(points(3), X)
    torch.testing.assert_close(result.draws["means"], direct.draws["means"])


@pytest.mark.parametrize("prior", [False, True])
def test_a_bernoulli_mixture_by_em_is_em_by_hand(prior: bool) -> None:
    pair = BernoulliMixture(4, components=3, alpha=0.7, concentration=2.5, prior=prior, guide=AutoDelta).double()
    start, x = pair.start(ZEROS_ONES, seed=1), ZEROS_ONES.numpy()
    smooth, extra = (0.7, 1.5) if prior else (0.0, 0.0)
    r, losses = start.numpy(), []
    for _ in range(6):
        counts = r.sum(0)
        w = (counts + extra) / (counts + extra).sum()
        p = ((r.T @ x + smooth) / (counts[:, None] + 2 * smooth)).clip(1e-7, 1 - 1e-7)
        joint = x @ np.log(p).T + (1 - x) @ np.log1p(-p).T + np.log(w)
        evidence = logsumexp(joint, 1)
        losses.append(-evidence.sum())
        r = np.exp(joint - evidence[:, None])
    result = em(pair, ZEROS_ONES, 5, start)
    if prior:
        assert result.losses[-1] < result.losses[0]
        assert -float(pointwise_log_likelihood(result)[0].sum()) == pytest.approx(losses[-1], abs=1e-6)
    else:
        np.testing.assert_allclose(result.losses, losses[:-1], rtol=1e-7)
    np.testing.assert_allclose(result.draws["probs"][0], p, atol=1e-6)
    np.testing.assert_allclose(result.draws["weights"][0], w, atol=1e-6)


def test_with_a_prior_the_loss_of_em_is_the_joint_density() -> None:
    pair = BernoulliMixture(4, components=3, alpha=0.7, concentration=2.5, guide=AutoDelta).double()
    before, after = (em(pair, ZEROS_ONES, steps, pair.start(ZEROS_ONES)) for steps in (5, 6))
    point = before.draws
    priors = dist.Beta(1.7, 1.7).log_prob(point["probs"][0]).sum()
    priors += dist.Dirichlet(torch.full((3,), 2.5).double()).log_prob(point["weights"][0])
    expected = -float(pointwise_log_likelihood(before)[0].sum() + priors)
    assert after.losses[-1] == pytest.approx(expected, rel=1e-7)
    assert (np.diff(after.losses) <= 0).all()


def test_sorted_normals_have_the_density_of_sorted_draws() -> None:
    mean, scale = torch.tensor([0.5, -1.0]).double().expand(3, 2), torch.tensor([1.5, 0.3]).double().expand(3, 2)
    law = SortedNormals(mean, scale)
    torch.manual_seed(0)
    draws = law.sample((20000,))
    assert bool(law.support.check(draws).all())
    assert not bool(law.support.check(draws.flip(-2)).any())
    # The least of three normals: its distribution function is 1 - (1 - F)^3.
    points = norm.ppf([0.1, 0.3, 0.5], 0.5, 1.5)
    expected = 1 - (1 - np.array([0.1, 0.3, 0.5])) ** 3
    got = (draws[:, 0, 0].numpy()[:, None] < points).mean(0)
    assert np.abs(got - expected).max() < 4 * (0.25 / 20000) ** 0.5
    by_hand = dist.Normal(mean, scale).log_prob(draws[:5]).sum((-1, -2)) + math.log(6)
    torch.testing.assert_close(law.log_prob(draws[:5]), by_hand)


def test_the_order_has_a_bijection_with_the_right_jacobian() -> None:
    transform = biject_to(SortedNormals.support)
    x = torch.randn(3, 2, dtype=torch.float64)
    y = transform(x)
    assert bool(SortedNormals.support.check(y))
    torch.testing.assert_close(transform.inv(y), x)
    jacobian = torch.autograd.functional.jacobian(lambda v: transform(v.reshape(3, 2)).flatten(), x.flatten())
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobian)[1])


@pytest.mark.parametrize("correlated", [False, True])
def test_gaussians_are_torchs(correlated: bool) -> None:
    torch.manual_seed(0)
    mean, x = torch.randn(3, 1, 2).double(), torch.randn(5, 2).double()
    root = torch.randn(3, 1, 2, 2).double().tril() + 2 * torch.eye(2).double()
    if not correlated:
        root = torch.diag_embed(root.diagonal(dim1=-2, dim2=-1))
    law = dist.MultivariateNormal(mean, scale_tril=root * root.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])
    level = 0.5 * torch.logdet(2 * math.pi * law.covariance_matrix)
    inverse = torch.linalg.inv(root).flatten(-2) if correlated else 1 / root.diagonal(dim1=-2, dim2=-1)
    ours = Gaussians(mean, inverse, level)
    torch.testing.assert_close(ours.log_prob(x), law.log_prob(x))
    torch.testing.assert_close(ours.expand((3, 5)).log_prob(x), law.log_prob(x))
    draws = ours.sample((40000,))[:, 0, 0]
    torch.testing.assert_close(draws.T.cov(), law.covariance_matrix[0, 0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("shape", [(4,), (3, 1, 4), (2, 3, 1, 4), (5, 4), (3, 5, 4)])
def test_occurrences_are_bernoullis(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits, x = torch.randn(shape).double(), (torch.rand(5, 4) > 0.5).double()
    ours = Occurrences(logits, -torch.nn.functional.softplus(logits).sum(-1))
    expected = dist.Bernoulli(logits=logits).to_event(1).log_prob(x)
    torch.testing.assert_close(ours.log_prob(x), expected)
    wide = ours.expand(expected.shape)
    torch.testing.assert_close(wide.log_prob(x), expected)
    assert wide.sample().shape == (*expected.shape, 4)


def blobs() -> Tensor:
    torch.manual_seed(1)
    return torch.cat(
        [torch.randn(60, 2) * 0.3 + torch.tensor(c) for c in ([-2.0, 1.0], [0.0, -1.0], [2.0, 1.0])]
    ).double()


@pytest.mark.slow
def test_chains_on_the_marginal_agree_with_svi_and_find_the_components() -> None:
    x = blobs()
    pair = GaussianMixture(2, components=3, covariance="diagonal").double()
    result = sample(pair, x, warmup=300, draws=200, progress=False, compile=False)
    assert result.diagnosis.worst_r_hat < 1.01, result.diagnosis
    means = result.draws["means"].mean(0)
    truth = torch.stack([part.mean(0) for part in x.split(60)])
    # Each posterior sd is about 0.3 / sqrt(60), and the prior hardly pulls.
    torch.testing.assert_close(means, truth, atol=0.08, rtol=0)
    labels = classify(result, x, label="z").argmax(-1)
    assert torch.equal(labels, torch.arange(3).repeat_interleave(60))
    drawn = result.idata.posterior["z"].values
    assert (drawn.reshape(-1, 180)[-1] == labels.numpy()).mean() > 0.98
    svi = fit(
        GaussianMixture(2, components=3, covariance="diagonal").double(),
        x,
        steps=1000,
        draws=200,
        progress=False,
        compile=False,
    )
    torch.testing.assert_close(svi.draws["means"].mean(0), means, atol=0.1, rtol=0)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_prior_draws_keep_the_order(covariance: str) -> None:
    pair = GaussianMixture(3, components=4, covariance=covariance).double()
    draws = prior_predictive(pair, size=6, draws=50)
    first = draws["means"][:, :, 0]
    assert bool((first[:, 1:] > first[:, :-1]).all())
    assert draws["x"].shape == (50, 6, 3)


def test_a_component_that_collapses_is_said_and_held_at_the_floor() -> None:
    x = torch.cat([torch.randn(50, 2).double(), torch.full((3, 2), 9.0).double()])
    pair = points(2, 2, covariance="full", floor=0.01)
    with pytest.warns(UserWarning, match="scales: a component has collapsed; .* set to the floor 0.01"):
        result = em(pair, x, 20)
    assert float(result.draws["scales"].min()) == pytest.approx(0.01)


def test_a_component_that_dies_is_said() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).double()
    start = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).double()
    with pytest.warns(UserWarning, match=r"components: 1 have no rows left \(2\)"):
        points(3, 1, covariance="tied").maximise(start, x)


REFUSED = [
    (
        lambda: GaussianMixture(2, components=3, covariance="round"),
        "covariance: expected one of full, tied, diagonal, spherical",
    ),
    (lambda: GaussianMixture(2, components=3, scale=0.0), "scale: expected a positive number, got 0.0"),
    (lambda: GaussianMixture(2, components=3, floor=-1.0), "floor: expected zero or a positive number, got -1.0"),
    (lambda: GaussianMixture(2, components=0), "components: expected an integer of at least 1, got 0"),
    (lambda: BernoulliMixture(2, components=3, alpha=-1.0), "alpha: expected zero or a positive number, got -1.0"),
    (
        lambda: BernoulliMixture(2, components=3, concentration=0.0),
        "concentration: expected a positive number, got 0.0",
    ),
    (lambda: em(points(9, 2), X[:5, :2]), r"x: expected at least as many rows as components \(9\), got 5"),
    (lambda: em(points(2), X[:, :2]), r"x: expected \(rows, 4\), got \(150, 2\)"),
    (lambda: em(BernoulliMixture(4, components=2, guide=AutoDelta).double(), X), "x: expected zeros and ones, got"),
    (lambda: em(GaussianMixture(4, components=2, guide=AutoDelta).double(), X), "prior: expected False for EM"),
    (lambda: em(points(2), X, batch=10), "batch: EM expected all rows at every step"),
    (lambda: em(GaussianMixture(4, components=2, prior=False).double(), X), "guide: expected a point mass at weights"),
    (lambda: fit(points(2), {"x": X, "z": torch.full((150,), 7)}, progress=False), "z: expected labels 0 to 1, got 7"),
]


@pytest.mark.parametrize(("call", "line"), REFUSED, ids=[line[:24] for _, line in REFUSED])
def test_bad_input_gets_one_line(call: partial, line: str) -> None:
    with pytest.raises(ValueError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_step_of_em_with_a_plate_of_features_has_responsibilities_of_rows() -> None:
    """A mixture of products: the features' log densities add up to those of a row."""
    centres = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    x = torch.randn(3, 100) + 1

    def model(x: Tensor) -> None:
        rows = pyro.plate("rows", 100, dim=-1)
        with rows:
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        with rows, pyro.plate("features", 3, dim=-2):
            means = centres.T[torch.arange(3)[:, None], z]
            pyro.sample("x", dist.Normal(means, 1.0), obs=x)

    objective = EM(lambda *_: {}, max_plate_nesting=2)
    with isolated(0):
        trace, _ = next(iter(objective._get_traces(model, lambda x: None, (x,), {})))
        loss, responsibilities = objective.e_step(trace)
    joint = (
        torch.stack([dist.Normal(c[:, None], 1.0).log_prob(x).sum(0) for c in centres])
        + torch.tensor([[0.3], [0.7]]).log()
    )
    assert responsibilities.shape == (100, 2)
    torch.testing.assert_close(responsibilities, joint.softmax(0).T)
    assert loss == pytest.approx(-float(joint.logsumexp(0).sum()), rel=1e-5)


SHALLOW = partial(NUTS, max_tree_depth=3)


@pytest.mark.parametrize(
    "verb", [partial(fit, steps=20, draws=20), partial(sample, kernel=SHALLOW, chains=2, warmup=5, draws=5)]
)
def test_a_mixture_of_one_component_has_labels_of_zero(verb) -> None:
    pair = GaussianMixture(4, components=1)
    posterior = verb(pair, X[:20].float(), progress=False, compile=False).idata.posterior
    assert posterior["z"].shape[2:] == (20,) and (posterior["z"] == 0).all()
