r"""Draws, statistics and data as ArviZ reads them: xarray Datasets with the names of the pair along dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.files import Lenient
from inference.core.halves import parameters_of
from inference.core.lazy import azb, xr
from inference.core.sites import Site
from inference.draws import engine, scoring

FILTERS = ("zlib", "shuffle")
"""By which numbers in a NetCDF file are compressed."""


def prior_idata(bound: BoundPair, draws: Mapping[str, Tensor]) -> xr.DataTree:
    r"""Draws (S, \*shape) of all sites from the prior, as groups of a DataTree."""
    observed = set(bound.select("observed"))
    arguments = {*bound.data, *parameters_of(bound.model)}
    predicted = {n for n in draws if n in observed or n in arguments}
    dims = {n: dims_of(bound, n) for n in draws}
    parts = {
        "prior": {n: v for n, v in draws.items() if n not in predicted},
        "prior_predictive": {n: v for n, v in draws.items() if n in predicted},
    }
    datasets = {group: dataset_of(bound, sites, dims, 1) for group, sites in parts.items() if sites}
    if observed:
        data = {n: bound.observations[n].detach().cpu().numpy() for n in observed}
        datasets["observed_data"] = observed_of(bound, data, dims)
    return xr.DataTree.from_dict(renamed(datasets))


def write_netcdf(idata: xr.DataTree, path: Path, compress: bool = True) -> None:
    """Write a DataTree to a NetCDF file that ``xarray.open_datatree`` reads.

    Raises:
        OSError: The file cannot be written.
    """
    encoding = {
        g: {n: dict.fromkeys(FILTERS, compress) for n, v in idata[g].variables.items() if v.dtype.kind in "biuf"}
        for g in idata.groups
    }
    with Lenient(path) as file:
        idata.to_netcdf(file, engine="h5netcdf", encoding=encoding)


def dataset_of(bound: BoundPair, sites: Mapping[str, Tensor], dims: Mapping[str, list[str]], chains: int) -> xr.Dataset:
    r"""Values by site (chains * draws, \*shape), chains one after another, with the pair's names along dimensions."""
    arrays = {n: v.detach().cpu().numpy().reshape(chains, -1, *v.shape[1:]) for n, v in sites.items()}
    used = {n: dims.get(n, ["rows"] * (v.ndim == 3)) for n, v in arrays.items()}
    return _of_sites(bound, arrays, used)


def _of_sites(
    bound: BoundPair, arrays: Mapping[str, np.ndarray], dims: Mapping[str, list[str]], **asked: Any
) -> xr.Dataset:
    """A Dataset of sites, none of which is taken for the coordinate of a dimension."""
    names = variables_of(bound)
    given = {names.get(n, n): v for n, v in arrays.items()}
    used = {names.get(n, n): d for n, d in dims.items() if n in arrays}
    dataset = stats_of(given, dims=used, coords=_coords(bound, used), **asked)
    for site in arrays:
        if names.get(site, site) != site:
            dataset[names[site]].attrs["site"] = site
    return dataset


def variables_of(bound: BoundPair) -> dict[str, str]:
    """Name of each site as a variable: its own, unless a dimension has it."""
    taken = {"chain", "draw", *(f"{n}_observed" for n in bound.select("observed"))}
    return allowed_names(bound.sites, taken.union(*(dims_of(bound, n) for n in bound.sites)))


def stats_of(arrays: dict[str, np.ndarray], **names: Any) -> xr.Dataset:
    # ArviZ would warn of each group with more chains than draws; our diagnosis speaks of short chains.
    return azb.dict_to_dataset(arrays, check_conventions=False, **names)


def observed_of(bound: BoundPair, data: dict[str, np.ndarray], dims: dict[str, list[str]]) -> xr.Dataset:
    return _of_sites(bound, data, dims, sample_dims=[])


def rows_seen(bound: BoundPair, seen: Mapping[str, Tensor], shared: list[str] | None = None) -> Tensor:
    """Whether any site is seen in each element of some plates; by default, of those that all observed sites share."""
    first = next(iter(bound.select("observed").values()))
    shared = shared or [str(p) for p in first.plates if all(p in bound.sites[n].plates for n in seen)]
    found = []
    for name, mask in seen.items():
        rest = [k for k, p in enumerate(bound.sites[name].plates) if p not in shared]
        found.append(mask.any(rest) if rest else mask)
    return torch.stack(found).any(0)


def seen_rows(bound: BoundPair, draws: Mapping[str, Tensor]) -> Tensor:
    """Whether a mask leaves something of each row of ``pointwise_log_likelihood``, (rows,)."""
    seen = rows_seen(bound, seen_of(bound, draws), scoring.summed_within(bound, draws)[1])
    return seen.reshape(len(seen) if seen.dim() else 1, -1).any(1)


