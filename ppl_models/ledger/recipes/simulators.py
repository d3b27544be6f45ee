r"""Recipes of neural posterior estimation on the simulators of Lueckmann et al. 2021.

Each task has a prior of its parameters :math:`\theta`, a simulator of data x, and for ten observations 10,000 draws of
the posterior (the package ``sbibm``, of which only the files of data are read). A conditional density
:math:`q(\theta \mid x)` is fitted to so many pairs of parameters and data, which is the sleep phase of wake-sleep on
draws that are made once; its draws at the ten observations are compared with those of the reference by a classifier
(C2ST): 0.5 where they cannot be told apart, 1 where they always can.

References: Papamakarios and Murray 2016 (https://arxiv.org/abs/1605.06376); Lueckmann et al. 2021, "Benchmarking
Simulation-Based Inference" (https://arxiv.org/abs/2101.04653); Durkan et al. 2019, "Neural Spline Flows"
(https://arxiv.org/abs/1906.04032).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.constraints import Constraint
from pyro.distributions.transforms import AffineTransform, ConditionalSplineAutoregressive
from pyro.nn import ConditionalAutoRegressiveNN
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from inference import Result, isolated, pointwise_log_likelihood
from ppl_models.data.sbibm import Benchmark, read_benchmark
from ppl_models.ledger.recipes.trained import kept, placed, reads_weights, show_points, trained_by_stages
from ppl_models.models.pair import Pair, nothing

BUDGETS = {1_000: 50, 10_000: 100, 100_000: 500}
"""Numbers of simulations, each with the size of its minibatches."""
QUICK = {200: 50}
"""The same at the size for tests."""
HELD_OUT = 0.1
"""Fraction of the simulations by which the stage is chosen."""
RATES = (1e-3, 1e-3, 1e-3, 5e-4, 2e-4, 1e-4)
"""Learning rates of the stages."""
STEPS = 2000
"""Steps of a stage."""
STAGE_EPOCHS = 40
"""Most epochs of a stage."""
BINS = 8
"""Bins of a spline."""


@dataclass(frozen=True)
class Task:
    """A prior and a simulator.

    Attributes:
        prior: Distribution of the parameters, an event (D,).
        simulate: From parameters (N, D), and the files of the task, to data (N, C), with torch's global random state.
    """

    prior: dist.TorchDistribution
    simulate: Callable[[Tensor, Benchmark], Tensor]


def two_moons(theta: Tensor, _: Benchmark) -> Tensor:
    """A noisy half circle at a place that depends on \\|theta_1 + theta_2\\| and theta_2 - theta_1."""
    angle = math.pi * (torch.rand(len(theta)) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(theta))
    shift = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1) + shift


def gaussian(theta: Tensor, _: Benchmark) -> Tensor:
    """The parameters with noise of variance 0.1."""
    return theta + math.sqrt(0.1) * torch.randn_like(theta)


def slcp(theta: Tensor, _: Benchmark) -> Tensor:
    """Four points of a bivariate normal: two parameters are its mean, three its standard deviations and correlation."""
    sd, rho = theta[:, None, 2:4].square(), theta[:, None, 4].tanh()
    noise = torch.randn(len(theta), 4, 2)
    second = rho * noise[..., 0] + (1 - rho.square()).sqrt() * noise[..., 1]
    return (theta[:, None, :2] + sd * torch.stack([noise[..., 0], second], -1)).flatten(1)


def bernoulli_glm(theta: Tensor, files: Benchmark) -> Tensor:
    """The number of spikes of a neuron in 100 bins, and the stimulus before them, summed over nine lags."""
    design, stimulus = files.tensors["design_matrix"], files.tensors["stimulus_I"]
    spikes = torch.bernoulli((theta @ design.mT).sigmoid())
    lags = torch.nn.functional.conv1d(spikes[:, None], stimulus.reshape(1, 1, -1), padding=8)[:, 0, -9:]
    return torch.cat([spikes.sum(1, keepdim=True), lags], 1)


def sir(theta: Tensor, _: Benchmark) -> Tensor:
    """Infected of 1,000 people at ten times of an epidemic in a population of a million; steps of Runge and Kutta."""
    population, step, every = 1e6, 0.25, 68
    beta, gamma = theta.double().unbind(1)
    state = torch.stack([torch.full_like(beta, population - 1), torch.ones_like(beta)])

    def slope(s: Tensor) -> Tensor:
        caught = beta * s[0] * s[1] / population
        return torch.stack([-caught, caught - gamma * s[1]])

    infected = [state[1]]
    for k in range(1, 9 * every + 1):
        a = slope(state)
        b = slope(state + step / 2 * a)
        c = slope(state + step / 2 * b)
        state = state + step / 6 * (a + 2 * b + 2 * c + slope(state + step * c))
        if k % every == 0:
            infected.append(state[1])
    chance = (torch.stack(infected, 1) / population).clamp(0, 1)
    return torch.binomial(torch.full_like(chance, 1000.0), chance).to(theta)


def _filter_prior() -> dist.TorchDistribution:
    """Offset and filter of the spiking neuron: second differences of the filter are small."""
    count = 9
    first = torch.eye(count) - torch.diag(torch.ones(count - 1), -1)
    rough = first @ first + torch.diag(torch.arange(count) / count).sqrt()
    precision = torch.block_diag(torch.tensor([[0.5]]), rough.mT @ rough)
    return dist.MultivariateNormal(torch.zeros(count + 1), precision_matrix=precision)


def _box(dim: int, bound: float) -> dist.TorchDistribution:
    return dist.Uniform(torch.full((dim,), -bound), bound).to_event(1)


TASKS = {
    "two_moons": Task(_box(2, 1.0), two_moons),
    "gaussian_linear": Task(dist.Normal(torch.zeros(10), math.sqrt(0.1)).to_event(1), gaussian),
    "gaussian_linear_uniform": Task(_box(10, 1.0), gaussian),
    "slcp": Task(_box(5, 3.0), slcp),
    "bernoulli_glm": Task(_filter_prior(), bernoulli_glm),
    "sir": Task(
        dist.LogNormal(torch.tensor([0.4, 0.125]).log(), torch.tensor([0.5, 0.2])).to_event(1),
        sir,
    ),
}


class NeuralPosterior(Pair):
    r"""A conditional density of parameters given data by autoregressive rational splines.

    .. math:: \theta \mid x \sim (T_1 \circ \dots \circ T_K)(\mathrm{N}(0, I); x)

    Args:
        rows: Parameters and data side by side, (N, D + C), whose means and standard deviations scale them.
        parameters: Number of parameters D.
        hidden: Widths of the hidden layers of each transform.
        transforms: Number of transforms K.

    Data: rows (N, D + C). Sites: theta (D,) per row, observed.
    """

    guide = nothing

    def __init__(
        self, rows: Tensor, parameters: int, *, hidden: tuple[int, ...] = (50, 50), transforms: int = 5
    ) -> None:
        super().__init__()
        self.parameters_of_row, data = parameters, rows.shape[1] - parameters
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("sd", rows.std(0).clamp_min(1e-6))
        self.flows = nn.ModuleList()
        for _ in range(transforms):
            sizes = [BINS, BINS, BINS - 1, BINS]
            order: Any = torch.randperm(parameters)
            network = ConditionalAutoRegressiveNN(parameters, data, list(hidden), sizes, order)
            spline = {"count_bins": BINS, "bound": 4.0, "order": "linear"}
            self.flows.append(ConditionalSplineAutoregressive(parameters, network, **spline))

    def given(self, x: Tensor) -> dist.TorchDistribution:
        """q(theta | x) at data (..., C)."""
        count = self.parameters_of_row
        scaled = (x - self.mean[count:]) / self.sd[count:]
        base = dist.Normal(torch.zeros_like(self.mean[:count]), 1.0).expand((*x.shape[:-1], count)).to_event(1)
        # The network is evaluated once for a density; a draw takes one evaluation per parameter.
        flows: Any = reversed(self.flows)
        bent = [flow.condition(scaled).inv for flow in flows]
        return dist.TransformedDistribution(base, [*bent, AffineTransform(self.mean[:count], self.sd[:count], 1)])

    def model(self, x: Tensor) -> None:
        """Score the parameters of each row given its data."""
        count = self.parameters_of_row
        with self.rows(x):
            pyro.sample("theta", self.given(x[:, count:]), obs=x[:, :count])


def simulations(name: str, count: int, seed: int) -> Tensor:
    """Parameters and data side by side, (count, D + C)."""
    task, files = TASKS[name], read_benchmark(name)
    with isolated(seed):
        theta = task.prior.sample((count,))
        return torch.cat([theta, task.simulate(theta, files)], 1)


def c2st(x: Tensor, y: Tensor, seed: int = 1) -> float:
    """Cross-validated accuracy of the benchmark's own classifier of two samples (N, D), scaled by the first."""
    mean, sd = x.mean(0), x.std(0)
    rows = torch.cat([(x - mean) / sd, (y - mean) / sd]).cpu().numpy()
    units = 10 * x.shape[1]
    network = MLPClassifier((units, units), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(network, rows, np.repeat([0, 1], [len(x), len(y)]), cv=folds).mean())


