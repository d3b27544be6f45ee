"""Compiled objectives: the numbers of the eager ones, fresh noise, nothing frozen, a word where it cannot be had."""

import importlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from laws import Case
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code

from inference import fit
from inference.compiler import block, fuse, policy
from inference.compiler.capture import traced
from inference.compiler.objective import Compiled
from inference.compiler.step import TracedStep
from inference.compiler.update import Adam
from inference.core.bound import bind, enumerate_finite
from inference.core.handlers import isolated
from inference.objectives import BetaELBO
from inference.optim import Joint
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import point

quiet = partial(fit, progress=False)
# Entries that differ in kind are fused in every run of the tests; fusing takes up to minutes.
FUSED = ("logistic_regression", "vae", "helmholtz_machine", "markov_chain")
X = torch.tensor([[0.3, -1.2], [2.0, 0.1], [-0.7, 0.4], [1.1, 1.9], [0.0, -0.5]]).double()


def noisy(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0).double(), 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale[..., None]).to_event(1), obs=x)


class Amortized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 4).double()

    def model(self, x: Tensor) -> None:
        noisy(x)

    def guide(self, x: Tensor) -> None:
        pyro.module("amortized", self)
        a = pyro.param("a", torch.tensor(2.0).double(), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(2.0).double(), constraint=constraints.positive)
        pyro.sample("scale", dist.Gamma(a, b))
        with pyro.plate("rows", len(x)):
            loc, log_scale = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def discrete(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(0.4).double(), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(rate.expand(len(x))))
        pyro.sample("x", dist.Normal(z[..., None] * 2.0 - torch.ones_like(x), 1.0).to_event(1), obs=x)


def with_baseline(x: Tensor, **baseline: Any) -> None:
    logits = pyro.param("logits", torch.zeros(len(x)).double())
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logits), infer={"baseline": baseline})


def neural_baseline() -> Callable[..., None]:
    network = nn.Linear(2, 1).double()

    def guide(x: Tensor) -> None:
        pyro.module("baseline", network)
        with_baseline(x, nn_baseline=lambda value: network(value).squeeze(-1), nn_baseline_input=x)

    return guide


def enumerated(x: Tensor) -> None:
    centres = pyro.sample("centres", dist.Normal(torch.zeros(2, 2).double(), 2.0).to_event(2))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7]).double()), infer={"enumerate": "parallel"})
        chosen = ((z[..., None, None] == torch.arange(2)[:, None]).double() * centres).sum(-2)
        pyro.sample("x", dist.Normal(chosen, 1.0).to_event(1), obs=x)


def partly_impossible(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.6, 0.1]).double()))
        pyro.factor("possible", torch.where(z == 2, -torch.inf, 0.0).double())
        pyro.sample("x", dist.Normal(z[..., None].double() + torch.zeros_like(x), 1.0).to_event(1), obs=x)


def never_impossible(x: Tensor) -> None:
    """A guide that enumerates, and gives no probability to a state at which the model's density is zero."""
    odds = pyro.param("odds", torch.zeros(()).double())
    logits = torch.stack([odds, -odds, torch.full_like(odds, -torch.inf)])
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


