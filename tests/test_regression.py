"""Logistic regression and the neural classifier against scikit-learn, numerical integration and plain numpy."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import arviz_stats as azs
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import sklearn.linear_model
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, init_to_feasible
from torch import Tensor

import inference
from inference.core.bound import bind
from inference.draws.scoring import log_joint
from ppl_models.data.sets import load
from ppl_models.models.regression import Classifier, LogisticRegression, NeuralClassifier

Data = dict[str, Tensor]
PAIRS: dict[str, type[Classifier]] = {"logistic": LogisticRegression, "neural": NeuralClassifier}
# Exact in binary, for pairs are built in float32; and all different, so that one taken for another shows.
SCALES: dict[str, dict[str, float]] = {
    "logistic": {"scale": 1.5, "intercept_scale": 2.5},
    "neural": {"scale": 1.5, "hidden": 5},
}
pairs = pytest.mark.parametrize("name", list(PAIRS))
classes = pytest.mark.parametrize("classes", [2, 3])


pytestmark = pytest.mark.usefixtures("alone")


def make(name: str, classes: int, features: int = 4, **arguments: Any) -> Any:
    return PAIRS[name](features, classes, **{**SCALES[name], **arguments}).double()


def draw(classes: int, rows: int = 30, features: int = 4, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(rows, features)), rng.integers(0, classes, rows)
    x[:, 0] += y
    return {"x": torch.tensor(x), "y": torch.tensor(y)}


def prior_draws(pair: Classifier, data: Data, draws: int) -> dict[str, Tensor]:
    sites = inference.prior_predictive(pair, {"x": data["x"]}, draws=draws)
    return {name: value for name, value in sites.items() if name != "y"}


def numpy_scores(theta: dict[str, np.ndarray], x: np.ndarray, classes: int) -> np.ndarray:
    """Log probabilities of the classes (rows, K) by hand, from the parameters of one draw."""
    if "weights" in theta:
        scores = x @ np.atleast_2d(theta["weights"]).T + theta["intercept"]
    else:
        units = np.tanh(x @ theta["hidden_weights"].T + theta["hidden_bias"])
        scores = units @ theta["output_weights"].T + theta["output_bias"]
    if classes == 2:
        scores = np.concatenate([np.zeros_like(scores), scores], -1)
    return scipy.special.log_softmax(scores, -1)


def numpy_prior(theta: dict[str, np.ndarray], features: int) -> float:
    if "weights" in theta:
        sds = {"weights": 1.5, "intercept": 2.5}
    else:
        sds = {"hidden_weights": 1.5 / features**0.5, "output_weights": 1.5 / 5**0.5}
        sds |= {"hidden_bias": 1.5, "output_bias": 1.5}
    assert theta.keys() == sds.keys()
    return float(sum(scipy.stats.norm(0, sd).logpdf(theta[name]).sum() for name, sd in sds.items()))


def each_draw(draws: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    size = len(next(iter(draws.values())))
    return [{name: value[s].numpy() for name, value in draws.items()} for s in range(size)]


# The mode


@pytest.mark.parametrize("name", ["breast_cancer", "iris", "wine"])
@pytest.mark.parametrize("strength", [1.0, 0.0625])
def test_the_mode_is_scikit_learns_estimate(name: str, strength: float) -> None:
    """C = scale^2; with three classes the scores, and so the intercepts, are known up to a constant."""
    train = load(name, standardise=True, dtype=torch.float64).train
    x, y = train["x"], train["y"]
    reference = sklearn.linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=100_000).fit(x, y)
    guide = partial(AutoDelta, init_loc_fn=init_to_feasible)
    pair = LogisticRegression(x.shape[1], int(y.max()) + 1, scale=strength**0.5, intercept_scale=1e4, guide=guide)
    result = inference.fit(pair.double(), train, steps=800, learning_rate=0.3, draws=1, progress=False)
    weights, intercept = result.draws["weights"][0].numpy(), result.draws["intercept"][0].numpy()
    expected = reference.intercept_ if intercept.ndim else reference.intercept_[0]
    if intercept.ndim:
        intercept, expected = intercept - intercept.mean(), expected - expected.mean()
    np.testing.assert_allclose(weights, reference.coef_.squeeze(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(intercept, expected, rtol=0, atol=1e-5)


# Moments by importance sampling


def grid_moments(data: Data, scale: float, intercept_scale: float) -> dict[str, tuple[float, float]]:
    """Posterior mean and standard deviation of one weight and the intercept, by Simpson's rule in two dimensions."""
    reach = 8 * max(scale, intercept_scale)
    axis = np.linspace(-reach, reach, 3001)
    weight, intercept = np.meshgrid(axis, axis, indexing="ij")
    density = scipy.stats.norm(0, scale).logpdf(weight) + scipy.stats.norm(0, intercept_scale).logpdf(intercept)
    for x, y in zip(data["x"][:, 0].tolist(), data["y"].tolist(), strict=True):
        density += scipy.special.log_expit((2 * y - 1) * (weight * x + intercept))
    density = np.exp(density - density.max())

    def integrate(values: Any) -> float:
        return float(scipy.integrate.simpson(scipy.integrate.simpson(values * density, x=axis), x=axis))

    total, moments = integrate(np.ones_like(weight)), {}
    for name, values in (("weights", weight), ("intercept", intercept)):
        mean = integrate(values) / total
        moments[name] = mean, math.sqrt(integrate((values - mean) ** 2) / total)
    return moments


