"""Estimators of scikit-learn: its own checks, and figures against scikit-learn, SciPy and closed forms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta
from scipy.special import expit, logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import BernoulliNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, scale
from sklearn.utils.estimator_checks import parametrize_with_checks

from ppl_models import PPCA, ZOO, Pair
from ppl_models.sklearn import PairClassifier, PairDensity, PairTransformer

pytestmark = pytest.mark.usefixtures("alone")

close = np.testing.assert_allclose
WINE = load_wine(as_frame=True)


def blobs(rows: int = 60, seed: int = 0) -> np.ndarray:
    """Rows of two groups, far from each other."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, 2)) * (1.0, 0.5) + np.where(np.arange(rows) % 3, 4.0, -4.0)[:, None]


def bits(rows: int = 40, features: int = 4, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.random((rows, features)) < expit(random.normal(size=(rows, 1)))).astype(float)


def states(features: int) -> np.ndarray:
    """All binary rows."""
    return np.array(np.meshgrid(*[[0.0, 1.0]] * features)).reshape(features, -1).T


@parametrize_with_checks(
    [
        PairClassifier(draws=10),
        PairDensity(settings={"components": 2, "covariance": "tied"}, steps=2, draws=2),
        PairTransformer("factor_analysis", settings={"factors": 1}, steps=2, draws=2),
    ]
)
def test_the_contract_of_scikit_learn(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in (PairClassifier, PairDensity, PairTransformer) for n in k.entries]
)
def test_every_entry_that_is_named_works(kind: type, name: str) -> None:
    x = np.random.default_rng(0).normal(size=(40, 4)) if ZOO[name].prepare.get("standardise") else bits()
    steps = {} if ZOO[name].fit is ZOO["naive_bayes"].fit else {"steps": 1}
    estimator = kind(name, settings=ZOO[name].small, draws=2, **steps).fit(x, np.arange(len(x)) % 2)
    if kind is PairClassifier:
        close(estimator.predict_proba(x).sum(-1), 1.0)
    elif kind is PairDensity:
        assert np.isfinite(estimator.set_params(particles=2).score(x)) and estimator.sample(3).shape == (3, 4)
    else:
        z = estimator.transform(x)
        assert z.shape == (len(x), len(estimator.get_feature_names_out()))
        if hasattr(estimator, "inverse_transform"):
            assert estimator.inverse_transform(z).shape == x.shape


# ---- The classifier


def test_probabilities_of_classes_are_those_of_the_exact_predictive() -> None:
    """With a Beta(2, 2) prior it is scikit-learn's BernoulliNB at alpha 2, and Laplace's rule for the classes."""
    x, y = bits(), np.array(["no", "yes"])[(np.arange(40) % 3 == 0).astype(int)]
    pair = PairClassifier("bernoulli_naive_bayes", draws=4000).fit(x, y)
    frequency = (np.unique(y, return_counts=True)[1] + 1) / (len(y) + 2)
    peer = BernoulliNB(alpha=2.0, class_prior=frequency).fit(x, y)
    assert list(pair.classes_) == ["no", "yes"]
    close(pair.predict_proba(states(4)), peer.predict_proba(states(4)), atol=0.02)


def test_the_defaults_are_those_of_the_entry() -> None:
    entry = ZOO["naive_bayes"]
    wine = entry.load("wine")
    run = entry.fit(entry.pair(wine), wine.train, seed=3, progress=False)
    pair = PairClassifier(random_state=3).fit(wine.train["x"].numpy(), wine.train["y"].numpy())
    assert all(torch.equal(v, run.draws[n]) for n, v in pair.result_.draws.items())


def test_a_frame_with_named_columns_and_classes_names_the_quantities() -> None:
    x, y = WINE.data[["alcohol", "hue"]], np.array(["Barolo", "Grignolino", "Barbera"])[WINE.target]
    pair = PairClassifier(draws=10).fit(x, y)
    assert list(pair.feature_names_in_) == ["alcohol", "hue"]
    assert "means[Grignolino, hue]" in pair.result_.summary().index
    assert set(pair.predict(x)) <= set(y)


def test_a_pipeline_classifies_held_out_rows() -> None:
    pipeline = make_pipeline(StandardScaler(), PairClassifier(draws=50))
    assert cross_val_score(pipeline, WINE.data, WINE.target, cv=3).min() > 0.85


# ---- The density


def test_the_density_of_probabilistic_pca_is_that_of_its_covariance() -> None:
    x = scale(WINE.data)
    pca = PCA(2).fit(x)
    # Scikit-learn divides by N - 1.
    covariance = pca.get_covariance() * (len(x) - 1) / len(x)
    truth = multivariate_normal(pca.mean_, covariance)
    pair = PairDensity(PPCA, "closed form", settings={"factors": 2}, draws=1).fit(x)
    close(pair.score_samples(x), truth.logpdf(x), rtol=1e-9)
    drawn = pair.sample(4000)
    # The largest of 91 errors of a covariance, in standard errors of draws of the same normal distribution.
    sd = np.sqrt((np.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2) / len(drawn))
    assert np.abs((np.cov(drawn.T) - covariance) / sd).max() < 6


