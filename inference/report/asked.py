"""What a page asks of a Result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.lazy import pd
from inference.diagnostics.convergence import Diagnosis
from inference.diagnostics.quantities import quantity
from inference.groups import Groups


class Reported(Protocol):
    """A Result, as a page sees it."""

    @property
    def groups(self) -> Groups:
        """Groups of draws, statistics and data."""

    @property
    def losses(self) -> np.ndarray:
        """Loss of each step."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by part of the run."""

    @property
    def method(self) -> str:
        """Name of the method."""

    @property
    def diagnosis(self) -> Diagnosis:
        """Its diagnosis."""

    @property
    def draws(self) -> dict[str, Tensor]:
        """Draws of the latent sites."""

    @property
    def bound(self) -> BoundPair:
        """The pair and its data."""

    @property
    def state(self) -> Callable[[], AbstractContextManager[None]]:
        """Restores the parameters."""

    def summary(self, prob: float = 0.89) -> pd.DataFrame:
        """Table of the posterior."""


def is_chains(result: Reported) -> bool:
    """Whether it is of Markov chains."""
    return "sample_stats" in result.groups


def quantities(result: Reported) -> dict[str, np.ndarray]:
    """Draws (chains, draws) of the quantities in the table of a Result, by their names."""
    posterior = result.groups.get("posterior")
    if posterior is None:
        return {}
    wanted, found = set(result.diagnosis.table.index), {}
    for array in posterior.data_vars.values():
        flat = array.values.reshape(*array.shape[:2], -1)
        for k, index in enumerate(np.ndindex(*array.shape[2:])):
            name = quantity(array, tuple(map(int, index)))
            if name in wanted:
                found[name] = flat[..., k]
    return found


def about_of(result: Reported, about: Mapping[str, Any] | None) -> dict[str, Any]:
    """What made the Result: what the caller says, and the seed."""
    attrs = result.groups.attrs
    return {**({"seed": int(attrs["seed"])} if "seed" in attrs else {}), **(about or {})}
