r"""Variables of many NetCDF files, joined along ``draw``, whose numbers are read when they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing


class Joined(BackendArray):
    r"""A variable (chains, draws, \*shape) of files of some draws each.

    Args:
        paths: The files.
        counts: Draws in each.
        group: The group of the variable.
        name: Its name.
        first: The variable in the first file.
    """

    def __init__(self, paths: list[Path], counts: list[int], group: str, name: str, first: xr.Variable) -> None:
        self._paths, self._ends = paths, np.cumsum(counts)
        self._group, self._name = group, name
        self.shape = (first.shape[0], int(self._ends[-1]), *first.shape[2:])
        self.dtype = first.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray:
        chains, draws, *rest = key
        wanted = np.atleast_1d(np.arange(self.shape[1])[draws])
        # A single chain keeps its dimension until the draws are there.
        each = slice(chains, chains + 1) if isinstance(chains, int | np.integer) else chains
        within = np.searchsorted(self._ends, wanted, side="right")
        parts = [self._part(int(k), wanted[within == k], (each, *rest)) for k in dict.fromkeys(within.tolist())]
        found = np.concatenate(parts, 1) if parts else self._part(0, wanted, (each, *rest))
        found = found if isinstance(draws, slice) else found[:, 0]
        return found if each is chains else found[0]

    def _part(self, number: int, wanted: np.ndarray, key: tuple[Any, ...]) -> np.ndarray:
        start = self._ends[number - 1] if number else 0
        low, high = (int(wanted.min() - start), int(wanted.max() - start) + 1) if len(wanted) else (0, 0)
        with xr.open_dataset(self._paths[number], group=self._group, engine="h5netcdf") as opened:
            values = opened[self._name].variable[key[0], low:high, *key[1:]].values
        return values[:, wanted - start - low]


def joined(paths: list[Path], counts: list[int]) -> xr.DataTree:
    """The groups of files as one DataTree.

    Args:
        paths: The files, in the order of their draws.
        counts: Draws in each.
    """
    with xr.open_datatree(paths[0], engine="h5netcdf") as first:
        groups = {g: _joined_group(paths, counts, g, node.to_dataset()) for g, node in first.children.items()}
    return xr.DataTree.from_dict(groups)


def _joined_group(paths: list[Path], counts: list[int], group: str, first: xr.Dataset) -> xr.Dataset:
    variables: dict[Any, xr.Variable] = {}
    for name, variable in first.variables.items():
        if name == "draw":
            variables[name] = xr.Variable("draw", np.arange(sum(counts)), variable.attrs)
        elif "draw" in variable.dims:
            lazy = indexing.LazilyIndexedArray(Joined(paths, counts, group, str(name), variable))
            variables[name] = xr.Variable(variable.dims, lazy, variable.attrs)
        else:
            variables[name] = variable.load()
    coords = {n: v for n, v in variables.items() if n in first.coords}
    return xr.Dataset({n: v for n, v in variables.items() if n not in coords}, coords, first.attrs)
