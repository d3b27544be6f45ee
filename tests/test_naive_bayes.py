"""Naive Bayes against closed forms: counts, conjugate posteriors, evidences, Bayes' rule by hand."""

import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import arviz_stats as azs
import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import sklearn.naive_bayes as sk
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

import inference
from inference import Result
from inference.core.bound import bind
from inference.draws.scoring import rowwise
from ppl_models.data.sets import load
from ppl_models.models.naive_bayes import (
    BernoulliNaiveBayes,
    Counts,
    GaussianNaiveBayes,
    MultinomialNaiveBayes,
    NaiveBayes,
)

REAL = os.environ.get("PPL_MODELS_DATA", "")
# Neither 0, 1 nor the defaults, so that one dropped or swapped shows; exact in binary, for pairs are built in float32.
PRIORS: dict[str, dict[str, float]] = {
    "gaussian": {"mean": 0.5, "strength": 0.75, "shape": 3.5, "scale": 1.25},
    "bernoulli": {"alpha": 0.625},
    "multinomial": {"alpha": 0.625, "length": 12},
}
CLASSES: dict[str, type[NaiveBayes]] = {
    "gaussian": GaussianNaiveBayes,
    "bernoulli": BernoulliNaiveBayes,
    "multinomial": MultinomialNaiveBayes,
}
CONCENTRATION = 1.75
Data = dict[str, Tensor]
families = pytest.mark.parametrize("family", list(CLASSES))


pytestmark = pytest.mark.usefixtures("alone")


def make(family: str, classes: int = 3, features: int = 4, **arguments: Any) -> NaiveBayes:
    arguments = {"concentration": CONCENTRATION, **PRIORS[family], **arguments}
    return CLASSES[family](features, classes, **arguments).double()


def draw(family: str, rows: int = 40, classes: int = 3, features: int = 4, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, classes, rows))
    if family == "gaussian":
        x = rng.normal(rng.normal(size=(classes, features))[y], rng.uniform(0.5, 2, (classes, features))[y])
    elif family == "bernoulli":
        x = rng.random((rows, features)) < rng.random((classes, features))[y]
    else:
        x = rng.multinomial(rng.integers(1, 15, rows), rng.dirichlet(np.ones(features), classes)[y])
    return {"x": torch.tensor(x, dtype=torch.float64), "y": torch.tensor(y)}


def fit_exactly(pair: NaiveBayes, data: Data, draws: int = 1000) -> Result:
    return inference.fit((pair.model, pair.exact), data, steps=0, draws=draws, progress=False)


def fit_mode(pair: NaiveBayes, data: Data, **arguments: Any) -> dict[str, np.ndarray]:
    result = inference.fit(pair, data, draws=1, progress=False, **arguments)
    return {name: value[0].numpy() for name, value in result.draws.items()}


def parameters(family: str, seed: int = 3) -> dict[str, Tensor]:
    """Parameters (K, D) drawn from the pair's prior."""
    drawn = inference.prior_predictive(make(family), size=1, draws=1, seed=seed)
    return {name: value[0] for name, value in drawn.items() if name not in ("x", "y")}


def numpy(theta: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in theta.items()}


def log_evidence(family: str, x: np.ndarray, y: np.ndarray, classes: int = 3) -> float:
    """log p(x, y) with the parameters integrated out: products of scipy's compound distributions."""
    p, a = PRIORS[family], CONCENTRATION
    counts = np.bincount(y, minlength=classes)
    total = scipy.special.gammaln([classes * a, *(a + counts)]).sum()
    total -= scipy.special.gammaln([classes * a + len(y), *[a] * classes]).sum()
    for k, n in enumerate(counts):
        one_hot = x[y == k]
        if n == 0:
            continue
        if family == "gaussian":
            spread = p["scale"] / p["shape"] * (np.eye(n) + 1 / p["strength"])
            law = scipy.stats.multivariate_t(np.full(n, p["mean"]), spread, df=2 * p["shape"])
            total += sum(law.logpdf(column) for column in one_hot.T)
        elif family == "bernoulli":
            ones, prior = one_hot.sum(0), p["alpha"] + 1
            total += (scipy.stats.betabinom.logpmf(ones, n, prior, prior) - log_binomial(n, ones)).sum()
        else:
            words = one_hot.sum(0).astype(int)
            prior = np.full(x.shape[1], p["alpha"] + 1)
            total += scipy.stats.dirichlet_multinomial.logpmf(words, prior, words.sum())
            total += log_arrangements(one_hot).sum() - log_arrangements(words)
    return float(total)


def log_binomial(n: int, k: np.ndarray) -> np.ndarray:
    return log_arrangements(np.stack([k, n - k], -1))


def log_arrangements(counts: np.ndarray) -> np.ndarray:
    """Log of the multinomial coefficient of the counts along the last axis."""
    return scipy.special.gammaln(counts.sum(-1) + 1) - scipy.special.gammaln(counts + 1).sum(-1)


def log_joint_of_rows(family: str, x: np.ndarray, theta: dict[str, np.ndarray]) -> np.ndarray:
    """log p(x_n, y_n = k) (rows, K) given the parameters, by scipy and numpy."""
    if family == "gaussian":
        distributions = scipy.stats.norm(theta["means"], np.sqrt(theta["variances"]))
        scores = distributions.logpdf(x[:, None]).sum(-1)
    elif family == "bernoulli":
        scores = scipy.stats.bernoulli(theta["probs"]).logpmf(x[:, None].astype(int)).sum(-1)
    else:
        probs = theta["probs"] / theta["probs"].sum(-1, keepdims=True)
        scores = log_arrangements(x)[:, None] + scipy.special.xlogy(x[:, None], probs).sum(-1)
    return scores + np.log(theta["weights"])


