"""Laws that hold for every row of the zoo, and for plain Pyro functions beside them."""

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import LABELS, SAMPLERS, WITHOUT, brief
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import classify, fit, pointwise_log_likelihood, posterior_predictive, prior_predictive, sample
from inference.core.bound import bind, enumerate_finite, sites_of
from inference.core.handlers import isolated
from inference.draws import scoring as prediction
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry

LIKELY = {name: entry for name, entry in ZOO.items() if name not in SAMPLERS}
ROWS = pytest.mark.parametrize("entry", LIKELY.values(), ids=list(LIKELY))
LATENT = {name: entry for name, entry in LIKELY.items() if name not in WITHOUT}
SAMPLED = pytest.mark.parametrize("entry", LATENT.values(), ids=list(LATENT))
quick_fit = partial(fit, steps=5, draws=30, progress=False)
quick_sample = partial(sample, draws=6, warmup=20, chains=2, progress=False)


def small(entry: Entry, count: int = 40) -> dict[str, Tensor]:
    return {k: v[:count] for k, v in entry.load().train.items()}


def fresh(entry: Entry, seed: int = 0) -> Pair:
    with isolated(seed):
        return entry.pair(entry.load(), **brief(entry.name))


def stored() -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in pyro.get_param_store().items()}


@pytest.fixture
def occupied_store():
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


@ROWS
def test_model_and_guide_have_the_same_sites_under_the_same_plates(entry: Entry) -> None:
    bound = bind(fresh(entry), small(entry))
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


@ROWS
def test_a_gradient_reaches_every_parameter(entry: Entry) -> None:
    pair, data = fresh(entry), small(entry)
    result = quick_fit(pair, data, steps=1)
    trained = {n: p for n, p in pair.named_parameters()}
    assert trained
    assert len(result.params) == len(trained)
    bound = bind(pair, data)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if bound.enumerated else Trace_ELBO()
    with isolated(0):
        loss = elbo.loss_and_grads(enumerate_finite(bound), bound.guide, **data)
    assert np.isfinite(loss)
    without = [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@ROWS
def test_the_same_seed_gives_the_same_result(entry: Entry) -> None:
    data = small(entry)
    one, two, other = (quick_fit(fresh(entry), data, seed=s) for s in (3, 3, 4))
    assert np.array_equal(one.losses, two.losses)
    # An exact guide has the same losses whatever it draws, and so has one with nothing to draw.
    assert not one.draws or one.diagnosis.pareto_k == -np.inf or not np.array_equal(one.losses, other.losses)
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])
        assert not torch.equal(value, other.draws[name])


def test_rows_without_latent_sites_are_known() -> None:
    without = {name for name, entry in LIKELY.items() if not bind(fresh(entry), small(entry)).select("latent")}
    assert without == set(WITHOUT)
    finite = {n for n in LATENT if all(s.units for s in bind(fresh(ZOO[n]), small(ZOO[n])).select("latent").values())}
    assert finite == set(LABELS)
    assert {name for name, entry in ZOO.items() if not bind(fresh(entry), small(entry)).observes} == set(SAMPLERS)
    for name in without:
        with pytest.raises(ValueError, match="model: expected a latent site to sample, got none"):
            quick_sample(fresh(ZOO[name]), small(ZOO[name]))


@SAMPLED
def test_chains_are_reproducible_and_differ(entry: Entry) -> None:
    data = small(entry)
    one, two = (quick_sample(fresh(entry), data, seed=3) for _ in range(2))
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])
        first, second = value[:6], value[6:]
        assert not torch.equal(first, second)


@ROWS
def test_every_public_call_leaves_the_store_and_the_random_state_alone(entry: Entry, occupied_store) -> None:
    data, pair = small(entry), fresh(entry)
    occupied_store()
    result = quick_fit(pair, data)
    occupied_store()
    classified = [lambda: classify(result, data, label=entry.label)] if entry.label else []
    for call in (
        *classified,
        *([lambda: quick_sample(pair, data)] if entry.name in LATENT else []),
        lambda: prior_predictive(pair, data, draws=3),
        lambda: posterior_predictive(result, data),
        lambda: pointwise_log_likelihood(result, data),
        lambda: result.draw(3),
    ):
        call()
        occupied_store()


@ROWS
def test_a_verb_leaves_the_store_alone_when_it_fails(entry: Entry, occupied_store) -> None:
    data = {**small(entry), "x": small(entry)["x"] * torch.nan}
    with pytest.raises(ValueError, match="x: expected finite"):
        quick_fit(fresh(entry), data)
    occupied_store()


