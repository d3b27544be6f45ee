"""Missing entries: draws with the moments of the exact conditionals, and one line where a pair has none."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from inference import fit, impute
from inference.objectives import Adversarial
from ppl_models import (
    GAN,
    MADE,
    PPCA,
    VAE,
    BayesianNetwork,
    BernoulliMixture,
    BernoulliNaiveBayes,
    ConditionalVAE,
    FactorAnalysis,
    GaussianMixture,
    GaussianNaiveBayes,
    HierarchicalVAE,
    LogisticRegression,
    MarkovChain,
    MultinomialNaiveBayes,
)
from ppl_models.models import bayesian_network

NAN = math.nan
ROW = torch.tensor([[0.7, NAN, -0.4, NAN]])
DRAWS = 4000


def as_it_is(pair, data, **arguments):
    """The Result of a pair whose parameters stay where they are."""
    return fit(pair, data, steps=0, progress=False, **arguments)


def near(found: Tensor, mean, sd, *, draws: int = DRAWS) -> bool:
    """Whether the mean and the standard deviation of draws are those given, with room for their Monte Carlo error."""
    mean, sd = (torch.as_tensor(v).double() for v in (mean, sd))
    room, found = 6 * sd / draws**0.5, found.double()
    # The standard deviation of zeros and ones says nothing beyond their mean, and that of rare ones has a long tail.
    binary = bool(((found == 0) | (found == 1)).all())
    return bool(((found.mean(0) - mean).abs() < room).all() and (binary or ((found.std(0) - sd).abs() < room).all()))


def conditional(mean: np.ndarray, covariance: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the missing entries of a Gaussian row given the known ones."""
    m, o = np.isnan(row), ~np.isnan(row)
    gain = covariance[np.ix_(m, o)] @ np.linalg.inv(covariance[np.ix_(o, o)])
    return mean[m] + gain @ (row - mean)[o], covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(o, m)]


@pytest.mark.parametrize("family", [FactorAnalysis, PPCA])
def test_linear_factors_have_the_conditionals_of_their_gaussian(family: type) -> None:
    torch.manual_seed(0)
    pair = family(4, 2)
    pair.mean = torch.randn(4)
    found = impute(as_it_is(pair, torch.randn(5, 4)), torch.cat([ROW, ROW.nan_to_num(0.1)]), DRAWS)
    loadings = pair.loadings.detach().double().numpy()
    covariance = loadings @ loadings.T + np.diag(np.broadcast_to(pair.noise.detach().numpy(), 4))
    mean, rest = conditional(pair.mean.detach().double().numpy(), covariance, ROW[0].double().numpy())
    assert near(found.draws[:, 0, [1, 3]], mean, np.sqrt(np.diag(rest)))
    assert np.cov(found.draws[:, 0, [1, 3]].T)[0, 1] == pytest.approx(
        rest[0, 1], abs=6 * math.sqrt(rest[0, 0] * rest[1, 1] / DRAWS)
    )
    assert torch.equal(found.draws[:, 0, [0, 2]], ROW[:, [0, 2]].expand(DRAWS, 2))
    assert torch.equal(found.sd > 0, found.missing) and int(found.missing.sum()) == 2
    torch.testing.assert_close(found.error, found.sd / DRAWS**0.5)


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_mixtures_weigh_components_and_posterior_draws_by_the_known_entries(covariance: str) -> None:
    """Three posterior draws of two components: a mixture of six Gaussians, by numpy."""
    pair = GaussianMixture(4, components=2, covariance=covariance)
    shapes = {"full": (3, 2, 4), "tied": (3, 4), "diagonal": (3, 2, 4), "spherical": (3, 2, 1)}
    generator = torch.Generator().manual_seed(1)
    latents = {
        "weights": torch.rand(3, 2, generator=generator) + 0.2,
        "means": torch.randn(3, 2, 4, generator=generator),
        "scales": torch.rand(shapes[covariance], generator=generator) + 0.5,
    }
    latents["weights"] /= latents["weights"].sum(-1, keepdim=True)
    factors = torch.eye(4).expand(3, 2, 4, 4)
    if covariance in ("full", "tied"):
        factors = torch.linalg.cholesky(0.5 * torch.eye(4) + 0.5).expand(3, 2, 4, 4)
        latents["correlations"] = factors if covariance == "full" else factors[:, 0]
    torch.manual_seed(2)
    drawn = pair.impute(ROW, latents=latents, draws=DRAWS)[:, 0, [1, 3]]

    scales = (latents["scales"][:, None] if covariance == "tied" else latents["scales"]).expand(3, 2, 4).double()
    row, known = ROW[0].double().numpy(), ~ROW[0].isnan().numpy()
    chances, means, squares = [], [], []
    for s, k in itertools.product(range(3), range(2)):
        root = scales[s, k, :, None] * factors[s, k].double()
        mean, whole = latents["means"][s, k].double().numpy(), (root @ root.mT).numpy()
        seen = stats.multivariate_normal(mean[known], whole[np.ix_(known, known)]).pdf(row[known])
        chances.append(float(latents["weights"][s, k]) * seen)
        centre, rest = conditional(mean, whole, row)
        means.append(centre)
        squares.append(np.diag(rest) + centre**2)
    chances = np.array(chances) / sum(chances)
    mean = chances @ means
    assert near(drawn, mean, np.sqrt(chances @ squares - mean**2))