def each_draw(draws: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    size = len(next(iter(draws.values())))
    return [{name: value[s].numpy() for name, value in draws.items()} for s in range(size)]


def log_joint_of_draws(family: str, x: np.ndarray, draws: dict[str, Tensor]) -> np.ndarray:
    """log p(x_n, y_n = k) of each draw (S, rows, K)."""
    return np.stack([log_joint_of_rows(family, x, theta) for theta in each_draw(draws)])


def assert_draws_agree(draws: Tensor | np.ndarray, mean: Any, sd: Any = None, z: float = 5.0) -> None:
    """Mean and standard deviation of independent draws, within z of their standard errors."""
    draws, mean = np.asarray(draws, dtype=float), np.asarray(mean)
    spread = draws.std(0, ddof=1)
    np.testing.assert_array_less(abs(draws.mean(0) - mean), z * spread / np.sqrt(len(draws)) + 1e-12)
    if sd is not None:
        # A quantity that never moves has no kurtosis.
        kurtosis = np.nan_to_num(scipy.stats.kurtosis(draws, fisher=False), nan=1.0)
        error = spread * np.sqrt((kurtosis - 1) / (4 * len(draws)))
        np.testing.assert_array_less(abs(spread - np.asarray(sd)), z * error + 1e-12)


def assert_chains_agree(result: Result, moments: dict[str, tuple[Any, Any]], z: float = 5.0) -> None:
    """Mean and standard deviation of chains, within z Monte Carlo standard errors by the effective sample size."""
    for name, (mean, sd) in moments.items():
        array = result.idata.posterior[name]
        squares = (array - array.mean(("chain", "draw"))) ** 2
        # The error of a standard deviation by the delta method: that of the variance over 2 sd.
        errors = azs.mcse(array, method="mean"), azs.mcse(squares, method="mean") / (2 * array.std(("chain", "draw")))
        for method, true, error in zip(("mean", "std"), (mean, sd), errors, strict=True):
            found, error = getattr(array, method)(("chain", "draw")).values, error.values
            np.testing.assert_array_less(abs(found - np.asarray(true)), z * error)
            assert (error < 0.2 * np.asarray(sd)).all()  # enough draws for the comparison to mean something


# Maximum likelihood and maximum a posteriori


@pytest.mark.parametrize("name", ["iris", "wine"])
def test_maximum_likelihood_is_the_class_frequencies_means_and_variances(name: str) -> None:
    train = load(name, standardise=True, dtype=torch.float64).train
    x, y = train["x"], train["y"]
    pair = GaussianNaiveBayes(x.shape[1], 3, prior=False, guide=AutoDelta).double()
    found = fit_mode(pair, train, steps=600, learning_rate=0.1)
    one_hot = [x[y == k].numpy() for k in range(3)]
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-7)
    close(found["weights"], [len(m) / len(x) for m in one_hot])
    close(found["means"], [m.mean(0) for m in one_hot])
    close(found["variances"], [m.var(0) for m in one_hot])
    theirs = sk.GaussianNB(var_smoothing=0).fit(x, y)
    close(found["weights"], theirs.class_prior_)
    close(found["means"], theirs.theta_)
    close(found["variances"], theirs.var_)


@pytest.mark.parametrize(("family", "theirs"), [("bernoulli", sk.BernoulliNB), ("multinomial", sk.MultinomialNB)])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_mode_is_scikit_learns_smoothed_estimate(family: str, theirs: Any, alpha: float) -> None:
    digits = load("digits", binarise=family == "bernoulli", dtype=torch.float64).train
    train = {"x": digits["x"][::3, 10:30], "y": digits["y"][::3]}
    pair = make(family, 10, 20, alpha=alpha, concentration=1.0, guide=AutoDelta)
    found = fit_mode(pair, train, steps=500, learning_rate=1.0)
    reference = theirs(alpha=alpha).fit(train["x"], train["y"])
    np.testing.assert_allclose(found["probs"], np.exp(reference.feature_log_prob_), rtol=0, atol=2e-5)
    np.testing.assert_allclose(found["weights"], np.exp(reference.class_log_prior_), rtol=0, atol=1e-7)


def test_the_mode_of_the_gaussian_pair_is_that_of_its_conjugate_posterior() -> None:
    data = draw("gaussian")
    found = fit_mode(make("gaussian", guide=AutoDelta), data, steps=800, learning_rate=0.1)
    prior = PRIORS["gaussian"]
    for k in range(3):
        one_hot = data["x"][data["y"] == k].numpy()
        n, average = len(one_hot), one_hot.mean(0)
        strength, shape = prior["strength"] + n, prior["shape"] + n / 2
        mean = (prior["strength"] * prior["mean"] + n * average) / strength
        shift = prior["strength"] * n / strength * (average - prior["mean"]) ** 2
        scale = prior["scale"] + (((one_hot - average) ** 2).sum(0) + shift) / 2
        np.testing.assert_allclose(found["means"][k], mean, atol=1e-6)
        np.testing.assert_allclose(found["variances"][k], scale / (shape + 1.5), atol=1e-6)
        assert found["weights"][k] == pytest.approx((n + CONCENTRATION - 1) / (40 + 3 * (CONCENTRATION - 1)), abs=1e-7)


def test_maximum_likelihood_needs_no_prior_even_for_a_word_that_a_class_never_has() -> None:
    data = {"x": torch.tensor([[3.0, 0, 1], [1, 0, 1], [0, 2, 2]], dtype=torch.float64), "y": torch.tensor([0, 0, 1])}
    pair = make("multinomial", 2, 3, prior=False, guide=AutoDelta)
    found = fit_mode(pair, data, steps=1500, learning_rate=0.5)
    np.testing.assert_allclose(found["probs"], [[4 / 6, 0, 2 / 6], [0, 0.5, 0.5]], atol=1e-3)
    np.testing.assert_allclose(found["weights"], [2 / 3, 1 / 3], atol=1e-6)


# The conjugate posterior


