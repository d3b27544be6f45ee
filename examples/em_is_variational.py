"""Is EM a variational method? Both steps of EM increase the ELBO: one in the guide, the other in the model.

L(q, theta) = E_q[log p(x, z | theta) - log q(z)]: the E-step sets q to the posterior of the labels, where L equals the
log likelihood; the M-step maximises L over theta with q fixed (Neal and Hinton 1998, "A view of the EM algorithm that
justifies incremental, sparse, and other variants"). The data are the second principal component of wine, of three
cultivars. Run: python examples/em_is_variational.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from inference import fit
from inference.objectives import EM
from ppl_models import GaussianMixture, load


def joint(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """log p(x, z | theta) of each row and component, (N, K)."""
    means, scales = parameters["means"].flatten(), parameters["scales"].flatten()
    return torch.distributions.Normal(means, scales).log_prob(x) + parameters["weights"].log()


def bound(responsibilities: Tensor, log_joint: Tensor) -> float:
    """The ELBO of responsibilities (N, K), in nats per row."""
    return float((responsibilities * (log_joint - responsibilities.clamp_min(1e-300).log())).sum(-1).mean())


def main(steps: int = 12, components: int = 3, out: Path = Path("results/em")) -> pd.DataFrame:
    """Run EM by hand, compare it with ``fit`` and the objective EM; print and plot both."""
    wine = load("wine", standardise=True, dtype=torch.double).train["x"]
    x = torch.pca_lowrank(wine, 2, niter=20)[0][:, 1:] * len(wine) ** 0.5
    pair = GaussianMixture(1, components=components, prior=False, guide=AutoDelta).double()
    start = pair.start(x)
    q, parameters, climbed = start, pair.maximise(start, x), []
    for step in range(steps):
        after_m = bound(q, joint(parameters, x)) if step else float("nan")
        q = joint(parameters, x).softmax(-1)
        climbed.append({"after the M-step": after_m, "after the E-step": bound(q, joint(parameters, x))})
        parameters = pair.maximise(q, x)
    result = fit(pair, x, EM(pair.maximise, start, max_plate_nesting=1), steps=steps, draws=1)
    table = pd.DataFrame(climbed).assign(fit=-result.losses / len(x))
    print(table.to_string(float_format=lambda v: f"{v:.5f}"))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv")
    ladder = table[["after the M-step", "after the E-step"]].to_numpy().ravel()[1:]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(torch.arange(1, 2 * steps) / 2, ladder, "-", color="0.6", label="ELBO")
    axes.plot(table.index[1:], table["after the M-step"].iloc[1:], "^", label="after the M-step (model)")
    axes.plot(table.index + 0.5, table["after the E-step"], "o", label="after the E-step (guide)")
    axes.plot(table.index + 0.5, table["fit"], "x", color="k", label="fit(pair, x, EM(...))")
    axes.set(xlabel="step", ylabel="nats per row")
    axes.set_title(f"Mixture of {components} normals on wine, {steps} steps of EM:\nboth half-steps raise the ELBO")
    axes.legend(loc="lower right")
    figure.savefig(out / "em_is_variational.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