@pytest.mark.parametrize("family", [BernoulliNaiveBayes, BernoulliMixture])
def test_binary_features_by_enumeration(family: type) -> None:
    pair = family(3) if family is BernoulliNaiveBayes else family(3, components=2)
    weights, probs = torch.tensor([[0.3, 0.7], [0.6, 0.4]]), torch.tensor([0.9, 0.2, 0.5, 0.1]).repeat(3)
    latents = {"weights": weights, "probs": probs.reshape(2, 2, 3)}
    row = torch.tensor([[1.0, 0.0, NAN]])
    seen = weights * latents["probs"][..., 0] * (1 - latents["probs"][..., 1])
    for label in (None, 1):
        chances = seen if label is None else seen * torch.tensor([0.0, 1.0])
        exact = float((chances * latents["probs"][..., 2]).sum() / chances.sum())
        torch.manual_seed(0)
        labels = None if label is None else torch.tensor([label])
        drawn = pair.impute(row, labels, latents=latents, draws=DRAWS)[:, 0, 2]
        assert near(drawn, exact, math.sqrt(exact * (1 - exact)))


def test_naive_bayes_by_the_verb_takes_the_posterior_into_account() -> None:
    y = torch.tensor([0, 1]).repeat(20)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 4.0 * y[:, None]
    pair = GaussianNaiveBayes(2)
    result = as_it_is((pair.model, pair.exact), {"x": x, "y": y})
    rows = torch.tensor([[0.0, NAN], [4.0, NAN], [0.0, NAN]])
    free, told = impute(result, rows), impute(result, {"x": rows, "y": torch.tensor([0.0, NAN, 1.0])})
    assert (free.mean[:, 1] - torch.tensor([0.0, 4.0, 0.0])).abs().max() < 1
    assert (told.mean[:, 1] - torch.tensor([0.0, 4.0, 4.0])).abs().max() < 1
    frame = pd.DataFrame(rows.numpy())
    torch.testing.assert_close(impute(result, frame).draws, free.draws, equal_nan=True)


@pytest.mark.parametrize("joint", [1, 4, 4096])
def test_bayesian_networks_have_the_joint_distribution_of_the_missing(monkeypatch, joint: int) -> None:
    monkeypatch.setattr(bayesian_network, "MAX_JOINT", joint)
    tables = {"a": torch.tensor([0.7, 0.3]), "b": torch.tensor([[0.9, 0.1], [0.2, 0.8]])}
    tables["c"] = torch.tensor([[[0.5, 0.5], [0.1, 0.9]], [[0.6, 0.4], [0.95, 0.05]]])
    tables["d"] = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    pair = BayesianNetwork({"a": (), "b": ("a",), "c": ("a", "b"), "d": ("c",)}, tables=tables)
    drawn = impute(as_it_is(pair, torch.zeros(2, 4)), torch.tensor([[NAN, NAN, NAN, 1.0]]), DRAWS).draws[:, 0]
    cells = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    exact = pair.log_evidence(torch.cat([cells, torch.ones(8, 1)], -1)).softmax(0)
    share = (drawn[:, None, :3] == cells).all(-1).double()
    assert near(share, exact, (exact * (1 - exact)).sqrt())


def test_learnt_tables_are_their_posterior_means() -> None:
    pair = BayesianNetwork({"a": (), "b": ("a",)})
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    found = impute(as_it_is((pair.model, pair.exact), x, draws=4000), torch.tensor([[0.0, NAN]]), DRAWS)
    # Two zeros and a one beside the prior's one of each.
    assert float(found.mean[0, 1]) == pytest.approx(2 / 5, abs=0.06)


