"""Log evidence of rows: against exact answers, errors against the variation over seeds, bounded memory."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from scipy import stats
from torch import Tensor, nn

from inference import fit, sample
from inference.compiler import policy
from inference.evidence import annealed
from inference.evidence import estimate as likelihood
from inference.evidence.estimate import Evidence, log_evidence

LOADINGS = torch.tensor([[1.0, 0.5], [-0.7, 0.2], [0.3, 1.1]]).double()
NOISE = 0.7
PRECISION = torch.eye(2).double() + LOADINGS.T @ LOADINGS / NOISE**2
COVARIANCE = PRECISION.inverse()
QUIET: dict[str, Any] = {"progress": False}
SMALL: dict[str, Any] = {"temperatures": 60, "leapfrogs": 5, "chains": 12, "step_size": 0.4, "progress": False}


def plate(x: Tensor | None, size: int | None, rows: Tensor | None, dim: int = -1) -> Any:
    return pyro.plate("rows", size if x is None or size is not None else len(x), subsample=rows, dim=dim)


def posterior_mean(x: Tensor) -> Tensor:
    return x @ LOADINGS @ COVARIANCE / NOISE**2


class Linear:
    """z ~ N(0, I), x | z ~ N(W z, s^2 I), and the posterior as a guide, but for a shift and a stretch."""

    def __init__(self, shift: float = 0.0, stretch: float = 1.0) -> None:
        self.shift, self.stretch = shift, stretch

    def model(self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            mean = posterior_mean(x) + self.shift
            pyro.sample("z", dist.MultivariateNormal(mean, self.stretch * COVARIANCE))


class Table(Linear):
    """The same model, and a guide with a mean of its own for each row of its data."""

    def __init__(self, means: Tensor) -> None:
        super().__init__()
        self.means = means

    def guide(self, x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows) as index:
            pyro.sample("z", dist.MultivariateNormal(self.means[index], COVARIANCE))


def simulate(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and rows of the linear model."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 2, generator=random).double()
    return z, z @ LOADINGS.T + NOISE * torch.randn(count, 3, generator=random).double()


def evidence(x: Tensor) -> Tensor:
    """Exact log evidence of the linear model, by scipy."""
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(3).double()
    return torch.as_tensor(stats.multivariate_normal(np.zeros(3), covariance.numpy()).logpdf(x.numpy()))


Z, X = simulate(40)
TRUTH = evidence(X)
WEIGHTS, CENTRES = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([-2.0, 0.0, 3.0]).double()


def mixture(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    with plate(x, size, rows):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(CENTRES[z], 0.8), obs=x)


def of_mixture(x: Tensor, scale: float = 0.8) -> Tensor:
    return (WEIGHTS.log() + dist.Normal(CENTRES, scale).log_prob(x[:, None])).logsumexp(-1)


class Decoder(nn.Module):
    """z ~ N(0, 1), x_j | z ~ Bernoulli(sigmoid(a_j z + b_j)), and a guide that knows the sign of z at most."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        self.slopes = nn.Parameter(2 * torch.randn(6, generator=random).double())
        self.offsets = nn.Parameter(torch.randn(6, generator=random).double())
        self.dropout = nn.Dropout(0.5)

    def logits(self, z: Tensor) -> Tensor:
        return self.dropout(z[..., None] * self.slopes) + self.offsets

    def model(self, x: Tensor, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(z)).to_event(1), obs=x)

    def guide(self, x: Tensor, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            pyro.sample("z", dist.Normal(0.3 * (x @ self.slopes.sign()), 1.2))

    def by_quadrature(self, x: Tensor) -> Tensor:
        z = torch.linspace(-9, 9, 4001).double()
        logits = z[:, None] * self.slopes + self.offsets
        score = dist.Bernoulli(logits=logits).to_event(1).log_prob(x[:, None]) + dist.Normal(0.0, 1.0).log_prob(z)
        return (score.logsumexp(-1) + math.log(float(z[1] - z[0]))).detach()


BINARY = (torch.rand(25, 6, generator=torch.Generator().manual_seed(3)) < 0.5).double()


def assert_within(found: Evidence, truth: Tensor, errors: float = 4.0) -> None:
    assert ((found.values - truth).abs() < errors * found.errors + 1e-9).all(), (found.values - truth) / found.errors


def assert_annealed(found: Evidence, truth: Tensor) -> None:
    """Each row, and their mean, within five standard errors.

    A row's own error is that of twelve chains (Student's t with 11 degrees of freedom: one row in 2,500 is off by
    five), so it counts as no less than that of all rows together.
    """
    away, errors = found.values - truth, found.errors
    pooled = errors.square().mean().sqrt()
    assert (away.abs() < 5 * errors.clamp(min=pooled)).all(), away / errors
    assert away.mean().abs() < 5 * pooled / len(errors) ** 0.5, away.mean()


# Exact.


@pytest.mark.parametrize("batch", [None, 7, 1])
def test_a_finite_site_is_summed_out(batch: int | None) -> None:
    x = torch.linspace(-4, 5, 30).double()
    found = log_evidence(mixture, x, "exact", batch=batch, **QUIET)
    torch.testing.assert_close(found.values, of_mixture(x))
    assert found.kind == "exact" and not found.errors.any()


def test_rows_may_hold_plates_and_chained_finite_sites() -> None:
    def hidden(y: Tensor) -> None:
        with pyro.plate("people", len(y), dim=-2):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.3).double()))
            b = pyro.sample("b", dist.Bernoulli(torch.where(a == 1, 0.9, 0.2).double()))
            with pyro.plate("sensors", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(a + 2 * b, 0.7), obs=y)

    y = torch.tensor([[0.1, 0.4, -0.3], [2.9, 3.2, 2.5], [1.2, 0.8, 1.9], [2.2, 1.4, 1.5]]).double()
    cells = [(0.7 * 0.8, 0.0), (0.7 * 0.2, 2.0), (0.3 * 0.1, 1.0), (0.3 * 0.9, 3.0)]
    terms = [math.log(p) + dist.Normal(mean, 0.7).log_prob(y).sum(-1) for p, mean in cells]
    found = log_evidence(hidden, y, "exact", **QUIET)
    torch.testing.assert_close(found.values, torch.stack(terms).logsumexp(0))


