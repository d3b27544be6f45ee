"""The table, the plot and the files of ``compare`` on a conjugate model of plain functions, against numbers by hand."""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz_base as azb
import arviz_stats as azs
import matplotlib.image
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import seeds
import torch
import xarray as xr
from matplotlib.figure import Figure
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import Tensor

import inference
from inference import Comparison, Result, pointwise_log_likelihood
from inference.comparison.compare import compare
from inference.comparison.scores import (
    _decided_by_few,
    _particles,
    calibration_error,
    drawn_scores,
    monte_carlo_error,
    noise_floor,
)
from inference.comparison.table import COLUMNS
from inference.core.bound import bind
from ppl_models import GaussianNaiveBayes

X = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)
INDEPENDENT_FRACTION = torch.tensor([-1.0, 0.25, 1.5, 3.0], dtype=torch.float64)
# mu ~ N(0, 1) and w ~ N(0, 1)^2 with x ~ N(mu, 1): three rows that sum to 4.
MEAN, SD = 1.0, 0.5
TRUTH = {
    "mu": (torch.tensor(MEAN, dtype=torch.float64), torch.tensor(SD, dtype=torch.float64)),
    "w": (torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)),
}


pytestmark = pytest.mark.usefixtures("alone")


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def model(x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(zero(), 1.0))
    pyro.sample("w", dist.Normal(zero().expand(2), 1.0).to_event(1))
    count = size if x is None else len(x)
    with pyro.plate("rows", count, subsample=rows):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def guide(x: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None) -> None:
    pyro.sample("mu", dist.Normal(zero() + MEAN, SD))
    pyro.sample("w", dist.Normal(zero().expand(2), 1.0).to_event(1))


def make_pair() -> tuple[Callable[..., None], Callable[..., None]]:
    return model, guide


def exactly(pair: Any, data: Any, **arguments: Any) -> Result:
    return inference.fit(pair, data, steps=0, progress=False, **{"draws": 500, **arguments})


def at_its_mode(pair: Any, data: Any, draws: int = 500) -> Result:
    return inference.fit((pair[0], AutoDelta(pair[0])), data, steps=5, draws=draws, progress=False)


def by_nuts(pair: Any, data: Any) -> Result:
    return inference.sample(pair, data, NUTS, draws=60, warmup=40, chains=2, progress=False)