def amortized() -> tuple[Any, Any]:
    pair = Amortized()
    return pair.model, pair.guide


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], tuple[Any, Any]]]] = {
    "Trace_ELBO": (Trace_ELBO, amortized),
    "particles": (lambda: Trace_ELBO(num_particles=3, vectorize_particles=True), amortized),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO, amortized),
    "BetaELBO": (lambda: BetaELBO(2.0, free_bits=0.1, warmup=7), amortized),
    "RenyiELBO": (lambda: RenyiELBO(alpha=0.5, num_particles=2), amortized),
    "AutoNormal": (Trace_ELBO, lambda: (noisy, AutoNormal(noisy))),
    "AutoMultivariateNormal": (Trace_ELBO, lambda: (noisy, AutoMultivariateNormal(noisy))),
    "AutoDelta": (Trace_ELBO, lambda: (noisy, AutoDelta(noisy))),
    "TraceGraph_ELBO": (TraceGraph_ELBO, lambda: (discrete, with_baseline)),
    "decaying": (TraceGraph_ELBO, lambda: (discrete, partial(with_baseline, use_decaying_avg_baseline=True))),
    "neural": (TraceGraph_ELBO, lambda: (discrete, neural_baseline())),
    "ReweightedWakeSleep": (lambda: ReweightedWakeSleep(num_particles=3), lambda: (discrete, with_baseline)),
    "sleep": (lambda: ReweightedWakeSleep(num_particles=2, insomnia=0.5), lambda: (sleeper, sleeper_guide)),
    "TraceEnum_ELBO": (
        lambda: TraceEnum_ELBO(max_plate_nesting=1),
        lambda: (enumerated, AutoNormal(pyro.poutine.block(enumerated, hide=["z"]))),
    ),
    "impossible": (lambda: TraceEnum_ELBO(max_plate_nesting=1), lambda: (partly_impossible, never_impossible)),
}


def sleeper(x: Tensor, observations: Any = None) -> None:
    loc = pyro.param("loc", torch.zeros(()).double())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0).expand([len(x)]))
        pyro.sample("x", dist.Normal(z[..., None] + torch.zeros_like(x), 1.0).to_event(1), obs=x)


def sleeper_guide(x: Tensor, observations: Any = None) -> None:
    slope = pyro.param("slope", torch.zeros(()).double())
    seen = x if observations is None else observations["x"]
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(slope * seen.sum(-1), 1.0))


def descend(
    objective: Any, pair: tuple[Any, Any], steps: int, *, rate: float = 0.001, batches: Any = None
) -> list[Any]:
    """Losses and gradients of gradient steps of at most 0.1 at the default rate, each in the current store."""
    seen = []
    for step in range(steps):
        x = X if batches is None else X[batches[step % len(batches)]]
        with pyro.poutine.trace(param_only=True) as capture:
            loss = objective.loss_and_grads(*pair, x)
        params = {n: site["value"].unconstrained() for n, site in capture.trace.nodes.items()}
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in params.items()}
        seen.append((torch.as_tensor(loss).double(), gradients))
        with torch.no_grad():
            for p in params.values():
                if p.grad is not None:
                    p -= rate * p.grad.clamp(-100, 100)
        zero_grads(params.values())
    return seen


def agree(make_objective: Callable[[], Any], make_pair: Callable[[], Any], *, fuse: bool, steps: int = 13) -> None:
    def run(wrap: Callable[[Any], Any]) -> Any:
        with isolated(0):
            objective = wrap(make_objective())
            return descend(objective, make_pair(), steps), objective

    expected, _ = run(lambda inner: inner)
    got, compiled = run(partial(Compiled, fuse=fuse))
    assert compiled.state == ("fused" if fuse else "traced")
    for (loss, gradients), (other, others) in zip(expected, got, strict=True):
        torch.testing.assert_close(other, loss, rtol=1e-7, atol=1e-7)
        assert set(gradients) == set(others)
        for name, g in gradients.items():
            if g is not None:
                torch.testing.assert_close(others[name], g, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_every_objective_is_the_eager_one_under_the_same_noise(name: str) -> None:
    agree(*PAIRS[name], fuse=False)


@pytest.mark.parametrize("name", ["Trace_ELBO", "decaying", "ReweightedWakeSleep", "TraceEnum_ELBO"])
def test_fused_objectives_draw_the_noise_of_the_eager_ones(name: str) -> None:
    agree(*PAIRS[name], fuse=True)


def test_a_baseline_is_that_of_its_own_fit() -> None:
    """Pyro wraps it by its provenance; a compiled program that was used again read the one of the first fit."""
    factory, make = PAIRS["decaying"]
    for _ in range(2):
        result = fit(make(), X, factory(), steps=12, compile=True, progress=False)
        assert result.idata.attrs["execution"] == "fused"


def same_as_eager(case: Case, method: Any, execution: str, steps: int) -> None:
    pairs = [case.pair() for _ in range(2)]
    run = partial(method, steps=steps, draws=30, progress=False)
    runs = [run(pair, case.data, compile=c) for pair, c in zip(pairs, (False, True), strict=True)]
    eager, compiled = (torch.as_tensor(r.losses) for r in runs)
    assert [r.idata.attrs["execution"] for r in runs] == ["eager", execution]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*NetCDF takes no / in a name")
@pytest.mark.parametrize("entry", ZOO.values(), ids=list(ZOO))
def test_a_traced_fit_of_every_entry_is_the_eager_fit(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fuse, block):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    case = Case(entry)
    if not case.likelihood:
        pytest.skip("no likelihood")
    # A point for each site needs a continuous one.
    for method in (fit,) if case.latent and case.finite else (fit, point):
        same_as_eager(case, method, "traced", steps=5)


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=n, marks=() if n in FUSED else pytest.mark.slow) for n, e in ZOO.items()]
)
def test_a_fused_fit_is_the_eager_fit(entry: Entry) -> None:
    case = Case(entry)
    if not case.likelihood:
        pytest.skip("no likelihood")
    same_as_eager(case, fit, "fused", steps=12)