def test_gaussian_posterior_moments_equal_numerical_integration() -> None:
    data = draw("gaussian", rows=7, classes=1, features=1)
    pair, prior, x = make("gaussian", 1, 1), PRIORS["gaussian"], data["x"].numpy().ravel()
    mean, log_variance = np.meshgrid(np.linspace(-12, 12, 3001), np.linspace(-6, 9, 1501), indexing="ij")
    variance = np.exp(log_variance)
    density = scipy.stats.invgamma(prior["shape"], scale=prior["scale"]).logpdf(variance) + log_variance
    density += scipy.stats.norm(prior["mean"], np.sqrt(variance / prior["strength"])).logpdf(mean)
    density += sum(scipy.stats.norm(mean, np.sqrt(variance)).logpdf(row) for row in x)

    def integrate(values: np.ndarray) -> float:
        inner = scipy.integrate.simpson(values * np.exp(density), x=log_variance[0], axis=1)
        return float(scipy.integrate.simpson(inner, x=mean[:, 0]))

    evidence = integrate(np.ones_like(mean))
    by_scipy = log_evidence("gaussian", data["x"].numpy(), data["y"].numpy(), 1)
    assert np.log(evidence) == pytest.approx(by_scipy, abs=1e-5)
    moments = pair.moments(**data)
    for name, values in (("means", mean), ("variances", variance)):
        average = integrate(values) / evidence
        sd = np.sqrt(integrate((values - average) ** 2) / evidence)
        assert moments[name][0].item() == pytest.approx(average, rel=1e-4)
        assert moments[name][1].item() == pytest.approx(sd, rel=1e-3)


def test_bernoulli_posterior_moments_equal_numerical_integration() -> None:
    data = draw("bernoulli", rows=9, classes=1, features=1)
    x, alpha = data["x"].numpy().ravel(), PRIORS["bernoulli"]["alpha"]

    def density(p: float) -> float:
        return float(scipy.stats.beta(alpha + 1, alpha + 1).pdf(p) * np.prod(np.where(x == 1, p, 1 - p)))

    assert_moments_of(density, *make("bernoulli", 1, 1).moments(**data)["probs"])


def test_multinomial_posterior_moments_equal_numerical_integration() -> None:
    data = draw("multinomial", rows=5, classes=1, features=2)
    words, alpha = data["x"].numpy().sum(0), PRIORS["multinomial"]["alpha"]

    def density(p: float) -> float:
        return float(scipy.stats.dirichlet([alpha + 1] * 2).pdf([p, 1 - p]) * p ** words[0] * (1 - p) ** words[1])

    mean, sd = make("multinomial", 1, 2).moments(**data)["probs"]
    assert_moments_of(density, mean[0, 0], sd[0, 0])


def test_class_weights_equal_numerical_integration() -> None:
    data = draw("bernoulli", rows=9, classes=2)
    ones = int(data["y"].sum())

    def density(p: float) -> float:
        return float(scipy.stats.beta(CONCENTRATION, CONCENTRATION).pdf(p) * p**ones * (1 - p) ** (9 - ones))

    mean, sd = make("bernoulli", 2).moments(**data)["weights"]
    assert_moments_of(density, mean[1], sd[1])


def assert_moments_of(density: Any, mean: Tensor, sd: Tensor) -> None:
    def integrate(power: int, centre: float = 0.0) -> float:
        return scipy.integrate.quad(lambda p: (p - centre) ** power * density(p), 0, 1)[0]

    average = integrate(1) / integrate(0)
    assert mean.item() == pytest.approx(average, rel=1e-6)
    assert sd.item() == pytest.approx(np.sqrt(integrate(2, average) / integrate(0)), rel=1e-6)


def log_exact(pair: NaiveBayes, data: Data, theta: dict[str, Tensor]) -> float:
    return poutine.trace(poutine.condition(pair.exact, theta)).get_trace(**data).log_prob_sum().item()


@families
def test_half_the_rows_and_then_the_other_half_are_all_rows_at_once(family: str) -> None:
    """p(theta | first) p(then | theta) / p(then | first) = p(theta | first, then), at any theta."""
    data, pair = draw(family), make(family)
    first, then = ({k: v[start::2] for k, v in data.items()} for start in (0, 1))
    evidence = [log_evidence(family, d["x"].numpy(), d["y"].numpy()) for d in (data, first)]
    for seed in range(5):
        theta = parameters(family, seed)
        likelihood = log_joint_of_rows(family, then["x"].numpy(), numpy(theta))[np.arange(20), then["y"].numpy()].sum()
        updated = log_exact(pair, first, theta) + likelihood - (evidence[0] - evidence[1])
        assert updated == pytest.approx(log_exact(pair, data, theta), rel=1e-9)


@families
@pytest.mark.parametrize("empty", [False, True])
def test_the_exact_guide_has_an_elbo_equal_to_the_log_evidence_without_variance(family: str, empty: bool) -> None:
    data = draw(family, classes=2 if empty else 3)
    expected = log_evidence(family, data["x"].numpy(), data["y"].numpy())
    pair = make(family)
    elbos = [-Trace_ELBO().loss(pair.model, pair.exact, **data) for _ in range(20)]
    np.testing.assert_allclose(elbos, expected, rtol=1e-10)


@families
def test_pareto_k_of_the_exact_guide_is_minus_infinity(family: str) -> None:
    result = fit_exactly(make(family), draw(family))
    assert result.diagnosis.pareto_k == -np.inf
    assert result.diagnosis.advice == ()


@families
def test_moments_are_those_of_many_draws_of_the_exact_guide(family: str) -> None:
    data, pair = draw(family), make(family)
    result, moments = fit_exactly(pair, data, draws=20_000), pair.moments(**data)
    assert set(result.draws) == set(moments)
    for name, (mean, sd) in moments.items():
        assert result.draws[name].shape == (20_000, *mean.shape)
        assert_draws_agree(result.draws[name], mean, sd)


