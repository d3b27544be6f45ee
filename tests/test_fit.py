"""fit: objectives, minibatches, schedules, early stopping, and what it refuses."""

import importlib.util
import math
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam, ClippedAdam, PyroOptim
from pyro.optim.clipped_adam import ClippedAdam as TorchClippedAdam
from torch import Tensor, nn

from inference import Joint, fit, ksd, log_evidence, pointwise_log_likelihood, prior_predictive, sample
from inference.compiler.block import Block
from inference.compiler.step import TracedStep
from inference.core import progress
from inference.core.sites import unconstrained
from inference.diagnostics.losses import fall, still_falling
from inference.diagnostics.losses import settled as losses_settled
from inference.objectives import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from inference.runners.base import interrupts_deferred
from inference.runners.descent import Descent
from inference.runners.steps import CHECK_STEPS
from inference.runners.work import threads_by_work

quiet = partial(fit, progress=False)
Y = torch.tensor([0.3, 1.9, 0.8, 1.4, 1.1, 0.5], dtype=torch.float64)
PRECISION = 1 + len(Y)
MEAN, SD = float(Y.sum() / PRECISION), PRECISION**-0.5
EVIDENCE = float(torch.distributions.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double() + 1).log_prob(Y))


def model(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    """mu ~ N(0, 1), y_n ~ N(mu, 1): everything about it is known."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("rows", size or len(y), subsample=rows, dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def guide(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.zeros(()).double())
    scale = pyro.param("scale", torch.ones(()).double(), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def mixture(y: Tensor) -> None:
    """Two known components with an unknown distance; the labels are summed out."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("rows", len(y), dim=-1):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.sample("y", dist.Normal(mu * (2 * z - 1), 0.5), obs=y)


OBJECTIVES = {
    "Trace_ELBO": partial(Trace_ELBO, num_particles=10, vectorize_particles=True),
    "TraceMeanField_ELBO": partial(TraceMeanField_ELBO, num_particles=10, vectorize_particles=True),
    "TraceGraph_ELBO": partial(TraceGraph_ELBO, num_particles=5),
    "TraceEnum_ELBO": partial(TraceEnum_ELBO, num_particles=10, vectorize_particles=True),
    "RenyiELBO": partial(RenyiELBO, alpha=0.5, num_particles=10, vectorize_particles=True),
    "ReweightedWakeSleep": partial(ReweightedWakeSleep, num_particles=10),
}


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_of_pyro_finds_the_conjugate_posterior(objective) -> None:
    result = quiet((model, guide), Y, objective, steps=1500, learning_rate=0.05)
    assert float(result.params["loc"]) == pytest.approx(MEAN, abs=0.1 * SD)
    assert float(result.params["scale"]) == pytest.approx(SD, rel=0.1)
    assert result.losses.shape == ((1500, 2) if objective.func is ReweightedWakeSleep else (1500,))


def test_the_elbo_of_the_exact_guide_is_the_evidence() -> None:
    def exact(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.param("unused", torch.zeros(()).double())
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN, dtype=torch.float64), SD))

    result = quiet((model, exact), Y, Trace_ELBO(), steps=3)
    np.testing.assert_allclose(result.losses, -EVIDENCE, rtol=1e-9)
    assert result.diagnosis.pareto_k == -np.inf
    assert result.diagnosis.advice == ()


def test_minibatches_with_a_short_last_one_find_the_same_posterior() -> None:
    elbo = partial(TraceMeanField_ELBO, num_particles=10, vectorize_particles=True)
    result = quiet((model, guide), Y, elbo, steps=4000, batch=4, learning_rate=0.02)
    assert float(result.params["loc"]) == pytest.approx(MEAN, abs=0.2 * SD)
    assert float(result.params["scale"]) == pytest.approx(SD, rel=0.1)


def test_finite_sites_are_summed_out_without_being_asked() -> None:
    y = torch.cat([torch.full((50,), 2.0), torch.full((50,), -2.0)]).double()
    visible = AutoDelta(poutine.block(mixture, hide=["z"]))
    result = quiet((mixture, visible), y, steps=600, learning_rate=0.05)
    assert result.method == "SVI (TraceEnum_ELBO)"
    mu = float(result.params["mu"].abs()) if "mu" in result.params else float(result.draws["mu"][0].abs())
    assert mu == pytest.approx(2.0, abs=0.01)
    z = result.idata.posterior["z"]
    assert z.dims == ("chain", "draw", "rows")
    right = z.mean(("chain", "draw")).values
    sign = float(result.draws["mu"][0].sign())
    np.testing.assert_allclose(right, (y.sign().numpy() * sign + 1) / 2, atol=0.01)


