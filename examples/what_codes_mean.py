"""What does an InfoGAN put into its code? Ten states, learnt without labels, and the digits that they are read from.

The generator reads a code c of ten states beside the noise, and the guide reads it back: a bound of the information of
c on the row is maximised (Chen et al. 2016, https://arxiv.org/abs/1606.03657). Of a few starts the one is kept whose
code has the most information on shaken rows, which takes no labels. Run: python examples/what_codes_mean.py
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from inference import isolated
from ppl_models import find, load, pictures
from ppl_models.models.parts.information import mutual_information


def information(pair: object, x: torch.Tensor) -> float:
    """Mutual information of the codes of the same rows, each shaken in two ways, in nats."""
    with isolated(0), torch.no_grad():
        one, other = (pair.reader(pair.trunk(x)).softmax(-1).double() for _ in range(2))
    return float(mutual_information(one.mT @ other + other.mT @ one))


def main(steps: int = 4000, starts: int = 2, out: Path = Path("results/what_codes_mean")) -> pd.DataFrame:
    """Train an InfoGAN of digits; plot rows by code, and the codes of held-out digits."""
    entry, digits = find("infogan"), load("digits", unit=True)
    x, labels, trained = digits.train["x"], digits.test["y"], []
    for seed in range(starts):
        with isolated(seed):
            pair = entry.pair(digits)
        print(entry.fit(pair, x, steps=steps, seed=seed))
        trained.append((information(pair, x), seed, pair))
    *_, pair = max(trained)
    print("information of the starts, nats:", [round(start[0], 2) for start in trained])
    with torch.no_grad():
        codes = pair.reader(pair.trunk.eval()(digits.test["x"])).argmax(-1)
    counts = pd.crosstab(codes.numpy(), labels.numpy()).reindex(range(10), columns=range(10), fill_value=0)
    # One state per digit, matched so that most rows agree: the labels are only used here.
    states, matched = linear_sum_assignment(-counts.to_numpy())
    order = states[np.argsort(matched)]
    agree = counts.to_numpy()[states, matched].sum() / len(labels)
    table = counts.loc[order].rename_axis("code").rename_axis("digit", axis=1)
    print(f"{table.to_string()}\n{agree:.2f} of the held-out digits are read as the state of their digit")
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    made = pair.generate(120, c=torch.as_tensor(order).repeat_interleave(12))
    pictures.show(left, made.unflatten(0, (10, 12)), (8, 8))
    left.set(title="generated, one code per line", yticks=10 * np.arange(10) + 4.5, ylabel="code")
    left.set_yticklabels(order)
    right.imshow(table, cmap="Blues", aspect="auto")
    for (i, j), n in np.ndenumerate(table.to_numpy()):
        if n:
            right.text(j, i, n, ha="center", va="center", fontsize=8, color="white" if n > 30 else "black")
    right.set(title="held-out digits by code read", xlabel="digit", xticks=range(10), yticks=range(10))
    right.set_yticklabels(order)
    figure.suptitle(f"InfoGAN of digits, {steps:,} steps: {100 * agree:.0f} % agree with labels not seen")
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "table.csv")
    figure.savefig(out / "what_codes_mean.png", dpi=150)
    return table


if __name__ == "__main__":
    typer.run(main)