def test_gradients_are_added_to_those_that_are_there() -> None:
    def run(objective: Any) -> dict[str, torch.Tensor]:
        with isolated(0):
            pair = amortized()
            for _ in range(4):
                objective.loss_and_grads(*pair, X)
            return {n: p.grad for n, p in pyro.get_param_store().named_parameters()}

    expected, got = run(Trace_ELBO()), run(Compiled(Trace_ELBO(), fuse=False))
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=1e-6, atol=1e-6)


def test_noise_is_fresh_at_every_step_and_the_same_from_one_seed() -> None:
    def losses(seed: int) -> list[float]:
        with isolated(seed):
            steps = descend(Compiled(Trace_ELBO(), fuse=False), amortized(), 30, rate=0.0)
        return [float(loss) for loss, _ in steps]

    first = losses(1)
    assert len(set(first)) == 30
    torch.manual_seed(5)
    with isolated(1):
        state = torch.get_rng_state()
    assert losses(1)[1:] != losses(2)[1:]
    with isolated(1):
        assert torch.equal(torch.get_rng_state(), state)


def test_short_batches_have_a_program_of_their_own() -> None:
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4])]
    with isolated(0):
        expected = descend(Trace_ELBO(), amortized(), 12, batches=batches)
    with isolated(0):
        objective = Compiled(Trace_ELBO(), fuse=False)
        got = descend(objective, amortized(), 12, batches=batches)
    assert len([p for p in objective._programs.values() if p]) == 2
    torch.testing.assert_close([float(x) for x, _ in got], [float(x) for x, _ in expected])


def test_plain_svi_moves_the_same_parameters() -> None:
    def run(objective: Any) -> list[float]:
        with isolated(0):
            svi = SVI(*amortized(), pyro.optim.Adam({"lr": 0.02}), loss=objective)
            return [svi.step(X) for _ in range(15)]

    torch.testing.assert_close(run(Compiled(Trace_ELBO(), fuse=False)), run(Trace_ELBO()), rtol=1e-7, atol=1e-7)


def test_numbers_among_the_arguments_are_not_frozen() -> None:
    def model(x: Tensor, beta: float = 1.0) -> None:
        with pyro.poutine.scale(scale=beta):
            noisy(x)

    guide = AutoNormal(model)
    with isolated(0):
        objective = Compiled(Trace_ELBO(), fuse=False)
        Trace_ELBO().loss(model, guide, X)
        for beta in (1.0, 1.0, 0.5, 0.5, 1.0, 0.5):
            random = torch.get_rng_state()
            got = float(objective.loss_and_grads(model, guide, X, beta=beta))
            torch.set_rng_state(random)
            assert got == pytest.approx(Trace_ELBO().loss(model, guide, X, beta=beta), rel=1e-9)


