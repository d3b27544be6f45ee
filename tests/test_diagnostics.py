"""Pareto k with known tails, R-hat and effective sizes as ArviZ has them, and advice exactly when it is due."""

import re
import warnings
from functools import partial
from typing import Any

import arviz_base as azb
import arviz_stats as azs
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.signal
import scipy.stats
import torch
import xarray as xr
from arviz_stats.base import array_stats
from pyro.infer.autoguide import AutoDelta

import inference
from inference import kernels
from inference.diagnostics import quantities
from inference.diagnostics.chains import R_HAT as R_HAT_LIMIT
from inference.diagnostics.chains import r_hat_limit
from inference.diagnostics.convergence import Diagnosis, diagnose
from inference.diagnostics.guides import GuideCheck
from inference.diagnostics.ranks import normal_scores
from inference.diagnostics.weights import effective_fraction, pareto_k

R_HAT = r"R-hat is [\d.]+ for {}, above 1\.01: the chains disagree; run a longer warmup and more draws, and look for .*"
FEW = "below 100 per chain: run more draws, or reparameterise correlated sites."
ESS = rf"Effective sample size is \d+ for {{}}, {FEW}"
POINT = r"A point estimate: all draws are equal, .*"
ONE_CHAIN = r"One chain has no R-hat: run at least two to see whether they agree\."
DIVERGED = r"{} of {} transitions diverged: parts of the posterior were not reached; raise target_accept_prob .*"


pytestmark = pytest.mark.usefixtures("alone")


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def autoregressive(coefficient: float, chains: int, draws: int) -> np.ndarray:
    """Chains in which each draw is a multiple of the last plus noise, from their stationary start."""
    innovations = noise(chains, draws)
    innovations[:, 0] /= np.sqrt(1 - coefficient**2)
    return scipy.signal.lfilter([1], [1, -coefficient], innovations)


def chains(diverging: int = 0, **sites: np.ndarray) -> xr.DataTree:
    """Chains (chain, draw, ...) as the verbs return them, the first few transitions divergent."""
    shape = next(iter(sites.values())).shape[:2]
    flags = np.arange(np.prod(shape)).reshape(shape) < diverging
    return azb.from_dict({"posterior": sites, "sample_stats": {"diverging": flags}})


def assert_advice(diagnosis: Diagnosis, *lines: str) -> None:
    """Exactly these sentences, in this order."""
    assert len(diagnosis.advice) == len(lines), diagnosis.advice
    for said, line in zip(diagnosis.advice, lines, strict=True):
        assert re.fullmatch(line, said), said
    assert str(diagnosis) == ("\n".join(diagnosis.advice) if lines else "No warning.")


# Pareto k


def tolerance(k: float, draws: int) -> float:
    """Four standard errors over the tail that is fitted, 3 sqrt(S) draws, and the pull of the fit's prior."""
    tail = 3 * np.sqrt(draws)
    return float(4 * (1 + k) / np.sqrt(tail) + 5 / tail)


@pytest.mark.parametrize("k", [0.1, 0.3, 0.5, 0.8, 0.95, 1.4])
def test_k_of_weights_with_a_pareto_tail_is_its_shape(k: float) -> None:
    weights = scipy.stats.genpareto(k).rvs(100_000, random_state=np.random.default_rng(1))
    assert pareto_k(torch.tensor(np.log(weights))) == pytest.approx(k, abs=tolerance(k, 100_000))


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8])
def test_k_of_an_exponential_proposal_for_a_slower_exponential_is_one_minus_the_rates_ratio(k: float) -> None:
    """p / q = (1 - k) exp(k z) with z ~ Exp(1): P(weight > t) falls as t^(-1/k)."""
    z = np.random.default_rng(2).exponential(size=100_000)
    weights = scipy.stats.expon(scale=1 / (1 - k)).logpdf(z) - scipy.stats.expon.logpdf(z)
    assert pareto_k(torch.tensor(weights)) == pytest.approx(k, abs=tolerance(k, 100_000))