@pytest.mark.parametrize(
    ("rows", "scale", "separable"), [(20, 1.0, False), (8, 5.0, True), (8, 20.0, True), (1, 1.0, False)]
)
def test_moments_equal_numerical_integration(rows: int, scale: float, separable: bool) -> None:
    """Also where the classes are separable: the posterior is then skewed, and its mode far from its mean.

    With 5,000 effective draws, below which the moments are refused, a mean is known to 0.014 standard deviations, and
    a standard deviation to 1.6 % where the fourth moment is twice that of a normal.
    """
    data = draw(2, rows, 1)
    if separable:
        data["y"] = (data["x"][:, 0] > 0.3).long()
    pair = LogisticRegression(1, 2, scale=scale, intercept_scale=4.0).double()
    expected = grid_moments(data, scale, 4.0)
    for name, (mean, sd) in pair.moments(**data).items():
        true_mean, true_sd = expected[name]
        assert mean.shape == sd.shape == ((1,) if name == "weights" else ())
        assert mean.item() == pytest.approx(true_mean, abs=0.05 * true_sd)
        assert sd.item() == pytest.approx(true_sd, rel=0.06)


def test_moments_of_a_weight_whose_feature_is_zero_are_the_priors() -> None:
    data = draw(3)
    data["x"][:, 2] = 0.0
    mean, sd = make("logistic", 3).moments(**data)["weights"]
    np.testing.assert_allclose(mean[:, 2], 0, atol=0.02)
    np.testing.assert_allclose(sd[:, 2], 1.5, rtol=0.01)
    assert (sd[:, :2] < 1.3).all()


def test_moments_of_the_classes_sum_to_the_priors_mean() -> None:
    """A constant added to all scores changes nothing: the likelihood says nothing of the classes' sum."""
    moments = make("logistic", 3).moments(**draw(3))
    for mean, sd in moments.values():
        np.testing.assert_allclose(mean.sum(0) / sd.amax(0), 0, atol=0.03)


def test_moments_follow_the_names_of_the_classes() -> None:
    data, order = draw(3), torch.tensor([2, 0, 1])
    pair = make("logistic", 3)
    moments, renamed = pair.moments(**data), pair.moments(data["x"], order[data["y"]])
    for name, (mean, sd) in moments.items():
        np.testing.assert_allclose(renamed[name][0][order], mean, atol=0.03 * float(sd.max()))
        np.testing.assert_allclose(renamed[name][1][order], sd, rtol=0.02)


def test_moments_are_the_same_every_time_and_leave_the_random_state_alone() -> None:
    pair, data = make("logistic", 2), draw(2)
    before = torch.get_rng_state()
    first, second = pair.moments(**data), pair.moments(**data)
    assert (torch.get_rng_state() == before).all()
    assert all((first[name][part] == second[name][part]).all() for name in first for part in (0, 1))


