"""``python -m tests.benchmarks imputation``: entries of wine that are missing at random, drawn back.

Pairs are fitted to the whole rows of the training split; of the held-out rows three entries in ten are missing, by
masks that differ from seed to seed. Root mean square error of the mean of the draws, in standard deviations of the
feature, and the fraction of true entries within the central 90 % of the draws: means over masks with their standard
errors. Scikit-learn's imputers are fitted to the same whole rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, SimpleImputer
from torch import Tensor

from inference import Result, fit, impute
from ppl_models import PPCA, VAE, GaussianMixture, GaussianNaiveBayes, load
from ppl_models.zoo import methods

from .outliers import summary

MISSING, DRAWS = 0.3, 100


def results(data: dict[str, Tensor]) -> dict[str, Result]:
    """A Result of each pair, fitted to whole rows."""
    torch.manual_seed(0)
    x = data["x"]
    mixture = GaussianMixture(13, components=3, covariance="tied", prior=False, floor=0.01)
    quiet: dict[str, Any] = {"progress": False, "draws": 200}
    return {
        "PPCA, 4 factors": methods.closed_form(PPCA(13, 4), {"x": x}, **quiet),
        "Gaussian mixture, 3, tied": methods.em(mixture, {"x": x}, **quiet),
        "naive Bayes, labels of the fit": methods.exact(GaussianNaiveBayes(13, 3), data, **quiet),
        "VAE, 4 factors": fit(VAE(13, 4, hidden=(30,), likelihood="gaussian"), x, steps=1500, **quiet),
    }


def sklearn(make: Callable[[int], Any], train: Tensor, seed: int, gaps: Tensor) -> Tensor:
    """Completed rows (draws, rows, columns) of an imputer of scikit-learn."""
    imputer = make(seed).fit(train.numpy())
    count = DRAWS if getattr(imputer, "sample_posterior", False) else 1
    return torch.stack([torch.as_tensor(imputer.transform(gaps.numpy())) for _ in range(count)])


PEERS: dict[str, Callable[[int], Any]] = {
    "IterativeImputer": lambda seed: IterativeImputer(random_state=seed),
    "IterativeImputer, sample_posterior": lambda seed: IterativeImputer(random_state=seed, sample_posterior=True),
    "mean": lambda seed: SimpleImputer(),
}


def score(name: str, drawn: Tensor, truth: Tensor, missing: Tensor) -> dict[str, object]:
    error = (drawn.double().mean(0) - truth)[missing].square().mean().sqrt()
    low, high = drawn.double().quantile(torch.tensor([0.05, 0.95]).double(), 0)
    inside = ((low <= truth) & (truth <= high))[missing].double().mean() if len(drawn) > 1 else torch.tensor(torch.nan)
    return {"case": "wine", "method": name, "RMSE": float(error), "within 90 %": float(inside)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks imputation", description=__doc__)
    parser.add_argument("--masks", type=int, default=10)
    options = parser.parse_args(sys.argv[2:])
    data = load("wine", standardise=True)
    truth, fitted, records = data.test["x"], results(data.train), []
    for seed in range(options.masks):
        missing = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed)) < MISSING
        gaps = truth.masked_fill(missing, torch.nan)
        for name, result in fitted.items():
            records.append(score(name, impute(result, gaps, DRAWS, seed=seed).draws, truth, missing))
        for name, make in PEERS.items():
            records.append(score(name, sklearn(make, data.train["x"], seed, gaps), truth, missing))
    print(summary(pd.DataFrame(records)))


if __name__ == "__main__":
    main()
