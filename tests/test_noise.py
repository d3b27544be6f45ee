"""Draws as noise and what is made of it: the numbers of torch's own operations, in any order of running them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import fit
from inference.compiler.capture import traced
from inference.compiler.noise import Given
from inference.compiler.passes import is_noise
from inference.compiler.step import TracedStep

quiet = partial(fit, progress=False)

P = torch.linspace(0.05, 0.95, 40).double().reshape(8, 5)

DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "normal_": lambda x: torch.empty(8, 5).double().normal_() + x,
    "normal_ of a tensor that is read": lambda x: x.clone().normal_() + x,
    "a scaled normal_": lambda x: torch.empty(8, 5).normal_(1.0, 2.0) + x,
    "normal": lambda x: torch.normal(x, x.abs() + 1),
    "normal, broadcast": lambda x: torch.normal(x, 1 + x[0].abs()),
    "normal of a mean": lambda x: torch.normal(x, 2.0),
    "normal of a scale": lambda x: torch.normal(1.0, x),
    "randn": lambda x: torch.randn(8, 5) * x,
    "randn_like of a transposed tensor": lambda x: torch.randn_like(x.mT) * x.mT,
    "rand": lambda x: torch.rand(8, 5, dtype=torch.float64) * x,
    "rand_like": lambda x: torch.rand_like(x) * x,
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0) * x,
    "bernoulli": lambda x: torch.bernoulli(x),
    "bernoulli of float32": lambda x: torch.bernoulli(x.float()),
    "bernoulli_ of a number": lambda x: torch.empty(8, 5).bernoulli_(0.3) * x,
    "bernoulli_ of a tensor": lambda x: torch.empty(8, 5).double().bernoulli_(x),
    "multinomial": lambda x: torch.multinomial(x, 1, True),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.4),
    "native dropout": lambda x: torch.native_dropout(x, 0.4, True),
    "noise that is changed in place": lambda x: (torch.randn(8, 5).mul_(2.0) * x, torch.rand_like(x).add_(1.0)),
    "a permutation": lambda x: x[torch.randperm(8)[:3]],
    "randint": lambda x: x * torch.randint(2, 9, (8, 5)),
    "several": lambda x: (torch.rand(3), torch.bernoulli(x), torch.randn(2), torch.multinomial(x, 1), torch.randn(8)),
    "mapped": lambda x: torch.vmap(lambda row: torch.randn(5).double() * row, randomness="different")(x),
    "Categorical": lambda x: dist.Categorical(x).sample(),
    "OneHotCategorical": lambda x: dist.OneHotCategoricalStraightThrough(x).rsample(),
    "RelaxedBernoulli": lambda x: dist.RelaxedBernoulliStraightThrough(x.new_tensor(0.5), probs=x).rsample(),
    "LowRankMultivariateNormal": lambda x: dist.LowRankMultivariateNormal(x[0], x.mT, x[0]).rsample(),
    "Laplace": lambda x: dist.Laplace(x, 1.0).rsample(),
    "Cauchy": lambda x: dist.Cauchy(x, 1.0).rsample(),
    "Geometric": lambda x: dist.Geometric(x).sample(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_noise_is_an_input_and_the_numbers_are_those_of_the_operation(name: str) -> None:
    function = DRAWS[name]
    graph = traced(function, P, lift=True)
    draws = graph.meta["draws"]
    assert draws
    assert not any(map(is_noise, graph.graph.nodes))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = function(P)
        torch.manual_seed(seed)
        noise = [draw() for draw in draws]
        torch.testing.assert_close(graph(P, *(e.clone() for e in noise)), expected)
        # In any order of running: what is drawn between does not matter.
        torch.rand(7)
        kept = [e.clone() for e in noise]
        with Given(draws, noise) as given:
            torch.testing.assert_close(function(P), expected)
        assert not given.left
        torch.testing.assert_close(noise, kept)


@pytest.mark.parametrize(
    "sampled",
    [
        dist.Gamma(2.0, 1.0).sample,
        dist.Poisson(3.0).sample,
        dist.Binomial(7, torch.tensor(0.4)).sample,
        lambda: torch.multinomial(torch.ones(5), 2),
    ],
    ids=["Gamma", "Poisson", "binomial", "several of a multinomial"],
)
def test_samplers_that_reject_stay_operations(sampled: Any) -> None:
    graph = traced(lambda x: x + sampled(), torch.zeros(()), lift=True)
    assert any(map(is_noise, graph.graph.nodes))


def test_rows_of_noise_are_what_single_draws_would_be() -> None:
    graph = traced(lambda x: (x + torch.rand_like(x.mT).mT, torch.rand(3), torch.randperm(4)), P, lift=True)
    draws = graph.meta["draws"]
    torch.manual_seed(0)
    expected = [draw() for _ in range(3) for draw in draws]
    torch.manual_seed(0)
    rows = [draw().new_empty((3, *draw().shape)) for draw in draws]
    torch.manual_seed(0)
    for k in range(3):
        for draw, row in zip(draws, rows, strict=True):
            draw.into(row[k])
    torch.testing.assert_close([row[k] for k in range(3) for row in rows], expected)


def discrete(x: Tensor | None = None) -> None:
    with pyro.plate("rows", 20):
        z = pyro.sample("z", dist.Categorical(torch.ones(3).double()))
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5).double()))
        eps = pyro.sample("eps", dist.Normal(torch.zeros(()).double(), 1.0))
        centres = pyro.param("centres", torch.arange(3.0).double())
        pyro.sample("x", dist.Normal(centres[z] + b + eps, 1.0), obs=x)


def recognised(x: Tensor | None = None) -> None:
    logits = pyro.param("logits", torch.zeros(20, 3).double())
    odds = pyro.param("odds", torch.zeros(20).double())
    with pyro.plate("rows", 20):
        pyro.sample("eps", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("b", dist.Bernoulli(logits=odds))
        pyro.sample("z", dist.Categorical(logits=logits))


@pytest.mark.slow
def test_guides_with_discrete_sites_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws that do not depend on one another were exchanged by the compiler: the program fell back to its graph."""
    fell_back = []
    compare = TracedStep.compare_with_eager

    def watched(self: TracedStep, call: Any) -> None:
        was = self.fused
        compare(self, call)
        fell_back.append(was and not self.fused)

    monkeypatch.setattr(TracedStep, "compare_with_eager", watched)
    x = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
    result = quiet((discrete, recognised), {"x": x}, ReweightedWakeSleep(), steps=60, compile=True)
    assert result.idata.attrs["execution"] == "fused"
    assert fell_back and not any(fell_back)