def test_an_objective_that_cannot_sum_out_is_refused() -> None:
    visible = AutoNormal(poutine.block(mixture, hide=["z"]))
    with pytest.raises(ValueError, match=r"objective: Trace_ELBO cannot sum out z; expected TraceEnum_ELBO"):
        quiet((mixture, visible), Y, Trace_ELBO())


def test_a_guide_with_discrete_sites_gets_the_graph_objective() -> None:
    def discrete_guide(y: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(len(y)).double())
        loc = pyro.param("loc", torch.ones(()).double())
        pyro.sample("mu", dist.Delta(loc))
        with pyro.plate("rows", len(y), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    y = torch.tensor([2.0, -2.0, 2.0]).double()
    result = quiet((mixture, discrete_guide), y, steps=1500, learning_rate=0.05)
    assert result.method == "SVI (TraceGraph_ELBO)"
    assert (result.params["logits"].sign() == y.sign()).all()


def test_a_joint_guide_keeps_the_models_sites_and_shapes() -> None:
    def regression(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.deterministic("twice", 2 * w)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("y", dist.Normal((x * w).sum(-1) + b, 1.0), obs=y)

    torch.manual_seed(0)
    x = torch.randn(30, 3).double()
    data = {"x": x, "y": x @ torch.tensor([1.0, -1.0, 0.5]).double()}
    result = quiet((regression, AutoMultivariateNormal(regression)), data, steps=1500)
    assert {n: tuple(v.shape) for n, v in result.draws.items()} == {"w": (1000, 3), "b": (1000,)}
    posterior = result.idata.posterior
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["w"])
    inputs = torch.cat([x, torch.ones(30, 1)], 1)
    covariance = torch.linalg.inv(torch.eye(4).double() + inputs.mT @ inputs)
    mean = covariance @ inputs.mT @ data["y"]
    drawn = torch.cat([result.draws["w"], result.draws["b"][:, None]], 1)
    assert ((drawn.mean(0) - mean).abs() < 0.25 * covariance.diagonal().sqrt()).all()
    assert result.diagnosis.pareto_k < 0.5


def test_the_default_schedule_ends_at_a_hundredth_and_a_users_schedule_is_moved_on() -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    optimizer = pyro.optim.ExponentialLR({"optimizer": Watched, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    quiet((model, guide), Y, steps=4, optimizer=optimizer)
    np.testing.assert_allclose(rates[::2], [0.1, 0.05, 0.025, 0.0125])


def test_patience_stops_a_settled_fit_and_not_a_moving_one() -> None:
    elbo = partial(TraceMeanField_ELBO, num_particles=10, vectorize_particles=True)
    settled = quiet((model, guide), Y, elbo, steps=5000, learning_rate=0.1, patience=100)
    assert 200 <= len(settled.losses) < 5000
    # A constant learning rate of 0.1 leaves the mean about a quarter of a standard deviation from where it settles.
    assert float(settled.params["loc"]) == pytest.approx(MEAN, abs=1.5 * SD)

    def far(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.tensor(-200.0).double())
        pyro.sample("mu", dist.Normal(loc, SD))

    moving = quiet((model, far), Y, steps=600, learning_rate=0.1, patience=100)
    assert len(moving.losses) == 600


@pytest.mark.parametrize(("fall", "settled"), [(0.13, True), (0.16, False), (-1.0, True)])
def test_settled_is_a_fall_within_its_standard_error(fall: float, settled: bool) -> None:
    # Two halves of a hundred losses, each with variance 1: a standard error of 0.1414.
    losses = [*(fall + (-1.0) ** k for k in range(100)), *((-1.0) ** k for k in range(100))]
    assert losses_settled(np.array(losses)) is settled


def test_a_loss_that_is_not_finite_at_the_first_step_names_step_and_sites() -> None:
    def broken(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y / 0)

    with pytest.raises((FloatingPointError, ValueError), match="y|step 0"):
        quiet((broken, AutoNormal(broken)), torch.tensor([0.0, 1.0]))


def test_a_loss_that_breaks_later_returns_the_last_good_parameters() -> None:
    calls = [0]

    def breaks(y: Tensor) -> None:
        calls[0] += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("bomb", torch.tensor(float("nan")) if calls[0] in (26, 27) else 0 * mu)
        with pyro.plate("rows", len(y), dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"not finite at step \d+; sites bomb") as caught:
        result = quiet((breaks, AutoNormal(breaks)), Y.float(), steps=100)
    assert len(caught) >= 1
    assert 10 < len(result.losses) < 26
    assert np.isfinite(result.losses).all()
    assert all(v.isfinite().all() for v in result.params.values())


@pytest.mark.filterwarnings("ignore:.* left out")
def test_what_fails_by_its_noise_is_found_again_among_compiled_steps() -> None:
    def far(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        # Draws are driven upwards, and at 3, where steps have long been compiled, a root is that of a negative number.
        pyro.factor("edge", 10 * mu + 0.001 * (3.0 - mu).sqrt())
        with pyro.plate("rows", len(y), dim=-1):
            pyro.sample("y", dist.Normal(mu.detach(), 1.0), obs=y)

    def rising(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()).double())
        pyro.sample("mu", dist.Normal(loc, 0.3 * torch.ones(()).double()))

    for single in (None, 5000):
        with pytest.warns(UserWarning, match=r"not finite at step \d+; sites edge; gradients of loc"):
            result = quiet((far, rising), Y, steps=2000, learning_rate=0.01, compile=True, patience=single)
        assert len(result.losses) > 50


def test_gradients_that_are_not_finite_name_their_parameters() -> None:
    def guide_with_a_hole(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        hole = pyro.param("hole", torch.zeros(()).double())
        loc = pyro.param("loc", torch.zeros(()).double())
        pyro.sample("mu", dist.Normal(loc + hole.abs().sqrt() * 0, 1.0))

    with pytest.raises(FloatingPointError, match=r"step 0; gradients of hole"):
        quiet((model, guide_with_a_hole), Y)


def test_subnormal_numbers_are_zero_in_all_threads_while_a_fit_runs_and_only_then() -> None:
    tiny, seen = torch.full((1_000_000,), 1e-40), []

    def left() -> int:
        return int((tiny * 1.0).view(torch.int32).count_nonzero())

    def model() -> None:
        seen.append(left())
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0), obs=torch.ones(()))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert left() == 1_000_000
        fit((model, lambda: None), steps=3, progress=False, compile=False)
        assert seen.count(0) >= 3
        assert set(seen) <= {0, 1_000_000}
        assert left() == 1_000_000
    finally:
        torch.set_num_threads(threads)


def test_interrupting_keeps_what_was_learned() -> None:
    calls = [0]

    def interrupted(y: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        model(y)

    with pytest.warns(UserWarning, match="interrupted at step"):
        result = quiet((interrupted, guide), Y, steps=100)
    assert 0 < len(result.losses) < 20
    assert set(result.params) == {"loc", "scale"}


@pytest.mark.parametrize("patience", [None, 5000], ids=["blocks", "single steps"])
def test_losses_and_parameters_of_an_interrupted_fit_belong_to_one_step(patience, monkeypatch, ctrl_c) -> None:
    def interrupting(take, calls):
        def call(self, *inputs):
            losses = take(self, *inputs)
            if armed and calls(self) >= 150:
                armed.clear()
                signal.raise_signal(signal.SIGINT)
            return losses

        return call

    def far(y: Tensor) -> None:
        pyro.sample("noise", dist.Normal(torch.zeros(()).double(), 1.0))
        model(y + 10)

    def point(y: Tensor) -> None:
        pyro.sample("noise", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("mu", dist.Delta(pyro.param("loc", torch.zeros(()).double())))

    def run():
        return quiet((far, point), Y, steps=400, compile=True, patience=patience)

    armed: list[bool] = []
    monkeypatch.setattr(TracedStep, "losses", interrupting(TracedStep.losses, lambda step: step.calls))
    monkeypatch.setattr(Block, "__call__", interrupting(Block.__call__, lambda block: block._program.calls))
    whole = run()
    armed.append(True)
    with pytest.warns(UserWarning, match="interrupted at step"):
        result = run()
    taken = len(result.losses)
    assert 150 < taken < 400
    np.testing.assert_allclose(result.losses, whole.losses[:taken])
    # The noise cancels, so that the loss is a function of the parameter alone.
    mu = result.params["loc"]
    density = dist.Normal(0.0, 1.0).log_prob(mu) + dist.Normal(mu, 1.0).log_prob(Y + 10).sum()
    assert float(-density) == pytest.approx(whole.losses[taken], rel=1e-9)
    assert abs(whole.losses[taken] - whole.losses[taken - 1]) > 0.01


def test_a_second_interrupt_is_not_deferred(ctrl_c) -> None:
    with interrupts_deferred() as raise_deferred:
        raise_deferred()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_deferred()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_fitting_the_same_pair_again_goes_on() -> None:
    shared = AutoNormal(model)
    first = quiet((model, shared), Y, steps=300)
    second = quiet((model, shared), Y, steps=1, learning_rate=1e-9)
    torch.testing.assert_close(
        second.params["AutoNormal.locs.mu"], first.params["AutoNormal.locs.mu"], atol=1e-6, rtol=0
    )


def test_a_wide_guide_is_told_by_pareto_k() -> None:
    def narrow(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        pyro.param("unused", torch.zeros(()).double())
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN, dtype=torch.float64), 0.1 * SD))

    # k is 0.99; its estimate from the largest 950 weights has a standard error of 0.06.
    result = quiet((model, narrow), Y, steps=0, draws=100_000)
    assert result.diagnosis.pareto_k > 0.7
    assert "unreliable" in result.diagnosis.advice[0]
    assert "sample()" in str(result)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps: expected an integer of at least 0, got -1"),
        ({"draws": 0}, ValueError, "draws: expected an integer of at least 1, got 0"),
        ({"batch": 7}, ValueError, r"batch: expected 1 to 6 \(the rows of the data\), got 7"),
        ({"batch": 0}, ValueError, "batch: expected 1 to 6"),
        ({"optimizer": torch.optim.Adam}, TypeError, "optimizer: expected a pyro.optim.PyroOptim, got type"),
        ({"objective": "elbo"}, TypeError, "objective: expected an ELBO or a factory of one, got 'elbo'"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate: expected a positive number, got -1.0"),
    ],
)
def test_bad_arguments_get_one_line(arguments, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        quiet((model, guide), Y, **arguments)
    assert "\n" not in str(caught.value)


def test_bad_data_get_one_line() -> None:
    with pytest.raises(ValueError, match=r"data: expected arguments of the model \(y, size, rows\), got x"):
        quiet((model, guide), {"x": Y})
    with pytest.raises(ValueError, match="data: expected y, which the model needs, got none"):
        quiet((model, guide), None)
    with pytest.raises(ValueError, match="pair: expected a guide beside the model"):
        quiet(model, Y)
    with pytest.raises(TypeError, match="pair: expected an object with .model and .guide"):
        quiet(3, Y)

    def no_rows(y: Tensor) -> None:
        model(y)

    with pytest.raises(ValueError, match="batch: expected a model with the arguments size and rows"):
        quiet((no_rows, guide), Y, batch=2)


def test_a_model_that_observes_nothing_is_refused() -> None:
    def generator(y: Tensor | None = None) -> None:
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="data: the model observes nothing"):
        quiet((generator, AutoNormal(generator)))


@pytest.mark.slow
def test_a_million_rows_fit_in_four_gibibytes_at_a_flat_cost_per_row() -> None:
    path = Path(__file__).parent / "benchmarks" / "cost_per_row.py"
    spec = importlib.util.spec_from_file_location("cost_per_row", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    costs, peaks = zip(*map(benchmark.run, benchmark.SIZES), strict=True)
    assert max(peaks) < 4
    # The smallest size carries Pyro's own milliseconds a step; a shared machine adds noise.
    assert max(costs) < 2.5 * min(costs)


GROWTH = """
import torch
import inference.runners.steps as steps
from inference import fit
from inference.compiler.block import Block
from inference.compiler.step import TracedStep
from ppl_models.models.vae import VAE

memory, take = [], steps.CompiledSteps.advance

def watched(self, batches):
    with open("/proc/self/statm") as file:
        memory.append(int(file.read().split()[1]) * 4096 / 2**20)
    return take(self, batches)

steps.CompiledSteps.advance = watched
x = torch.rand(1000, 200, generator=torch.Generator().manual_seed(0)).bernoulli()
fit(VAE(200, 10), x, steps=4000, batch=100, draws=1, learning_rate=0.002, compile=True, progress=False)
print(memory[-1] - memory[1500])
"""


def test_losses_are_not_kept_as_tensors() -> None:
    made: list[weakref.ref] = []

    class Steps:
        def advance(self, batches) -> list[Tensor]:
            loss = torch.zeros(())
            made.append(weakref.ref(loss))
            return [loss]

        def check(self, now: bool = False, compare: bool = True) -> None:
            assert sum(loss() is not None for loss in made) <= CHECK_STEPS

    losses, _ = Descent(Steps(), repeat(None), "a fit", 0.0).descend(250, None, False)  # type: ignore[arg-type]
    assert losses.shape == (250,)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_steps() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 15  # MiB; 47 when a tensor of every step's loss was kept


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_to_fit_is_said(compiled: bool) -> None:
    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="pair: expected parameters to fit, got none in model and guide; use steps=0"):
        fit((model, guide), torch.zeros(3), steps=5, compile=compiled, progress=False)


def test_a_guide_that_leaves_out_or_adds_a_site_is_refused_by_name() -> None:
    def scaled(y: Tensor) -> None:
        pyro.sample("s", dist.HalfNormal(torch.ones(()).double()))
        model(y)

    def draws_what_is_observed(y: Tensor) -> None:
        guide(y)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(()).double(), 1.0))

    def draws_more(y: Tensor) -> None:
        guide(y)
        pyro.sample("t", dist.Normal(torch.zeros(()).double(), 1.0))

    def draws_an_auxiliary(y: Tensor) -> None:
        guide(y)
        pyro.sample("t", dist.Normal(torch.zeros(()).double(), 1.0), infer={"is_auxiliary": True})

    for pair, said in (
        ((scaled, guide), "guide: expected all latent sites of the model, got none named s; draw it in the guide"),
        ((model, draws_what_is_observed), "guide: expected latent sites of the model, got y, which the model observes"),
        ((model, draws_more), "guide: expected latent sites of the model, got t, or ones with infer"),
    ):
        with pytest.raises(ValueError, match=said):
            quiet(pair, Y, steps=5)
    quiet((model, draws_an_auxiliary), Y, steps=5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compile", [False, True])
def test_a_fit_learns_under_no_grad(compile: bool, mode: type) -> None:
    with mode():
        result = quiet((model, guide), Y.clone(), steps=600, learning_rate=0.1, compile=compile)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert float(result.params["loc"]) == pytest.approx(MEAN, abs=0.5 * SD)


class Made(torch.nn.Module):
    """A pair whose parameter is made with it."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.model = torch.nn.Parameter(torch.zeros(()).double()), model

    def guide(self, y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", self.loc), 1.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_chains_and_what_is_asked_of_them_run_under_no_grad(mode: type) -> None:
    """What was drawn is what is drawn outside of it; a module that was made in it has parameters that cannot learn."""
    outside = sample(model, Y, chains=8, draws=20, warmup=20, progress=False)
    with mode():
        inside = sample(model, Y.clone(), chains=8, draws=20, warmup=20, progress=False)
        more, judged = inside.extend(10), ksd(inside)
        made = Made()
    torch.testing.assert_close(inside.draws, outside.draws, rtol=0, atol=0)
    assert more.size == 8 * 30 and judged.value == ksd(outside).value
    if mode is torch.inference_mode:
        with pytest.raises(ValueError, match="^pair: expected parameters made outside of torch.inference_mode, got l"):
            quiet(made, Y, steps=5)


def test_frozen_parameters_alone_are_nothing_to_fit() -> None:
    frozen = AutoNormal(model)
    quiet((model, frozen), Y, steps=1)
    for p in frozen.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="expected parameters that require gradients, got only frozen ones"):
        quiet((model, frozen), Y, steps=5)


@pytest.mark.parametrize("rate", [-0.02, 0.0, math.inf])
@pytest.mark.parametrize(
    "optimizer", [ClippedAdam, partial(Joint, TorchClippedAdam), Adam], ids=["clipped", "joint", "adam"]
)
def test_the_optimizer_has_a_positive_rate(rate: float, optimizer: Callable[[Any], PyroOptim]) -> None:
    """Pyro's ClippedAdam ascends with a negative one, and any optimizer rests with zero."""
    for arguments in ({"lr": rate}, lambda name: {"lr": rate}):
        with pytest.raises(ValueError, match=rf"^(optimizer: expected a positive lr, got {rate:g}|optim_args: .*)$"):
            quiet((model, guide), Y, steps=5, optimizer=optimizer(arguments), compile=False)


def test_a_rate_of_zero_keeps_one_parameter_where_it_is() -> None:
    rates = ClippedAdam(lambda name: {"lr": 0.0 if name == "loc" else 0.05})
    params = quiet((model, guide), Y, steps=20, optimizer=rates, compile=False).params
    assert float(params["loc"]) == 0.0 and float(params["scale"]) != 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"learning_rate": 0.1}, TypeError, "optim_args: expected arguments of Adam, got {'learning_rate': 0.1}"),
        ({"lr": -0.02}, ValueError, "optim_args: expected arguments of Adam, got {'lr': -0.02}: Invalid learning rate"),
    ],
)
def test_arguments_of_a_joint_optimizer_are_checked_as_the_optimizer_checks_them(arguments, error, said) -> None:
    with pytest.raises(error, match=said):
        Joint(torch.optim.Adam, arguments)
    with pytest.raises(error, match=said):
        quiet((model, guide), Y, steps=2, optimizer=Joint(torch.optim.Adam, lambda name: arguments))


