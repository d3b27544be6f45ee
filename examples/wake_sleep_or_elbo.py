"""Wake-sleep or a bound? Four ways to train one Helmholtz machine, by held-out bound against time.

Wake-sleep (Hinton et al. 1995) optimizes no single objective: its sleep phase fits the guide to dreams. Reweighted
wake-sleep and VIMCO weigh ten particles of each row, NVIL climbs the ELBO with a learnt baseline, TraceGraph without
one. Small images of digits, causes in two layers; log p(x) of held-out rows by 500 particles of each method's own
guide. Run: python examples/wake_sleep_or_elbo.py
"""

from functools import partial
from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from inference import Joint, fit, isolated, log_evidence
from inference.objectives import RWS, VIMCO, WakeSleep
from ppl_models import Dataset, HelmholtzMachine, load

METHODS = {
    "wake-sleep": WakeSleep,
    "RWS, 10 particles": partial(RWS, 10),
    "VIMCO, 10 particles": partial(VIMCO, 10),
    "NVIL, learnt baseline": TraceGraph_ELBO,
    "TraceGraph": TraceGraph_ELBO,
}


def learn(name: str, digits: Dataset, rounds: int, steps: int, batch: int) -> pd.DataFrame:
    """Train by one method in rounds of ``steps`` steps; score held-out rows after each round, in nats per row."""
    with isolated(0):
        pair = HelmholtzMachine(digits.features, (40, 20), baseline=50 if "NVIL" in name else 0)
    pair.centre(digits.train["x"])
    objective, spent, found = METHODS[name](), 0.0, []
    test = digits.test["x"]
    for seed in range(rounds):
        started = perf_counter()
        optimizer = Joint(torch.optim.Adam, {"lr": 0.003})
        fit(pair, digits.train["x"], objective, steps=steps, batch=batch, optimizer=optimizer, draws=1, seed=seed)
        spent += perf_counter() - started
        with isolated(0):
            bound = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
            elbo = -bound.loss(pair.model, pair.guide, test) / len(test)
        held = log_evidence(pair, test, k=500, progress=False).mean
        found.append({"method": name, "steps": steps * (seed + 1), "seconds": spent, "ELBO": elbo, "log p(x)": held})
    return pd.DataFrame(found)


def main(
    rounds: int = 6, steps: int = 400, batch: int = 100, out: Path = Path("results/wake_sleep_or_elbo")
) -> pd.DataFrame:
    """Train by each method; print the final scores and plot them against time."""
    digits = load("digits", binarise=True)
    table = pd.concat([learn(name, digits, rounds, steps, batch) for name in METHODS])
    print(table.groupby("method", sort=False).last().round(2).to_string())
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv", index=False)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    for axes, value in zip(figure.subplots(1, 2), ("ELBO", "log p(x)"), strict=True):
        for name, part in table.groupby("method", sort=False):
            axes.plot(part["seconds"], part[value], "o-", markersize=3, label=name)
        low, high = table[value].quantile([0.15, 1.0])
        axes.set(xlabel="seconds of training", title=f"{value} of held-out rows, nats")
        axes.set_ylim(low, high + 0.05 * (high - low))
    figure.suptitle(f"Helmholtz machine of digits, {rounds * steps:,} steps by each method")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(out / "wake_sleep_or_elbo.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
