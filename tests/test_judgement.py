"""Stein discrepancy, leave-one-out and sensitivity, each held against its formula, quadrature, conjugacy or ArviZ."""

import warnings
from functools import partial

import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import fit, ksd, log_weights, loo, pointwise_log_likelihood, sample, sensitivity
from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.diagnostics.stein import discrepancy, scores_of, stein_matrix
from inference.kernels import NUTS

pytestmark = pytest.mark.usefixtures("alone")
X = torch.tensor([0.3, 1.1, -0.2, 0.8, 0.5], dtype=torch.double)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def model(x: torch.Tensor, scale: float = 1.0) -> None:
    """mu ~ N(0, scale), x ~ N(mu, 1): conjugate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.double), scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def guide(x: torch.Tensor, width: float = 1.0) -> None:
    pyro.sample("mu", dist.Normal(x.sum() / (1 + len(x)), width * (1 + len(x)) ** -0.5))


# The Stein discrepancy


def test_the_stein_kernel_is_its_definition_by_automatic_differentiation() -> None:
    x, scores, scale = normal(0, 4, 3), normal(1, 4, 3), 1.7

    def k(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (1 + (a - b).square().sum() / scale**2) ** -0.5

    found = stein_matrix(x, scores, scale)
    for i in range(4):
        for j in range(4):
            by_a, by_b = torch.autograd.functional.jacobian(k, (x[i], x[j]))
            ((_, mixed), _) = torch.autograd.functional.hessian(k, (x[i], x[j]))
            expected = scores[i] @ scores[j] * k(x[i], x[j]) + scores[i] @ by_b + scores[j] @ by_a + mixed.trace()
            torch.testing.assert_close(found[i, j], expected)


def test_the_expected_stein_kernel_is_zero_under_the_density_alone() -> None:
    """By quadrature over x, at any y: of N(0, 1), and not of N(0, 2)."""
    at = torch.linspace(-15, 15, 601, dtype=torch.double)[:, None]
    y = torch.tensor([[-1.3], [0.4]], dtype=torch.double)
    both = torch.cat([at, y])
    rows = stein_matrix(both, -both, 1.3)[-2:, :-2]
    for sd, zero in ((1.0, True), (2.0, False)):
        weight = torch.distributions.Normal(0.0, sd).log_prob(at[:, 0]).exp() * 0.05
        mean = rows @ weight
        assert (mean.abs() < 1e-6).all() if zero else (mean.abs() > 0.01).all()


def test_p_values_are_uniform_for_the_density_and_small_for_others() -> None:
    """Of 200 samples of N(0, I): the share below 0.1 is within four errors; a shift or a width is told."""
    generator = torch.Generator().manual_seed(3)
    p = np.array([discrepancy(x, -x, generator).p for x in (normal(s, 80, 2) for s in range(200))])
    assert abs((p <= 0.1).mean() - 0.1) < 4 * (0.09 / 200) ** 0.5
    x = normal(300, 400, 2)
    for wrong in (x + 0.4, 1.5 * x, 0.6 * x):
        assert discrepancy(wrong, -wrong, generator).p < 0.01


def test_scores_are_gradients_in_unconstrained_space_with_finite_sites_summed_out() -> None:
    """s ~ Exp(1) has the log density of u = log s: u - exp(u); a mixture over k adds its log sum."""

    def mixture() -> None:
        s = pyro.sample("s", dist.Exponential(torch.ones((), dtype=torch.double)))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.double)))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 2.0])[k], s), obs=torch.tensor(0.5, dtype=torch.double))

    draws = {"s": torch.tensor([0.5, 1.0, 2.5], dtype=torch.double)}
    with isolated(0):
        u, scores = scores_of(bind(mixture), draws)
    torch.testing.assert_close(u[:, 0], draws["s"].log())

    def density(u: float) -> float:
        s = np.exp(u)
        return u - s + np.log(0.3 * scipy.stats.norm.pdf(0.5, -1, s) + 0.7 * scipy.stats.norm.pdf(0.5, 2, s))

    expected = [(density(v + 1e-5) - density(v - 1e-5)) / 2e-5 for v in u[:, 0].tolist()]
    np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-6)


def test_the_discrepancy_of_a_result_tells_a_wrong_guide_and_passes_chains() -> None:
    right, wide = (fit((model, partial(guide, width=w)), X, steps=0, draws=400, progress=False) for w in (1.0, 2.0))
    chains = sample(model, X, NUTS, draws=300, warmup=200, chains=2, progress=False)
    assert ksd(right).p > 1e-3 and ksd(chains).p > 1e-3 and ksd(wide).p <= 2 / 1001
    assert ksd(right).value < ksd(wide).value and ksd(chains).draws <= 500
    assert str(ksd(wide)).startswith("KSD ")


def test_the_discrepancy_says_what_it_cannot_judge() -> None:
    def finite(x: torch.Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(k.double(), 1.0), obs=x)

    def guess(x: torch.Tensor) -> None:
        pyro.sample("k", dist.Categorical(torch.ones(2)))

    with pytest.raises(ValueError, match="^draws: expected values of a continuous site, got none$"):
        ksd(fit((finite, guess), X, steps=0, progress=False))


# Leave-one-out


def exact_loo() -> float:
    """The sum of log p(x_n | the others), normal with variance 1 + 1 / N."""
    total, count = X.sum(), len(X)
    return sum(float(scipy.stats.norm.logpdf(x, (total - x) / count, (1 + 1 / count) ** 0.5)) for x in X)


def test_leave_one_out_of_a_guide_is_corrected_for_it() -> None:
    """Against the conjugate value: the guide twice too wide is off without the correction."""
    wide = fit((model, partial(guide, width=2.0)), X, steps=0, draws=4000, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = float(azs.loo(wide.idata).elpd)
    found = loo(wide, draws=8000)
    assert abs(float(found.elpd) - exact_loo()) < 0.06 < abs(raw - exact_loo())


def test_leave_one_out_of_chains_is_that_of_arviz_and_right() -> None:
    chains = sample(model, X, NUTS, draws=400, warmup=200, chains=2, progress=False)
    assert float(loo(chains).elpd) == pytest.approx(float(azs.loo(chains.idata).elpd), abs=1e-9)
    assert float(loo(chains).elpd) == pytest.approx(exact_loo(), abs=0.2)


def test_leave_one_out_of_latents_of_rows_is_refused() -> None:
    def local(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0 * x, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="^result: expected latent sites outside of the plate of rows, got z; "):
        loo(fit((local, AutoNormal(local)), X, steps=1, draws=30, progress=False))


def weighed(x: torch.Tensor) -> None:
    """Each row counts three times, as three copies of it would."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.double), 1.0))
    with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=3.0):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_rows_that_are_weighed_have_the_log_likelihood_of_one() -> None:
    """Against the density of N(mu, 1) at the draws of the conjugate posterior of three copies."""

    def exact(x: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(3 * x.sum() / (1 + 3 * len(x)), (1 + 3 * len(x)) ** -0.5))

    result = fit((weighed, exact), X, steps=0, draws=50, progress=False)
    density = dist.Normal(result.draws["mu"][:, None], 1.0).log_prob(X)
    np.testing.assert_allclose(result.idata.log_likelihood["x"][0], density)
    torch.testing.assert_close(pointwise_log_likelihood(result), density)
    # The guide is the posterior of the model as it is scaled.
    weights = log_weights(result, 50)
    torch.testing.assert_close(weights, weights[:1].expand(50))
    assert result.idata.attrs["log_likelihood"].startswith("without the scale of x: ")
    with pytest.raises(ValueError, match="^result: expected rows that count once, got a scale of x$"):
        loo(result)