def failing(error: Exception) -> Callable[[Any, Any], Result]:
    def method(pair: Any, data: Any) -> Result:
        raise error

    return method


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Three methods against the truth and held-out rows."""
    methods = {"exact": exactly, "MAP": at_its_mode, "NUTS": by_nuts}
    return compare(make_pair, X, methods, truth=TRUTH, heldout=INDEPENDENT_FRACTION)


# The table


def seeded(pair: Any, data: Any, seed: int = 5) -> Result:
    return exactly(pair, data, draws=100, seed=seed)


def test_seeds_give_means_and_standard_errors_of_every_column_by_hand() -> None:
    methods = {"exact": seeded, "half": lambda pair, data, seed: exactly(pair, data, draws=50, seed=seed)}
    found = compare(make_pair, X, methods, truth=TRUTH, heldout=INDEPENDENT_FRACTION, seeds=3)
    alone = [compare(make_pair, X, {"exact": partial(seeded, seed=s)}, truth=TRUTH).table for s in (5, 6, 7)]
    errors = np.array([t.loc["exact", "error_max"] for t in alone])
    assert found.table.loc["exact", "error_max"] == pytest.approx(errors.mean(), rel=1e-12)
    assert found.errors is not None
    assert found.errors.loc["exact", "error_max"] == pytest.approx(errors.std(ddof=1) / 3**0.5, rel=1e-12)
    # Differences are of the same seed, row by row.
    assert found.table["lpd_diff"].max() <= 0 and found.errors["lpd_diff"].notna().all()
    assert f"{errors.mean():.4g} ± {found.errors.loc['exact', 'error_max']:.2g}" in str(found)
    with pytest.raises(ValueError, match="^methods: expected ones that take a seed, for seeds=2, got MAP, which takes"):
        compare(make_pair, X, {"MAP": at_its_mode}, seeds=2)


def test_runs_side_by_side_are_those_one_after_another() -> None:
    with seeds.unmoved():  # as they are in new processes
        one, two = (compare(make_pair, X, {"exact": seeded}, truth=TRUTH, seeds=3, jobs=jobs) for jobs in (1, 2))
    timed = ["seconds", "seconds_total"]
    pd.testing.assert_frame_equal(one.table.drop(columns=timed), two.table.drop(columns=timed))


def test_coverage_of_the_parameters_that_the_data_were_simulated_from() -> None:
    """Of mu and two of w one lies outside of the central 90 % of N(0, 1), which is 1.645."""
    drawn = {"mu": torch.tensor(1.2), "w": torch.tensor([0.3, 2.2])}
    row = compare(make_pair, X, {"exact": exactly}, drawn=drawn).table.loc["exact"]
    assert row["coverage_90"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"^drawn: expected sites of the model \(mu, w, x\), got 'v'$"):
        compare(make_pair, X, {"exact": exactly}, drawn={"v": torch.zeros(())})
    with pytest.raises(ValueError, match=r"^drawn: expected w of shape \(2,\), got \(3,\)$"):
        compare(make_pair, X, {"exact": exactly}, drawn={"w": torch.zeros(3)})


def test_coverage_of_more_draws_than_torch_takes_for_quantiles() -> None:
    result: Any = SimpleNamespace(draws={"z": torch.linspace(0, 1, 17_000_000)})
    found = [drawn_scores(result, {"z": torch.tensor(true)}) for true in (0.06, 0.94, 0.96)]
    assert [f["coverage_90"] for f in found] == [1, 1, 0]


def test_a_truth_that_is_an_estimate_shows_its_own_error() -> None:
    chains = by_nuts(make_pair(), X)
    found = compare(make_pair, X, {"exact": exactly}, truth=chains)
    table = chains.diagnosis.table
    assert found.table.loc["exact", "truth_error"] == pytest.approx((table["mcse_mean"] / table["sd"]).max())
    assert found.table.loc["exact", "error_max"] < 5 * found.table.loc["exact", "truth_error"]
    assert compare(make_pair, X, {"exact": exactly}, truth=TRUTH).table["truth_error"].isna().all()


def test_loss_gradients_and_stein_discrepancy_are_those_of_the_results(comparison: Comparison) -> None:
    results, table = comparison.results, comparison.table
    chains = results["NUTS"].idata["sample_stats"]
    assert table.loc["NUTS", "gradients"] == float(chains["n_steps"].sum()) and np.isnan(table.loc["NUTS", "loss"])
    assert table.loc["MAP", "gradients"] == 5 and table.loc["MAP", "loss"] == results["MAP"].losses[-1]
    assert np.isnan(table.loc["exact", "gradients"]) and table["ksd"].isna().all()
    wide = partial(lambda pair, data: exactly((pair[0], wide_guide), data))
    found = compare(make_pair, X, {"exact": exactly, "wide": wide}, stein=True).table
    assert found.loc["exact", "ksd_p"] > 1e-3 > 0.5 * found.loc["wide", "ksd_p"]
    assert found.loc["exact", "ksd"] < found.loc["wide", "ksd"]


def wide_guide(x: Tensor) -> None:
    pyro.sample("mu", dist.Normal(zero() + MEAN, 3 * SD))
    pyro.sample("w", dist.Normal(zero().expand(2), 3.0).to_event(1))


def test_a_failed_method_says_why_in_every_form_of_the_table() -> None:
    methods = {"exact": exactly, "bad_one": failing(ValueError("50 % of a | b & c"))}
    with pytest.warns(UserWarning, match="bad_one failed"):
        found = compare(make_pair, X, methods, truth=TRUTH)
    assert found.failed == {"bad_one": "ValueError: 50 % of a | b & c"} and "ValueError: 50 % of a" in str(found)
    assert pd.read_csv(io.StringIO(found.to_csv()), index_col=0).loc["bad_one", "failed"] == found.failed["bad_one"]
    lines = found.to_markdown().splitlines()
    assert lines[-1].endswith(r"| ValueError: 50 % of a \| b & c |")
    assert {line.replace(r"\|", "").count("|") for line in lines} == {lines[0].count("|")}
    latex = found.to_latex()
    assert r"bad\_one & " in latex and r"50 \% of a | b \& c \\" in latex and latex.count(r"\\") == 3


def test_the_plot_of_progress_has_losses_and_errors(comparison: Comparison) -> None:
    axes = comparison.plot_progress().axes
    assert [a.get_xlabel() for a in axes] == ["seconds, with set-up", "gradient evaluations"] * 2
    (nuts,) = [line for line in axes[2].get_lines() if line.get_label() == "NUTS"]
    # The last place of the chains has the error of all draws.
    assert nuts.get_ydata()[-1] == pytest.approx(comparison.table.loc["NUTS", "error_max"])
    assert nuts.get_xdata()[-1] == pytest.approx(comparison.table.loc["NUTS", "seconds_total"])
    with pytest.raises(ValueError, match="^plot_progress: expected a fit, or a truth, got neither$"):
        compare(make_pair, X, {"exact": exactly}).plot_progress()


def test_the_table_has_a_row_a_method_and_the_columns_that_are_told(comparison: Comparison) -> None:
    assert list(comparison.table.index) == ["exact", "MAP", "NUTS"]
    assert comparison.table.index.name == "method"
    assert list(comparison.table.columns) == list(COLUMNS)
    assert {str(kind) for kind in comparison.table.dtypes} == {"float64"}
    assert list(comparison.results) == ["exact", "MAP", "NUTS"]
    assert comparison.truth == TRUTH


def test_errors_are_those_of_the_posterior_means_in_true_standard_deviations(comparison: Comparison) -> None:
    for name, result in comparison.results.items():
        mu, w = result.draws["mu"].numpy(), result.draws["w"].numpy()
        errors = np.array([(mu.mean() - MEAN) / SD, *w.mean(0)])
        row = comparison.table.loc[name]
        assert row["error_max"] == pytest.approx(abs(errors).max(), rel=1e-10)
        assert row["error_rms"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-10)
        if name == "MAP":
            assert row["sd_ratio"] == 0.0 and row["sd_error"] == np.inf
            assert np.isnan(row["error_floor"])
        else:
            ratios = [mu.std(ddof=1) / SD, *w.std(0, ddof=1)]
            assert row["sd_ratio"] == pytest.approx(scipy.stats.gmean(ratios), rel=1e-10)
            factor = np.exp(np.sqrt((np.log(ratios) ** 2).mean()))
            assert row["sd_error"] == pytest.approx(factor, rel=1e-10)


def test_a_point_estimate_of_one_draw_is_judged_too() -> None:
    row = compare(
        make_pair, X, {"MAP": partial(at_its_mode, draws=1)}, truth=TRUTH, heldout=INDEPENDENT_FRACTION
    ).table.loc["MAP"]
    assert row["sd_ratio"] == 0.0
    assert np.isfinite(row[["error_max", "error_rms", "lpd", "lpd_se"]].astype(float)).all()


def test_errors_are_of_the_sites_that_have_a_truth() -> None:
    found = compare(make_pair, X, {"exact": exactly}, truth={"w": TRUTH["w"]})
    w = found.results["exact"].draws["w"].numpy()
    assert found.table.loc["exact", "error_max"] == pytest.approx(abs(w.mean(0)).max())
    methods = {"other": lambda pair, data: exactly((other, guide_of_nu), data)}
    with pytest.warns(UserWarning, match="draws no w: not compared with the truth"):
        nothing = compare(make_pair, X, methods, truth={"w": TRUTH["w"]}).table.loc["other"]
    assert nothing[["error_max", "error_rms", "sd_ratio", "sd_error"]].isna().all()


LABELLED = {"x": X, "y": torch.tensor([1.0, 0.0, 1.0]).double()}
MISNAMED = [
    ({"truth": {"Mu": TRUTH["mu"]}}, r"truth: expected sites of the model \(mu, w, x\), got 'Mu'"),
    ({"truth": {"w": TRUTH["mu"]}}, r"truth: expected mean and sd of w of shape \(2,\), got \(\)"),
    ({"label": "y", "heldout": X}, r"label: expected a finite site of the model \(none\), got 'y'"),
]


@pytest.mark.parametrize(("arguments", "line"), MISNAMED)
def test_names_that_the_model_does_not_have_are_refused_before_any_work(arguments: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        compare(make_pair, X, {"never": failing(AssertionError("it ran"))}, **arguments)


@pytest.mark.parametrize(("heldout", "got"), [(None, "none"), (X, "no names"), ({"x": X}, "x")])
def test_a_label_without_held_out_labels_is_refused(heldout: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"label: expected held-out rows with 'y', got {got}"):
        compare(lambda: (mixture, guide_of_mu), LABELLED, {"exact": exactly}, heldout=heldout, label="y")


def test_widths_that_are_wrong_in_both_directions_are_told() -> None:
    """Half twice too wide, half twice too narrow: their geometric mean is right."""
    result = exactly((model, guide), X)
    draws = torch.tensor([2.0, 0.5]) * result.draws["w"] / result.draws["w"].std(0)
    row = compare(
        make_pair, X, {"w": lambda *_: replace(result, draws={"w": draws})}, truth={"w": TRUTH["w"]}
    ).table.loc["w"]
    assert row["sd_ratio"] == pytest.approx(1.0)
    assert row["sd_error"] == pytest.approx(2.0)
    draws = draws * torch.tensor([1.0, 0.0])
    row = compare(
        make_pair, X, {"w": lambda *_: replace(result, draws={"w": draws})}, truth={"w": TRUTH["w"]}
    ).table.loc["w"]
    assert row["sd_ratio"] == 0.0 and row["sd_error"] == np.inf


@pytest.mark.parametrize("draws", [50, 1000])
def test_errors_of_exact_draws_are_about_their_floor(draws: int) -> None:
    """The floor is the median of the largest of Q independent errors: half of 60 samples exceed it, within 4 sd."""
    found = np.abs(np.random.default_rng(5).normal(size=(60, draws, 20)).mean(1)).max(1)
    assert 0.24 < (found > noise_floor(20, draws)).mean() < 0.76


def test_the_monte_carlo_error_of_lpd_is_what_repetition_shows() -> None:
    """p(x | D) is N(1, 1.25): 40 samples of 200 draws of mu against it, at rows of which the last is far out."""
    rows = torch.tensor([0.0, 1.0, 4.0]).double()
    exact = scipy.stats.norm(MEAN, math.sqrt(1 + SD**2)).logpdf(rows.numpy()).mean()
    errors, told = [], []
    for seed in range(40):
        mu = MEAN + SD * np.random.default_rng(seed).normal(size=(200, 1))
        score = torch.tensor(scipy.stats.norm(mu, 1).logpdf(rows.numpy()))
        errors.append(float((score.logsumexp(0) - math.log(200)).mean()) - exact)
        told.append(monte_carlo_error(score, 1))
    # The root mean square of 40 errors is known to a ninth.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.mean(told), rel=0.45)


def test_methods_are_compared_row_by_row() -> None:
    """The rows spread far more than the differences between the methods do."""
    heldout = torch.linspace(-4, 6, 40).double()
    methods = {"exact": partial(exactly, draws=4000), "again": partial(exactly, draws=4000, seed=1), "MAP": at_its_mode}
    table = compare(make_pair, X, methods, heldout=heldout).table
    assert sorted(table["lpd_diff"])[-1] == 0.0
    np.testing.assert_allclose(table["lpd_diff"], table["lpd"] - table["lpd"].max(), atol=1e-12)
    assert table.loc["again", "lpd_diff_se"] < 0.2 * table.loc["again", "lpd_se"]
    assert abs(table.loc["again", "lpd"] - table.loc["exact", "lpd"]) < 4 * table["lpd_diff_se"].max()
    assert table.loc["MAP", "lpd_mc"] == 0.0 < table.loc["exact", "lpd_mc"]


def test_a_conjugate_guide_has_the_predictive_density_in_closed_form_and_draws_that_miss_it_are_told() -> None:
    """The last row is 35 predictive standard deviations away, where its density is decided by the farthest draw.

    The posterior given that row too is 16 standard deviations away: no draw comes near.
    """

    def posterior(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(x.sum() / (1 + len(x)), (zero() + 1 + len(x)) ** -0.5))
        pyro.sample("w", dist.Normal(zero().expand(2), 1.0).to_event(1))

    def fixed(pair: Any, data: Any) -> Result:
        return exactly((model, guide), data, draws=4000)

    heldout = torch.tensor([0.3, 2.0, -0.5, 40.0], dtype=torch.float64)
    table = compare(lambda: (model, posterior), X, {"exact": exactly, "its draws": fixed}, heldout=heldout).table
    exact = scipy.stats.norm(MEAN, math.sqrt(1 + SD**2)).logpdf(heldout.numpy()).mean()
    assert table.loc["exact", "lpd"] == pytest.approx(exact, rel=1e-10)
    assert table.loc["exact", "lpd_mc"] == table.loc["exact", "lpd_unreliable"] == 0
    assert table.loc["its draws", "lpd_unreliable"] == 1
    assert table.loc["its draws", "lpd"] < exact - 0.1


def test_rows_that_a_few_draws_decide_are_those_with_heavy_tails_of_their_density() -> None:
    """The density of a row amid the draws is bounded; that of a row far out is decided by the nearest draw."""
    mu = 3 * np.random.default_rng(0).normal(size=(1000, 1))
    score = torch.tensor(scipy.stats.norm(mu, 1).logpdf(np.array([0.0, 30.0])))
    assert _decided_by_few(score) == 1
    assert _decided_by_few(score[:, :1]) == 0
    assert math.isnan(_decided_by_few(score[:20]))


def test_rows_without_their_labels_are_scored_by_a_conjugate_posterior_too() -> None:
    """A posterior given one row more without its label is none of the pair's: the draws give the sum over labels."""
    train = {"x": torch.linspace(-2, 2, 30).double()[:, None], "y": torch.arange(30) % 2}
    rows = {"x": torch.tensor([[0.5], [-1.0]]).double()}

    def exact(pair: Any, data: Any) -> Result:
        return exactly((pair.model, pair.exact), data)

    found = compare(lambda: GaussianNaiveBayes(1, 2).double(), train, {"exact": exact}, heldout=rows)
    labels = [torch.full((2,), k) for k in range(2)]
    known = [pointwise_log_likelihood(found.results["exact"], {**rows, "y": y}) for y in labels]
    summed = torch.stack(known).logsumexp((0, 1)) - math.log(500)
    assert found.table.loc["exact", "lpd"] == pytest.approx(float(summed.mean()), rel=1e-9)
    assert found.table.loc["exact", "lpd_mc"] > 0


