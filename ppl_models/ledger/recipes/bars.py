r"""A Helmholtz machine on the bars of Hinton et al. 1995."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference import fit, isolated
from inference.objectives import RWS
from ppl_models.ledger.recipes.trained import fitted, placed, show
from ppl_models.models.pair import nothing
from ppl_models.models.sigmoid_belief import HelmholtzMachine

LN2 = math.log(2)


def bars_distribution() -> tuple[Tensor, Tensor]:
    """The bars of Hinton et al. 1995 in 4 x 4 pixels: the possible images (30, 16) and their probabilities.

    Bars are vertical with probability 2/3, else horizontal; each of the four is present with probability 0.2.
    """
    present = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    chance = (0.2**present * 0.8 ** (1 - present)).prod(1)
    upright = present[:, None, :].expand(-1, 4, -1).flatten(1)
    flat = present[:, :, None].expand(-1, -1, 4).flatten(1)
    images, which = torch.cat([upright, flat]).unique(dim=0, return_inverse=True)
    probability = torch.zeros(len(images), dtype=torch.float64).index_add(0, which, torch.cat([2 * chance, chance]) / 3)
    return images, probability


def bars(quick: bool, seed: int) -> dict[str, float]:
    """Exact KL, in bits, from the bars to a Helmholtz machine 16-8-1: that of the start with the best bound.

    For comparison the same starts are also fitted by the exact likelihood.
    """
    images, probability = bars_distribution()
    rows, steps, starts = (200, 50, 2) if quick else (20_000, 10_000, 5)
    random = torch.Generator().manual_seed(seed)
    x = placed(images[torch.multinomial(probability, rows, replacement=True, generator=random)].float())
    images, probability = placed(images), placed(probability)

    def divergence(pair: HelmholtzMachine) -> float:
        with torch.no_grad():
            return float((probability * (probability.log() - pair.log_evidence(images.float()).double())).sum()) / LN2

    runs, results = list[dict[str, float]](), []
    for start in range(starts):
        with isolated(1000 * seed + start):
            pair = placed(HelmholtzMachine(16, (8, 1)))
        pair.centre(x)
        exact = deepcopy(pair)
        schedule: dict[str, Any] = {"steps": steps, "batch": 100, "learning_rate": 0.02, "draws": 1, "seed": start}
        result = fitted(pair, x, partial(RWS, 10), keep=False, **schedule)
        fit((exactly(exact, probability), nothing), images.float(), steps=steps // 5, learning_rate=0.05, draws=1)
        bound = result.losses[-max(1, steps // 10) :].mean() / len(x)
        results.append(result)
        runs.append({"bound": float(bound), "kl": divergence(pair), "exact": divergence(exact)})
    best = min(runs, key=lambda run: run["bound"])
    show(results[runs.index(best)], x)
    return {
        "figure": best["kl"],
        "first start": runs[0]["kl"],
        "median start": float(np.median([run["kl"] for run in runs])),
        "exact likelihood, first start": runs[0]["exact"],
        "exact likelihood, best start": min(run["exact"] for run in runs),
    }


def exactly(pair: HelmholtzMachine, probability: Tensor) -> Callable[..., None]:
    """The expected exact log likelihood of images with given probabilities, as a model."""

    def model(x: Tensor) -> None:
        pyro.module("pair", pair)
        pyro.factor("x", (probability * pair.log_evidence(x)).sum())

    return model
