r"""Runs whose figure is a test log likelihood of static binarized MNIST."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.special import logsumexp
from torch import Tensor

from inference import fit, isolated, log_evidence, pointwise_log_likelihood
from inference.objectives import EM, IWAE
from ppl_models import data
from ppl_models.models.autoregressive import Autoregressive
from ppl_models.models.mixture import BernoulliMixture
from ppl_models.models.sigmoid_belief import HelmholtzMachine
from ppl_models.models.vae import VAE


def bernoulli_mixture(quick: bool, seed: int, *, components: int) -> dict[str, float]:
    """Test NLL of a Bernoulli mixture fitted by EM, in nats an image, exact."""
    images = data.load("binarized_mnist")
    count, few, steps = (20, 500, 5) if quick else (components, None, 40)
    x, test = images.train["x"][:few], images.test["x"][:few]
    pair = BernoulliMixture(images.features, count, alpha=0.1, concentration=2.0, guide=AutoDelta)
    start = pair.start(x, seed=seed)
    result = fit(pair, x, EM(pair.maximise, start, max_plate_nesting=1), steps=steps, draws=1, seed=seed)
    return {
        "figure": -float(pointwise_log_likelihood(result, test).double().mean()),
        "the same by numpy": -_by_numpy(result.draws, test),
        "train": -float(pointwise_log_likelihood(result, x).double().mean()),
    }


def vae(quick: bool, seed: int, *, particles: int) -> dict[str, float]:
    """Test NLL of a VAE with one stochastic layer, in nats an image, by importance sampling with 5,000 particles."""
    images = data.load("binarized_mnist")
    few, steps, k, rows = (300, 20, 20, 20) if quick else (None, 100 * 500, 5000, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = VAE(images.features, 50)
    objective = IWAE(particles) if particles > 1 else Trace_ELBO()
    result = fit(pair, x, objective, steps=steps, batch=100, learning_rate=0.002, draws=1, seed=seed)
    found = log_evidence(result, test, k=k)
    with torch.no_grad():
        active = int(pair.active(x).sum())
    bound = result.losses[-max(1, steps // 100) :].mean() / len(x)
    return {"figure": -found.mean, "train bound": float(bound), "active factors": active}


def autoregressive(
    quick: bool, seed: int, *, make: Callable[..., Autoregressive], epochs: int, learning_rate: float
) -> dict[str, float]:
    """Test NLL of an autoregressive pair fitted by maximum likelihood, in nats an image, exact."""
    images = data.load("binarized_mnist")
    few, steps, rows = (100, 4, 20) if quick else (None, epochs * 500, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = make(images.features)
    result = fit(pair, x, steps=steps, batch=100, learning_rate=learning_rate, draws=1, seed=seed)
    bound = result.losses[-max(1, steps // epochs) :].mean() / len(x)
    return {"figure": -log_evidence(result, test, "exact", batch=100).mean, "train": float(bound)}


def belief_net(
    quick: bool, seed: int, *, layers: Sequence[int], objective: Callable[[], Any], epochs: int
) -> dict[str, float]:
    """Test NLL of a Helmholtz machine, in nats an image, by importance sampling with 5,000 particles."""
    images = data.load("binarized_mnist")
    few, steps, k, rows = (200, 20, 20, 20) if quick else (None, epochs * 500, 5000, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = HelmholtzMachine(images.features, layers)
    pair.centre(x)
    result = fit(pair, x, objective, steps=steps, batch=100, learning_rate=0.003, draws=1, seed=seed)
    found = log_evidence(result, test, k=k, seed=seed)
    bound = result.losses[-max(1, steps // epochs) :].mean() / len(x)
    return {"figure": -found.mean, "Monte Carlo error": found.monte_carlo_error, "train bound": float(bound)}


def _by_numpy(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean log likelihood of a Bernoulli mixture without torch and Pyro, in float64."""
    probs, weights = (draws[n][0].double().numpy() for n in ("probs", "weights"))
    probs, rows = probs.clip(1e-7, 1 - 1e-7), x.double().numpy()
    joint = rows @ np.log(probs).T + (1 - rows) @ np.log1p(-probs).T + np.log(weights)
    return float(logsumexp(joint, 1).mean())
