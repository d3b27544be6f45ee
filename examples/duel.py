"""What do the two players of a GAN do? Generated samples and the discriminator at several stages of training.

A generator and a discriminator are trained on a ring of eight modes. After each stage the same noise is mapped to
samples, over a map of the discriminator. With R1 the discriminator converges to one half; without R1 it does not.
Run: python examples/duel.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

from inference import Joint, fit, isolated, two_sample
from inference.objectives import Adversarial
from ppl_models import GAN, pictures, simulate_modes

STAGES = (0, 200, 1000, 5000)
SHARED = {"batch": 256, "progress": False}


def main(scale: float = 1.0, seed: int = 0, out: Path = Path("results/duel")) -> pd.DataFrame:
    """Train in stages, with steps multiplied by ``scale``; plot each stage and print the modes it covers."""
    x, centres, deviation = simulate_modes("ring", 20_000, seed)
    figure = Figure(figsize=(7.4, 4.4), layout="constrained")
    panels, rows = figure.subplots(2, len(STAGES)), []
    for line, (name, r1) in zip(panels, {"GAN": 0.0, "GAN, R1": 0.1}.items(), strict=True):
        with isolated(seed):
            pair = GAN(2, 2, hidden=(128, 128, 128))
        optimizer, done = Joint(torch.optim.Adam, {"lr": 5e-4, "betas": (0.5, 0.9)}), 0
        for panel, stage in zip(line, STAGES, strict=True):
            steps = int(scale * stage) - done
            fit(pair, x, Adversarial(r1=r1), steps=steps, optimizer=optimizer, seed=seed + stage, **SHARED)
            done += steps
            seen = two_sample.modes(pair.generate(5000, seed=seed), centres, deviation)
            rows.append((name, done, seen.found, 100 * seen.quality.value))
            surface = pictures.odds(panel, pair, x, seed=seed)
            panel.set_title(f"{done:,} steps: {seen.found}/{seen.total}", fontsize=10)
        line[0].set_ylabel(name)
    figure.suptitle("GAN of a ring of 8 modes: samples, discriminator, and modes found")
    handles = panels[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, markerscale=3, frameon=False)
    figure.colorbar(surface, ax=panels, label="q(real | x)", ticks=[0, 0.5, 1], aspect=30)
    table = pd.DataFrame(rows, columns=["objective", "steps", "modes", "quality, %"])
    print(table.to_string(index=False, float_format=lambda v: f"{v:.1f}"))
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "duel.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