@pytest.mark.parametrize("shift", [-800.0, 0.0, 800.0])
def test_k_does_not_depend_on_the_evidence(shift: float) -> None:
    weights = torch.tensor(0.5 * np.random.default_rng(3).exponential(size=1000))
    assert pareto_k(weights + shift) == pytest.approx(pareto_k(weights), abs=1e-6)
    assert pareto_k(weights.requires_grad_()) == pareto_k(weights.detach())


def test_k_of_equal_weights_is_minus_infinity_and_of_weights_that_are_not_finite_nan() -> None:
    assert pareto_k(torch.full((30,), -812.5)) == -np.inf
    for value in (torch.nan, torch.inf, -torch.inf):
        weights = torch.zeros(30)
        weights[7] = value
        assert np.isnan(pareto_k(weights))


@pytest.mark.parametrize("draws", [1000, 8000])
def test_k_is_that_of_arviz_which_takes_negative_log_weights(draws: int) -> None:
    """Their tail is one weight shorter: k moves by less than its standard error (1 + k) / sqrt(tail)."""
    weights = 0.6 * np.random.default_rng(4).exponential(size=draws)
    k, close = pareto_k(torch.tensor(weights)), 1.6 / np.sqrt(3 * np.sqrt(draws))
    assert k == pytest.approx(float(array_stats.psislw(-weights)[1]), abs=close)
    assert k != pytest.approx(float(array_stats.psislw(weights)[1]), abs=0.5)


def test_k_is_drawn_towards_a_half_as_that_of_arviz() -> None:
    """Tails of k = 2 of 95 weights: the prior of weight ten takes 0.14 away from every estimate."""
    sets = 2.0 * np.random.default_rng(6).exponential(size=(40, 1000))
    gaps = [pareto_k(torch.tensor(w)) - float(array_stats.psislw(-w)[1]) for w in sets]
    assert abs(np.mean(gaps)) < 0.06


def test_k_of_the_fewest_draws_and_of_ties_is_a_number() -> None:
    normal = np.random.default_rng(5).normal(size=25)
    assert np.isfinite(pareto_k(torch.tensor(normal)))
    assert np.isfinite(pareto_k(torch.tensor(normal.repeat(40))))
    assert pareto_k(torch.tensor([0.0, 1.0] * 50)) == np.inf


def test_k_needs_twenty_five_draws() -> None:
    with pytest.raises(ValueError, match=r"^log_weights: expected at least 25 draws, got 24$"):
        pareto_k(torch.zeros(24))