def grid(pair: VAE, row: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of the missing entries of a row of a VAE of one factor, by quadrature."""
    z = torch.linspace(-6, 6, 4001)[:, None]
    likelihood = pair.likelihood(z).base_dist
    seen = ~row.isnan()
    density = likelihood.log_prob(row.nan_to_num())[:, seen].sum(-1) - z[:, 0] ** 2 / 2
    weights = density.double().softmax(0)[:, None]
    mean = likelihood.mean[:, ~seen].double()
    square = likelihood.variance[:, ~seen].double() + mean**2
    first = (weights * mean).sum(0)
    return first.detach(), ((weights * square).sum(0) - first**2).sqrt().detach()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_a_vae_has_the_right_distribution_whatever_its_guide(likelihood: str) -> None:
    """Model and guide of random weights: the guide is wrong, and so are draws of which every proposal is taken."""
    torch.manual_seed(5)
    pair = VAE(4, 1, hidden=(5,), likelihood=likelihood)
    with torch.no_grad():
        for weight in pair.decoder.parameters():
            weight *= 2.0
        for weight in pair.encoder.parameters():
            weight *= 0.5
    if likelihood == "gaussian":
        pair.noise = torch.tensor(0.3)
    row = ROW if likelihood == "gaussian" else torch.tensor([[1.0, NAN, 0.0, NAN]])
    result = as_it_is(pair, row.nan_to_num().repeat(3, 1))
    found = impute(result, row.repeat(2, 1), 2000, steps=150)
    assert found.method == "Metropolis within Gibbs" and found.r_hat < 1.2
    exact = grid(pair, row[0])
    for n in range(2):
        assert near(found.draws[:, n, [1, 3]], *exact, draws=2000)
    again = impute(result, row.repeat(2, 1), 2000, steps=150)
    assert torch.equal(again.draws, found.draws)


def test_a_proposal_is_weighed_by_the_density_of_the_guide() -> None:
    """z ~ N(0, 1), x_1, x_2 ~ N(z, 1): x_2 given x_1 is N(x_1 / 2, 1.5), though the guide is at 1.5 whatever x is."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(1.5 + 0 * x[:, 0], 1.2))

    found = impute(as_it_is((model, guide), torch.zeros(3, 2)), torch.tensor([[-1.0, NAN]]), 2000, steps=100)
    assert near(found.draws[:, 0, 1:], torch.tensor([-0.5]), torch.tensor([1.5**0.5]), draws=2000)


def test_entries_that_depend_on_one_another_are_not_drawn_at_once() -> None:
    """x_2 ~ N(x_1 + z, 1) reads x_1 from the data, so that x_1 given z and x_2 is not what the model draws it from."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            mean = torch.stack([z, x[:, 0] + z], -1)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    with pytest.raises(ValueError, match="whose entries of x depend on one another given the latent sites"):
        impute(as_it_is((model, guide), torch.zeros(3, 2)), torch.tensor([[NAN, 1.0]]), 10, steps=2)


def test_guides_of_several_sites_and_labels_are_taken() -> None:
    torch.manual_seed(0)
    rows = torch.tensor([[1.0, NAN, 0.0, 1.0], [NAN, NAN, 0.0, 0.0]])
    filled = rows.nan_to_num()
    for pair, more in (
        (HierarchicalVAE(4, (2, 2), hidden=(3,), between=(3,)), {}),
        (ConditionalVAE(4, 2, 3, hidden=(3,)), {"y": torch.tensor([0, 2])}),
    ):
        found = impute(as_it_is(pair, {"x": filled, **more}), {"x": rows, **more}, 20, steps=10)
        assert found.draws.shape == (20, 2, 4) and set(found.draws.unique().tolist()) == {0.0, 1.0}
        assert 0 < float(found.acceptance.mean()) <= 1
        assert "Metropolis within Gibbs" in str(found)


def test_autoregressive_pairs_impute_by_themselves() -> None:
    row = torch.tensor([[1.0, 0.0, NAN, NAN]])
    for pair in (MADE(4, hidden=(3,)), MarkovChain(4, 2)):
        found = impute(as_it_is(pair, row.nan_to_num()), row, 30)
        assert found.draws.shape == (30, 1, 4) and found.method == "conditional" and math.isnan(found.r_hat)
        assert torch.equal(found.draws[:, 0, :2], row[:, :2].expand(30, 2))


def correlated(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.MultivariateNormal(z[:, None].expand(-1, 2), torch.eye(2) + 0.5), obs=x)


def of_rows(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(len(x)))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(loc, 1.0))


def test_where_it_makes_no_sense_there_is_one_line() -> None:
    x, y = torch.rand(6, 2).round(), torch.tensor([0, 1, 0, 1, 0, 1])
    refused: Mapping[str, tuple] = {
        "a guide of new rows, got LogisticRegression": (LogisticRegression(2), {"x": x, "y": y}, {}),
        "independent features to impute": (MultinomialNaiveBayes(2), {"x": x, "y": y}, {}),
        "a model with a likelihood, got GAN": (GAN(2, hidden=(3,)), {"x": x}, {"objective": Adversarial()}),
        "got correlated": ((correlated, of_rows), {"x": x}, {}),
    }
    for said, (pair, data, arguments) in refused.items():
        result = fit(pair, data, steps=1, progress=False, **arguments)
        gaps = {**data, "x": x[:3].masked_fill(torch.eye(3, 2, dtype=torch.bool), NAN)}
        with pytest.raises(ValueError, match="^result: expected .*") as error:
            impute(result, {n: v[:3] for n, v in gaps.items()})
        assert said in str(error.value) and "\n" not in str(error.value)
