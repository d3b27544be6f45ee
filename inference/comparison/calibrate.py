r"""``calibrate``: simulation-based calibration of any method on any pair."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.core.bound import BoundPair, bind
from inference.core.checks import check_count
from inference.core.handlers import REFUSALS, exclusive, isolated
from inference.core.lazy import pd
from inference.diagnostics.calibration import DISTANCE, JOINT, Calibration, ranks
from inference.draws.rows import probe
from inference.draws.scoring import draw_sites, log_joint, sample_guide
from inference.result import Result

Quantity = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""From draws by site (S, \\*shape) and data by name to a number per draw, (S,)."""


MAX_QUANTITIES = 200
"""Scalar quantities, at most, that are ranked; of sites with more of them evenly spaced ones."""


READ = 5
"""Data sets on which the guide of a Result has to differ: two may be equal, of few binary rows."""


MAX_RANKS = 4000
"""Ranks of a quantity, at most, where every row of a data set gives one."""


@exclusive
def calibrate(
    make_pair: Callable[[], Any] | Result,
    data: Any = None,
    method: Callable[..., Result] | None = None,
    *,
    simulations: int = 100,
    draws: int = 200,
    around: Result | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    jobs: int = 1,
) -> Calibration:
    r"""Test by simulated data whether a method draws from the posterior (simulation-based calibration, Talts 2018).

    Parameters are drawn from the prior, and data given them. The method is run on each data set, and each true
    parameter is ranked among its draws, thinned to their effective sample size. The ranks of exact posteriors are
    uniform. Beside the parameters two quantities are ranked that see them all at once: ``log_joint``, the log density
    of parameters and data, which also tells a posterior that ignores the data; and ``distance``, to a random point of
    the prior in units of prior standard deviations (TARP, Lemos 2023).

    Where all latent sites lie in the plate of rows, every row of a data set gives a rank.

    Args:
        make_pair: Builds a new pair, called once per data set. Or a Result of ``fit`` with an amortized guide, one
            whose posterior is a function of the data: then nothing is fitted again, and there is no ``method``.
        data: Data of the shapes that are simulated; what the model does not observe is kept. Default, with a Result:
            those of the Result.
        method: A callable ``(pair, data) -> Result``, mostly ``partial(fit, ...)`` or ``partial(sample, ...)``. It gets
            another ``seed`` for each data set, if it takes one.
        simulations: Number of data sets.
        draws: Draws, at most, among which each true value is ranked.
        around: A Result for the data at hand: parameters are drawn from its posterior in place of the prior, and the
            method gets its data joined with simulated rows (posterior SBC, Säilynoja et al. 2025). It tests the method
            where the data are, not where the prior is. Only sites outside of the plate of rows are ranked.
        quantities: Further quantities by name, from draws and data to a number per draw.
        alpha: Probability that an exact posterior is called not calibrated, over all quantities together.
        seed: Seed of all randomness.
        jobs: Number of data sets that run side by side, in processes (-1: as many as there are cores).

    Returns:
        A Calibration: ``verdict``, ``passed``, ``table``, ``plot()``. Data sets on which the method raises an error or
        ends early are listed in ``failed``.

    Raises:
        ValueError: The model observes nothing or has parameters that the method trains, the guide of a Result does not
            read the data, or an argument is out of its range.
        RuntimeError: The method failed on every data set; the message has the first reason.
    """
    check_count("simulations", simulations)
    check_count("draws", draws)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha: expected a number between 0 and 1, got {alpha!r}")
    setting = _setting(make_pair, data, method, around, seed)
    with isolated(seed):
        truths, given = _simulate(setting, simulations, around)
    names, omitted = _names(setting, truths)
    whole = _numbers(truths, names, setting.axes)
    scale = _scale(whole)
    # Another draw of the prior is a point that knows nothing of the data.
    points = np.roll(whole, 1, axis=0 if len(whole) > 1 else 1)
    tasks = []
    for k in range(simulations):
        task = _Task({n: v[k] for n, v in truths.items()}, given(k), points[k], scale, seed + 1 + k)
        tasks.append(task)
    _check_reads(setting, tasks)
    run = _Run(make_pair, method, setting.axes, names, dict(quantities or {}), draws)
    outcomes = _in_parallel(run, tasks, jobs)
    return _collect(setting, outcomes, method, alpha, omitted)