def test_the_truth_may_be_found_from_the_pair_and_the_data() -> None:
    seen = []

    def truth(pair: Any, data: Any) -> dict[str, tuple[Tensor, Tensor]]:
        seen.append((pair, data))
        return TRUTH

    found = compare(make_pair, X, {"exact": exactly}, truth=truth)
    assert seen == [((model, guide), X)]
    fixed = compare(make_pair, X, {"exact": exactly}, truth=TRUTH)
    assert found.table.loc["exact", "error_max"] == fixed.table.loc["exact", "error_max"]


def test_lpd_is_the_mean_over_rows_of_the_log_of_the_mean_over_draws(comparison: Comparison) -> None:
    for name, result in comparison.results.items():
        mu = result.draws["mu"].numpy()
        densities = scipy.stats.norm(mu[:, None], 1).logpdf(INDEPENDENT_FRACTION.numpy())
        of_rows = scipy.special.logsumexp(densities, 0) - math.log(len(mu))
        assert comparison.table.loc[name, "lpd"] == pytest.approx(of_rows.mean(), rel=1e-10)
        assert comparison.table.loc[name, "lpd_se"] == pytest.approx(of_rows.std(ddof=1) / 2, rel=1e-10)


def test_lpd_of_the_exact_posterior_is_the_closed_form_predictive() -> None:
    found = compare(make_pair, X, {"exact": partial(exactly, draws=20_000)}, heldout=INDEPENDENT_FRACTION).table.loc[
        "exact"
    ]
    rows = scipy.stats.norm(MEAN, math.sqrt(1 + SD**2)).logpdf(INDEPENDENT_FRACTION.numpy())
    assert found["lpd"] == pytest.approx(rows.mean(), abs=0.01)
    assert found["lpd_se"] == pytest.approx(rows.std(ddof=1) / 2, abs=0.01)


