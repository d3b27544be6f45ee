"""Simulators of the ledger: moments by their formulas, an epidemic by scipy, densities that integrate to one."""

import bz2
import hashlib
import io
import math
import zipfile

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from inference import fit, isolated
from ppl_models.data.files import SBIBM, SHA256
from ppl_models.data.sbibm import Benchmark, read_benchmark
from ppl_models.ledger import pictures
from ppl_models.ledger.recipes import simulators
from ppl_models.ledger.recipes.simulators import TASKS, NeuralPosterior, c2st, drawn
from ppl_models.ledger.recipes.trained import seen, weights_at

COUNT = 40_000
NOTHING = Benchmark(torch.zeros(0), torch.zeros(0), {})
GLM = Benchmark(
    torch.zeros(0),
    torch.zeros(0),
    {
        n: torch.randn(*s, generator=torch.Generator().manual_seed(0))
        for n, s in (("design_matrix", (100, 10)), ("stimulus_I", (100,)))
    },
)


def simulated(name: str, theta: list[float], files: Benchmark = NOTHING) -> Tensor:
    """Many data of a task at one parameter."""
    with isolated(0):
        return TASKS[name].simulate(torch.tensor(theta).expand(COUNT, -1), files)


def near(got: Tensor, expected: Tensor, x: Tensor) -> bool:
    """Whether means agree with their expectation within five standard errors."""
    return bool(((got - expected).abs() < 5 * x.std(0) / COUNT**0.5 + 1e-6).all())


def test_a_linear_gaussian_simulator_has_variance_one_tenth() -> None:
    x = simulated("gaussian_linear", [0.3] * 10)
    assert near(x.mean(0), torch.full((10,), 0.3), x)
    assert near((x - 0.3).square().mean(0), torch.full((10,), 0.1), (x - 0.3).square())


def test_the_moons_are_half_circles_whose_place_keeps_two_parameters_apart() -> None:
    theta = [0.5, -0.8]
    x = simulated("two_moons", theta) - torch.tensor([-abs(-0.3) / math.sqrt(2) + 0.25, -1.3 / math.sqrt(2)])
    radius = x.norm(dim=1)
    assert near(radius.mean(0, keepdim=True), torch.tensor([0.1]), radius[:, None])
    assert float(radius.std()) == pytest.approx(0.01, rel=0.02) and float(x[:, 0].min()) > -1e-6
    # Each posterior has two moons: parameters that are exchanged with their signs give the same data.
    torch.testing.assert_close(simulated("two_moons", theta), simulated("two_moons", [0.8, -0.5]))


def test_four_points_have_the_covariance_of_their_three_parameters() -> None:
    x = simulated("slcp", [0.7, -2.0, 1.2, -0.9, 0.6]).reshape(COUNT, 4, 2)
    sd, rho = (1.2**2, 0.9**2), math.tanh(0.6)
    centred = x - torch.tensor([0.7, -2.0])
    assert near(x.mean(0), torch.tensor([0.7, -2.0]).expand(4, 2), x)
    products = centred[..., :, None] * centred[..., None, :]
    expected = torch.tensor([[sd[0] ** 2, rho * sd[0] * sd[1]], [rho * sd[0] * sd[1], sd[1] ** 2]])
    assert near(products.mean(0), expected.expand(4, 2, 2), products)
    assert near((centred[:, 0] * centred[:, 1]).mean(0), torch.zeros(2), centred[:, 0] * centred[:, 1])


def test_an_epidemic_is_that_of_scipy() -> None:
    beta, gamma, people = 0.5, 0.15, 1e6
    slope = lambda _, s: [-beta * s[0] * s[1] / people, beta * s[0] * s[1] / people - gamma * s[1]]  # noqa: E731
    times = np.arange(0, 154, 17)
    solved = solve_ivp(slope, (0, 153), [people - 1, 1.0], t_eval=times, rtol=1e-9, atol=1e-6)
    x = simulated("sir", [beta, gamma])
    assert near(x.mean(0), torch.tensor(1000 * solved.y[1] / people).float(), x)


def test_spikes_and_their_stimulus_have_the_expectation_of_the_filter() -> None:
    theta = torch.linspace(-0.3, 0.3, 10)
    x = simulated("bernoulli_glm", theta.tolist(), GLM)
    chance = (GLM.tensors["design_matrix"] @ theta).sigmoid().numpy()
    stimulus = GLM.tensors["stimulus_I"].numpy()
    # Lag k sums the stimulus k bins before each spike.
    lags = [sum(chance[t + k] * stimulus[t] for t in range(100 - k)) for k in range(9)]
    assert near(x.mean(0), torch.tensor([chance.sum(), *lags]).float(), x)


def test_the_prior_of_the_filter_has_small_second_differences() -> None:
    prior = TASKS["bernoulli_glm"].prior
    with isolated(0):
        theta = prior.sample((COUNT,))
    # Minus twice the log density is the offset's square over two, and the squares of F times the filter.
    offset, filter = theta[:, 0], theta[:, 1:]
    padded = torch.cat([torch.zeros(COUNT, 2), filter], 1)
    second = padded[:, 2:] - 2 * padded[:, 1:-1] + padded[:, :-2]
    rough = second + (torch.arange(9) / 9).sqrt() * filter
    squares = 0.5 * offset.square() + rough.square().sum(1)
    differences = prior.log_prob(theta) - prior.log_prob(torch.zeros(10)) + 0.5 * squares
    assert float(differences.abs().max()) < 1e-2