@ROWS
def test_two_pairs_of_a_class_train_apart(entry: Entry) -> None:
    data = small(entry)
    first = fresh(entry)
    alone = quick_fit(fresh(entry), data)
    quick_fit(first, data, steps=20)
    frozen = {n: p.detach().clone() for n, p in first.named_parameters()}
    second = quick_fit(fresh(entry), data)
    assert np.array_equal(second.losses, alone.losses)
    assert all(torch.equal(p, frozen[n]) for n, p in first.named_parameters())


@ROWS
def test_state_dict_round_trip(entry: Entry) -> None:
    data, pair = small(entry), fresh(entry)
    quick_fit(pair, data)
    copy = fresh(entry, seed=7)
    quick_fit(copy, data, steps=0)
    copy.load_state_dict(pair.state_dict())
    one, two = (quick_fit(p, data, steps=0) for p in (pair, copy))
    for name, value in one.draws.items():
        assert torch.equal(value, two.draws[name])


@ROWS
def test_prior_draws_have_the_shapes_of_the_sites(entry: Entry) -> None:
    data, pair = small(entry), fresh(entry)
    inputs = {k: v for k, v in data.items() if k not in bind(pair, data).sites}
    drawn = prior_predictive(pair, inputs, size=None if inputs else 40, draws=7)
    sites = bind(pair, data).sites
    assert drawn.keys() == sites.keys()
    for name, value in drawn.items():
        assert tuple(value.shape) == (7, *sites[name].shape), name
    observed = bind(pair, data).select("observed")
    result = quick_fit(pair, data)
    assert result.size == (30 if entry.name in LATENT else 1)
    replicated = posterior_predictive(result)
    assert {n: tuple(v.shape) for n, v in replicated.items()} == {
        n: (result.size, *s.shape) for n, s in observed.items()
    }


@SAMPLED
@pytest.mark.parametrize("verb", [quick_fit, quick_sample], ids=["fit", "sample"])
def test_the_result_has_its_groups_and_draws_more(entry: Entry, verb) -> None:
    pair, data = fresh(entry), small(entry)
    result = verb(pair, data)
    groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data"}
    assert groups <= set(result.idata.groups())
    chains = result.idata.posterior.sizes["chain"]
    for name, value in result.draws.items():
        assert np.array_equal(result.idata.posterior[name].values.reshape(value.shape), value.numpy())
    pointwise = sum(v.values for v in result.idata.log_likelihood.data_vars.values()).reshape(result.size, -1)
    np.testing.assert_allclose(pointwise, pointwise_log_likelihood(result).numpy(), rtol=1e-6)
    more = result.draw(2 * chains + 1)
    again = result.draw(2 * chains + 1)
    for name, value in result.draws.items():
        assert more[name].shape == (2 * chains + 1, *value.shape[1:])
        assert torch.equal(more[name], again[name])
        assert not torch.equal(more[name], value[: len(more[name])])


@ROWS
def test_a_result_draws_from_where_it_was_made_when_its_pair_trains_on(entry: Entry) -> None:
    pair, data = fresh(entry), small(entry)
    first = quick_fit(pair, data)
    before = first.draw(4)
    quick_fit(pair, data, steps=50, learning_rate=0.05)
    moved = {n: p.detach().clone() for n, p in pair.named_parameters()}
    after = first.draw(4)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(p, moved[n]) for n, p in pair.named_parameters())