def test_one_held_out_row_has_a_density_without_an_error() -> None:
    row = compare(make_pair, X, {"exact": exactly}, heldout=INDEPENDENT_FRACTION[:1]).table.loc["exact"]
    assert np.isfinite(row["lpd"])
    assert np.isnan(row["lpd_se"])


def test_chains_have_their_diagnostics_and_guides_theirs(comparison: Comparison) -> None:
    chains, guided = comparison.table.loc["NUTS"], comparison.table.loc["exact"]
    result = comparison.results["NUTS"]
    posterior = result.idata["posterior"].to_dataset()
    ess, r_hat = azs.ess(posterior), azs.rhat(posterior)
    assert chains["ess"] == pytest.approx(min(float(ess["mu"]), float(ess["w"].min())))
    assert chains["r_hat"] == pytest.approx(max(float(r_hat["mu"]), float(r_hat["w"].max())))
    assert chains["divergences"] == result.idata.sample_stats["diverging"].sum()
    assert np.isnan(chains["pareto_k"])
    assert guided[["ess", "ess_per_s", "r_hat", "divergences"]].isna().all()
    assert guided["pareto_k"] == -np.inf
    assert np.isnan(comparison.table.loc["MAP", "pareto_k"])
    for name, row in comparison.table.iterrows():
        seconds = comparison.results[str(name)].seconds
        assert row["seconds"] == seconds["run"]
        assert row["seconds_total"] == seconds["run"] + seconds["setup"]