class Annealed(Trace_ELBO):
    """An objective whose weight is a plain attribute, or a tensor."""

    beta: Any = 1.0

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return super().loss_and_grads(pyro.poutine.scale(model, scale=self.beta), guide, *args, **kwargs)


@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
def test_an_annealed_objective_is_not_frozen(make: Callable[[float], Any]) -> None:
    def run(wrap: Callable[[Any], Any]) -> list[Tensor]:
        pair, inner, losses = (noisy, AutoNormal(noisy)), Annealed(), []
        objective = wrap(inner)
        with isolated(0):
            for beta in (0.25, 0.25, 0.5, 0.5, 0.75, 1.0, 0.25):
                inner.beta = make(beta)
                losses.append(descend(objective, pair, 1, rate=0.0)[0][0])
        return losses

    torch.testing.assert_close(run(partial(Compiled, fuse=False)), run(lambda inner: inner))


def test_a_number_that_changes_at_every_step_is_told() -> None:
    inner = Annealed()
    objective, pair = Compiled(inner, fuse=False), (noisy, AutoNormal(noisy))

    def anneal() -> None:
        for step in range(policy.MAX_TRACES + 2):
            inner.beta = 0.1 + step
            descend(objective, pair, 1, rate=0.0)

    with isolated(0), pytest.warns(UserWarning, match=f"more than {policy.MAX_TRACES} programs"):
        anneal()
    assert objective.state == "eager"


def test_a_counter_of_the_objective_is_told() -> None:
    class Counting(Trace_ELBO):
        step = 0

        def loss_and_grads(self, *args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return super().loss_and_grads(*args, **kwargs)

    inner = Counting()
    inner.step = 0
    guide = AutoNormal(noisy)
    with isolated(0), pytest.warns(UserWarning, match="more than|changes its attribute step"):
        descend(Compiled(inner, fuse=False), (noisy, guide), policy.MAX_TRACES + 3)


def test_a_hidden_number_that_changes_the_gradient_alone_is_found_out() -> None:
    weight = np.ones(())

    class Leaning(Trace_ELBO):
        """The same loss at every step, and a gradient that a number scales which no comparison of places sees."""

        def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().loss_and_grads(model, guide, *args, **kwargs)
            for p in pyro.get_param_store()._params.values():
                if p.grad is not None:
                    p.grad = p.grad * float(weight)
            return loss

    guide = AutoNormal(noisy)
    objective = Compiled(Leaning(), fuse=False)

    def lean() -> None:
        for _ in range(13):
            descend(objective, (noisy, guide), 1, rate=0.0)
            weight.fill(0.9 * weight)

    with isolated(0), pytest.warns(UserWarning, match="or their gradients differ"):
        lean()


def test_a_hidden_number_that_changes_is_found_out() -> None:
    beta = np.ones(())

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=float(beta)):
            noisy(x)

    guide = AutoNormal(model)
    objective = Compiled(Trace_ELBO(), fuse=False)

    def decay() -> None:
        for _ in range(13):
            descend(objective, (model, guide), 1)
            beta.fill(0.9 * beta)

    with isolated(0), pytest.warns(UserWarning, match="what changes from step to step must be a tensor"):
        decay()
    assert objective.state == "eager"


class Normalised(nn.Module):
    """A network with batch statistics, spectral normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4)),
            nn.BatchNorm1d(4),
            nn.Dropout(0.3),
            nn.Linear(4, 4),
        ).double()

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("rows", len(x)):
            loc, log_scale = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("fuse", [False, True])
def test_buffers_and_training_mode_are_not_frozen(fuse: bool) -> None:
    def run(wrap: Callable[[Any], Any]) -> tuple[list[Any], list[Tensor]]:
        with isolated(0):
            pair, objective = Normalised(), wrap(Trace_ELBO())
            steps = descend(objective, (pair.model, pair.guide), 6)
            pair.eval()
            steps += descend(objective, (pair.model, pair.guide), 4)
            return [x for x, _ in steps], list(pair.buffers())

    expected, buffers = run(lambda inner: inner)
    got, others = run(partial(Compiled, fuse=fuse))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(others, buffers)


USERS = """
import pyro
import torch
from pyro import distributions as dist
from torch import nn

