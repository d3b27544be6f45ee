r"""``Result``, which every method returns, and its conversion to ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_count
from inference.core.files import write_whole
from inference.core.handlers import exclusive, isolated
from inference.diagnostics.convergence import Diagnosis, diagnose
from inference.draws import scoring

STORED, SCORED = 20_000_000, 500_000_000
"""Largest size of a predictive group of a Result, and largest input of its log likelihood, in numbers."""


class State:
    """Parameters and buffers of a pair as a fit left them.

    ``with state():`` restores them, in the parameter store and in modules that have been trained since, for the length
    of the block.
    """

    def __init__(self, modules: tuple[torch.nn.Module, ...] = ()) -> None:
        store = pyro.get_param_store().get_state()
        self._store = store
        self._modules = modules
        tensors = [*store["params"].values(), *(b for m in modules for b in m.buffers())]
        self._tensors = [(t, t.detach().clone()) for t in tensors]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Restore the parameters in a scope of the store, with modules in evaluation mode and without gradients."""
        now = [t.detach().clone() for t, _ in self._tensors]
        training = [m for module in self._modules for m in module.modules() if m.training]
        try:
            for module in training:
                module.training = False
            with pyro.get_param_store().scope(self._store.copy()), torch.no_grad():
                self._put(then for _, then in self._tensors)
                yield
        finally:
            self._put(now)
            for module in training:
                module.training = True

    def _put(self, values: Any) -> None:
        with torch.no_grad():
            for (tensor, _), value in zip(self._tensors, values, strict=True):
                tensor.copy_(value)

    def values(self) -> dict[str, Tensor]:
        """Constrained values by dotted name."""
        with isolated(), self():
            return {dotted(n): v.detach().clone() for n, v in pyro.get_param_store().items()}


def dotted(name: str) -> str:
    """Name of a parameter as torch writes it: ``decoder.0.weight`` for ``decoder$$$0.weight``."""
    return name.replace("$$$", ".")


