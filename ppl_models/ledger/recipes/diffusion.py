r"""Recipes of diffusion chains: modes of the ring and the grid, bits per dimension of MNIST."""

from __future__ import annotations

import math

from inference import two_sample
from inference.objectives import Denoising
from ppl_models import data
from ppl_models.data import simulate_modes
from ppl_models.ledger.recipes.trained import placed, trained
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.denoisers import UNet
from ppl_models.models.diffusion.schedules import log_snr


def diffused_modes(quick: bool, seed: int, *, name: str) -> dict[str, float]:
    """Modes of a ring or a grid found by a diffusion chain of 100 steps, by its own and a deterministic sampler."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, 10_000, 100_000)
    x, centres, deviation = simulate_modes(name, rows, seed)
    finest = -2 * math.log(deviation / float(x.std())) + 2
    pair, _ = trained(
        lambda: DiffusionChain(2, schedule=log_snr(100, finest, -8), scale=float(x.std())),
        placed(x),
        Denoising(100, simple=True),
        steps=steps,
        batch=256,
        learning_rate=0.002,
        seed=seed,
    )
    metrics: dict[str, float] = {}
    for label, chosen in (("", None), ("deterministic ", 50)):
        modes = two_sample.modes(pair.generate(drawn, steps=chosen, seed=seed).cpu(), centres, deviation)
        metrics[f"{label}modes" if label else "figure"] = modes.found
        metrics[f"{label}quality, %"] = 100 * modes.quality.value
        metrics[f"{label}reverse KL"] = modes.reverse_kl
    return metrics


def diffusion(quick: bool, seed: int) -> dict[str, float]:
    """Bits per pixel of test images by the bound of a chain of 1,000 steps with a U-Net and learned variances."""
    images = data.load("mnist")
    few, rows, chain, steps, batch = (200, 20, 20, 20, 20) if quick else (None, 2000, 1000, 40_000, 128)
    channels = (8, 16, 16) if quick else (32, 64, 64)
    x, test = placed(images.train["x"][:few]), placed(images.test["x"][:rows])

    def make() -> DiffusionChain:
        network = UNet((28, 28), chain, channels=channels, learned_variance=True)
        return DiffusionChain(images.features, network, steps=chain, variance="learned", likelihood="pixels")

    objective = Denoising(chain, simple=True, bound=0.001)
    pair, _ = trained(make, x, objective, steps=steps, batch=batch, learning_rate=0.001, seed=seed)
    bits = pair.bound(test).bits()
    drawn = pair.generate(len(test), steps=min(50, chain), seed=seed)
    return {
        "figure": bits.pop("total"),
        **bits,
        "energy distance": two_sample.energy_distance(test, drawn).value,
        "precision, %": 100 * two_sample.precision(test, drawn).value,
        "recall, %": 100 * two_sample.recall(test, drawn).value,
    }
