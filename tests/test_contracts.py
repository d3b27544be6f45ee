"""An objective and a kernel written from ``inference/core/contracts.py`` alone, run by every verb."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.util import torch_item
from torch import Tensor

from inference import compare, fit, log_evidence, sample
from inference.core.bound import bind
from inference.core.contracts import BatchedKernel, Kernel, Objective, Pair
from inference.objectives import Compiled

X = torch.tensor([1.0, 3.0, 2.0, 4.0])
MEAN, SD = 10 / 4.01, 4.01**-0.5
"""Posterior of the location of four rows of unit variance under a prior of variance 100."""


def model(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class Tempered(Objective):
    """Minus the ELBO with the log density of the model raised to a power, written from the contract."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        drawn = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        scored = pyro.poutine.trace(pyro.poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        loss = drawn.log_prob_sum() - self.power * scored.log_prob_sum()
        loss.backward()
        return torch_item(loss)

    def advise(self, bound: Any, losses: np.ndarray) -> tuple[str, ...]:
        return (f"{len(losses)} steps on {len(bound.data)} data",)


class WithoutPosterior(Tempered):
    has_posterior = False


class Walk(BatchedKernel):
    """Random-walk Metropolis, all chains in one tensor, written from the contract."""

    def __init__(self, model: Any, num_chains: int = 16, width: float = 1.0) -> None:
        self.model, self.num_chains, self.width = model, num_chains, width
        super().__init__()

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        start, potential, self.transforms, _ = initialize_model(self.model, model_args=args, model_kwargs=kwargs)
        self.names = list(start)
        self.energy = lambda at: torch.stack(
            [potential({n: v[k] for n, v in at.items()}) for k in range(len(at[self.names[0]]))]
        )
        at = {n: torch.stack([v] * self.num_chains) for n, v in start.items()}
        self.initial_params = at
        self.state, self.left = (at, self.energy(at)), warmup_steps

    @property
    def warming(self) -> bool:
        return self.left > 0

    def advance(self) -> tuple[dict[str, Tensor], Tensor]:
        at, energy = self.state
        new = {n: v + self.width * torch.randn_like(v) for n, v in at.items()}
        proposed = self.energy(new)
        taken = torch.rand(self.num_chains).log() < energy - proposed
        at = {n: torch.where(taken.reshape(-1, *[1] * (v.dim() - 1)), new[n], v) for n, v in at.items()}
        self.state, self.left = (at, torch.where(taken, proposed, energy)), self.left - 1
        return self.state

    def collect(self, blocks: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        lp = -torch.stack([energy for _, energy in blocks])
        values = {
            n: self.transforms[n].inv(torch.stack([at[n] for at, _ in blocks]))
            if n in self.transforms
            else torch.stack([at[n] for at, _ in blocks])
            for n in self.names
        }
        return values, {"lp": lp, "diverging": torch.zeros_like(lp, dtype=torch.bool)}

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.advance()[0]


pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("compile", [False, True])
def test_an_objective_of_ones_own_is_fitted(compile: bool) -> None:
    result = fit((model, AutoNormal(model)), X, Tempered, steps=1500, compile=compile, progress=False)
    assert result.method == "SVI (Tempered)"
    assert result.idata.attrs["execution"] == ("fused" if compile else "eager")
    assert float(result.draws["loc"].mean()) == pytest.approx(MEAN, abs=0.15)
    assert result.diagnosis.pareto_k < 0.7


def test_a_number_that_is_changed_by_hand_is_no_constant_of_a_compiled_step() -> None:
    objective, guide = Tempered(), AutoNormal(model)
    guide(X)
    compiled = Compiled(objective, fuse=False)
    for power in (1.0, 1.0, 1.0, 0.5, 0.5, 0.5):
        objective.power = power
        torch.manual_seed(1)
        got = float(compiled.loss_and_grads(model, guide, X))
        torch.manual_seed(1)
        assert got == pytest.approx(objective.loss_and_grads(model, guide, X), rel=1e-5)
    assert compiled.state == "traced"


def test_an_objective_works_in_plain_svi() -> None:
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Tempered())
    losses = [svi.step(X) for _ in range(300)]
    before, after = np.array(losses[:50]), np.array(losses[-50:])
    # A fall of five standard errors of the difference.
    assert before.mean() - after.mean() > 5 * ((before.var() + after.var()) / 50) ** 0.5
    with pytest.raises(NotImplementedError, match="Tempered has no loss without gradients"):
        svi.evaluate_loss(X)


