"""ChEES-HMC: exact posteriors within Monte Carlo error, hard geometries, what it tells, and what it refuses."""

import importlib
from functools import partial

import arviz_base as azb
import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import MCMC
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch._dynamo.utils import counters

from inference import sample
from inference.compiler import policy
from inference.core.handlers import isolated
from inference.kernels import NUTS, ChEES, trajectory
from inference.kernels.metric import log_volume
from inference.result import Result

hamiltonian = importlib.import_module("inference.kernels.hamiltonian")
quiet = partial(sample, progress=False)
run = partial(quiet, kernel=ChEES, compile=False)
pytestmark = pytest.mark.usefixtures("alone")


def double(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def z_scores(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Errors of means, and of mean squared distances from the true mean, in Monte Carlo standard errors."""
    dataset = azb.convert_to_dataset({"mean": draws, "square": (draws - mean) ** 2})
    error = azs.mcse(dataset, method="mean")
    means = (dataset["mean"].mean(("chain", "draw")) - mean) / error["mean"]
    squares = (dataset["square"].mean(("chain", "draw")) - sd**2) / error["square"]
    return np.concatenate([np.ravel(means), np.ravel(squares)])


def assert_normal(scores: np.ndarray) -> None:
    """No score is far out for its number, and together they are no wider than they should be."""
    assert np.isfinite(scores).all()
    assert abs(scores).max() < scipy.stats.norm.isf(1e-4 / len(scores))
    assert (scores**2).mean() < scipy.stats.chi2.isf(1e-4, len(scores)) / len(scores) * 1.5


def posterior(result: Result, name: str) -> np.ndarray:
    return result.idata.posterior[name].values.astype(np.float64)


def gaussian(covariance: Tensor) -> None:
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(len(covariance)).to(covariance), covariance))


def correlated(dim: int, seed: int = 0) -> Tensor:
    """A covariance with scales over two decades and a condition number of thousands."""
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(dim, dim)) * np.logspace(-1.5, 0, dim)
    scale = np.logspace(-1, 1, dim)
    return torch.as_tensor((root @ root.T / dim + 0.001 * np.eye(dim)) * scale * scale[:, None])


@pytest.mark.parametrize("full_mass", [True, False], ids=["dense", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_correlated_gaussian(full_mass: bool, dtype: torch.dtype) -> None:
    covariance = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 100.0]], dtype=dtype)
    kernel = partial(ChEES, full_mass=full_mass)
    result = quiet(partial(gaussian, covariance), None, kernel, warmup=200, draws=600, compile=False)
    assert result.draws["x"].dtype == dtype
    assert result.diagnosis.worst_r_hat < 1.01
    assert result.diagnosis.divergences == 0
    assert_normal(z_scores(posterior(result, "x"), np.zeros(3), covariance.diagonal().sqrt().double().numpy()))


def test_a_hundred_correlated_dimensions() -> None:
    covariance = correlated(100)
    result = run(partial(gaussian, covariance))
    assert result.diagnosis.worst_r_hat < 1.01
    assert result.diagnosis.min_ess_bulk > 3000
    assert float(result.idata.sample_stats["n_steps"].mean()) < 20
    assert_normal(z_scores(posterior(result, "x"), np.zeros(100), covariance.diagonal().sqrt().numpy()))


def test_regression_on_raw_predictors() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x, y = torch.as_tensor(x[:, :10]), torch.as_tensor(y).double()
    assert np.linalg.cond(x) > 1e5

    def model() -> None:
        beta = pyro.sample("beta", dist.Normal(torch.zeros(10).double(), 10.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((x * beta).sum(-1), 0.3), obs=y)

    result = run(model, draws=200)
    precision = x.T @ x / 0.09 + torch.eye(10) / 100
    covariance = torch.linalg.inv(precision)
    mean = covariance @ x.T @ y / 0.09
    assert result.diagnosis.worst_r_hat < 1.01
    assert_normal(z_scores(posterior(result, "beta"), mean.numpy(), covariance.diagonal().sqrt().numpy()))


def test_simulation_based_calibration() -> None:
    """Two hundred data sets of a conjugate model in one run: their true rates rank uniformly among the draws."""
    with isolated(1):
        rates = dist.Gamma(double(2.0), 1.0).sample((200,))
        counts = dist.Poisson(rates).sample()

    def model(y: Tensor) -> None:
        with pyro.plate("sets", 200):
            rate = pyro.sample("rate", dist.Gamma(double(2.0), 1.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    result = run(model, counts, chains=33, draws=300, warmup=200)
    exact = scipy.stats.gamma(2 + counts.numpy(), scale=0.5)
    draws = posterior(result, "rate")
    assert_normal(z_scores(draws, exact.mean(), exact.std()))
    ranks = (draws[:, ::100].reshape(99, 200) < rates.numpy()).sum(0)
    tested = scipy.stats.chisquare(np.bincount(ranks // 10, minlength=10))
    assert tested.pvalue > 1e-3


def test_heavy_tails() -> None:
    def model() -> None:
        pyro.sample("t", dist.StudentT(double(3.0), 0.0, 1.0))
        pyro.sample("cauchy", dist.Cauchy(double(0.0), 1.0))

    result = run(model, draws=200)
    for name, law in (("t", scipy.stats.t(3)), ("cauchy", scipy.stats.cauchy())):
        for p in (0.05, 0.25, 0.5, 0.75, 0.95):
            below = (posterior(result, name) < law.ppf(p)).astype(float)
            error = azs.mcse(azb.convert_to_dataset({"b": below}), method="mean")["b"]
            assert abs(float(below.mean() - p)) < 4 * float(error), (name, p)


EFFECTS, ERRORS = double(28, 8, -3, 7, -1, 1, 18, 12), double(15, 10, 16, 11, 9, 11, 10, 18)


def centred(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(double(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(double(5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)


def test_divergences_are_told() -> None:
    """Whatever the step size, a trajectory that ends beyond a cliff diverges; of a funnel's chains some never do."""

    def cliff() -> None:
        x = pyro.sample("x", dist.Normal(double(0, 0), 1.0).to_event(1))
        pyro.factor("cliff", -1e6 * (x.abs() > 1).double().sum())

    result = run(cliff, {}, draws=100, warmup=150)
    assert result.diagnosis.divergences
    told = [line for line in result.diagnosis.advice if "transitions diverged" in line]
    assert len(told) == 1 and "partial(ChEES, target_accept_prob" in told[0]


def test_a_funnel_is_told() -> None:
    result = run(centred, EFFECTS, draws=100, warmup=150)
    assert result.diagnosis.worst_r_hat > 1.01
    assert any("R-hat" in line or "Effective sample size" in line for line in result.diagnosis.advice)


def test_two_modes_are_told() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(double(0.0), 5.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    result = run(model, double(16.0)[None], draws=100)
    above = int((posterior(result, "z").mean(1) > 0).sum())
    assert 0 < above < 64
    told = [line for line in result.diagnosis.advice if "at different modes" in line]
    assert len(told) == 1 and f"{64 - above} stay near -4 and {above} near 4" in told[0]


@pytest.mark.parametrize("lower", [0.0, 2.0])  # three quarters of the chains start nearer to 0
def test_chains_in_a_hopeless_mode_are_moved_in_the_warmup_and_told(lower: float) -> None:
    def lopsided() -> None:
        x = pyro.sample("x", dist.Normal(double(0.0), 100.0))
        modes = [-0.5 * ((x - at) / 0.1) ** 2 - 60.0 * (at == lower) for at in (0.0, 2.0)]
        pyro.factor("modes", torch.logaddexp(*modes))

    result = run(lopsided, draws=200, warmup=200)
    # One chain in the other mode makes it at least 1.8; perfectly mixed chains reach 1.015.
    assert result.diagnosis.table["r_hat"].max() < 1.1
    assert_normal(z_scores(posterior(result, "x"), np.full((), 2.0 - lower), np.full((), 0.1)))
    assert any("chains reached regions of far too low density" in line for line in result.diagnosis.advice)
    assert result.idata.posterior.attrs["restarted"] > 0


def test_a_few_chains_show_the_others_the_better_mode() -> None:
    def potential(values: dict[str, Tensor]) -> Tensor:
        x = values["x"]
        return -torch.logaddexp(-0.5 * x.square().sum(), 60 - 0.5 * (x - 20).square().sum())

    pyro.set_rng_seed(0)
    kernel = ChEES(potential_fn=potential, num_chains=32, jit_compile=False)
    better = (torch.arange(32) % 8 == 0)[:, None].double()
    kernel.initial_params = {"x": 20 * better + torch.randn(32, 5).double()}
    MCMC(kernel, num_samples=10, warmup_steps=150, disable_progbar=True).run()
    # A chain may find the better mode by itself before.
    assert 20 <= kernel.restarted <= 28
    assert bool((kernel.constrained()["x"].mean(-1) > 10).all())


def test_a_chain_that_is_moved_twice_counts_once() -> None:
    kernel = ChEES(potential_fn=lambda v: v["x"] ** 2 / 2, num_chains=16, jit_compile=False)
    kernel.initial_params = {"x": torch.randn(16).double()}
    kernel.setup(100)
    kernel._renewals = set()
    for _ in range(2):
        kernel.advance()
        kernel._latest.energy[:, 3] += 1e4
        kernel._restart()
    assert kernel.restarted == 1


def test_chains_in_a_low_but_wide_mode_stay() -> None:
    """The narrow mode is 40 nats higher, and holds a share of exp(-6) of the mass."""
    narrow, wide = double(0.0).expand(20), double(20.0).expand(20)

    def potential(values: dict[str, Tensor]) -> Tensor:
        x = values["x"]
        return -torch.logaddexp(40 - 0.5 * ((x - narrow) / 0.1).square().sum(), -0.5 * (x - wide).square().sum())

    pyro.set_rng_seed(0)
    kernel = ChEES(potential_fn=potential, num_chains=32, jit_compile=False)
    kernel.initial_params = {"x": torch.stack([narrow, wide]).repeat(16, 1) + 0.1 * torch.randn(32, 20).double()}
    MCMC(kernel, num_samples=10, warmup_steps=150, disable_progbar=True).run()
    assert kernel.restarted == 0
    assert int((kernel.constrained()["x"].mean(-1) > 10).sum()) == 16


@pytest.mark.parametrize("share", [0.05, 0.95], ids=["of little mass", "of most mass"])
def test_a_dense_mode_that_is_correlated_does_not_empty_a_wide_one(share: float) -> None:
    """Modes of the same marginals: the correlated one is exp(41) times denser, and holds ``share`` of the mass."""
    dim, far = 20, 20.0
    covariance = 0.99 + 0.01 * torch.eye(dim).double()
    dense = torch.distributions.MultivariateNormal(torch.zeros(dim).double(), covariance, validate_args=False)
    wide = torch.distributions.MultivariateNormal(dense.loc + far, torch.eye(dim).double(), validate_args=False)

    def potential(values: dict[str, Tensor]) -> Tensor:
        x, mass = values["x"], torch.tensor([share, 1 - share]).log()
        return -torch.logaddexp(dense.log_prob(x) + mass[0], wide.log_prob(x) + mass[1])

    kernel = ChEES(potential_fn=potential, num_chains=32, jit_compile=False)
    kernel.initial_params = {"x": torch.cat([dense.sample((16,)), wide.sample((16,))])}
    MCMC(kernel, num_samples=10, warmup_steps=150, disable_progbar=True).run()
    assert kernel.restarted == 0
    assert int((kernel.constrained()["x"].mean(-1) > far / 2).sum()) == 16


@pytest.mark.parametrize("draws", [100, 800, 3000])
def test_the_volume_of_a_correlated_mode_of_many_dimensions_is_that_of_its_covariance(draws: int) -> None:
    """250 dimensions: half the log determinant is -570, though all marginals are those of a mode of volume zero."""
    covariance = 0.99 + 0.01 * torch.eye(250).double()
    exact = 0.5 * float(torch.linalg.slogdet(covariance)[1])
    dense = torch.distributions.MultivariateNormal(torch.zeros(250).double(), covariance).sample((draws,))
    assert log_volume(dense, least=True) < exact + 100
    assert log_volume(dense, least=False) > exact - 30
    assert log_volume(torch.randn(draws, 250).double(), least=False) == pytest.approx(0.0, abs=40)


def test_constrained_sites() -> None:
    """Priors whose means are known: the Jacobians of all transforms are in the density."""

    def model() -> None:
        pyro.sample("share", dist.Beta(double(2.0), 5.0))
        pyro.sample("simplex", dist.Dirichlet(double(1.0, 2.0, 5.0)))
        pyro.sample("corr", dist.LKJCholesky(3, double(2.0)))
        normal = dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)
        pyro.sample("ordered", dist.TransformedDistribution(normal, dist.transforms.OrderedTransform()))
        pyro.sample("between", dist.Uniform(double(-3.0), 7.0))

    result = run(model, chains=128, draws=150, warmup=200)
    beta, wide = scipy.stats.beta(2, 5), scipy.stats.uniform(-3, 10)
    assert_normal(z_scores(posterior(result, "share"), beta.mean(), beta.std()))
    assert_normal(z_scores(posterior(result, "between"), wide.mean(), wide.std()))
    simplex = scipy.stats.dirichlet([1, 2, 5])
    assert_normal(z_scores(posterior(result, "simplex"), simplex.mean(), simplex.var() ** 0.5))
    ordered = posterior(result, "ordered")
    assert (ordered[..., 0] < ordered[..., 1]).all()
    assert_normal(z_scores(ordered[..., 0], np.array(0.0), np.array(1.0)))
    corr = posterior(result, "corr") @ np.swapaxes(posterior(result, "corr"), -1, -2)
    np.testing.assert_allclose(np.diagonal(corr, axis1=-2, axis2=-1), 1.0)
    # Each correlation is 2 Beta(a, a) - 1 with a = eta - 1 + dim / 2.
    assert_normal(z_scores(corr[..., 1, 0], np.array(0.0), 2 * np.array(scipy.stats.beta(2.5, 2.5).std())))


def test_an_enumerated_mixture_has_the_posterior_of_quadrature() -> None:
    y = double(2.0, -2.0, 1.4, 0.3, -0.2, 2.5)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.LogNormal(double(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(double(0.3, 0.7)))
            pyro.sample("y", dist.Normal(torch.where(z == 1, mu, -mu), 1.0), obs=y)

    result = run(model, y)
    grid = np.linspace(1e-3, 8, 20_000)
    parts = [np.log(w) + scipy.stats.norm.logpdf(y.numpy()[:, None], s * grid) for w, s in ((0.3, -1), (0.7, 1))]
    density = np.exp(np.logaddexp(*parts).sum(0) + scipy.stats.lognorm.logpdf(grid, 1.0))
    density /= density.sum()
    mean = (density * grid).sum()
    assert_normal(z_scores(posterior(result, "mu"), mean, np.sqrt((density * (grid - mean) ** 2).sum())))
    assert result.idata.posterior["z"].shape == (64, 250, 6)


def test_a_gaussian_process_whose_matrix_fails_in_some_chains_has_the_posterior_of_quadrature() -> None:
    """Trajectories of the warmup reach noises at which the matrix cannot be factorised: these diverge alone."""
    x = torch.linspace(0, 1, 15).double()
    y = torch.sin(5 * x) + 0.1 * torch.cos(40 * x)
    square = (x[:, None] - x) ** 2

    def model(y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(double(-1.0), 0.5))
        noise = pyro.sample("noise", dist.LogNormal(double(-3.0), 3.0))
        covariance = torch.exp(-0.5 * square / length**2) + noise**2 * torch.eye(15).double()
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(15).double(), covariance), obs=y)

    kernel = partial(ChEES, step_size=2.0, trajectory_length=10.0)
    result = quiet(model, y, kernel, compile=False, draws=150, warmup=200)
    assert result.idata.attrs["execution"] == "traced"
    assert not any(line.startswith("chain") for line in result.diagnosis.advice)
    length, noise = (
        v.flatten()
        for v in torch.meshgrid(
            torch.linspace(-3.5, 1, 150).double().exp(), torch.linspace(-6, 0.5, 150).double().exp(), indexing="ij"
        )
    )
    covariance = torch.exp(-0.5 * square / length[:, None, None] ** 2) + noise[:, None, None] ** 2 * torch.eye(15)
    density = dist.MultivariateNormal(torch.zeros(15).double(), covariance).log_prob(y)
    density += dist.Normal(double(-1.0), 0.5).log_prob(length.log()) + dist.Normal(double(-3.0), 3.0).log_prob(
        noise.log()
    )
    weights = (density - density.logsumexp(0)).exp()
    for name, values in (("length", length.log()), ("noise", noise.log())):
        mean = (weights * values).sum()
        sd = (weights * (values - mean) ** 2).sum().sqrt()
        assert_normal(z_scores(np.log(posterior(result, name)), mean.numpy(), sd.numpy()))


def test_plain_mcmc_has_chains_as_the_second_dimension() -> None:
    def model() -> None:
        pyro.sample("rate", dist.Gamma(double(3.0), 2.0))

    mcmc = MCMC(ChEES(model, num_chains=16, jit_compile=False), num_samples=305, warmup_steps=205, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["rate"]
    assert draws.shape == (305, 16)
    assert len(np.unique(draws[:, 0])) > 200
    law = scipy.stats.gamma(3, scale=0.5)
    assert_normal(z_scores(draws.T.numpy(), np.array(law.mean()), np.array(law.std())))


def test_a_potential_in_place_of_a_model() -> None:
    start = {"x": torch.zeros(20, 2).double(), "y": torch.ones(20).double()}
    kernel = ChEES(
        potential_fn=lambda v: (v["x"] ** 2).sum() / 2 + (v["y"] - 3) ** 2 / 8, num_chains=20, jit_compile=False
    )
    kernel.initial_params = start
    MCMC(kernel, num_samples=1, warmup_steps=200, disable_progbar=True).run()
    draws = torch.cat([kernel.advance().position for _ in range(30)]).transpose(0, 1).numpy()
    assert_normal(z_scores(draws, np.array([0.0, 0.0, 3.0]), np.array([1.0, 1.0, 2.0])))
    assert kernel.diagnostics() == {"divergences": {}}


def test_a_cleared_cache_makes_the_next_draw_start_where_it_is_told() -> None:
    def start(clear: bool) -> torch.Tensor:
        pyro.set_rng_seed(0)
        # An energy of shape (1,), as Pyro's kernels take it too.
        kernel = ChEES(potential_fn=lambda z: 0.5 * z["z"].square()[None], num_chains=4, block=5, jit_compile=False)
        kernel.initial_params = {"z": torch.zeros(4)}
        kernel.setup(20)
        draw = kernel.initial_params
        for _ in range(22):
            draw = kernel.sample(draw)
        if clear:
            kernel.clear_cache()
            draw["z"].fill_(1e3)
        return kernel.sample(draw)["z"]

    assert start(False).abs().max() < 10
    assert start(True).abs().min() > 100


def test_divergences_are_counted_by_chain() -> None:
    with isolated(0):
        kernel = ChEES(partial(centred, EFFECTS), jit_compile=False, num_chains=32)
        kernel.setup(100)
        while kernel.warming:
            kernel.advance()
        steps = [kernel.advance().diverging]
        # Divergences come in a few of a thousand transitions.
        while len(steps) < 300 and sum(map(int, (s.sum() for s in steps))) < 3:
            steps.append(kernel.advance().diverging)
        flags = torch.cat(steps)
    found = kernel.diagnostics()["divergences"]
    assert sum(map(len, found.values())) == int(flags.sum()) > 0
    assert all(bool(flags[t, int(name.split()[1])]) for name, at in found.items() for t in at)


@pytest.mark.parametrize("dense", [True, False])
def test_leapfrogs_go_back_and_keep_the_energy_to_second_order(dense: bool) -> None:
    def density(q: Tensor) -> tuple[Tensor, Tensor]:
        return (q**4).sum(0) / 4 + q[0] * q[1], q**3 + q.flip(0)

    torch.manual_seed(0)
    q, p = torch.randn(2, 2, 6).double()
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double() if dense else double(2.0, 1.0)
    start = trajectory.Chains(q, *density(q))

    def energy(at: trajectory.Chains, p: Tensor) -> Tensor:
        return at.energy + 0.5 * (p * (covariance @ p if dense else covariance[:, None] * p)).sum(0)

    errors = []
    for n in (100, 200):
        step, count = double(1.0 / n), torch.tensor(float(n))
        end, out = trajectory._integrate(density, start, p, covariance, step, count)
        errors.append((energy(end, out) - energy(start, p)).abs().max())
        back, returned = trajectory._integrate(density, end, -out, covariance, step, count)
        torch.testing.assert_close((back.position, returned), (q, -p))
        assert (end.position - q).norm(dim=0).min() > 0.1
    assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.05)


def test_moves_are_as_frequent_as_the_acceptance_says() -> None:
    with isolated(0):
        kernel = ChEES(
            partial(gaussian, torch.eye(5).double()), jit_compile=False, step_size=1.5, trajectory_length=3.0
        )
        kernel.setup(0)
        before, moved, said = kernel._chains.position.mT, [], []
        for _ in range(40):
            moves = kernel.advance()
            path = torch.cat([before[None], moves.position])
            moved.append((path[1:] != path[:-1]).any(-1))
            said.append(moves.acceptance)
            before = path[-1]
    moved, said = torch.cat(moved).double(), torch.cat(said)
    assert 0.05 < said.mean() < 0.95
    error = (said * (1 - said)).mean().sqrt() / said.numel() ** 0.5
    assert abs(float(moved.mean() - said.mean())) < 4 * float(error)


def test_fused_blocks_are_the_traced_ones() -> None:
    covariance = correlated(3)
    with isolated(0):
        kernels = []
        for _ in range(2):
            pyro.set_rng_seed(0)
            kernels.append(ChEES(partial(gaussian, covariance), num_chains=8, block=2, jit_compile=False))
            kernels[-1].setup(20)
        traced, fused = kernels
        fused.fuse()
        assert (traced.execution, fused.execution) == ("traced", "fused")
        for _ in range(2):
            moves = []
            for kernel in kernels:
                pyro.set_rng_seed(1)
                moves.append(kernel.advance())
            for name, one, two in zip(trajectory.Moves._fields, *moves, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8, msg=name)


def test_a_model_with_parameters_is_one_program() -> None:
    loc = torch.nn.Parameter(double(1.0))
    with isolated(0):
        kernel = ChEES(lambda: pyro.sample("x", dist.Normal(loc, 1.0)), num_chains=8, jit_compile=False)
        kernel.setup(20)
        kernel.fuse()
        graphs = counters["stats"]["unique_graphs"]
        for _ in range(3):
            kernel.advance()
        assert kernel.execution == "fused"
        assert counters["stats"]["unique_graphs"] == graphs


def test_trajectories_longer_than_thought_make_the_program_worth_compiling(monkeypatch) -> None:
    monkeypatch.setattr(policy, "FUSE_POTENTIAL_OPERATIONS", 10_000)
    asked = []
    monkeypatch.setattr(ChEES, "fuse", lambda self, *_: asked.append(self.gradients))
    for step in (0.5, 0.005):
        kernel = partial(ChEES, step_size=step, trajectory_length=1.0)
        quiet(lambda: pyro.sample("x", dist.Normal(double(1.0), 2.0)), None, kernel, draws=24, warmup=0)
    # Not for short ones; for long ones once, after the first block.
    assert len(asked) == 1 and asked[0] > 300


def test_much_arithmetic_makes_the_program_worth_compiling(monkeypatch) -> None:
    monkeypatch.setattr(policy, "FUSE_POTENTIAL_OPERATIONS", 10_000)
    asked = []
    monkeypatch.setattr(ChEES, "fuse", lambda self, *_: asked.append(self.operations))
    for rows in (10, 20_000):

        def model(rows: int = rows) -> None:
            x = pyro.sample("x", dist.Normal(double(0.0), 1.0))
            with pyro.plate("data", rows):
                pyro.sample("y", dist.StudentT(double(4.0), x, 1.0), obs=torch.ones(rows).double())

        quiet(model, None, partial(ChEES, step_size=0.01, trajectory_length=0.02), chains=8, draws=8, warmup=8)
    # Before the first transition, and for the large data alone: 8 chains times 20,000 rows in several operations.
    assert len(asked) == 1 and asked[0] > 400


def test_a_default_run_is_reproduced_by_its_seed_and_goes_on() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(double(1.0), 2.0))

    one, two, other = (quiet(model, seed=seed, draws=45, warmup=115) for seed in (3, 3, 4))
    assert one.method == "ChEES"
    assert one.idata.posterior.sizes == {"chain": 64, "draw": 45}
    assert torch.equal(one.draws["x"], two.draws["x"])
    assert not torch.equal(one.draws["x"], other.draws["x"])
    more = one.draw(1000)["x"]
    assert torch.equal(more, one.draw(1000)["x"])
    assert not torch.equal(more, one.draw(1000, seed=2)["x"])
    assert abs(float(more.mean()) - 1) < 0.5
    stats = one.idata.sample_stats
    assert {"acceptance_rate", "diverging", "step_size", "n_steps", "lp", "energy"} == set(stats.data_vars)
    exact = dist.Normal(double(1.0), 2.0).log_prob(torch.as_tensor(posterior(one, "x")))
    np.testing.assert_allclose(stats["lp"], exact)


