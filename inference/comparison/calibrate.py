r"""``calibrate``: simulation-based calibration of any method on any pair."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.checkpoint import DAMAGED, Checkpoint, CheckpointError
from inference.comparison.elements import Elements
from inference.comparison.judgement import independent_draws
from inference.comparison.methods import accepted, name_of
from inference.comparison.simulated import Restore, check_reads, setting_of, simulate
from inference.core.bound import BoundPair
from inference.core.checks import check_chance, check_count, reason_of
from inference.core.handlers import REFUSALS, exclusive, isolated
from inference.core.lazy import pd
from inference.core.packing import fingerprints, read_packed, write_packed
from inference.core.spacing import spaced
from inference.diagnostics.calibration import DISTANCE, JOINT, Calibration, ranks
from inference.draws.rows import probe
from inference.draws.scoring import log_joint, sample_guide
from inference.result import Result
from inference.runners.asked import asked_of, named
from inference.runners.workers import run_jobs

Quantity = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
"""From draws by site (S, \\*shape) and data by name to a number per draw, (S,)."""


_Outcome = tuple[dict[str, np.ndarray], int] | str
"""Ranks (rows,) by quantity and the number of draws among which they are; the reason where the method failed."""


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
    checkpoint: str | Path | Checkpoint | None = None,
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
        checkpoint: A folder that keeps the ranks of each data set as soon as they are found. Called again with the same
            arguments, ``calibrate`` runs the other ones only. Default: none.

    Returns:
        A Calibration: ``verdict``, ``passed``, ``table``, ``plot()``. Data sets on which the method raises an error or
        ends early are listed in ``failed``.

    Raises:
        ValueError: The model observes nothing or has parameters that the method trains, the guide of a Result does not
            read the data, an argument is out of its range, or the checkpoint is of another calibration or damaged.
        RuntimeError: The method failed on every data set; the message has the first reason.
    """
    check_count("simulations", simulations)
    check_count("draws", draws)
    check_chance("alpha", alpha, ends=False)
    _check(make_pair, method, around)
    setting = setting_of(make_pair, data, around, seed)
    with isolated(seed):
        truths, sets = simulate(setting, simulations)
    check_reads(setting, sets)
    chosen = Elements.of(truths, setting)
    run: Callable[[_Task], _Outcome] = _Run(make_pair, method, chosen, dict(quantities or {}), draws)
    name = "the fitted guide" if method is None else name_of(method)
    with Checkpoint.of(checkpoint) or nullcontext() as kept:
        if kept is not None:
            asked = {"simulations": simulations, "draws": draws, "seed": seed, "quantities": sorted(quantities or ())}
            method_of = name if method is None else named(method)
            simulated = fingerprints(
                {**truths, **{f"data of {k}: {n}": v for k, s in enumerate(sets) for n, v in s.items()}}
            )
            kept.begin(asked_of(setting.bound, run="calibrate", method=method_of, **asked, simulated=_hash(simulated)))
            kept.write({})
            run = _Kept(run, kept.folder)
        found = run_jobs(run, _tasks(truths, sets, chosen, seed), jobs, "data set")
    return _collect(found, alpha, name, setting.bound.name, chosen.omitted)


def _check(make_pair: Any, method: Any, around: Any) -> None:
    fitted = isinstance(make_pair, Result)
    if fitted == (method is not None):
        got = "a Result and a method" if fitted else "a function that builds a pair, and none"
        raise ValueError(f"method: expected one for new pairs, or a Result alone, got {got}")
    if fitted and around is not None:
        raise ValueError("around: expected a function that builds a pair, and a method, got a Result in place of it")


@dataclass(frozen=True)
class _Task:
    """A simulated data set: its number, truth, data, reference point (rows, elements), scale of elements, and seed."""

    number: int
    truth: dict[str, Tensor]
    data: dict[str, Any]
    point: np.ndarray
    scale: np.ndarray
    seed: int


def _tasks(truths: Mapping[str, Tensor], sets: Sequence[dict[str, Any]], elements: Elements, seed: int) -> list[_Task]:
    whole = elements.values(truths)
    low, high = np.quantile(whole.reshape(-1, whole.shape[-1]), [0.25, 0.75], axis=0)
    scale = np.where(high > low, high - low, 1.0)
    # Another draw of the prior is a point that knows nothing of the data.
    points = np.roll(whole, 1, axis=0 if len(whole) > 1 else 1)
    return [
        _Task(k, {n: v[k] for n, v in truths.items()}, data, points[k], scale, seed + 1 + k)
        for k, data in enumerate(sets)
    ]


