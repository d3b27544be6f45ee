"""sample: transforms, discrete sites, statistics, and what it refuses."""

from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS as PyroNUTS
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from inference import sample
from inference.core.bound import bind
from inference.kernels import HMC, NUTS, ChEES

quiet = partial(sample, progress=False)
Y = torch.tensor([0.3, 1.9, 0.8, 1.4, 1.1, 0.5], dtype=torch.float64)


def gamma_poisson(y: Tensor) -> None:
    """rate ~ Gamma(2, 1), y_n ~ Poisson(rate): the posterior is Gamma(2 + sum y, 1 + N)."""
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0).double(), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


COUNTS = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0]).double()
POSTERIOR = torch.distributions.Gamma(torch.tensor(16.0).double(), 6.0)


def agrees(draws: Tensor, mean: float, sd: float, effective: float) -> bool:
    """Whether a mean lies within four Monte Carlo standard errors."""
    return abs(float(draws.mean()) - mean) < 4 * sd / effective**0.5


@pytest.mark.parametrize(
    "kernel", [NUTS, PyroNUTS, partial(HMC, trajectory_length=1.5)], ids=["NUTS", "Pyro's NUTS", "HMC"]
)
def test_a_constrained_posterior_is_the_conjugate_one(kernel) -> None:
    result = quiet(gamma_poisson, COUNTS, kernel, draws=500, warmup=300, chains=2)
    mean, sd = float(POSTERIOR.mean), float(POSTERIOR.stddev)
    effective = result.diagnosis.min_ess_bulk
    assert effective > 100
    assert agrees(result.draws["rate"], mean, sd, effective)
    assert float(result.draws["rate"].std()) == pytest.approx(sd, rel=4 / effective**0.5)
    assert (result.draws["rate"] > 0).all()
    more = result.draw(1000)["rate"]
    assert agrees(more, mean, sd, effective / 2)
    assert float(more.std()) == pytest.approx(sd, rel=6 / effective**0.5)


def test_statistics_of_the_transitions() -> None:
    result = quiet(gamma_poisson, COUNTS, draws=100, warmup=100, chains=2)
    stats = result.idata.sample_stats
    assert {"acceptance_rate", "diverging", "step_size", "n_steps", "lp"} <= set(stats.data_vars)
    assert stats.sizes == {"chain": 2, "draw": 100}
    assert 0.6 < float(stats.acceptance_rate.mean()) <= 1
    assert (stats.n_steps >= 1).all()
    assert int(stats.n_steps.max()) < 100
    # lp is the log density of the unconstrained position: that of the draw and the log Jacobian, log(rate).
    rate = torch.as_tensor(result.idata.posterior.rate.values)
    density = dist.Gamma(torch.tensor(2.0).double(), 1.0).log_prob(rate)
    density += dist.Poisson(rate[..., None]).log_prob(COUNTS).sum(-1)
    np.testing.assert_allclose(stats.lp.values, density + rate.log(), rtol=1e-9)


def test_simplex_and_matrix_sites_come_back_in_their_own_shapes() -> None:
    def model(y: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3).double()))
        pyro.sample("corr", dist.LKJCholesky(2, torch.tensor(1.0).double()))
        pyro.deterministic("odds", p[..., 0] / p[..., 1])
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    result = quiet(model, torch.tensor([0, 0, 1, 2, 0]), draws=40, warmup=100, chains=16)
    assert result.draws["p"].shape == (640, 3)
    assert result.draws["corr"].shape == (640, 2, 2)
    torch.testing.assert_close(result.draws["p"].sum(-1), torch.ones(640).double())
    exact = torch.tensor([4.0, 2.0, 2.0]).double() / 8
    assert (result.draws["p"].mean(0) - exact).abs().max() < 0.05
    posterior = result.idata.posterior
    np.testing.assert_allclose(posterior["odds"], posterior["p"][..., 0] / posterior["p"][..., 1])


def test_finite_sites_are_summed_out_and_drawn_afterwards() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5]).double()))
            pyro.sample("y", dist.Normal(torch.where(z == 1, mu.exp(), -mu.exp()), 0.5), obs=y)

    y = torch.tensor([2.0, -2.0, 1.9, -2.1]).double()
    result = quiet(model, y, draws=300, warmup=300, chains=2)
    assert set(result.draws) == {"mu"}
    z = result.idata.posterior["z"]
    assert z.dtype.kind == "i"
    np.testing.assert_allclose(z.mean(("chain", "draw")), [1, 0, 1, 0], atol=0.01)
    assert float(result.draws["mu"].exp().mean()) == pytest.approx(2.0, abs=0.1)
    assert list(result.idata.log_likelihood.data_vars) == ["y"]


