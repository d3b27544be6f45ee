r"""The elements of latent sites that ``calibrate`` ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from inference.comparison.simulated import Setting
from inference.core.bound import BoundPair
from inference.core.spacing import spaced

MAX_QUANTITIES = 200
"""Scalar quantities, at most, that are ranked; of sites with more of them evenly spaced ones."""


@dataclass(frozen=True)
class Elements:
    """The elements of latent sites that are ranked.

    Attributes:
        places: Their places in the flattened value, by site.
        axes: Dimension of the plate of rows by site, where rows are ranked one by one; else empty.
        omitted: Number of elements that are left out.
    """

    places: dict[str, np.ndarray]
    axes: dict[str, int]
    omitted: int

    @classmethod
    def of(cls, truths: Mapping[str, Tensor], setting: Setting) -> Elements:
        """Those of all sites of a setting, evenly spaced where there are many."""
        sizes = {n: _flat(truths[n], setting.axes.get(n)).shape[-1] for n in setting.latent}
        places = {n: spaced(size, max(1, MAX_QUANTITIES // len(sizes))).numpy() for n, size in sizes.items()}
        return cls(places, setting.axes, sum(sizes.values()) - sum(map(len, places.values())))

    def values(self, draws: Mapping[str, Tensor]) -> np.ndarray:
        """Their values (S, rows, elements) in draws by site."""
        parts = [_flat(draws[n].double(), self.axes.get(n)).cpu().numpy()[..., at] for n, at in self.places.items()]
        return np.concatenate(parts, -1)

    def labels(self, bound: BoundPair) -> list[str]:
        """Their names, ``mu[0]``."""
        found = []
        for name, places in self.places.items():
            shape = list(bound.sites[name].shape)
            if name in self.axes:
                del shape[self.axes[name]]
            at = [", ".join(map(str, np.unravel_index(int(k), shape))) if shape else "" for k in places]
            found += [f"{name}[{a}]" if a else name for a in at]
        return found


def _flat(values: Tensor, axis: int | None) -> Tensor:
    """Values (S, ...) of a site as (S, rows, elements); a single row where rows are not ranked one by one."""
    rows = values[:, None] if axis is None else values.movedim(1 + axis, 1)
    return rows.reshape(*rows.shape[:2], -1)
