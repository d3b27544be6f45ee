"""Three ways to infer the causes of an image: SVI, wake-sleep and Gibbs on one sigmoid belief net, and enumeration.

The net is known; the target is p(z | x) of rows drawn from it. The mean field (SVI) minimises KL(q, p) for each row: it
picks one explanation, and probabilities are too close to 0 and 1. The sleep phase minimises KL(p, q) over dreams:
probabilities are right on average, but one network without hidden units serves all rows, an error that more steps do
not remove. Gibbs draws from the posterior itself. Run: python examples/three_ways.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from inference import fit, isolated, prior_predictive, sample
from inference.objectives import WakeSleep
from ppl_models import HelmholtzMachine, SigmoidBeliefNet

BOUND = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)


def a_net() -> HelmholtzMachine:
    """A net with competing causes: large weights of both signs, and negative biases."""
    with isolated(0):
        pair = HelmholtzMachine(10, (5, 3)).double()
        for weight, bias in zip(pair.weights, pair.biases, strict=False):
            weight.data.normal_(0, 3.0)
            bias.data.fill_(-1.0)
    return pair


def main(rows: int = 60, steps: int = 3000, chains: int = 200, out: Path = Path("results/three_ways")) -> pd.DataFrame:
    """Infer the causes in three ways; print and plot the errors and the gaps of the bounds."""
    net = a_net()
    x = prior_predictive(net, size=rows, draws=1)["x"][0]
    free = SigmoidBeliefNet(net.features, net.layers).double()
    free.load_state_dict({n: v for n, v in net.state_dict().items() if n.startswith(("weights", "biases"))})
    for pair in (net, free):
        # Only the guides are trained.
        for name, p in pair.named_parameters():
            p.requires_grad_(not name.startswith(("weights", "biases")))
        pair.train(False)
    exact, evidence = torch.cat(list(net.marginals(x).values()), 1), float(net.log_evidence(x).mean())
    results = {
        "SVI": fit(free, x, TraceGraph_ELBO(), steps=steps, learning_rate=0.05, draws=2000),
        "wake-sleep": fit(net, x, WakeSleep(), steps=steps, learning_rate=0.05, draws=2000),
        "Gibbs": sample(net, x, chains=chains),
    }
    table, estimates = [], {}
    for name, result in results.items():
        estimates[name] = torch.cat([result.draws[s].double().mean(0) for s in net.sites], 1)
        pair = {"SVI": free, "wake-sleep": net}.get(name)
        with isolated(0):
            elbo = float("nan") if pair is None else -BOUND.loss(pair.model, pair.guide, x) / rows
        error = float((estimates[name] - exact).square().mean().sqrt())
        table.append({"error": error, "ELBO": elbo, "gap": evidence - elbo, "seconds": sum(result.seconds.values())})
    frame = pd.DataFrame(table, index=pd.Index(results, name="method"))
    print(f"log p(x) = {evidence:.3f} nats per row\n{frame.round(3).to_string()}")
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / "table.csv")
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    for axes, (name, value) in zip(figure.subplots(1, 3, sharey=True), estimates.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7")
        axes.plot(exact.flatten(), value.flatten(), ".", alpha=0.4)
        gap = "no bound" if name == "Gibbs" else f"gap {frame.gap[name]:.2f} nats"
        axes.set(xlabel="exact probability", aspect="equal")
        axes.set_title(f"{name}:\nerror {frame.error[name]:.3f}, {gap}", fontsize=10)
    figure.suptitle(f"Causes of {rows} rows of a sigmoid belief net, {steps:,} steps or {chains} chains")
    figure.axes[0].set_ylabel("estimated probability")
    figure.savefig(out / "three_ways.png", dpi=150)
    return frame


if __name__ == "__main__":
    typer.run(main)