@dataclass(frozen=True)
class _Setting:
    """What is simulated.

    Attributes:
        bound: The pair and the data whose shapes are simulated.
        state: Puts the parameters of a Result into their places; nothing for a new pair.
        observed: From observed sites to names of data, and columns of them.
        latent: Names of the latent sites that are ranked.
        axes: Dimension of the plate of rows by site, where all latent sites lie in it and rows are ranked one by one;
            else empty.
        fitted: Whether it is a Result, whose guide is used at all data sets.
    """

    bound: BoundPair
    state: Any
    observed: dict[str, tuple[str, int | None]]
    latent: tuple[str, ...]
    axes: dict[str, int]
    fitted: bool


@dataclass(frozen=True)
class _Task:
    """A simulated data set: its truth, data, reference point (rows, quantities), scale of quantities, and seed."""

    truth: dict[str, Tensor]
    data: dict[str, Any]
    point: np.ndarray
    scale: np.ndarray
    seed: int


def _setting(make_pair: Any, data: Any, method: Any, around: Result | None, seed: int) -> _Setting:
    fitted = isinstance(make_pair, Result)
    if fitted == (method is not None):
        got = "a Result and a method" if fitted else "a function that builds a pair, and none"
        raise ValueError(f"method: expected one for new pairs, or a Result alone, got {got}")
    if fitted:
        bound = make_pair.bound if data is None else make_pair.bound.rebound(data)
        state = make_pair.state
        if around is not None:
            raise ValueError(
                "around: expected a function that builds a pair, and a method, got a Result in place of it"
            )
    else:
        with isolated(seed):
            bound = bind(make_pair(), around.bound.data if around is not None and data is None else data)
        state = nullcontext if around is None else around.state
    (bound if around is None else around.bound).check_in_memory("simulated data of its shapes")
    if not bound.select("observed"):
        raise ValueError("make_pair: expected a model that observes data, got one that observes nothing")
    latent = bound.guided if fitted else bound.select("latent")
    rows = _row_plates(bound)
    kept = tuple(n for n, s in bound.select("latent").items() if n in latent and not (around and rows & set(s.plates)))
    if not kept:
        raise ValueError("make_pair: expected latent sites to rank, got none")
    local = all(rows & set(bound.sites[n].plates) for n in kept)
    axes = {n: next(k for k, p in enumerate(bound.sites[n].plates) if p in rows) for n in kept} if local else {}
    if not local:
        # States of rows beside global sites: the log density sees them.
        kept = tuple(n for n in kept if not (bound.sites[n].discrete and rows & set(bound.sites[n].plates)))
    return _Setting(bound, state, _observed(bound), kept, axes, fitted)


def _row_plates(bound: BoundPair) -> set[str]:
    """Plates that all observed sites share and that have as many elements as there are rows."""
    observed = bound.select("observed").values()
    shared = [{p for p, size in zip(s.plates, s.shape, strict=False) if p and size == bound.rows} for s in observed]
    return set.intersection(*shared) if shared else set()


def _observed(bound: BoundPair) -> dict[str, tuple[str, int | None]]:
    """Name of the data that each observed site takes, and which column, where it takes one of several."""
    found: dict[str, tuple[str, int | None]] = {}
    for site, value in bound.observations.items():
        tensors = {n: v for n, v in bound.data.items() if isinstance(v, Tensor) and v.shape == value.shape}
        same = [n for n, v in tensors.items() if torch.equal(v, value.to(v))]
        names = [site] if site in bound.data else same
        if len(names) == 1:
            found[site] = names[0], None
    if len(found) < len(bound.observations):
        found |= _columns(bound, [n for n in bound.observations if n not in found])
    return found