def test_a_few_more_draws_come_from_all_chains_by_turns() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(double(0.0), 50.0))
        pyro.sample("square", dist.Normal(x**2 / 30, 1.0), obs=double(30.0))

    result = quiet(model, chains=16, draws=10, warmup=20)
    side = torch.as_tensor(posterior(result, "x"))[:, -1] > 0
    assert 0 < int(side.sum()) < 16, "both modes have chains"
    assert torch.equal(result.draw(24)["x"] > 0, torch.cat([side, side[:8]]))


def test_few_chains_are_run_by_nuts() -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(double(1.0), 2.0))

    assert quiet(model, chains=2, draws=10, warmup=10).method == "NUTS"
    assert quiet(model, None, NUTS, chains=9, draws=4, warmup=0).method == "NUTS"


def steered() -> None:
    mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
    pyro.factor("f", mu if mu > 0 else 2 * mu)


@pytest.mark.filterwarnings("ignore:.*cannot be mapped over draws")
def test_what_cannot_be_traced_is_run_by_nuts_with_one_line() -> None:
    with pytest.warns(UserWarning, match="NUTS in place of ChEES, because it cannot be traced") as said:
        result = quiet(steered, draws=10, warmup=10, compile=False)
    assert len([w for w in said if "traced" in str(w.message)]) == 1
    assert result.method == "NUTS"
    assert result.idata.posterior.sizes["chain"] == 4


