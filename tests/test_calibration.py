"""Ranks of exact posteriors are uniform at the stated rate, and those of broken ones are told, with what is wrong."""

import errno
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import seeds
import torch
from pyro import poutine
from torch import nn

from inference import Calibration, Result, calibrate, fit, sample
from inference.comparison import calibrate as calibrating
from inference.diagnostics import calibration
from inference.kernels import NUTS

pytestmark = pytest.mark.usefixtures("alone")
ROWS = 3
STRICT = 1e-4
"""Rate of false alarms in tests of exact posteriors, which have to pass at any seed."""


def model(y: torch.Tensor) -> None:
    """mu ~ N(0, I), y ~ N(mu, I) in two dimensions: the posterior is N(sum y / (1 + N), 1 / (1 + N))."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)


def guide(y: torch.Tensor, width: float = 1.0, shift: float = 0.0) -> None:
    """The posterior, with another width and shifted by so many of its standard deviations."""
    sd = (1 + len(y)) ** -0.5
    pyro.sample("mu", dist.Normal(y.sum(0) / (1 + len(y)) + shift * sd, width * sd).to_event(1))


def fitted(guide: Any, model: Any = model, rows: int = ROWS) -> Result:
    return fit((model, guide), torch.zeros(rows, 2), steps=0, draws=5, progress=False)


def ranks(found: Calibration, name: str) -> np.ndarray:
    return found.ranks[name].to_numpy()


# The tests of uniformity


@pytest.mark.parametrize(("count", "probability"), [(20, 0.9), (100, 0.95), (500, 0.5)])
def test_the_envelope_holds_uniform_values_as_often_as_it_says(count: int, probability: float) -> None:
    """Counted over 4,000 samples: the rate is within four standard errors, or above it by its few steps."""
    points, lower, upper = calibration.envelope(count, probability)
    values = np.sort(np.random.default_rng(1).random((4000, count)))
    found = np.stack([np.searchsorted(v, points, side="right") for v in values]) / count
    inside = ((found >= lower) & (found <= upper)).all(1).mean()
    assert -4 * (probability * (1 - probability) / 4000) ** 0.5 < inside - probability < 0.05


def test_the_probability_of_staying_within_bounds_is_exact() -> None:
    """Three values and two points: by counting the six ways that are allowed of all ways to fall into three parts."""
    points, lower, upper = np.array([0.2, 0.7]), np.array([0, 1]), np.array([1, 2])
    parts = scipy.stats.multinomial(3, [0.2, 0.5, 0.3])
    allowed = [(a, b) for a in range(2) for b in range(4 - a) if 1 <= a + b <= 2]
    expected = sum(parts.pmf([a, b, 3 - a - b]) for a, b in allowed)
    assert calibration.probability_within(lower, upper, points, 3) == pytest.approx(expected, rel=1e-12)


def test_uniform_values_have_uniform_p_values_in_all_three_tests() -> None:
    """The share below a limit is the limit, up to four errors and the steps of the statistics."""
    samples = np.random.default_rng(2).random((600, 150))
    for test, steps in ((calibration.uniformity, 0.01), (calibration.symmetry, 0.02), (calibration.chi_square, 0.01)):
        p = np.array([test(v) for v in samples])
        for limit in (0.01, 0.05, 0.3):
            error = (limit * (1 - limit) / 600) ** 0.5
            assert -4 * error - steps - 0.1 * limit < (p <= limit).mean() - limit < 4 * error + 0.005, (test, limit)


@pytest.mark.parametrize(("a", "b", "shape"), [(2, 2, "too wide"), (0.5, 0.5, "too narrow"), (1, 2, "too high")])
def test_values_of_beta_distributions_are_told_with_their_shape(a: float, b: float, shape: str) -> None:
    values = np.random.default_rng(3).beta(a, b, 400)
    assert calibration.uniformity(values) < 1e-4 and calibration.shape_of(values) == shape
    # Only the last one is not symmetric.
    assert (calibration.symmetry(values) < 1e-4) == (a != b)


def test_ranks_among_the_same_values_are_uniform() -> None:
    """Ties are broken at random: of a point, or of whole numbers, the rank is anywhere among the equal ones."""
    random = np.random.default_rng(4)
    found = calibration.ranks(np.ones((9, 2000)), np.ones(2000), random)
    assert calibration.uniformity(found) > STRICT and found.min() > 0 and found.max() < 1
    assert calibration.ranks(np.arange(9.0)[:, None], np.array([-1.0]), random)[0] < 0.1
    assert calibration.ranks(np.arange(9.0)[:, None], np.array([9.0]), random)[0] > 0.9


# Posteriors of a conjugate model


def test_the_exact_posterior_passes() -> None:
    found = calibrate(fitted(guide), simulations=200, alpha=STRICT)
    assert found.passed and list(found.ranks) == ["mu[0]", "mu[1]", "distance", "log_joint"]
    assert re.match(r"No fault found: 200 ranks of each of 4 quantities may be uniform \(p [\d.]+\)\.$", found.verdict)
    # Coverage within four standard errors.
    for level in (50, 90):
        error = (level / 100 * (1 - level / 100) / 200) ** 0.5
        assert (abs(found.table[f"coverage_{level}"] - level / 100) < 4.5 * error).all()


@pytest.mark.parametrize(
    ("broken", "shape"),
    [({"width": 2.0}, "too wide"), ({"width": 0.5}, "too narrow"), ({"shift": 0.8}, "too high")],
)
def test_broken_posteriors_are_told_with_what_is_wrong(broken: dict[str, float], shape: str) -> None:
    found = calibrate(fitted(partial(guide, **broken)), simulations=200)
    assert not found.passed
    assert list(found.table.loc[["mu[0]", "mu[1]"], "shape"]) == [shape] * 2
    assert re.match(rf"Not calibrated: mu\[\d\] is {shape} \(p .*\), its 90 % interval holds the truth", found.verdict)
    # A normal posterior r times as wide covers P(|Z| < 1.645 r); one shifted by s, P(|Z + s| < 1.645).
    z, width, shift = scipy.stats.norm.ppf(0.95), broken.get("width", 1.0), broken.get("shift", 0.0)
    covers = np.subtract(*scipy.stats.norm.cdf([z * width + shift, -z * width + shift]))
    error = (covers * (1 - covers) / 200) ** 0.5
    assert abs(found.table.loc["mu[0]", "coverage_90"] - covers) < 5 * error + 0.01


def test_symmetric_ranks_tell_a_wrong_width_from_a_wrong_mean() -> None:
    narrow = calibrate(fitted(partial(guide, width=0.4)), simulations=200)
    assert narrow.table["p"].max() < 1e-3 and narrow.table.loc[["mu[0]", "mu[1]"], "symmetry"].min() > 1e-4
    shifted = calibrate(fitted(partial(guide, shift=1.0)), simulations=200)
    assert shifted.table.loc[["mu[0]", "mu[1]"], "symmetry"].max() < 1e-4


def test_a_posterior_that_is_the_prior_is_told_by_the_log_density_alone() -> None:
    """Ranks of every parameter are uniform where data are ignored (Modrák et al. 2023)."""

    def prior(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0 * y.sum(0), 1.0).to_event(1))

    found = calibrate(lambda: (model, prior), torch.zeros(ROWS, 2), partial(fit, steps=0, draws=100), simulations=150)
    assert found.table["p"]["log_joint"] < 1e-6 and not found.passed
    assert found.table["p"][["mu[0]", "mu[1]"]].min() > STRICT


def test_a_verdict_without_the_log_density_says_what_it_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("expected all rows in each run")

    monkeypatch.setattr("inference.comparison.calibrate.log_joint", refuse)

    def prior(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(0.0 * y.sum(0), 1.0).to_event(1))

    method = partial(fit, steps=0, draws=50)
    found = calibrate(lambda: (model, prior), torch.zeros(ROWS, 2), method, simulations=20, alpha=STRICT)
    assert found.passed and "log_joint is not among them: a posterior that ignores the data passes" in found.verdict


def test_what_only_all_parameters_together_show_is_told() -> None:
    """Correlation of the wrong sign: both marginals are right."""
    factor = torch.tensor([[1.0, 0.0], [0.9, 0.43589]])

    def correlated(y: torch.Tensor) -> None:
        mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 3.0).to_event(1), obs=y)

    prior = factor @ factor.T

    def turned(y: torch.Tensor) -> None:
        covariance = torch.linalg.inv(torch.linalg.inv(prior) + len(y) / 9 * torch.eye(2))
        mean = covariance @ y.sum(0) / 9
        pyro.sample("mu", dist.MultivariateNormal(mean, covariance * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])))

    found = calibrate(fitted(turned, correlated), simulations=200)
    assert found.table["p"][["mu[0]", "mu[1]"]].min() > STRICT
    assert found.table["p"]["log_joint"] < 1e-6


def test_rows_with_latent_sites_of_their_own_give_a_rank_each() -> None:
    """An amortized guide of rows: one data set of 300 rows has 300 ranks; the encoder is used as it is."""

    class Pair(nn.Module):
        def __init__(self, width: float) -> None:
            super().__init__()
            self.width, self.scale = width, nn.Parameter(torch.tensor(1.0))

        def model(self, x: Any = None, size: int = 1) -> None:
            pyro.module("pair", self)
            with pyro.plate("rows", size if x is None else len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.scale * z, 1.0).to_event(1), obs=x)

        def guide(self, x: Any) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(0.5 * x, self.width * 0.5**0.5).to_event(1))

    for width in (1.0, 1.6):
        result = fit(Pair(width), torch.zeros(300, 2), steps=0, draws=5, progress=False)
        found = calibrate(result, simulations=2, alpha=STRICT)
        assert len(found.ranks) == 600 and found.passed == (width == 1.0)
        assert width == 1.0 or found.table["shape"]["z[0]"] == "too wide"


def test_chains_are_thinned_to_independence() -> None:
    method = partial(sample, kernel=NUTS, chains=2, draws=100, warmup=100)
    found = calibrate(lambda: model, torch.zeros(ROWS, 2), method, simulations=3)
    assert found.method == "sample (NUTS)" and (found.draws <= 200).all() and (found.draws > 10).all()
    assert len(found.ranks) == 3


@pytest.mark.parametrize("right", [True, False])
def test_calibration_around_the_data_at_hand(right: bool) -> None:
    """The guide is right only where the mean of the data is near zero: the prior's data tell it, those at hand not."""

    def where(y: torch.Tensor) -> None:
        guide(y, 1.0 if float(y.mean()) < 2 else 4.0)

    data = torch.zeros(20, 2) + (0.0 if right else 4.0)
    known = fit((model, guide), data, steps=0, draws=400, progress=False)
    method = partial(fit, steps=0, draws=100)
    found = calibrate(lambda: (model, where), None, method, simulations=100, around=known, alpha=STRICT)
    assert found.passed == right
    assert right or found.table["shape"]["mu[0]"] == "too wide"


