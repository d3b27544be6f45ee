r"""An entry of the zoo: a pair with its data, its methods and its truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from inference import Comparison, Method, Moments, compare, fit
from ppl_models import data
from ppl_models.data.sets import Dataset
from ppl_models.models.pair import Pair

OWN: Method = partial(fit, steps=3000, learning_rate=0.02)
"""How a pair is fitted whose row says nothing else."""


@dataclass(frozen=True)
class Entry:
    """One pair of the zoo.

    Attributes:
        name: Its name on the command line.
        title: What it is, in one line.
        build: From a data set to a fresh pair; ``guide=`` replaces its guide.
        data: Name of its data set; ``also`` names others that fit it.
        prepare: Arguments of ``data.load``: standardised, made binary, or scaled to [0, 1].
        methods: Methods by name, as ``compare`` takes them.
        truth: Exact or reference mean and standard deviation of each site, from a pair and its data.
        source: What the truth is.
        dtype: Precision of the pair and its data.
        takes: Names of the data that the pair takes.
        label: Its finite site, by which it classifies; None without one.
        draw: Writes pictures of what a fitted pair generates, from the pair, rows of data and a folder.
        fit: How ``ppl-models fit`` trains it, with its own schedule.
        report: What ``ppl-models fit`` says of a fitted pair on held-out rows, a table; None: nothing.
    """

    name: str
    title: str
    build: Callable[..., Pair]
    data: str
    also: tuple[str, ...]
    prepare: Mapping[str, bool]
    methods: Mapping[str, Method]
    truth: Callable[[Any, Any], Moments] | None
    source: str
    dtype: torch.dtype = field(default=torch.float64)
    takes: tuple[str, ...] = ("x", "y")
    label: str | None = "y"
    draw: Callable[..., list[Path]] | None = None
    fit: Method = OWN
    report: Callable[[Any, Any], pd.DataFrame] | None = None

    def load(self, name: str | None = None) -> Dataset:
        """The row's data set, or another by name, prepared for the row."""
        whole = data.load(name or self.data, dtype=self.dtype, **self.prepare)
        train, test = ({k: v for k, v in split.items() if k in self.takes} for split in (whole.train, whole.test))
        return replace(whole, train=train, test=test)

    def pair(self, dataset: Dataset, **arguments: Any) -> Pair:
        """A fresh pair for a data set, in the row's precision."""
        return self.build(dataset, **arguments).to(self.dtype)

    def compare(self, dataset: Dataset, methods: Mapping[str, Method] | None = None, *, seed: int = 0) -> Comparison:
        """Run the row's methods, or those given, on a data set against the row's truth."""
        return compare(
            lambda: self.pair(dataset),
            dataset.train,
            self.methods if methods is None else methods,
            truth=None if self.truth is None else partial(_truth, self.truth),
            heldout=dataset.test,
            label=self.label or "",
            seed=seed,
        )


def _truth(truth: Callable[[Any, Any], Moments], pair: Pair, given: Any) -> Moments:
    return truth(pair, given)