def test_moments_of_too_few_draws_are_refused() -> None:
    line = r"^importance sampling: \d+ effective draws of 5000, expected at least 5000$"
    with pytest.raises(ArithmeticError, match=line):
        make("logistic", 2).moments(**draw(2), draws=5000)


def standardised_errors(result: inference.Result, moments: dict[str, tuple[Tensor, Tensor]]) -> np.ndarray:
    errors = [(result.draws[name].mean(0) - mean) / sd for name, (mean, sd) in moments.items()]
    return np.concatenate([error.abs().numpy().ravel() for error in errors])


@pytest.mark.parametrize("classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_moments_agree_with_nuts(classes: int) -> None:
    pair, data = make("logistic", classes, 2), draw(classes, features=2)
    result = inference.sample(pair, data, draws=400, warmup=200, chains=2, progress=False)
    for name, (mean, sd) in pair.moments(**data).items():
        array = result.idata.posterior[name]
        squares = (array - array.mean(("chain", "draw"))) ** 2
        # The error of a standard deviation by the delta method: that of the variance over 2 sd.
        errors = azs.mcse(array, method="mean"), azs.mcse(squares, method="mean") / (2 * array.std(("chain", "draw")))
        for method, true, error in zip(("mean", "std"), (mean, sd), errors, strict=True):
            found, error = getattr(array, method)(("chain", "draw")).values, error.values
            np.testing.assert_array_less(abs(found - true.numpy()), 5 * error)
            assert (error < 0.2 * sd.numpy()).all()


@pytest.mark.slow
def test_moments_agree_with_nuts_on_breast_cancer_within_a_tenth() -> None:
    train = load("breast_cancer", standardise=True, dtype=torch.float64).train
    pair = LogisticRegression(30, 2).double()
    result = inference.sample(pair, train, draws=1000, warmup=500, chains=2, progress=False)
    moments = pair.moments(**train)
    assert standardised_errors(result, moments).max() < 0.1
    ratios = [(result.draws[name].std(0) / sd).numpy().ravel() for name, (_, sd) in moments.items()]
    np.testing.assert_allclose(np.concatenate(ratios), 1, atol=0.1)


@pytest.mark.slow
def test_a_full_gaussian_guide_is_near_the_moments() -> None:
    # The more rows, the nearer the posterior is to a normal one.
    data = draw(2, rows=1000)
    pair = make("logistic", 2, guide=AutoMultivariateNormal)
    result = inference.fit(pair, data, steps=1500, draws=4000, progress=False)
    moments = pair.moments(**data)
    assert standardised_errors(result, moments).max() < 0.15
    assert result.diagnosis.pareto_k is not None
    assert result.diagnosis.pareto_k < 0.5


# The density


@pairs
@classes
@pytest.mark.parametrize(("rows", "draws", "features"), [(30, 7, 4), (5, 5, 5), (3, 3, 1), (1, 2, 4), (2, 1, 2)])
def test_the_log_joint_over_draws_is_that_of_each_draw_by_hand(
    name: str, classes: int, rows: int, draws: int, features: int
) -> None:
    """Also where the number of draws is that of rows, of units or of classes: the dimensions are not confused."""
    pair, data = make(name, classes, features), draw(classes, rows, features)
    drawn = prior_draws(pair, data, draws)
    x, y = data["x"].numpy(), data["y"].numpy()
    by_hand, one_by_one = [], []
    for s, theta in enumerate(each_draw(drawn)):
        likelihood = numpy_scores(theta, x, classes)[np.arange(rows), y].sum()
        by_hand.append(likelihood + numpy_prior(theta, features))
        fixed = poutine.condition(pair.model, {site: value[s] for site, value in drawn.items()})
        one_by_one.append(poutine.trace(fixed).get_trace(**data).log_prob_sum().item())
    np.testing.assert_allclose(log_joint(bind(pair, data), drawn), by_hand, rtol=1e-10)
    np.testing.assert_allclose(one_by_one, by_hand, rtol=1e-10)


@pairs
@classes
def test_losses_of_minibatches_average_to_the_loss_of_all_rows(name: str, classes: int) -> None:
    pair, data = make(name, classes, guide=AutoDelta), draw(classes)
    full = Trace_ELBO().loss(pair.model, pair.guide, **data)
    parts = torch.randperm(30).split(10)
    batches = [{"x": data["x"][rows], "y": data["y"][rows], "size": 30, "rows": rows} for rows in parts]
    losses = [Trace_ELBO().loss(pair.model, pair.guide, **batch) for batch in batches]
    assert np.mean(losses) == pytest.approx(full, rel=1e-12)
    assert np.ptp(losses) > 1e-3


# Predictions


@pairs
@classes
def test_prior_draws_have_the_sites_shapes_and_scales(name: str, classes: int) -> None:
    pair, data = make(name, classes), draw(classes, rows=6)
    drawn = inference.prior_predictive(pair, {"x": data["x"]}, draws=20_000)
    outputs = 1 if classes == 2 else classes
    expected: dict[str, tuple[tuple[int, ...], float]] = {
        "hidden_weights": ((5, 4), 0.75),
        "hidden_bias": ((5,), 1.5),
        "output_weights": ((outputs, 5), 1.5 / math.sqrt(5)),
        "output_bias": ((outputs,), 1.5),
    }
    if name == "logistic":
        scores = () if classes == 2 else (classes,)
        expected = {"weights": ((*scores, 4), 1.5), "intercept": (scores, 2.5)}
    assert list(drawn) == [*expected, "y"]
    for site, (shape, sd) in expected.items():
        assert drawn[site].shape == (20_000, *shape)
        np.testing.assert_allclose(drawn[site].mean(0), 0, atol=5 * sd / math.sqrt(20_000))
        np.testing.assert_allclose(drawn[site].std(0), sd, rtol=5 / math.sqrt(2 * 20_000))
    assert drawn["y"].shape == (20_000, 6)
    frequencies = torch.stack([(drawn["y"] == k).double().mean(0) for k in range(classes)])
    np.testing.assert_allclose(frequencies, 1 / classes, atol=5 * math.sqrt(0.25 / 20_000))


@pairs
@classes
def test_drawn_labels_have_the_classes_probabilities(name: str, classes: int) -> None:
    pair, x = make(name, classes), draw(classes, rows=4)["x"]
    theta = {site: value[0] for site, value in prior_draws(pair, {"x": x}, 1).items()}
    fixed = poutine.condition(pair.model, theta)
    drawn = torch.stack([fixed(x) for _ in range(3000)]).numpy()
    expected = np.exp(numpy_scores({site: value.numpy() for site, value in theta.items()}, x.numpy(), classes))
    frequencies = np.stack([(drawn == k).mean(0) for k in range(classes)], -1)
    np.testing.assert_array_less(abs(frequencies - expected), 5 * np.sqrt(expected * (1 - expected) / 3000) + 1e-3)


@pairs
@classes
def test_classify_is_the_mean_of_the_softmax_over_the_same_draws(name: str, classes: int) -> None:
    data, fresh = draw(classes), draw(classes, rows=9, seed=5)
    result = inference.fit(make(name, classes), data, steps=50, draws=40, progress=False)
    x = fresh["x"].numpy()
    by_hand = np.mean([np.exp(numpy_scores(theta, x, classes)) for theta in each_draw(result.draws)], 0)
    for asked in (fresh, {"x": fresh["x"]}, fresh["x"]):
        np.testing.assert_allclose(inference.classify(result, asked), by_hand, rtol=1e-8)


@pairs
def test_minibatches_learn_to_tell_wines_apart(name: str) -> None:
    wine = load("wine", standardise=True, dtype=torch.float64)
    pair = PAIRS[name](wine.features, wine.classes).double()
    result = inference.fit(pair, wine.train, steps=600, batch=50, learning_rate=0.05, draws=200, progress=False)
    guess = inference.classify(result, {"x": wine.test["x"]}).argmax(-1)
    assert (guess == wine.test["y"]).double().mean() > 0.9


@pairs
@classes
@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.float64, torch.uint8])
def test_labels_may_be_of_any_kind_of_number(name: str, classes: int, kind: torch.dtype) -> None:
    data = draw(classes)
    pair = make(name, classes, guide=AutoDelta)
    drawn = prior_draws(pair, data, 3)
    given = {"x": data["x"], "y": data["y"].to(kind)}
    np.testing.assert_array_equal(log_joint(bind(pair, given), drawn), log_joint(bind(pair, data), drawn))
    inference.fit(pair, given, steps=2, draws=1, progress=False)


