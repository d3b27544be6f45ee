r"""Four posteriors, each written plainly in Pyro, NumPyro and PyMC, with the same priors and the same data.

- ``eight_schools`` (Rubin 1981), non-centred: 10 dimensions.
- ``logistic_regression`` on breast_cancer, 569 x 30, standardised: 31 dimensions, strongly correlated.
- ``naive_bayes``, Gaussian, on wine, 178 x 13, standardised: 80 dimensions, with an exact conjugate answer.
- ``mixture`` of three Gaussians in one dimension, ordered means, 300 simulated points, summed over the labels: 8
  dimensions. Its priors are tight enough to leave one mode (with wide ones, chains of every sampler got stuck).

The second and third are pairs of the zoo; the peers' models match their priors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Posterior:
    """One posterior in three languages. All models take the data by name.

    Attributes:
        sites: The latent sites that every contender's draws are judged by.
        data: Makes the arrays, float64 and int64.
        pyro: Makes a pair or a Pyro model.
        numpyro: Makes a NumPyro model.
        pymc: Makes a PyMC model of the data.
    """

    title: str
    sites: tuple[str, ...]
    data: Callable[[], Arrays]
    pyro: Callable[[], Any]
    numpyro: Callable[[], Callable[..., Any]]
    pymc: Callable[..., Any]


def tensors(arrays: Arrays, dtype: Any) -> dict[str, Any]:
    """The arrays for torch; integers stay integers."""
    import torch

    made = {n: torch.as_tensor(v) for n, v in arrays.items()}
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in made.items()}


def schools_data() -> Arrays:
    effect = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return {"y": effect, "error": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])}


def schools_pyro() -> Callable[..., Any]:
    import pyro
    import pyro.distributions as dist

    def model(error: Any, y: Any = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(error)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, error), obs=y)

    return model


def schools_numpyro() -> Callable[..., Any]:
    import numpyro
    import numpyro.distributions as dist

    def model(error: Any, y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", len(error)):
            eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * eta, error), obs=y)

    return model


def schools_pymc(error: np.ndarray, y: np.ndarray) -> Any:
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        eta = pm.Normal("eta", 0.0, 1.0, shape=len(error))
        pm.Normal("y", mu + tau * eta, error, observed=y)
    return model


def _standardised(name: str) -> Arrays:
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return {"x": (x - x.mean(0)) / x.std(0), "y": y.astype(np.int64)}


def regression_pyro() -> Any:
    from ppl_models.models.regression import LogisticRegression

    return LogisticRegression(30)


def regression_numpyro() -> Callable[..., Any]:
    import numpyro
    import numpyro.distributions as dist

    def model(x: Any, y: Any = None) -> None:
        weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        intercept = numpyro.sample("intercept", dist.Normal(0.0, 10.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights + intercept), obs=y)

    return model


def regression_pymc(x: np.ndarray, y: np.ndarray) -> Any:
    import pymc as pm

    with pm.Model() as model:
        weights = pm.Normal("weights", 0.0, 1.0, shape=x.shape[1])
        intercept = pm.Normal("intercept", 0.0, 10.0)
        pm.Bernoulli("y", logit_p=pm.math.dot(x, weights) + intercept, observed=y)
    return model


def bayes_pyro() -> Any:
    from ppl_models.models.naive_bayes import GaussianNaiveBayes

    return GaussianNaiveBayes(13, 3)


def bayes_numpyro() -> Callable[..., Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x: Any, y: Any = None) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("classes", 3):
            variances = numpyro.sample("variances", dist.InverseGamma(2.0, 1.0).expand([13]).to_event(1))
            means = numpyro.sample("means", dist.Normal(0.0, jnp.sqrt(variances / 0.1)).to_event(1))
        with numpyro.plate("rows", len(x)):
            y = numpyro.sample("y", dist.Categorical(weights), obs=y)
            numpyro.sample("x", dist.Normal(means[y], jnp.sqrt(variances)[y]).to_event(1), obs=x)

    return model


def bayes_pymc(x: np.ndarray, y: np.ndarray) -> Any:
    import pymc as pm

    with pm.Model() as model:
        weights = pm.Dirichlet("weights", np.ones(3))
        variances = pm.InverseGamma("variances", 2.0, 1.0, shape=(3, 13))
        means = pm.Normal("means", 0.0, pm.math.sqrt(variances / 0.1), shape=(3, 13))
        pm.Categorical("y", weights, observed=y)
        pm.Normal("x", means[y], pm.math.sqrt(variances)[y], observed=x)
    return model


def mixture_data() -> Arrays:
    rng = np.random.default_rng(0)
    return {"x": rng.normal(np.array([-3.0, 0.0, 3.0])[rng.choice(3, 300)], 0.7)}


def mixture_pyro() -> Callable[..., Any]:
    import pyro
    import pyro.distributions as dist
    import torch

    def model(x: Any) -> None:
        like = x.new_tensor
        weights = pyro.sample("weights", dist.Dirichlet(like([5.0, 5.0, 5.0])))
        first = pyro.sample("first", dist.Normal(like(-3.0), 2.0))
        gaps = pyro.sample("gaps", dist.LogNormal(like([1.0, 1.0]), 0.3).to_event(1))
        scales = pyro.sample("scales", dist.LogNormal(like([-0.3, -0.3, -0.3]), 0.3).to_event(1))
        means = torch.stack([first, first + gaps[..., 0], first + gaps.sum(-1)], -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales)), obs=x)

    return model


def mixture_numpyro() -> Callable[..., Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(x: Any) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(5.0 * jnp.ones(3)))
        first = numpyro.sample("first", dist.Normal(-3.0, 2.0))
        gaps = numpyro.sample("gaps", dist.LogNormal(1.0, 0.3).expand([2]).to_event(1))
        scales = numpyro.sample("scales", dist.LogNormal(-0.3, 0.3).expand([3]).to_event(1))
        means = jnp.stack([first, first + gaps[0], first + gaps.sum()])
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, scales)), obs=x)

    return model


def mixture_pymc(x: np.ndarray) -> Any:
    import pymc as pm

    with pm.Model() as model:
        weights = pm.Dirichlet("weights", 5.0 * np.ones(3))
        first = pm.Normal("first", -3.0, 2.0)
        gaps = pm.LogNormal("gaps", 1.0, 0.3, shape=2)
        scales = pm.LogNormal("scales", -0.3, 0.3, shape=3)
        means = pm.math.stack([first, first + gaps[0], first + gaps.sum()])
        pm.NormalMixture("x", w=weights, mu=means, sigma=scales, observed=x)
    return model


POSTERIORS = {
    "eight_schools": Posterior(
        "Eight schools, non-centred", ("mu", "tau", "eta"), schools_data, schools_pyro, schools_numpyro, schools_pymc
    ),
    "logistic_regression": Posterior(
        "Logistic regression, breast_cancer 569 x 30",
        ("weights", "intercept"),
        partial(_standardised, "breast_cancer"),
        regression_pyro,
        regression_numpyro,
        regression_pymc,
    ),
    "naive_bayes": Posterior(
        "Gaussian naive Bayes, wine 178 x 13",
        ("weights", "variances", "means"),
        partial(_standardised, "wine"),
        bayes_pyro,
        bayes_numpyro,
        bayes_pymc,
    ),
    "mixture": Posterior(
        "Mixture of three Gaussians, 300 points",
        ("weights", "first", "gaps", "scales"),
        mixture_data,
        mixture_pyro,
        mixture_numpyro,
        mixture_pymc,
    ),
}
