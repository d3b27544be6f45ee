r"""Is it better to learn how the rows of each class arise, or only where the classes part?

Naive Bayes models p(y) prod_j p(x_j | y), logistic regression p(y | x) alone. Ng and Jordan (2002, "On Discriminative
vs. Generative Classifiers", NIPS 14) find naive Bayes ahead for few training rows m, as it nears its asymptote after
O(log D) rows, and in most of 15 problems overtaken by logistic regression, which needs O(D) but ends lower.

- A split shuffles the rows (one of each class first), tests on the last 30 % and trains on the first m.
- Columns are standardised by those m rows; one that is constant there (a blank pixel) is only centred.
- Naive Bayes stands at its exact posterior mean. The paper's has one variance for both classes, so that it is linear.
- Logistic regression stands at the mode of the pair's log joint density, by Newton steps on all splits in one tensor.
  The prior w ~ N(0, scale^2) is ours: where a plane parts the m rows there is no mode without one.

Run: python examples/generative_or_discriminative.py --splits 200
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import torch
import typer
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad, hessian, vmap

from ppl_models import data
from ppl_models.naive_bayes import GaussianNaiveBayes
from ppl_models.pair import choose
from ppl_models.regression import LogisticRegression

PROBLEMS = {"digits 0 v 1": ("digits", 0, 1), "digits 2 v 3": ("digits", 2, 3), "tumours": ("breast_cancer", 0, 1)}
NAMES = ["naive Bayes", "naive Bayes, one variance", "logistic regression"]


def naive_bayes(x: Tensor, y: Tensor, new: Tensor) -> list[Tensor]:
    pair, pooled = (GaussianNaiveBayes(x.shape[-1], classes).double() for classes in (2, 1))
    weights, variances, means = (mean for mean, _ in vmap(pair.moments)(x, y).values())
    rows, total, _ = vmap(pair.count)(x, y)
    shared, _ = vmap(pooled.moments)(x - choose(total / rows[..., None], y), 0 * y)["variances"]
    rivals = [pair.likelihood(means[:, None], v[:, None], x=None) for v in (variances, shared)]
    return [(weights.log()[:, None] + rival.log_prob(new[:, :, None])).argmax(-1) for rival in rivals]


def logistic_regression(x: Tensor, y: Tensor, new: Tensor, scale: float) -> Tensor:
    model = LogisticRegression(x.shape[-1], scale=scale).double().model

    def log_joint(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        fixed = pyro.condition(model, {"weights": w[1:], "intercept": w[0]})
        return pyro.poutine.trace(fixed).get_trace(x, y).log_prob_sum()

    w = x.new_zeros(len(x), 1 + x.shape[-1])
    for _ in range(50):
        slope = vmap(grad(log_joint))(w, x, y)
        if slope.abs().max() < 1e-6:
            return (w[:, :1] + (new @ w[:, 1:, None])[..., 0] > 0).long()
        w = w - torch.linalg.solve(vmap(hessian(log_joint))(w, x, y), slope)
    raise ArithmeticError("logistic regression: expected a mode within 50 Newton steps")


def learn(name: str, *classes: int, splits: int, sizes: int, scale: float, seed: int) -> pd.DataFrame:
    both = data.load(name, dtype=torch.double)
    x, y = (torch.cat([both.train[k], both.test[k]]) for k in "xy")
    x, y = x[torch.isin(y, torch.tensor(classes))], 1 * (y[torch.isin(y, torch.tensor(classes))] == classes[1])
    keys = torch.rand(splits, len(y), generator=torch.Generator().manual_seed(seed))
    for k in (0, 1):
        keys[range(splits), torch.where(y == k, keys, 2.0).argmin(1)] = -1
    x, y, last = x[keys.argsort()], y[keys.argsort()], round(0.7 * len(y))
    table = pd.DataFrame(index=pd.Index(np.geomspace(4, last, sizes).astype(int), name="m"))
    for m in table.index:
        sd, mean = torch.std_mean(x[:, :m], 1, correction=0, keepdim=True)
        z = (x - mean) / torch.where(x[:, :m].amax(1, keepdim=True) == x[:, :m].amin(1, keepdim=True), 1, sd)
        guesses = [*naive_bayes(...), logistic_regression(...)]
