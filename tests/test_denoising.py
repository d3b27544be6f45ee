"""Rows through noise: the moments of exact posteriors, and one line where a pair has none."""

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import Denoised, denoise, fit, super_resolve
from inference.objectives import Adversarial, Denoising
from ppl_models import (
    GAN,
    NADE,
    PPCA,
    VAE,
    BernoulliMixture,
    BernoulliNaiveBayes,
    DiffusionChain,
    FactorAnalysis,
    GaussianMixture,
    GaussianNaiveBayes,
    HelmholtzMachine,
    MultinomialNaiveBayes,
    inverse,
)

SEEN = torch.tensor([[0.7, -0.4], [1.5, 2.0]])
POOL = torch.tensor([[0.5, 0.5]])


def as_it_is(pair: Any, data: Any, **arguments: Any) -> Any:
    return fit(pair, data, steps=0, progress=False, **arguments)


def gaussian(mean: Tensor, covariance: Tensor, seen: Tensor, sd: float, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of Gaussian rows given A x with noise."""
    mean, covariance, matrix = (v.detach().double() for v in (mean, covariance, matrix))
    gain = covariance @ matrix.mT @ torch.linalg.inv(matrix @ covariance @ matrix.mT + sd**2 * torch.eye(len(matrix)))
    centre = mean + (seen.double() - matrix @ mean) @ gain.mT
    return centre, (covariance - gain @ matrix @ covariance).diagonal().sqrt()


def by_quadrature(density: Any, seen: Tensor, sd: float, matrix: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of a plane's rows given A x with noise, on a grid."""
    axis = torch.linspace(-7, 7, 501).double()
    grid = torch.cartesian_prod(axis, axis)
    told = dist.Normal(seen.double(), sd).log_prob(grid @ matrix.double().mT).sum(-1)
    weight = (density(grid) + told).softmax(0)
    mean = weight @ grid
    return mean.numpy(), (weight @ grid**2 - mean**2).sqrt().numpy()


@pytest.mark.parametrize("family", [FactorAnalysis, PPCA])
@pytest.mark.parametrize("pooled", [False, True])
def test_linear_factors_have_the_moments_of_their_gaussian(family: type, pooled: bool) -> None:
    torch.manual_seed(0)
    pair, x = family(4, 2), torch.randn(5, 4)
    pair.mean = torch.randn(4)
    matrix = torch.eye(4).reshape(2, 2, 4).mean(1) if pooled else torch.eye(4)
    seen = x @ matrix.mT
    result = as_it_is(pair, x)
    found = super_resolve(result, seen, matrix, sd=0.3) if pooled else denoise(result, seen, sd=0.3)
    covariance = pair.loadings @ pair.loadings.mT + pair.noise.expand(4).diag()
    mean, sd = gaussian(pair.mean, covariance, seen, 0.3, matrix)
    torch.testing.assert_close(found.mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sd, sd.expand(5, 4), atol=1e-4, rtol=1e-4)
    assert not found.error.any() and found.method == "conditional"


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_mixtures_by_quadrature(covariance: str, pooled: bool) -> None:
    pair = GaussianMixture(2, components=2, covariance=covariance)
    shape = {"full": (3, 2, 2), "tied": (3, 2), "diagonal": (3, 2, 2), "spherical": (3, 2, 1)}[covariance]
    generator = torch.Generator().manual_seed(1)
    latents = {
        "weights": torch.tensor([[0.3, 0.7], [0.6, 0.4], [0.5, 0.5]]),
        "means": torch.randn(3, 2, 2, generator=generator),
        "scales": torch.rand(shape, generator=generator) + 0.5,
    }
    factors = torch.eye(2).expand(3, 2, 2, 2)
    if covariance in ("full", "tied"):
        factors = torch.linalg.cholesky(0.5 * torch.eye(2) + 0.5).expand(3, 2, 2, 2)
        latents["correlations"] = factors if covariance == "full" else factors[:, 0]
    scales = (latents["scales"][:, None] if covariance == "tied" else latents["scales"]).expand(3, 2, 2)
    components = dist.MultivariateNormal(latents["means"].double(), scale_tril=(scales[..., None] * factors).double())

    def density(x: Tensor) -> Tensor:
        return (components.log_prob(x[:, None, None]) + latents["weights"].log()).flatten(1).logsumexp(1)

    matrix = POOL if pooled else torch.eye(2)
    seen = SEEN @ matrix.mT
    found = pair.restore(seen, latents=latents, sd=0.5, matrix=matrix if pooled else None)
    for n, row in enumerate(seen):
        mean, sd = by_quadrature(density, row, 0.5, matrix)
        np.testing.assert_allclose(found[0][n], mean, atol=2e-3)
        np.testing.assert_allclose(found[1][n], sd, atol=2e-3)


@pytest.mark.parametrize("noise", [{"flips": 0.2}, {"sd": 0.7}])
@pytest.mark.parametrize("family", [BernoulliNaiveBayes, BernoulliMixture])
def test_binary_rows_by_enumeration(family: type, noise: dict[str, float]) -> None:
    pair = family(3) if family is BernoulliNaiveBayes else family(3, components=2)
    weights, probs = torch.tensor([[0.3, 0.7], [0.6, 0.4]]), torch.tensor([0.9, 0.2, 0.5, 0.1]).repeat(3)
    latents = {"weights": weights, "probs": probs.reshape(2, 2, 3)}
    seen = torch.tensor([[1.0, 0.0, 1.0]]) if "flips" in noise else torch.tensor([[0.9, -0.3, 1.4]])
    for label in (None, 1):
        chances = weights if label is None else weights * torch.tensor([0.0, 1.0])
        total, first = 0.0, torch.zeros(3)
        for x in map(torch.tensor, itertools.product((0.0, 1.0), repeat=3)):
            clean = (chances * torch.where(x == 1, latents["probs"], 1 - latents["probs"]).prod(-1)).sum()
            if "flips" in noise:
                told = torch.where(seen[0] == x, 0.8, 0.2).prod()
            else:
                told = (-((seen[0] - x) ** 2).sum() / 2 / 0.7**2).exp()
            total, first = total + clean * told, first + clean * told * x
        labels = None if label is None else torch.tensor([label])
        mean, sd, _ = pair.restore(seen, labels, latents=latents, **noise)
        torch.testing.assert_close(mean[0], first / total, atol=1e-5, rtol=0)
        torch.testing.assert_close(sd, (mean * (1 - mean)).sqrt(), atol=1e-5, rtol=0)


def test_naive_bayes_by_the_verb_knows_labels_that_are_given() -> None:
    y = torch.tensor([0, 1]).repeat(20)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + 4.0 * y[:, None]
    pair = GaussianNaiveBayes(2)
    result = as_it_is((pair.model, pair.exact), {"x": x, "y": y}, draws=100)
    between = torch.full((2, 2), 2.0)
    found = denoise(result, {"x": between, "y": torch.tensor([0.0, 1.0])}, sd=2.0)
    assert (found.mean[0] < 1.5).all() and (found.mean[1] > 2.5).all()


def linear(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(-1, 2), 0.5).to_event(1), obs=x)


