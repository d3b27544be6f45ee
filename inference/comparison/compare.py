r"""Compare methods of inference on one pair."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.checkpoint import Checkpoint, CheckpointError, NoCheckpoint
from inference.comparison.checks import check_methods, check_names, check_parts
from inference.comparison.methods import Method, accepted
from inference.comparison.scores import (
    Densities,
    Moments,
    drawn_scores,
    draws_sd,
    heldout_scores,
    mean_error,
    paired_differences,
    run_scores,
    stein_scores,
    truth_scores,
)
from inference.comparison.table import COLUMNS, Comparison
from inference.core.bound import bind
from inference.core.checks import check_count, check_device
from inference.core.group import from_first, ranks
from inference.core.halves import move
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import pd
from inference.result import Result
from inference.runners.workers import run_jobs


@exclusive
def compare(
    make_pair: Callable[[], Any],
    data: Any,
    methods: Mapping[str, Method],
    *,
    truth: Moments | Result | Callable[[Any, Any], Moments | Result] | None = None,
    drawn: Mapping[str, Any] | None = None,
    heldout: Any = None,
    label: str | None = None,
    stein: bool = False,
    seed: int = 0,
    seeds: int = 1,
    jobs: int = 1,
    device: str | torch.device | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
) -> Comparison:
    r"""Run several methods of inference on one pair and compare their results.

    Args:
        make_pair: Builds a new pair; called once per method, always from the same random state.
        data: Data of the fit: a tensor or a mapping of names to tensors.
        methods: Callables ``(pair, data) -> Result`` by name, for instance ``partial(fit, ...)``.
        truth: True posterior mean and standard deviation by site, each of the site's shape, or a callable
            ``(pair, data)`` that returns them (if it raises ArithmeticError, the truth is left out with a warning). A
            site that a method does not draw is named by a warning. A Result, such as that of long chains, is a truth
            that is itself an estimate: ``truth_error`` is its own error.
        drawn: Parameters that the data were simulated from, by site, for ``coverage_90``.
        heldout: Held-out rows, in the form of ``data``.
        label: Name of the labels in ``heldout``, for accuracy and calibration. Default: the one finite site of the
            model, if there is one.
        stein: Whether to compute the kernel Stein discrepancy of each method: see :func:`inference.ksd`.
        seed: Seed from which each pair is built.
        seeds: Number of runs of each method, at their own seed and those after it; the table has their means, and
            ``Comparison.errors`` the standard errors. Results are those of the first run. The methods must take
            ``seed``.
        jobs: Processes in which the runs after the first go side by side (-1: as many as there are cores); they slow
            each other down, which ``seconds`` shows.
        device: Where to run, such as "cuda": pairs and data are moved there before a method gets them. Default: where
            they are.
        checkpoint: A folder in which each method keeps its own checkpoint, if it takes an argument ``checkpoint`` or
            hands on what it does not name, as ``fit`` and ``sample`` do. Called again with the same arguments, methods
            that have ended are not run again, and the one that was under way goes on. Default: none.

    Returns:
        A Comparison. A method that fails has an empty row in the table, and ``Comparison.failed`` and a warning give
        the reason.

    Raises:
        ValueError: There are no methods, ``truth``, ``drawn`` or ``label`` names no site of the model, there are no
            held-out labels, a method takes no ``seed`` where there are several, or the checkpoint is of another run.
        RuntimeError: Every method failed (a single method raises its own error).
    """
    check_methods(make_pair, methods, truth)
    check_count("seeds", seeds)
    place = check_device(device)
    with _checkpoint(checkpoint, methods, seed) or nullcontext() as kept:

        def build() -> Any:
            with isolated(seed):
                pair = make_pair()
            if place is not None:
                move(pair, place)
            return pair

        if device is not None:
            data = bind(build(), data, device).data
        moments, truth_error = _moments(truth, build, data)
        true = {n: torch.as_tensor(v) for n, v in (drawn or {}).items()}
        if moments or true or label is not None:
            with isolated(0):
                check_names(bind(build(), data).sites, moments, true, heldout, label)
        starts = {name: _seeds(name, method, seeds) for name, method in methods.items()}
        run = _Run(build, data, moments, true, heldout, label, stein, kept)
        results, runs, failed = _first(run, methods, starts)
        for name, further in _further(run, methods, {n: starts[n][1:] for n in results}, jobs):
            if isinstance(further, str):
                warnings.warn(f"{name} failed at a further seed: {further}", stacklevel=3)
            else:
                runs[name].append(further)
        for k in range(seeds):
            _pair_up({n: scored[k] for n, scored in runs.items() if len(scored) > k})
        table, errors = (_table(methods, runs, of) for of in (np.mean, _standard_error))
        if truth_error is not None:
            table.loc[list(results), "truth_error"] = truth_error
        return Comparison(table, results, dict(moments), errors if seeds > 1 else None, failed)


def _checkpoint(asked: str | Path | Checkpoint | None, methods: Mapping[str, Method], seed: int) -> Checkpoint | None:
    """The checkpoint of a comparison, begun or gone on with."""
    kept = Checkpoint.of(asked)
    if kept is None:
        return None
    check_parts(methods, kept)
    # Pairs are built from the seed, which fits do not see.
    begun = from_first(lambda: kept.begin({"method": "compare", "seed": seed}))
    if begun is None and ranks()[0] == 0:
        kept.write({})
    return kept


@dataclass
class _Scored:
    """Scores of one run of a method, and its densities of held-out rows."""

    row: dict[str, float]
    density: Densities | None


@dataclass(frozen=True)
class _Run:
    """Runs a method once, and scores it."""

    build: Callable[[], Any]
    data: Any
    truth: Moments
    drawn: Mapping[str, Tensor]
    heldout: Any
    label: str | None
    stein: bool
    kept: Checkpoint | None

    def __call__(self, name: str, method: Method, seed: int | None) -> tuple[Result, _Scored]:
        further: dict[str, Any] = {} if seed is None else {"seed": seed}
        where = {} if self.kept is None else accepted(method, checkpoint=self.kept.part(name))
        try:
            result = method(self.build(), self.data, **further, **where)
        except NoCheckpoint as error:
            warnings.warn(f"{name} runs without a checkpoint: {error}", stacklevel=5)
            result = method(self.build(), self.data, **further)
        return result, self._score(result)

    def alone(self, task: tuple[str, Method, int]) -> _Scored | str:
        """The scores, or the reason why there are none; for another process."""
        try:
            return self(*task)[1]
        except Exception as error:
            return str(error) or type(error).__name__

    def _score(self, result: Result) -> _Scored:
        scores, density = heldout_scores(result, self.heldout, self.label)
        own = run_scores(result) | truth_scores(result, self.truth) | drawn_scores(result, self.drawn) | scores
        return _Scored(own | (stein_scores(result) if self.stein else {}), density)


def _seeds(name: str, method: Method, count: int) -> list[int | None]:
    """Seeds of the runs of a method: its own, which is None where it says none, and those after it."""
    if count == 1:
        return [None]
    if not accepted(method, seed=0):
        raise ValueError(f"methods: expected ones that take a seed, for seeds={count}, got {name}, which takes none")
    own = inspect.signature(method).parameters.get("seed")
    first = own.default if own is not None and isinstance(own.default, int) else 0
    return [first + k for k in range(count)]


def _first(
    run: _Run, methods: Mapping[str, Method], seeds: Mapping[str, list[int | None]]
) -> tuple[dict[str, Result], dict[str, list[_Scored]], dict[str, str]]:
    """Results and scores of the first run of each method, and why it failed, where it did."""
    results, runs, failed = {}, {}, {}
    for name, method in methods.items():
        try:
            results[name], scored = run(name, method, seeds[name][0])
            runs[name] = [scored]
        except Exception as error:
            if len(methods) == 1 or isinstance(error, CheckpointError):
                raise
            failed[name] = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            warnings.warn(f"{name} failed: {error}", stacklevel=4)
    if not results:
        raise RuntimeError(f"every method failed: {', '.join(methods)}")
    return results, runs, failed


def _further(
    run: _Run, methods: Mapping[str, Method], seeds: Mapping[str, list[int | None]], jobs: int
) -> list[tuple[str, _Scored | str]]:
    """The runs after the first; each has a checkpoint of its own only where it is the first."""
    tasks: list[Any] = [(name, methods[name], seed) for name, of in seeds.items() for seed in of]
    alone = replace(run, kept=None).alone
    return [(task[0], found) for task, found in zip(tasks, run_jobs(alone, tasks, jobs, "run"), strict=True)]


def _pair_up(runs: Mapping[str, _Scored]) -> None:
    """Add the differences of held-out densities from those of the best method."""
    densities = {n: s.density for n, s in runs.items() if s.density is not None}
    for name, scores in paired_differences(densities).items() if len(densities) > 1 else ():
        runs[name].row |= scores


def _table(methods: Mapping[str, Method], runs: Mapping[str, list[_Scored]], of: Any) -> pd.DataFrame:
    """One line per method: what ``of`` makes of each column's values over seeds."""
    lines = {}
    for name in methods:
        rows = [scored.row for scored in runs.get(name, [])]
        known = {c: [v for v in (r.get(c, math.nan) for r in rows) if not math.isnan(v)] for c in COLUMNS}
        lines[name] = {c: float(of(v)) for c, v in known.items() if v}
    table = pd.DataFrame.from_dict(lines, orient="index", columns=list(COLUMNS)).astype(float)
    return table.rename_axis("method")


def _standard_error(values: list[float]) -> float:
    with np.errstate(invalid="ignore"):  # some values are infinite
        return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else math.nan


def _moments(truth: Any, build: Callable[[], Any], data: Any) -> tuple[Moments, float | None]:
    """True moments, and for those of a Result the largest error of a mean, in its standard deviations."""
    try:
        known = truth(build(), data) if callable(truth) else truth or {}
        if isinstance(known, Result):
            return {n: (v.double().mean(0), draws_sd(v)) for n, v in known.draws.items()}, mean_error(known)
        return {n: (mean.cpu(), sd.cpu()) for n, (mean, sd) in known.items()}, None
    except ArithmeticError as error:
        warnings.warn(f"truth left out: {error}", stacklevel=4)
        return {}, None