def test_names_of_features_and_classes_are_coordinates() -> None:
    pair = LogisticRegression(["height", "width"], ["a", "b", "c"]).double()
    result = inference.fit(pair, draw(3, features=2), steps=2, draws=30, progress=False)
    weights = result.idata.posterior["weights"]
    assert weights.dims == ("chain", "draw", "classes", "features")
    assert weights.coords["features"].values.tolist() == ["height", "width"]
    assert result.idata.posterior["intercept"].coords["classes"].values.tolist() == ["a", "b", "c"]
    binary = inference.fit(make("logistic", 2), draw(2), steps=2, draws=30, progress=False)
    assert binary.idata.posterior["weights"].dims == ("chain", "draw", "features")
    assert binary.idata.posterior["intercept"].dims == ("chain", "draw")


# Bad input: one clear line


def spoil(value: float) -> Data:
    data = draw(3)
    data["x"][3, 1] = value
    return data


BAD: dict[str, tuple[Any, str]] = {
    "nan": (spoil(torch.nan), r"x: expected finite numbers, got nan at row 3, column 1 \(1 in all\)"),
    "inf": (spoil(torch.inf), r"x: expected finite numbers, got inf at row 3, column 1 \(1 in all\)"),
    "one dimension": ({**draw(3), "x": torch.zeros(30)}, r"x: expected \(rows, 4\), got \(30,\)"),
    "wrong width": ({**draw(3), "x": torch.zeros(30, 5)}, r"x: expected \(rows, 4\), got \(30, 5\)"),
    "no rows": (draw(3, rows=0), r"x: expected at least one row, got \(0, 4\)"),
    "no x": ({"y": draw(3)["y"]}, r"data: expected x, which the model needs, got y"),
    "no data": (None, r"data: expected x, which the model needs, got none"),
    "label too large": ({**draw(3), "y": torch.full((30,), 3)}, r"y: expected labels 0 to 2, got 3"),
    "label below 0": ({**draw(3), "y": torch.full((30,), -1)}, r"y: expected labels 0 to 2, got -1"),
    "half a label": ({**draw(3), "y": torch.full((30,), 0.5)}, r"y: expected labels 0 to 2, got 0\.5"),
    "missing": (
        {**draw(3), "y": torch.tensor([0.0, torch.nan] * 15)},
        r"y: expected a label for every row, got nan in 15 rows",
    ),
    "too few labels": (
        {**draw(3), "y": torch.zeros(29)},
        r"data: expected the same number of rows in each, got x 30, y 29",
    ),
    "labels in a column": (
        {**draw(3), "y": torch.zeros(30, 1)},
        r"y: expected one label per row \(30,\), got \(30, 1\)",
    ),
}


def refuses(act: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$") as raised:
        act()
    assert "\n" not in str(raised.value)


@pairs
@pytest.mark.parametrize("case", list(BAD))
def test_data_that_do_not_fit_are_refused_in_one_line(name: str, case: str) -> None:
    data, line = BAD[case]
    refuses(lambda: inference.fit(make(name, 3), data, progress=False), line)
    refuses(lambda: inference.sample(make(name, 3), data, progress=False), line)


@pairs
def test_sizes_that_make_no_classifier_are_refused_in_one_line(name: str) -> None:
    refuses(lambda: make(name, 1), "classes: expected at least 2, got 1")
    refuses(lambda: make(name, 2, 0), "features: expected at least one, got 0")
    refuses(lambda: inference.fit(make(name, 3), {"x": draw(3)["x"]}), r"data: the model observes nothing, .*; got x")
    line = r"batch: expected 1 to 30 \(the rows of the data\), got 31"
    refuses(lambda: inference.fit(make(name, 3), draw(3), batch=31), line)


def test_a_layer_without_units_is_refused_in_one_line() -> None:
    refuses(lambda: make("neural", 2, hidden=0), "hidden: expected an integer of at least 1, got 0")
