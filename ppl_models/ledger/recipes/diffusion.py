r"""Runs of diffusion chains: modes of the ring and the grid, bits per dimension of MNIST."""

from __future__ import annotations

import math

from inference import fit, isolated, two_sample
from inference.objectives import Denoising
from ppl_models import data
from ppl_models.data import simulate_modes
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.denoisers import UNet
from ppl_models.models.diffusion.schedules import log_snr


def diffused_modes(quick: bool, seed: int, *, name: str) -> dict[str, float]:
    """Modes of a ring or a grid that a diffusion chain of 100 steps finds, on 100,000 rows of it; the same by the
    deterministic sampler."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, 10_000, 100_000)
    x, centres, deviation = simulate_modes(name, rows, seed)
    finest = -2 * math.log(deviation / float(x.std())) + 2
    with isolated(seed):
        pair = DiffusionChain(2, schedule=log_snr(100, finest, -8), scale=float(x.std()))
    fit(pair, x, Denoising(100, simple=True), steps=steps, batch=256, learning_rate=0.002, seed=seed)
    found: dict[str, float] = {}
    for label, chosen in (("", None), ("deterministic ", 50)):
        seen = two_sample.modes(pair.generate(drawn, steps=chosen, seed=seed), centres, deviation)
        found[f"{label}modes" if label else "figure"] = seen.found
        found[f"{label}quality, %"] = 100 * seen.quality.value
        found[f"{label}reverse KL"] = seen.reverse_kl
    return found


def diffusion(quick: bool, seed: int) -> dict[str, float]:
    """Bits a pixel of test images by the bound of a chain of 1,000 steps with a U-Net and learned variances."""
    images = data.load("mnist")
    few, rows, chain, steps, batch = (200, 20, 20, 20, 20) if quick else (None, 2000, 1000, 40_000, 128)
    channels = (8, 16, 16) if quick else (32, 64, 64)
    with isolated(seed):
        network = UNet((28, 28), chain, channels=channels, learned_variance=True)
        pair = DiffusionChain(images.features, network, steps=chain, variance="learned", likelihood="pixels")
    x, test = images.train["x"][:few], images.test["x"][:rows]
    objective = Denoising(chain, simple=True, bound=0.001)
    fit(pair, x, objective, steps=steps, batch=batch, learning_rate=0.001, seed=seed)
    bits = pair.bound(test).bits()
    drawn = pair.generate(len(test), steps=min(50, chain), seed=seed)
    return {
        "figure": bits.pop("total"),
        **bits,
        "energy distance": two_sample.energy_distance(test, drawn).value,
        "precision, %": 100 * two_sample.precision(test, drawn).value,
        "recall, %": 100 * two_sample.recall(test, drawn).value,
    }