@pytest.mark.parametrize("apart", [0.0, 3.0])
def test_chains_that_disagree_have_no_effective_size_a_second(apart: float) -> None:
    result = by_nuts((model, guide), X)
    draws = np.random.default_rng(0).normal(size=(2, 500))
    draws[1] += apart
    idata = azb.from_dict({"posterior": {"mu": draws}, "sample_stats": {"diverging": draws > 100}})
    judged = inference.diagnose(idata)
    row = compare(make_pair, X, {"chains": lambda *_: replace(result, diagnosis=judged)}).table.loc["chains"]
    assert row["ess"] == judged.min_ess_bulk
    if apart:
        assert np.isnan(row["ess_per_s"])
    else:
        assert row["ess_per_s"] == pytest.approx(judged.min_ess_bulk / result.seconds["run"])
        assert row["ess_per_s_total"] == pytest.approx(judged.min_ess_bulk / row["seconds_total"])


def test_without_truth_or_held_out_rows_their_columns_are_empty() -> None:
    row = compare(make_pair, X, {"exact": exactly}).table.loc["exact"]
    empty = ["lpd", "lpd_se", "accuracy", "ece", "error_max", "error_rms", "sd_ratio"]
    assert row[empty].isna().all()


def test_in_print_the_empty_columns_are_left_out(comparison: Comparison) -> None:
    assert "lpd_se" in str(comparison)
    assert "accuracy" not in str(comparison)


# Labels


def mixture(x: Tensor, y: Tensor | None = None) -> None:
    """Two classes at -mu and mu."""
    mu = pyro.sample("mu", dist.Normal(zero(), 1.0))
    with pyro.plate("rows", len(x)):
        y = pyro.sample("y", dist.Bernoulli(zero() + 0.5), obs=y)
        pyro.sample("x", dist.Normal((2 * y - 1) * mu, 1.0), obs=x)