def _columns(bound: BoundPair, sites: list[str]) -> dict[str, tuple[str, int | None]]:
    """Observed sites that are each one column of a matrix of the data."""
    matrices = {n: v for n, v in bound.data.items() if isinstance(v, Tensor) and v.dim() == 2}
    found: dict[str, tuple[str, int | None]] = {}
    for site in sites:
        value = bound.observations[site]
        same = [(n, k) for n, v in matrices.items() for k, c in enumerate(v.mT) if _equal(c, value)]
        if len(same) != 1:
            got = "several" if same else ", ".join(bound.data) or "none"
            raise ValueError(
                f"data: expected one, or one column, that is the value of the observed site {site}, got {got}"
            )
        found[site] = same[0]
    return found


def _equal(column: Tensor, value: Tensor) -> bool:
    return column.shape == value.shape and torch.equal(column, value.to(column))


def _with_drawn(
    data: Mapping[str, Any], sites: Mapping[str, Tensor], places: Mapping[str, tuple[str, int | None]], k: int
) -> dict[str, Any]:
    """The data with the observed sites of simulation k in their places."""
    found = dict(data)
    for site, (name, column) in places.items():
        if column is None:
            found[name] = sites[site][k].to(data[name].dtype)
        else:
            found[name] = data[name].clone() if found[name] is data[name] else found[name]
            found[name][:, column] = sites[site][k].to(data[name].dtype)
    return found


def _simulate(
    setting: _Setting, count: int, around: Result | None
) -> tuple[dict[str, Tensor], Callable[[int], dict[str, Any]]]:
    """True parameters (count, ...) by site, and the data of each simulation."""
    bound = setting.bound
    known: dict[str, Tensor] = {}
    if around is not None:
        chosen = torch.randint(around.size, (count,)) if around.size < count else torch.randperm(around.size)[:count]
        known = {n: around.draws[n][chosen] for n in setting.latent}
        bound = around.bound
    with setting.state(), torch.no_grad():
        sites = draw_sites(bound.generator(), known, count)
    truths = {n: v.cpu() for n, v in sites.items() if n in bound.select("latent")}

    def given(k: int) -> dict[str, Any]:
        fresh = _with_drawn(bound.data, sites, setting.observed, k)
        if around is None:
            return fresh
        return {n: torch.cat([v, fresh[n]]) if n in bound.cut else v for n, v in bound.data.items()}

    if around is not None and not bound.cut:
        raise ValueError("around: expected data with a row per element of a plate, to which rows are added, got others")
    return truths, given