def roughly(x: Tensor) -> None:
    """The posterior of z, somewhat off and too wide."""
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.4 * x.sum(-1), 0.5))


@pytest.mark.parametrize("pooled", [False, True])
def test_model_and_guide_in_turn_have_the_exact_moments(pooled: bool) -> None:
    matrix = POOL if pooled else torch.eye(2)
    seen = SEEN @ matrix.mT
    result = as_it_is((linear, roughly), torch.zeros(4, 2))
    arguments: dict[str, Any] = {"sd": 0.8, "draws": 200, "steps": 60}
    found = super_resolve(result, seen, matrix, **arguments) if pooled else denoise(result, seen, **arguments)
    mean, sd = gaussian(torch.zeros(2), torch.ones(2, 2) + 0.25 * torch.eye(2), seen, 0.8, matrix)
    assert ((found.mean - mean).abs() < 6 * found.error + 1e-3).all() and float(found.error.max()) < 0.1
    torch.testing.assert_close(found.sd, sd.expand(2, 2), rtol=0.1, atol=0)
    assert found.method == "Metropolis within Gibbs" and found.r_hat < 1.2


@pytest.mark.parametrize("noise", [{"flips": 0.2}, {"sd": 0.7}])
def test_a_belief_net_by_enumeration(noise: dict[str, float]) -> None:
    torch.manual_seed(0)
    pair = HelmholtzMachine(3, (2,))
    for weight in [*pair.weights, *pair.recognition]:
        weight.data.mul_(2)
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    clean = pair.log_evidence(states).detach()
    seen = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = denoise(as_it_is(pair, states), seen, draws=200, steps=60, **noise)
    for n, row in enumerate(seen):
        agrees = (states == row).float()
        told = torch.where(agrees == 1, 0.8, 0.2).log() if "flips" in noise else -((row - states) ** 2) / 2 / 0.7**2
        mean = (clean + told.sum(-1)).softmax(0) @ states
        assert ((found.mean[n] - mean).abs() < 6 * found.error[n] + 1e-3).all()
        torch.testing.assert_close(found.sd[n], (mean * (1 - mean)).sqrt().double(), atol=0.05, rtol=0)
    assert float(found.error.max()) < 0.05


