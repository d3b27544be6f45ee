"""Can a network learn causes that are independent? Predictability minimization against a plain autoencoder.

Both code a row in four units between 0 and 1. Predictors guess each unit from the others, and the encoder makes them
fail while the decoder still needs the code (Schmidhuber 1992). Pairs of units then share a third of the information,
near the 0.02 bits that this estimate gives independent ones, and the rows are coded less exactly. Run:
python examples/unpredictable.py
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO

from inference import fit, isolated
from inference.objectives import Predictability
from ppl_models import FactorialCode, load
from ppl_models.models.factorial_code import mutual_information

UNITS, BINS = 4, 5
OBJECTIVES = {
    "autoencoder": Trace_ELBO,
    "predictability minimization": partial(Predictability, Trace_ELBO, weight=10.0),
}


def main(steps: int = 3000, seed: int = 0, out: Path = Path("results/unpredictable")) -> pd.DataFrame:
    """Fit both objectives from one start; print and plot the information that units share, and two of the units."""
    tumours = load("breast_cancer", standardise=True)
    x, rows = torch.cat([tumours.train["x"], tumours.test["x"]]), []
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    panels = figure.subplots(2, 2)
    for (name, objective), line in zip(OBJECTIVES.items(), panels, strict=True):
        with isolated(seed):
            pair = FactorialCode(tumours.features, UNITS)
        fit(pair, tumours.train["x"], objective, steps=steps, batch=100, learning_rate=0.003, draws=1, seed=seed)
        with torch.no_grad():
            code, error = pair.encode(x), (pair.decode(pair.encode(x)) - x).square().mean()
        shared = mutual_information(code, BINS).numpy()
        off = shared[~np.eye(UNITS, dtype=bool)]
        rows.append((name, float(off.mean()), float(shared.diagonal().mean()), float(error)))
        line[0].imshow(shared, cmap="Blues", vmin=0, vmax=2.4)
        for i, j in product(range(UNITS), repeat=2):
            line[0].text(j, i, f"{shared[i, j]:.2f}", ha="center", va="center", color="white" if i == j else "black")
        line[0].set(xticks=[], yticks=[], title=f"shared: {off.mean():.2f} bits", ylabel=name)
        a, b = divmod(int((shared - np.diag(shared.diagonal())).argmax()), UNITS)
        line[1].plot(*code[:, [a, b]].numpy().T, ".", ms=3)
        line[1].set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), title="the two that share most", aspect="equal")
    figure.suptitle(f"Four code units of tumours, {steps:,} steps: bits that units share")
    table = pd.DataFrame(rows, columns=["objective", "shared bits", "entropy, bits", "squared error"])
    print(table.round(3).to_string(index=False))
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv", index=False)
    figure.savefig(out / "unpredictable.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