@pytest.mark.filterwarnings("ignore:subsampling. Pareto k left out")
def test_what_a_model_that_subsamples_its_own_plate_cannot_say_is_left_out() -> None:
    """The guide is the exact posterior; each run of the model sees other rows."""

    def subsampling(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def exact(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN).double(), SD))

    result = quiet((subsampling, exact), Y, steps=0)
    with pytest.warns(UserWarning, match="log_likelihood left out: .* a plate that it subsamples: rows"):
        assert "log_likelihood" not in result.idata.children
    assert result.diagnosis.pareto_k is None
    assert float(result.draws["mu"].mean()) == pytest.approx(MEAN, abs=0.2 * SD)
    with pytest.raises(ValueError, match="model: expected all rows in each run, got a plate that it subsamples: rows"):
        sample(subsampling, Y, progress=False)
    # Training is as in Pyro.
    learned = quiet((subsampling, guide), Y, Trace_ELBO(num_particles=5), steps=1500, learning_rate=0.05)
    assert float(learned.params["loc"]) == pytest.approx(MEAN, abs=0.6 * SD)


@pytest.mark.filterwarnings("ignore:picking. .* left out")
def test_a_batch_that_a_model_picks_itself_is_no_log_likelihood_of_rows() -> None:
    """As a plate that subsamples, written by hand: each run sees other rows, scaled up."""

    def picking(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        rows = torch.randperm(len(y))[:2]
        with poutine.scale(scale=len(y) / 2), pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    def exact(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN).double(), SD))

    result = quiet((picking, exact), Y, steps=0)
    with pytest.warns(UserWarning, match="log_likelihood left out: .* got a part that it draws itself: y"):
        assert "log_likelihood" not in result.idata.children
    assert "part that it draws itself" in str(result.diagnosis)
    with pytest.raises(ValueError, match="^model: expected the same data in each run, got a part that it draws"):
        sample(picking, Y, progress=False)
    with pytest.raises(ValueError, match="^model: expected the same data in each run, got a part that it draws"):
        pointwise_log_likelihood(result)


