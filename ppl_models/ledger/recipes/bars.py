r"""The bars of Hinton et al. 1995 by a Helmholtz machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor

from inference import fit, isolated
from inference.objectives import RWS
from ppl_models.models.pair import nothing
from ppl_models.models.sigmoid_belief import HelmholtzMachine

LN2 = math.log(2)


def bars_distribution() -> tuple[Tensor, Tensor]:
    """The bars of Hinton et al. 1995 in 4 x 4 pixels: images that can be (30, 16), and their probabilities.

    Vertical bars with probability 2/3, else horizontal; each of the four is there with probability 0.2.
    """
    there = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    chance = (0.2**there * 0.8 ** (1 - there)).prod(1)
    upright = there[:, None, :].expand(-1, 4, -1).flatten(1)
    flat = there[:, :, None].expand(-1, -1, 4).flatten(1)
    images, which = torch.cat([upright, flat]).unique(dim=0, return_inverse=True)
    probability = torch.zeros(len(images), dtype=torch.float64).index_add(0, which, torch.cat([2 * chance, chance]) / 3)
    return images, probability


def bars(quick: bool, seed: int) -> dict[str, float]:
    """KL of a Helmholtz machine 16-8-1 from the law of the bars, in bits, exact: the best of restarts by its bound.

    Beside it what the same starts come to by the exact likelihood.
    """
    images, probability = bars_distribution()
    rows, steps, starts = (200, 50, 2) if quick else (20_000, 10_000, 5)
    random = torch.Generator().manual_seed(seed)
    x = images[torch.multinomial(probability, rows, replacement=True, generator=random)].float()

    def divergence(pair: HelmholtzMachine) -> float:
        with torch.no_grad():
            return float((probability * (probability.log() - pair.log_evidence(images.float()).double())).sum()) / LN2

    found: list[dict[str, float]] = []
    for start in range(starts):
        with isolated(1000 * seed + start):
            pair = HelmholtzMachine(16, (8, 1))
        pair.centre(x)
        exact = deepcopy(pair)
        result = fit(pair, x, partial(RWS, 10), steps=steps, batch=100, learning_rate=0.02, draws=1, seed=start)
        fit((exactly(exact, probability), nothing), images.float(), steps=steps // 5, learning_rate=0.05, draws=1)
        bound = result.losses[-max(1, steps // 10) :].mean() / len(x)
        found.append({"bound": float(bound), "kl": divergence(pair), "exact": divergence(exact)})
    best = min(found, key=lambda f: f["bound"])
    return {
        "figure": best["kl"],
        "first start": found[0]["kl"],
        "median start": float(np.median([f["kl"] for f in found])),
        "exact likelihood, first start": found[0]["exact"],
        "exact likelihood, best start": min(f["exact"] for f in found),
    }


def exactly(pair: HelmholtzMachine, probability: Tensor) -> Callable[..., None]:
    """The exact likelihood of images that come with given probabilities, causes summed out by the pair itself."""

    def model(x: Tensor) -> None:
        pyro.module("pair", pair)
        pyro.factor("x", (probability * pair.log_evidence(x)).sum())

    return model
