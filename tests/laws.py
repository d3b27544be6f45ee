"""Laws that hold for every pair. A test file has them by ``from laws import *`` and ``ENTRIES``, a list of entries.

A law that cannot hold for a kind of pair is skipped by a property of its model: no latent sites, no likelihood.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from inference import (
    Method,
    Result,
    classify,
    fit,
    pointwise_log_likelihood,
    posterior_predictive,
    prior_predictive,
    sample,
)
from inference.compiler import policy
from inference.core.bound import BoundPair, bind, enumerate_finite
from inference.core.handlers import isolated
from inference.core.sites import sites_of
from inference.kernels import NUTS
from ppl_models.models.linear_factors import FactorModel
from ppl_models.models.pair import HALVES, Pair
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import closed_form, counted, em, exact, point

ROWS = 40
quick_fit = partial(fit, steps=5, draws=30, progress=False)


class Case:
    """An entry, made small, on few rows; its fit and its chains are run once, for all laws that only read them."""

    def __init__(self, entry: Entry, earlier: tuple[Entry, ...] = ()) -> None:
        self.entry, self.earlier = entry, earlier

    @cached_property
    def dataset(self) -> Any:
        whole = self.entry.load()
        train, test = ({k: v[:ROWS] for k, v in split.items()} for split in (whole.train, whole.test))
        return replace(whole, train=train, test=test)

    @property
    def data(self) -> dict[str, Tensor]:
        return dict(self.dataset.train)

    def pair(self, seed: int = 0) -> Pair:
        with isolated(seed):
            return self.entry.pair(self.dataset, **self.entry.small)

    @cached_property
    def bound(self) -> BoundPair:
        return bind(self.pair(), self.data)

    @property
    def count(self) -> int:
        """Number of rows."""
        return min(ROWS, len(next(iter(self.data.values()))))

    @property
    def batch(self) -> int | None:
        """A minibatch of all rows; None where there are none, as of a series."""
        return self.count if self.bound.takes_rows else None

    @property
    def pointwise(self) -> bool:
        """Whether each row has a density; all of a series have one."""
        return any("rows" in s.plates for s in self.bound.select("observed").values())

    @property
    def likelihood(self) -> bool:
        return self.bound.observes

    @property
    def latent(self) -> bool:
        return bool(self.bound.select("latent"))

    @property
    def finite(self) -> bool:
        """Whether all latent sites are finite, so that there is no potential."""
        return all(s.units for s in self.bound.select("latent").values())

    @property
    def label(self) -> str | None:
        finite = [n for n, s in self.bound.sites.items() if s.finite]
        return finite[0] if len(finite) == 1 and finite[0] in self.data else None

    @cached_property
    def kind(self) -> Any:
        """What a kernel meets: latent sites per row or of all rows, continuous or finite, and parameters."""
        sites = self.bound.select("latent").values()
        with isolated(0), torch.no_grad():
            trace = poutine.trace(self.bound.model).get_trace(**self.bound.arguments())
        return frozenset(("rows" in s.plates, min(s.units, 2)) for s in sites), bool(list(trace.param_nodes))

    @property
    def chained(self) -> bool:
        """Whether chains of it say what those of no entry before it said."""
        if not (self.likelihood and self.latent):
            return False
        earlier = (case for case in map(Case, self.earlier) if case.likelihood and case.latent)
        return all(case.kind != self.kind for case in earlier)

    def fit(self, pair: Pair, **arguments: Any) -> Result:
        if self.likelihood:
            return quick_fit(pair, self.data, **arguments)
        return partial(self.entry.fit, batch=self.batch, **quick_fit.keywords)(pair, self.data, **arguments)

    def sample(self, pair: Pair) -> Result:
        units = [s.units for s in self.bound.select("latent").values()]
        kernel = None if max(units) > 1 else partial(NUTS, max_tree_depth=4)
        return sample(pair, self.data, kernel, draws=6, warmup=12, chains=2, seed=3, progress=False)

    @property
    def trainings(self) -> list[Method]:
        """The methods of the entry that train the pair's own guide by steps."""
        others = (point, em, exact, closed_form, counted)
        return [m for m in self.entry.fits.values() if getattr(m, "func", m) not in others]

    @property
    def training(self) -> Method:
        """The first of them."""
        return self.trainings[0]

    @cached_property
    def fitted(self) -> Result:
        return self.fit(self.pair(), seed=3)

    @cached_property
    def chains(self) -> Result:
        return self.sample(self.pair())

    @property
    def fixed(self) -> bool:
        """Whether the guide has nothing to draw, or a point."""
        return all(bool((v == v[:1]).all()) for v in self.fitted.draws.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        entries = tuple(metafunc.module.ENTRIES)
        cases = [Case(e, entries[:k]) for k, e in enumerate(entries)]
        metafunc.parametrize("case", cases, ids=[e.name for e in entries], scope="module")


@pytest.fixture
def likely(case: Case) -> Case:
    if not case.likelihood:
        pytest.skip("no likelihood")
    return case


@pytest.fixture
def latent(likely: Case) -> Case:
    if not likely.latent:
        pytest.skip("no latent sites")
    return likely


def test_a_saved_result_is_read_back_and_goes_on(case: Case, tmp_path: Any) -> None:
    """Predictions, further draws and log densities of a Result from a folder are those of the Result itself."""
    results = [case.fitted, *([case.chains] if case.chained else [])]
    for k, result in enumerate(results):
        loaded = Result.load(result.save(tmp_path / f"run{k}"), case.pair(seed=5), case.data)
        assert (loaded.method, str(loaded.diagnosis)) == (result.method, str(result.diagnosis))
        pd.testing.assert_frame_equal(loaded.diagnosis.table, result.diagnosis.table, check_index_type=False)
        np.testing.assert_array_equal(loaded.losses, result.losses)
        assert loaded.idata.equals(result.idata)
        same(loaded.params, result.params)
        same(loaded.draws, result.draws)
        if result.draws:
            same(loaded.draw(7, seed=2), result.draw(7, seed=2))
        if case.likelihood:
            same(posterior_predictive(loaded), posterior_predictive(result))
            if case.pointwise:
                torch.testing.assert_close(
                    pointwise_log_likelihood(loaded), pointwise_log_likelihood(result), rtol=0, atol=0
                )


def same(one: Any, other: Any) -> None:
    """Whether two groups of tensors are equal to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def chained(latent: Case) -> Case:
    if not latent.chained:
        pytest.skip("chains of an entry before it say the same")
    return latent


def stored() -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}


@pytest.fixture
def occupied_store() -> Iterator[Any]:
    """A global parameter store in use by somebody else, and the random state with it."""
    pyro.clear_param_store()
    pyro.param("theirs", torch.tensor([1.0, 2.0]), constraint=dist.constraints.positive)
    pyro.param("guide.locs.weights", torch.tensor(99.0))
    torch.manual_seed(123)
    before, state = stored(), torch.get_rng_state().clone()

    def unchanged() -> None:
        after = stored()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)
        assert torch.equal(torch.get_rng_state(), state)

    yield unchanged
    pyro.clear_param_store()


def test_model_and_guide_have_the_same_sites_under_the_same_plates(likely: Case) -> None:
    bound = likely.bound
    with isolated(0), torch.no_grad():
        guide = sites_of(poutine.trace(bound.guide).get_trace(**bound.arguments()))
    latent = bound.select("latent")
    # An autoguide of a joint normal has one auxiliary site more; it is no site of the model.
    shared = {n: s for n, s in guide.items() if n in bound.sites}
    # What a guide leaves out is summed out.
    assert shared.keys() == latent.keys() - set(bound.enumerated)
    for name, site in shared.items():
        assert site.shape == latent[name].shape
        assert site.plates == latent[name].plates


def test_the_fit_of_the_entry_moves_every_parameter(case: Case) -> None:
    pair = case.pair()
    case.fit(pair, steps=0) if case.likelihood else None  # some parameters come to be with the data
    before = {n: p.detach().clone() for n, p in pair.named_parameters()}
    assert before
    result = partial(case.training, batch=case.batch)(pair, case.data, steps=1, draws=1, progress=False)
    assert np.isfinite(result.losses).all()
    assert [n for n, p in pair.named_parameters() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("execution", ["traced", pytest.param("fused", marks=pytest.mark.slow)])
def test_no_fit_of_the_entry_falls_back_from_its_program(case: Case, execution: str, monkeypatch) -> None:
    """Programs are compared with the eager run at calls 1, 2, 4 and 8; one that differs gives way to its graph, or
    that to the eager run.
    """
    monkeypatch.setattr(policy, "TRACE_FIT_STEPS", 1)
    # Its cache is small in a script, and so would be watched if Python's own modules were.
    re.purge()
    mode = {"traced": "auto", "fused": True}[execution]
    for method in case.trainings:
        run = partial(method, batch=case.batch, steps=9, draws=1, compile=mode, progress=False)
        assert run(case.pair(), case.data).idata.attrs["execution"] == execution


def test_a_gradient_of_the_bound_reaches_every_parameter_that_the_pair_runs(likely: Case) -> None:
    pair = likely.pair()
    result = likely.fit(pair, steps=1)
    bound = bind(pair, likely.data)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if bound.summed else Trace_ELBO()
    with isolated(0):
        loss = elbo.loss_and_grads(enumerate_finite(bound), bound.guide, **likely.data)
    assert np.isfinite(loss)
    run = {n: p for n, p in pair.named_parameters() if p.grad is not None}
    # What the bound does not run is an adversary's, which the fit of the entry moves.
    assert run and len(result.params) == len(run)
    assert [n for n, p in run.items() if not p.grad.abs().sum() > 0] == []


def test_the_same_seed_gives_the_same_result(case: Case) -> None:
    one, two, other = case.fitted, *(case.fit(case.pair(), seed=s) for s in (3, 4))
    assert np.array_equal(one.losses, two.losses)
    # An exact guide has the same losses whatever it draws, and so has one with nothing to draw.
    exact = one.draws and one.diagnosis.pareto_k == -np.inf
    assert exact or (case.likelihood and case.fixed) or not np.array_equal(one.losses, other.losses)
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])
        assert case.fixed or not torch.equal(value, other.draws[name])


def test_without_latent_sites_there_is_nothing_to_sample(likely: Case) -> None:
    if likely.latent:
        pytest.skip("latent sites")
    with pytest.raises(ValueError, match="model: expected a latent site to sample, got none"):
        sample(likely.pair(), likely.data)


def test_chains_are_reproducible_and_differ(chained: Case) -> None:
    two = chained.sample(chained.pair())
    for name, value in chained.chains.draws.items():
        assert torch.equal(value, two.draws[name])
        first, second = value[:6], value[6:]
        assert not torch.equal(first, second)


def test_every_public_call_leaves_the_store_and_the_random_state_alone(case: Case, occupied_store) -> None:
    pair, data = case.pair(), case.data
    occupied_store()
    result = case.fit(pair, draws=5)
    occupied_store()
    calls = [lambda: classify(result, data, label=case.label)] if case.label and case.label not in result.draws else []
    if case.likelihood:
        calls += [
            lambda: prior_predictive(pair, data, draws=3),
            lambda: posterior_predictive(result, data),
            lambda: result.draw(3),
        ]
        calls += [lambda: pointwise_log_likelihood(result, data)] if case.pointwise else []
    calls += [lambda: case.sample(pair)] if case.chained else []
    for call in calls:
        call()
        occupied_store()


def test_a_verb_leaves_the_store_alone_when_it_fails(case: Case, occupied_store) -> None:
    first = next(iter(case.data))
    data = {**case.data, first: case.data[first] * torch.nan}
    with pytest.raises(ValueError, match=f"{first}: expected finite"):
        quick_fit(case.pair(), data)
    occupied_store()


def test_whole_numbers_and_booleans_are_the_floats_that_they_stand_for(case: Case) -> None:
    def log_prob(data: dict[str, Tensor]) -> Tensor:
        bound = bind(case.pair(), data)
        with isolated(0), torch.no_grad():
            return poutine.trace(bound.model).get_trace(**bound.arguments()).log_prob_sum()

    floats = {n: v.nan_to_num().round() if v.is_floating_point() else v for n, v in case.data.items()}
    kinds = [torch.int64, torch.int32]
    kinds += [torch.bool] if all(((v == 0) | (v == 1)).all() for v in floats.values()) else []
    for kind in kinds:
        found = log_prob({n: v.to(kind) for n, v in floats.items()})
        assert float(found) == pytest.approx(float(log_prob(floats)), rel=1e-5), kind


def test_two_pairs_of_a_class_train_apart(case: Case) -> None:
    first = case.pair()
    case.fit(first, steps=20, draws=1)
    frozen = {n: p.detach().clone() for n, p in first.named_parameters()}
    second = case.fit(case.pair(), seed=3)
    assert np.array_equal(second.losses, case.fitted.losses)
    assert all(torch.equal(p, frozen[n]) for n, p in first.named_parameters())


def test_state_dict_round_trip(case: Case) -> None:
    pair, copy = case.pair(), case.pair(seed=7)
    case.fit(pair, draws=1)
    case.fit(copy, steps=0, draws=1)
    copy.load_state_dict(pair.state_dict())
    one, two = (case.fit(p, steps=0) for p in (pair, copy))
    assert one.params.keys() == two.params.keys()
    assert all(torch.equal(v, two.params[n]) for n, v in one.params.items())
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])


def test_prior_draws_have_the_shapes_of_the_sites(likely: Case) -> None:
    pair, sites, result = likely.pair(), likely.bound.sites, likely.fitted
    inputs = {k: v for k, v in likely.data.items() if k not in sites}
    drawn = prior_predictive(pair, inputs, size=None if inputs else likely.count, draws=7)
    assert drawn.keys() == sites.keys()
    for name, value in drawn.items():
        assert tuple(value.shape) == (7, *sites[name].shape), name
    assert result.size == (30 if likely.latent else 1)
    replicated = posterior_predictive(result)
    assert {n: tuple(v.shape) for n, v in replicated.items()} == {
        n: (result.size, *s.shape) for n, s in likely.bound.select("observed").items()
    }


@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_the_result_has_its_groups_and_draws_more(latent: Case, verb: str) -> None:
    if verb == "sample" and not latent.chained:
        pytest.skip("chains of an entry before it say the same")
    result = latent.fitted if verb == "fit" else latent.chains
    # The density of an observation given a latent value of its own is left out, and the attributes say so.
    kept = "log_likelihood" not in result.idata.attrs
    groups = {"posterior", "posterior_predictive", "observed_data"} | ({"log_likelihood"} if kept else set())
    assert groups <= set(result.idata.children)
    chains = result.idata.posterior.sizes["chain"]
    for name, value in result.draws.items():
        assert np.array_equal(result.idata.posterior[name.replace("/", "_")].values.reshape(value.shape), value.numpy())
    if kept and not latent.pointwise:
        with pytest.raises(ValueError, match="model: expected observed sites in a plate of rows"):
            pointwise_log_likelihood(result)
    elif kept:
        pointwise = sum(v.values for v in result.idata.log_likelihood.data_vars.values()).reshape(result.size, -1)
        np.testing.assert_allclose(pointwise, pointwise_log_likelihood(result).numpy(), rtol=1e-6)
    more = result.draw(2 * chains + 1)
    again = result.draw(2 * chains + 1)
    for name, value in result.draws.items():
        assert more[name].shape == (2 * chains + 1, *value.shape[1:])
        assert torch.equal(more[name], again[name])
        assert (verb == "fit" and latent.fixed) or not torch.equal(more[name], value[: len(more[name])])


def test_a_result_draws_from_where_it_was_made_when_its_pair_trains_on(likely: Case) -> None:
    pair = likely.pair()
    first = likely.fit(pair, draws=5)
    before = first.draw(4)
    likely.fit(pair, steps=30, learning_rate=0.05, draws=1)
    moved = {n: p.detach().clone() for n, p in pair.named_parameters()}
    after = first.draw(4)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(p, moved[n]) for n, p in pair.named_parameters())


def test_minibatches_estimate_the_full_loss_without_bias(likely: Case) -> None:
    pair, data, count = likely.pair(), likely.data, likely.count
    likely.fit(pair, steps=0, draws=1)
    bound = bind(pair, data)
    if not bound.takes_rows:
        with pytest.raises(ValueError, match="^batch: expected a model with the arguments size and rows"):
            quick_fit(pair, data, batch=2)
        return
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if bound.summed else Trace_ELBO()

    def loss(rows: Tensor | None, seed: int = 5) -> float:
        with isolated(seed):
            return elbo.loss(enumerate_finite(bound), bound.guide, **bound.arguments(rows))

    def bias(seed: int) -> float:
        batches = torch.arange(count).split(16 if count == ROWS else (count + 1) // 2)
        return sum(len(rows) / count * loss(rows, seed) for rows in batches) - loss(None, seed)

    if likely.fixed or not any("rows" in bound.sites[n].plates for n in bound.guided):
        # The noise is the same, for it has nothing to do with the rows.
        assert abs(bias(5)) < (1e-9 if likely.entry.dtype == torch.float64 else 1e-6) * abs(loss(None))
        return
    found = np.array([bias(seed) for seed in range(60)])
    assert abs(found.mean()) < 4 * found.std() / 60**0.5 + 1e-9 * abs(loss(None))
    # So the error of the mean is below two percent, and rows that are not scaled up would be off by sixty.
    assert found.std() < 0.15 * abs(loss(None))


def test_without_a_likelihood_it_is_fitted_and_compared_like_any_pair(case: Case, occupied_store) -> None:
    if case.likelihood:
        pytest.skip("a likelihood")
    methods = {n: partial(m, steps=5, batch=20, progress=False) for n, m in case.entry.methods.items()}
    one, two = (case.entry.compare(case.dataset, methods) for _ in range(2))
    assert list(one.table.index) == list(case.entry.methods)
    assert one.table[["energy", "energy_se", "precision", "recall"]].notna().all(axis=None)
    pd.testing.assert_frame_equal(
        one.table.drop(columns=["seconds", "seconds_total"]),
        two.table[one.table.columns].drop(columns=["seconds", "seconds_total"]),
    )
    occupied_store()
    with pytest.raises(ValueError, match="needs a likelihood"):
        quick_fit(case.pair(), case.data)


FINITE = {"mean", "shift"}
"""Arguments of constructors that take any finite number."""
FROM_ZERO = {"stickiness", "alpha", "floor", "auxiliary", "baseline", "drop", "seed"}
"""Arguments of constructors for which zero says something."""
BLOCKS = {
    "real_or_generated",
    "sample_real",
    "generated",
    "read",
    "draw_logits",
    "likelihood",
    "maximise_parameters",
    "scaled",
    *HALVES,
}
"""Methods of which halves are made: they run under handlers, with data that have been checked."""
TAKES_MISSING = {("impute", "x"), ("log_evidence", "x")}
"""Methods and arguments for which nan is a value that is missing; other pairs refuse it."""

TAKES_NOISE = {("restore", "x")}
"""Methods and arguments that are rows seen through noise, which may be out of range."""


def constructors(entry: Entry) -> dict[str, inspect.Parameter]:
    """The arguments of a pair's constructors that are numbers or sizes, by name."""
    kind: Any = getattr(entry.make, "__self__", entry.make)
    functions = [entry.make, *(c.__dict__["__init__"] for c in kind.__mro__ if "__init__" in c.__dict__)]
    known: dict[str, inspect.Parameter] = {}
    for function in functions:
        taken = inspect.signature(function).parameters.values()
        known |= {p.name: p for p in taken if p.name not in known}
        if all(p.kind is not p.VAR_KEYWORD for p in taken):
            break
    numbers = {n: p for n, p in known.items() if re.search(r"\b(int|float)\b", str(p.annotation))}
    return {n: p for n, p in numbers.items() if n not in ("inputs", "extra")}  # those that a subclass sets


def test_a_constructor_names_the_number_that_it_cannot_use(case: Case) -> None:
    for name in constructors(case.entry):
        wrong = [torch.nan, torch.inf, "abc"]
        wrong += [] if name in FINITE else [-1]
        wrong += [] if name in FINITE | FROM_ZERO else [0]
        for value in wrong:
            arguments = {**case.entry.arguments(case.dataset), **case.entry.small, name: value}
            if name == "symbols" and value == "abc":
                continue  # the characters of a text
            with isolated(0), pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*: expected .*, got ") as error:
                case.entry.make(**arguments)
            assert "\n" not in str(error.value)


def methods(pair: Pair) -> dict[str, Any]:
    """The public methods of a pair that are its own."""
    found = {n: getattr(pair, n) for n in dir(type(pair)) if not n.startswith("_") and n not in BLOCKS | {"check"}}
    return {
        n: f for n, f in found.items() if inspect.ismethod(f) and f.__self__ is pair and "inference" not in f.__module__
    }


def wrong_values(pair: Pair, data: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Values of a data argument that the check of the pair refuses, as a verb does."""
    right = data.get(name, torch.zeros(len(next(iter(data.values()))), 3))
    found: dict[str, Any] = {"no tensor": 0.5, "nan": right * torch.nan, "out of range": torch.full_like(right, -7)}
    found["wrong width"] = right[..., :-1] if right.dim() > 1 else right[:-1]
    refused = {}
    for kind, value in found.items():
        try:
            pair.check(**{**data, name: value})
        except ValueError as error:
            refused[kind] = (value, str(error))
    return refused


def test_every_method_refuses_the_data_that_a_verb_refuses(case: Case) -> None:
    pair, data = case.pair(), case.data
    pair.check(**data)
    checks = [n for n, p in inspect.signature(pair.check).parameters.items() if p.kind is not p.VAR_KEYWORD]
    sizes = {"count": ROWS, "name": next(iter(case.dataset.features), "")}
    for method, call in methods(pair).items():
        takes = inspect.signature(call).parameters
        if "latents" in takes:
            # It needs draws of a posterior: test_imputation asks by the verb.
            continue
        rest = {n: v for n, v in {**sizes, **data}.items() if n in takes}
        if any(p.default is p.empty and n not in rest for n, p in takes.items() if n != "responsibilities"):
            # It needs draws of a posterior, too.
            continue
        if "responsibilities" in takes:
            rest["responsibilities"] = torch.ones(ROWS, pair.components) / pair.components
        for name in (n for n in checks if n in takes):
            for kind, (value, _) in wrong_values(pair, data, name).items():
                refused = method == "log_evidence" and isinstance(pair, FactorModel)
                if kind == "nan" and (method, name) in TAKES_MISSING and not refused:
                    continue
                if kind == "out of range" and (method, name) in TAKES_NOISE:
                    continue
                # Of two columns of unlike lengths either may be named.
                named = "|".join(checks) if kind == "wrong width" else name
                with isolated(0), pytest.raises(ValueError, match=f"^({named}): expected .*, got ") as error:
                    call(**{**rest, name: value})
                assert "\n" not in str(error.value), (method, name, kind)


def test_seeds_of_methods_are_integers_from_zero(case: Case) -> None:
    pair = case.pair()
    for call in methods(pair).values():
        takes = inspect.signature(call).parameters
        if "seed" not in takes:
            continue
        given = {n: v for n, v in {"count": ROWS, **case.data}.items() if n in takes}
        with pytest.raises(ValueError, match="^seed: expected an integer of at least 0, got -1$"):
            call(**given, seed=-1)
        one, two = (call(**given, seed=seed) for seed in (3, np.int64(3)))
        assert torch.equal(one, two) if isinstance(one, Tensor) else one.bits() == two.bits()


def test_pictures_are_grids_of_the_size_of_an_image(case: Case) -> None:
    shape = case.dataset.shape
    for images, title in case.pair().pictures(**case.dataset.test).values() if shape else ():
        assert images.dim() == 3 and images.shape[-1] == shape[0] * shape[1] and title