def test_processes_side_by_side_give_the_same_ranks() -> None:
    method, make = partial(fit, steps=0, draws=20), partial(tuple, (model, guide))
    with seeds.unmoved():  # as they are in new processes
        one, two = (calibrate(make, torch.zeros(ROWS, 2), method, simulations=4, jobs=jobs) for jobs in (1, 2))
    np.testing.assert_array_equal(one.ranks, two.ranks)


def test_a_calibration_goes_on_from_its_folder(tmp_path: Path) -> None:
    """Data sets whose ranks are there are not run again; the ranks are those of one run."""
    state = SimpleNamespace(runs=[], stop=4)

    def method(pair: Any, data: Any, seed: int = 0, **_: Any) -> Result:
        state.runs.append(seed)
        if len(state.runs) == state.stop:
            raise KeyboardInterrupt
        return fit(pair, data, steps=0, draws=20, seed=seed, progress=False)

    def run(**further: Any) -> Calibration:
        settings: dict[str, Any] = {"simulations": 6, "draws": 20, "seed": 3, **further}
        return calibrate(lambda: (model, guide), torch.zeros(ROWS, 2), method, checkpoint=tmp_path, **settings)

    with pytest.raises(KeyboardInterrupt):
        run()
    state.stop = 0
    found = run()
    # Three had ended; the fourth was under way.
    assert state.runs == [4, 5, 6, 7, 7, 8, 9]
    whole = calibrate(lambda: (model, guide), torch.zeros(ROWS, 2), method, simulations=6, draws=20, seed=3)
    pd.testing.assert_frame_equal(found.ranks, whole.ranks)
    with pytest.raises(ValueError, match="is of a run with seed 3, got 4; .*use another folder"):
        run(seed=4)
    # A full disk loses the file, not the ranks.
    (tmp_path / "ranks-5.safetensors").unlink()
    full = patch.object(calibrating, "write_packed", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.warns(UserWarning, match="ranks-5.safetensors cannot be written .*No space.*goes on"):
        pd.testing.assert_frame_equal(run().ranks, whole.ranks)
    (tmp_path / "ranks-2.safetensors").write_bytes(b"no ranks")
    with pytest.raises(ValueError, match="ranks-2.safetensors: expected the ranks of a data set, got a file"):
        run()


def test_further_quantities_and_states_that_are_summed_out() -> None:
    def coins(x: torch.Tensor) -> None:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.8])[k]), obs=x)

    def posterior(x: torch.Tensor) -> None:
        heads = x.sum()
        p = torch.tensor([0.2, 0.5, 0.8])
        logits = torch.tensor([0.5, 0.3, 0.2]).log() + heads * p.log() + (len(x) - heads) * (1 - p).log()
        pyro.sample("k", dist.Categorical(logits=logits))

    result = fit((coins, posterior), torch.zeros(5), steps=0, draws=5, progress=False)
    further = {"k and heads": lambda draws, data: draws["k"] * data["x"].sum()}
    found = calibrate(result, simulations=150, quantities=further, alpha=STRICT)
    assert found.passed and list(found.ranks) == ["k", "log_joint", "k and heads"]


