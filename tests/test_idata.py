"""A DataTree of draws: masks by a conjugate leave-one-out, names for NetCDF, and what a failure at the end leaves."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import arviz_stats as azs
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

import inference
from inference import fit, sample
from inference.core.bound import bind
from inference.draws import scoring
from inference.idata import allowed_names, seen_of
from inference.kernels import ChEES, Gibbs

pytestmark = pytest.mark.usefixtures("alone")


def double(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


Y = torch.randn(12, generator=torch.Generator().manual_seed(1)).double() + 2
SEEN = torch.ones(12, dtype=torch.bool)
SEEN[[1, 5, 7, 9]] = False


def by_handler(y: Tensor, seen: Tensor) -> None:
    """mu ~ N(0, 3^2), y ~ N(mu, 1), some of it masked."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_distribution(y: Tensor, seen: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).mask(seen), obs=y)


def in_an_event(y: Tensor, seen: Tensor) -> None:
    """Each row has a second entry that is never seen, and belongs to the row."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
    both = torch.stack([seen, torch.zeros_like(seen)], -1)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).expand(both.shape).mask(both).to_event(1), obs=torch.stack([y, y], -1))


def exact_guide(y: Tensor, seen: Tensor) -> None:
    precision = 1 / 9 + seen.sum()
    pyro.sample("mu", dist.Normal(y[seen].sum() / precision, precision**-0.5))


@pytest.mark.parametrize("model", [by_handler, by_distribution, in_an_event])
def test_masked_entries_do_not_count_in_loo(model) -> None:
    """Conjugate: the predictive of y_k given the seven others that are seen is normal."""
    elpd = []
    for k in SEEN.nonzero().flatten().tolist():
        rest = SEEN.clone()
        rest[k] = False
        variance = 1 / (1 / 9 + 7)
        elpd.append(float(dist.Normal(variance * Y[rest].sum(), (1 + variance) ** 0.5).log_prob(Y[k])))
    data = {"y": torch.where(SEEN, Y, 0.0), "seen": SEEN}
    result = fit((model, exact_guide), data, steps=0, draws=4000, progress=False)
    loo = azs.loo(result.idata, pointwise=True)
    assert loo.n_data_points == 8
    assert loo.elpd == pytest.approx(sum(elpd), abs=0.2)
    np.testing.assert_allclose(loo.elpd_i.values, elpd, atol=0.1)
    assert result.idata.log_likelihood["y"].dims == ("chain", "draw", "y_observed")


# ArviZ 0.8 sorts in a way that pandas 3 is about to drop.
@pytest.mark.filterwarnings("ignore:The inplace keyword:DeprecationWarning")
def test_arviz_compares_a_fit_with_chains_by_the_entries_that_are_seen() -> None:
    """The guide is the posterior, so both have the same elpd, within the error of a few hundred draws."""
    data = {"y": torch.where(SEEN, Y, 100.0), "seen": SEEN}
    results = {
        "fit": fit((by_handler, exact_guide), data, steps=0, draws=2000, progress=False),
        "sample": sample(by_handler, data, ChEES, chains=8, draws=100, warmup=100, compile=False, progress=False),
    }
    loo = {name: azs.loo(result.idata, pointwise=True) for name, result in results.items()}
    for name, result in results.items():
        assert result.idata.log_likelihood["y"].sizes["y_observed"] == loo[name].n_data_points == 8
        assert float(loo[name].pareto_k.max()) < 0.7
    assert loo["fit"].elpd == pytest.approx(loo["sample"].elpd, abs=0.3)
    table = azs.compare({name: result.idata for name, result in results.items()})
    assert set(table.index) == set(results)
    assert table["weight"].sum() == pytest.approx(1.0, abs=0.01)


def test_without_a_mask_the_log_likelihood_keeps_its_plates() -> None:
    data = {"y": Y, "seen": torch.ones_like(SEEN)}
    result = fit((by_handler, exact_guide), data, steps=0, draws=30, progress=False)
    assert result.idata.log_likelihood["y"].dims == ("chain", "draw", "rows")


def test_a_row_of_a_summed_out_site_counts_where_any_of_its_sites_is_seen() -> None:
    hidden = torch.tensor([[True, True], [True, False], [False, False], [False, True]])

    def model() -> None:
        share = pyro.sample("share", dist.Beta(double(2.0), 2.0))
        with pyro.plate("rows", 4, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            for k in range(2):
                with poutine.mask(mask=hidden[:, k]):
                    pyro.sample(f"x_{k}", dist.Normal(z, 1.0), obs=Y[:4])

    def guide() -> None:
        pyro.sample("share", dist.Beta(double(2.0), 2.0))

    result = fit((model, guide), steps=0, draws=40, progress=False)
    score = result.idata.log_likelihood["x_0_and_x_1"]
    assert score.shape == (1, 40, 3)
    share = result.draws["share"][:, None, None]
    density = torch.stack([dist.Normal(z, 1.0).log_prob(Y[:4, None]) for z in (0.0, 1.0)])
    rows = (density * hidden).sum(-1)[:, hidden.any(-1)]
    expected = torch.logaddexp(rows[1] + share[..., 0].log(), rows[0] + (1 - share[..., 0]).log())
    np.testing.assert_allclose(score.values[0], expected.numpy(), rtol=1e-9)


def test_a_mask_that_depends_on_a_latent_site_leaves_the_log_likelihood_out() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=y > mu):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(double(2.0), 1.0))

    # The masks of the first draw and of the last are alike in one of ten: all draws are looked at.
    result = fit((model, guide), Y, steps=0, draws=30, progress=False)
    with pytest.warns(UserWarning, match="log_likelihood left out: the mask of y depends on latent sites"):
        assert "log_likelihood" not in result.idata.children
    assert result.idata.attrs["log_likelihood"].startswith("left out: the mask of y depends on latent sites")


def test_masks_of_all_draws_are_looked_at() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=y > mu):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    bound = bind(model, double(1.0, 2.0))
    assert seen_of(bound, {"mu": double(0.0, 0.5, 0.0)})["y"].tolist() == [True, True]
    # The first and the last draw see both entries, the one between sees one.
    with pytest.raises(ValueError, match="the mask of y depends on latent sites"):
        seen_of(bound, {"mu": double(0.0, 1.5, 0.0)})


def effects(y: Tensor) -> None:
    """A latent value per observation."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.3), obs=y)