def test_a_mask_counts_and_a_scale_does_not() -> None:
    def masked(x: Tensor) -> None:
        with plate(x, None, None), poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            with poutine.mask(mask=x > 0):
                pyro.sample("x", dist.Normal(CENTRES[z], 0.8), obs=x)

    x = torch.linspace(-4, 5, 10).double()
    found = log_evidence(masked, x, "exact", **QUIET)
    torch.testing.assert_close(found.values, torch.where(x > 0, of_mixture(x), 0.0))


def test_a_pair_that_knows_its_evidence_is_asked() -> None:
    class Knows(Linear):
        def log_evidence(self, x: Tensor) -> Tensor:
            return evidence(x)

    found = log_evidence(Knows(), X, "exact", **QUIET)
    torch.testing.assert_close(found.values, TRUTH)
    assert found.kind == "exact" and not found.errors.any()


# Importance.


@pytest.mark.parametrize("batch", [None, 7])
def test_the_exact_guide_has_no_error(batch: int | None) -> None:
    found = log_evidence(Linear(), X, k=20, batch=batch, **QUIET)
    torch.testing.assert_close(found.values, TRUTH, rtol=0, atol=1e-8)
    assert found.kind == "lower" and found.errors.max() < 1e-6


def test_an_inexact_guide_is_within_its_errors() -> None:
    found = log_evidence(Linear(0.3, 1.5), X, k=20_000, **QUIET)
    assert found.errors.max() < 0.02
    assert_within(found, TRUTH)


def test_the_errors_are_what_seeds_spread() -> None:
    runs = [log_evidence(Linear(0.3, 1.5), X, k=300, seed=seed, **QUIET) for seed in range(30)]
    spread = torch.stack([run.values for run in runs]).var(0)
    said = torch.stack([run.errors for run in runs]).square().mean(0)
    ratio = spread / said
    # A variance of 30 draws has a relative standard error of sqrt(2 / 29), the mean over rows that of its spread.
    assert ratio.std() < 1.5 * math.sqrt(2 / 29)
    assert abs(ratio.mean() - 1) < 4 * math.sqrt(2 / 29 / len(X))


def test_one_particle_is_the_elbo_and_more_come_closer() -> None:
    many = X.repeat(400, 1)
    runs = {k: log_evidence(Linear(0.5, 1.5), many, k=k, **QUIET).values.unflatten(0, (400, -1)) for k in (1, 5, 50)}
    guide = dist.MultivariateNormal(torch.full((2,), 0.5).double(), 1.5 * COVARIANCE)
    posterior = dist.MultivariateNormal(torch.zeros(2).double(), COVARIANCE)
    elbo = TRUTH - torch.distributions.kl_divergence(guide, posterior)
    error = runs[1].std(0) / math.sqrt(400)
    assert ((runs[1].mean(0) - elbo).abs() < 4 * error).all()
    gaps = [float((TRUTH - runs[k].mean(0)).mean()) for k in (1, 5, 50)]
    errors = [float(runs[k].var(0).mean().sqrt() / math.sqrt(runs[k].numel())) for k in (1, 5, 50)]
    assert gaps[0] > gaps[1] + 4 * errors[0] and gaps[1] > gaps[2] + 4 * errors[1] and gaps[2] > 4 * errors[2]


