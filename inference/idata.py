r"""Draws of any method as ArviZ reads them: an xarray DataTree with a group each for draws, statistics and data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.distributions import Independent, MaskedDistribution
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.files import Lenient
from inference.core.halves import parameters_of
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import azb, xr
from inference.core.sites import Site
from inference.draws import dependence, engine, scoring
from inference.draws.dependence import by_plates

STORED, SCORED = 20_000_000, 500_000_000
"""Largest size of a predictive group of a Result, and largest input of its log likelihood, in numbers."""

ORDER = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data")
"""Groups in the order of the DataTree."""

FILTERS = ("zlib", "shuffle")
"""By which numbers in a NetCDF file are compressed."""


T = TypeVar("T")


U = TypeVar("U")


@dataclass
class LeftOut:
    """What a Result goes without, each with the reason.

    Attributes:
        name: Name of the pair, for warnings.
        said: The reasons.
    """

    name: str
    said: list[str] = field(default_factory=list)

    def unless(self, what: str, compute: Callable[[], T], otherwise: U) -> T | U:
        """What ``compute`` returns; if it fails, a warning, a reason and ``otherwise``."""
        try:
            return compute()
        except Exception as error:
            # Any failure: the fit is over, and is worth more than what is derived from it.
            reason = reason_of(error, 300)
            self.add(f"{what}: {reason}")
            warnings.warn(f"{self.name}: {what} left out: {reason}", stacklevel=2)
            return otherwise

    def add(self, reason: str) -> None:
        """Note one reason."""
        self.said.append(reason)


@dataclass(eq=False)
class Groups:
    r"""Groups of the DataTree of a Result, by name: those of the draws are there, others are made when asked for.

    ``posterior_predictive`` and ``log_likelihood`` are functions of the draws and the data which may take longer than
    the method itself. ``groups[name]`` is a Dataset, and :attr:`tree` the DataTree of all.

    Attributes:
        bound: The pair and its data.
        draws: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        chains: Number of chains.
        within: Restores the parameters that the draws belong to.
        seed: Seed of the predictive draws.
        made: What was made, by group; None for a group that is left out.
        later: Groups that were not asked for yet, each with the reason why it is too large, if it is.
        attrs: Attributes of the DataTree and of its posterior group.
        left_out: Takes the reason for each group that is left out.
    """

    bound: BoundPair
    draws: Mapping[str, Tensor]
    chains: int
    within: Callable[[], AbstractContextManager[None]]
    seed: int
    made: dict[str, xr.Dataset | None]
    later: dict[str, str]
    attrs: dict[str, Any]
    left_out: LeftOut
    _tree: Any = None

    @classmethod
    def of(cls, tree: xr.DataTree) -> Groups:
        """Those of a DataTree that is whole."""
        made: dict[str, xr.Dataset | None] = {str(n): g.to_dataset() for n, g in tree.children.items()}
        attrs = {str(n): v for n, v in tree.attrs.items()}
        nothing: Any = None
        return cls(nothing, {}, 1, nullcontext, 0, made, {}, attrs, LeftOut(""), tree)

    def __contains__(self, name: object) -> bool:
        return self._get(str(name)) is not None

    def __getitem__(self, name: str) -> xr.Dataset:
        found = self._get(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str) -> xr.Dataset | None:
        """A group; None where there is none."""
        return self._get(name)

    def __bool__(self) -> bool:
        return bool(self.later) or any(group is not None for group in self.made.values())

    @property
    def drawn(self) -> xr.DataTree:
        """The DataTree of the groups that are there."""
        return self.joined(self.made)

    def joined(self, names: Collection[str]) -> xr.DataTree:
        """The DataTree of some groups, as far as there are any."""
        kept = {n: group for n in ORDER if n in names and (group := self._get(n)) is not None}
        # A pair without latent sites has no posterior, and so no such group.
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=self.attrs), **renamed(kept)})

    @property
    def tree(self) -> xr.DataTree:
        """The DataTree of all groups, always the same one."""
        if self._tree is None:
            self._tree = self.joined(ORDER)
        return self._tree

    @exclusive
    def _get(self, name: str) -> xr.Dataset | None:
        if name in self.later:
            said, refused = len(self.left_out.said), self.later.pop(name)
            if refused:
                self.made[name] = None
                self.left_out.add(f"{name}: {refused}")
                warnings.warn(f"{self.bound.name}: {name} left out: {refused}", stacklevel=5)
            else:
                make = {"posterior_predictive": self._predictive, "log_likelihood": self._likelihood}[name]
                with isolated(self.seed), self.within():
                    self.made[name] = self.left_out.unless(name, make, None)
            if len(self.left_out.said) > said:
                self.attrs[name] = f"left out: {self.left_out.said[-1].removeprefix(f'{name}: ')}"
            posterior = self.made.get("posterior")
            if posterior is not None:
                posterior.attrs.update(self.attrs)
        return self.made.get(name)

    def _predictive(self) -> xr.Dataset | None:
        draws = self.draws
        size = len(next(iter(draws.values()))) if draws else 1
        found = _replicates(self.bound, draws, size)
        return dataset_of(self.bound, found, _dims(self.bound), self.chains) if found else None

    def _likelihood(self) -> xr.Dataset | None:
        bound, draws = self.bound, {n: v.to(self.bound.device) for n, v in self.draws.items()}
        own = dependence.of_observations(bound, draws) if bound.source is None else by_plates(bound, draws)
        if own:
            self.attrs["log_likelihood"] = (
                f"left out: {', '.join(own)} has a value for each observation; pointwise_log_likelihood(result) is "
                "given it, log_evidence(result) integrates it out"
            )
            return None
        scores, flat = _likelihood(bound, draws)
        if not scores:
            return None
        if weighed := scoring.scaled_sites(bound, draws):
            self.attrs["log_likelihood"] = (
                f"without the scale of {', '.join(weighed)}: arviz_stats.loo would leave out a part of a row, or a row "
                "that counts many times once"
            )
        plates = {n: d[: bound.sites[n].batch] for n, d in _dims(bound).items()}
        return dataset_of(bound, scores, plates | flat, self.chains)


def groups_of(
    bound: BoundPair,
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, np.ndarray] | None = None,
    *,
    chains: int = 1,
    attrs: Mapping[str, Any] | None = None,
    left_out: LeftOut,
    within: Callable[[], AbstractContextManager[None]],
    seed: int,
) -> Groups:
    r"""The groups of draws of any method, with the parameters that are in the store.

    Args:
        bound: The pair and its data.
        posterior: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        sample_stats: Statistics (chains, draws) of each transition.
        chains: Number of chains.
        attrs: Attributes of the DataTree and of its posterior group.
        left_out: Takes the reason for each group that is left out.
        within: Restores the parameters for what is made later.
        seed: Seed of predictive draws.

    Dimensions are named after the plates (``rows``) and the pair's ``dims``; coordinates are the pair's ``coords``. A
    ``/`` in a name, which NetCDF does not allow, becomes ``_``, and a site with the name of a dimension (``draw``,
    ``chain``) gets a ``_`` at its end; the attribute ``site`` has the name of the site.
    Deterministic sites and posterior draws of summed-out sites are added. A group that cannot be computed is left out
    with a warning, and so are predictive groups of more than ``STORED`` numbers and a log likelihood that would read
    more than ``SCORED``.

    ``log_likelihood`` holds what was observed: entries that a mask hides are dropped, and the rest lies along one
    dimension, ``y_observed`` of the site ``y``. Where a latent site has a value for each observation, the group is left
    out, and ``attrs["log_likelihood"]`` says so: the weights of ``arviz_stats.loo`` would be those of that value, and
    heavy-tailed (for z ~ N(0, 1) and x ~ N(z, s) their Pareto k is 1 / (1 + s^2)). Where ``poutine.scale`` weighs rows,
    the group is without it, and ``attrs["log_likelihood"]`` says that leaving a row out is then another thing.
    """
    size = len(next(iter(posterior.values()))) if posterior else 1
    values, dims = dict(posterior), _dims(bound)
    affordable, derived = _affordable(bound, size, left_out)
    later = affordable if bound.select("observed") else {}
    if derived:
        functions = partial(scoring.latent_functions, bound, posterior, derived)
        values |= left_out.unless("deterministic sites", functions, {})
    made: dict[str, xr.Dataset | None] = {}
    if values:
        made["posterior"] = left_out.unless("posterior", partial(dataset_of, bound, values, dims, chains), None)
    if sample_stats:
        made["sample_stats"] = _to_dataset(dict(sample_stats))
    data = {n: v.detach().cpu().numpy() for n, v in bound.observations.items()}
    if data:
        made["observed_data"] = left_out.unless("observed_data", lambda: _observed(bound, data, dims), None)
    drawn = made.get("posterior")
    if drawn is not None:
        held = {v.attrs.get("site", n) for n, v in drawn.data_vars.items()}
        for name in (n for n in values if n not in held):
            left_out.add(f"{name}: it is in result.draws alone")
        drawn.attrs.update(attrs or {})
    kept = {n: v.cpu() for n, v in posterior.items()}
    return Groups(bound, kept, chains, within, seed, made, later, dict(attrs or {}), left_out)


def _dims(bound: BoundPair) -> dict[str, list[str]]:
    return {n: dims_of(bound, n) for n in bound.sites}


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
        datasets["observed_data"] = _observed(bound, data, dims)
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


def _affordable(bound: BoundPair, size: int, left_out: LeftOut) -> tuple[dict[str, str], list[str]]:
    """Groups, each with why memory does not allow it, and those deterministic and summed-out sites that it allows.

    Sites are taken from the smallest on: one that is wide costs no other one its place.
    """
    observed = bound.select("observed").values()
    derived = [s for s in bound.sites.values() if s.role == "deterministic" or (s.role == "latent" and s.finite)]
    numbers = {s.name: size * torch.Size(s.shape).numel() for s in (*observed, *derived)}
    replicated = sum(numbers[s.name] for s in observed)
    scored = size * sum(torch.Size(s.shape[: s.batch]).numel() for s in observed)
    kept, total = set[str](), 0
    for site in sorted(derived, key=lambda s: numbers[s.name]):
        total += numbers[site.name]
        if total <= STORED and replicated <= SCORED:
            kept.add(site.name)
    if wide := [s.name for s in derived if s.name not in kept]:
        said = f"left out {', '.join(wide)} ({sum(numbers[n] for n in wide):,} numbers), for fewer rows or draws"
        left_out.add(said)
        warnings.warn(f"{bound.name}: {said}", stacklevel=5)
    asked = {}
    for group, count, reads, verb in (
        ("posterior_predictive", replicated, 0, "posterior_predictive(result, data)"),
        ("log_likelihood", scored, replicated, "pointwise_log_likelihood(result, data)"),
    ):
        fits = count <= STORED and reads <= SCORED
        asked[group] = "" if fits else f"{count:,} numbers, for fewer rows or draws; ask {verb}"
    return asked, [s.name for s in derived if s.name in kept]


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
    dataset = _to_dataset(given, dims=used, coords=_coords(bound, used), **asked)
    for site in arrays:
        if names.get(site, site) != site:
            dataset[names[site]].attrs["site"] = site
    return dataset


def variables_of(bound: BoundPair) -> dict[str, str]:
    """Name of each site as a variable: its own, unless a dimension has it."""
    taken = {"chain", "draw", *(f"{n}_observed" for n in bound.select("observed"))}
    return allowed_names(bound.sites, taken.union(*(dims_of(bound, n) for n in bound.sites)))


def _to_dataset(arrays: dict[str, np.ndarray], **names: Any) -> xr.Dataset:
    # ArviZ would warn of each group with more chains than draws; our diagnosis speaks of short chains.
    return azb.dict_to_dataset(arrays, check_conventions=False, **names)


def _observed(bound: BoundPair, data: dict[str, np.ndarray], dims: dict[str, list[str]]) -> xr.Dataset:
    return _of_sites(bound, data, dims, sample_dims=[])


def _replicates(bound: BoundPair, posterior: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    observed = bound.select("observed")
    return scoring.draw_sites(bound.generator(), posterior, size, observed) if observed else {}


def _likelihood(bound: BoundPair, posterior: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    r"""Log likelihood (S, \*plates) by site, masked entries dropped, and the dimensions of those that are flat."""
    if not bound.select("observed"):
        return {}, {}
    scores = scoring.log_likelihood_by_site(bound, posterior)
    seen = seen_of(bound, posterior)
    kept: dict[str, Tensor] = {}
    # What is summed over has the plates that it shares with all observed sites.
    summed, plates = scoring.summed_within(bound, posterior)
    flat = {n: list(plates) for n in scores} if summed and all(plates) else {}
    if all(bool(m.all()) for m in seen.values()):
        return scores, flat
    for name, score in scores.items():
        mask = rows_seen(bound, seen, plates if summed else None) if summed or name not in seen else seen[name]
        kept[name] = score if mask.all() else score[:, mask.to(score.device)]
        if not mask.all():
            flat[name] = [f"{name}_observed"]
    return {n: v for n, v in kept.items() if v[0].numel()}, flat


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