@dataclass(frozen=True, eq=False)
class Result:
    r"""A fitted posterior.

    Attributes:
        idata: ArviZ InferenceData with the groups ``posterior``, ``sample_stats``, ``posterior_predictive``,
            ``log_likelihood`` and ``observed_data``, as far as the method has them and memory allows.
        params: Constrained parameters by dotted name; empty for chains without parameters.
        losses: Loss of each step (steps,), or (steps, 2) for an objective with two losses; empty for chains.
        seconds: ``setup`` (until the first step or transition is done), ``run`` (the other steps or transitions) and
            ``draws`` (posterior draws, predictions and diagnostics).
        method: Name of the method, for tables: ``SVI (Trace_ELBO)``, ``NUTS``.
        diagnosis: R-hat, effective sample sizes, divergences, Pareto k, each with advice.
        draws: Posterior draws of the latent sites, (S, \*shape), chains one after another.
        bound: The pair and its data.
        state: Parameters and buffers as the method left them.
        more: From a number of draws and a seed to further draws.
    """

    idata: az.InferenceData
    params: dict[str, Tensor]
    losses: np.ndarray
    seconds: Mapping[str, float]
    method: str
    diagnosis: Diagnosis
    draws: dict[str, Tensor]
    bound: BoundPair = field(repr=False)
    state: State = field(repr=False)
    more: Callable[[int, int], dict[str, Tensor]] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of posterior draws S."""
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def ended(self) -> str:
        """Why and at which step a fit ended early, ``interrupted at step 20 of 100``; empty if it did not."""
        return str(self.idata.attrs.get("ended", ""))

    @property
    def interrupted(self) -> bool:
        """Whether the fit was interrupted (Ctrl-C), so that the Result is that of the steps taken until then."""
        return self.ended.startswith("interrupted")

    def save(self, path: str | Path) -> Path:
        """Write ``idata`` to a NetCDF file for ArviZ, by :func:`inference.write_whole`; return the path.

        Raises:
            ValueError: There is nothing to write: the method has no posterior, and the pair observes nothing.
        """
        if not self.idata.groups():
            raise ValueError(f"save: expected a posterior or observed data, got none of {self.method}")
        return write_whole(path, lambda new: self.idata.to_netcdf(str(new)))

    @exclusive
    def draw(self, size: int = 1000, *, seed: int = 1) -> dict[str, Tensor]:
        r"""Draw more from the posterior: from the guide, or by continuing the chains.

        Returns:
            A tensor (size, \*shape) for each latent site.
        """
        check_count("size", size)
        with isolated(seed), self.state():
            return self.more(size, seed)

    def summary(self) -> Any:
        """Table of the posterior: mean and sd; for chains also Monte Carlo error, effective sample sizes and R-hat."""
        return self.diagnosis.table

    def __str__(self) -> str:
        took = self.seconds["setup"] + self.seconds["run"]
        count = f"{self.size} draws" if self.draws else f"{len(self.losses)} steps"
        return f"{self.method} on {self.bound.name}: {count} in {took:.1f} s. {self.diagnosis}"


@dataclass(frozen=True)
class Posterior:
    r"""Posterior draws and what they are judged by.

    Attributes:
        draws: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        chains: Number of chains.
        stats: Statistics (chains, draws) of each transition; None without chains.
        pareto_k: Pareto k of a guide against its model; None without a guide.
        latent_kl: KL from the prior of each dimension of the latent sites in the plate of rows.
        attrs: Further attributes of the InferenceData.
    """

    draws: dict[str, Tensor]
    chains: int = 1
    stats: Mapping[str, np.ndarray] | None = None
    pareto_k: float | None = None
    latent_kl: pd.DataFrame | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


def conclude(
    bound: BoundPair,
    make: Callable[[], Posterior | Sequence[str]],
    more: Callable[[int, int], dict[str, Tensor]],
    seconds: Mapping[str, float],
    *,
    method: str,
    execution: str,
    losses: np.ndarray | None = None,
    ended: str = "",
) -> Result:
    """Turn what a fit or chains have left in the parameter store into a Result.

    Args:
        bound: The pair and its data.
        make: Makes the posterior from the parameters as they are now; a method without a posterior gives its advice.
        more: From a number of draws and a seed to further draws.
        seconds: ``setup`` and ``run``.
        method: Name of the method, for tables.
        execution: How it ran: ``eager``, ``traced`` or ``fused``.
        losses: Loss of each step; None for chains.
        ended: Why and at which step the run ended early; empty if it did not.
    """
    started, state = perf_counter(), State(bound.modules)
    attrs = {"method": method, "execution": execution, **({"ended": ended} if ended else {})}
    with state():
        made = make()
        if isinstance(made, Posterior):
            idata = to_idata(bound, made.draws, made.stats, chains=made.chains, attrs={**attrs, **made.attrs})
            diagnosis = diagnose(idata, made.pareto_k, made.latent_kl)
        else:
            idata = az.InferenceData(attrs=attrs)
            diagnosis = Diagnosis(pd.DataFrame(), None, None, tuple(made))
    if ended:
        unfinished = f"The run was {ended}: what it returns is not finished."
        diagnosis = replace(diagnosis, advice=(unfinished, *diagnosis.advice))
    return Result(
        idata=idata,
        params=state.values(),
        losses=np.zeros(0) if losses is None else losses,
        seconds={**seconds, "draws": perf_counter() - started},
        method=method,
        diagnosis=diagnosis,
        draws=made.draws if isinstance(made, Posterior) else {},
        bound=bound,
        state=state,
        more=more,
    )


def to_idata(
    bound: BoundPair,
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, np.ndarray] | None = None,
    *,
    chains: int = 1,
    attrs: Mapping[str, Any] | None = None,
) -> az.InferenceData:
    r"""Convert draws of any method to InferenceData, with the parameters that are in the store.

    Args:
        bound: The pair and its data.
        posterior: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        sample_stats: Statistics (chains, draws) of each transition.
        chains: Number of chains.
        attrs: Attributes of the InferenceData and of its posterior group.

    Dimensions are named after the plates (``rows``) and the pair's ``dims``; coordinates are the pair's ``coords``.
    Deterministic sites and posterior draws of summed-out sites are added. A predictive group of more than ``STORED``
    numbers is left out with a warning, and so is a log likelihood that would read more than ``SCORED``.
    """
    size = len(next(iter(posterior.values()))) if posterior else 1
    groups: dict[str, Mapping[str, Tensor]] = {"posterior": posterior}
    observed = bound.select("observed")
    replicated = size * sum(torch.Size(s.shape).numel() for s in observed.values())
    scored = size * sum(torch.Size(s.shape[: s.batch]).numel() for s in observed.values())
    left_out = {}
    if replicated <= STORED:
        groups["posterior"] = {**posterior, **scoring.latent_functions(bound, posterior)}
        groups["posterior_predictive"] = _replicates(bound, posterior, size)
    elif observed:
        left_out["posterior_predictive"] = replicated, "posterior_predictive(result, data)"
    if scored <= STORED and replicated <= SCORED:
        groups["log_likelihood"] = _likelihood(bound, posterior)
    elif observed:
        left_out["log_likelihood"] = scored, "pointwise_log_likelihood(result, data)"
    if left_out:
        said = " and ".join(f"{group} ({count:,} numbers; ask {verb})" for group, (count, verb) in left_out.items())
        warnings.warn(f"{bound.name}: left out {said}, for fewer rows or draws", stacklevel=3)
    dims = {n: _dims(bound, n) for n in bound.sites}
    plates = {n: d[: bound.sites[n].batch] for n, d in dims.items()}
    data = {n: v.detach().cpu().numpy() for n, v in bound.observations.items()}
    named = {"log_likelihood": plates}
    datasets = {g: _dataset(bound, sites, named.get(g, dims), chains) for g, sites in groups.items() if sites}
    if sample_stats:
        datasets["sample_stats"] = _to_dataset(dict(sample_stats))
    if data:
        datasets["observed_data"] = az.dict_to_dataset(data, dims=dims, coords=_coords(bound, dims), default_dims=[])
    if "posterior" in datasets:
        datasets["posterior"].attrs.update(attrs or {})
    # A pair without latent sites has no posterior: ArviZ knows no empty group.
    return az.InferenceData(attrs=dict(attrs or {}), **datasets)


def _dataset(bound: BoundPair, sites: Mapping[str, Tensor], dims: dict[str, list[str]], chains: int) -> Any:
    arrays = {n: v.detach().cpu().numpy().reshape(chains, -1, *v.shape[1:]) for n, v in sites.items()}
    used = {n: dims.get(n, ["rows"] * (v.ndim == 3)) for n, v in arrays.items()}
    return _to_dataset(arrays, dims=used, coords=_coords(bound, used))


def _to_dataset(arrays: dict[str, np.ndarray], **names: Any) -> Any:
    with warnings.catch_warnings():
        # ArviZ warns of each group with more chains than draws; our diagnosis speaks of short chains.
        warnings.filterwarnings("ignore", message="More chains")
        return az.dict_to_dataset(arrays, **names)


def _replicates(bound: BoundPair, posterior: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    sites = scoring.draw_sites(bound.generator(), posterior, size)
    return {n: v for n, v in sites.items() if n in bound.select("observed")}


def _likelihood(bound: BoundPair, posterior: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not bound.select("observed"):
        return {}
    try:
        return scoring.log_likelihood_by_site(bound, posterior)
    except ValueError as error:
        warnings.warn(f"{bound.name}: log_likelihood left out: {error}", stacklevel=4)
        return {}


def _dims(bound: BoundPair, name: str) -> list[str]:
    site = bound.sites[name]
    named = list(bound.asked.dims.get(name, ()))
    event = len(site.shape) - site.batch
    # xarray owns no two dimensions of one name, and ArviZ none called chain or draw.
    plates = [p if p not in (None, "chain", "draw") else f"{name}_dim_{k}" for k, p in enumerate(site.plates)]
    own = named[-event:] if event and len(named) >= event else []
    rest = own or [f"{name}_dim_{site.batch + k}" for k in range(event)]
    return [*plates, *rest]  # type: ignore[list-item]


def _coords(bound: BoundPair, dims: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    used = {d for names in dims.values() for d in names}
    return {k: list(v) for k, v in bound.asked.coords.items() if k in used}