def normal_model(x: torch.Tensor) -> None:
    """mu ~ N(0, I), x ~ N(mu, I) in five dimensions: with x = 1 twice the posterior is N(2/3, 1/3) in each."""
    mu = pyro.sample("mu", dist.Normal(double(0.0).expand(5), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)


ONES = torch.ones(2, 5, dtype=torch.float64)


def fit_guide(width: float) -> Diagnosis:
    """A normal guide in the right place, some times as wide as the posterior."""

    def guide(x: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(double(2 / 3).expand(5), width * TRUE_SD).to_event(1))

    return inference.fit((normal_model, guide), ONES, steps=0, draws=4000, progress=False).diagnosis


TRUE_SD = (1 / 3) ** 0.5


def test_a_guide_that_is_the_posterior_has_k_minus_infinity_and_no_advice() -> None:
    diagnosis = fit_guide(1.0)
    assert diagnosis.pareto_k == -np.inf
    assert diagnosis.divergences is None
    assert_advice(diagnosis)


def test_a_guide_somewhat_wider_than_the_posterior_has_a_small_k_and_no_advice() -> None:
    diagnosis = fit_guide(1.3)
    assert diagnosis.pareto_k is not None
    assert diagnosis.pareto_k < 0.3
    assert_advice(diagnosis)


def test_a_guide_that_is_too_narrow_has_a_large_k_and_is_not_to_be_trusted() -> None:
    diagnosis = fit_guide(0.3)
    assert diagnosis.pareto_k is not None
    assert 0.7 < diagnosis.pareto_k < 1.5
    said = rf"Pareto k of the guide is {diagnosis.pareto_k:.2f}, above 0\.7: its posterior is unreliable; .*"
    assert_advice(diagnosis, said)


def test_k_of_a_guide_grows_as_it_narrows() -> None:
    found = [fit_guide(width).pareto_k for width in (1.6, 0.9, 0.7, 0.5, 0.3)]
    assert found == sorted(found)


WIDE = r"{} % of the guide's draws are effective by their importance weights; the standard deviation of mu\[\d\] is .*"


@pytest.mark.parametrize("width", [1.6, 2.0])
def test_a_guide_that_is_far_too_wide_has_a_small_k_and_is_told_by_its_weights(width: float) -> None:
    """E[w]^2 / E[w^2] is (sqrt(2 r^2 - 1) / r^2)^5: 0.32 and 0.13."""
    diagnosis = fit_guide(width)
    assert diagnosis.pareto_k is not None and diagnosis.pareto_k < 0.5
    exact = ((2 * width**2 - 1) ** 0.5 / width**2) ** 5
    assert diagnosis.effective == pytest.approx(exact, rel=0.2)
    assert_advice(diagnosis, WIDE.format(r"\d+"))
    assert diagnosis.weighted is not None
    np.testing.assert_allclose(diagnosis.weighted["sd"], TRUE_SD, rtol=0.25)
    np.testing.assert_allclose(diagnosis.table["sd"], width * TRUE_SD, rtol=0.1)


def test_a_guide_in_the_wrong_place_is_told_by_its_weights() -> None:
    """The posterior is N(0, 1), the guide N(0.8, 1): E[w]^2 / E[w^2] is exp(-0.64) = 0.53."""
    draws = 0.8 + noise(1, 20_000)
    diagnosis = inference.diagnose(azb.from_dict({"posterior": {"mu": draws}}), judged(draws[0], 1.0, 0.8))
    assert diagnosis.effective == pytest.approx(np.exp(-0.64), rel=0.1)
    assert_advice(diagnosis, r"5\d % of .*; the mean of mu is 0\.[78].* standard deviations off that after weighting.*")


def judged(draws: np.ndarray, sd: float, mean: float = 0.0) -> GuideCheck:
    """The judgement of draws of N(mean, sd) for N(0, 1)."""
    weights = scipy.stats.norm.logpdf(draws) - scipy.stats.norm(mean, sd).logpdf(draws)
    fraction = float(effective_fraction(torch.tensor(weights)))
    return GuideCheck(min(pareto_k(torch.tensor(weights)), 0.49), fraction, 1, weights)


@pytest.mark.parametrize("size", [1, 20])
def test_guides_that_are_good_are_not_reported_by_chance(size: int) -> None:
    """Widths between 0.93 and 1.12, in 1,000 draws: none of 40 guides is reported."""
    for seed in range(40):
        widths = np.random.default_rng(seed + 100).uniform(0.93, 1.12, size)
        draws = widths * noise(1000, size, seed=seed)
        weights = (scipy.stats.norm.logpdf(draws) - scipy.stats.norm(0, widths).logpdf(draws)).sum(1)
        check = GuideCheck(0.0, float(effective_fraction(torch.tensor(weights))), size, weights)
        assert_advice(diagnose(azb.from_dict({"posterior": {"mu": draws[None]}}), check))


def rows_with_factors(size: int, width: float) -> tuple:
    """z_n ~ N(0, I), x_n ~ N(z_n, I) in two dimensions; a normal guide, some times as wide as a row's posterior."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", size):
            z = pyro.sample("z", dist.Normal(double(0.0).expand(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", size):
            pyro.sample("z", dist.Normal(0.5 * x, width * 0.5**0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (1.0, None),
        (1.1, None),
        (0.9, None),
        (1.5, r".* \(median over rows\); the standard deviation of z\[\d\] is 1\.5 times that after weighting, .*"),
        (2.5, r".* % of the guide's draws are effective by their importance weights \(median over rows\); .*"),
        (0.4, r"Pareto k of the guide is above 0\.7 for \d+ of 100 rows: .* use a richer guide .*"),
    ],
)
def test_a_guide_of_rows_is_judged_row_by_row(width: float, line: str | None) -> None:
    """Joint weights of 400 rows have a k above 0.7 for any width but one."""
    x = torch.tensor(noise(400, 2))
    diagnosis = inference.fit(rows_with_factors(400, width), x, steps=0, draws=50, progress=False).diagnosis
    assert_advice(diagnosis, *([line] if line else []))
    assert diagnosis.effective is not None
    if width > 0.8:
        assert diagnosis.effective == pytest.approx((2 * width**2 - 1) / width**4, rel=0.1)


def test_what_is_not_judged_is_said() -> None:
    def model(x: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        s = pyro.sample("s", dist.HalfNormal(double(1.0)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, s), obs=x)

    def whole(x: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(double(0.0), 1.0))
        pyro.sample("s", dist.HalfNormal(double(1.0)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnosis = inference.fit((model, whole), ONES[:, 0], steps=0, draws=10, progress=False).diagnosis
    assert diagnosis.unjudged == ("Pareto k: 10 draws, of at least 25 that it takes",)
    assert "Not judged: Pareto k: " in str(diagnosis) and "No warning" not in str(diagnosis)


@pytest.mark.parametrize(
    ("k", "line"),
    [
        (None, None),
        (-np.inf, None),
        (0.5, None),
        (0.51, r"Pareto k of the guide is 0\.51, above 0\.5: usable for means after importance weighting; .*"),
        (0.7, r"Pareto k of the guide is 0\.70, above 0\.5: usable .*"),
        (0.71, r"Pareto k of the guide is 0\.71, above 0\.7: its posterior is unreliable; .*"),
        (np.inf, r"Pareto k of the guide is inf, above 0\.7: .*"),
        (np.nan, r"Pareto k could not be computed: the log density is not finite at some draws of the guide\."),
    ],
)
def test_advice_on_a_guide_follows_its_k(k: float | None, line: str | None) -> None:
    idata = azb.from_dict({"posterior": {"mu": noise(1, 100)}})
    assert_advice(diagnose(idata, k), *([line] if line else []))


@pytest.mark.parametrize("outer", [1.0, 0.01])
def test_a_width_off_in_either_direction_is_told_where_k_is_small(outer: float) -> None:
    draws = np.tile([-3.0, -1.0, -1.0, 1.0, 1.0, 3.0], 500)
    check = GuideCheck(0.3, 0.9, 1, np.log(np.where(np.abs(draws) > 2, outer, 0.1)))
    (line,) = diagnose(azb.from_dict({"posterior": {"x": draws[None]}}), check).advice
    # Variances by hand: two of six draws are at distance 3, and four, of weight 0.1, at 1. All means are zero.
    ratio = ((2 * 9 + 4) / 6 / ((2 * 9 * outer + 4 * 0.1) / (2 * outer + 4 * 0.1))) ** 0.5
    assert f"the standard deviation of x is {ratio:.2g} times that after weighting" in line


def test_a_point_estimate_has_no_k() -> None:
    result = inference.fit((normal_model, AutoDelta(normal_model)), ONES, steps=5, progress=False)
    assert result.diagnosis.pareto_k is None
    assert_advice(result.diagnosis, POINT)


@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3])
def test_draws_that_are_all_the_same_are_a_point_estimate(value: float) -> None:
    """Also where rounding gives them a standard deviation of 1e-17."""
    assert_advice(diagnose(azb.from_dict({"posterior": {"mu": np.full((1, 1000), value)}})), POINT)


# The table


def test_the_table_has_arvizs_numbers_one_row_a_scalar() -> None:
    sites = {"mu": noise(4, 300).cumsum(1) / 30, "w": noise(4, 300, 2, 3, seed=1), "labels": np.ones((4, 300), int)}
    idata = chains(**sites)
    table = diagnose(idata).table
    assert list(table.columns) == ["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    assert list(table.index) == ["mu", *(f"w[{i}, {j}]" for i in range(2) for j in range(3))]
    posterior = idata["posterior"].to_dataset()[["mu", "w"]]
    rhat, ess = azs.rhat(posterior), azs.ess(posterior)
    theirs = {
        "mcse_mean": azs.mcse(posterior),
        "ess_bulk": ess,
        "ess_tail": azs.ess(posterior, method="tail", prob=(0.05, 0.95)),
        "r_hat": rhat,
    }
    for column, found in theirs.items():
        expected = np.concatenate([np.ravel(found[n].values) for n in ("mu", "w")])
        np.testing.assert_allclose(table[column], expected, rtol=1e-12)
    assert diagnose(idata).worst_r_hat == max(float(rhat["mu"]), float(rhat["w"].max()))
    assert diagnose(idata).min_ess_bulk == min(float(ess["mu"]), float(ess["w"].min()))


AWKWARD = {
    "equal draws": noise(4, 100).round(1),
    "an odd number of draws": noise(4, 101),
    "signs": np.sign(noise(4, 100)),
    "a chain of another width": noise(4, 100) * np.array([1, 1, 1, 5])[:, None],
    "chains that stand still": np.repeat(noise(4, 1), 100, 1),
    "two values, equally far from the median": np.tile([0.0, 1.0], (4, 50)),
    "constant": np.ones((4, 100)),
    "single precision": noise(4, 100).astype(np.float32),
    "far from zero": 1e9 + noise(4, 100),
    "one chain": noise(1, 100),
    "seven draws": noise(4, 7),
    "three draws": noise(4, 3),
    "not a number": np.where(noise(4, 100) > 2, np.nan, noise(4, 100)),
    "infinite": np.where(noise(4, 100) > 2, np.inf, noise(4, 100)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
@pytest.mark.parametrize("what", AWKWARD)
def test_r_hat_and_effective_sizes_are_arvizs_whatever_the_draws(what: str) -> None:
    draws = AWKWARD[what]
    # ArviZ folds single precision in single precision, where more draws are equally far from the median.
    exact = draws.astype(float)
    alone = diagnose(chains(mu=draws)).table.loc["mu"]
    beside = diagnose(chains(mu=draws, other=noise(*draws.shape, seed=5))).table.loc["mu"]
    for row in (alone, beside):
        assert row["r_hat"] == pytest.approx(azs.rhat(exact), rel=1e-12, nan_ok=True)
        assert row["ess_bulk"] == pytest.approx(azs.ess(draws), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("part", [1, 900, 1000])
def test_a_table_in_parts_is_that_of_the_whole(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several threads too: numbers, their order and their names."""
    idata = chains(mu=noise(4, 100), w=noise(4, 100, 2, 3, seed=1), x=noise(4, 100, 5, seed=2))
    whole = diagnose(idata)
    monkeypatch.setattr(quantities, "PART", part)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = diagnose(idata)
        pd.testing.assert_frame_equal(found.table, whole.table, rtol=1e-12)
        assert found.advice == whole.advice


def test_normal_scores_are_those_of_mean_ranks() -> None:
    draws = noise(3, 40, 2, 2).round(1)
    for k in np.ndindex(2, 2):
        one = draws[:, :, *k]
        ranks = scipy.stats.rankdata(one).reshape(one.shape)
        expected = scipy.stats.norm.ppf((ranks - 3 / 8) / (one.size + 1 / 4))
        np.testing.assert_allclose(normal_scores(draws)[:, :, *k], expected, rtol=1e-13)


def test_a_quantity_bears_the_names_of_its_coordinates() -> None:
    coords = {"features": ["height", "width"]}
    idata = azb.from_dict({"posterior": {"w": noise(2, 50, 2)}}, coords=coords, dims={"w": ["features"]})
    assert list(diagnose(idata).table.index) == ["w[height]", "w[width]"]


def test_without_chains_the_table_has_mean_and_sd_alone() -> None:
    idata = azb.from_dict({"posterior": {"mu": noise(1, 500)}})
    diagnosis = diagnose(idata, 0.1)
    assert list(diagnosis.table.columns) == ["mean", "sd"]
    assert diagnosis.table.loc["mu", "sd"] == pytest.approx(noise(1, 500).std(ddof=1))
    assert np.isnan(diagnosis.worst_r_hat)
    assert np.isnan(diagnosis.min_ess_bulk)
    assert diagnose({"mu": noise(1, 500)}, 0.1).table.equals(diagnosis.table)


# Advice on chains


def test_good_chains_get_no_advice() -> None:
    diagnosis = diagnose(chains(mu=noise(4, 500), w=noise(4, 500, 3, seed=1)))
    assert diagnosis.divergences == 0
    assert diagnosis.pareto_k is None
    assert diagnosis.worst_r_hat < 1.01
    assert diagnosis.min_ess_bulk > 1000
    assert_advice(diagnosis)


def test_chains_at_two_modes_disagree() -> None:
    w = noise(4, 1000, 2, seed=1)
    w[2:, :, 1] += 5
    diagnosis = diagnose(chains(mu=noise(4, 1000), w=w))
    modes = r"R-hat is .* the chains disagree; 2 stay near -?0\.0.* and 2 near [45]\b.* \(chains 0, 1\), at .* modes.*"
    assert_advice(diagnosis, modes, ESS.format(r"w\[1\]"))
    assert diagnosis.worst_r_hat > 1.5
    assert diagnosis.min_ess_bulk < 20


def test_chains_of_different_width_disagree_too() -> None:
    """Rank-normalised folded R-hat: the means agree, the scales do not."""
    scale = np.array([1, 1, 1, 4])[:, None]
    diagnosis = diagnose(chains(mu=scale * noise(4, 2000)))
    assert_advice(diagnosis, R_HAT.format("mu"), ESS.format("mu"))
    assert diagnosis.table.loc["mu", "ess_bulk"] > 5000


def test_few_draws_are_too_few() -> None:
    # R-hat of so few may be above its limit too.
    assert re.fullmatch(ESS.format("mu"), diagnose(chains(mu=noise(4, 60, seed=0))).advice[-1])


def test_draws_that_are_correlated_are_worth_few() -> None:
    """An autoregressive chain of coefficient a has an effective sample size of S (1 - a) / (1 + a)."""
    diagnosis = diagnose(chains(mu=autoregressive(0.9, 4, 20_000), w=noise(4, 20_000)))
    assert diagnosis.table.loc["mu", "ess_bulk"] == pytest.approx(80_000 * 0.1 / 1.9, rel=0.25)
    assert diagnosis.min_ess_bulk == diagnosis.table.loc["mu", "ess_bulk"]
    diagnosis = diagnose(chains(mu=autoregressive(0.99, 4, 5000), w=noise(4, 5000)))
    assert re.fullmatch(ESS.format("mu"), diagnosis.advice[-1])


def test_a_short_tail_is_advised_on_where_the_bulk_is_well() -> None:
    """Fresh signs on a slow magnitude: the mean mixes fast, the quantiles slowly."""
    diagnosis = diagnose(chains(mu=autoregressive(0.99, 4, 1000) * np.sign(noise(4, 1000, seed=1))))
    row = diagnosis.table.loc["mu"]
    assert row["ess_tail"] < 400 < row["ess_bulk"]
    assert diagnosis.advice[-1] == f"Effective sample size is {row['ess_tail']:.0f} for mu, {FEW}"


def test_one_chain_has_no_r_hat() -> None:
    assert_advice(diagnose(chains(mu=noise(1, 500))), ONE_CHAIN)


def test_divergences_are_counted() -> None:
    diagnosis = diagnose(chains(diverging=7, mu=noise(4, 500)))
    assert diagnosis.divergences == 7
    assert_advice(diagnosis, DIVERGED.format(7, 2000))


@pytest.mark.parametrize("constant", [1.0, 0.1])
def test_a_quantity_that_never_moves_is_no_cause_for_alarm(constant: float) -> None:
    """The one entry of a simplex of one, or a deterministic site: 0.1 sums to a standard deviation of rounding."""
    diagnosis = diagnose(chains(mu=noise(4, 500), w=np.full((4, 500, 1), constant)))
    assert_advice(diagnosis)
    assert np.isfinite(diagnosis.worst_r_hat)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_draws_that_are_not_finite_are_not_passed_over(value: float) -> None:
    draws = noise(4, 500)
    draws[1, 3] = value
    assert diagnose(chains(mu=draws)).advice


def test_chains_too_short_for_any_number_are_not_passed_over() -> None:
    assert diagnose(chains(mu=noise(2, 3))).advice


# Chains of the verbs


EFFECTS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def eight_schools(x: torch.Tensor) -> None:
    """Centred, so that tau near 0 is a funnel."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(double(5.0)))
    with pyro.plate("rows", len(x)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("x", dist.Normal(theta, ERRORS), obs=x)


def test_nuts_diverges_on_the_centred_eight_schools_and_says_so() -> None:
    # A divergence of two chains of 100 draws comes in most seeds, of sixteen of 100 in all.
    kernel = partial(kernels.NUTS, target_accept_prob=0.6, max_tree_depth=4)
    result = inference.sample(eight_schools, EFFECTS, kernel, draws=100, warmup=100, chains=16, progress=False)
    diagnosis = result.diagnosis
    assert diagnosis.divergences == int(result.idata.sample_stats["diverging"].sum())
    assert diagnosis.divergences > 0
    assert re.fullmatch(DIVERGED.format(diagnosis.divergences, 1600), diagnosis.advice[-1])


def test_nuts_on_a_normal_posterior_gets_no_advice() -> None:
    kernel = partial(kernels.NUTS, target_accept_prob=0.9)
    # R-hat of two chains of 500 draws that agree is above 1.01 at some seeds.
    result = inference.sample(normal_model, ONES, kernel, draws=400, warmup=150, chains=8, progress=False)
    assert_advice(result.diagnosis)
    assert str(result).endswith("No warning.")
    np.testing.assert_allclose(result.diagnosis.table["mean"], 2 / 3, atol=0.12)


def test_chains_that_do_not_accept_are_named() -> None:
    idata = chains(mu=noise(4, 1000))
    acceptance = np.full((4, 1000), 0.8)
    acceptance[1] = 0.01
    idata["sample_stats/acceptance_rate"] = xr.DataArray(acceptance, dims=("chain", "draw"))
    assert_advice(diagnose(idata), r"Chain 1 hardly moved \(mean acceptance below 0\.05\), so their .*")


@pytest.mark.parametrize("share", [0.04, 0.06])
def test_trajectories_that_were_cut_short_are_told(share: float) -> None:
    idata = chains(mu=noise(4, 1000))
    cut = np.zeros((4, 1000), dtype=bool)
    cut[0, : int(share * 4000)] = True
    idata["sample_stats/reached_max_treedepth"] = xr.DataArray(cut, dims=("chain", "draw"))
    said = [r"240 of 4000 transitions reached the maximum tree depth, which cut .*"] if share > 0.05 else []
    assert_advice(diagnose(idata), *said)


def test_many_chains_need_no_more_effective_draws_than_four() -> None:
    draws = autoregressive(0.9, 64, 1000)
    diagnosis = diagnose(chains(mu=draws))
    assert 400 < diagnosis.min_ess_bulk < 6400
    assert not any("Effective sample size" in line for line in diagnosis.advice)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.9])
def test_many_short_chains_that_agree_are_not_said_to_disagree(coefficient: float) -> None:
    """At 64 x 250 draws R-hat of an autoregressive chain is sqrt(1 + (1 + a) / (1 - a) / 125): 1.07 for 0.9."""
    draws = autoregressive(coefficient, 64, 250 * 10).reshape(64, 10, 250)[:, ::2]
    diagnosis = diagnose(chains(mu=np.moveaxis(draws, 1, 2)))
    expected = np.sqrt(1 + (2 * coefficient / (1 - coefficient)) / 125)
    assert diagnosis.table["r_hat"].mean() == pytest.approx(expected, abs=0.25 * (expected - 1) + 0.002)
    assert not any("R-hat" in line for line in diagnosis.advice), diagnosis.advice
    assert diagnosis.converged


@pytest.mark.parametrize("kind", ["offset", "mode", "width", "drift"])
def test_many_short_chains_that_do_not_agree_are(kind: str) -> None:
    draws = autoregressive(0.5, 64, 250)
    if kind == "offset":
        draws += 0.4 * draws.std() * noise(64, 1, seed=2)
    elif kind == "mode":
        draws[5] += 4 * draws.std()
    elif kind == "width":
        draws[:16] *= 2.5
    else:
        draws += np.linspace(-0.75, 0.75, 250) * draws.std()
    diagnosis = diagnose(chains(mu=draws))
    said = re.match(r"R-hat is (1\.\d+) for mu, above (1\.\d+): the chains disagree", diagnosis.advice[0])
    assert said
    # Chains that agree have 1.012; what is allowed beside that depends on the draws.
    assert 1.012 < float(said[2]) < 1.05
    assert diagnosis.converged is False


@pytest.mark.parametrize("rare", [True, False])
def test_many_chains_that_do_not_move_are_told(rare: bool) -> None:
    at = noise(64, 1)
    draws = np.repeat((at > 1.0).astype(float) if rare else at, 250, 1)
    # Nothing is allowed for: the limit is the one of few chains.
    for count in (4, 250):
        assert r_hat_limit(draws[:, :count], 1) == pytest.approx(R_HAT_LIMIT)
    diagnosis = diagnose(chains(mu=draws))
    assert diagnosis.advice, diagnosis
    assert diagnosis.converged is False
    # Beside chains that move, each quantity is judged by itself.
    both = diagnose(chains(mu=draws, w=autoregressive(0.5, 64, 250)))
    assert both.converged is False
    assert any("mu" in line for line in both.advice)


def two_modes(x: torch.Tensor) -> None:
    """x ~ N(z^2, 0.1) with x = 16: z is near 4 or near -4, and no chain crosses."""
    z = pyro.sample("z", dist.Normal(double(0.0), 5.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)


def test_nuts_on_two_modes_is_told_that_its_chains_disagree() -> None:
    data = torch.tensor([16.0], dtype=torch.float64)

    def at_both(model: Any) -> kernels.NUTS:
        kernel = kernels.NUTS(model, num_chains=4)
        kernel.initial_params = {"z": torch.tensor([4.1, 3.9, -4.1, -3.9]).double()}
        return kernel

    result = inference.sample(two_modes, data, at_both, draws=100, warmup=100, chains=4, seed=1, progress=False)
    signs = np.sign(result.idata.posterior["z"].mean("draw"))
    assert set(signs.values) == {-1.0, 1.0}
    assert result.diagnosis.advice[0].startswith("R-hat is")
    assert result.diagnosis.worst_r_hat > 1.5