def _names(setting: _Setting, truths: Mapping[str, Tensor]) -> tuple[list[tuple[str, np.ndarray]], int]:
    """Which elements of each site are ranked, and how many are left out."""
    sizes = {n: _flat(truths[n], setting.axes.get(n)).shape[-1] for n in setting.latent}
    share = max(1, MAX_QUANTITIES // len(sizes))
    kept = [(n, np.unique(np.linspace(0, size - 1, min(size, share)).astype(int))) for n, size in sizes.items()]
    return kept, sum(sizes.values()) - sum(len(at) for _, at in kept)


def _flat(values: Tensor, axis: int | None) -> Tensor:
    """Values (S, ...) of a site as (S, rows, quantities); a single row where rows are not ranked one by one."""
    rows = values[:, None] if axis is None else values.movedim(1 + axis, 1)
    return rows.reshape(*rows.shape[:2], -1)


def _numbers(
    values: Mapping[str, Tensor], names: Sequence[tuple[str, np.ndarray]], axes: Mapping[str, int]
) -> np.ndarray:
    """The ranked elements of all sites, (S, rows, quantities)."""
    parts = [_flat(values[n].double(), axes.get(n)).cpu().numpy()[..., at] for n, at in names]
    return np.concatenate(parts, -1)


def _scale(whole: np.ndarray) -> np.ndarray:
    """Spread of each quantity over simulations, by its quartiles: 1 where there is none."""
    low, high = np.quantile(whole.reshape(-1, whole.shape[-1]), [0.25, 0.75], axis=0)
    return np.where(high > low, high - low, 1.0)


def _labels(names: Sequence[tuple[str, np.ndarray]], bound: BoundPair, axes: Mapping[str, int]) -> list[str]:
    found = []
    for name, at in names:
        shape = list(bound.sites[name].shape)
        if name in axes:
            del shape[axes[name]]
        for k in at:
            place = ", ".join(map(str, np.unravel_index(int(k), shape))) if shape else ""
            found.append(f"{name}[{place}]" if place else name)
    return found


def _check_reads(setting: _Setting, tasks: Sequence[_Task]) -> None:
    """Raise a ValueError where the guide of a Result draws the same whatever the data."""
    if not setting.fitted or len(tasks) < 2:
        return
    drawn = []
    for task in tasks[:READ]:
        with isolated(0), setting.state():
            drawn.append(sample_guide(setting.bound.rebound(task.data), 2))
    first, density = drawn[0]
    same = [all(torch.equal(first[n], v[n]) for n in first) and torch.equal(density, d) for v, d in drawn[1:]]
    if all(same):
        raise ValueError(
            "make_pair: expected a Result with an amortized guide, got one whose draws are the same for all data; give "
            "a function that builds a pair, and a method that fits it to each data set"
        )


@dataclass(frozen=True)
class _Run:
    """Runs the method on a task, and ranks its truth."""

    make_pair: Any
    method: Any
    axes: dict[str, int]
    names: list[tuple[str, np.ndarray]]
    further: dict[str, Quantity]
    draws: int

    def __call__(self, task: _Task) -> tuple[dict[str, np.ndarray], int] | str:
        """Ranks (rows,) by quantity and the number of draws; the reason where it failed."""
        try:
            with warnings.catch_warnings():
                # The verdict is on all of them.
                warnings.simplefilter("ignore")
                return self._ranked(task)
        except (*REFUSALS, ArithmeticError, KeyError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _ranked(self, task: _Task) -> tuple[dict[str, np.ndarray], int]:
        bound, state, found = self._posterior(task)
        missing = [n for n, _ in self.names if n not in found]
        if missing:
            raise ValueError(f"method: expected draws of {', '.join(missing)}, got {', '.join(found) or 'none'}")
        count, random = len(next(iter(found.values()))), np.random.default_rng(task.seed)
        true = {n: v[None] for n, v in task.truth.items()}
        values, truth = _numbers(found, self.names, self.axes), _numbers(true, self.names, self.axes)[0]
        if not np.isfinite(values).all():
            raise ArithmeticError("draws are not finite")
        columns = dict(zip(_labels(self.names, bound, self.axes), np.moveaxis(values, -1, 0), strict=True))
        truths = dict(zip(columns, truth.T, strict=True))
        if values.shape[-1] > 1:
            far = [np.linalg.norm((v - task.point) / task.scale, axis=-1) for v in (values, truth)]
            columns[DISTANCE], truths[DISTANCE] = far[0], far[1]
        with isolated(task.seed), state():
            both = {n: torch.cat([v, true[n].to(v)]) for n, v in found.items() if n in true}
            for name, value in self._scores(bound, both).items():
                columns[name], truths[name] = value[:-1], value[-1]
        return {n: ranks(v, truths[n], random) for n, v in columns.items()}, count

    def _scores(self, bound: BoundPair, draws: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Quantities that read the data, (S + 1, rows)."""
        found = {n: f(draws, bound.data).double().cpu().numpy()[:, None] for n, f in self.further.items()}
        try:
            if self.axes:
                size = len(next(iter(draws.values())))
                density = probe(bound, bound.guide is not None).model(draws, size)[0]
            else:
                density = log_joint(bound, draws)[:, None]
        except REFUSALS:
            return found
        return {JOINT: density.double().cpu().numpy(), **found}

    def _posterior(self, task: _Task) -> tuple[BoundPair, Any, dict[str, Tensor]]:
        """The pair, its parameters, and independent draws."""
        if isinstance(self.make_pair, Result):
            bound = self.make_pair.bound.rebound(task.data)
            with isolated(task.seed), self.make_pair.state():
                return bound, self.make_pair.state, sample_guide(bound, self.draws)[0]
        with isolated(task.seed):
            pair = self.make_pair()
            result = self.method(pair, task.data, **accepted(self.method, seed=task.seed, progress=False))
        if result.ended:
            raise RuntimeError(f"the run was {result.ended}")
        learnt = trained_in_model(result.bound) if len(result.losses) else []
        if learnt:
            raise ValueError(
                "make_pair: expected a model without parameters, whose data come from one prior, got "
                f"{learnt[0]}, which the method trains; give the Result of a fit of an amortized guide"
            )
        at = torch.linspace(0, result.size - 1, min(independent(result), self.draws)).long()
        return result.bound, result.state, {n: v[at] for n, v in result.draws.items()}


def accepted(method: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Those settings that a method takes: by name, or with all that it hands on."""
    parameters = inspect.signature(method).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {n: v for n, v in settings.items() if takes_all or n in parameters}


def independent(result: Result) -> int:
    """Number of independent draws: of chains the smallest bulk effective sample size, at most all of them."""
    if "sample_stats" not in result.idata.children:
        return result.size
    size = result.diagnosis.min_ess_bulk
    chains = result.idata["posterior"].sizes["chain"]
    return max(1, min(result.size, int(size) if math.isfinite(size) else chains))


def trained_in_model(bound: BoundPair) -> list[str]:
    """Names of the parameters that the model itself has, and that can be trained."""
    with isolated(0), torch.no_grad(), poutine.block():
        bound.model(**bound.arguments())
        return [n for n, v in pyro.get_param_store().named_parameters() if v.requires_grad]


def _in_parallel(run: _Run, tasks: Sequence[_Task], jobs: int) -> list[Any]:
    if jobs == 1 or len(tasks) == 1:
        return [run(task) for task in tasks]
    return in_processes(run, tasks, jobs)


def in_processes(run: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> list[Any]:
    """What a function returns for each task, by so many processes side by side."""
    # A second to import.
    from joblib import Parallel, delayed, parallel_config

    cores = os.cpu_count() or 1
    with parallel_config("loky", inner_max_num_threads=max(1, cores // (cores if jobs < 0 else jobs))):
        return list(Parallel(n_jobs=jobs)(delayed(run)(task) for task in tasks))


def _collect(setting: _Setting, outcomes: list[Any], method: Any, alpha: float, omitted: int) -> Calibration:
    failed = tuple(o for o in outcomes if isinstance(o, str))
    done = [o for o in outcomes if not isinstance(o, str)]
    if not done:
        raise RuntimeError(f"the method failed on every data set: {failed[0]}")
    # A quantity that could not be computed once is left out.
    names = [n for n in done[0][0] if all(n in o[0] for o in done)]
    table = pd.DataFrame({n: np.concatenate([o[0][n] for o in done]) for n in names})
    if len(table) > MAX_RANKS:
        table = table.iloc[np.linspace(0, len(table) - 1, MAX_RANKS).astype(int)].reset_index(drop=True)
    named = "the fitted guide" if setting.fitted else getattr(method, "__name__", "") or _named(method)
    return Calibration(table, np.array([o[1] for o in done]), alpha, named, setting.bound.name, failed, omitted)


def _named(method: Any) -> str:
    """Name of a method that may be a partial: ``fit``, ``sample (NUTS)``."""
    function, settings = getattr(method, "func", method), getattr(method, "keywords", {})
    kernel = settings.get("kernel") or settings.get("objective")
    name = getattr(function, "__name__", type(function).__name__)
    inner = getattr(kernel, "__name__", "") or type(kernel).__name__
    return f"{name} ({inner})" if kernel is not None else name