def test_a_fit_with_noise_as_inputs_is_the_eager_fit() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=w), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

    x = torch.tensor([0.1, 1.2, 2.3, 0.4]).double()
    results = []
    for mode in (False, "auto"):
        pyro.clear_param_store()
        guide = AutoNormal(poutine.block(model, hide=["z"]))
        results.append(quiet((model, guide), {"x": x}, TraceEnum_ELBO(max_plate_nesting=1), steps=1000, compile=mode))
    assert results[1].idata.attrs["execution"] == "traced"
    torch.testing.assert_close(results[0].draws["w"], results[1].draws["w"])


@pytest.mark.parametrize("lift", [True, False])
def test_a_run_that_seeds_the_generator_is_not_given_new_noise(lift: bool) -> None:
    """It draws the same noise at each step, on purpose; compared under given noise its program looked right."""

    def seeded(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()).double())
        torch.manual_seed(3)
        if not lift:
            pyro.sample("unused", dist.Gamma(torch.ones(()).double(), 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Normal(loc, 1.0))

    x, results = torch.tensor([0.5, 1.5]).double(), []
    for mode in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            results.append(quiet((seeded, guide), {"x": x}, Trace_ELBO(), steps=20, compile=mode))
    assert [r.idata.attrs["execution"] for r in results] == ["eager", "eager"]
    assert any("runs eagerly from now on" in str(w.message) for w in told)
    torch.testing.assert_close(results[0].losses, results[1].losses)
