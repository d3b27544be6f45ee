"""``python -m tests.benchmarks denoising_digits``: noise taken off held-out 8 x 8 digits, and their pixels from blocks.

Pairs are fitted to the training split of scikit-learn's digits, with pixels in [0, 1]. Held-out digits get Gaussian
noise, flips (binary digits), or are seen as the means of 2 x 2 blocks only. Peak signal-to-noise ratio in decibels
(10 log10 of 1 / MSE) of the posterior mean, and the fraction of pixels within its central 90 % as a normal with the
posterior sd has it: means over digits with their standard errors. Filters and PCA of the noisy digits have the setting
that is best on these very digits, of those tried: an advantage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from sklearn.decomposition import PCA
from torch import Tensor

from inference import Denoised, Result, denoise, fit, super_resolve
from inference.objectives import Denoising
from ppl_models import PPCA, VAE, BernoulliMixture, DiffusionChain, GaussianMixture, HelmholtzMachine, inverse, load
from ppl_models.zoo import methods

from .outliers import summary

SHAPE = (8, 8)
LEVELS = {"Gaussian, sd 0.25": 0.25, "Gaussian, sd 0.5": 0.5}
FLIPS = 0.1
POOLING = inverse.pooling_matrix(SHAPE, 2)


def grey(x: Tensor) -> dict[str, Result]:
    """Results of pairs of continuous rows."""
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"progress": False}
    mixture = GaussianMixture(64, components=30, covariance="tied", prior=False, floor=0.05)
    chain = DiffusionChain(64, steps=100, hidden=(256, 256), shift=0.5, scale=0.5)
    return {
        "PPCA, 20 factors": methods.closed_form(PPCA(64, 20), {"x": x}, draws=1, **quiet),
        "Gaussian mixture, 30, tied": methods.em(mixture, {"x": x}, steps=50, draws=1, **quiet),
        "VAE, 10 factors": fit(VAE(64, 10, hidden=(200,), likelihood="gaussian"), x, steps=4000, batch=100, **quiet),
        "diffusion chain": fit(chain, x, Denoising(100, simple=True), steps=6000, batch=100, **quiet),
    }


def binary(x: Tensor) -> dict[str, Result]:
    """Results of pairs of binary rows."""
    torch.manual_seed(0)
    quiet: dict[str, Any] = {"progress": False}
    machine = HelmholtzMachine(64, (50, 20))
    return {
        "Bernoulli mixture, 50": methods.em(BernoulliMixture(64, components=50), {"x": x}, steps=50, draws=1, **quiet),
        "VAE, 10 factors": fit(VAE(64, 10, hidden=(200,)), x, steps=3000, batch=100, draws=20, **quiet),
        "Helmholtz machine, 50-20": methods.by_minibatches(steps=3000)(machine, {"x": x}, **quiet),
    }


def filters(noisy: Tensor, clean: Tensor, train: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The best of each kind of filter on these digits, of those tried."""
    images = noisy.reshape(-1, *SHAPE).numpy()

    def best(tried: list[np.ndarray]) -> Tensor:
        rows = [torch.as_tensor(t).float().reshape(noisy.shape).clamp(0, 1) for t in tried]
        return min(rows, key=lambda r: float((r - clean).square().mean()))

    yield "the noisy digit", noisy
    yield "Gaussian filter", best([ndimage.gaussian_filter(images, (0, s, s)) for s in (0.3, 0.5, 0.7, 1.0)])
    yield "median filter", best([ndimage.median_filter(images, footprint=f) for f in footprints()])
    projections = [PCA(k).fit(train.numpy()) for k in (5, 10, 15, 20, 30, 40)]
    yield "PCA", best([p.inverse_transform(p.transform(noisy.numpy())) for p in projections])


def footprints() -> list[np.ndarray]:
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    return [f[None] for f in (cross, np.ones((2, 2)), np.ones((3, 3)))]


def score(case: str, name: str, mean: Tensor, clean: Tensor, sd: Tensor | None = None) -> list[dict[str, object]]:
    psnr = -10 * (mean - clean).square().mean(1).clamp_min(1e-6).log10()
    inside = torch.full_like(psnr, torch.nan)
    if sd is not None:
        inside = ((mean - clean).abs() <= 1.645 * sd).double().mean(1)
    figures = zip(psnr.tolist(), inside.tolist(), strict=True)
    return [{"case": case, "method": name, "PSNR": p, "within 90 %": i} for p, i in figures]


def measure(digits: int) -> list[dict[str, object]]:
    records: list[dict[str, object]] = []
    random = torch.Generator().manual_seed(0)

    def ask(case: str, results: dict[str, Result], clean: Tensor, question: Callable[[Result], Denoised]) -> None:
        for name, result in results.items():
            found = question(result)
            # Of zeros and ones intervals say nothing.
            sd = None if case.startswith("flips") else found.sd
            records.extend(score(case, name, found.mean.clamp(0, 1), clean, sd))
            print(case, name, found, file=sys.stderr)

    data = load("digits", unit=True)
    results, clean = grey(data.train["x"]), data.test["x"][:digits]
    for case, sd in LEVELS.items():
        noisy = clean + sd * torch.randn(clean.shape, generator=random)
        for name, rows in filters(noisy, clean, data.train["x"]):
            records.extend(score(case, name, rows, clean))
        ask(case, results, clean, lambda r, noisy=noisy, sd=sd: denoise(r, noisy, sd=sd))
    low, case = clean @ POOLING.mT, "2 x 2 block means"
    blocks = low.reshape(-1, 4, 4).numpy()
    for order, name in enumerate(("repeated", "linear", "", "cubic")):
        if name:
            wide = ndimage.zoom(blocks, (1, 2, 2), order=order, grid_mode=True, mode="nearest")
            records.extend(score(case, name, torch.as_tensor(wide).reshape(clean.shape).clamp(0, 1), clean))
    ask(case, results, clean, lambda r: super_resolve(r, low, POOLING, sd=0.02))
    data = load("digits", binarise=True)
    clean = data.test["x"][:digits]
    noisy = torch.where(torch.rand(clean.shape, generator=random) < FLIPS, 1 - clean, clean)
    case = f"flips, {FLIPS:g}"
    for name, rows in filters(noisy, clean, data.train["x"]):
        records.extend(score(case, name, rows, clean))
    ask(case, binary(data.train["x"]), clean, lambda r: denoise(r, noisy, flips=FLIPS))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks denoising_digits", description=__doc__)
    parser.add_argument("--digits", type=int, default=200)
    options = parser.parse_args(sys.argv[2:])
    print(summary(pd.DataFrame(measure(options.digits))))


if __name__ == "__main__":
    main()
