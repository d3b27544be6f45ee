r"""Compare methods of inference on one pair."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from inference.checkpoint import Checkpoint, CheckpointError, NoCheckpoint
from inference.comparison.scores import Densities, Moments, heldout_scores, paired_differences, truth_scores
from inference.comparison.table import COLUMNS, Comparison
from inference.core.bound import bind, move
from inference.core.checks import check_device
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import pd
from inference.result import Result

Method = Callable[..., Result]
"""A way to fit or sample, mostly ``partial(fit, ...)`` or ``partial(sample, ...)``. ``compare`` calls it with a pair
and its data; the zoo and the command line also pass settings of the verb, such as ``seed``."""


@exclusive
def compare(
    make_pair: Callable[[], Any],
    data: Any,
    methods: Mapping[str, Method],
    *,
    truth: Moments | Callable[[Any, Any], Moments] | None = None,
    heldout: Any = None,
    label: str | None = None,
    seed: int = 0,
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
            site that a method does not draw is named by a warning.
        heldout: Held-out rows, in the form of ``data``.
        label: Name of the labels in ``heldout``, for accuracy and calibration. Default: the one finite site of the
            model, if there is one.
        seed: Seed from which each pair is built.
        device: Where to run, such as "cuda": pairs and data are moved there before a method gets them. Default: where
            they are.
        checkpoint: A folder in which each method keeps its own checkpoint, if it takes an argument ``checkpoint`` or
            hands on what it does not name, as ``fit`` and ``sample`` do. Called again with the same arguments, methods
            that have ended are not run again, and the one that was under way goes on. Default: none.

    Returns:
        A Comparison. A method that fails has an empty row in the table, and a warning gives the reason.

    Raises:
        ValueError: There are no methods, ``truth`` or ``label`` names no site of the model, there are no held-out
            labels, or the checkpoint is of another run.
        RuntimeError: Every method failed (a single method raises its own error).
    """
    _check(make_pair, methods, truth)

    place, kept = check_device(device), Checkpoint.of(checkpoint)
    if kept is not None:
        _check_parts(methods, kept)
        # Pairs are built from the seed, which fits do not see.
        if kept.begin({"method": "compare", "seed": seed}) is None:
            kept.write({})

    def build() -> Any:
        with isolated(seed):
            pair = make_pair()
        if place is not None:
            move(pair, place)
        return pair

    if device is not None:
        data = bind(build(), data, device).data
    moments = _moments(truth, build, data)
    _check_names(build, data, moments, heldout, label)
    results, rows = {}, {}
    densities: dict[str, Densities] = {}
    for name, method in methods.items():
        try:
            further = {"checkpoint": kept.part(name)} if kept is not None and _takes_checkpoint(method) else {}
            try:
                results[name] = method(build(), data, **further)
            except NoCheckpoint as error:
                warnings.warn(f"{name} runs without a checkpoint: {error}", stacklevel=3)
                results[name] = method(build(), data)
            rows[name], density = _score(results[name], moments, heldout, label)
            densities |= {} if density is None else {name: density}
        except Exception as error:
            if len(methods) == 1 or isinstance(error, CheckpointError):
                raise
            rows[name] = {}
            warnings.warn(f"{name} failed: {error}", stacklevel=3)
    if not results:
        raise RuntimeError(f"every method failed: {', '.join(methods)}")
    for name, scores in paired_differences(densities).items() if len(densities) > 1 else ():
        rows[name] |= scores
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).astype(float)
    return Comparison(table.rename_axis("method"), results, dict(moments))


def _takes_checkpoint(method: Method) -> bool:
    parameters = inspect.signature(method).parameters
    return "checkpoint" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_parts(methods: Mapping[str, Method], kept: Checkpoint) -> None:
    """Raise a ValueError where two methods would have one folder."""
    folders: dict[Any, str] = {}
    for name in methods:
        other = folders.setdefault(kept.part(name).folder, name)
        if other != name:
            raise ValueError(f"methods: expected names that differ in their letters and digits, got {other}, {name}")


def _moments(truth: Moments | Callable[[Any, Any], Moments] | None, build: Callable[[], Any], data: Any) -> Moments:
    try:
        known = truth(build(), data) if callable(truth) else truth or {}
        return {n: (mean.cpu(), sd.cpu()) for n, (mean, sd) in known.items()}
    except ArithmeticError as error:
        warnings.warn(f"truth left out: {error}", stacklevel=4)
        return {}


def _check_names(build: Callable[[], Any], data: Any, truth: Moments, heldout: Any, label: str | None) -> None:
    """Raise a ValueError for names that the model does not have, before any method runs."""
    if not truth and label is None:
        return
    with isolated(0):
        sites = bind(build(), data).sites
    for name, moments in truth.items():
        if name not in sites:
            raise ValueError(f"truth: expected sites of the model ({', '.join(sites)}), got {name!r}")
        wrong = [tuple(v.shape) for v in moments if tuple(v.shape) != sites[name].shape]
        if wrong:
            raise ValueError(f"truth: expected mean and sd of {name} of shape {sites[name].shape}, got {wrong[0]}")
    if label is None:
        return
    finite = [n for n, s in sites.items() if s.finite]
    if label not in finite:
        raise ValueError(f"label: expected a finite site of the model ({', '.join(finite) or 'none'}), got {label!r}")
    if not isinstance(heldout, Mapping) or label not in heldout:
        got = ", ".join(heldout) if isinstance(heldout, Mapping) else "no names" if heldout is not None else "none"
        raise ValueError(f"label: expected held-out rows with {label!r}, got {got}")


def _score(
    result: Result, truth: Moments, heldout: Any, label: str | None
) -> tuple[dict[str, float], Densities | None]:
    run, total = result.seconds["run"], result.seconds["run"] + result.seconds["setup"]
    diagnosis = result.diagnosis
    ess, r_hat = diagnosis.min_ess_bulk, diagnosis.worst_r_hat
    row = {
        "ess": ess,
        "ess_per_s": ess / run if diagnosis.converged else math.nan,
        "ess_per_s_total": ess / total if diagnosis.converged else math.nan,
        "r_hat": r_hat,
        "divergences": _number(diagnosis.divergences),
        "pareto_k": _number(diagnosis.pareto_k),
        "seconds": run,
        "seconds_total": total,
    }
    scores, density = heldout_scores(result, heldout, label)
    return row | truth_scores(result, truth) | scores, density


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _check(make_pair: Any, methods: Any, truth: Any) -> None:
    if not callable(make_pair):
        raise TypeError(f"make_pair: expected a function that builds a pair, got {make_pair!r}")
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods: expected a mapping of names to functions (pair, data), got {methods!r}")
    if not methods:
        raise ValueError("methods: expected at least one, got none")
    for name, method in methods.items():
        if not isinstance(name, str) or not callable(method):
            raise TypeError(f"methods: expected a mapping of names to functions (pair, data), got {name!r}: {method!r}")
    if not (truth is None or callable(truth) or isinstance(truth, Mapping)):
        raise TypeError(f"truth: expected a mapping of sites to (mean, standard deviation), got {truth!r}")
    for site, moments in truth.items() if isinstance(truth, Mapping) else ():
        if not isinstance(moments, tuple | list) or len(moments) != 2:
            raise TypeError(f"truth: expected (mean, standard deviation) for {site}, got {type(moments).__name__}")