def seen_of(bound: BoundPair, posterior: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""What masks leave of each observed site, (\*plates), with the parameters that are in the store.

    Raises:
        ValueError: A mask depends on latent sites.
    """
    observed = bound.select("observed")
    with torch.no_grad():
        trace = engine.trace(bound, bound.model, {n: v[0] for n, v in posterior.items()})
        first = {n: _mask(trace.nodes[n], s) for n, s in observed.items()}
        masked = {n: s for n, s in observed.items() if _is_masked(trace.nodes[n])}
        if not masked:
            return first
        every = engine.run(
            bound, bound.model, posterior, None, lambda trace: {n: _mask(trace.nodes[n], s) for n, s in masked.items()}
        )
    for name, masks in every.items():
        if not (masks.cpu() == first[name]).all():
            raise ValueError(f"the mask of {name} depends on latent sites, and arviz_stats.loo takes one for all draws")
    return first


def _is_masked(node: Any) -> bool:
    fn = node["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            return True
        fn = fn.base_dist
    return node["mask"] is not None


def _mask(node: Any, site: Site) -> Tensor:
    shape = torch.Size(site.shape[: site.batch])
    seen = torch.ones(shape, dtype=torch.bool)
    if node["mask"] is not None:
        seen = seen & torch.as_tensor(node["mask"]).cpu()
    fn, events = node["fn"], 0
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution):
            own = torch.as_tensor(fn._mask).cpu().expand(fn.batch_shape)
            # A mask inside an event hides an observation only where it hides all of it.
            seen = seen & (own.flatten(own.dim() - events).any(-1) if events else own)
        if isinstance(fn, Independent):
            events += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    return seen


def dims_of(bound: BoundPair, name: str) -> list[str]:
    """Dimensions of a site: its plates, then what the pair calls the rest."""
    site = bound.sites[name]
    named = list(bound.asked.dims.get(name, ()))
    if site.role == "deterministic" and len(named) == len(site.shape):
        return named
    event = len(site.shape) - site.batch
    plates = [p or f"{name}_dim_{k}" for k, p in enumerate(site.plates)]
    own = named[-event:] if event and len(named) >= event else []
    if not own and event == 1 and len(bound.names.columns.get(name, ())) == site.shape[-1]:
        own = [f"{name}_columns"]
    rest = own or [f"{name}_dim_{site.batch + k}" for k in range(event)]
    # xarray owns no two dimensions of one name, and ArviZ none called chain or draw.
    return [d if d not in ("chain", "draw") else f"{name}_dim_{k}" for k, d in enumerate([*plates, *rest])]


def _coords(bound: BoundPair, dims: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    used = {d for names in dims.values() for d in names}
    return {k: list(v) for k, v in coordinates(bound).items() if k in used}


def coordinates(bound: BoundPair) -> dict[str, Any]:
    """Names along dimensions: those of the pair, and where it has none those of frames among the data."""
    names = bound.names
    found: dict[str, Any] = dict(names.categories)
    for name, columns in names.columns.items():
        declared = bound.asked.dims.get(name)
        found[declared[-1] if declared else f"{name}_columns"] = columns
    plates = {p: n for s in bound.select("observed").values() for p, n in zip(s.plates, s.shape, strict=False) if p}
    found |= {p: names.rows for p, n in plates.items() if names.rows and n == len(names.rows)}
    sizes = {d: n for name, s in bound.sites.items() for d, n in zip(dims_of(bound, name), s.shape, strict=True)}
    fitting = {d: labels for d, labels in found.items() if sizes.get(d, len(labels)) == len(labels)}
    return {**fitting, **bound.asked.coords}


def allowed_names(names: Iterable[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Names as NetCDF takes them, without a ``/`` and more than dots, each once and none that is taken.

    Example:
        >>> allowed_names(["a/b", "a_b", "draw", "."], taken=["draw"])
        {'a/b': 'a_b_2', 'a_b': 'a_b', 'draw': 'draw_', '.': '_'}
    """
    listed = list(dict.fromkeys(names))
    found = {n: n for n in listed if "/" not in n and n.strip(".") and n not in taken}
    for name in listed:
        if name not in found:
            plain = name.replace("/", "_") if "/" in name else f"{name.strip('.')}_"
            tries = itertools.chain([plain], (f"{plain}_{k}" for k in itertools.count(2)))
            found[name] = next(c for c in tries if c not in found.values() and c not in taken)
    return {n: found[n] for n in listed}


def renamed(datasets: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Datasets with names that NetCDF takes, the same in all of them; the attribute ``site`` has a site's own."""
    names = allowed_names(str(n) for d in datasets.values() for n in (*d.variables, *d.dims))
    changed = {n: new for n, new in names.items() if n != new}
    if not changed:
        return datasets
    renamed = {
        g: d.rename({n: v for n, v in changed.items() if n in d.variables or n in d.dims}) for g, d in datasets.items()
    }
    for dataset in renamed.values():
        for name, new in changed.items():
            if new in dataset.variables:
                dataset[new].attrs.setdefault("site", name)
    return renamed