def guide_of_mu(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("mu", dist.Normal(zero() + 1.0, 0.5))


def test_accuracy_and_calibration_are_those_of_bayes_rule_on_the_held_out_labels() -> None:
    data = {"x": torch.tensor([1.0, -1.5, 2.0]).double(), "y": torch.tensor([1.0, 0.0, 1.0]).double()}
    fresh = {"x": torch.tensor([0.75, -0.25, 1.5, -2.0]).double(), "y": torch.tensor([1.0, 1.0, 1.0, 0.0]).double()}
    found = compare(lambda: (mixture, guide_of_mu), data, {"exact": exactly}, heldout=fresh)
    mu, x = found.results["exact"].draws["mu"].numpy(), fresh["x"].numpy()
    ones, zeros = (scipy.stats.norm(sign * mu[:, None], 1).pdf(x).mean(0) for sign in (1, -1))
    p = ones / (ones + zeros)
    confidence, right = np.maximum(p, 1 - p), (p > 0.5) == fresh["y"].numpy()
    row = found.table.loc["exact"]
    assert row["accuracy"] == right.mean() == 0.75
    bins = np.floor(confidence * 10)
    gaps = [abs((confidence - right)[bins == b].sum()) for b in np.unique(bins)]
    assert row["ece"] == pytest.approx(sum(gaps) / 4, rel=1e-6)
    without = {"x": fresh["x"]}
    unlabelled = compare(lambda: (mixture, guide_of_mu), data, {"exact": exactly}, heldout=without).table.loc["exact"]
    assert unlabelled[["accuracy", "ece"]].isna().all()
    assert unlabelled["lpd"] == pytest.approx(np.log((ones + zeros) / 2).mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "expected"),
    [
        ([[1.0, 0.0]], [0], 10, 0.0),
        ([[1.0, 0.0]], [1], 10, 1.0),
        ([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.25]], [0, 0, 1, 1], 10, 0.0),
        # Bins of 0.55 (right), 0.62 and 0.68 (one right), 0.95 (wrong): |-0.45| + |0.3| + |0.95| over four rows.
        ([[0.55, 0.45], [0.62, 0.38], [0.32, 0.68], [0.95, 0.05]], [0, 0, 0, 1], 10, (0.45 + 0.3 + 0.95) / 4),
        # The same in two bins: all confidences are above a half.
        ([[0.55, 0.45], [0.62, 0.38], [0.32, 0.68], [0.95, 0.05]], [0, 0, 0, 1], 2, (2.8 - 2) / 4),
        ([[0.25, 0.36, 0.39], [0.55, 0.25, 0.2]], [2, 1], 5, (0.61 + 0.55) / 2),
        ([[0.25, 0.36, 0.39], [0.55, 0.25, 0.2]], [2, 1], 1, (0.61 - 0.55) / 2),
    ],
)
def test_calibration_error_by_hand(
    probabilities: list[list[float]], labels: list[int], bins: int, expected: float
) -> None:
    found = calibration_error(torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels), bins)
    assert found == pytest.approx(expected, abs=1e-12)


# Methods that fail


ERRORS = [ValueError, RuntimeError, TypeError, FloatingPointError, NotImplementedError]
ERRORS += [KeyError, IndexError, AssertionError]


@pytest.mark.parametrize("kind", ERRORS)
def test_a_method_that_fails_leaves_an_empty_row_and_a_warning(kind: type[Exception]) -> None:
    methods = {"broken": failing(kind("out of order")), "exact": exactly}
    with pytest.warns(UserWarning, match=r"^broken failed: '?out of order'?$"):
        found = compare(make_pair, X, methods, truth=TRUTH, heldout=INDEPENDENT_FRACTION)
    assert list(found.table.index) == ["broken", "exact"]
    assert found.table.loc["broken"].isna().all()
    assert np.isfinite(found.table.loc["exact", "lpd"])
    assert list(found.results) == ["exact"]
    assert isinstance(found.plot(), Figure)


def test_methods_that_all_fail_are_an_error() -> None:
    broken = failing(ValueError("out of order"))
    failed = pytest.warns(UserWarning, match="^[ab] failed: out of order$")
    with failed, pytest.raises(RuntimeError, match=r"^every method failed: a, b$"):
        compare(make_pair, X, {"a": broken, "b": broken})
    with pytest.raises(ValueError, match=r"^out of order$"):
        compare(make_pair, X, {"a": broken})


def test_no_methods_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"^methods: expected at least one, got none$"):
        compare(make_pair, X, {})


def test_each_method_gets_a_fresh_pair_from_the_same_random_state() -> None:
    built = []

    def build() -> Any:
        built.append(float(torch.rand(())))
        return make_pair()

    state = torch.get_rng_state()
    compare(build, X, {"a": exactly, "b": exactly}, seed=3)
    compare(build, X, {"c": exactly}, seed=4)
    assert built[0] == built[1] != built[2]
    assert (torch.get_rng_state() == state).all()
    assert not dict(pyro.get_param_store().items())