@families
def test_without_rows_of_a_class_its_moments_are_the_priors(family: str) -> None:
    moments = make(family).moments(**draw(family, classes=2))
    p = PRIORS[family]
    if family == "gaussian":
        distributions = {
            "variances": scipy.stats.invgamma(p["shape"], scale=p["scale"]),
            "means": scipy.stats.t(2 * p["shape"], p["mean"], np.sqrt(p["scale"] / p["shape"] / p["strength"])),
        }
    else:
        rest = 1 if family == "bernoulli" else 3
        distributions = {"probs": scipy.stats.beta(p["alpha"] + 1, rest * (p["alpha"] + 1))}
    for name, law in distributions.items():
        mean, sd = (value[2].numpy() for value in moments[name])
        np.testing.assert_allclose(mean, law.mean(), rtol=1e-12)
        np.testing.assert_allclose(sd, law.std(), rtol=1e-12)


def test_moments_that_do_not_exist_are_infinite() -> None:
    """An inverse gamma has a mean for a > 1 and a variance for a > 2: an empty class has the prior's."""
    data = draw("gaussian", classes=2)
    mean, sd = make("gaussian", shape=1.5).moments(**data)["variances"]
    assert mean[2].isfinite().all()
    assert (sd[2] == torch.inf).all()
    mean, sd = make("gaussian", shape=0.5).moments(**data)["variances"]
    assert (mean[2] == torch.inf).all()
    assert (sd[2] == torch.inf).all()


def test_a_far_origin_moves_the_means_and_nothing_else() -> None:
    data, far = draw("gaussian"), 2.0**20
    near, moved = make("gaussian").moments(**data), make("gaussian", mean=0.5 + far).moments(data["x"] + far, data["y"])
    for name in near:
        for part in (0, 1):
            shift = far if (name, part) == ("means", 0) else 0.0
            torch.testing.assert_close(moved[name][part] - shift, near[name][part], rtol=1e-8, atol=1e-8)


@families
@pytest.mark.parametrize("known", ["all", "some", "none"])
def test_losses_of_minibatches_average_to_the_loss_of_all_rows(family: str, known: str) -> None:
    data, pair = draw(family), make(family, guide=AutoDelta)
    given = {"x": data["x"], "y": data["y"]} if known == "all" else {"x": data["x"], "y": missing(data["y"])}
    given = {"x": data["x"]} if known == "none" else given
    # An instance remembers the dimensions of its first run: a fresh one for every loss.
    model = pair.model if known == "all" else config_enumerate(pair.model)
    make_loss = Trace_ELBO if known == "all" else partial(TraceEnum_ELBO, max_plate_nesting=1)
    full = make_loss().loss(model, pair.guide, **given)
    parts = torch.randperm(40).split(10)
    batches = [{**{k: v[rows] for k, v in given.items()}, "size": 40, "rows": rows} for rows in parts]
    losses = [make_loss().loss(model, pair.guide, **batch) for batch in batches]
    assert np.mean(losses) == pytest.approx(full, rel=1e-10)
    assert np.ptp(losses) > 1e-3


@pytest.mark.parametrize("family", ["gaussian", "multinomial", pytest.param("bernoulli", marks=pytest.mark.slow)])
def test_nuts_agrees_with_the_exact_posterior(family: str) -> None:
    data, pair = draw(family, classes=2, features=2), make(family, 2, 2)
    result = inference.sample(pair, data, draws=150, warmup=100, chains=2, progress=False)
    assert_chains_agree(result, pair.moments(**data))


@families
def test_mean_field_svi_is_near_the_exact_posterior(family: str) -> None:
    """Not equal, for its family is not conjugate: with 50 rows per class it is off by well under a tenth."""
    data, pair = draw(family, rows=150, features=2), make(family, features=2)
    result = inference.fit(pair, data, steps=1500, draws=4000, progress=False)
    for name, (mean, sd) in pair.moments(**data).items():
        drawn = result.draws[name]
        assert ((drawn.mean(0) - mean) / sd).abs().max() < 0.2, name
        assert (drawn.std(0) / sd).log().abs().max() < 0.2, name


# Missing labels


def missing(y: Tensor, every: int = 2) -> Tensor:
    """Labels as floats, all but one in ``every`` missing."""
    return torch.where(torch.arange(len(y)) % every == 0, y.double(), torch.nan)


def score_rows(family: str, data: Data, theta: dict[str, Tensor]) -> np.ndarray:
    """Pointwise log likelihood at given parameters, as the library computes it."""
    return rowwise(bind(make(family), data), {name: value[None] for name, value in theta.items()})[0].numpy()


@families
def test_rows_without_labels_have_the_density_of_a_mixture(family: str) -> None:
    data, theta = draw(family), parameters(family)
    joint = log_joint_of_rows(family, data["x"].numpy(), numpy(theta))
    by_hand = scipy.special.logsumexp(joint, -1)
    for labels in ({}, {"y": torch.full((40,), torch.nan, dtype=torch.float64)}):
        np.testing.assert_allclose(score_rows(family, {"x": data["x"], **labels}, theta), by_hand, rtol=1e-8)


@families
def test_new_rows_without_labels_are_scored_after_a_fit_with_labels(family: str) -> None:
    fresh = draw(family, rows=5, seed=8)["x"]
    result = fit_exactly(make(family), draw(family), draws=30)
    by_hand = scipy.special.logsumexp(log_joint_of_draws(family, fresh.numpy(), result.draws), -1)
    np.testing.assert_allclose(inference.pointwise_log_likelihood(result, {"x": fresh}), by_hand, rtol=1e-8)


