"""Does a tighter bound make a better model, or a better guide? One VAE on digits by the ELBO, IWAE-5 and IWAE-50.

Burda, Grosse and Salakhutdinov 2016, "Importance Weighted Autoencoders": more particles give a tighter bound, a better
log p(x) and more active factors. But they train the guide less: its own ELBO falls (Rainforth et al. 2018, "Tighter
Variational Bounds are Not Necessarily Better"). DReG (Tucker et al. 2019) reduces the noise of the guide's gradient for
the same bound. Run: python examples/tighter_bounds.py
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO

from inference import Result, fit, isolated, log_evidence
from inference.objectives import IWAE
from ppl_models import VAE, load

OBJECTIVES = {
    "ELBO": Trace_ELBO,
    "IWAE-5": partial(IWAE, 5),
    "IWAE-50": partial(IWAE, 50),
    "IWAE-50 DReG": partial(IWAE, 50, doubly=True),
}


def measure(pair: VAE, result: Result, test: torch.Tensor, particles: int) -> dict[str, float]:
    """Bounds of a trained pair on held-out rows, in nats per row, and the number of active factors."""
    with torch.no_grad():
        active = int(pair.active(test).sum())
    truth = log_evidence(result, test, k=particles, progress=False)
    loose = log_evidence(result, test, k=1, progress=False)
    return {
        "log p(x)": truth.mean,
        "its error": truth.monte_carlo_error,
        "ELBO": loose.mean,
        "guide's gap": truth.mean - loose.mean,
        "active factors": active,
    }


def main(
    steps: int = 6000, particles: int = 2000, seed: int = 0, out: Path = Path("results/tighter_bounds")
) -> pd.DataFrame:
    """Fit each objective from the same start; print, save and return the table, and plot the gaps."""
    images = load("digits", binarise=True)
    rows = {}
    for name, objective in OBJECTIVES.items():
        with isolated(seed):
            pair = VAE(images.features, 20, hidden=(100,))
        settings = {"steps": steps, "batch": 100, "learning_rate": 0.003, "draws": 1, "seed": seed}
        result = fit(pair, images.train["x"], objective, **settings)
        rows[name] = measure(pair, result, images.test["x"], particles)
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.to_string(float_format=lambda v: f"{v:.2f}"))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(table.index, table["log p(x)"], "o-", label=f"log p(x), {particles:,} particles")
    axes.plot(table.index, table["ELBO"], "s--", label="ELBO of the same pair")
    axes.fill_between(range(len(table)), table["ELBO"], table["log p(x)"], alpha=0.15, label="the guide's gap")
    axes.set(xlabel="trained by", ylabel="nats per held-out row")
    axes.set_title(f"VAE of digits, {steps:,} steps by four bounds")
    axes.legend()
    figure.savefig(out / "tighter_bounds.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