def test_one_particle_has_no_known_error() -> None:
    found = log_evidence(Linear(), X, k=1, **QUIET)
    assert found.errors.isnan().all() and math.isnan(found.monte_carlo_error)


def test_a_guide_with_a_value_per_row_meets_its_own_rows() -> None:
    table = Table(posterior_mean(X))
    for batch in (None, 7, 1):
        found = log_evidence(table, X, k=5, batch=batch, **QUIET)
        torch.testing.assert_close(found.values, TRUTH, rtol=0, atol=1e-8)


def test_autoguides_run_on_minibatches_where_they_know_the_plate() -> None:
    data = X[:10]
    model = Linear().model
    create = lambda x, size=None, rows=None, **_: plate(x, size, rows)  # noqa: E731
    for knows, batches in ((create, (None, 3)), (None, (None,))):
        guide = AutoNormal(model, init_loc_fn=init_to_value(values={"z": posterior_mean(data)}), init_scale=1.0)
        guide.create_plates = knows
        for batch in batches:
            found = log_evidence((model, guide), data, k=5000, batch=batch, **QUIET)
            assert found.errors.max() < 0.1
            assert_within(found, evidence(data))
    with pytest.raises(ValueError, match="batch: expected a model and a guide that take size and rows"):
        log_evidence((model, guide), data, batch=3, **QUIET)


def test_a_guide_that_is_blind_to_rows_runs_on_all_of_them() -> None:
    table = Table(posterior_mean(X))
    guide = lambda x: table.guide(x)  # noqa: E731
    found = log_evidence((table.model, guide), X, k=5, **QUIET)
    torch.testing.assert_close(found.values, TRUTH, rtol=0, atol=1e-8)


def test_a_guide_may_draw_a_finite_site() -> None:
    def guide(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        with plate(x, size, rows):
            pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.3, 0.4])))

    x = torch.linspace(-4, 5, 30).double()
    found = log_evidence((mixture, guide), x, k=20_000, batch=11, **QUIET)
    assert found.errors.min() > 0
    assert_within(found, of_mixture(x))