# The plot and the files


def test_save_writes_a_table_a_plot_and_what_arviz_reads_back(comparison: Comparison, tmp_path: Path) -> None:
    paths = comparison.save(tmp_path / "new" / "folder")
    names = ["table.csv", "posteriors.png", "exact", "map", "nuts"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == sorted(names)
    table = pd.read_csv(paths[0], index_col="method")
    pd.testing.assert_frame_equal(table, comparison.table, check_exact=False, rtol=1e-12)
    image = matplotlib.image.imread(paths[1])
    assert image.shape[1] > 500
    assert image.std() > 0.01
    for path, (name, result) in zip(paths[2:], comparison.results.items(), strict=True):
        read = xr.open_datatree(path / "idata.nc")
        assert set(read.children) == set(result.idata.children), name
        for group in read.children:
            assert read[group].equals(result.idata[group]), (name, group)
        assert read.posterior.attrs["method"] == result.method
        draws = result.draws["mu"].numpy().reshape(read.posterior["mu"].shape)
        np.testing.assert_array_equal(read.posterior["mu"], draws)


def test_names_of_methods_become_names_of_files(tmp_path: Path) -> None:
    methods = {"NUTS, 0.95 (long)": exactly, "exact": exactly}
    assert [p.name for p in compare(make_pair, X, methods).save(tmp_path)[2:]] == ["nuts_0_95_long", "exact"]


@pytest.mark.parametrize("names", [("SVI", "svi"), ("a b", "a_b"), ("é", "ö")])
def test_no_method_overwrites_the_file_of_another(names: tuple[str, str], tmp_path: Path) -> None:
    seeds = {name: partial(exactly, seed=k, draws=30) for k, name in enumerate(names)}
    found = compare(make_pair, X, seeds)
    paths = found.save(tmp_path)[2:]
    for path, result in zip(paths, found.results.values(), strict=True):
        assert path.stem
        np.testing.assert_array_equal(xr.open_datatree(path / "idata.nc").posterior["mu"].values[0], result.draws["mu"])


DENSITY = "log density of draws and data"


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_plot_has_a_panel_a_quantity_and_the_errors(comparison: Comparison) -> None:
    figure = comparison.plot()
    assert sorted(titles(figure)) == [DENSITY, "mu", "w[0]", "w[1]"]
    assert len(figure.axes) == 5
    assert figure.axes[-1].get_ylabel().startswith("error of the mean")
    assert legend(figure) == ["truth: mean, ±1 sd", "exact", "MAP", "NUTS"]
    for title, name, index in (("mu", "mu", ()), ("w[0]", "w", (0,)), ("w[1]", "w", (1,))):
        panel = next(axes for axes in figure.axes if axes.get_title() == title)
        lines = {line.get_label(): line for line in panel.get_lines()}
        assert set(lines["truth: mean, ±1 sd"].get_xdata()) == {float(TRUTH[name][0][index])}
        drawn = {method: result.draws[name][:, *index] for method, result in comparison.results.items()}
        assert set(lines["MAP"].get_xdata()) == {float(drawn["MAP"][0])}
        for method in ("exact", "NUTS"):
            x, density = lines[method].get_data()
            assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.05)
            assert np.trapezoid(x * density, x) == pytest.approx(float(drawn[method].mean()), abs=0.03)
    dots = [c for c in figure.axes[-1].collections if len(c.get_offsets()) == 3]
    for dot, result in zip(dots, comparison.results.values(), strict=True):
        errors = [(result.draws["mu"].mean() - MEAN) / SD, *result.draws["w"].mean(0)]
        np.testing.assert_allclose(sorted(dot.get_offsets()[:, 1]), sorted(map(float, errors)), atol=1e-12)


def test_the_plot_without_truth_has_no_errors() -> None:
    figure = compare(make_pair, X, {"exact": exactly, "NUTS": by_nuts}).plot()
    assert len(figure.axes) == 4
    assert legend(figure) == ["exact", "NUTS"]


def test_the_plot_shows_as_many_quantities_as_asked(comparison: Comparison) -> None:
    """The sites share alike, and of each the quantities in which the methods differ most come first."""
    figure = comparison.plot(2)
    assert [title.partition("[")[0] for title in titles(figure)] == [DENSITY, "mu", "w"]
    means = np.stack([result.draws["w"].mean(0).numpy() for result in comparison.results.values()])
    spread = np.stack([result.draws["w"].std(0).numpy() for result in comparison.results.values()]).max(0)
    assert titles(figure)[2] == f"w[{np.argmax(np.ptp(means, axis=0) / spread)}]"