@pytest.mark.parametrize(("rows", "threads"), [(5, 1), (50_000, 2)])
def test_draws_and_evidence_take_threads_by_the_size_of_their_work(rows: int, threads: int) -> None:
    """Where one is chosen, no run of a pass has more; the few looks at the pair, of one draw each, are as they are."""
    seen: list[int] = []

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if torch._C._functorch.is_functorch_wrapped_tensor(z):
                seen.append(torch.get_num_threads())
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 0.7))

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        log_evidence((model, guide), torch.ones(rows), k=10, progress=False)
        prior_predictive(model, torch.ones(rows), draws=10)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {threads}


def far_away() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 0.1), obs=torch.tensor(100.0))


def test_a_fit_whose_loss_still_falls_is_not_told_to_take_another_guide() -> None:
    # The noise of the loss is proportional to the width of the guide: a narrow one has an eighth of what would hide it.
    result = quiet((far_away, AutoNormal(far_away, init_scale=0.01)), draws=200)
    assert "The loss still falls" in result.diagnosis.advice[0]
    assert "richer guide" not in str(result.diagnosis)
    over = quiet((model, guide), Y, steps=1500, learning_rate=0.05)
    assert "The loss" not in str(over.diagnosis)


class Ascent(Trace_ELBO):
    """Steps up the loss: its gradients with the other sign."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        with poutine.trace(param_only=True) as capture:
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
        for p in unconstrained(capture.trace).values():
            p.grad.neg_()
        return loss


@pytest.mark.parametrize("family", [AutoNormal, AutoDelta])
def test_a_fit_whose_loss_rises_is_not_told_to_take_another_guide(family) -> None:
    result = quiet((far_away, family(far_away)), None, Ascent, steps=200, learning_rate=0.1, draws=200)
    assert result.losses[-1] > result.losses[0]
    assert result.diagnosis.advice[0].startswith("The loss rose, from ")
    assert "richer guide" not in str(result.diagnosis)


def test_a_fit_that_ended_early_is_not_told_to_take_another_guide() -> None:
    class Breaks(Trace_ELBO):
        steps = 0

        def loss_and_grads(self, model, guide, *args, **kwargs):
            self.steps += 1
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            return loss if self.steps < 3 else float("nan")

    with pytest.warns(UserWarning, match="not finite"):
        result = quiet((far_away, AutoNormal(far_away)), None, Breaks, steps=50, draws=200, compile=False)
    assert result.diagnosis.pareto_k > 0.7
    assert "is not finished" in str(result.diagnosis) and "guide" not in str(result.diagnosis)


def test_a_fit_that_ran_away_is_no_point_estimate() -> None:
    def lost() -> None:
        loc = pyro.param("loc", torch.tensor(1e6))
        pyro.sample("x", dist.Normal(loc, torch.tensor(1e-4)))

    result = quiet((far_away, lost), steps=0)
    assert result.diagnosis.advice[0].startswith("All draws are equal, though the guide is no point mass")
    point = quiet((far_away, AutoDelta(far_away)), steps=1)
    assert "A point estimate" in str(point.diagnosis)


def test_a_point_mass_beside_discrete_draws_and_a_single_draw_have_not_run_away() -> None:
    def mixed() -> None:
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.6, 0.4])))
        x = pyro.sample("x", dist.Normal(2.0 * z, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))

    def point() -> None:
        pyro.sample("z", dist.Categorical(pyro.param("p", torch.tensor([0.5, 0.5]))))
        pyro.sample("x", dist.Delta(pyro.param("at", torch.tensor(1.0))))

    result = quiet((mixed, point), steps=0)
    assert len(result.draws["z"].unique()) == 2
    assert "A point estimate" in str(result.diagnosis) and "ran away" not in str(result.diagnosis)
    single = quiet((model, guide), Y, steps=0, draws=1)
    assert str(single.diagnosis) == "Not judged: Pareto k: 1 draws, of at least 25 that it takes."


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_fall_of_the_loss_is_told_from_its_noise(scale: float) -> None:
    noise = scale * np.random.default_rng(3).standard_t(3, size=2000)
    assert still_falling(5e4 + noise) == ()
    line = np.linspace(0, 40 * scale, 2000)[::-1]
    (said,) = still_falling(5e4 + noise + line)
    assert said.startswith("The loss still falls, by ")
    assert fall(5e4 + noise + line) == pytest.approx(10 * scale, rel=0.3)
    assert still_falling(5e4 + 1e-3 * line / scale) == ()
    assert still_falling(np.zeros(0)) == ()


@pytest.mark.filterwarnings("ignore:.* left out")
def test_draws_that_cannot_be_made_lose_no_fit() -> None:
    calls = [0]

    def only_trains(y: Tensor) -> None:
        calls[0] += torch.is_grad_enabled()
        if calls[0] > 3 and not torch.is_grad_enabled():
            raise RuntimeError("no draws from this guide")
        guide(y)

    result = quiet((model, only_trains), Y, steps=20, compile=False)
    assert len(result.losses) == 20
    assert set(result.params) == {"loc", "scale"}
    assert "no draws from this guide" in str(result.diagnosis)


@pytest.mark.parametrize("quota", [1, 2])
def test_threads_are_no_more_than_the_cores_of_the_container(quota: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts the cores of the machine; where a container has one, two threads wait for one another."""
    monkeypatch.setattr(joblib, "cpu_count", lambda: quota)
    threads, large = torch.get_num_threads(), torch.zeros(600_000)
    torch.set_num_threads(2)
    try:
        with threads_by_work() as call:
            assert call(lambda: (large + 1).numel() and torch.get_num_threads()) == 1
            assert call(torch.get_num_threads) == quota
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*runs eagerly from now on")
@pytest.mark.parametrize("compile", [False, True])
def test_parameters_that_appear_in_a_later_step_are_fitted_too(compile: bool) -> None:
    """Maximum likelihood of a mean per row is the row; a compiled fit left those of later rows where they began."""

    def model(y: Tensor, size: int | None = None, rows: Tensor | None = None) -> None:
        with pyro.plate("rows", size or len(y), subsample=rows):
            places = range(len(y)) if rows is None else rows.tolist()
            mu = torch.stack([pyro.param(f"mu{k}", torch.tensor(0.0)) for k in places])
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    fixed = {"steps": 1500, "batch": 2, "learning_rate": 0.05, "draws": 4, "progress": False}
    result = fit((model, lambda y, **_: None), y, compile=compile, **fixed)
    found = torch.stack([result.params[f"mu{k}"] for k in range(6)])
    torch.testing.assert_close(found, y, rtol=0, atol=0.1)