@ROWS
def test_all_draws_at_once_score_as_they_do_one_by_one(entry: Entry) -> None:
    pair, data = fresh(entry), small(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = quick_fit(pair, data)
    bound = result.bound
    with isolated(), result.state(), torch.no_grad():
        together = prediction.log_joint(bound, result.draws)
        single = [{n: v[k : k + 1] for n, v in result.draws.items()} for k in range(result.size)]
        apart = torch.cat([prediction.score(bound, d, "joint", at_once=False) for d in single])
    torch.testing.assert_close(together, apart)


@ROWS
def test_minibatches_estimate_the_full_loss_without_bias(entry: Entry) -> None:
    pair, data = fresh(entry), small(entry)
    quick_fit(pair, data, steps=0)
    bound = bind(pair, data)
    elbo = TraceEnum_ELBO(max_plate_nesting=1) if bound.enumerated else Trace_ELBO()

    def loss(rows: Tensor | None, seed: int = 5) -> float:
        with isolated(seed):
            return elbo.loss(enumerate_finite(bound), bound.guide, **bound.arguments(rows))

    def bias(seed: int) -> float:
        parts = [loss(rows, seed) for rows in torch.arange(40).split(16)]
        return float(np.dot(np.array([16, 16, 8]) / 40, parts)) - loss(None, seed)

    if not any("rows" in bound.sites[n].plates for n in bound.guided):
        # The noise is the same, for it has nothing to do with the rows.
        assert abs(bias(5)) < (1e-9 if entry.dtype == torch.float64 else 1e-6) * abs(loss(None))
        return
    found = np.array([bias(seed) for seed in range(60)])
    assert abs(found.mean()) < 4 * found.std() / 60**0.5 + 1e-9 * abs(loss(None))
    assert found.std() < 0.05 * abs(loss(None))


class RowLatents(Pair):
    r"""z_n ~ N(0, 1), x_n ~ N(z_n, s^2): a latent a row, with a mean-field guide of a parameter a row."""

    def __init__(self, count: int, noise: float = 0.5) -> None:
        super().__init__()
        self.noise = noise
        self.loc = torch.nn.Parameter(torch.zeros(count))
        self.log_scale = torch.nn.Parameter(torch.zeros(count))

    def model(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            return pyro.sample("x", dist.Normal(z, self.noise), obs=x)

    def guide(self, x=None, *, size=None, rows=None, **_):
        at = slice(None) if rows is None else rows
        with pyro.plate("rows", size or len(self.loc), subsample=rows, dim=-1):
            pyro.sample("z", dist.Normal(self.loc[at], self.log_scale[at].exp()))


def test_a_latent_a_row_fitted_by_minibatches_equals_the_full_batch_fit() -> None:
    torch.manual_seed(0)
    x = torch.randn(37)
    exact = x / 1.25
    elbo = partial(pyro.infer.TraceMeanField_ELBO, num_particles=8, vectorize_particles=True)
    mean_field = partial(fit, objective=elbo, steps=3000, draws=4, learning_rate=0.05, progress=False)
    full, batched = mean_field(RowLatents(37), x), mean_field(RowLatents(37), x, batch=10)
    torch.testing.assert_close(full.params["loc"], exact, atol=0.02, rtol=0)
    torch.testing.assert_close(batched.params["loc"], exact, atol=0.05, rtol=0)
    scale = torch.full_like(x, 0.2**0.5).log()
    torch.testing.assert_close(batched.params["log_scale"], scale, atol=0.06, rtol=0)


def test_pairs_make_pyro_methods_of_their_halves() -> None:
    pair = RowLatents(3)
    result = quick_fit(pair, torch.zeros(3))
    assert set(result.params) == {"loc", "log_scale"}
    assert all(p.grad is not None for p in pair.parameters())


def test_plain_functions_keep_their_parameters_in_the_result() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("observations", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    y = torch.tensor([1.0, 2.0, 3.0])
    elbo = partial(pyro.infer.Trace_ELBO, num_particles=20, vectorize_particles=True)
    result = fit((model, guide), y, elbo, steps=2000, progress=False)
    assert len(pyro.get_param_store()) == 0
    precision = 3 + 0.01
    assert float(result.params["loc"]) == pytest.approx(6 / precision, abs=0.03)
    assert float(result.params["scale"]) == pytest.approx(precision**-0.5, rel=0.05)
    assert float(result.draw(4000)["mu"].mean()) == pytest.approx(6 / precision, abs=0.05)
    chains = sample(model, y, draws=400, warmup=200, chains=2, progress=False)
    assert float(chains.draws["mu"].mean()) == pytest.approx(6 / precision, abs=0.1)
    assert chains.idata.posterior_predictive["y"].dims == ("chain", "draw", "observations")


def test_autoguides_of_plain_models_work_as_pairs() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)

    x = torch.linspace(-1, 1, 20)
    result = fit((model, AutoNormal(model)), {"x": x, "y": 0.7 * x}, steps=1500, progress=False)
    assert float(result.draws["slope"].mean()) == pytest.approx(0.7, abs=0.02)
    assert set(posterior_predictive(result, {"x": x[:5]})) == {"y"}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_fitted_and_compared_like_any_row(name: str, occupied_store) -> None:
    entry = ZOO[name]
    few = replace(entry.load(), train=small(entry), test=small(entry, 30))
    methods = {n: partial(m, steps=5, batch=20, progress=False) for n, m in entry.methods.items()}
    one, two = (entry.compare(few, methods) for _ in range(2))
    assert list(one.table.index) == list(entry.methods)
    assert one.table[["energy", "energy_se", "precision", "recall"]].notna().all(axis=None)
    pd.testing.assert_frame_equal(
        one.table.drop(columns=["seconds", "seconds_total"]),
        two.table[one.table.columns].drop(columns=["seconds", "seconds_total"]),
    )
    occupied_store()
    with pytest.raises(ValueError, match="needs a likelihood"):
        quick_fit(fresh(entry), small(entry))
