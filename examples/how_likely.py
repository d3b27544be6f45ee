"""How likely is an image to a diffusion model? Its bound step by step, beside the density of its flow.

A chain of 100 steps over the 8 x 8 digits is trained by single steps; then held-out digits are scored: by the bound of
the whole chain, which is a sum over its steps, and by the flow that the chain is without its noise. Most of what an
image costs is paid in the last few steps, where the network has to tell levels of grey that noise has just hidden.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure

from ppl_models import find, flow


def picture(bound: Any, density: float, path: Path) -> None:
    """The bound's terms, in bits per dimension, from the last step down to the image."""
    each = bound.step_kl.double().mean(0).numpy() / bound.dimensions / math.log(2)
    steps = range(2, len(each) + 2)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(steps, each, width=0.9, color="C0")
    axes.bar(1, bound.bits()["reconstruction"], width=0.9, color="C1", label="reconstruction (step 1)")
    axes.set_xlabel("step: from the image on the left to noise on the right")
    axes.set_ylabel("bits a pixel")
    axes.set_title(f"where the {bound.bits()['total']:.2f} bits a pixel go; the flow needs {density:.2f}", loc="left")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(steps: int = 2000, chain: int = 100, rows: int = 200, seed: int = 0, out: Path = Path("results")) -> None:
    """Train a chain on digits, and print and draw what held-out digits cost."""
    row = find("diffusion")
    dataset = row.load()
    torch.manual_seed(seed)
    pair = row.pair(dataset, steps=chain)
    print(row.fit(pair, dataset.train, steps=steps, seed=seed))  # type: ignore[call-arg]
    x = dataset.test["x"][:rows]
    bound = pair.bound(x, draws=2, seed=seed)
    density = flow.log_evidence(pair, x, divergence="hutchinson", tolerance=1e-3, seed=seed).double()
    scale = bound.dimensions * math.log(2)
    # What a model costs that knows how often each pixel has each level, and nothing of its neighbours.
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
    print(pd.Series(table, name="bits a pixel, held out").round(3).to_string())
    errors = {"bound": bound.total, "flow": density}
    print("standard errors:", {n: round(float(v.double().std()) / len(v) ** 0.5 / scale, 3) for n, v in errors.items()})
    out.mkdir(parents=True, exist_ok=True)
    path = out / "how_likely.png"
    picture(bound, table["flow"], path)
    print(path)


if __name__ == "__main__":
    typer.run(main)