def branching(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """A finite site above a continuous one: x ~ sum_k w_k N(c_k, 1 + 0.8^2)."""
    with plate(x, size, rows):
        y = pyro.sample("y", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(CENTRES[y], 1.0))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def seeing(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    with plate(x, size, rows):
        pyro.sample("z", dist.Normal(0.8 * x, 1.0))


def blind(x: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    pass


@pytest.mark.parametrize("guide", [seeing, blind])
def test_sites_that_the_guide_leaves_out_are_summed_or_come_from_the_prior(guide: Callable[..., None]) -> None:
    x = torch.linspace(-4, 5, 20).double()
    found = log_evidence((branching, guide), x, k=30_000, **QUIET)
    assert found.errors.min() > 0 and found.errors.max() < 0.05
    assert_within(found, of_mixture(x, math.sqrt(1 + 0.8**2)))


def test_a_decoder_is_that_of_quadrature() -> None:
    pair = Decoder()
    found = log_evidence(pair, BINARY, k=20_000, batch=9, **QUIET)
    assert_within(found, pair.by_quadrature(BINARY))
    assert pair.training


# Memory.


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the latent site in each pass under a budget of 600 numbers, 16 particles before more rows."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(policy, "LATENT_NUMBERS", 600)
    monkeypatch.setattr(policy, "PARTICLES_FIRST", 16)
    original = likelihood.LocalLatents.model

    def recorded(self: Any, draws: Any, count: int) -> Any:
        shapes.extend(tuple(v.shape) for v in draws.values())
        return original(self, draws, count)

    monkeypatch.setattr(likelihood.LocalLatents, "model", recorded)
    return shapes


@pytest.mark.parametrize("k", [1, 7, 150, 1001])
def test_no_pass_holds_more_than_the_budget(passes, k: int) -> None:
    found = log_evidence(Linear(0.1, 1.3), X, k=k, **QUIET)
    # Three features for each row and particle.
    assert max(shape[0] * shape[1] * 3 for shape in passes) <= 600
    weighed = sum(shape[0] * shape[1] for shape in passes)
    # One particle of each row is validated.
    assert weighed == k * len(X) + len(X)
    if k > 100:
        assert_within(found, TRUTH, 5.0)


def test_annealed_chains_count_as_memory(passes) -> None:
    log_evidence(Linear(), X, "annealed", **{**SMALL, "temperatures": 1})
    assert {shape for shape in passes if shape[0] == 12} == {(12, 16, 2), (12, 8, 2)}


def test_a_budget_smaller_than_a_row_still_runs(monkeypatch) -> None:
    monkeypatch.setattr(policy, "LATENT_NUMBERS", 1)
    found = log_evidence(Linear(), X[:5], k=3, **QUIET)
    torch.testing.assert_close(found.values, TRUTH[:5], rtol=0, atol=1e-8)


def test_states_that_are_summed_out_count_as_memory(monkeypatch) -> None:
    monkeypatch.setattr(policy, "LATENT_NUMBERS", 60)
    lengths: list[int] = []
    original = likelihood.LocalLatents.take
    monkeypatch.setattr(
        likelihood.LocalLatents, "take", lambda self, rows: lengths.append(len(rows)) or original(self, rows)
    )
    log_evidence(mixture, torch.linspace(-4, 5, 50).double(), "exact", **QUIET)
    assert lengths == [20, 20, 10]


def test_passes_of_any_size_estimate_alike(monkeypatch) -> None:
    runs = []
    for budget in (300, 2000, 10_000_000):
        monkeypatch.setattr(policy, "LATENT_NUMBERS", budget)
        runs.append(log_evidence(Linear(0.3, 1.5), X, k=500, seed=budget, **QUIET))
    for run in runs:
        assert_within(run, TRUTH, 5.0)
        torch.testing.assert_close(run.errors.mean(), runs[0].errors.mean(), rtol=0.1, atol=0)


# Annealed.


def test_annealing_brackets_the_truth() -> None:
    z, x = simulate(200, seed=4)
    lower = log_evidence(Linear(), x, "annealed", **SMALL)
    upper = log_evidence(Linear(), x, "annealed", reverse=True, latents={"z": z}, **SMALL)
    assert lower.kind == "lower" and upper.kind == "upper"
    for found in (lower, upper):
        gap = found.values - evidence(x)
        assert gap.std() < 0.3
        assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(x))
    # The spread of rows around the truth is the error that is said; both are known to some tenth.
    assert 0.7 < (lower.values - evidence(x)).square().mean() / lower.errors.square().mean() < 1.4


def test_few_temperatures_leave_a_gap_on_both_sides() -> None:
    z, x = simulate(400, seed=5)
    short = {**SMALL, "temperatures": 3, "chains": 2}
    lower = log_evidence(Linear(), x, "annealed", **short)
    upper = log_evidence(Linear(), x, "annealed", reverse=True, latents={"z": z}, **short)
    below, above = evidence(x) - lower.values, upper.values - evidence(x)
    for gap in (below, above):
        assert gap.mean() > 4 * gap.std() / math.sqrt(len(x))


def test_the_mean_weight_is_the_evidence_however_short_the_run() -> None:
    x = X[:3]
    found = log_evidence(Linear(), x, "annealed", **{**SMALL, "temperatures": 2, "chains": 20_000})
    assert found.errors.max() < 0.02
    assert_within(found, TRUTH[:3])


def test_the_mean_inverse_weight_is_the_inverse_evidence(alone) -> None:
    # Many exact draws of one row's posterior, each with one chain.
    x, count = X[:1], 4000
    z = dist.MultivariateNormal(posterior_mean(x), COVARIANCE).sample((count,))[:, 0]
    short = {**SMALL, "temperatures": 40, "chains": 1}
    found = log_evidence(Linear(), x.expand(count, -1), "annealed", reverse=True, latents={"z": z}, **short)
    weights = (TRUTH[0] - found.values).exp()
    # Weights of heavy tails: the error varies from 0.02 to 0.035.
    assert weights.std() / math.sqrt(count) < 0.06
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(count)


def test_annealing_starts_from_the_guide() -> None:
    few = {**SMALL, "temperatures": 10}
    lower = log_evidence(Linear(0.4, 1.5), X, "annealed", start="guide", **few)
    upper = log_evidence(Linear(0.4, 1.5), X, "annealed", start="guide", reverse=True, latents={"z": Z}, **few)
    from_prior = log_evidence(Linear(0.4, 1.5), X, "annealed", **few)
    assert lower.monte_carlo_error < 0.8 * from_prior.monte_carlo_error
    for found in (lower, upper):
        assert abs(found.mean - float(TRUTH.mean())) < 4 * found.monte_carlo_error
    # The exact guide has nowhere to go.
    exact = log_evidence(Linear(), X, "annealed", start="guide", **{**SMALL, "temperatures": 2})
    torch.testing.assert_close(exact.values, TRUTH, rtol=0, atol=1e-8)


def test_annealed_minibatches_have_their_own_rows_and_latents(monkeypatch) -> None:
    begins: list[Tensor] = []
    original = likelihood.anneal
    monkeypatch.setattr(likelihood, "anneal", lambda f, start, *rest: begins.append(start) or original(f, start, *rest))
    for extra in ({}, {"reverse": True, "latents": {"z": Z, "unused": Z}}):
        gap = log_evidence(Linear(), X, "annealed", batch=15, **extra, **{**SMALL, "temperatures": 20}).values - TRUTH
        assert gap.std() < 0.5
        # Forwards a bound from below in expectation, in reverse from above.
        side = 1 if extra else -1
        assert -4 * gap.std() / math.sqrt(len(X)) < side * gap.mean() < 0.5
    assert torch.equal(torch.cat(begins[3:], 1), Z.expand(12, -1, -1))
    table, few = Table(posterior_mean(X)), {**SMALL, "temperatures": 2}
    exact = log_evidence(table, X, "annealed", start="guide", batch=15, **few)
    torch.testing.assert_close(exact.values, TRUTH, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rows", [-1, -2])
def test_sites_of_several_shapes_are_annealed_together(rows: int) -> None:
    def nested(y: Tensor) -> None:
        """A level and a pair per row, an effect per row and sensor, in either order of the plates."""
        y = y if rows == -2 else y.T
        with pyro.plate("rows", y.shape[rows], dim=rows):
            level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
            pair = pyro.sample("pair", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.plate("sensors", y.shape[-3 - rows], dim=-3 - rows):
                effect = pyro.sample("effect", dist.Normal(level, 0.6))
                pyro.sample("y", dist.Normal(effect + pair.sum(-1), 0.8), obs=y)

    y = torch.randn(8, 3, generator=torch.Generator().manual_seed(2)).double()
    covariance = 3 * torch.ones(3, 3).double() + (0.6**2 + 0.8**2) * torch.eye(3).double()
    truth = torch.as_tensor(stats.multivariate_normal(np.zeros(3), covariance.numpy()).logpdf(y.numpy()))
    found = log_evidence(nested, y, "annealed", **SMALL)
    assert found.errors.max() < 0.6
    assert_annealed(found, truth)


def test_finite_sites_are_summed_out_while_others_are_annealed() -> None:
    x = torch.linspace(-4, 5, 20).double()
    found = log_evidence(branching, x, "annealed", **{**SMALL, "chains": 30})
    assert found.errors.max() < 0.4
    assert_annealed(found, of_mixture(x, math.sqrt(1 + 0.8**2)))


def test_a_decoder_is_annealed_to_quadrature() -> None:
    pair = Decoder()
    found = log_evidence(pair, BINARY, "annealed", **SMALL)
    assert_annealed(found, pair.by_quadrature(BINARY))
    assert all(p.grad is None for p in pair.parameters())


def test_a_transition_leaves_its_distribution_alone(alone) -> None:
    scales = torch.tensor([0.5, 2.0]).double()[:, None]

    def densities(z: Tensor) -> tuple[Tensor, Tensor]:
        return dist.Normal(0.0, 1.0).log_prob(z / scales).sum(-1), dist.Normal(1.0, 0.5).log_prob(z / scales).sum(-1)

    # A mixture of half and half is normal, with precision (1 + 4) / 2 and mean (0 + 4) / 5.
    beta, mean, sd = 0.5, 0.8, math.sqrt(2 / 5)
    count = 20_000
    start = scales * (mean + sd * torch.randn(count, 2, 2).double())
    place = annealed.Place(start, *densities(start))
    rates = []
    for _ in range(5):
        place, acceptance = annealed._transition(densities, place, beta, torch.tensor([0.4, 1.0]).double(), 3)
        rates.append(acceptance.mean(0))
    # Some proposals are refused, so that acceptance has its part in what is compared below.
    assert 0.1 < torch.stack(rates).min() < 0.95 and torch.stack(rates).max() < 1
    assert (place.position != start).any(-1).double().mean() > 0.9
    moved = place.position / scales
    assert ((moved.mean(0) - mean).abs() < 5 * sd / math.sqrt(count)).all()
    assert ((moved.std(0) / sd - 1).abs() < 5 / math.sqrt(2 * count)).all()


def test_steps_are_tuned_to_each_row(alone) -> None:
    scales = torch.tensor([0.1, 1.0, 10.0]).double()[:, None]

    def densities(z: Tensor) -> tuple[Tensor, Tensor]:
        score = dist.Normal(0.0, 1.0).log_prob(z / scales).sum(-1)
        return score, score

    start = scales * torch.randn(64, 3, 20).double()
    steps = annealed.tune(densities, start, annealed.schedule(100), 5, 0.3, lambda: None)
    assert steps.shape == (100, 3)
    place, rates = annealed.Place(start, *densities(start)), []
    for _ in range(20):
        place, acceptance = annealed._transition(densities, place, 0.5, steps[-20:].mean(0), 5)
        rates.append(acceptance.mean(0))
    rate = torch.stack(rates).mean(0)
    assert ((rate - annealed.TARGET_ACCEPTANCE).abs() < 0.15).all(), rate
    ratios = (steps[-20:].mean(0) / scales[:, 0]).log()
    assert (ratios - ratios.mean()).abs().max() < 0.5


def test_a_row_that_diverges_stays_and_leaves_the_others_alone(alone) -> None:
    def densities(z: Tensor) -> tuple[Tensor, Tensor]:
        wall = torch.where(z.sum(-1) > 1, torch.nan, 0.0)
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1), dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + wall

    start = torch.tensor([0.99, -1.0]).double().reshape(1, 2, 1)
    place = annealed.Place(start, *densities(start))
    for _ in range(50):
        place, _ = annealed._transition(densities, place, 0.5, torch.tensor([0.5, 0.5]).double(), 3)
        assert place.position.isfinite().all() and (place.position <= 1).all()
    assert place.position[0, 1] != -1


def test_the_schedule_is_a_sigmoid() -> None:
    betas = annealed.schedule(99)
    assert betas[0] == 0 and betas[-1] == 1 and len(betas) == 101
    torch.testing.assert_close(betas + betas.flip(0), torch.ones_like(betas))
    assert (betas.diff() > 0).all() and betas.diff().argmax() in (49, 50)


# States, seeds and what is left alone.


class Learner(pyro.nn.PyroModule):
    """x ~ N(z + mu, 1) with mu to learn, and a guide to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(()).double())
        self.encoder = nn.Linear(1, 1).double()

    @pyro.nn.pyro_method
    def model(self, x: Tensor, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z + self.mu, 1.0), obs=x)

    @pyro.nn.pyro_method
    def guide(self, x: Tensor, *, size: int | None = None, rows: Tensor | None = None, **_: Any) -> None:
        with plate(x, size, rows):
            pyro.sample("z", dist.Normal(self.encoder(x[:, None])[:, 0], 0.7))


def test_a_result_brings_its_parameters_and_data(alone) -> None:
    x = 3 + torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    pair = Learner()
    result = fit(pair, x, steps=150, draws=30, progress=False)
    fitted = pair.mu.item()
    truth = dist.Normal(fitted, math.sqrt(2)).log_prob(x)
    with torch.no_grad():
        pair.mu.fill_(-5.0)
    assert_within(log_evidence(result, k=10_000, **QUIET), truth)
    assert pair.mu.item() == -5.0
    other = torch.tensor([0.0, 1.0, 2.0]).double()
    assert_annealed(log_evidence(result, other, "annealed", **SMALL), dist.Normal(fitted, math.sqrt(2)).log_prob(other))
    as_it_is = log_evidence(pair, other, "annealed", **SMALL)
    assert_annealed(as_it_is, dist.Normal(-5.0, math.sqrt(2)).log_prob(other))


def test_parameters_of_the_store_come_with_a_result() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(()).double())
        with plate(x, None, None):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z + mu, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x, None, None):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    x = 3 + torch.randn(30, generator=torch.Generator().manual_seed(0)).double()
    result = fit((model, guide), x, steps=150, draws=30, progress=False)
    truth = dist.Normal(float(result.params["mu"]), math.sqrt(2)).log_prob(x)
    assert_within(log_evidence(result, k=10_000, **QUIET), truth)
    chains = sample(mixture_of_mean, {"x": x[:4]}, draws=20, warmup=20, chains=1, progress=False)
    assert len(log_evidence(chains, {"x": x[:4]}, "annealed", **SMALL).values) == 4


def mixture_of_mean(x: Tensor) -> None:
    with plate(x, None, None):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_the_store_and_the_random_state_are_left_alone(alone) -> None:
    pair = Learner()
    pyro.param("kept", torch.ones(2))
    before = torch.random.get_rng_state()
    for estimator in ("importance", "annealed"):
        log_evidence(pair, X[:3, 0], estimator, **{**SMALL, "temperatures": 2})
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("estimator", ["importance", "annealed"])
def test_a_seed_gives_one_answer(estimator: str) -> None:
    run = partial(log_evidence, Linear(0.3), X[:5], estimator, k=50, **{**SMALL, "temperatures": 3})
    assert torch.equal(run(seed=1).values, run(seed=1).values)
    assert not torch.equal(run(seed=1).values, run(seed=2).values)


def test_single_precision_is_enough() -> None:
    def model(x: Tensor) -> None:
        with plate(x, None, None):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = X[:10, 0].float()
    found = log_evidence((model, lambda x: seeing(x)), x, k=10_000, **QUIET)
    assert found.values.dtype == torch.float64
    assert_within(found, dist.Normal(0.0, math.sqrt(2)).log_prob(x))
    assert_annealed(log_evidence(model, x, "annealed", **SMALL), dist.Normal(0.0, math.sqrt(2)).log_prob(x))


def stubborn(x: Tensor) -> None:
    with plate(x, None, None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        # By the first dimension, which in a plate of particles would be theirs.
        first = torch.stack([row[0] for row in z])
        pyro.sample("x", dist.Normal(first, 1.0), obs=x)


def sly(x: Tensor) -> None:
    with plate(x, None, None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        # In a plate of particles every one would get the mean of all.
        first = z[..., 0] if z.dim() == 2 else z[..., 0].mean(0, keepdim=True)
        pyro.sample("x", dist.Normal(first, 1.0), obs=x)


def steered(x: Tensor) -> None:
    with plate(x, None, None):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        first = z[:, 0] if z.sum() > 0 else z[..., 0]
        pyro.sample("x", dist.Normal(first, 1.0), obs=x)


@pytest.mark.parametrize("model", [stubborn, sly])
def test_a_model_written_for_one_particle_is_mapped(model: Callable[..., None]) -> None:
    _meets_the_truth(model)


def test_a_model_that_its_values_steer_runs_one_by_one_and_says_so() -> None:
    with pytest.warns(UserWarning, match="steered: the model cannot be mapped over draws"):
        _meets_the_truth(steered)


def _meets_the_truth(model: Callable[..., None]) -> None:
    def guide(x: Tensor) -> None:
        with plate(x, None, None):
            pyro.sample("z", dist.Normal(torch.stack([x / 2, 0 * x], -1), 1.0).to_event(1))

    x = X[:5, 0]
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(x)
    assert_within(log_evidence((model, guide), x, k=300, **QUIET), truth)
    found = log_evidence(model, x, "annealed", **{**SMALL, "temperatures": 10, "chains": 64})
    assert_annealed(found, truth)


def test_what_an_evidence_says() -> None:
    found = Evidence(torch.tensor([-1.0, -3.0]).double(), torch.tensor([0.3, 0.4]).double(), "lower")
    assert found.mean == -2.0 and found.standard_error == 1.0 and found.monte_carlo_error == pytest.approx(0.25)
    assert str(found) == "log p(x) >= -2.00 ± 1 nats per row (2 rows; Monte Carlo error 0.25)"
    exact = Evidence(torch.tensor([-1.0, -3.0]), torch.zeros(2), "exact")
    assert str(exact) == "log p(x) = -2.00 ± 1 nats per row (2 rows)"
    assert math.isnan(Evidence(torch.zeros(1), torch.zeros(1), "upper").standard_error)


# What is refused.


def global_mean(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with plate(x, None, None):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
    pyro.sample("x", dist.Normal(z, torch.ones(40).double()).to_event(1), obs=x)


def nothing_observed(x: Tensor) -> None:
    with plate(x, None, None):
        pyro.sample("z", dist.Normal(x, 1.0))


def scale_site(x: Tensor) -> None:
    with plate(x, None, None):
        z = pyro.sample("z", dist.Gamma(torch.ones(()).double(), 1.0))
        pyro.sample("x", dist.Normal(0.0, z), obs=x)


def more_sites(x: Tensor) -> None:
    with plate(x, None, None):
        pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("u", dist.Normal(x, 1.0))


def joint_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


ROW = X[:, 0]
LOCAL = mixture_of_mean
REFUSED = [
    (Linear(), X, {"estimator": "exactly"}, 'estimator: expected "exact", "importance" or "annealed", got \'exactly\''),
    (Linear(), X, {"k": 0}, "k: expected an integer of at least 1, got 0"),
    (Linear(), X, {"estimator": "annealed", "chains": 0}, "chains: expected an integer of at least 1, got 0"),
    (Linear(), X, {"estimator": "annealed", "temperatures": 0}, "temperatures: expected an integer of at least 1"),
    (Linear(), X, {"estimator": "annealed", "leapfrogs": 0.5}, "leapfrogs: expected an integer of at least 1, got 0.5"),
    (Linear(), X, {"estimator": "annealed", "step_size": 0.0}, "step_size: expected a positive number, got 0.0"),
    (Linear(), X, {"batch": 0}, "batch: expected an integer of at least 1, got 0"),
    (Linear(), X, {"start": "posterior"}, 'start: expected "prior" or "guide", got \'posterior\''),
    (Linear(), X[:0], {}, "x: expected at least one row, got none"),
    (Linear(), None, {}, "data: expected at least one row, got none"),
    (Linear().model, X, {}, "pair: expected a guide to draw from for importance, got a model alone"),
    (Linear().model, X, {"estimator": "annealed", "start": "guide"}, "pair: expected a guide to draw from for ann"),
    (Linear(), X, {"estimator": "exact"}, "z: expected a finite site, or a pair with log_evidence, got one that"),
    ((global_mean, blind), ROW, {}, "mu: expected a latent site in the plate rows, got a global one outside of it"),
    (global_mean, ROW, {"estimator": "annealed"}, "mu: expected a latent site in the plate rows, got a global one"),
    ((no_plate, blind), ROW, {}, "model: expected observed sites in a plate of rows, got x outside of one"),
    ((nothing_observed, seeing), ROW, {}, "model: expected observed sites in a plate of rows, got nothing"),
    ((LOCAL, more_sites), ROW, {}, "u: expected a latent site of the model, got one of the guide alone"),
    ((LOCAL, joint_guide), ROW, {}, "z: expected a site of the guide in the plate rows, got one outside of it"),
    ((LOCAL, AutoMultivariateNormal(LOCAL)), ROW, {}, "_AutoMultivariateNormal_latent: expected a site of the guide"),
    ((LOCAL, AutoDelta(LOCAL)), ROW, {}, "z: expected a guide with a density to weigh by, got a point mass"),
    (LOCAL, ROW, {"estimator": "annealed", "batch": 3}, "batch: expected a model and a guide that take size"),
    (mixture, ROW, {"estimator": "annealed"}, "model: expected a continuous latent site to anneal, got none"),
    (scale_site, ROW, {"estimator": "annealed"}, "z: expected an unconstrained continuous site to anneal, got one"),
    (
        (LOCAL, AutoNormal(LOCAL)),
        ROW,
        {"estimator": "annealed", "start": "guide"},
        "start: expected a guide of z, got z",
    ),
    ((LOCAL, blind), ROW, {"estimator": "annealed", "start": "guide"}, "start: expected a guide of z, got nothing"),
    (Linear(), X, {"reverse": True, "latents": {"z": Z}}, "reverse: expected annealed with the latents that the data"),
    (Linear(), X, {"estimator": "annealed", "reverse": True}, "reverse: expected annealed with the latents .* no"),
    (Linear(), X, {"estimator": "annealed", "latents": {"z": Z}}, "reverse: expected annealed .* got reverse=False"),
    (
        Linear(),
        X,
        {"estimator": "annealed", "reverse": True, "latents": {"w": Z}},
        r"latents: expected z of shape \(40, 2\), got w",
    ),
    (
        Linear(),
        X,
        {"estimator": "annealed", "reverse": True, "latents": {"z": Z[:3]}},
        r"latents: expected z of shape \(40, 2\), got \(3, 2\)",
    ),
]


@pytest.mark.parametrize(("pair", "data", "arguments", "said"), REFUSED, ids=[r[3].split(":")[0] for r in REFUSED])
def test_what_does_not_fit_is_refused_in_a_line(pair: Any, data: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        log_evidence(pair, data, **arguments, **QUIET)
    assert "\n" not in str(caught.value)


def test_data_that_the_model_cannot_score_are_found_in_every_minibatch() -> None:
    wrong = BINARY.clone()
    wrong[20, 2] = 0.5
    with pytest.raises(ValueError, match="at site 'x'"):
        log_evidence(Decoder(), wrong, k=5, batch=10, **QUIET)
