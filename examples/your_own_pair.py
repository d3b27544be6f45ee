"""How do I write a pair of my own, and what do I get for it? Robust regression, as a class and as a function.

nu ~ Gamma(2, 0.1), s ~ HalfNormal(1), w ~ N(0, 1), y_n ~ StudentT(nu, w x_n, s): Lange, Little and Taylor 1989, "Robust
Statistical Modeling Using the t Distribution". y is the radius of the worst nuclei of a tumour, x means over all of its
nuclei; some have far worse nuclei than the means tell, so nu is small. Run: python examples/your_own_pair.py
"""

from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroParam
from torch import Tensor

from inference import Comparison, compare, fit, sample
from ppl_models import Pair, load


class RobustRegression(Pair):
    """Data: x (N, D), y (N,). A class adds named columns, minibatches and parameters; its guide lets s follow nu."""

    def __init__(self, features: list[str]) -> None:
        super().__init__()
        size = self.name_dimension("features", features)
        self.dims = {"w": ("features",)}
        self.centre, self.slope = PyroParam(torch.zeros(2 + size)), PyroParam(torch.tensor(0.0))
        self.sd = PyroParam(torch.full((2,), 0.1), dist.constraints.positive)
        self.root = PyroParam(0.1 * torch.eye(size), dist.constraints.lower_cholesky)

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        nu = pyro.sample("nu", dist.Gamma(x.new_tensor(2.0), 0.1))
        s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.0)))
        w = pyro.sample("w", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
        with self.rows(x):
            pyro.sample("y", dist.StudentT(nu, (x * w).sum(-1), s), obs=y)

    def guide(self, x: Tensor, **_: Tensor) -> None:
        nu = pyro.sample("nu", dist.LogNormal(self.centre[0], self.sd[0]))
        pyro.sample("s", dist.LogNormal(self.centre[1] + self.slope * (nu.log() - self.centre[0]), self.sd[1]))
        pyro.sample("w", dist.MultivariateNormal(self.centre[2:], scale_tril=self.root))


def model(x: Tensor, y: Tensor | None = None) -> None:
    nu = pyro.sample("nu", dist.Gamma(x.new_tensor(2.0), 0.1))
    s = pyro.sample("s", dist.HalfNormal(x.new_tensor(1.0)))
    w = pyro.sample("w", dist.Normal(torch.zeros_like(x[0]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.StudentT(nu, (x * w).sum(-1), s), obs=y)


def main(steps: int = 3000, draws: int = 1000, out: Path = Path("results/examples")) -> Comparison:
    """Hold both guides against chains, and all of them against tumours left out; print, save and return it."""
    names = ["mean radius", "mean texture", "mean smoothness", "mean compactness", "mean symmetry"]
    tumours = load("breast_cancer", standardise=True, dtype=torch.double)
    *x, y = (tumours.features.index(name) for name in (*names, "worst radius"))
    train, test = ({"x": part["x"][:, x], "y": part["x"][:, y]} for part in (tumours.train, tumours.test))
    chains = sample(model, train, draws=draws, warmup=draws, chains=2)
    methods = {"class": partial(fit, steps=steps), "class, batches of 64": partial(fit, steps=steps, batch=64)}
    methods |= {"function": lambda *_: fit((model, AutoNormal(model)), train, steps=steps), "chains": lambda *_: chains}
    truth = {site: (values.mean(0), values.std(0)) for site, values in chains.draws.items()}
    comparison = compare(lambda: RobustRegression(names).double(), train, methods, truth=truth, heldout=test)
    print(comparison)
    figure, shown = Figure(figsize=(7.2, 3.3), layout="constrained"), ("chains", "class", "function")
    for name, axes in zip(shown, figure.subplots(1, 3, sharex=True, sharey=True), strict=True):
        axes.plot(*(comparison.results[name].draws[site] for site in ("nu", "s")), ".", ms=3, alpha=0.4)
        axes.set(title=name, xlabel="nu: degrees of freedom", ylabel="s: scale of the noise")
        axes.label_outer()
    figure.suptitle(f"Robust regression of tumours, {steps:,} steps: does s follow nu?")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "your_own_pair.png", dpi=150)
    return comparison


if __name__ == "__main__":
    typer.run(main)
