"""Can a map between two sets of images be learnt without a single pair? CycleGAN on digits and turned, inverted ones.

Half of the digits are the domain a; the other half, turned by a quarter and inverted, are b. Two maps have to fool a
discriminator each and to undo one another (Zhu et al. 2017, https://arxiv.org/abs/1703.10593). The maps are affine with
a tone curve: of dense ones countless many fit, and none of them need be the true one. The true map is known here and
measures the error. Run: python examples/without_pairs.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor

from inference import two_sample
from ppl_models import find, pictures

SHAPE = (8, 8)


def turned(x: Tensor, quarters: int) -> Tensor:
    """Rows of images turned by quarters and inverted: the true map, which training does not see."""
    return 1 - torch.rot90(x.reshape(-1, *SHAPE), quarters, (1, 2)).flatten(1)


def main(steps: int = 3000, seed: int = 0, out: Path = Path("results/without_pairs")) -> pd.DataFrame:
    """Train a CycleGAN; print the errors of both maps and plot held-out rows, their translation, and the way back."""
    entry = find("cyclegan")
    images = entry.load()
    torch.manual_seed(seed)
    pair = entry.pair(images)
    print(entry.fit(pair, images.train, steps=steps, seed=seed))
    rows, figure = [], Figure(figsize=(7.4, 3.5), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("a", "b", 1), ("b", "a", -1)), strict=True)
    for axes, (here, there, quarters) in panels:
        x, back = images.test[here], here == "b"
        mapped = pair.translate(x, back=back)
        again, truth = pair.translate(mapped, back=not back), turned(x, quarters)
        error = 100 * float((mapped - truth).square().mean() / truth.var(0).mean())
        distance = two_sample.energy_distance(mapped, images.test[there])
        rows.append((f"{here} to {there}", error, distance.value, distance.error))
        pictures.show(axes, torch.stack([x[:6], mapped[:6], truth[:6], again[:6]]), SHAPE)
        axes.set(title=f"{here} to {there}: error {error:.0f} % of variance", yticks=[4.5, 14.5, 24.5, 34.5])
        axes.set_yticklabels([here, "mapped", "true map", "and back"])
    figure.suptitle(f"CycleGAN between digits and turned ones, {steps:,} steps without pairs")
    table = pd.DataFrame(rows, columns=["map", "error, % of variance", "energy distance", "its error"])
    print(table.round(4).to_string(index=False))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv", index=False)
    figure.savefig(out / "without_pairs.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
