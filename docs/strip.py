"""The pictures at the top of the README: ``python -m docs.strip`` makes docs/static/strip.png, in minutes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import shrink
from inference import fit, isolated
from inference.objectives import Adversarial, Denoising
from ppl_models import (
    GAN,
    VAE,
    BayesianNetwork,
    DiffusionChain,
    GaussianNaiveBayes,
    load,
    methods,
    pictures,
    simulate_modes,
)

STRIP = Path(__file__).parent / "static" / "strip.png"
QUIET: dict[str, Any] = {"progress": False, "draws": 1}


def posterior(axes: Axes) -> None:
    """Exact posterior draws of two class means of iris."""
    iris = load("iris", dtype=torch.double)
    pair = GaussianNaiveBayes(iris.features, iris.classes).double()
    means = methods.exact(pair, iris.train, draws=1500, progress=False).draws["means"].numpy()
    for k in range(3):
        axes.plot(means[:, k, 2], means[:, k, 3], ".", ms=1.5, alpha=0.5)
    axes.set(xticks=[], yticks=[], title="posterior")


def vae(axes: Axes) -> None:
    """The plane of the two factors of a VAE of digits."""
    digits = load("digits", binarise=True)
    pair = VAE(digits.features, 2, hidden=(200,))
    fit(pair, digits.train["x"], steps=3000, batch=100, learning_rate=0.003, **QUIET)
    at = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(9) + 0.5) / 9)
    plane = torch.stack([at.expand(9, 9), at.flip(0)[:, None].expand(9, 9)], -1)
    pictures.show(axes, pair.decode(plane), (8, 8))
    axes.set_title("VAE")


def gan(axes: Axes) -> None:
    """Samples of a GAN of a ring, over what its discriminator thinks."""
    x, *_ = simulate_modes("ring", 20_000, 0)
    pair = GAN(2, 2, hidden=(128, 128, 128))
    steps: dict[str, Any] = {"steps": 3000, "batch": 256, "learning_rate": 0.001}
    methods.adversaries(pair, x, Adversarial(r1=0.1), **steps, **QUIET)
    pictures.odds(axes, pair, x)
    axes.set_title("GAN")


def diffusion(axes: Axes) -> None:
    """Digits by a diffusion chain, from noise on the left."""
    x = load("digits", unit=True).train["x"]
    pair = DiffusionChain(64, hidden=(256, 256), schedule="log_snr", scale=float(x.std()), shift=float(x.mean()))
    fit(pair, x, Denoising(pair.steps, simple=True), steps=4000, batch=128, learning_rate=0.001, **QUIET)
    random = torch.Generator().manual_seed(1)
    start = torch.randn(9, 64, generator=random)
    with torch.no_grad():
        passed = torch.stack([pair.unscaled(z) for z in (start, *pair.denoise_steps(start, random))], 1)
    shown = torch.linspace(0.0, 1.0, 9) * (passed.shape[1] - 1)
    pictures.show(axes, passed[:, shown.long()], (8, 8))
    axes.set_title("diffusion")


def belief_net(axes: Axes) -> None:
    """The tree that a Bayesian network learns over the pixels of digits."""
    digits = load("digits", binarise=True)
    # Pixels that hardly ever vary tell nothing of one another.
    x, kept = digits.train["x"], [k for k, v in enumerate(digits.train["x"].var(0)) if v > 0.01]
    place = {digits.features[k]: divmod(k, 8)[::-1] for k in kept}
    pair = BayesianNetwork.chow_liu(x[:, kept], list(place))
    axes.imshow(1 - x.mean(0).reshape(8, 8).numpy(), cmap="gray", vmin=-0.6, vmax=1)
    for child, parents in pair.parents.items():
        for parent in parents:
            axes.plot(*zip(place[parent], place[child], strict=True), color="C0", lw=1.4)
    axes.plot(*zip(*place.values(), strict=True), "o", ms=3, color="C1")
    axes.set(xticks=[], yticks=[], title="belief net")


def main() -> None:
    """Make all pictures, and write them side by side."""
    figure = Figure(figsize=(11, 2.5), layout="constrained")
    drawn = (posterior, vae, gan, diffusion, belief_net)
    for axes, draw in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        with isolated(0):
            draw(axes)
        axes.set_box_aspect(1)
    with tempfile.TemporaryDirectory() as folder:
        figure.savefig(whole := Path(folder) / "strip.png", dpi=100)
        shrink(whole, STRIP)


if __name__ == "__main__":
    main()
