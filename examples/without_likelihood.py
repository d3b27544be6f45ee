"""What does training without a likelihood gain and lose? Models of a ring of 8 modes and a grid of 25.

A VAE covers all modes and the space between them. A GAN only has to fool the discriminator, and misses modes;
penalties (R1, WGAN-GP) recover them. A VAE-GAN combines both. A diffusion chain has a likelihood, and covers all modes.
"""

from itertools import product
from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from torch import Tensor

from inference import fit, isolated, two_sample
from inference.objectives import Adversarial, Denoising
from ppl_models import GAN, VAE, VAEGAN, DiffusionChain, simulate_modes
from ppl_models.zoo.methods import adversaries

WIDE, ROWS = {"hidden": (128, 128, 128)}, 20_000
SHARED = {"batch": 256, "draws": 1, "progress": False}


def likely(x: Tensor, steps: int, seed: int, *, chain: bool) -> Tensor:
    settings = {"schedule": "log_snr", "scale": float(x.std())}
    pair = DiffusionChain(2, **settings, **WIDE) if chain else VAE(2, 2, likelihood="gaussian", **WIDE)
    fit(pair, x, Denoising(100, simple=True) if chain else None, steps=steps, learning_rate=0.002, seed=seed, **SHARED)
    return pair.generate(ROWS, seed=seed) if chain else pair.likelihood(torch.randn(ROWS, 2)).sample()


def gan(x: Tensor, steps: int, seed: int, **settings: object) -> Tensor:
    pair = VAEGAN(2, 2, likelihood="gaussian", **WIDE) if "bound" in settings else GAN(2, 2, **WIDE)
    adversaries(pair, x, Adversarial(**settings), steps=steps, learning_rate=0.001, seed=seed, **SHARED)
    return pair.generate(ROWS, seed=seed)


METHODS = {
    "VAE": lambda *args: likely(*args, chain=False),
    "GAN": gan,
    "GAN, R1": lambda *args: gan(*args, r1=0.1),
    "WGAN-GP": lambda *args: gan(*args, kind="wasserstein", penalty=0.1, turns=(5, 1)),
    "VAE-GAN": lambda *args: gan(*args, r1=0.1, bound=Trace_ELBO),
    "diffusion": lambda *args: likely(*args, chain=True),
}


def main(steps: int = 2000, seeds: int = 1, out: Path = Path("results/without_likelihood")) -> pd.DataFrame:
    """Train each method on each data set and seed; print and save the table, and plot samples of the first seed."""
    rows, figure = [], Figure(figsize=(7.8, 3.3), layout="constrained")
    panels = dict(zip(product(("ring", "grid"), METHODS), figure.subplots(2, len(METHODS)).flat, strict=True))
    for ((name, method), panel), seed in product(panels.items(), range(seeds)):
        x, centres, deviation = simulate_modes(name, ROWS, seed)
        with isolated(seed):
            made = METHODS[method](x, steps, seed)
        seen = two_sample.modes(made, centres, deviation)
        rows.append((name, method, seen.found, 100 * seen.quality.value, seen.reverse_kl))
        if seed == 0:
            panel.scatter(*made[:2000].T, s=0.5, color="tab:blue")
            panel.scatter(*centres.T, s=15, marker="+", color="tab:red", linewidths=0.8)
            panel.set(title=f"{method}: {seen.found}/{seen.total}", xticks=[], yticks=[], aspect="equal")
            panel.title.set_fontsize(9.5)
    found = pd.DataFrame(rows, columns=["set", "method", "modes", "quality, %", "reverse KL"])
    groups = found.groupby(["set", "method"], sort=False)
    table = groups.mean().join(groups.sem().add_suffix(", error"))
    print(table.to_string(float_format=lambda v: f"{v:.3g}"))
    figure.suptitle(f"Six models of a ring and a grid, {steps:,} steps: samples (blue) and modes found")
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv")
    figure.savefig(out / "without_likelihood.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
