"""Scores of outliers: exact densities, Monte Carlo errors that hold, and a false-alarm rate that is kept."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor

from inference import fit, outlier_score, sample
from inference.objectives import Adversarial
from inference.outliers import _threshold, conformal
from ppl_models import GAN, FactorAnalysis

ROWS = torch.randn(60, 3, generator=torch.Generator().manual_seed(3)).double() @ torch.randn(3, 3).double()


def located(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def latent(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def roughly(x: Tensor) -> None:
    """The posterior of z, somewhat off and too wide."""
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.7 * x, 0.6))


def test_scores_are_the_exact_densities_of_a_gaussian() -> None:
    torch.manual_seed(0)
    pair = FactorAnalysis(3, 1).double()
    result = fit(pair, ROWS[:40], steps=50, progress=False)
    found = outlier_score(result, ROWS[40:], calibration=ROWS[:40])
    loadings, noise = (result.params[n].numpy() for n in ("loadings", "noise"))
    gaussian = stats.multivariate_normal(result.params["mean"].numpy(), loadings @ loadings.T + np.diag(noise))
    np.testing.assert_allclose(found.scores, -gaussian.logpdf(ROWS[40:].numpy()), rtol=1e-6)
    np.testing.assert_allclose(found.calibration, -gaussian.logpdf(ROWS[:40].numpy()), rtol=1e-6)
    assert not found.errors.any()


def test_estimated_scores_are_within_their_errors() -> None:
    x = torch.linspace(-3, 3, 20).double()
    found = outlier_score(fit((latent, roughly), x, steps=0, progress=False), x, k=2000)
    exact = -stats.norm(0, math.sqrt(1.25)).logpdf(x.numpy())
    assert (found.errors > 0).all()
    assert (np.abs(found.scores.numpy() - exact) < 6 * found.errors.numpy()).all()


@pytest.mark.parametrize("by", ["guide", "chains"])
def test_scores_average_over_the_posterior(by: str) -> None:
    """The posterior predictive density of a normal with a conjugate mean."""
    x = torch.tensor([0.3, -0.5, 1.4, 0.2]).double()
    precision = 1 / 9 + len(x)
    mean, sd = float(x.sum()) / precision, precision**-0.5

    def posterior(x: Tensor) -> None:
        pyro.sample("loc", dist.Normal(torch.tensor(mean).double(), sd))

    if by == "guide":
        result = fit((located, posterior), x, steps=0, draws=2000, progress=False)
    else:
        result = sample(located, x, draws=100, warmup=100, chains=8, progress=False)
    new = torch.tensor([0.0, 1.0, 3.0]).double()
    found = outlier_score(result, new, calibration=torch.linspace(-2, 2, 99).double())
    exact = -stats.norm(mean, math.sqrt(1 + sd**2)).logpdf(new.numpy())
    assert (np.abs(found.scores.numpy() - exact) < 6 * found.errors.numpy()).all()
    assert float(found.errors.max()) < 0.3


def test_p_values_are_ranks() -> None:
    random = np.random.default_rng(0)
    # Whole numbers: ties count as not below.
    scores, known = random.integers(0, 9, 30), random.integers(0, 9, 12)
    by_hand = [(1 + sum(k >= s for k in known)) / (len(known) + 1) for s in scores]
    np.testing.assert_allclose(conformal(torch.tensor(scores), torch.tensor(known)), by_hand)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.29, 0.3, 0.5, 1.0])
def test_flagged_is_a_p_value_within_the_rate(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, known = torch.randn(200, generator=generator), torch.randn(99, generator=generator)
    scores = torch.cat([scores, known])
    # Integers, which are not rounded.
    within = (conformal(scores, known) * 100).round() <= round(100 * rate)
    assert torch.equal(scores > _threshold(known, rate), within)


def test_the_false_alarm_rate_is_kept_under_a_wrong_model() -> None:
    """Exponential rows under a normal model: false alarms of n = 19 rows are Binomial(repetitions, rate)."""
    x = dist.Exponential(1.0).sample(torch.Size([20_000 * 20])).double()
    result = fit((located, AutoNormal(located)), x[:50], steps=20, draws=1, progress=False)
    scores = outlier_score(result, x).scores.reshape(-1, 20)
    for rate in (0.05, 0.25):
        alarms = sum(bool(s[0] > _threshold(s[1:], rate)) for s in scores)
        low, high = stats.binom(len(scores), rate).ppf([1e-7, 1 - 1e-7])
        assert low <= alarms <= high


def test_what_is_asked_of_a_result_in_one_line() -> None:
    result = fit((located, AutoNormal(located)), ROWS[:, 0], steps=1, draws=5, progress=False)
    with pytest.raises(ValueError, match=r"^rate: expected at least 0\.016 with 60 calibration rows, got 0\.01"):
        outlier_score(result, ROWS[:3, 1], rate=0.01)
    assert "a lower bound" in str(outlier_score(result, ROWS[:3, 1]))
    assert "held-out" in str(outlier_score(result, ROWS[:3, 1], calibration=ROWS[:30, 2]))


def test_a_model_without_a_likelihood_is_refused() -> None:
    x = torch.randn(20, 2)
    result = fit(GAN(2, hidden=(3,)), x, steps=1, objective=Adversarial(), progress=False)
    with pytest.raises(ValueError, match=r"^result: expected a model with a likelihood, got GAN, which"):
        outlier_score(result, x)


def test_rows_that_a_mask_hides_are_no_rows() -> None:
    """A hidden row has a density of 1: it counts neither among the calibration rows nor as a row to score."""
    y, seen = torch.linspace(-1.0, 1.0, 20), torch.arange(20) >= 5

    def model(y: Tensor, seen: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor, seen: Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0, 0.2))

    result = fit((model, guide), {"y": y, "seen": seen}, steps=0, draws=50, progress=False)
    row = {"y": torch.tensor([3.0]), "seen": torch.tensor([True])}
    found = outlier_score(result, row, calibration={"y": y, "seen": seen}, rate=0.1)
    assert len(found.calibration) == 15
    assert found.p_values == pytest.approx([1 / 16])
    with pytest.raises(ValueError, match="data: expected rows that are seen, got one that a mask hides, row 1"):
        outlier_score(result, {"y": torch.zeros(2), "seen": torch.tensor([True, False])}, rate=0.1)


@pytest.mark.parametrize("latent", [False, True])
def test_hidden_rows_of_fitted_parameters_are_no_rows_either(latent: bool) -> None:
    y, seen = torch.linspace(-1.0, 1.0, 20), torch.arange(20) >= 5

    def model(y: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
            mean = pyro.sample("z", dist.Normal(0.0, 1.0)) if latent else pyro.param("m", torch.tensor(0.0))
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide(y: Tensor, seen: Tensor) -> None:
        if latent:
            with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
                pyro.sample("z", dist.Normal(y / 2, 0.5**0.5))

    result = fit((model, guide), {"y": y, "seen": seen}, steps=0, draws=20, progress=False)
    row = {"y": torch.tensor([9.0]), "seen": torch.tensor([True])}
    found = outlier_score(result, row, calibration={"y": y, "seen": seen}, rate=0.1)
    assert len(found.calibration) == 15
    assert found.p_values == pytest.approx([1 / 16])
