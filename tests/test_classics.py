"""Small data sets against what is published about them."""

import os

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import poisson

from ppl_models.data import classics, load


@pytest.mark.skipif("PPL_MODELS_DATA" not in os.environ, reason="PPL_MODELS_DATA is not set")
def test_a_posterior_of_posteriordb_comes_with_its_reference_draws() -> None:
    """Under flat priors the posterior means of the coefficients are the least squares estimate."""
    found = load("posteriordb/kidiq-kidscore_momhsiq", dtype=torch.float64)
    inputs = torch.stack([torch.ones(434, dtype=torch.float64), found.train["mom_hs"], found.train["mom_iq"]], 1)
    best = torch.linalg.lstsq(inputs, found.train["kid_score"][:, None]).solution[:, 0]
    assert set(found.reference) == {"beta[1]", "beta[2]", "beta[3]", "sigma"} and not found.test
    for k, value in enumerate(best):
        draws = found.reference[f"beta[{k + 1}]"]
        assert draws.shape == (10, 1000)
        assert abs(float(draws.mean() - value)) < 5 * float(draws.std()) / 100
    with pytest.raises(ValueError, match="^name: expected one of "):
        load("posteriordb/kidiq")


def test_rats_have_the_regression_lines_of_the_publication() -> None:
    """Gelfand et al. 1990 and the BUGS examples: a mean line of 242.5 + 6.19 (age - 22), noise of about 6.1."""
    inputs = np.stack([np.ones(5), np.array(classics.DAYS) - 22.0], 1)
    lines, *_ = np.linalg.lstsq(inputs, classics.RATS.T, rcond=None)
    noise = np.sqrt(((classics.RATS.T - inputs @ lines) ** 2).sum() / (30 * 3))
    np.testing.assert_allclose(lines.mean(1), [242.65, 6.186], atol=0.01)
    assert noise == pytest.approx(6.09, abs=0.1)


def test_answers_have_the_shares_and_the_likelihood_of_the_publication() -> None:
    """Thissen 1982: proportions right, and the log likelihood -2466.94 of the Rasch model at its estimates."""
    x = classics.answers()
    np.testing.assert_allclose(x.mean(0), [0.924, 0.709, 0.553, 0.763, 0.870], atol=1e-9)
    nodes, masses = np.polynomial.hermite_e.hermegauss(61)
    logits = 0.7551 * (nodes[:, None] - np.array([-3.6153, -1.3224, -0.3176, -1.7301, -2.7802]))
    scores = x @ logits.T - np.logaddexp(0, logits).sum(1) + np.log(masses / np.sqrt(2 * np.pi))
    assert logsumexp(scores, axis=1).sum() == pytest.approx(-2466.938, abs=0.01)


def test_earthquakes_have_the_likelihoods_of_the_publication() -> None:
    """Zucchini and MacDonald 2009: -391.9189 of one Poisson distribution; -342.3183 of a stationary chain of two states
    with means 15.472 and 26.125.
    """
    y = classics.EARTHQUAKES
    assert poisson(y.mean()).logpmf(y).sum() == pytest.approx(-391.9189, abs=1e-4)

    def loss(point: np.ndarray) -> float:
        means = np.cumsum(np.exp(point[:2]))
        leave, back = 1 / (1 + np.exp(-point[2:]))
        matrix = np.array([[1 - leave, leave], [back, 1 - back]])
        masses, total = poisson.pmf(y[:, None], means), 0.0
        alpha = np.array([back, leave]) / (back + leave) * masses[0]
        for mass in masses[1:]:
            total += np.log(alpha.sum())
            alpha = alpha / alpha.sum() @ matrix * mass
        return float(-total - np.log(alpha.sum()))

    found = minimize(loss, [2.7, 2.3, -2.5, -2.0], method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    assert found.fun == pytest.approx(342.3183, abs=1e-3)
    np.testing.assert_allclose(np.cumsum(np.exp(found.x[:2])), [15.472, 26.125], atol=0.01)


def test_the_nile_has_its_moments_and_the_variances_of_the_publication() -> None:
    """Durbin and Koopman 2001: a local level with variances 15,099 and 1,469; R's sd(Nile) is 169.2275."""
    y = classics.NILE
    assert y.mean() == pytest.approx(919.35)
    assert y.std(ddof=1) == pytest.approx(169.2275, abs=1e-4)

    def loss(logs: np.ndarray) -> float:
        noise, drift = np.exp(logs)
        level, spread, total = y[0], noise, 0.0
        for value in y[1:]:
            spread += drift
            size, off = spread + noise, value - level
            total += 0.5 * (np.log(2 * np.pi * size) + off**2 / size)
            level, spread = level + spread / size * off, spread * noise / size
        return total

    found = minimize(loss, [9.0, 7.0], method="Nelder-Mead")
    np.testing.assert_allclose(np.exp(found.x), [15099, 1469], rtol=0.005)
