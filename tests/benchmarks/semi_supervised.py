"""``python -m tests.benchmarks semi_supervised``: naive Bayes of newsgroup postings with few labels, and all postings.

Twenty postings per class of the training split keep their label, others in each split of labels. The supervised pair is
fitted to these rows alone. The semi-supervised one goes on from there on all rows, with the missing labels summed out.
Accuracy and the mean log probability of the label, in nats, of held-out postings: means over splits with their standard
errors. Of the held-out postings two in five have the same words as one of the training split.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from sklearn.naive_bayes import BernoulliNB, MultinomialNB
from sklearn.semi_supervised import SelfTrainingClassifier
from torch import Tensor

from inference import classify, fit
from ppl_models import BernoulliNaiveBayes, MultinomialNaiveBayes, load
from ppl_models.zoo import methods

from .outliers import summary

PER_CLASS = 20
Rows = dict[str, Tensor]
Scored = Callable[[Rows, Tensor, Tensor, int], Tensor]
"""From rows with labels, which of these are known, rows to classify and a seed, to probabilities (rows, classes)."""


def supervised(rows: Rows, known: Tensor, new: Tensor, seed: int, *, family: Any) -> Tensor:
    """The exact posterior given the rows whose labels are known."""
    told = {n: v[known] for n, v in rows.items()}
    return classify(methods.exact(family(100, 4), told, draws=100, seed=seed, progress=False), {"x": new})


def everything(rows: Rows, known: Tensor, new: Tensor, seed: int, *, family: Any) -> Tensor:
    """The exact posterior given all rows with all labels."""
    return supervised(rows, torch.ones_like(known), new, seed, family=family)


def summed_out(rows: Rows, known: Tensor, new: Tensor, seed: int, *, family: Any) -> Tensor:
    """The posterior mode given all rows, nan for labels that are hidden, from the mean given the others."""
    start = {n: mean for n, (mean, _) in family(100, 4).moments(rows["x"][known], rows["y"][known]).items()}
    pair = family(100, 4, guide=partial(AutoDelta, init_loc_fn=init_to_value(values=start)))
    data = {"x": rows["x"], "y": torch.where(known, rows["y"].float(), torch.nan)}
    result = fit(pair, data, steps=400, learning_rate=0.02, draws=2, seed=seed, progress=False)
    return classify(result, {"x": new})


def self_training(rows: Rows, known: Tensor, new: Tensor, seed: int, *, model: Any) -> Tensor:
    """Labels that scikit-learn's naive Bayes is sure of become known, round after round."""
    y = torch.where(known, rows["y"], -1)
    found = SelfTrainingClassifier(model).fit(rows["x"].numpy(), y.numpy())
    return torch.as_tensor(found.predict_proba(new.numpy()))


FAMILIES = {
    "Bernoulli": (BernoulliNaiveBayes, BernoulliNB(alpha=1.0)),
    "multinomial": (MultinomialNaiveBayes, MultinomialNB(alpha=1.0)),
}
METHODS: dict[str, Callable[[Any, Any], Scored]] = {
    "supervised": lambda family, model: partial(supervised, family=family),
    "semi-supervised": lambda family, model: partial(summed_out, family=family),
    "SelfTrainingClassifier": lambda family, model: partial(self_training, model=model),
    "all labels": lambda family, model: partial(everything, family=family),
}


def measure(data: Any, seed: int) -> list[dict[str, object]]:
    rows, test = data.train, data.test
    order = torch.randperm(len(rows["y"]), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[rows["y"][order] == k][:PER_CLASS] for k in range(len(data.classes))])
    known = torch.zeros(len(order), dtype=torch.bool).index_fill(0, chosen, True)
    records: list[dict[str, object]] = []
    for case, names in FAMILIES.items():
        for name, method in METHODS.items():
            probs = method(*names)(rows, known, test["x"], seed).double()
            score = probs.clamp_min(1e-12).log().gather(1, test["y"][:, None]).mean()
            accuracy = (probs.argmax(-1) == test["y"]).double().mean()
            records.append(
                {"case": case, "method": name, "accuracy": float(accuracy), "log p(y given x)": float(score)}
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks semi_supervised", description=__doc__)
    parser.add_argument("--splits", type=int, default=10)
    options = parser.parse_args(sys.argv[2:])
    data = load("news20_w100")
    print(summary(pd.DataFrame([r for seed in range(options.splits) for r in measure(data, seed)])))


if __name__ == "__main__":
    main()
