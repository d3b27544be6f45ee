"""Results of the zoo from the folders that its commands write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from inference import Method, Result, Saved, classify, exclusive, isolated, log_evidence, posterior_predictive, sample
from ppl_models import data
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entries import find
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import settings

NEEDED = ("pair", "data", "method", "seed")
"""What a folder has to say of a Result that is restored."""


@dataclass(frozen=True)
class Restored:
    """A Result of the zoo, from its folder.

    Attributes:
        result: The Result.
        entry: Its entry.
        dataset: Its data set.
    """

    result: Result
    entry: Entry
    dataset: Dataset

    def predict(self, frame: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
        r"""What the pair says about new rows.

        Args:
            frame: A column per feature of the data set; other columns are left out.
            seed: Seed of the estimate of the evidence.

        Returns:
            For a pair with labels, the probability :math:`p(y \\mid x, D)` of each class and the class of the largest
            one; for a pair of a number y, the mean, standard deviation and central 89 % interval of a new y, in its own
            units; for others :math:`\\log p(x \\mid D)` of each row, in nats, with its standard error.

        Raises:
            ValueError: A column is missing or has no numbers, or the pair has no likelihood, or its rows are one
                observation.
        """
        rows = data.prepared_rows(self.dataset.name, frame, dtype=self.entry.dtype, **self.entry.prepare)
        if "y" in self.entry.takes and not self.dataset.classes:
            return self._numbers(rows, frame.index, seed)
        if "y" in self.entry.takes:
            probabilities = classify(self.result, rows)
            table = pd.DataFrame(probabilities.numpy(), frame.index, [f"p({c})" for c in self.dataset.classes])
            table.insert(0, "class", [self.dataset.classes[k] for k in probabilities.argmax(-1).tolist()])
            return table
        found = log_evidence(self.result, rows, seed=seed)
        return pd.DataFrame({"log_evidence": found.values.numpy(), "error": found.errors.numpy()}, frame.index)

    def _numbers(self, rows: dict[str, Tensor], index: pd.Index, seed: int) -> pd.DataFrame:
        """Mean, standard deviation and interval of y of new rows."""
        if "rows" not in self.result.bound.sites["y"].plates:
            raise ValueError(f"data: expected a pair of rows, got {self.entry.name}, whose data are one observation")
        centre, scale = self.dataset.units
        drawn = centre + scale * posterior_predictive(self.result, rows, seed=seed)["y"].double().numpy()
        low, high = np.quantile(drawn, [0.055, 0.945], axis=0)
        columns = {"mean": drawn.mean(0), "sd": drawn.std(0, ddof=1), "eti89_lb": low, "eti89_ub": high}
        return pd.DataFrame(columns, index)


def restore(path: str | Path, pair: Any = None, given: Any = None) -> Result:
    """The Result of a folder that ``ppl-models fit``, ``sample`` or ``compare`` has written.

    Its pair is built again from the entry, data set, method and seed that the folder names, and gets the parameters of
    the folder.

    Args:
        path: The folder.
        pair: The pair, where the folder does not say which it is: then this is ``Result.load``.
        given: Its data. Default: the training rows of the data set that the folder names.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A file is damaged or foreign, or the folder does not say which pair of the zoo it is of.
    """
    return Result.load(path, pair, given) if pair is not None else opened(path, given).result


@exclusive
def opened(path: str | Path, given: Any = None) -> Restored:
    """The Result of a folder, with its entry and its data set; see :func:`restore`."""
    about = Saved.read(path).about
    missing = [n for n in NEEDED if n not in about]
    if missing:
        raise ValueError(
            f"pair: expected the pair of {path}, which does not say what it is (no {', '.join(missing)}), got none"
        )
    entry = entry_of(about)
    if about["method"] not in (*entry.methods, "chains"):
        known = ", ".join(entry.methods)
        raise ValueError(f"{path}: expected a method of {entry.name} ({known}), got {about['method']!r}")
    dataset = entry.load(about["data"])
    with isolated(int(about["seed"])):
        pair = entry.pair(dataset)
    built = _as_fitted(pair, dataset.train, entry.methods.get(about["method"], sample))
    return Restored(Result.load(path, built, dataset.train if given is None else given), entry, dataset)


def entry_of(about: Mapping[str, Any]) -> Entry:
    """The entry that a folder names, with the arguments of its pair that were replaced."""
    return replace(find(about["pair"]), overrides={n: _listed(v) for n, v in about.get("set", {}).items()})


def _listed(value: Any) -> Any:
    """A value from JSON, which has lists for tuples."""
    return tuple(map(_listed, value)) if isinstance(value, list) else value


def _as_fitted(pair: Any, rows: Any, method: Method) -> Any:
    """The pair as a method fits it, with the guide that it chooses."""
    if getattr(method, "func", method) is sample:
        return pair
    known = settings(method)
    few: dict[str, Any] = {n: v for n, v in {"steps": 0, "draws": 4, "progress": False}.items() if n in known}
    with torch.no_grad():
        return method(pair, rows, **few).bound.pair