@families
def test_rows_with_a_label_have_the_joint_density_and_the_others_the_mixtures(family: str) -> None:
    data, theta = draw(family), parameters(family)
    y = missing(data["y"])
    joint = log_joint_of_rows(family, data["x"].numpy(), numpy(theta))
    labelled = joint[np.arange(40), data["y"].numpy()]
    by_hand = np.where(y.isnan(), scipy.special.logsumexp(joint, -1), labelled)
    np.testing.assert_allclose(score_rows(family, {"x": data["x"], "y": y}, theta), by_hand, rtol=1e-8)
    for known in (data["y"], data["y"].double()):
        np.testing.assert_allclose(score_rows(family, {"x": data["x"], "y": known}, theta), labelled, rtol=1e-8)


@families
def test_the_enumerated_elbo_at_given_parameters_is_minus_the_log_likelihood(family: str) -> None:
    data, theta = draw(family), parameters(family)
    joint = log_joint_of_rows(family, data["x"].numpy(), numpy(theta))
    fixed = config_enumerate(poutine.condition(make(family, prior=False).model, theta))
    loss = partial(TraceEnum_ELBO(max_plate_nesting=1).loss, fixed, lambda **_: None)
    unlabelled = scipy.special.logsumexp(joint, -1)
    assert loss(x=data["x"]) == pytest.approx(-unlabelled.sum(), rel=1e-8)
    y = missing(data["y"])
    partly = np.where(y.isnan(), unlabelled, joint[np.arange(40), data["y"].numpy()])
    assert loss(x=data["x"], y=y) == pytest.approx(-partly.sum(), rel=1e-8)


@families
@pytest.mark.parametrize("known", ["none", "some", "all"])
def test_gradients_are_finite_for_every_parameter_with_labels_missing(family: str, known: str) -> None:
    data, pair = draw(family), make(family)
    every = {"none": 1000, "some": 2, "all": 1}[known]
    y = missing(data["y"], every).clone()
    y[0] = torch.nan if known == "none" else y[0]
    TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(config_enumerate(pair.model), pair.guide, x=data["x"], y=y)
    gradients = {name: parameter.grad for name, parameter in pair.named_parameters()}
    assert gradients
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert (gradient != 0).any(), name


def completions(family: str, data: Data, hidden: list[int], classes: int) -> tuple[list[Data], np.ndarray]:
    """Every way to label the hidden rows, and its posterior probability: the ratio of evidences."""
    ways = []
    for labels in itertools.product(range(classes), repeat=len(hidden)):
        y = data["y"].clone()
        y[hidden] = torch.tensor(labels)
        ways.append({"x": data["x"], "y": y})
    evidence = [log_evidence(family, way["x"].numpy(), way["y"].numpy(), classes) for way in ways]
    return ways, scipy.special.softmax(evidence)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "multinomial"])
def test_nuts_with_labels_missing_agrees_with_the_sum_over_all_ways_to_label(family: str) -> None:
    """The exact posterior is a mixture of conjugate ones, and p(y | x, known labels) a sum of its weights."""
    data, pair = draw(family, rows=16, classes=2, features=2, seed=4), make(family, 2, 2)
    hidden = [1, 5, 9, 14]
    ways, weights = completions(family, data, hidden, 2)
    moments = [pair.moments(**way) for way in ways]
    mixed = {}
    for name in moments[0]:
        means, sds = (np.stack([m[name][part].numpy() for m in moments]) for part in (0, 1))
        mean = np.tensordot(weights, means, 1)
        mixed[name] = mean, np.sqrt(np.tensordot(weights, sds**2 + means**2, 1) - mean**2)
    y = data["y"].double()
    y[hidden] = torch.nan
    result = inference.sample(pair, {"x": data["x"], "y": y}, draws=300, warmup=150, chains=2, progress=False)
    assert_chains_agree(result, mixed)
    ones = sum(w * way["y"].numpy() for w, way in zip(weights, ways, strict=True))
    drawn = result.idata.posterior["y"].mean(("chain", "draw")).values
    np.testing.assert_allclose(drawn, ones, atol=0.08)
    assert ((ones[hidden] > 0.1) & (ones[hidden] < 0.9)).sum() >= 2  # the labels of these rows are uncertain


@pytest.mark.parametrize("known", ["partly", pytest.param("not at all", marks=pytest.mark.slow)])
def test_labels_of_separated_classes_are_recovered(known: str) -> None:
    # Class k has the mean 3 in four features of its own: two classes are 3 * sqrt(8) = 8.5 standard deviations apart.
    truth = 3.0 * torch.eye(3, dtype=torch.float64).repeat_interleave(4, 1)
    torch.manual_seed(2)
    labels = torch.randint(3, (400,))
    data = {"x": truth[labels] + torch.randn(400, 12, dtype=torch.float64), "y": labels}
    y = missing(data["y"], every=4)
    given = {"x": data["x"], "y": y} if known == "partly" else {"x": data["x"]}
    # Without labels the classes have no names, and a start may put two of them into one: the best of several counts.
    results = [
        inference.fit(GaussianNaiveBayes(12, 3).double(), given, steps=500, draws=200, progress=False, seed=seed)
        for seed in range(1 if known == "partly" else 4)
    ]
    result = min(results, key=lambda r: r.losses[-50:].mean())
    posterior = result.idata.posterior["y"]
    assert posterior.dims == ("chain", "draw", "rows")
    mode = torch.as_tensor(scipy.stats.mode(posterior.values.reshape(200, 400), axis=0).mode)
    names = torch.tensor([0, 1, 2])
    if known == "not at all":
        names = torch.stack([torch.bincount(data["y"][mode == k], minlength=3).argmax() for k in range(3)])
    assert (names[mode] == data["y"]).double().mean() > 0.97
    means = result.draws["means"].mean(0)
    assert (means - truth[names]).abs().max() < 0.5
    if known == "partly":
        assert (torch.as_tensor(posterior.values[0, :, ::4]) == data["y"][::4]).all()