def test_an_objective_without_a_posterior_says_what_it_has_to_say() -> None:
    result = fit((model, AutoNormal(model)), X, WithoutPosterior, steps=5, progress=False)
    assert result.method == "WithoutPosterior"
    assert str(result.diagnosis) == "5 steps on 1 data"
    assert not result.draws
    with pytest.raises(ValueError, match="draw: WithoutPosterior learns a model and no posterior"):
        result.draw(3)


def test_an_objective_refuses_what_it_cannot_fit() -> None:
    class Picky(Tempered):
        def check(self, bound: Any) -> None:
            raise ValueError(f"pair: expected another one, got {bound.name}")

    with pytest.raises(ValueError, match="pair: expected another one, got model"):
        fit((model, AutoNormal(model)), X, Picky, steps=5, progress=False)


def test_a_kernel_of_ones_own_is_sampled() -> None:
    result = sample(model, X, Walk, draws=400, warmup=100, chains=20, progress=False)
    assert result.method == "Walk"
    assert result.idata.posterior.sizes["chain"] == 20
    draws = result.draws["loc"]
    assert float(draws.mean()) == pytest.approx(MEAN, abs=5 * SD / result.diagnosis.min_ess_bulk**0.5)
    assert float(draws.std()) == pytest.approx(SD, rel=0.1)
    assert len(result.draw(50)["loc"]) == 50


def test_a_kernel_of_ones_own_runs_in_plain_mcmc() -> None:
    mcmc = MCMC(Walk(model), num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run(X)
    assert tuple(mcmc.get_samples()["loc"].shape) == (20, 16)


def test_both_stand_in_a_comparison() -> None:
    methods = {
        "own objective": partial(fit, objective=Tempered, steps=1000, progress=False),
        "own kernel": partial(sample, kernel=Walk, draws=200, warmup=100, progress=False),
    }
    truth = {"loc": (torch.tensor(MEAN), torch.tensor(SD))}
    table = compare(lambda: (model, AutoNormal(model)), X, methods, truth=truth).table
    assert (table["error_max"] < 0.5).all()


def test_what_pyro_has_is_taken_with_the_defaults() -> None:
    elbo = Trace_ELBO()
    asked = Objective.of(elbo)
    assert (asked.has_posterior, asked.sums_out, tuple(asked.cycle), dict(asked.probe)) == (True, False, (), {})
    assert Objective.of(TraceEnum_ELBO()).sums_out
    assert asked.constants()["num_particles"] == 1
    assert asked.num_particles == 1
    asked.check(bind((model, AutoNormal(model)), X))
    with pytest.raises(ValueError, match="data: the model observes nothing"):
        asked.check(bind(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))
    assert not Kernel.of(HMC(model)).batched and Kernel.of(Walk(model)).batched
    assert Objective.of(Tempered(2.0)).constants()["power"] == 2.0


def test_a_pair_need_inherit_nothing() -> None:
    class Plain:
        def __init__(self) -> None:
            self.coords = {"rows": list("abcd")}
            self.guide = AutoNormal(model)
            self.seen: dict[str, Any] = {}

        def model(self, x: Tensor) -> None:
            model(x)

        def check(self, **data: Any) -> None:
            self.seen = data

        def log_evidence(self, x: Tensor) -> Tensor:
            return 0 * x - 1.5

    pair = Plain()
    result = fit(pair, X, steps=5, progress=False)
    assert list(pair.seen) == ["x"]
    assert list(result.idata.observed_data["rows"].values) == list("abcd")
    assert log_evidence(pair, X, "exact").mean == -1.5
    asked = Pair.of(SimpleNamespace(model=model))
    assert (asked.guide, asked.conditional, asked.rowwise, dict(asked.dims)) == (None, None, False, {})


def test_further_keyword_arguments_are_taken_and_arrive() -> None:
    seen: dict[str, Any] = {}

    def regression(N: int, y: Tensor, **columns: Tensor) -> None:
        seen.update(columns)
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(slope * columns["year"], 1.0), obs=y)

    data = {"N": 4, "y": 2 * X, "year": X}
    result = fit((regression, AutoNormal(regression)), data, steps=600, progress=False)
    assert torch.equal(seen["year"], X)
    precision = float(X.square().sum()) + 0.01
    assert float(result.draws["slope"].mean()) == pytest.approx(2 * (precision - 0.01) / precision, abs=0.05)
