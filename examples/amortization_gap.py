"""What does an amortized guide cost? A VAE of digits: its encoder, the best guide per row, and HMC on the same decoder.

log p(x) - ELBO is the sum of two gaps (Cremer, Li and Duvenaud 2018): the approximation gap, which the best normal
distribution per row leaves, and the amortization gap between that and the encoder. With two factors a grid is exact.
A bimodal posterior misleads guides, and chains that stay in one mode. Run: python examples/amortization_gap.py
"""

from pathlib import Path

import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.distributions import Normal

from inference import fit, log_evidence, sample
from ppl_models import VAE, load

SIDE = torch.linspace(-6, 6, 241)
GRID = torch.stack(torch.meshgrid(SIDE, SIDE, indexing="xy"), -1)
CIRCLE = torch.view_as_real(torch.polar(torch.ones(100), torch.linspace(0, 6.3, 100)))


def joint(pair: VAE, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return pair.likelihood(z).log_prob(x) + pair.prior().log_prob(z)


def free_guide(pair: VAE, x: torch.Tensor, steps: int) -> Normal:
    """The best normal distribution of the code of each row, with the decoder fixed."""
    guide = AutoNormal(pair.model, init_loc_fn=init_to_value(values={"z": pair.encode(x)}), init_scale=0.3)
    objective = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    fit((pair.model, guide), x, objective, steps=steps, draws=1)
    return Normal(guide.locs.z.detach(), guide.scales.z.detach())


def measure(pair: VAE, x: torch.Tensor, guides: dict[str, Normal]) -> pd.DataFrame:
    """log p(x) of each row, by the grid and by annealed chains, and its ELBO under each guide, in nats."""
    exact = torch.stack([joint(pair, row, GRID).logsumexp((0, 1)) for row in x]) + 2 * (SIDE[1] - SIDE[0]).log()
    rows = {"log p(x), grid": exact, "log p(x), HMC": log_evidence(pair, x, "annealed", temperatures=100).values}
    for name, guide in guides.items():
        z = guide.sample((2000,))
        rows[f"ELBO, {name}"] = (joint(pair, x, z) - guide.log_prob(z).sum(-1)).mean(0)
    table = pd.DataFrame({name: value.numpy() for name, value in rows.items()})
    gaps = table[["log p(x), grid", "ELBO, free guide", "ELBO, encoder"]].diff(-1, axis=1).iloc[:, :2]
    return table.join(gaps.set_axis(["gap of the family", "amortization gap"], axis=1))


def main(steps: int = 3000, rows: int = 100, seed: int = 0, out: Path = Path("results/amortization")) -> pd.DataFrame:
    """Print the gaps of training and test rows; plot posterior, HMC draws and guides (2 sd) of three test rows."""
    torch.manual_seed(seed)
    digits = load("digits", binarise=True)
    pair, table = VAE(digits.features, 2, hidden=(200,)), {}
    fit(pair, digits.train["x"], steps=steps, batch=100, learning_rate=0.003, draws=1, seed=seed)
    pair.requires_grad_(False).eval()
    for name, x in {"seen": digits.train["x"][:rows], "unseen": digits.test["x"][:rows]}.items():
        guides = {"encoder": pair.posterior(x).base_dist, "free guide": free_guide(pair, x, steps // 3)}
        table[name] = (measured := measure(pair, x, guides)).mean()
    print((frame := pd.DataFrame(table)).to_string(float_format="{:.2f}".format))
    order = measured["amortization gap"].argsort().to_list()
    shown = {"narrowest": order[0], "median": order[len(order) // 2], "widest": order[-1]}
    chains = sample(pair.model, x[list(shown.values())], draws=500, warmup=500, seed=seed).draws["z"]
    ends = torch.stack(chains.aminmax(dim=0), -1).transpose(0, 1).tolist()
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    for k, (title, row, axes) in enumerate(zip(shown, shown.values(), figure.subplots(1, 3), strict=True)):
        axes.contourf(SIDE, SIDE, joint(pair, x[row], GRID).exp(), 12, cmap="Blues")
        axes.plot(*chains[::80, k].T, "k.", markersize=1.5, label="HMC")
        for (name, guide), colour in zip(guides.items(), ("tab:red", "tab:green"), strict=True):
            axes.plot(*(guide.loc[row] + 2 * guide.scale[row] * CIRCLE).T, color=colour, label=name)
        axes.set(title=f"{title} gap", xlim=ends[0][k], ylim=ends[1][k], xticks=[], yticks=[])
    figure.suptitle(f"VAE of digits, {steps:,} steps: posterior of three test rows, and guides (2 sd)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "amortization_gap.png", dpi=150)
    return frame


if __name__ == "__main__":
    typer.run(main)
