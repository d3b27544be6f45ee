r"""How a Result draws more: from its guide, or by chains that go on, also from a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from inference.core.bound import BoundPair
from inference.draws.scoring import sample_guide


class FurtherDraws(ABC):
    """How a Result draws more, and how a file lets that go on."""

    @abstractmethod
    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """So many draws of the latent sites."""

    def extend(self, draws: int) -> Continuation:
        """Let chains go on by so many draws each; a ValueError where there are no chains that can."""
        raise ValueError("extend: expected chains of ChEES, Gibbs or NUTS, got none; use draw, or fit again")

    def record(self) -> tuple[dict[str, Any], list[Tensor]]:
        """What a file has to hold so that draws can go on: JSON, with a key of ``RESTORED`` as kind, and tensors."""
        return {"kind": "none"}, []


@dataclass(frozen=True)
class Continuation:
    r"""Draws of chains that went on.

    Attributes:
        draws: Values by site, (chains * draws, \*shape), chain after chain.
        stats: Statistics by name, (chains, draws).
        seconds: How long it took.
        more: Further draws.
    """

    draws: dict[str, Tensor]
    stats: dict[str, np.ndarray]
    seconds: float
    more: FurtherDraws


@dataclass(frozen=True)
class GuideDraws(FurtherDraws):
    """Further draws of a fit: from the guide.

    Attributes:
        bound: The pair and its data.
        learns: The objective, if it learns a model and no posterior; else empty.
    """

    bound: BoundPair
    learns: str = ""

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """So many draws of the latent sites."""
        if self.learns:
            raise ValueError(
                f"draw: {self.learns} learns a model and no posterior; use prior_predictive, or the pair itself"
            )
        return sample_guide(self.bound, size)[0]

    def record(self) -> tuple[dict[str, Any], list[Tensor]]:
        """The objective's name, if it has no posterior."""
        return {"kind": "guide", "learns": self.learns}, []


@dataclass(frozen=True)
class NoDraws(FurtherDraws):
    """In place of further draws that a file does not hold."""

    method: str

    def __call__(self, size: int, seed: int) -> dict[str, Tensor]:
        """Raise ValueError."""
        raise ValueError(f"draw: chains of {self.method} cannot go on from a file; sample again, with more draws")


RESTORED: dict[str, Callable[[BoundPair, Mapping[str, Any], list[Tensor]], FurtherDraws]] = {
    "guide": lambda bound, record, _: GuideDraws(bound, record["learns"]),
}
"""From a pair and a record to further draws, by the kind of the record."""
