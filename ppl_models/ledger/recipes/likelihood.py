r"""Recipes whose figure is the test negative log likelihood (NLL) of static binarized MNIST, in nats per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.special import logsumexp
from torch import Tensor

from inference import Result, fit, log_evidence, pointwise_log_likelihood
from inference.objectives import EM, IWAE
from ppl_models import data
from ppl_models.ledger.recipes.trained import placed, trained, trained_by_stages
from ppl_models.models.autoregressive import Autoregressive
from ppl_models.models.mixture import BernoulliMixture
from ppl_models.models.sigmoid_belief import HelmholtzMachine
from ppl_models.models.vae import VAE

BURDA = tuple((3**k, 0.001 * 10 ** (-k / 7)) for k in range(8))
"""Epochs and learning rates of Burda et al. 2016: 3,280 epochs in eight stages."""


Stages = Sequence[tuple[int, float]]


def _rows(train: int | None, test: int | None) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names of the pixels, and so many training and test images (None: all)."""
    images = data.load("binarized_mnist")
    return images.features, placed(images.train["x"][:train]), placed(images.test["x"][:test])


def _valid(count: int | None) -> Tensor:
    """So many validation images (None: all)."""
    images = data.load("binarized_mnist").valid
    if images is None:
        raise ValueError("binarized_mnist: expected validation images, got none")
    return placed(images["x"][:count])


def bernoulli_mixture(quick: bool, seed: int, *, components: int) -> dict[str, float]:
    """Exact test NLL of a Bernoulli mixture fitted by EM."""
    count, few, steps = (20, 500, 5) if quick else (components, None, 40)
    pixels, x, test = _rows(few, few)

    def by_em(pair: BernoulliMixture, x: Tensor, **arguments: Any) -> Result:
        start = pair.start(x, seed=seed)
        return fit(pair, x, EM(pair.maximise, start, max_plate_nesting=1), **arguments)

    make = partial(BernoulliMixture, pixels, components=count, alpha=0.1, concentration=2.0, guide=AutoDelta)
    _, result = trained(make, x, method=by_em, steps=steps, draws=1, seed=seed)
    return {
        "figure": -float(pointwise_log_likelihood(result, test).double().mean()),
        "the same by numpy": -_by_numpy(result.draws, test),
        "train": -float(pointwise_log_likelihood(result, x).double().mean()),
    }


def vae(quick: bool, seed: int, *, particles: int, stages: Stages) -> dict[str, float]:
    """Test NLL of a VAE with one stochastic layer, by importance sampling with 5,000 particles.

    The stage is chosen by 1,000 validation images and 200 particles.
    """
    few, k, rows, some = (300, 20, 20, 20) if quick else (None, 5000, None, 1000)
    pixels, x, test = _rows(few, rows)
    valid = _valid(some)
    objective = IWAE(particles) if particles > 1 else Trace_ELBO()
    result, found = trained_by_stages(
        lambda: VAE(pixels, 50),
        x,
        objective,
        stages=stages[:2] if quick else stages,
        score=lambda result: log_evidence(result, valid, k=min(k, 200), progress=False).mean,
        seed=seed,
    )
    evidence = log_evidence(result, test, k=k)
    with torch.no_grad(), result.state():
        active = int(result.bound.pair.active(x).sum())
    return {"figure": -evidence.mean, **found, "active factors": active}


def autoregressive(
    quick: bool, seed: int, *, make: Callable[..., Autoregressive], stages: Stages, weight_decay: float = 0.0
) -> dict[str, float]:
    """Exact test NLL of an autoregressive pair, at the mode under a normal prior of precision ``weight_decay``.

    The stage is chosen by the validation images.
    """
    few, rows = (100, 20) if quick else (None, None)
    pixels, x, test = _rows(few, rows)
    valid = _valid(rows)
    result, found = trained_by_stages(
        lambda: make(pixels),
        x,
        stages=((2, 0.001),) if quick else stages,
        score=lambda result: log_evidence(result, valid, "exact", batch=100, progress=False).mean,
        weight_decay=weight_decay,
        seed=seed,
    )
    return {"figure": -log_evidence(result, test, "exact", batch=100).mean, **found}


def belief_net(
    quick: bool, seed: int, *, layers: Sequence[int], objective: Callable[[], Any], epochs: int
) -> dict[str, float]:
    """Test NLL of a Helmholtz machine, by importance sampling with 5,000 particles."""
    few, steps, k, rows = (200, 20, 20, 20) if quick else (None, epochs * 500, 5000, None)
    pixels, x, test = _rows(few, rows)

    def make() -> HelmholtzMachine:
        pair = placed(HelmholtzMachine(pixels, layers))
        pair.centre(x)
        return pair

    schedule: dict[str, Any] = {"steps": steps, "batch": 100, "learning_rate": 0.003, "draws": 1}
    _, result = trained(make, x, objective, seed=seed, **schedule)
    evidence = log_evidence(result, test, k=k, seed=seed)
    bound = result.losses[-max(1, steps // epochs) :].mean() / len(x)
    return {"figure": -evidence.mean, "Monte Carlo error": evidence.monte_carlo_error, "train bound": float(bound)}


def _by_numpy(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean log likelihood of a Bernoulli mixture by NumPy alone, in float64."""
    probs, weights = (draws[n][0].double().numpy() for n in ("probs", "weights"))
    probs, rows = probs.clip(1e-7, 1 - 1e-7), x.double().cpu().numpy()
    joint = rows @ np.log(probs).T + (1 - rows) @ np.log1p(-probs).T + np.log(weights)
    return float(logsumexp(joint, 1).mean())
