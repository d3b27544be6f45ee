"""How few steps are enough? Deterministic and stochastic sampling of a diffusion chain, with the same number of steps.

Reference: Song, Meng and Ermon 2021, "Denoising Diffusion Implicit Models" (https://arxiv.org/abs/2010.02502), table 1:
with 10 and 20 steps the deterministic sampler (eta = 0) is far better, and the gap closes with more steps. The same
holds on the 8 x 8 digits: half the distance with 10 steps; with 100 steps neither differs from held-out digits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

from inference import two_sample
from ppl_models import find, pictures

WAYS = {"deterministic (eta = 0)": 0.0, "stochastic (eta = 1)": 1.0}


def picture(table: pd.DataFrame, digits: torch.Tensor, title: str, path: Path) -> None:
    """Distance from held-out rows by number of steps, one line per sampler, and digits by the deterministic one."""
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    axes, panel = figure.subplots(1, 2, width_ratios=[1.25, 1])
    for k, (way, part) in enumerate(table.groupby("sampler", sort=False)):
        axes.errorbar(part["steps"], part["distance"], part["error"], marker="o", capsize=3, color=f"C{k}", label=way)
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(table["steps"])), [str(s) for s in sorted(set(table["steps"]))])
    axes.set_xticks([], minor=True)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set(xlabel="steps of the sampler", ylabel="energy distance from held-out digits")
    axes.legend(frameon=False)
    pictures.show(panel, digits, (8, 8))
    panel.set(title="deterministic, by steps", yticks=10 * np.arange(len(digits)) + 4.5)
    panel.set_yticklabels([str(s) for s in sorted(set(table["steps"]))])
    panel.tick_params(length=0)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main(steps: int = 2000, chain: int = 100, draws: int = 1000, seed: int = 0, out: Path = Path("results")) -> None:
    """Train a diffusion chain on digits, and sample it with different numbers of steps."""
    row = find("diffusion")
    dataset = row.load()
    torch.manual_seed(seed)
    pair = row.pair(dataset, steps=chain)
    print(row.fit(pair, dataset.train, steps=steps, seed=seed))
    real = dataset.test["x"]
    lines, counts = [], sorted({min(s, chain) for s in (5, 10, 20, 50, chain)})
    for count in counts:
        for way, eta in WAYS.items():
            distance = two_sample.energy_distance(real, pair.generate(draws, steps=count, eta=eta, seed=seed))
            lines.append({"steps": count, "sampler": way, "distance": distance.value, "error": distance.error})
    table = pd.DataFrame(lines)
    print(table.round(4).to_string(index=False))
    out.mkdir(parents=True, exist_ok=True)
    digits = torch.stack([pair.generate(8, steps=count, eta=0.0, seed=seed) for count in counts])
    title = f"Diffusion chain of digits, trained for {steps:,} steps: how few to sample?"
    picture(table, digits, title, out / "fewer_steps.png")
    print(out / "fewer_steps.png")


if __name__ == "__main__":
    typer.run(main)