net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()

def model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

def guide(x):
    pyro.module("net", net)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))
"""


@pytest.mark.parametrize("name", ["pyro_vae", "torch_model", "inference_of_x"])
def test_networks_of_a_users_file_are_found_whatever_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.syspath_prepend(tmp_path)

    def run(objective: Any) -> list[Tensor]:
        monkeypatch.delitem(sys.modules, name, raising=False)
        with isolated(0):
            user = importlib.import_module(name)
            losses = descend(objective, (user.model, user.guide), 15)
            user.net.eval()
            return [loss for loss, _ in losses + descend(objective, (user.model, user.guide), 4)]

    compiled = Compiled(Trace_ELBO(), fuse=False)
    torch.testing.assert_close(run(compiled), run(Trace_ELBO()))
    assert compiled.state == "traced"


def test_the_program_used_longest_ago_is_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse, "_PROGRAMS", OrderedDict())
    monkeypatch.setattr(policy, "FUSED_PROGRAMS", 2)
    for key in ("a", "b", "a", "c"):
        assert fuse._kept(key, lambda key=key: lambda: key)() == key
    assert [key for key, _ in fuse._PROGRAMS] == ["a", "c"]


def test_what_cannot_be_traced_runs_eagerly_and_names_the_site_and_the_line() -> None:
    def steered(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        loc = mu if mu > 0 else 2 * mu  # the line
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(1), obs=x)

    objective = Compiled(Trace_ELBO())
    expected = (
        r"test_compiled.py:\d+ \(loc = mu if mu > 0 else 2 \* mu  # the line\) reads the value of a tensor by "
        r"bool\(\), after site mu"
    )
    with isolated(0), pytest.warns(UserWarning, match=expected) as caught:
        got = descend(objective, (steered, AutoNormal(steered)), 6)
    assert len(caught) == 1
    with isolated(0):
        torch.testing.assert_close(
            [x for x, _ in got], [x for x, _ in descend(Trace_ELBO(), (steered, AutoNormal(steered)), 6)]
        )


def test_a_cleared_store_starts_afresh() -> None:
    guide, objective = AutoNormal(noisy), Compiled(Trace_ELBO(), fuse=False)
    with isolated(0):
        descend(objective, (noisy, guide), 5)
        pyro.clear_param_store()
        pair = amortized()
        first = descend(objective, pair, 4)
    assert len(first) == 4


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("optimizer", [None, lambda: Joint(torch.optim.AdamW, {"lr": 0.01}, clip_norm=1.0)])
def test_compiled_fits_are_eager_fits(batch: int | None, optimizer: Any) -> None:
    def rows(x=None, *, size=None, rows=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    def run(compile: bool) -> Any:
        movers = None if optimizer is None else optimizer()
        return quiet((rows, AutoNormal(rows)), X, steps=60, batch=batch, optimizer=movers, compile=compile)

    eager, compiled = run(False), run(True)
    torch.testing.assert_close(torch.as_tensor(compiled.losses), torch.as_tensor(eager.losses), rtol=1e-8, atol=1e-8)
    for name, value in eager.params.items():
        torch.testing.assert_close(compiled.params[name], value, rtol=1e-7, atol=1e-7)


def two_effects(x: Tensor) -> None:
    """Of each site of its guide a step draws noise."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0).double(), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu + shift, 1.0).to_event(1), obs=x)


