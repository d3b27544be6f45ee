"""Predictive draws and scores: all draws at once, rows told apart, wrong shapes refused."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import fit, pointwise_log_likelihood, posterior_predictive, prior_predictive, sample
from inference.compiler import policy
from inference.core.bound import bind
from inference.core.handlers import isolated
from inference.draws import scoring as prediction
from ppl_models.models.pair import Pair

X = torch.linspace(-1, 1, 12, dtype=torch.float64)
DATA = {"x": X, "y": 2 * X + 0.3}


def regression(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(()).double(), 2.0))
    noise = pyro.sample("noise", dist.Exponential(torch.ones(()).double()))
    with pyro.plate("rows", len(x), dim=-1):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=y)


def fitted(model=regression, data=DATA, **arguments):
    return fit((model, AutoNormal(model)), data, steps=200, draws=60, progress=False, **arguments)


def test_pointwise_scores_are_those_by_hand() -> None:
    result = fitted()
    slope, noise = (result.draws[n][:, None] for n in ("slope", "noise"))
    by_hand = dist.Normal(slope * X, noise).log_prob(DATA["y"])
    torch.testing.assert_close(pointwise_log_likelihood(result), by_hand)
    np.testing.assert_allclose(result.idata.log_likelihood["y"].values[0], by_hand)
    other = {"x": X[:3], "y": torch.zeros(3).double()}
    torch.testing.assert_close(
        pointwise_log_likelihood(result, other), dist.Normal(slope * X[:3], noise).log_prob(other["y"])
    )


def test_the_joint_score_is_that_by_hand() -> None:
    result = fitted()
    slope, noise = result.draws["slope"], result.draws["noise"]
    by_hand = dist.Normal(0.0, 2.0).log_prob(slope) + dist.Exponential(1.0).log_prob(noise)
    by_hand = by_hand + dist.Normal(slope[:, None] * X, noise[:, None]).log_prob(DATA["y"]).sum(-1)
    with isolated():
        torch.testing.assert_close(prediction.log_joint(result.bound, result.draws), by_hand)


def test_posterior_predictive_draws_have_the_moments_of_the_model() -> None:
    result = fitted(seed=2)
    draws = torch.cat([posterior_predictive(result, seed=s)["y"] for s in range(200)])
    slope, noise = result.draws["slope"], result.draws["noise"]
    mean, sd = slope.mean() * X, (slope.var(unbiased=False) * X**2 + (noise**2).mean()).sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * sd / math.sqrt(len(draws))).all()
    torch.testing.assert_close(draws.std(0), sd, rtol=0.05, atol=0)


def test_replicates_do_not_look_at_the_observed() -> None:
    result = fitted()
    blind = posterior_predictive(result, {"x": X})["y"]
    seeing = posterior_predictive(result, {"x": X, "y": 1000 + X})["y"]
    assert torch.equal(blind, seeing)


def test_prior_draws_of_one_run_are_independent() -> None:
    drawn = prior_predictive(regression, {"x": X}, draws=4000)
    assert drawn["slope"].shape == (4000,)
    assert drawn["y"].shape == (4000, 12)
    assert float(drawn["slope"].std()) == pytest.approx(2.0, rel=0.06)
    residual = (drawn["y"] - drawn["slope"][:, None] * X) / drawn["noise"][:, None]
    assert abs(float(residual.mean())) < 0.03
    assert float(residual.std()) == pytest.approx(1.0, rel=0.03)


def test_prior_draws_are_groups_of_arviz() -> None:
    """The sites that the data observe, and those that they would, are predictive; the rest is the prior."""
    seen, blind = (prior_predictive(regression, d, draws=30) for d in (DATA, {"x": X}))
    for drawn in (seen, blind):
        assert set(drawn.idata["prior"].data_vars) == {"slope", "noise"}
        assert drawn.idata["prior"].sizes == {"chain": 1, "draw": 30}
        assert drawn.idata["prior_predictive"]["y"].dims == ("chain", "draw", "rows")
        np.testing.assert_array_equal(drawn.idata["prior_predictive"]["y"][0], drawn["y"])
    np.testing.assert_array_equal(seen.idata["observed_data"]["y"], DATA["y"])
    assert "observed_data" not in blind.idata.children
    # What ArviZ asks of both: that the prior and the posterior are of the same quantities.
    result = fitted()
    result.idata.update({n: g for n, g in seen.idata.children.items() if n != "observed_data"})
    assert {"prior", "prior_predictive", "posterior"} <= set(result.idata.children)


def test_prior_draws_without_data_have_groups_of_the_size_asked_for() -> None:
    def rows(x: Tensor | None = None, *, size: int | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", size or len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    idata = prior_predictive(rows, size=5, draws=7).idata
    assert idata["prior_predictive"]["x"].sizes == {"chain": 1, "draw": 7, "rows": 5}
    assert list(idata["prior"].data_vars) == ["rate"]


@pytest.mark.parametrize("budget", [1, 50, 10_000_000])
def test_chunks_of_any_size_score_alike(monkeypatch, budget: int) -> None:
    result = fitted()
    whole = pointwise_log_likelihood(result)
    monkeypatch.setattr(policy, "DRAW_NUMBERS", budget)
    torch.testing.assert_close(pointwise_log_likelihood(result), whole)
    assert posterior_predictive(result)["y"].shape == (60, 12)


def hidden_markov(y: Tensor) -> None:
    """Two chained labels a row and a plate of sensors within rows: sums and products must nest rightly."""
    stay = pyro.sample("stay", dist.Beta(torch.tensor(4.0).double(), 2.0))
    with pyro.plate("rows", len(y), dim=-2):
        first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.3).double()))
        second = pyro.sample("second", dist.Bernoulli(torch.where(first == 1, stay, 1 - stay)))
        with pyro.plate("sensors", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(first + 2 * second, 0.7), obs=y)


def test_summed_out_sites_are_those_of_brute_force() -> None:
    y = torch.tensor([[0.1, 0.4, -0.3], [2.9, 3.2, 2.5], [1.2, 0.8, 1.9], [2.2, 1.4, 1.5]]).double()
    bound = bind(hidden_markov, y)
    stay = torch.tensor([0.2, 0.6, 0.9]).double()

    def by_hand(s: Tensor) -> Tensor:
        terms = []
        for a in (0, 1):
            for b in (0, 1):
                moves = s if a else 1 - s
                weight = math.log(0.3 if a else 0.7) + (moves if b else 1 - moves).log()
                terms.append(weight + dist.Normal(a + 2.0 * b, 0.7).log_prob(y).sum(-1))
        return torch.stack(terms).logsumexp(0)

    expected = torch.stack([by_hand(s) for s in stay])
    with isolated():
        torch.testing.assert_close(prediction.rowwise(bound, {"stay": stay}), expected)
        joint = expected.sum(-1) + dist.Beta(4.0, 2.0).log_prob(stay)
        torch.testing.assert_close(prediction.log_joint(bound, {"stay": stay}), joint)


def test_a_model_written_for_one_draw_is_mapped() -> None:
    def stubborn(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("y", dist.Normal(w[0] + w[1] * x, 1.0), obs=y)

    result = fitted(stubborn)
    w = result.draws["w"]
    by_hand = dist.Normal(w[:, :1] + w[:, 1:] * X, 1.0).log_prob(DATA["y"])
    torch.testing.assert_close(pointwise_log_likelihood(result), by_hand)


def test_a_model_that_would_mix_draws_is_that_of_one_draw() -> None:
    def sly(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            # In a plate of draws every draw would get the mean over all of them.
            pyro.sample("y", dist.Normal(w.mean() * x, 1.0), obs=y)

    result = fitted(sly)
    by_hand = dist.Normal(result.draws["w"][:, None] * X, 1.0).log_prob(DATA["y"])
    torch.testing.assert_close(pointwise_log_likelihood(result), by_hand)


def test_a_model_that_its_values_steer_runs_draw_by_draw_and_says_so() -> None:
    def steered(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("y", dist.Normal(w * x if w > 0 else 2 * w * x, 1.0), obs=y)

    with pytest.warns(UserWarning, match="steered: the model cannot be mapped .*depends on the value"):
        result = fitted(steered)
    w = result.draws["w"][:, None]
    by_hand = dist.Normal(torch.where(w > 0, w, 2 * w) * X, 1.0).log_prob(DATA["y"])
    torch.testing.assert_close(pointwise_log_likelihood(result), by_hand)


def test_a_model_that_leaves_torch_for_numpy_is_not_frozen() -> None:
    def elsewhere(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        slope = float(np.sin(w.detach().numpy()))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    with pytest.warns(UserWarning, match="elsewhere: the model cannot be mapped .*depends on the value"):
        result = fitted(elsewhere)
    by_hand = dist.Normal(result.draws["w"][:, None].sin() * X, 1.0).log_prob(DATA["y"])
    torch.testing.assert_close(pointwise_log_likelihood(result), by_hand)


def test_replicates_of_a_mapped_model_differ_from_draw_to_draw() -> None:
    def stubborn(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("y", dist.Normal(w[0] + w[1] * x, 1.0), obs=y)

    result = fitted(stubborn)
    replicates = result.idata.posterior_predictive["y"].values[0]
    w = result.draws["w"].numpy()
    noise = replicates - (w[:, :1] + w[:, 1:] * X.numpy())
    assert len(np.unique(noise)) == noise.size
    assert abs(noise.std() - 1) < 5 / noise.size**0.5


def test_rows_without_a_plate_cannot_be_told_apart() -> None:
    def whole(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("y", dist.Normal(mu[..., None], torch.ones(12).double()).to_event(1), obs=y)

    result = fitted(whole, DATA["y"])
    with pytest.raises(ValueError, match="model: expected observed sites in a plate of rows, got y outside of one"):
        pointwise_log_likelihood(result)


def test_draws_of_a_wrong_shape_or_name_are_refused() -> None:
    bound = bind(regression, DATA)
    with isolated():
        with pytest.raises(ValueError, match=r"slope: expected draws of shape \(draws\), got \(5, 2\)"):
            prediction.log_joint(bound, {"slope": torch.zeros(5, 2), "noise": torch.ones(5)})
        with pytest.raises(ValueError, match="draws: the model has no site slop"):
            prediction.log_joint(bound, {"slop": torch.zeros(5)})
        with pytest.raises(ValueError, match="draws: expected values of noise, got only slope"):
            prediction.log_joint(bound, {"slope": torch.zeros(5).double()})


def test_latents_of_rows_that_were_not_fitted_are_told() -> None:
    def local(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = fitted(local, X)
    with pytest.raises(ValueError, match=r"z: expected draws of shape \(draws, 3\), got \(60, 12\) \(a latent of rows"):
        pointwise_log_likelihood(result, X[:3])


def test_large_groups_are_left_out_aloud(monkeypatch) -> None:
    import inference.result

    monkeypatch.setattr(inference.groups, "STORED", 100)
    result = fitted()
    with pytest.warns(UserWarning, match="left out: 720 numbers, for fewer rows or draws; ask") as said:
        assert set(result.idata.children) == {"posterior", "observed_data"}
    groups = [str(w.message).split(": ")[1].split()[0] for w in said]
    assert groups == ["posterior_predictive", "log_likelihood"]
    assert pointwise_log_likelihood(result).shape == (60, 12)


def test_a_log_likelihood_is_kept_where_wide_replicates_are_not(monkeypatch) -> None:
    import inference.result

    def wide(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x), 9]).to_event(1), obs=x)

    monkeypatch.setattr(inference.groups, "STORED", 1000)
    result = fitted(wide, X[:, None].expand(-1, 9))
    assert result.groups["log_likelihood"]["x"].shape == (1, 60, 12)
    with pytest.warns(UserWarning, match=r"posterior_predictive left out: 6,480 numbers, .* ask posterior_predictive"):
        assert result.idata["log_likelihood"]["x"].shape == (1, 60, 12)


class Coded(Pair):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 0.1): a guide that reads x, or one that has a value for each row of the fit."""

    def __init__(self, count: int | None = None) -> None:
        super().__init__()
        self.locs = None if count is None else torch.nn.Parameter(torch.zeros(count))

    def model(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            return pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(self, x=None, *, size=None, rows=None, **_):
        with pyro.plate("rows", size or len(x), subsample=rows, dim=-1):
            pyro.sample("z", dist.Normal(x / 1.01 if self.locs is None else self.locs, 0.1))


def test_latents_of_new_rows_come_from_the_guide_and_without_rows_from_the_prior() -> None:
    result = fit(Coded(), torch.zeros(5), steps=0, draws=2000, progress=False)
    again = posterior_predictive(result, torch.tensor([-3.0, 0.0, 4.0]))["x"]
    assert again.shape == (2000, 3)
    assert again.mean(0).tolist() == pytest.approx([-3 / 1.01, 0.0, 4 / 1.01], abs=0.02)
    assert again.std(0).tolist() == pytest.approx([0.02**0.5] * 3, rel=0.1)
    fresh = posterior_predictive(result, {}, size=4)["x"]
    assert fresh.std(0).tolist() == pytest.approx([1.01**0.5] * 4, rel=0.1)


def test_new_rows_that_nothing_knows_are_refused() -> None:
    own = fit(Coded(5), torch.zeros(5), steps=0, draws=30, progress=False)
    with pytest.raises(
        ValueError, match="data: expected the 5 rows of the fit, whose guide has no z of other rows, got 3"
    ):
        posterior_predictive(own, torch.ones(3))
    chains = sample(Coded(), torch.zeros(5), draws=20, warmup=20, chains=2, progress=False)
    with pytest.raises(
        ValueError, match="data: expected the rows of the chains, which have no z of other rows; fit a guide"
    ):
        posterior_predictive(chains, torch.ones(3))
    with pytest.raises(ValueError, match="log_evidence integrates it out"):
        pointwise_log_likelihood(own, torch.ones(3))
