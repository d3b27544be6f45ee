"""How likely is an image under a diffusion model? The bound by step, and the density of the probability flow.

A chain of 100 steps on the 8 x 8 digits is trained on single steps. Held-out digits are scored by the bound of the
whole chain, a sum over its steps, and by the chain's probability flow. Most of the bits are spent in the last few
denoising steps, where the network has to distinguish neighbouring grey levels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

from ppl_models import find, flow


def picture(bound: Any, title: str, path: Path) -> None:
    """The terms of the bound, in bits per dimension, by step."""
    terms = bound.step_kl.double().mean(0).numpy() / bound.dimensions / math.log(2)
    steps = range(2, len(terms) + 2)
    figure = Figure(figsize=(6.6, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(steps, terms, width=0.9, color="C0")
    axes.bar(1, bound.bits()["reconstruction"], width=0.9, color="C1", label="reconstruction (step 1)")
    axes.set_xlabel("step, from image (left) to noise (right)")
    axes.set_ylabel("bits per pixel")
    axes.set_title(title)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(steps: int = 2000, chain: int = 100, rows: int = 200, seed: int = 0, out: Path = Path("results")) -> None:
    """Train a diffusion chain on digits; print and plot the bits per pixel of held-out digits."""
    row = find("diffusion")
    dataset = row.load()
    torch.manual_seed(seed)
    pair = row.pair(dataset, steps=chain)
    print(row.fit(pair, dataset.train, steps=steps, seed=seed))
    x = dataset.test["x"][:rows]
    bound = pair.bound(x, draws=2, seed=seed)
    density = flow.log_evidence(pair, x, divergence="hutchinson", tolerance=1e-3, seed=seed).double()
    scale = bound.dimensions * math.log(2)
    # Baseline: independent pixels, with the frequencies of their grey levels.
    levels = (dataset.train["x"] * (pair.levels - 1)).round().long()
    counts = torch.stack([torch.bincount(v, minlength=pair.levels) + 0.5 for v in levels.T]).double()
    seen = (x * (pair.levels - 1)).round().long().T
    alone = -(counts / counts.sum(1, keepdim=True)).log().gather(1, seen).sum(0)
    table = {
        **{f"bound, {name}": v for name, v in bound.bits().items() if name != "total"},
        "bound, total": bound.bits()["total"],
        "flow": -float(density.mean()) / scale,
        "pixels alone": float(alone.mean()) / scale,
    }
    print(pd.Series(table, name="bits per pixel, held out").round(3).to_string())
    errors = {"bound": bound.total, "flow": density}
    print("standard errors:", {n: round(float(v.double().std()) / len(v) ** 0.5 / scale, 3) for n, v in errors.items()})
    out.mkdir(parents=True, exist_ok=True)
    path = out / "how_likely.png"
    said = f"{table['bound, total']:.2f} bits per pixel by the bound, {table['flow']:.2f} by the flow"
    picture(bound, f"Diffusion chain of digits, {steps:,} steps of training:\n{said}", path)
    print(path)


if __name__ == "__main__":
    typer.run(main)