@torch.no_grad()
def drawn(pair: NeuralPosterior, prior: dist.TorchDistribution, x: Tensor, count: int, seed: int) -> Tensor:
    """Draws (count, D) of q(theta | x) inside the support of the prior.

    Raises:
        ArithmeticError: Of so many draws fewer than one in a hundred lie in it.
    """
    kept, support = list[Tensor](), cast(Constraint, prior.support)
    with isolated(seed):
        while (inside := sum(map(len, kept))) < count:
            if len(kept) > 10 and inside < len(kept) * count / 100:
                raise ArithmeticError(f"theta: expected draws inside the prior, got {inside} of {len(kept) * count:,}")
            theta = pair.given(x).sample((count,)).cpu()
            kept.append(theta[support.check(theta) & theta.isfinite().all(-1)])
    return torch.cat(kept)[:count]


def estimated(quick: bool, seed: int, *, name: str) -> dict[str, float]:
    """C2ST of a neural posterior at 100,000 simulations, and at fewer; means over the ten observations.

    The stage of each fit is chosen by a tenth of its simulations.
    """
    files = read_benchmark(name)
    budgets, observations, draws = (QUICK, 1, 200) if quick else (BUDGETS, 10, 10_000)
    if reads_weights():
        # They are those of the figure.
        budgets = {max(budgets): budgets[max(budgets)]}
    found: dict[str, float] = {}
    for count, batch in budgets.items():
        rows = placed(simulations(name, count, seed))
        held = int(HELD_OUT * count)
        epochs = 1 if quick else min(STAGE_EPOCHS, max(1, STEPS * batch // count))

        def score(result: Result, valid: Tensor = rows[:held]) -> float:
            return float(pointwise_log_likelihood(result, valid).double().mean())

        result, _ = trained_by_stages(
            partial(NeuralPosterior, rows, files.reference.shape[-1]),
            rows[held:],
            stages=tuple((epochs, rate) for rate in (RATES[:1] if quick else RATES)),
            score=score,
            batch=batch,
            seed=seed,
        )
        with result.state():
            pair, prior, seen = result.bound.pair, TASKS[name].prior, files.observations[:observations]
            ours = [drawn(pair, prior, placed(x), draws, k) for k, x in enumerate(seen)]
            samples = zip(files.reference[:observations, :draws], ours, strict=True)
            accuracies = [kept(f"c2st of {count} at {k}", partial(c2st, *two)) for k, two in enumerate(samples)]
        show_points((files.reference[0, :2000, :2], "reference"), (ours[0][:2000, :2], "estimated"))
        found[f"at {count:,}"] = float(np.mean(accuracies))
        found[f"at {count:,}, sd"] = float(np.std(accuracies))
    return {"figure": found[f"at {max(budgets):,}"], **found}