@families
def test_drawn_labels_follow_bayes_rule(family: str) -> None:
    data, pair = draw(family), make(family)
    y = missing(data["y"])
    given = {"x": data["x"], "y": y}
    result = inference.fit(pair, given, steps=30, draws=1500, progress=False)
    probabilities = scipy.special.softmax(log_joint_of_draws(family, data["x"].numpy(), result.draws), -1)
    hidden = y.isnan().numpy()
    drawn = result.idata.posterior["y"].values[0]
    assert (drawn[:, ~hidden] == data["y"].numpy()[~hidden]).all()
    frequencies = (drawn[:, hidden, None] == np.arange(3)).mean(0)
    expected = probabilities[:, hidden]
    error = np.sqrt((expected * (1 - expected)).mean(0) / 1500)
    np.testing.assert_array_less(abs(frequencies - expected.mean(0)), 5 * error + 1e-3)


# Classification by Bayes' rule


@families
def test_classify_is_bayes_rule_over_the_same_draws(family: str) -> None:
    data, fresh = draw(family), draw(family, rows=9, seed=8)
    result = fit_exactly(make(family), data, draws=50)
    joint = log_joint_of_draws(family, fresh["x"].numpy(), result.draws)
    by_hand = scipy.special.softmax(scipy.special.logsumexp(joint, 0), -1)
    for asked in (fresh, {"x": fresh["x"]}, fresh["x"]):
        found = inference.classify(result, asked)
        np.testing.assert_allclose(found, by_hand, rtol=1e-6, atol=1e-12)


@families
def test_classify_with_the_exact_posterior_approaches_the_closed_form_predictive(family: str) -> None:
    """p(x, y | D) is a ratio of evidences: a product of Student t, Beta-Bernoulli or Dirichlet-multinomial."""
    data, fresh = draw(family), draw(family, rows=6, seed=8)
    x, y = data["x"].numpy(), data["y"].numpy()
    joint = np.array(
        [
            [log_evidence(family, np.vstack([x, row]), np.append(y, k)) - log_evidence(family, x, y) for k in range(3)]
            for row in fresh["x"].numpy()
        ]
    )
    result = fit_exactly(make(family), data, draws=40_000)
    densities = np.stack([score_draws(result, {"x": fresh["x"], "y": torch.full((6,), k)}) for k in range(3)], -1)
    ratios = densities / np.exp(joint)
    # Beyond a spread of three the draws have too heavy a tail to know the error of their mean.
    known = ratios.std(0) < 3
    assert known.sum() >= 3
    assert_draws_agree(ratios[:, known], np.ones(known.sum()))
    probabilities = inference.classify(result, fresh).numpy()
    # The error of a ratio of means, by the delta method.
    means = densities.mean(0)
    parts = (densities - probabilities * densities.sum(-1, keepdims=True)) / means.sum(-1, keepdims=True)
    error = parts.std(0) / len(densities) ** 0.5
    assert (np.abs(probabilities - scipy.special.softmax(joint, -1)) < 5 * error + 1e-9).all()
    assert error.max() < 0.02


def score_draws(result: Result, data: Data) -> np.ndarray:
    return inference.pointwise_log_likelihood(result, data).exp().numpy()


def test_the_gaussian_predictive_is_a_product_of_student_ts() -> None:
    data = draw("gaussian")
    x, y, new = data["x"].numpy(), data["y"].numpy(), np.array([0.3, -1.0, 2.0, 0.1])
    prior, by_hand = PRIORS["gaussian"], []
    for k in range(3):
        one_hot = x[y == k]
        n, average = len(one_hot), one_hot.mean(0)
        strength, shape = prior["strength"] + n, prior["shape"] + n / 2
        shift = prior["strength"] * n / strength * (average - prior["mean"]) ** 2
        scale = prior["scale"] + (((one_hot - average) ** 2).sum(0) + shift) / 2
        mean = (prior["strength"] * prior["mean"] + n * average) / strength
        spread = np.sqrt(scale / shape * (1 + 1 / strength))
        by_hand.append(scipy.stats.t(2 * shape, mean, spread).logpdf(new).sum() + np.log(CONCENTRATION + n))
    found = inference.classify(fit_exactly(make("gaussian"), data, draws=40_000), torch.tensor(new)[None])
    np.testing.assert_allclose(found[0], scipy.special.softmax(by_hand), atol=0.01)


@pytest.mark.skipif(not REAL, reason="PPL_MODELS_DATA is not set")
def test_bernoulli_on_xwindows_scores_murphys_accuracy() -> None:
    """Murphy 2012, section 3.5: 600 words, 900 documents to train on and 900 to test."""
    documents = load("xwindows", dtype=torch.float64)
    pair = BernoulliNaiveBayes(documents.features, documents.classes, alpha=1.0, guide=AutoDelta).double()
    result = inference.fit(pair, documents.train, steps=500, learning_rate=1.0, draws=1, progress=False)
    one_hot = [documents.train["x"][documents.train["y"] == k].numpy() for k in (0, 1)]
    smoothed = [(m.sum(0) + 1) / (len(m) + 2) for m in one_hot]
    np.testing.assert_allclose(result.draws["probs"][0], smoothed, atol=1e-4)
    guess = inference.classify(result, {"x": documents.test["x"]}).argmax(-1)
    assert (guess == documents.test["y"]).double().mean().item() == pytest.approx(0.8133, abs=5e-5)


# Draws of the model


