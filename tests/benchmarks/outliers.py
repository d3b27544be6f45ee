"""``python -m tests.benchmarks outliers``: outliers of real tables, by -log p(x) and by isolation forests.

One class is what is usual and the other what is to be found. In each split half of the usual rows are fitted, a quarter
calibrate, and the rest stand beside the rows of the other class. AUC, the fraction of usual rows that are flagged at a
false-alarm rate of 5 % and the fraction of others that are: means over splits with their standard errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from torch import Tensor

from inference import Result, outlier_score
from inference.outliers import conformal
from ppl_models import PPCA, GaussianMixture, load
from ppl_models.zoo import methods

from .table import markdown

RATE = 0.05
CASES = {"breast_cancer": (1,), "wine": (1, 2)}
"""Data sets, and the labels of their usual rows (benign; the second and third cultivar)."""
Scored = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""From rows to fit, calibrate and score, and a seed, to scores of the last and their p-values."""


def ppca(train: Tensor, known: Tensor, new: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    return _score(methods.closed_form(PPCA(train.shape[1], 5), {"x": train}, draws=1, progress=False), known, new)


def mixture(train: Tensor, known: Tensor, new: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    pair = GaussianMixture(train.shape[1], components=2, covariance="tied", prior=False, floor=0.01)
    return _score(methods.em(pair, {"x": train}, draws=1, seed=seed, progress=False), known, new)


def _score(result: Result, known: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    found = outlier_score(result, new, calibration=known, rate=RATE)
    return found.scores, found.p_values


def forest(train: Tensor, known: Tensor, new: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    forest = IsolationForest(n_estimators=200, random_state=seed).fit(train.numpy())
    scores, calibration = (torch.as_tensor(-forest.score_samples(v.numpy())) for v in (new, known))
    return scores, conformal(scores, calibration)


METHODS: dict[str, Scored] = {"PPCA, 5 factors": ppca, "Gaussian mixture, 2, tied": mixture, "IsolationForest": forest}


def measure(case: str, seed: int) -> list[dict[str, object]]:
    data = load(case)
    x, y = (torch.cat([data.train[n], data.test[n]]) for n in ("x", "y"))
    usual = torch.isin(y, torch.tensor(CASES[case]))
    order = torch.randperm(int(usual.sum()), generator=torch.Generator().manual_seed(seed))
    rows, half = x[usual][order], len(order) // 2
    mean, sd = rows[:half].mean(0), rows[:half].std(0)
    train, known, fresh = ((v - mean) / sd for v in rows.tensor_split([half, half + len(order) // 4]))
    new = torch.cat([fresh, (x[~usual] - mean) / sd])
    strange = np.arange(len(new)) >= len(fresh)
    records = []
    for name, method in METHODS.items():
        scores, p = method(train, known, new, seed)
        alarms = (p <= RATE).numpy()
        figures = {"AUC": roc_auc_score(strange, scores.numpy()), "false alarms": alarms[~strange].mean()}
        records.append({"case": case, "method": name, **figures, "found": alarms[strange].mean()})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks outliers", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args(sys.argv[2:])
    frame = pd.DataFrame([r for case in CASES for seed in range(options.seeds) for r in measure(case, seed)])
    print(summary(frame))


def summary(frame: pd.DataFrame) -> str:
    """Means over seeds and their standard errors, as a table."""
    groups = frame.groupby(["case", "method"], sort=False)
    mean, error = groups.mean(), groups.sem()
    shown = (mean.map("{:.3f}".format) + error.map(" ± {:.3f}".format)).where(mean.notna(), "-")
    return markdown(shown.reset_index())


if __name__ == "__main__":
    main()