def test_a_chain_goes_down_from_the_step_of_the_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2) * 0.1 + torch.tensor([1.0, -1.0])
    pair = DiffusionChain(2, steps=30, hidden=(32,), prediction="sample")
    result = fit(pair, x, Denoising(30, simple=True), steps=400, batch=100, progress=False)
    seen = x[:20] + 0.5 * torch.randn(20, 2)
    found = denoise(result, seen, sd=0.5, draws=200)
    tweedie = inverse.posterior_mean(pair, seen, 0.5)
    assert ((found.mean - x[:20]).square().mean() < 0.25 * (seen - x[:20]).square().mean()).item()
    assert ((found.mean - tweedie).abs() < 6 * found.error + 0.1).all()
    low = super_resolve(result, x[:5] @ POOL.mT, POOL, sd=0.1, draws=20)
    assert low.mean.shape == (5, 2) and (low.mean @ POOL.double().mT - x[:5] @ POOL.mT).abs().max() < 0.3


X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "sd: expected either it or flips, got neither": (lambda: PPCA(4, 1), {}),
    "sd: expected either it or flips, got both": (lambda: PPCA(4, 1), {"sd": 1.0, "flips": 0.1}),
    "flips: expected a pair of binary rows, got 0.1 for continuous": (lambda: PPCA(4, 1), {"flips": 0.1}),
    "flips: expected a pair of binary rows, got 0.2 for continuous": (
        lambda: VAE(4, 1, hidden=(3,), likelihood="gaussian"),
        {"flips": 0.2},
    ),
    "result: expected a pair with binary or normal entries, got ContinuousBernoulli": (
        lambda: VAE(4, 1, hidden=(3,), likelihood="continuous_bernoulli"),
        {"sd": 0.2},
    ),
    "result: expected a pair that knows its conditionals, or a guide of new rows, got NADE": (
        lambda: NADE(4, hidden=3),
        {"sd": 0.2},
    ),
    "result: expected independent features to impute or denoise, got those of M": (
        lambda: MultinomialNaiveBayes(4),
        {"sd": 0.2},
    ),
    "result: expected a model with a likelihood, got GAN": (lambda: GAN(4, hidden=(3,)), {"sd": 0.2}),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_is_refused_is_said_in_one_line(says: str) -> None:
    make, noise = REFUSED[says]
    pair = make()
    x = X.round() if isinstance(pair, NADE | MultinomialNaiveBayes) else X
    data = {"x": x, "y": torch.tensor([0, 1]).repeat(3)} if isinstance(pair, MultinomialNaiveBayes) else x
    objective = {"objective": Adversarial()} if isinstance(pair, GAN) else {}
    result = fit(pair, data, steps=1, draws=2, progress=False, **objective)
    with pytest.raises(ValueError, match=f"^{says}") as refusal:
        denoise(result, x.round() if "flips" in noise else x, **noise)
    assert "\n" not in str(refusal.value)


def test_binary_rows_have_no_closed_form_of_sums() -> None:
    matrix = torch.eye(2).repeat_interleave(2, 1) / 2
    for pair in (BernoulliMixture(4, components=2), VAE(4, 1, hidden=(3,))):
        result = fit(pair, X.round(), steps=1, draws=2, progress=False)
        with pytest.raises(ValueError, match=r"^(matrix|result): expected (none for binary rows|a pair with no)"):
            super_resolve(result, X @ matrix.mT, matrix)


def test_what_denoised_says_of_itself() -> None:
    rows = torch.ones(3, 2).double()
    assert str(Denoised(rows, rows * 0.5, rows * 0)) == "3 rows of 2 columns, mean sd 0.5 (conditional)"
    stuck = Denoised(rows, rows, rows, "Metropolis within Gibbs", torch.full((3,), 0.1), 1.3)
    assert str(stuck).endswith("R-hat 1.30, 10% of proposals accepted); the chains are too short: raise steps")
    assert math.isnan(Denoised(rows, rows, rows).r_hat)