# Sensitivity


def test_the_sensitivity_of_weighed_rows_is_that_of_their_copies() -> None:
    """The prior is what is left of the density without all of the likelihood."""
    copies, scaled = (
        sample(m, x, NUTS, draws=300, warmup=200, chains=2, progress=False)
        for m, x in ((model, X.repeat(3)), (weighed, X))
    )
    one, other = sensitivity(copies).loc["mu"], sensitivity(scaled).loc["mu"]
    assert other["prior"] == pytest.approx(one["prior"], rel=0.5)
    assert other["likelihood"] == pytest.approx(one["likelihood"], rel=0.5)


def test_sensitivity_is_large_where_prior_and_data_disagree() -> None:
    """A prior at zero of scale 0.1 against data at 0.5 matters; one of scale 10 does not."""
    lines = {}
    for scale in (0.1, 10.0):
        chains = sample(partial(model, scale=scale), X + 2, NUTS, draws=300, warmup=200, chains=2, progress=False)
        lines[scale] = sensitivity(chains).loc["mu"]
    assert lines[0.1]["prior"] > 0.1 > 0.02 > lines[10.0]["prior"]
    assert "prior-data conflict" in lines[0.1]["diagnosis"] and lines[10.0]["likelihood"] > 0.05


@pytest.mark.parametrize("by_chains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_leave_one_out_of_masked_rows_is_that_of_the_rows_that_are_seen(by_chains: bool) -> None:
    """The conjugate leave-one-out density of the eight rows that are seen, and ArviZ's standard error over them."""
    y = normal(7, 12).double()
    hidden = torch.arange(12) % 3 == 0

    def masked(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 2.0))
        with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=~hidden):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    seen = y[~hidden].numpy()
    precision = 0.25 + len(seen)

    def exact(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(seen.sum() / precision).double(), precision**-0.5))

    others = seen.sum() - seen
    spread = 1 / (precision - 1)
    each = scipy.stats.norm(spread * others, np.sqrt(1 + spread)).logpdf(seen)
    if by_chains:
        found = loo(sample(masked, y, NUTS, draws=1000, warmup=300, chains=4, progress=False))
    else:
        found = loo(fit((masked, exact), y, steps=0, draws=100, progress=False), draws=4000)
    assert found.n_data_points == len(seen)
    assert found.elpd == pytest.approx(each.sum(), abs=0.25)
    assert found.se == pytest.approx(np.sqrt(len(seen)) * each.std(), rel=0.1)


def test_leave_one_out_of_groups_whose_plate_is_the_inner_dimension() -> None:
    """A ragged mask (words, documents), the state of a document summed out: all documents that are seen stand."""
    y = torch.linspace(-2.0, 2.0, 15).reshape(3, 5)
    seen = torch.tensor([[True] * 5, [True, True, False, False, False], [True, False, False, False, False]])
    seen[:, 4] = False

    def model(y: Tensor, seen: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("documents", 5, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(p))
            with pyro.plate("words", 3, dim=-2), pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(torch.where(z > 0, 1.0, -1.0), 1.0), obs=y)

    def guide(y: Tensor, seen: Tensor) -> None:
        pyro.sample("p", dist.Beta(3.0, 3.0))

    result = fit((model, guide), {"y": y, "seen": seen}, steps=0, draws=50, progress=False)
    assert loo(result).n_data_points == 4