@pytest.mark.parametrize("truth", [None, TRUTH])
@pytest.mark.parametrize("beside", [{}, {"exact": exactly}])
def test_the_plot_takes_a_point_estimate_of_one_draw(truth: Any, beside: dict[str, Any]) -> None:
    methods = {"MAP": partial(at_its_mode, draws=1), **beside}
    figure = compare(make_pair, X, methods, truth=truth).plot()
    assert sorted(titles(figure)) == [DENSITY, "mu", "w[0]", "w[1]"]
    assert set(legend(figure)) >= set(methods)


def other(x: Tensor) -> None:
    """The same rows with another latent: nothing in common with ``model`` to draw."""
    nu = pyro.sample("nu", dist.Normal(zero(), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(nu, 1.0), obs=x)


def guide_of_nu(x: Tensor) -> None:
    pyro.sample("nu", dist.Normal(zero() + MEAN, SD))


@pytest.mark.parametrize("truth", [None, TRUTH])
def test_methods_without_a_common_site_are_saved_and_plotted_too(truth: Any, tmp_path: Path) -> None:
    methods = {"one": exactly, "other": lambda pair, data: exactly((other, guide_of_nu), data)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* draws no mu, w: not compared with the truth")
        found = compare(make_pair, X, methods, truth=truth)
    assert [p.name for p in found.save(tmp_path)] == ["table.csv", "posteriors.png", "one", "other"]


def test_names_are_coordinates_in_the_titles() -> None:
    class Named:
        coords = {"places": ["north", "south"]}  # noqa: RUF012
        dims = {"w": ("places",)}  # noqa: RUF012
        model = staticmethod(model)
        guide = staticmethod(guide)

    assert sorted(titles(compare(Named, X, {"exact": exactly}).plot())) == [DENSITY, "mu", "w[north]", "w[south]"]


def factors(x: Tensor) -> None:
    """Only w^2 is known, and a latent of each row."""
    w = pyro.sample("w", dist.Normal(zero(), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(zero(), 1.0))
        pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)


def test_the_plot_shows_what_methods_agree_in_whose_signs_differ() -> None:
    def signed(sign: float) -> Callable[[Tensor], None]:
        def guide(x: Tensor) -> None:
            pyro.sample("w", dist.Normal(zero() + sign * 1.5, 0.1))
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(sign * 0.4 * x, 0.5))

        return guide

    methods = {str(s): lambda pair, data, s=s: exactly((factors, signed(s)), data) for s in (-1.0, 1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = compare(lambda: (factors, signed(1.0)), X, methods).plot()
    assert titles(figure) == [DENSITY, "w"]
    means = [np.average(line.get_xdata(), weights=line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert means[0] == pytest.approx(means[1], abs=1.0)
    assert "signs and labels" in figure.get_suptitle()


FIT = partial(inference.fit, steps=20, draws=50, progress=False)


def rows_with_factors(guided: bool):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1), with the exact guide of any rows, or one of these rows alone."""

    def model(x=None, *, size=None, rows=None):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, *, size=None, rows=None):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5))

    return model, guide if guided else AutoNormal(model)


def test_rows_with_latents_of_their_own_are_scored_by_particles() -> None:
    heldout = torch.tensor([0.3, -1.0]).double()
    exact = partial(FIT, steps=0)
    found = compare(lambda: rows_with_factors(True), torch.randn(20).double(), {"exact": exact}, heldout=heldout)
    assert found.table.loc["exact", "lpd"] == pytest.approx(
        float(dist.Normal(torch.zeros(2).double(), 2**0.5).log_prob(heldout).mean()), abs=1e-9
    )


def test_a_guide_of_the_fitted_rows_alone_scores_no_others_and_says_so() -> None:
    with pytest.warns(UserWarning, match="held-out rows are not scored|cannot be mapped") as said:
        found = compare(
            lambda: rows_with_factors(False), torch.randn(20).double(), {"SVI": FIT}, heldout=torch.zeros(3).double()
        )
    assert any("held-out rows are not scored: " in str(w.message) for w in said)
    assert np.isnan(found.table.loc["SVI", "lpd"])
    assert found.table.loc["SVI", "seconds"] > 0


@pytest.mark.parametrize(("steps", "rows", "particles"), [(1, 30, 500), (50, 1000, 300), (50, 100_000, 4), (51, 30, 4)])
def test_rows_with_many_latents_have_fewer_particles(steps: int, rows: int, particles: int) -> None:
    def model(x: Tensor | None = None, size: int = 5) -> None:
        with pyro.plate("rows", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(20 * steps), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor | None = None, size: int = 5) -> None:
        with pyro.plate("rows", size):
            pyro.sample("z", dist.Normal(torch.zeros(20 * steps), 1.0).to_event(1))

    bound = bind((model, guide), {"x": torch.zeros(5)})
    assert _particles(bound, {"x": torch.zeros(rows)}) == particles