@families
def test_ancestral_samples_have_the_priors_moments(family: str) -> None:
    pair = make(family, 3, 2)
    drawn = inference.prior_predictive(pair, size=4, draws=20_000)
    shapes = {name: tuple(value.shape[1:]) for name, value in drawn.items()}
    parameters = {"means": (3, 2), "variances": (3, 2)} if family == "gaussian" else {"probs": (3, 2)}
    assert shapes == {"weights": (3,), **parameters, "y": (4,), "x": (4, 2)}
    p, x = PRIORS[family], drawn["x"].numpy()
    weight = scipy.stats.beta(CONCENTRATION, 2 * CONCENTRATION)
    assert_draws_agree(drawn["weights"], [weight.mean()] * 3, [weight.std()] * 3)
    for k in range(3):
        assert_draws_agree(drawn["y"] == k, [1 / 3] * 4)
    if family == "gaussian":
        law = scipy.stats.t(2 * p["shape"], p["mean"], np.sqrt(p["scale"] / p["shape"] * (1 + 1 / p["strength"])))
        assert_draws_agree(x, np.full((4, 2), law.mean()), np.full((4, 2), law.std()))
    elif family == "bernoulli":
        assert set(np.unique(x)) == {0.0, 1.0}
        assert_draws_agree(x, np.full((4, 2), 0.5))
    else:
        assert (x.sum(-1) == 12).all()
        law = scipy.stats.betabinom(12, p["alpha"] + 1, p["alpha"] + 1)
        assert_draws_agree(x, np.full((4, 2), 6.0), np.full((4, 2), law.std()))
    # Two rows of one draw share its parameters where they share a class: they are not independent.
    same = (drawn["y"][:, 0] == drawn["y"][:, 1]).numpy()
    assert np.corrcoef(x[same, 0, 0], x[same, 1, 0])[0, 1] > 0.1
    assert abs(np.corrcoef(x[~same, 0, 0], x[~same, 1, 0])[0, 1]) < 5 / np.sqrt((~same).sum())


def test_the_model_itself_draws_rows_by_size() -> None:
    with torch.no_grad():
        assert make("gaussian", features=["height", "width"]).model(size=7).shape == (7, 2)


@families
def test_replicates_have_the_moments_of_the_predictive(family: str) -> None:
    """The predictive of a class has the posterior mean of its parameters as its mean."""
    data, pair = draw(family), make(family)
    result = fit_exactly(pair, data, draws=20_000)
    assert result.idata.posterior_predictive["x"].shape == (1, 20_000, 40, 4)
    moments = {name: mean for name, (mean, _) in pair.moments(**data).items()}
    for asked, rows in ((None, 40), ({"x": data["x"][:5]}, 5)):
        drawn = inference.posterior_predictive(result, asked)
        assert set(drawn) == {"y", "x"}
        assert drawn["y"].shape == (20_000, rows)
        assert drawn["x"].shape == (20_000, rows, 4)
        for k in range(3):
            assert_draws_agree(drawn["y"] == k, moments["weights"][k].expand(rows))
        by_class = moments["means" if family == "gaussian" else "probs"]
        average = (moments["weights"] @ by_class).expand(rows, 4)
        lengths = data["x"].sum(-1, keepdim=True)[:rows] if family == "multinomial" else 1.0
        assert_draws_agree(drawn["x"], average * lengths)
        if family == "multinomial":
            assert (drawn["x"].sum(-1) == data["x"].sum(-1)[:rows]).all()
    new = inference.posterior_predictive(result, {}, size=3)
    assert new["x"].shape == (20_000, 3, 4)


def test_variances_of_gaussian_replicates_are_those_of_the_predictive() -> None:
    data, pair = draw("gaussian"), make("gaussian")
    moments = {name: mean for name, (mean, _) in pair.moments(**data).items()}
    spread = pair.moments(**data)["means"][1] ** 2
    mean = moments["weights"] @ moments["means"]
    variance = moments["weights"] @ (moments["variances"] + spread + moments["means"] ** 2) - mean**2
    drawn = inference.posterior_predictive(fit_exactly(pair, data, draws=20_000), data["x"][:2])
    assert_draws_agree(drawn["x"], mean.expand(2, 4), variance.sqrt().expand(2, 4))


LENGTHS = torch.tensor([5.0, 0.0, 31.0, 1.0], dtype=torch.float64)


def counts(batch: tuple[int, ...] = (4,), features: int = 6) -> Counts:
    probs = torch.tensor(np.random.default_rng(5).dirichlet(np.ones(features), batch))
    return Counts(probs, LENGTHS)


def test_counts_score_as_scipys_multinomial() -> None:
    law = counts()
    assert law.batch_shape == (4,)
    assert law.event_shape == (6,)
    pyro.set_rng_seed(0)
    value = law.sample(torch.Size([7]))
    probs = law.probs.numpy()
    pmf = scipy.stats.multinomial.logpmf
    by_hand = [[pmf(value[s, n].numpy(), int(LENGTHS[n]), probs[n]) for n in range(4)] for s in range(7)]
    np.testing.assert_allclose(law.log_prob(value), by_hand, atol=1e-10)


def test_counts_of_a_row_sum_to_one_over_all_values() -> None:
    law = Counts(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64))
    values = [v for v in itertools.product(range(5), repeat=3) if sum(v) == 4]
    assert law.log_prob(torch.tensor(values, dtype=torch.float64)).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("batch", [(), (4,), (3, 1), (3, 4)])
def test_samples_of_counts_have_the_given_lengths_and_the_multinomials_moments(batch: tuple[int, ...]) -> None:
    law = counts(batch)
    pyro.set_rng_seed(0)
    drawn = law.sample(torch.Size([20_000]))
    full = torch.broadcast_shapes(batch, (4,))
    assert law.batch_shape == full
    assert drawn.shape == (20_000, *full, 6)
    assert (drawn.sum(-1) == LENGTHS).all()
    assert (drawn == drawn.floor()).all()
    assert (drawn >= 0).all()
    p = law.probs.expand(*full, 6)
    n = LENGTHS[:, None]
    assert_draws_agree(drawn, n * p, (n * p * (1 - p)).sqrt())
    products = (drawn[..., 0] - n[:, 0] * p[..., 0]) * (drawn[..., 1] - n[:, 0] * p[..., 1])
    # Where the two rarely occur together, 20,000 draws do not show how products spread.
    together = (n[:, 0] * p[..., 0] * n[:, 0] * p[..., 1] * len(drawn) > 100).expand(products.shape[1:])
    assert together.any()
    assert_draws_agree(products[:, together], (-n[:, 0] * p[..., 0] * p[..., 1]).expand(products.shape[1:])[together])