@pytest.fixture(scope="module")
def estimated() -> NeuralPosterior:
    """A neural posterior of the moons, after few steps."""
    with isolated(0):
        theta = TASKS["two_moons"].prior.sample((2000,))
        rows = torch.cat([theta, simulators.two_moons(theta, NOTHING)], 1)
        pair = NeuralPosterior(rows, 2)
    fit(pair, rows, steps=150, batch=200, learning_rate=2e-3, draws=1, progress=False)
    return pair


def test_a_neural_posterior_is_a_density_and_draws_from_it(estimated: NeuralPosterior) -> None:
    x = torch.tensor([-0.2, 0.4])
    side = torch.linspace(-2.6, 2.6, 401)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = estimated.given(x.expand(len(grid), -1)).log_prob(grid).exp() * float(side[1] - side[0]) ** 2
    assert float(density.sum()) == pytest.approx(1.0, abs=5e-3)
    with isolated(0), torch.no_grad():
        theta = estimated.given(x).sample((COUNT,))
    mean = (density[:, None] * grid).sum(0)
    assert near(theta.mean(0), mean, theta)
    assert near(
        (theta - mean).square().mean(0), (density[:, None] * (grid - mean).square()).sum(0), (theta - mean) ** 2
    )
    inside = drawn(estimated, TASKS["two_moons"].prior, x, 500, seed=0)
    assert inside.shape == (500, 2) and bool((inside.abs() <= 1).all())


def test_a_posterior_outside_of_the_prior_is_told(estimated: NeuralPosterior) -> None:
    elsewhere = dist.Uniform(torch.full((2,), 90.0), 91.0).to_event(1)
    with pytest.raises(ArithmeticError, match=r"theta: expected draws inside the prior, got 0 of 550"):
        drawn(estimated, elsewhere, torch.zeros(2), 50, seed=0)


def test_a_recipe_draws_its_posterior_and_is_evaluated_by_its_weights(tmp_path, monkeypatch) -> None:
    made = Benchmark(torch.tensor([[-0.2, 0.4]]), torch.rand(1, 200, 2), {})
    monkeypatch.setattr(simulators, "read_benchmark", lambda _: made)
    path = tmp_path / "weights.safetensors.gz"
    with seen() as shown, weights_at(path):
        found = simulators.estimated(True, 0, name="two_moons")
    (one,) = shown
    assert [(tuple(v.shape), label) for v, label in one.points] == [((200, 2), "reference"), ((200, 2), "estimated")]
    axes = pictures.Figure().subplots()
    pictures.rows_made(one.result.bound.pair, one.rows, one.points)(axes)
    assert [len(c.get_offsets()) for c in axes.collections] == [200, 200]
    # Without points there is nothing to be drawn beside the losses.
    assert pictures.rows_made(one.result.bound.pair, one.rows) is None
    # The weights are those of the last fit: of fewer simulations nothing is said.
    monkeypatch.setattr(simulators, "QUICK", {50: 10, 200: 50})
    with weights_at(path, read=True):
        again = simulators.estimated(True, 0, name="two_moons")
    assert set(again) == {"figure", "at 200", "at 200, sd"}
    assert again["figure"] == pytest.approx(found["figure"], abs=0.1)


def test_the_classifier_tells_samples_apart() -> None:
    with isolated(0):
        x, y = torch.randn(600, 2), torch.randn(600, 2)
    assert abs(c2st(x, y) - 0.5) < 0.08
    # The best classifier of two normals that are two standard deviations apart is right at Phi(1).
    assert c2st(x, y + torch.tensor([2.0, 0.0])) == pytest.approx(0.841, abs=0.05)


def test_files_are_read_from_the_wheel(tmp_path, monkeypatch) -> None:
    path = tmp_path / SBIBM
    path.parent.mkdir()
    folder = "sbibm/tasks/two_moons/files"
    held = io.BytesIO()
    torch.save(torch.tensor([1.0, 2.0]), held)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/design_matrix.pt", held.getvalue())
        for k in range(1, 11):
            archive.writestr(f"{folder}/num_observation_{k}/observation.csv", f"a,b\n{k}.5,2\n")
            draws = bz2.compress(f"p,q\n{k},0.25\n3,4\n".encode())
            archive.writestr(f"{folder}/num_observation_{k}/reference_posterior_samples.csv.bz2", draws)
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path))
    monkeypatch.setitem(SHA256, SBIBM, hashlib.sha256(path.read_bytes()).hexdigest())
    read_benchmark.cache_clear()
    found = read_benchmark("two_moons")
    read_benchmark.cache_clear()
    assert torch.equal(found.observations, torch.tensor([[k + 0.5, 2.0] for k in range(1, 11)]))
    assert found.reference.shape == (10, 2, 2) and found.reference[9, 0].tolist() == [10.0, 0.25]
    assert torch.equal(found.tensors["design_matrix"], torch.tensor([1.0, 2.0]))
