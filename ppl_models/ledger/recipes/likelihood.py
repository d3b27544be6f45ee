r"""Recipes whose figure is the test negative log likelihood (NLL) of binarized MNIST, in nats per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.special import logsumexp
from torch import Tensor
from torch.nn.functional import logsigmoid

from inference import Result, fit, isolated, log_evidence, pointwise_log_likelihood
from inference.objectives import EM, IWAE, RWS, VIMCO, Denoising
from ppl_models import data
from ppl_models.ledger.recipes.trained import placed, trained, trained_by_stages
from ppl_models.models.any_order import EoNADE
from ppl_models.models.autoregressive import Autoregressive
from ppl_models.models.mixture import BernoulliMixture
from ppl_models.models.sigmoid_belief import HelmholtzMachine
from ppl_models.models.vae import VAE, HierarchicalVAE

BURDA = tuple((3**k, 0.001 * 10 ** (-k / 7)) for k in range(8))
"""Epochs and learning rates of Burda et al. 2016: 3,280 epochs in eight stages."""


COPIES = 9
"""Most binarizations of the training images in a stage, each with a draw of its own per pixel."""


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


def bernoulli_mixture(
    quick: bool,
    seed: int,
    *,
    components: int,
    alpha: float = 0.1,
    rows: int | None = None,
    steps: int = 40,
    random: bool = False,
) -> dict[str, float]:
    """Exact test NLL of a Bernoulli mixture fitted by EM.

    Args:
        quick: A size for tests.
        seed: Seed of the start.
        components: Number of components.
        alpha: Smoothing.
        rows: Training images. Default: all.
        steps: Steps of EM.
        random: Start from random responsibilities, not from the centres of k-means++.
    """
    count, few, steps = (20, 500, 5) if quick else (components, None, steps)
    pixels, x, test = _rows(few or rows, few)

    def by_em(pair: BernoulliMixture, x: Tensor, **arguments: Any) -> Result:
        start = pair.start(x, seed=seed)
        if random:
            with isolated(seed):
                start = torch.rand_like(start)
            start = start / start.sum(1, keepdim=True)
        return fit(pair, x, EM(pair.maximise, start, max_plate_nesting=1), **arguments)

    make = partial(BernoulliMixture, pixels, components=count, alpha=alpha, concentration=2.0, guide=AutoDelta)
    _, result = trained(make, x, method=by_em, steps=steps, draws=1, seed=seed)
    return {
        "figure": -float(pointwise_log_likelihood(result, test).double().mean()),
        "the same by numpy": -_by_numpy(result.draws, test),
        "train": -float(pointwise_log_likelihood(result, x).double().mean()),
    }


@dataclass(frozen=True)
class Images:
    """Images of binarized MNIST.

    Attributes:
        pixels: Names of the pixels.
        train: Training images of a stage of so many epochs.
        valid: Validation images.
        test: Test images.
    """

    pixels: tuple[str, ...]
    train: Callable[[int, int], Tensor]
    valid: Tensor
    test: Tensor


def static(few: int | None, rows: int | None, some: int) -> Images:
    """Images that were made binary once: so many of the training, the test and the validation images (None: all)."""
    pixels, x, test = _rows(few, rows)
    return Images(pixels, lambda *_: x, _valid(some), test)


def dynamic(few: int | None, rows: int | None, some: int, seed: int) -> Images:
    """Images whose pixels are drawn with their grey levels as probabilities, those of training again and again.

    The last of the 60,000 training images are the validation images.
    """
    images = data.load("mnist")
    grey, held = images.train["x"][:-some][:few], images.train["x"][-some:]

    def binary(grey: Tensor, which: int, copies: int = 1) -> Tensor:
        with isolated(1000 * seed + which):
            return placed(torch.bernoulli(grey.expand(copies, *grey.shape)).flatten(0, 1))

    def train(stage: int, epochs: int) -> Tensor:
        return binary(grey, stage + 2, min(epochs, COPIES))

    return Images(images.features, train, binary(held, 0), binary(images.test["x"][:rows], 1))


def vae(
    quick: bool, seed: int, *, particles: int, stages: Stages, layers: int = 1, again: bool = False
) -> dict[str, float]:
    """Test NLL of a VAE with one or two stochastic layers, by importance sampling with 5,000 particles.

    The stage is chosen by 1,000 validation images and 200 particles. ``again``: with dynamic binarization.
    """
    few, k, rows, some = (300, 20, 20, 20) if quick else (None, 5000, None, 1000)
    images = dynamic(few, rows, some, seed) if again else static(few, rows, some)
    valid, test = images.valid, images.test
    objective = IWAE(particles) if particles > 1 else Trace_ELBO()
    result, found = trained_by_stages(
        lambda: HierarchicalVAE(images.pixels) if layers == 2 else VAE(images.pixels, 50),
        images.train,
        objective,
        stages=stages[:2] if quick else stages,
        score=lambda result: log_evidence(result, valid, k=min(k, 200), progress=False).mean,
        seed=seed,
    )
    evidence = log_evidence(result, test, k=k)
    with torch.no_grad(), result.state():
        active = int(result.bound.pair.active(images.train(0, 1)).sum())
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


def any_order(quick: bool, seed: int, *, stages: Stages) -> dict[str, float]:
    """Exact test NLL of an order-agnostic NADE whose densities in 128 orders are averaged, and in fewer.

    The orders are that of the columns and random ones; the stage is chosen by 1,000 validation images in the first.
    """
    few, rows, some, orders, hidden = (100, 20, 20, 4, 20) if quick else (None, None, 1000, 128, 500)
    pixels, x, test = _rows(few, rows)
    valid = _valid(some)

    @torch.no_grad()
    def scores(pair: EoNADE, x: Tensor, count: int) -> Tensor:
        parts = pair.conditionals()[:count]
        return torch.stack([torch.cat([logsigmoid((2 * b - 1) * f(b)).sum(-1) for b in x.split(100)]) for f in parts])

    def score(result: Result) -> float:
        with result.state():
            return float(scores(result.bound.pair, valid, 1).double().mean())

    result, found = trained_by_stages(
        lambda: EoNADE(pixels, hidden=hidden, orders=orders),
        x,
        Denoising(len(pixels) - 1),
        stages=((2, 0.001),) if quick else stages,
        score=score,
        seed=seed,
    )
    with result.state():
        each = scores(result.bound.pair, test, orders).double()
    counts = [2**k for k in range(orders.bit_length())]
    curve = {n: -float((each[:n].logsumexp(0) - math.log(n)).mean()) for n in counts}
    return {"figure": curve[orders], **{f"{n} orders": value for n, value in curve.items()}, **found}


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
    found = {"figure": -evidence.mean, "Monte Carlo error": evidence.monte_carlo_error}
    if len(result.losses):
        found["train bound"] = float(result.losses[-max(1, steps // epochs) :].mean() / len(x))
    return found


def belief_net_bound(quick: bool, seed: int, *, layers: Sequence[int], epochs: int) -> dict[str, float]:
    """Negative ELBO of the validation images of a Helmholtz machine, by one draw of its guide.

    It is fitted by NVIL, VIMCO and reweighted wake-sleep; the one with the best ELBO of training images is taken.
    """
    few, steps, rows = (200, 20, 20) if quick else (None, epochs * 500, None)
    pixels, x, _ = _rows(few, 1)
    valid, seen = _valid(rows), x[:10_000]
    objectives = {"NVIL": TraceGraph_ELBO, "VIMCO": partial(VIMCO, 10), "RWS": partial(RWS, 10)}
    found: dict[str, float] = {}
    for name, objective in objectives.items():

        def make(baseline: int = 100 * (name == "NVIL")) -> HelmholtzMachine:
            pair = placed(HelmholtzMachine(pixels, layers, baseline=baseline))
            pair.centre(x)
            return pair

        schedule: dict[str, Any] = {"steps": steps, "batch": 100, "learning_rate": 0.003, "draws": 1}
        _, result = trained(make, x, objective, seed=seed, **schedule)
        bounds = {part: -log_evidence(result, of, k=1, seed=seed).mean for part, of in (("train", seen), ("", valid))}
        found |= {f"{name}, train": bounds["train"], name: bounds[""]}
    best = min(objectives, key=lambda name: found[f"{name}, train"])
    return {"figure": found[best], **found}


def _by_numpy(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean log likelihood of a Bernoulli mixture by NumPy alone, in float64."""
    probs, weights = (draws[n][0].double().numpy() for n in ("probs", "weights"))
    probs, rows = probs.clip(1e-7, 1 - 1e-7), x.double().cpu().numpy()
    joint = rows @ np.log(probs).T + (1 - rows) @ np.log1p(-probs).T + np.log(weights)
    return float(logsumexp(joint, 1).mean())