def test_progress_is_lines_of_their_own_where_standard_error_is_no_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.bar(4, "fit of model") as shown:
        for step in range(4):
            shown.set_postfix(loss=step, refresh=False)
            shown.update(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[-4:]] == [f"fit of model: {k} of 4 ({25 * k} %)" for k in (1, 2, 3, 4)]
    assert lines[-1].endswith("left, loss=3")
    with progress.bar(4, "fit of model", shown=False) as hidden:
        hidden.update(4)
        hidden.advance(1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("initial", [0, 300], ids=["new", "gone on"])
def test_the_time_left_is_that_of_steps_without_compiling(initial: int, monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr(progress, "time", lambda: clock[0])
    with progress.bar(1000, "fit of model", initial=initial) as shown:
        shown._time = lambda: clock[0]
        shown.start_t = shown.last_print_t = 0.0
        # Sixty seconds of compiling in the first step, then ten steps a second.
        for steps, seconds in ((1, 60.0), (10, 1.0), (10, 1.0)):
            clock[0] += seconds
            shown.advance(steps)
        assert shown.n == initial + 21
        assert shown.format_dict["rate"] == pytest.approx(10.0)


def amortized(encoder: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
    """z_n ~ N(0, 1), y_n ~ N(z_n, 1), with a network in the guide."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0)), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(()), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(encoder(y[:, None])[:, 0], scale))

    return model, guide


class Matrices(PyroModule):
    """A hand-written mean-field guide of a matrix: two matrices, and no network."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroParam(torch.zeros(3, 2))
        self.scale = PyroParam(torch.ones(3, 2), dist.constraints.positive)

    def forward(self) -> None:
        pyro.sample("w", dist.Normal(self.loc, self.scale).to_event(2))


def matrix() -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
    pyro.factor("far", -((w - 9.0) ** 2).sum())


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


RATES = {
    "a network that a function registers": (lambda: (*amortized(two_layers()), Y.float()), 0.002),
    "layers of Pyro": (
        lambda: (
            *amortized(PyroModule[nn.Sequential](PyroModule[nn.Linear](1, 4), PyroModule[nn.Linear](4, 1))),
            Y.float(),
        ),
        0.002,
    ),
    "a linear map": (lambda: (*amortized(nn.Linear(1, 1)), Y.float()), 0.02),
    "matrices of a mean-field guide": (lambda: (matrix, Matrices(), None), 0.02),
    "a flow of an autoguide": (lambda: (matrix, AutoIAFNormal(matrix), None), 0.02),
    "plain functions": (lambda: (model, guide, Y), 0.02),
}


@pytest.mark.parametrize("name", RATES)
def test_the_default_rate_is_that_of_networks_where_there_are_some(name: str) -> None:
    make, rate = RATES[name]
    torch.manual_seed(0)
    *pair, data = make()
    before, after = (quiet(tuple(pair), data, steps=steps, draws=1).params for steps in (0, 1))
    # The first step of Adam moves each parameter, where it is unconstrained, by the rate.
    moved = max(float((after[n] - v).abs().max()) for n, v in before.items())
    assert moved == pytest.approx(rate, rel=0.3)