def test_a_data_set_on_which_the_method_fails_is_said() -> None:
    def method(pair: Any, data: Any, seed: int) -> Result:
        if seed % 4 == 0:
            raise ValueError("cannot do this one")
        return fit(pair, data, steps=0, draws=50, seed=seed, progress=False)

    found = calibrate(lambda: (model, guide), torch.zeros(ROWS, 2), method, simulations=8, alpha=STRICT)
    assert not found.passed and found.failed == ("ValueError: cannot do this one",) * 2
    assert re.match(
        r"Not judged: .*; the method failed on 2 data sets: ValueError: cannot do this one\.", found.verdict
    )

    def broken(pair: Any, data: Any) -> Result:
        raise ValueError("never")

    with pytest.raises(RuntimeError, match="^the method failed on every data set: ValueError: never$"):
        calibrate(lambda: (model, guide), torch.zeros(ROWS, 2), broken, simulations=2)


def test_a_fit_that_stops_early_is_one_that_failed() -> None:
    def method(pair: Any, data: Any, seed: int) -> Result:
        result = fit(pair, data, steps=0, draws=50, seed=seed, progress=False)
        if seed % 4 == 0:
            result.groups.attrs["ended"] = "stopped at step 7 of 100, where loss or gradient is not finite"
        return result

    found = calibrate(lambda: (model, guide), torch.zeros(ROWS, 2), method, simulations=8, alpha=STRICT)
    assert (
        found.failed
        == ("RuntimeError: the run was stopped at step 7 of 100, where loss or gradient is not finite",) * 2
    )
    assert len(found.ranks) == 6 and not found.passed