def test_any_kernel_of_the_contract_is_run() -> None:
    class RandomWalk(MCMCKernel):
        """Metropolis on log rate, with the density by hand."""

        def __init__(self, model) -> None:
            self._x = torch.zeros(()).double()

        initial_params = property(lambda self: {"rate": self._x.exp()})

        def density(self, x: Tensor) -> Tensor:
            return POSTERIOR.log_prob(x.exp()) + x

        def sample(self, params):
            proposal = self._x + 0.5 * torch.randn(()).double()
            if torch.rand(()) < (self.density(proposal) - self.density(self._x)).exp():
                self._x = proposal
            return {"rate": self._x.exp()}

    result = quiet(gamma_poisson, COUNTS, RandomWalk, draws=3000, warmup=200, chains=2)
    assert result.method == "RandomWalk"
    assert agrees(result.draws["rate"], float(POSTERIOR.mean), float(POSTERIOR.stddev), result.diagnosis.min_ess_bulk)


@pytest.mark.parametrize("kernel", [ChEES, NUTS])
def test_a_prior_draw_that_cannot_be_evaluated_says_nothing_of_the_model(kernel: Any) -> None:
    """Half of all draws of the prior have no density: whether a call works depended on the state of the generator."""

    runs = [0]

    def half() -> None:
        runs[0] += 1
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("y", dist.Normal(x.log(), 1.0), obs=torch.tensor(0.0).double())

    counts = set[int]()
    for seed in range(8):
        torch.manual_seed(seed)
        runs[0] = 0
        assert list(bind(half).sites) == ["x", "y"]
        counts.add(runs[0])
        result = quiet(half, kernel=kernel, draws=4, warmup=4, chains=1 if kernel is NUTS else 2, seed=seed)
        assert (result.draws["x"] > 0).all()
    assert len(counts) == 1, "what a bound pair is does not depend on the caller's generator"


def test_divergences_are_told() -> None:
    """At a cliff of 1e5 nats every trajectory that crosses it diverges, at any step size."""

    def cliff() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.factor("cliff", torch.where(x > 0, -1e5, 0.0))

    result = quiet(cliff, draws=100, warmup=50, chains=2, compile=False)
    assert result.diagnosis.divergences > 0
    assert int(result.idata.sample_stats.diverging.sum()) == result.diagnosis.divergences
    assert "diverged" in str(result)
    assert "target_accept_prob" in str(result)


def test_bad_arguments_get_one_line() -> None:
    for arguments, message in (
        ({"draws": 3}, "draws: expected an integer of at least 4, got 3"),
        ({"warmup": -1}, "warmup: expected an integer of at least 0, got -1"),
        ({"chains": 0}, "chains: expected an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(gamma_poisson, COUNTS, **arguments)
    with pytest.raises(TypeError, match=r"kernel: expected a factory such as NUTS.*got an instance of NUTS"):
        quiet(gamma_poisson, COUNTS, NUTS(gamma_poisson))


def test_sites_that_no_kernel_can_sample_are_refused() -> None:
    def endless(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        count = pyro.sample("count", dist.Poisson(rate))
        pyro.sample("y", dist.Normal(count, 1.0), obs=y)

    with pytest.raises(ValueError, match="model: count has infinitely many discrete states"):
        quiet(endless, torch.tensor(3.0))

    def nothing(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="model: expected a latent site to sample, got none"):
        quiet(nothing, torch.zeros(3))


def test_a_model_that_observes_nothing_though_it_takes_data_is_refused() -> None:
    def model(n: int, y: Tensor | None = None) -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"data: the model observes nothing.*got n; use prior_predictive\(\)"):
        quiet(model, {"n": 3})

    def optional(y: Tensor | None = None) -> None:
        model(3, y)

    with pytest.raises(ValueError, match=r"data: the model observes nothing.*got none for y; use prior_predictive"):
        quiet(optional)


def test_a_model_without_a_valid_start_says_so() -> None:
    def impossible(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-float("inf")) + 0 * mu)

    with (
        pytest.raises(ValueError, match="cannot find valid initial params: the log density of never is not finite"),
        pyro.validation_enabled(False),
    ):
        quiet(impossible, {"y": torch.zeros(2)}, draws=4, warmup=2, chains=2)


def test_chains_are_of_the_model_in_evaluation_mode() -> None:
    """With dropout the density of a draw is noise, and a kernel ran on that in silence; predictions had none of it."""

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, y: torch.Tensor) -> None:
            w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
            with pyro.plate("rows", len(y)):
                pyro.sample("y", dist.Normal(w * self.dropout(torch.ones(len(y)).double()), 1.0), obs=y)

    model = Regression()
    y = torch.full((8,), 2.0).double()
    for kernel in (NUTS, PyroNUTS):
        result = quiet(model, y, kernel, draws=300, warmup=200, chains=2)
        # Precision 1 + 8, mean 16 / 9.
        assert agrees(result.draws["w"], 16 / 9, 1 / 3, result.diagnosis.min_ess_bulk)
        assert float(result.draws["w"].std()) == pytest.approx(1 / 3, rel=0.3)
        assert model.training and model.dropout.training
