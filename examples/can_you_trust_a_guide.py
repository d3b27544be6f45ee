"""Can you trust the intervals of a guide? Simulation-based calibration of two guides and of chains.

A regression on two columns of iris that nearly agree, so that its two weights have strongly correlated posteriors.
Parameters are drawn from the prior and data given them; each method is run on each data set, and has to rank the truth
uniformly among its draws (Talts et al. 2018, https://arxiv.org/abs/1804.06788). The mean-field guide is too narrow: its
90 % intervals hold the truth far less often. Run: python examples/can_you_trust_a_guide.py
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from inference import calibrate, fit, sample
from ppl_models import load

GUIDES = {"mean field": AutoNormal, "full covariance": AutoMultivariateNormal}


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)


def guided(guide: type, model: object, data: object, **settings: object) -> object:
    """Fit a guide of Pyro's to the model."""
    return fit((model, guide(model)), data, learning_rate=0.05, **settings)


def main(
    simulations: int = 40, steps: int = 1500, out: Path = Path("results/can_you_trust_a_guide")
) -> dict[str, pd.DataFrame]:
    """Calibrate the methods; print their verdicts, and plot the coverage of their intervals and the ranks."""
    iris = load("iris", standardise=True, dtype=torch.double)
    x = iris.train["x"][:20, [iris.features.index(n) for n in ("petal length (cm)", "petal width (cm)")]]
    methods = {name: partial(guided, guide, steps=steps) for name, guide in GUIDES.items()}
    methods["chains"] = partial(sample, draws=150, warmup=150, chains=2)
    figure, tables = Figure(figsize=(7.4, 3.7), layout="constrained"), {}
    coverage, histogram = figure.subplots(1, 2)
    levels = np.linspace(0, 1, 41)
    error = 2 * np.sqrt(levels * (1 - levels) / simulations)
    coverage.fill_between(levels, levels - error, levels + error, color="0.9", label="exact, ±2 se")
    for k, (name, method) in enumerate(methods.items()):
        found = calibrate(lambda: model, {"x": x, "y": x[:, 0]}, method, simulations=simulations)
        print(f"{name}: {found.verdict}")
        tables[name], ranks = found.table, found.ranks[["w[0]", "w[1]"]].to_numpy()
        inside = (2 * np.abs(ranks - 0.5))[..., None] <= levels
        coverage.plot(levels, inside.mean((0, 1)), color=f"C{k}", label=name)
        histogram.hist(ranks.ravel(), np.linspace(0, 1, 11), histtype="step", color=f"C{k}", lw=1.6)
    coverage.set(xlabel="nominal coverage", ylabel="truths inside", title="central intervals")
    coverage.legend(frameon=False, fontsize=8)
    histogram.set(xlabel="rank of the truth among the draws", ylabel="simulations", title="ranks")
    histogram.axhline(2 * simulations / 10, color="0.6", lw=0.8)
    figure.suptitle(f"Regression on iris, {simulations} simulated data sets: who is calibrated?")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "can_you_trust_a_guide.png", dpi=150)
    return tables


if __name__ == "__main__":
    typer.run(main)