@pytest.mark.filterwarnings("ignore:.*cannot be mapped over draws")
def test_what_cannot_be_traced_is_run_eagerly_when_chees_is_asked_for() -> None:
    with pytest.warns(UserWarning, match="run eagerly, one after another, because they cannot be traced"):
        result = run(steered, chains=8, draws=10, warmup=20)
    assert result.idata.attrs["execution"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "model: expected either a model or a potential_fn"),
        ({"model": steered, "num_chains": 1}, "num_chains: expected an integer of at least 2, got 1"),
        ({"model": steered, "max_steps": 0.5}, "max_steps: expected an integer of at least 1, got 0.5"),
        ({"model": steered, "step_size": -1.0}, "step_size: expected a positive number, got -1.0"),
        ({"model": steered, "target_accept_prob": 1}, "target_accept_prob: expected a number between 0 and 1, got 1"),
    ],
)
def test_bad_arguments_get_one_line(arguments: dict, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        ChEES(**arguments)


def test_bad_starts_get_one_line() -> None:
    kernel = ChEES(potential_fn=lambda v: (v["x"] ** 2).sum(), num_chains=4)
    with pytest.raises(ValueError, match="initial_params: expected unconstrained values of all chains"):
        kernel.setup(0)
    with pytest.raises(ValueError, match=r"initial_params: expected \(4, ...\) for x, got \(3,\)"):
        kernel.initial_params = {"x": torch.zeros(3)}

    def nowhere() -> None:
        x = pyro.sample("x", dist.Normal(double(0.0), 1.0))
        pyro.factor("never", torch.where(x > 1e3, x, torch.inf * -1))

    with pytest.raises(ValueError, match="cannot find valid initial params"), pyro.validation_enabled(False):
        run(nowhere)


def test_a_model_without_continuous_sites_is_refused_before_it_is_traced() -> None:
    def model() -> None:
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="^model: expected a continuous latent site to sample, got none$"):
        ChEES(model).setup(10)