def same_fits(steps: int) -> None:
    eager, compiled = (quiet((two_effects, AutoNormal(two_effects)), X, steps=steps, compile=c) for c in (False, True))
    assert compiled.idata.attrs["execution"] == "fused"
    torch.testing.assert_close(torch.as_tensor(compiled.losses), torch.as_tensor(eager.losses), rtol=1e-8, atol=1e-8)
    for name, value in eager.params.items():
        torch.testing.assert_close(compiled.params[name], value, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("steps", [40, 60, 130])
def test_many_steps_a_call_are_single_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, held = [], []
    take, hold = block.Block.__call__, TracedStep.compare_with_eager

    def counted(self: block.Block) -> list[float]:
        blocks.append(self._program.calls)
        return take(self)

    def holding(self: TracedStep, call: Any) -> None:
        held.append(self.calls)
        hold(self, call)

    monkeypatch.setattr(block.Block, "__call__", counted)
    monkeypatch.setattr(TracedStep, "compare_with_eager", holding)
    same_fits(steps)
    # Three steps come before the first block, and one block is run to hold it against single steps.
    assert blocks == {40: [], 60: [0, 1], 130: [0, 1, 51]}[steps]
    # Held against the eager objective are a new program, calls that are powers of two, with their block, and the end.
    assert held == {40: [0, 0, 1, 3, 7, 15, 31, 38], 60: [0, 0, 1, 58], 130: [0, 0, 1, 51, 127, 128]}[steps]


def test_a_fused_program_that_does_not_hold_gives_way_to_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    build = fuse.fused

    def wrong(*given: Any) -> Callable[..., Any]:
        run = build(*given)
        return lambda *inputs: (lambda loss, *rest: (loss + 1, *rest))(*run(*inputs))

    def run(objective: Any) -> list[Tensor]:
        with isolated(0):
            return [x for x, _ in descend(objective, (noisy, AutoNormal(noisy)), 15)]

    monkeypatch.setattr("inference.compiler.step.fused", wrong)
    objective = Compiled(Trace_ELBO())
    torch.testing.assert_close(run(objective), run(Trace_ELBO()))
    assert objective.state == "traced"


def test_a_loop_that_is_not_its_single_steps_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    build = block.looped

    def wrong(*given: Any) -> Callable[..., Any]:
        run = build(*given)
        return lambda *inputs: (lambda carried, losses: (carried, losses + 1))(*run(*inputs))

    monkeypatch.setattr(block, "looped", wrong)
    same_fits(80)


def test_two_losses_are_compiled_too() -> None:
    def run(compile: bool) -> Any:
        objective = ReweightedWakeSleep(num_particles=2, insomnia=0.5)
        return quiet((sleeper, sleeper_guide), X, objective, steps=70, compile=compile)

    eager, compiled = run(False), run(True)
    assert eager.losses.shape == (70, 2)
    assert compiled.idata.attrs["execution"] == "fused"
    torch.testing.assert_close(torch.as_tensor(compiled.losses), torch.as_tensor(eager.losses), rtol=1e-6, atol=1e-6)


def test_noise_that_no_loop_can_draw_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = block.Block.__init__

    def counted(self: block.Block, *arguments: Any) -> None:
        build(self, *arguments)
        made.append(self)

    monkeypatch.setattr(block.Block, "__init__", counted)

    def gamma(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(2.0).double(), constraint=constraints.positive)
        pyro.sample("scale", dist.Gamma(a, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    result = quiet((noisy, gamma), X, steps=80, compile=True)
    assert not made
    assert result.idata.attrs["execution"] == "fused"


def test_patience_stops_a_compiled_fit_where_it_stops_the_eager_one() -> None:
    eager, compiled = (quiet((noisy, AutoNormal(noisy)), X, steps=600, patience=50, compile=c) for c in (False, True))
    assert 100 <= len(eager.losses) == len(compiled.losses) < 600


def test_a_compiled_adam_computes_its_rate_once_and_not_for_every_entry() -> None:
    adam = Adam({"a": torch.zeros(64, 64), "b": torch.zeros(640)}, 0.01, 100)

    def step(*inputs: Tensor) -> None:
        moved = Adam({"a": inputs[0], "b": inputs[1]}, 0.01, 100)
        moved.step, moved.good, *rest, moved.schedule = inputs[4:]
        moved.moments, moved.squares = rest[:2], rest[2:]
        moved(inputs[:2], inputs[2:4], inputs[0].sum())

    inputs = [torch.randn(shape) for shape in ((64, 64), (640,), (64, 64), (640,))]
    graph = traced(step, *inputs, *adam.tensors)
    with fresh_cache():
        _, (code, *_) = run_and_get_code(fuse.fused, graph, [*inputs, *adam.tensors])
    assert code.count("std::cos(") == 1
    assert code.count("std::exp(") == 2


def test_a_fit_of_the_same_shape_compiles_nothing_anew() -> None:
    quiet((noisy, AutoNormal(noisy)), X, steps=5, compile=True)
    known = len(fuse._PROGRAMS)
    again = quiet((noisy, AutoNormal(noisy)), X + 1, steps=5, compile=True, seed=3)
    assert again.idata.attrs["execution"] == "fused"
    assert len(fuse._PROGRAMS) == known


def test_auto_goes_by_the_number_of_steps() -> None:
    for steps, expected in ((100, "eager"), (1000, "traced")):
        result = quiet((noisy, AutoNormal(noisy)), X, steps=steps, draws=30)
        assert result.idata.attrs["execution"] == expected


@pytest.mark.parametrize("batch", [None, 2])
def test_a_program_that_breaks_names_step_site_and_parameter(batch: int | None) -> None:
    def breaks(x=None, *, size=None, rows=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        slope = pyro.param("slope", torch.tensor(0.5).double())
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)
        # The root of a negative number, as soon as the slope has moved far enough.
        pyro.factor("bomb", -3 * slope + 1e-9 * (slope - 0.2).sqrt())

    outcomes = []
    for compile in (False, True):
        with pytest.warns(UserWarning, match=r"not finite at step (\d+); sites bomb; gradients of slope") as caught:
            result = quiet((breaks, AutoNormal(breaks)), X, steps=400, batch=batch, compile=compile)
        assert 0.2 < result.params["slope"] < 0.25
        assert all(v.isfinite().all() for v in result.params.values())
        outcomes.append((str(caught[-1].message), len(result.losses), result.params["slope"]))
    (said, steps, slope), (also, others, too) = outcomes
    assert (said, steps) == (also, others)
    assert 5 < steps < 400
    torch.testing.assert_close(too, slope)


def step_with(optimizer: PyroOptim, steps: int = 20) -> dict[str, Tensor]:
    with isolated(0):
        svi = SVI(*amortized(), optimizer, loss=Trace_ELBO())
        for _ in range(steps):
            svi.step(X)
        return {n: p.detach().clone() for n, p in pyro.get_param_store()._params.items()}


def test_a_parameter_that_is_stored_anew_keeps_its_place_in_the_joint_optimizer() -> None:
    """As Pyro's moving baselines are, at every step."""
    with isolated(0):
        optimizer = Joint(torch.optim.SGD, {"lr": 0.5, "momentum": 0.5})
        for step in range(3):
            pyro.get_param_store()._params.pop("moving", None)
            moving = pyro.param("moving", torch.full((2,), float(step))).unconstrained()
            moving.grad = torch.ones(2)
            optimizer([moving])
        assert optimizer.optimizer is not None
        assert [len(g["params"]) for g in optimizer.optimizer.param_groups] == [1]
        # Momentum goes on: 1, then 1.5, then 1.75 times the rate.
        torch.testing.assert_close(moving.detach(), torch.full((2,), 2 - 0.5 * 1.75))
        assert list(optimizer.get_state()["state"]) == ["moving"]


def test_the_joint_optimizer_takes_pyros_steps() -> None:
    expected = step_with(pyro.optim.Adam({"lr": 0.03}))
    torch.testing.assert_close(step_with(Joint(torch.optim.Adam, {"lr": 0.03})), expected, rtol=1e-9, atol=1e-9)
    by_name = lambda name: {"lr": 0.0 if name.startswith("amortized") else 1e-6}  # noqa: E731
    grouped = step_with(Joint(torch.optim.SGD, by_name))
    with isolated(0):
        start = dict(amortized()[1].__self__.named_parameters())
    torch.testing.assert_close(grouped["amortized$$$net.weight"], start["net.weight"].detach())
    assert grouped["a"] != torch.tensor(2.0).double().log()


def test_the_joint_optimizer_clips_and_follows_a_schedule() -> None:
    p = torch.zeros(3).double().requires_grad_()
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    optimizer = Joint(torch.optim.SGD, {"lr": 1.0}, schedule=halving, clip_norm=2.0)
    for _ in range(3):
        p.grad = torch.tensor([30.0, 0.0, 40.0]).double()
        optimizer([p])
    # steps of length 2, 1 and 1/2 along (3, 0, 4) / 5
    torch.testing.assert_close(p.detach(), -3.5 * torch.tensor([0.6, 0.0, 0.8]).double())
    clipped = Joint(torch.optim.SGD, {"lr": 1.0}, clip_value=0.5)
    p.grad, q = torch.tensor([30.0, 0.1, -40.0]).double(), p.detach().clone()
    clipped([p])
    torch.testing.assert_close(q - p.detach(), torch.tensor([0.5, 0.1, -0.5]).double())


def test_a_parameter_without_gradient_rests() -> None:
    p, q = (torch.ones(2).double().requires_grad_() for _ in range(2))
    optimizer = Joint(torch.optim.Adam, {"lr": 0.1})
    p.grad, q.grad = torch.ones(2).double(), torch.ones(2).double()
    optimizer([p, q])
    q.grad, before = None, q.detach().clone()
    p.grad = torch.ones(2).double()
    optimizer([p, q])
    assert torch.equal(q.detach(), before)


def test_the_joint_optimizer_goes_on_from_its_state() -> None:
    def run(stop: int | None) -> dict[str, Tensor]:
        schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
        make = partial(Joint, torch.optim.Adam, {"lr": 0.05}, schedule=schedule)
        with isolated(0):
            model, guide = amortized()
            optimizer = make()
            for step in range(20):
                if step == stop:
                    state = optimizer.get_state()
                    optimizer = make()
                    optimizer.set_state(state)
                SVI(model, guide, optimizer, loss=Trace_ELBO()).step(X)
            return {n: p.detach().clone() for n, p in pyro.get_param_store()._params.items()}

    torch.testing.assert_close(run(7), run(None))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Joint(clip_norm=0.0), ValueError, "clip_norm: expected a positive number, got 0.0"),
        (lambda: Compiled("elbo"), TypeError, "objective: expected an ELBO with loss_and_grads, got str"),
        (lambda: quiet((noisy, AutoNormal(noisy)), X, compile="yes"), ValueError, "compile: expected True, False or"),
    ],
)
def test_bad_arguments_get_one_line(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_enumeration_survives_a_compiled_fit() -> None:
    bound = bind((enumerated, AutoNormal(pyro.poutine.block(enumerated, hide=["z"]))), X)
    assert bound.enumerated == ("z",)
    assert callable(enumerate_finite(bound))
    result = quiet(bound.pair, X, steps=40, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    assert "z" in result.idata.posterior


IN_A_PROCESS = """
import sys
import pyro
import pyro.distributions as dist
from torch._dynamo.utils import counters
from inference import kernels

def model():
    x = pyro.sample("x", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    # An exponent is a constant in the code of the loop's body, and no input of it.
    pyro.factor("tails", -0.1 * (x ** int(sys.argv[2])).sum())

pyro.set_rng_seed(0)
kernel = getattr(kernels, sys.argv[1])(model, num_chains=4, jit_compile=False)
kernel.setup(40)
kernel.fuse()
found = counters["aot_autograd"]
print(kernel.execution, found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["ChEES", "NUTS"])
def test_another_process_takes_a_loop_from_the_disk_and_none_of_another_body(kernel: str, tmp_path: Any) -> None:
    def run(exponent: int) -> str:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", IN_A_PROCESS, kernel, str(exponent)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    assert run(4) == "fused 0 1 0"
    assert run(4) == "fused 1 0 0"
    # A program that does not agree with the traced one is not used: it would run traced.
    assert run(6) == "fused 0 1 0"
