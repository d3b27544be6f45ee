"""How do I write a pair of my own, and what do I get for it? Robust regression, as a class and as plain functions.

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
from pyro.nn import PyroParam
from torch import Tensor

from inference import Comparison, compare, fit, sample
from ppl_models import load
from ppl_models.models.pair import Pair


class RobustRegression(Pair):
    """Data: x (N, D), y (N,). A class adds named columns, minibatches and parameters; its guide lets s follow nu."""

    def __init__(self, features: list[str]) -> None:
        super().__init__()
        size = self.name_dimension("features", features)
        self.dims = {"w": ("features",)}
        self.centre, self.slope = PyroParam(torch.zeros(2 + size)), PyroParam(torch.tensor(0.0))
        self.sd = PyroParam(torch.full((2,), 0.1), dist.constraints.positive)
        self.root = PyroParam(0.1 * torch.eye(size), dist.constraints.lower_cholesky)

    def model(self, x: Tensor, y: Tensor | None = None, *, size: int | None = None, rows: Tensor | None = None) -> None:
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


def guide(x: Tensor, y: Tensor | None = None) -> None:
    centre = pyro.param("centre", x.new_zeros(2 + x.shape[1]))
    sd = pyro.param("sd", 0.1 * torch.ones_like(centre), constraint=dist.constraints.positive)
    pyro.sample("nu", dist.LogNormal(centre[0], sd[0]))
    pyro.sample("s", dist.LogNormal(centre[1], sd[1]))
    pyro.sample("w", dist.Normal(centre[2:], sd[2:]).to_event(1))


def main(steps: int = 3000, draws: int = 1000, out: Path = Path("results/examples")) -> Comparison:
    """Hold both guides against chains, and all of them against tumours left out; print, save and return it."""
    names = ["mean radius", "mean texture", "mean smoothness", "mean compactness", "mean symmetry"]
    tumours = load("breast_cancer", standardise=True, dtype=torch.double)
    x, y = [tumours.features.index(name) for name in names], tumours.features.index("worst radius")
    train, test = ({"x": part["x"][:, x], "y": part["x"][:, y]} for part in (tumours.train, tumours.test))
    chains = sample(model, train, draws=draws, warmup=draws, chains=2)
    methods = {"class": partial(fit, steps=steps), "class, batches of 64": partial(fit, steps=steps, batch=64)}
    methods |= {"functions": lambda _, rows: fit((model, guide), rows, steps=steps), "chains": lambda *_: chains}
    truth = {site: (values.mean(0), values.std(0)) for site, values in chains.draws.items()}
    comparison = compare(lambda: RobustRegression(names).double(), train, methods, truth=truth, heldout=test)
    comparison.save(out / "your_own_pair")
    print(comparison)
    return comparison


if __name__ == "__main__":
    typer.run(main)