def test_a_mixture_by_em_is_that_of_scikit_learn() -> None:
    x = blobs()
    settings = {"components": 2, "covariance": "full"}
    pair = PairDensity(settings=settings, steps=30, draws=2).fit(x)
    peer = GaussianMixture(2, tol=1e-9, random_state=0).fit(x)
    close(pair.score_samples(x), peer.score_samples(x), atol=1e-3)
    assert pair.score(x) == pytest.approx(peer.score(x), abs=1e-3)
    groups = PairTransformer("gaussian_mixture", settings=settings, steps=30, draws=2).fit(x)
    order = peer.means_[:, 0].argsort()
    close(groups.transform(x), peer.predict_proba(x)[:, order], atol=1e-4)
    assert not hasattr(groups, "inverse_transform")


def test_a_density_averages_over_the_posterior_of_the_parameters() -> None:
    """log (1 / S) sum_s sum_k w_sk N(x; m_sk, s_sk), by SciPy, of draws that differ."""
    rows = blobs()
    fitted = PairDensity("gaussian_mixture", "SVI", settings={"components": 2}, steps=20, draws=30).fit(rows)
    weights, means, scales = (fitted.result_.draws[n].double().numpy() for n in ("weights", "means", "scales"))
    x = rows[:5, None, None]
    joint = np.log(weights) + norm(means, scales).logpdf(x).sum(-1)
    expected = logsumexp(logsumexp(joint, -1), -1) - np.log(len(weights))
    assert means.std(0).max() > 0.01
    np.testing.assert_allclose(fitted.score_samples(rows[:5]), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["bernoulli_mixture", "made", "vae"])
def test_probabilities_of_binary_rows_sum_to_one(name: str) -> None:
    pair = PairDensity(name, settings=ZOO[name].small, steps=2, draws=2, particles=4000).fit(bits())
    assert np.exp(pair.score_samples(states(4))).sum() == pytest.approx(1, abs=0.05)
    assert set(np.unique(pair.sample(20))) == {0.0, 1.0}


def test_rows_are_drawn_from_all_of_the_posterior() -> None:
    """Of a posterior that is wider than a row's own noise, each row has a draw of its own."""
    pair = PairDensity(Shifted, draws=500, steps=1).fit(np.zeros((4, 2)))
    pair.result_.draws["shift"][:] = torch.arange(500.0)[:, None] * 100
    assert len(set((pair.sample(500)[:, 0] / 100).round())) == 500
    assert pair.sample(7).shape == (7, 2) and pair.sample(1203).shape == (1203, 2)
    assert np.array_equal(pair.sample(5, random_state=1), pair.sample(5, random_state=1))
    assert not np.array_equal(pair.sample(5, random_state=1), pair.sample(5, random_state=2))


def test_a_grid_search_finds_the_number_of_factors() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 2)) @ [[3.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0, 3.0]] + random.normal(
        size=(200, 5)
    )
    search = GridSearchCV(PairDensity("ppca", "closed form", draws=2), {"settings": [{"factors": k} for k in (1, 2)]})
    assert search.fit(x).best_params_["settings"] == {"factors": 2}


# ---- The transformer


def test_factors_of_probabilistic_pca_are_the_shrunken_scores_of_pca() -> None:
    """Posterior means are scores over their standard deviations, times sqrt(1 - noise / variance)."""
    x = WINE.data
    pipeline = make_pipeline(StandardScaler().set_output(transform="pandas"), PairTransformer("ppca", "closed form"))
    z = pipeline.fit_transform(x)
    pca = PCA(2).fit(scale(x))
    variance, noise = (v * (len(x) - 1) / len(x) for v in (pca.explained_variance_, pca.noise_variance_))
    truth = pca.transform(scale(x)) / np.sqrt(variance) * np.sqrt(1 - noise / variance)
    close(np.abs(z), np.abs(truth), rtol=1e-6, atol=1e-9)
    back = pipeline[-1].inverse_transform(z)
    close(back, (back - pca.mean_) @ pca.components_.T @ pca.components_ + pca.mean_, atol=1e-9)
    named = pipeline.set_output(transform="pandas").transform(x)
    assert isinstance(named, pd.DataFrame) and list(named) == ["pairtransformer0", "pairtransformer1"]


# ---- Pairs of one's own, and bad input


class Shifted(Pair):
    """Rows around a shift that has a flat posterior."""

    def __init__(self, features: tuple[str, ...]) -> None:
        super().__init__()
        self.features = len(features)
        self.guide = AutoDelta(self.model)

    def model(self, x: torch.Tensor | None = None) -> torch.Tensor:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(self.features), 1.0).to_event(1))
        with self.rows(x):
            return pyro.sample("x", dist.Normal(shift, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("estimator", "line"),
    [
        (PairDensity("gan"), r"entry: expected one of gaussian_mixture, .*, got 'gan'"),
        (PairClassifier(3), r"entry: expected one of naive_bayes, .*, or a class of pairs, got 3"),
        (PairClassifier(method="VI"), r"method: expected one of exact, MAP, SVI, .*, got 'VI'"),
        (PairClassifier(steps=5), r"steps: expected None, for the method has no such setting, got 5"),
        (PairClassifier("bernoulli_naive_bayes"), r"x: expected .*"),
    ],
)
def test_bad_arguments_are_met_by_one_line(estimator: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}$"):
        estimator.fit(blobs(), np.arange(60) % 2)


def test_bad_numbers_of_rows_and_classes_are_met_by_one_line() -> None:
    with pytest.raises(ValueError, match=r"^y: expected at least two classes, got 1 class \(a\)$"):
        PairClassifier().fit(blobs(), ["a"] * 60)
    with pytest.raises(ValueError, match=r"^n_samples: expected an integer of at least 1, got 0$"):
        PairDensity(steps=2, draws=2).fit(blobs()).sample(0)