def groups_of_rows(y: Tensor) -> None:
    """A latent value per group of four observations."""
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(double(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(theta[torch.arange(12) // 4], 0.3), obs=y)


def event(y: Tensor) -> None:
    """A latent value per observation, and two that all of them share."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(y) + 2).double(), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + z[:-2] + z[-2:].sum(), 0.5), obs=y)


def other_plate(y: Tensor) -> None:
    with pyro.plate("latents", len(y)):
        z = pyro.sample("z", dist.Normal(double(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(z.flip(0), 0.5), obs=y)


def more_weights_than_rows(y: Tensor) -> None:
    """All rows depend on each weight."""
    w = pyro.sample("w", dist.Normal(torch.zeros(20).double(), 1.0).to_event(1))
    x = torch.linspace(-1, 1, 240).reshape(12, 20).double()
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def states_of_rows(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(double(0.5)).expand([len(y)]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(4 * z.flip(0), 1.0), obs=y)


def states_of_neighbours(y: Tensor) -> None:
    """Each state says something of two observations."""
    z = pyro.sample("z", dist.Bernoulli(double(0.5)).expand([len(y) + 1]).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(2 * (z[1:] + z[:-1]), 1.0), obs=y)


def test_a_drawn_state_for_each_observation_leaves_the_log_likelihood_out() -> None:
    chains = partial(sample, kernel=Gibbs, draws=8, warmup=8, chains=4, compile=False, progress=False)
    own = chains(states_of_rows, Y)
    assert own.idata.attrs["log_likelihood"].startswith("left out: z has a value for each observation")
    assert "log_likelihood" in chains(states_of_neighbours, Y).idata.children


def test_a_latent_value_for_each_observation_leaves_the_log_likelihood_out_with_the_reason() -> None:
    own = fit((effects, AutoNormal(effects)), Y, steps=5, draws=30, progress=False)
    assert "log_likelihood" not in own.idata.children
    assert own.idata.attrs["log_likelihood"].startswith("left out: theta has a value for each observation")
    for model in (event, other_plate):
        own = fit((model, AutoNormal(model)), Y, steps=5, draws=30, progress=False)
        assert own.idata.attrs["log_likelihood"].startswith("left out: z has a value for each observation")
        with pytest.raises(ValueError, match="^result: expected latent sites outside of the plate of rows, got z; "):
            inference.loo(own)
    many = fit((more_weights_than_rows, AutoNormal(more_weights_than_rows)), Y, steps=5, draws=30, progress=False)
    assert "log_likelihood" in many.idata.children
    shared = fit((groups_of_rows, AutoNormal(groups_of_rows)), Y, steps=5, draws=30, progress=False)
    assert shared.idata.log_likelihood["y"].shape == (1, 30, 12)
    assert "log_likelihood" not in shared.idata.attrs


def test_a_wide_deterministic_site_costs_a_small_one_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference.groups, "STORED", 1000)

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
        pyro.deterministic("wide", mu * torch.ones(100).double())
        pyro.deterministic("small", 2 * mu)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"left out wide \(3,000 numbers\), for fewer"):
        found = fit((model, AutoNormal(model)), Y, steps=1, draws=30, progress=False).idata.posterior
    assert set(found.data_vars) == {"mu", "small"}
    np.testing.assert_array_equal(found["small"], 2 * found["mu"])


def test_names_with_a_slash_are_written_and_read_back(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        ratio = pyro.sample("od280/od315", dist.Normal(double(0.0), 1.0))
        with pyro.plate("rows/all", len(y)):
            pyro.sample("y/z", dist.Normal(ratio, 1.0), obs=y)

    result = fit((model, AutoNormal(model)), Y, steps=5, draws=30, progress=False)
    assert list(result.draws) == ["od280/od315"]
    result.idata.to_netcdf(str(tmp_path / "a.nc"))
    read = xr.open_datatree(tmp_path / "a.nc")
    np.testing.assert_array_equal(read.posterior["od280_od315"][0], result.draws["od280/od315"])
    assert read.posterior["od280_od315"].attrs["site"] == "od280/od315"
    assert read.log_likelihood["y_z"].dims == ("chain", "draw", "rows_all")
    assert set(read.children) == set(result.idata.children)


@pytest.mark.parametrize("name", ["draw", "chain", ".", "..", "rows", "component", "y_dim_1"])
def test_a_site_with_the_name_of_a_dimension_is_in_every_table_and_file(name: str, tmp_path: Path) -> None:
    """Nothing of a posterior is lost to a coordinate: the draws are those of the Result, under the attribute site."""

    class Pair:
        def __init__(self) -> None:
            self.dims = {"weights": ["component"], name: ["draw"]}

        def model(self, y: Tensor) -> None:
            mu = pyro.sample(name, dist.Normal(double(0.0, 0.0), 10.0).to_event(1))
            pyro.sample("weights", dist.Normal(double(0.0, 0.0), 1.0).to_event(1))
            with pyro.plate("cases" if name == "rows" else "rows", len(y)):
                pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=torch.stack([y, y], -1))

        def guide(self, y: Tensor) -> None:
            pyro.sample(name, dist.Normal(double(2.0, 2.0), 0.3).to_event(1))
            pyro.sample("weights", dist.Normal(double(0.0, 0.0), 1.0).to_event(1))

    result = fit(Pair(), Y, steps=0, draws=30, progress=False)
    result.save(tmp_path / "kept")
    for tree in (result.idata, inference.Result.load(tmp_path / "kept", Pair(), Y).idata):
        sites = {v.attrs.get("site", n): v for n, v in tree.posterior.data_vars.items()}
        assert set(sites) == {name, "weights"}
        np.testing.assert_array_equal(sites[name][0], result.draws[name])
        assert tree.posterior.sizes["draw"] == 30 and tree.posterior.sizes["chain"] == 1
    assert len(result.summary()) == 4
    chains = sample(Pair().model, Y, ChEES, draws=6, warmup=4, chains=4, checkpoint=tmp_path / "chains", progress=False)
    for tree in (chains.idata, inference.open_draws(tmp_path / "chains")):
        (found,) = (v for n, v in tree["posterior"].data_vars.items() if v.attrs.get("site", n) == name)
        np.testing.assert_array_equal(found.values.reshape(24, 2), chains.draws[name])


def test_a_site_that_is_lost_on_the_way_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inference.groups.dataset_of
    monkeypatch.setattr(inference.groups, "dataset_of", lambda *given: whole(*given).drop_vars("mu", errors="ignore"))
    result = fit((effects, AutoNormal(effects)), Y, steps=1, draws=30, progress=False)
    assert "Not judged: mu: it is in result.draws alone." in str(result.diagnosis)


def test_an_observed_site_with_the_name_of_a_dimension_stays() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("draw", dist.Normal(mu, 1.0), obs=y)

    result = fit((model, AutoNormal(model)), Y, steps=1, draws=30, progress=False)
    for group in ("posterior_predictive", "log_likelihood", "observed_data"):
        assert result.idata[group]["draw_"].attrs["site"] == "draw"
    np.testing.assert_array_equal(result.idata.observed_data["draw_"], Y)


def test_names_for_netcdf_stay_apart() -> None:
    assert allowed_names(["a_b", "a/b", "a/b", "a_b_2"]) == {"a_b": "a_b", "a/b": "a_b_3", "a_b_2": "a_b_2"}


class Failing(PyroModule):
    """A model whose deterministic site, or whose predictive draws, fail after the fit."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.over, self.steps = what, False, 0

    def forward(self, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        if self.over:
            raise KeyError("no such column")
        with pyro.plate("rows", 12):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_what_fails_after_the_last_step_does_not_lose_the_fit() -> None:
    model = Failing("predictive")

    class Over(AutoNormal):
        def forward(self, *args, **kwargs):
            # The draws at the end are without gradients, as a look at the pair before the first step is.
            model.steps += torch.is_grad_enabled()
            model.over = model.steps >= 20 and not torch.is_grad_enabled()
            return super().forward(*args, **kwargs)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = fit((model, Over(model)), Y, steps=20, draws=30, compile=False, progress=False)
    assert result.params and len(result.losses) == 20
    assert result.draws["mu"].shape == (30,)
    assert any("left out" in str(w.message) for w in said)
    assert "Not judged: " in str(result.diagnosis) and "No warning" not in str(result.diagnosis)


def test_a_flow_of_each_row_is_fitted_and_judged() -> None:
    """Its mean is not known, and is taken from draws."""

    class Flow(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = dist.transforms.affine_autoregressive(2, [8]).double()

        def model(self, x=None, *, size=None, rows=None):
            with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        def guide(self, x=None, *, size=None, rows=None):
            pyro.module("flow", self.flow)
            with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
                base = dist.Normal(0.5 * x, 0.5**0.5).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))

    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    result = fit(Flow(), x, steps=10, draws=30, progress=False)
    assert result.diagnosis.pareto_k is not None
    assert result.diagnosis.latent_kl is not None and (result.diagnosis.latent_kl["variance"] > 0.01).all()
    assert not result.diagnosis.unjudged


def test_sites_of_a_guide_with_very_many_quantities_have_no_lines_in_the_table(monkeypatch) -> None:
    monkeypatch.setattr(inference.diagnostics.convergence, "MAX_QUANTITIES", 5)
    result = fit((effects, AutoNormal(effects)), Y, steps=5, draws=30, progress=False)
    assert list(result.summary().index) == ["mu"]
    assert result.diagnosis.omitted == ("theta",)


def test_deterministic_sites_do_not_depend_on_the_length_of_the_data(monkeypatch) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        pyro.deterministic("twice", 2 * mu)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    monkeypatch.setattr(inference.groups, "STORED", 100)
    result = fit((model, AutoNormal(model)), Y, steps=5, draws=30, progress=False)
    with pytest.warns(UserWarning, match="left out: 360 numbers, for fewer rows or draws; ask"):
        np.testing.assert_allclose(result.idata.posterior["twice"][0], 2 * result.draws["mu"])
    assert result.idata.attrs["posterior_predictive"].startswith("left out: 360 numbers, for fewer rows or draws; ask")


def test_labels_that_gibbs_draws_are_values_of_each_observation() -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(double(0.5)))
            pyro.sample("y", dist.Normal(mu * z, 1.0), obs=y)

    result = sample(model, Y, Gibbs, draws=8, warmup=8, chains=4, compile=False, progress=False)
    assert "z has a value for each observation" in result.idata.attrs["log_likelihood"]


class Schools(PyroModule):
    """Deterministic sites in a plate: of its elements, of its elements with an event, and of none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.coords = {"schools": ["A", "B", "C"], "subjects": ["maths", "music"]}
        self.dims = {"both": ("subjects",)}

    def model(self, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        with pyro.plate("schools", 3, dim=-1):
            eta = pyro.sample("eta", dist.Normal(double(0.0), 1.0))
            theta = pyro.deterministic("theta", mu + eta)
            pyro.deterministic("both", torch.stack([theta, -theta], -1))
            pyro.deterministic("declared", torch.stack([theta, -theta], -1), event_dim=1)
            pyro.deterministic("other", torch.stack([theta[0], theta[1]]))
            pyro.deterministic("total", theta.sum())
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        pyro.deterministic("outside", theta)


def test_deterministic_sites_in_a_plate_keep_its_name_and_coordinates() -> None:
    pair = Schools()
    result = sample(pair, Y[:3], ChEES, chains=4, draws=5, warmup=5, compile=False, progress=False)
    posterior = result.idata.posterior
    names = {n: posterior[n].dims[2:] for n in ("theta", "both", "declared", "other", "total", "outside")}
    assert names == {
        "theta": ("schools",),
        "both": ("schools", "subjects"),
        "declared": ("schools", "declared_dim_1"),
        "other": ("other_dim_0",),
        "total": (),
        "outside": ("outside_dim_0",),
    }
    assert list(posterior["theta"].coords["schools"].values) == ["A", "B", "C"]
    assert "theta[B]" in result.summary().index
    np.testing.assert_allclose(posterior["theta"], posterior["mu"] + posterior["eta"])


def nested(y: Tensor) -> None:
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Normal(double(0.0), 1.0))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.deterministic("full", a + b)
            pyro.deterministic("row", torch.ones(3).double())
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)


def test_deterministic_sites_in_nested_plates() -> None:
    sites = bind(nested, Y[:6].reshape(2, 3)).sites
    assert sites["full"].plates == ("outer", "inner")
    assert sites["row"].plates == ("inner",)


def test_the_summary_of_a_guide_has_the_intervals_that_the_summary_of_chains_has() -> None:
    """Of the conjugate posterior, N(sum(y) / precision, 1 / precision)."""
    data = {"y": Y, "seen": torch.ones_like(SEEN)}
    guide = fit((by_handler, exact_guide), data, steps=0, draws=4000, progress=False)
    chains = sample(by_handler, data, ChEES, chains=16, draws=100, warmup=100, compile=False, progress=False)
    precision = 1 / 9 + 12
    exact = dist.Normal(Y.sum() / precision, precision**-0.5)
    for result in (guide, chains):
        table = result.summary()
        assert list(table.columns[:4]) == ["mean", "sd", "eti89_lb", "eti89_ub"]
        expected = [float(exact.icdf(torch.tensor(p).double())) for p in (0.055, 0.945)]
        # The standard error of a quantile of 400 effective draws is 0.1 standard deviations.
        np.testing.assert_allclose(table.loc["mu", ["eti89_lb", "eti89_ub"]].astype(float), expected, atol=0.45 * 0.29)
        np.testing.assert_allclose(result.summary(0.5).loc["mu", "eti50_ub"], np.quantile(result.draws["mu"], 0.75))
    assert list(chains.summary().columns[4:]) == ["mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    with pytest.raises(ValueError, match="prob: expected a probability between 0 and 1, got 89"):
        guide.summary(89)


@pytest.mark.parametrize("masked", [False, True])
def test_the_state_of_a_group_is_summed_out_and_leaves_a_number_per_group(masked: bool) -> None:
    """log sum_z p(z) prod_b N(y_ab; m_z, 1) over what is seen, by hand; a group of which nothing is seen is dropped."""
    y, seen = torch.linspace(-2.0, 2.0, 12).reshape(4, 3), torch.ones(4, 3, dtype=torch.bool)
    if masked:
        seen[1, 0], seen[2] = False, False

    def model(y: Tensor, seen: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("groups", 4, dim=-2):
            z = pyro.sample("z", dist.Bernoulli(p))
            with pyro.plate("members", 3, dim=-1), pyro.poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(torch.where(z > 0, 1.0, -1.0), 1.0), obs=y)

    def guide(y: Tensor, seen: Tensor) -> None:
        pyro.sample("p", dist.Beta(3.0, 3.0))

    result = fit((model, guide), {"y": y, "seen": seen}, steps=0, draws=20, progress=False)
    p = result.draws["p"][:, None]
    one, two = ((dist.Normal(m, 1.0).log_prob(y) * seen).sum(-1) for m in (1.0, -1.0))
    truth = torch.logaddexp(p.log() + one, (1 - p).log() + two)[:, seen.any(-1)]
    got = result.idata.log_likelihood["y"]
    assert got.dims == ("chain", "draw", "y_observed" if masked else "groups")
    np.testing.assert_allclose(got.values[0], truth.numpy(), rtol=1e-5, atol=1e-5)


def test_groups_of_the_data_are_made_when_they_are_asked_for_and_once() -> None:
    runs = 0

    def model(y: Tensor) -> None:
        nonlocal runs
        runs += 1
        mu, sd = pyro.sample("mu", dist.Normal(double(0.0), 3.0)), pyro.param("sd", double(1.2))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, sd), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", double(2.0))
        pyro.sample("mu", dist.Normal(loc, 0.5))

    one, two = (fit((model, guide), Y, steps=3, draws=200, progress=False, compile=False) for _ in range(2))
    before = runs
    assert set(one.groups.drawn.children) == {"posterior", "observed_data"}
    assert one.groups["posterior"]["mu"].shape == (1, 200) and runs == before
    # They belong to the parameters, and to the seed, of the fit, whatever comes before they are asked for.
    assert abs(float(one.params["sd"]) - 1.2) > 1e-3
    pyro.get_param_store().setdefault("loc", double(50.0))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    score = one.groups["log_likelihood"]["y"].values
    assert torch.equal(torch.get_rng_state(), state) and runs > before
    mu = one.draws["mu"][:, None].numpy()
    exact = dist.Normal(one.draws["mu"][:, None], one.params["sd"]).log_prob(Y)
    np.testing.assert_allclose(score[0], exact.numpy(), rtol=1e-6)
    assert list(one.idata.children) == ["posterior", "posterior_predictive", "log_likelihood", "observed_data"]
    after = runs
    assert one.idata is one.idata and runs == after
    pyro.clear_param_store()
    predicted = [r.idata["posterior_predictive"]["y"].values for r in (one, two)]
    np.testing.assert_array_equal(*predicted)
    assert abs(predicted[0].mean() - mu.mean()) < 5 * 1.2 / predicted[0].size ** 0.5 + 5 * 0.5 / 200**0.5
    # The noise of the predictions is not that of the posterior once more.
    assert abs(np.corrcoef(predicted[0][0, :, 0] - mu[:, 0], mu[:, 0])[0, 1]) < 5 / 200**0.5


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("change", ["new values", "new order"])
def test_groups_of_data_that_were_changed_in_place_are_left_out(numpy: bool, change: str) -> None:
    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.arange(12.0).double()
    given = y.numpy() if numpy else y
    result, kept = (fit((model, AutoNormal(model)), given, steps=2, draws=20, progress=False) for _ in range(2))
    score = kept.groups["log_likelihood"]["y"].values.copy()
    y.copy_(y.flip(0) if change == "new order" else y + 1)
    if not torch.equal(result.bound.data["y"], y):
        pytest.skip("the fit has a copy")
    with pytest.warns(UserWarning, match="left out: expected the data as they were, got them changed in place since"):
        assert set(result.idata.children) == {"posterior", "observed_data"}
    assert "changed in place" in result.idata.attrs["log_likelihood"]
    # What was asked for before stays.
    np.testing.assert_array_equal(kept.groups["log_likelihood"]["y"].values, score)


def test_a_group_whose_making_was_interrupted_is_made_when_it_is_asked_for_again(monkeypatch) -> None:
    result, scores = fit((effects, AutoNormal(effects)), Y, steps=1, draws=30, progress=False), scoring.draw_sites

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "draw_sites", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _ = result.idata
    monkeypatch.setattr(scoring, "draw_sites", scores)
    assert "posterior_predictive" in result.idata.children