@dataclass(frozen=True)
class _Run:
    """Runs the method on a task, and ranks its truth."""

    make_pair: Any
    method: Any
    elements: Elements
    further: dict[str, Quantity]
    draws: int

    def __call__(self, task: _Task) -> _Outcome:
        """Ranks (rows,) by quantity and the number of draws; the reason where it failed."""
        try:
            with warnings.catch_warnings():
                # The verdict is on all of them.
                warnings.simplefilter("ignore")
                return self._ranked(task)
        except (*REFUSALS, ArithmeticError, KeyError) as error:
            return f"{type(error).__name__}: {reason_of(error)}"

    def _ranked(self, task: _Task) -> tuple[dict[str, np.ndarray], int]:
        bound, state, draws = self._posterior(task)
        missing = [n for n in self.elements.places if n not in draws]
        if missing:
            raise ValueError(f"method: expected draws of {', '.join(missing)}, got {', '.join(draws) or 'none'}")
        # The truth comes last.
        both = {n: torch.cat([draws[n], v[None].to(draws[n])]) for n, v in task.truth.items() if n in draws}
        count, random = len(next(iter(draws.values()))), np.random.default_rng(task.seed)
        found = self._parameters(task, bound, both)
        with isolated(task.seed), state():
            found |= self._scores(bound, both)
        return {n: ranks(v[:-1], v[-1], random) for n, v in found.items()}, count

    def _parameters(self, task: _Task, bound: BoundPair, both: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Elements of the parameters, and their distance to the reference point, (S + 1, rows)."""
        values = self.elements.values(both)
        if not np.isfinite(values).all():
            raise ArithmeticError("draws are not finite")
        found = dict(zip(self.elements.labels(bound), np.moveaxis(values, -1, 0), strict=True))
        if values.shape[-1] > 1:
            found[DISTANCE] = np.linalg.norm((values - task.point) / task.scale, axis=-1)
        return found

    def _scores(self, bound: BoundPair, both: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """Quantities that read the data, (S + 1, rows)."""
        found = {n: f(both, bound.data).double().cpu().numpy()[:, None] for n, f in self.further.items()}
        try:
            if self.elements.axes:
                size = len(next(iter(both.values())))
                density = probe(bound, bound.guide is not None).model(both, size)[0]
            else:
                density = log_joint(bound, both)[:, None]
        except REFUSALS:
            return found
        return {JOINT: density.double().cpu().numpy(), **found}

    def _posterior(self, task: _Task) -> tuple[BoundPair, Restore, dict[str, Tensor]]:
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
        return result.bound, result.state, independent_draws(result, self.draws)


@dataclass(frozen=True)
class _Kept:
    """Runs the method on a task unless the folder has its ranks, and writes them there."""

    run: Callable[[_Task], _Outcome]
    folder: Path

    def __call__(self, task: _Task) -> _Outcome:
        path = self.folder / f"ranks-{task.number}.safetensors"
        if path.exists():
            return self._read(path)
        found = self.run(task)
        kept = {"failed": found} if isinstance(found, str) else {"ranks": found[0], "draws": found[1]}
        try:
            write_packed(path, kept)
        except OSError as error:
            warnings.warn(f"checkpoint: {path} cannot be written ({error}); the calibration goes on", stacklevel=2)
        return found

    def _read(self, path: Path) -> _Outcome:
        try:
            held = read_packed(path)
            if "failed" in held:
                return str(held["failed"])
            return dict(held["ranks"]), int(held["draws"])
        except DAMAGED as error:
            got = f"a file that cannot be read ({reason_of(error)})"
            raise CheckpointError(f"checkpoint: {path}: expected the ranks of a data set, got {got}") from None


def _hash(found: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def trained_in_model(bound: BoundPair) -> list[str]:
    """Names of the parameters that the model itself has, and that can be trained."""
    with isolated(0), torch.no_grad(), poutine.block():
        bound.model(**bound.arguments())
        return [n for n, v in pyro.get_param_store().named_parameters() if v.requires_grad]


def _collect(outcomes: Sequence[Any], alpha: float, method: str, pair: str, omitted: int) -> Calibration:
    failed = tuple(o for o in outcomes if isinstance(o, str))
    done = [o for o in outcomes if not isinstance(o, str)]
    if not done:
        raise RuntimeError(f"the method failed on every data set: {failed[0]}")
    found, draws = zip(*done, strict=True)
    # A quantity that could not be computed once is left out.
    names = [n for n in found[0] if all(n in own for own in found)]
    table = pd.DataFrame({n: np.concatenate([own[n] for own in found]) for n in names})
    table = table.iloc[spaced(len(table), MAX_RANKS).numpy()].reset_index(drop=True)
    return Calibration(table, np.array(draws), alpha, method, pair, failed, omitted)