def test_counts_expand_and_may_be_of_length_zero() -> None:
    law = Counts(torch.tensor([0.25, 0.75], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))
    wide = law.expand(torch.Size([2, 5]))
    assert wide.batch_shape == (2, 5)
    assert wide.sample().shape == (2, 5, 2)
    assert wide.log_prob(torch.tensor([1.0, 2.0])).shape == (2, 5)
    empty = Counts(torch.tensor([0.25, 0.75], dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert (empty.sample() == 0).all()
    assert (empty.log_prob(empty.sample()) == 0).all()


# Bad input: one clear line


def spoil(family: str, value: float) -> Data:
    data = draw(family)
    x = data["x"].clone()
    x[3, 1] = value
    return {**data, "x": x}


def ruined(**changes: Any) -> Data:
    return {**draw("gaussian"), **changes}


LABELS = "y: expected labels 0 to 2, or nan where one is missing,"
BAD = {
    "nan": (spoil("gaussian", torch.nan), r"x: expected finite numbers, got nan at row 3, column 1 \(1 in all\)"),
    "inf": (spoil("gaussian", -torch.inf), r"x: expected finite numbers, got -inf at row 3, column 1 \(1 in all\)"),
    "one dimension": (ruined(x=torch.zeros(40)), r"x: expected \(rows, 4\), got \(40,\)"),
    "three dimensions": (ruined(x=torch.zeros(40, 4, 1)), r"x: expected \(rows, 4\), got \(40, 4, 1\)"),
    "no rows": ({"x": torch.zeros(0, 4)}, r"x: expected at least one row, got \(0, 4\)"),
    "wrong width": (ruined(x=torch.zeros(40, 3)), r"x: expected \(rows, 4\), got \(40, 3\)"),
    "number": (ruined(x=3.0), r"x: expected \(rows, 4\), got float"),
    "label too large": (ruined(y=torch.full((40,), 3)), rf"{LABELS} got 3"),
    "label below 0": (ruined(y=torch.full((40,), -1)), rf"{LABELS} got -1"),
    "half a label": (ruined(y=torch.full((40,), 0.5)), rf"{LABELS} got 0\.5"),
    "too few labels": (ruined(y=torch.zeros(39)), r"data: expected the same number of rows in each, got x 40, y 39"),
    "labels in a column": (ruined(y=torch.zeros(40, 1)), r"y: expected one label per row \(40,\), got \(40, 1\)"),
    "label for all": (ruined(y=1), r"y: expected one label per row \(40,\), got int"),
    "other names": (
        {"x": draw("gaussian")["x"], "z": torch.zeros(40)},
        r"data: expected arguments of the model .x, y, .*got .*z",
    ),
}


def refuses(act: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as raised:
        act()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", list(BAD))
@pytest.mark.parametrize("verb", [inference.fit, inference.sample])
def test_data_that_do_not_fit_are_refused_in_one_line(verb: Any, case: str) -> None:
    data, line = BAD[case]
    refuses(lambda: verb(make("gaussian"), data, progress=False), f"^{line}$")


@pytest.mark.parametrize("value", [2.0, 0.5, -1.0])
def test_bernoulli_refuses_what_is_not_binary(value: float) -> None:
    data = spoil("bernoulli", value)
    refuses(lambda: inference.fit(make("bernoulli"), data), f"^x: expected zeros and ones, got {value:g}$")


@pytest.mark.parametrize("value", [-1.0, 1.5])
def test_multinomial_refuses_what_is_not_a_count(value: float) -> None:
    data = spoil("multinomial", value)
    refuses(
        lambda: inference.fit(make("multinomial"), data), rf"^x: expected counts \(0, 1, 2, \.\.\.\), got {value:g}$"
    )


@pytest.mark.parametrize("batch", [41, 0, 2.5])
def test_a_batch_is_a_part_of_the_rows(batch: Any) -> None:
    line = rf"^batch: expected 1 to 40 \(the rows of the data\), got {batch}$"
    refuses(lambda: inference.fit(make("gaussian"), draw("gaussian"), batch=batch), line)


def test_labels_alone_and_rows_without_a_size_are_refused() -> None:
    pair, x = make("gaussian"), draw("gaussian")["x"]
    refuses(lambda: pair.model(), "^size: expected the number of rows to draw when x is not given, got None$")
    refuses(lambda: pair.check(y=torch.full((3,), 7)), f"^{LABELS} got 7$")
    refuses(lambda: pair.check(x=x, y=torch.zeros(39)), r"^y: expected one label per row \(40,\), got \(39,\)$")
    refuses(lambda: make("gaussian", features=0), "^features: expected at least one, got 0$")


@families
def test_the_conjugate_posterior_refuses_missing_labels(family: str) -> None:
    data, pair = draw(family), make(family)
    line = "^y: expected a label for every row .*, got missing ones$"
    for y in (missing(data["y"]), None):
        refuses(lambda y=y: pair.moments(data["x"], y), line)
        refuses(lambda y=y: pair.exact(data["x"], y), line)


@pytest.mark.parametrize("kind", [torch.int32, torch.float32, torch.float64, torch.uint8, torch.bool])
def test_labels_may_be_of_any_kind_of_number(kind: torch.dtype) -> None:
    data = draw("gaussian", classes=2)
    pair = make("gaussian", 2)
    given = {"x": data["x"], "y": data["y"].to(kind)}
    found, expected = pair.moments(**given), pair.moments(**data)
    assert all((found[name][part] == expected[name][part]).all() for name in expected for part in (0, 1))
    assert fit_exactly(pair, given).diagnosis.pareto_k == -np.inf
