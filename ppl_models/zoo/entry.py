r"""An entry of the zoo: a pair with its data, its methods and what it is compared with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from inference import Comparison, Method, Moments, compare, sample
from ppl_models import data
from ppl_models.data.sets import Dataset
from ppl_models.models.pair import Pair


def features(dataset: Dataset) -> dict[str, Any]:
    """The names of the features."""
    return {"features": dataset.features}


def labelled(dataset: Dataset) -> dict[str, Any]:
    """The names of the features and of the classes; a ValueError without labels."""
    if not dataset.classes:
        raise ValueError(f"data: expected a set with labels, got {dataset.name} without")
    return {"features": dataset.features, "classes": dataset.classes}


@dataclass(frozen=True)
class Entry:
    """One pair of the zoo.

    Attributes:
        name: Its name on the command line.
        title: What it is, in one line.
        make: Class of the pair, or a class method that makes one.
        data: Name of its default data set.
        methods: Methods by name, each with its own schedule, as ``compare`` takes them. ``ppl-models fit`` runs the
            first one.
        source: What its results are compared with.
        arguments: From a data set to arguments of ``make``. Overrides that it names are passed to it.
        begin: Called with a new pair and its data set, where initial values depend on the data.
        also: Names of other data sets that fit the pair.
        prepare: Arguments of ``data.load``: standardised, binary, scaled to [0, 1], or with few labels.
        truth: Exact or reference mean and standard deviation of each site, from a pair and its data; None: there is
            none.
        dtype: Precision of the pair and its data.
        report: Table that ``ppl-models fit`` prints, from a fitted pair and held-out rows; None: no table.
        small: Overrides that make the pair small, for tests.
        overrides: Arguments of ``make`` that replace those of the entry.
    """

    name: str
    title: str
    make: Callable[..., Pair]
    data: str
    methods: Mapping[str, Method]
    source: str
    arguments: Callable[..., Mapping[str, Any]] = features
    begin: Callable[[Any, Dataset], None] | None = None
    also: tuple[str, ...] = ()
    prepare: Mapping[str, Any] = field(default_factory=dict)
    truth: Callable[[Any, Any], Moments] | None = None
    dtype: torch.dtype = torch.float64
    report: Callable[[Any, Any], pd.DataFrame] | None = None
    small: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> dict[str, Method]:
        """The methods that fit, without those that are chains."""
        return {n: m for n, m in self.methods.items() if getattr(m, "func", m) is not sample}

    @property
    def fit(self) -> Method:
        """The first method: what ``ppl-models fit`` runs."""
        return next(iter(self.fits.values()))

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the arguments of the pair's model: of a data set it takes those."""
        kind: Any = getattr(self.make, "__self__", self.make)
        return tuple(n for n in inspect.signature(kind.model).parameters if n not in ("self", "size", "rows"))

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the arguments of the pair that may be replaced; those of the data set are its own."""
        both = (*inspect.signature(self.make).parameters, *list(inspect.signature(self.arguments).parameters)[1:])
        return tuple(n for n in dict.fromkeys(both) if n not in ("features", "classes", "guide"))

    def load(self, name: str | None = None, *, device: str | torch.device = "cpu") -> Dataset:
        """The entry's data set, or another by name, prepared for the pair, on a device."""
        whole, takes = data.load(name or self.data, dtype=self.dtype, device=device, **self.prepare), self.takes
        train, test = ({k: v for k, v in split.items() if k in takes} for split in (whole.train, whole.test))
        return replace(whole, train=train, test=test)

    def pair(self, dataset: Dataset, **overrides: Any) -> Pair:
        """A new pair for a data set, in the entry's precision and where the data are.

        Overrides replace arguments of ``make``.
        """
        overrides = {**self.overrides, **overrides}
        known = inspect.signature(self.arguments).parameters
        arguments = self.arguments(dataset, **{n: v for n, v in overrides.items() if n in known})
        made = self.make(**{**arguments, **overrides}).to(device=dataset.device, dtype=self.dtype)
        if self.begin is not None:
            self.begin(made, dataset)
        return made

    def compare(
        self,
        dataset: Dataset,
        methods: Mapping[str, Method] | None = None,
        *,
        seed: int = 0,
        seeds: int = 1,
        jobs: int = 1,
        checkpoint: str | Path | None = None,
    ) -> Comparison:
        """Run the entry's methods, or those given, on a data set; compare with the entry's truth and held-out rows."""
        return compare(
            lambda: self.pair(dataset),
            dataset.train,
            self.methods if methods is None else methods,
            truth=self.truth,
            heldout=dataset.test or None,
            seed=seed,
            seeds=seeds,
            jobs=jobs,
            checkpoint=checkpoint,
        )
