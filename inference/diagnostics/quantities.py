"""Scalar quantities of a posterior: their names and their draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from inference.core.lazy import xr

T = TypeVar("T")

PART = 2**20
"""Numbers of draws that are diagnosed at once, by one thread."""


def quantities_of(idata: xr.DataTree) -> xr.Dataset:
    """Quantities to diagnose: the continuous ones, or the log density of chains that have none."""
    groups = {name: group.to_dataset() for name, group in idata.children.items()}
    posterior, stats = groups.get("posterior", xr.Dataset()), groups.get("sample_stats", xr.Dataset())
    real = posterior[[n for n in posterior.data_vars if np.issubdtype(posterior[n].dtype, np.floating)]]
    return stats[["lp"]] if not real and "lp" in stats else real


def parts_of(posterior: xr.Dataset) -> Iterator[xr.Dataset]:
    """A posterior in parts of at most ``PART`` numbers, or of one quantity, one after another.

    What is computed of all quantities takes several times the memory of their draws, which may be on the disk.
    """
    if sum(v.size for v in posterior.data_vars.values()) <= PART:
        yield posterior
        return
    for name, array in posterior.data_vars.items():
        over, flat = array.shape[0] * array.shape[1], array.values.reshape(*array.shape[:2], -1)
        for some in np.split(np.arange(flat.shape[2]), range(width := max(1, PART // over), flat.shape[2], width)):
            values = np.ascontiguousarray(flat[..., some[0] : some[-1] + 1])
            yield xr.Dataset({name: (("chain", "draw", "quantity"), values)})


def side_by_side(function: Callable[[xr.Dataset], T], parts: Iterator[xr.Dataset]) -> list[T]:
    """What a function makes of parts of a posterior, in torch's number of threads, of which each holds one part."""
    first, second = next(parts), next(parts, None)
    if second is None:
        return [function(first)]
    # A second to import.
    from joblib import Parallel, delayed

    every = itertools.chain((first, second), parts)
    threads = Parallel(torch.get_num_threads(), require="sharedmem", pre_dispatch="n_jobs")
    return list(threads(delayed(function)(part) for part in every))


def names_of(array: xr.DataArray) -> list[str]:
    """Names of all scalars of a posterior array, in the form of :func:`quantity`."""
    labels = [[str(v) for v in array[d].values] if d in array.coords else range(array.sizes[d]) for d in array.dims[2:]]
    if not labels:
        return [str(array.name)]
    return [f"{array.name}[{', '.join(map(str, at))}]" for at in itertools.product(*labels)]


def quantity(array: xr.DataArray, index: tuple[int, ...]) -> str:
    """Name of one scalar of a posterior array (chain, draw, ...): ``means[benign, mean radius]``."""
    places = zip(array.dims[2:], index, strict=True)
    at = [str(array[d].values[k]) if d in array.coords else str(k) for d, k in places]
    return f"{array.name}[{', '.join(at)}]" if at else str(array.name)


def draws_of(posterior: xr.Dataset, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Draws (chain, draw) of the named quantities."""
    for array in posterior.data_vars.values():
        flat = array.values.reshape(*array.shape[:2], -1)
        yield from ((n, flat[..., k]) for k, n in enumerate(names_of(array)) if n in names)
