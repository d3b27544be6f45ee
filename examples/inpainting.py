"""What does a trained diffusion chain know about a picture that is half hidden, coarse or noisy? Posterior draws of it.

One chain of digits, trained once, answers all three: pixels that are hidden and pixels averaged over squares by twisted
sequential Monte Carlo (Wu et al. 2023, https://arxiv.org/abs/2306.17775), noise by running the chain down from the step
that has as much of it. The error is the root mean square of the pixels. Run: python examples/inpainting.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from ppl_models import find, inverse, pictures

SHAPE, SD = (8, 8), 0.3


def views(pair: object, x: Tensor, particles: int) -> dict[str, tuple[Tensor, Tensor]]:
    """What is seen of rows, as images, and draws (rows, draws, pixels) of what they are."""
    upper = torch.arange(64) < 32
    half, pool = inverse.mask_matrix(upper), inverse.pooling_matrix(SHAPE, 2)
    noisy = x + SD * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = {"lower half hidden": (x * upper, half), "squares of 2 x 2": (x @ pool.mT @ pool * 4, pool)}
    drawn = {
        name: (seen, inverse.restore(pair, x @ matrix.mT, matrix, particles=particles).draws)
        for name, (seen, matrix) in found.items()
    }
    return drawn | {f"noise of sd {SD}": (noisy, inverse.denoise(pair, noisy, SD, draws=particles))}


def main(
    steps: int = 1000, chain: int = 100, rows: int = 5, particles: int = 16, out: Path = Path("results/inpainting")
) -> pd.DataFrame:
    """Train a chain on digits; plot held-out digits, what is seen of them, and draws; print the errors."""
    entry = find("diffusion")
    digits = entry.load()
    torch.manual_seed(0)
    pair = entry.pair(digits, steps=chain)
    print(entry.fit(pair, digits.train, steps=steps))
    x, errors = digits.test["x"][:rows], []
    figure = Figure(figsize=(7.4, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (name, (seen, draws)) in zip(panels, views(pair, x, particles).items(), strict=True):
        mean = draws.mean(1)
        errors.append((name, *(float((v - x).square().mean().sqrt()) for v in (seen, draws[:, 0], mean))))
        chosen = draws[:, :: max(1, particles // 4)][:, :4]
        pictures.show(axes, torch.cat([torch.stack([x, seen, mean], 1), chosen], 1), SHAPE)
        axes.set_title(name, fontsize=10)
        axes.set_xticks([4.5, 14.5, 24.5, 50], ["true", "seen", "mean", "four draws"], fontsize=8)
    figure.suptitle(f"Diffusion chain of digits, {steps:,} steps: draws of held-out rows seen in part")
    table = pd.DataFrame(errors, columns=["seen", "error of it", "of a draw", "of the mean"])
    print(table.round(3).to_string(index=False))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv", index=False)
    figure.savefig(out / "inpainting.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