def doubled_in_place(y: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(4).double(), 1.0).to_event(1))
    mask = torch.zeros(4, dtype=torch.bool)
    mask[1:] = True
    mean = a.clone()
    mean[mask] = mean[mask] * 2
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_fused_chains_of_a_model_that_writes_by_a_mask_have_the_conjugate_posterior() -> None:
    """Precisions 1 + 1 and 1 + 4. Inductor wrote into the positions that its loop carries: every mean was wrong."""
    result = quiet(doubled_in_place, double(1, 1, 1, 1), kernel=ChEES, draws=200, warmup=200, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    mean, sd = np.array([0.5, 0.4, 0.4, 0.4]), np.array([0.5, 0.2, 0.2, 0.2]) ** 0.5
    assert_normal(z_scores(posterior(result, "a"), mean, sd))


@pytest.mark.parametrize("name", ["position", "energy", "acceptance"])
def test_a_fused_program_with_other_transitions_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def looped(function, *_, **__):
        def wrong(*inputs):
            chains, tuning, moves = function(*inputs)
            inputs[1].position.fill_(7.0)
            return chains, tuning, moves._replace(**{name: getattr(moves, name) * 1.1})

        return wrong

    model = partial(gaussian, torch.eye(2).double())
    draws = [quiet(model, kernel=ChEES, draws=20, warmup=20, compile=False).draws["x"]]
    monkeypatch.setattr(hamiltonian, "looped", looped)
    with pytest.warns(UserWarning, match="not fused: a fused transition differs from the traced one in .. of 64"):
        result = quiet(model, kernel=ChEES, draws=20, warmup=20, compile=True)
    assert result.idata.attrs["execution"] == "traced"
    draws.append(result.draws["x"])
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_a_tuning_is_the_same_as_a_vector() -> None:
    vector = torch.arange(8.0)
    tuning = trajectory.tuning_of(vector)
    assert torch.equal(trajectory.packed(tuning), vector)
    assert (tuning.step.taken, tuning.step.log_step_mean, tuning.square) == (0, 4, 5)
    assert (tuning.log_length, tuning.log_length_mean) == (6, 7)