def test_what_cannot_be_calibrated_is_refused_in_one_line() -> None:
    data, method = torch.zeros(ROWS, 2), partial(fit, steps=1, draws=5)
    with pytest.raises(ValueError, match=r"^method: expected one for new pairs, or a Result alone, got a function"):
        calibrate(lambda: (model, guide), data)
    with pytest.raises(ValueError, match=r"^alpha: expected a number between 0 and 1, got 2$"):
        calibrate(fitted(guide), alpha=2)
    with pytest.raises(ValueError, match=r"^make_pair: expected a model that observes data"):
        calibrate(lambda: (poutine.block(model, hide=["y"]), guide), data, method)

    def fixed(y: torch.Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"^make_pair: expected a Result with an amortized guide, got one whose draws"):
        calibrate(fitted(fixed), simulations=3)

    def learning(y: torch.Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), scale).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0).to_event(1), obs=y)

    with pytest.raises(
        RuntimeError, match="expected a model without parameters, .* got scale, which the method trains"
    ):
        calibrate(lambda: (learning, fixed), data, method, simulations=2)


def test_the_plot_shows_the_worst_quantities_first_and_the_coverage() -> None:
    found = calibrate(fitted(partial(guide, width=2.0)), simulations=60)
    titles = [a.get_title() for a in found.plot().axes if a.get_visible()]
    assert len(titles) == 5 and "too wide" in " ".join(titles)
    assert titles[-1] == "coverage of central intervals (2)"
    assert "Not calibrated" in str(found) and "coverage_90" in str(found)
