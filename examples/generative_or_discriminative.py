"""Is it better to model the rows of each class, or only the boundary between the classes?

Naive Bayes models p(y) prod_j p(x_j | y), logistic regression p(y | x) alone. Ng and Jordan (2002, "On Discriminative
vs. Generative Classifiers") find naive Bayes ahead for few training rows m and mostly overtaken later. So it is here,
at m of 10 to 25, if both classes share variances, as in the paper; with variances per class it is hardly ahead. A split
trains on m rows, which standardise the columns too (a constant pixel is only centred), and tests on 30 %, both
stratified. Naive Bayes stands at its exact posterior mean; logistic regression at its mode, with the prior w ~ N(0,
scale^2), by scikit-learn, the fastest for many small fits (C = scale^2; the tests compare it with our pair). Run:
python examples/generative_or_discriminative.py --splits 1000
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import typer
from matplotlib.figure import Figure
from pyro import validation_enabled
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit

from ppl_models import GaussianNaiveBayes, load

PANELS = {"digits 0 v 1": ("digits", 0, 1), "digits 2 v 3": ("digits", 2, 3), "breast cancer": ("breast_cancer", 0, 1)}
RULES = ("naive Bayes", "naive Bayes, same variances", "logistic regression")


@validation_enabled(False)  # Validation reads values, which vmap does not allow.
def naive_bayes(x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> list[torch.Tensor]:
    """Predicted labels of new rows: with variances per class, and with shared variances."""
    pair = GaussianNaiveBayes(x.shape[-1]).double()
    weights, separate, means = (mean for mean, _ in pair.moments(x, y).values())
    rows, total, squares = (part.sum(0, keepdim=True) for part in pair.count(x, y))
    same, _ = pair.parameter_moments(rows, 0 * total, squares)["variances"]
    scores = [torch.distributions.Normal(means, v.sqrt()).log_prob(new[:, None]).sum(-1) for v in (separate, same)]
    return [(weights.log() + score).argmax(-1) for score in scores]


def errors(name: str, *classes: int, splits: int, sizes: int, scale: float) -> pd.DataFrame:
    """Mean and standard error over splits of each rule's test error (%), and of the last less the second."""
    both, curves = load(name, dtype=torch.double), {}
    x, y = (torch.cat([both.train[k], both.test[k]]) for k in "xy")
    x, y = (v[torch.isin(y, torch.tensor(classes))] for v in (x, 1 * (y == classes[1])))
    for m in np.geomspace(4, 0.7 * len(y), sizes).astype(int):
        cuts = StratifiedShuffleSplit(splits, train_size=m, test_size=0.3, random_state=0).split(x, y)
        train, test = map(np.stack, zip(*cuts, strict=True))
        sd, mean = torch.std_mean(x[train], 1, correction=0, keepdim=True)
        seen, new = ((x[part] - mean) / sd.where(sd > 1e-9, 1) for part in (train, test))
        machine = LogisticRegression(C=scale**2, tol=1e-6, max_iter=10_000)
        logistic = [machine.fit(*rows).predict(rest) for *rows, rest in zip(seen, y[train], new, strict=True)]
        guesses = [*torch.func.vmap(naive_bayes)(seen, y[train], new), torch.tensor(np.stack(logistic))]
        wrong = pd.DataFrame({k: 100 * (g != y[test]).double().mean(1) for k, g in zip(RULES, guesses, strict=True)})
        curves[m] = wrong.assign(gap=wrong[RULES[2]] - wrong[RULES[1]]).agg(["mean", "sem"]).unstack()
    return pd.DataFrame(curves).T.rename_axis("m")


def main(splits: int = 200, sizes: int = 10, scale: float = 1.0, out: Path = Path("results/examples")) -> pd.DataFrame:
    """Print, plot and return test errors in percent, with standard errors over splits."""
    table = pd.concat({k: errors(*v, splits=splits, sizes=sizes, scale=scale) for k, v in PANELS.items()})
    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    for axes, title in zip(figure.subplots(1, 3), PANELS, strict=True):
        curves = table.loc[title]
        for rule in RULES:
            mean, sem = curves[rule].T.to_numpy()
            axes.semilogx(curves.index, mean, "o-", ms=3)
            axes.fill_between(curves.index, mean - 2 * sem, mean + 2 * sem, alpha=0.2)
        ahead, behind = (curves.index[sign * curves["gap", "mean"] > 2 * curves["gap", "sem"]] for sign in (1, -1))
        axes.set(title=f"{title}:\novertaken at m = {ahead.max()}–{behind.min()}", xlabel="training rows m")
    figure.axes[0].set_ylabel("test error (%) ± 2 se")
    figure.suptitle(f"Naive Bayes and logistic regression on {splits:,} splits")
    figure.legend(axes.lines, RULES, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "generative_or_discriminative.png", dpi=150)
    print(table.to_string(float_format="{:.2f}".format))
    return table


if __name__ == "__main__":
    typer.run(main)
