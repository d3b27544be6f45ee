r"""Compare methods of inference on one pair."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from inference.comparison.scores import Moments, heldout_scores, truth_scores
from inference.comparison.table import COLUMNS, Comparison
from inference.core.handlers import exclusive, isolated
from inference.diagnostics.convergence import R_HAT
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
) -> Comparison:
    r"""Run several methods of inference on one pair and compare their results.

    Args:
        make_pair: Builds a new pair; called once per method, always from the same random state.
        data: Data of the fit: a tensor or a mapping of names to tensors.
        methods: Callables ``(pair, data) -> Result`` by name, for instance ``partial(fit, ...)``.
        truth: True posterior mean and standard deviation by site, each of the site's shape, or a callable
            ``(pair, data)`` that returns them (if it raises ArithmeticError, the truth is left out with a warning).
        heldout: Held-out rows, in the form of ``data``.
        label: Name of the labels in ``heldout``, for accuracy and calibration. Default: the one finite site of the
            model, if there is one.
        seed: Seed from which each pair is built.

    Returns:
        A Comparison. A method that fails has an empty row in the table, and a warning gives the reason.

    Raises:
        ValueError: There are no methods.
        RuntimeError: Every method failed (a single method raises its own error).
    """
    if not methods:
        raise ValueError("methods: expected at least one, got none")

    def build() -> Any:
        with isolated(seed):
            return make_pair()

    moments = _moments(truth, build, data)
    results, rows = {}, {}
    for name, method in methods.items():
        try:
            results[name] = method(build(), data)
            rows[name] = _score(results[name], moments, heldout, label)
        except Exception as error:
            if len(methods) == 1:
                raise
            rows[name] = {}
            warnings.warn(f"{name} failed: {error}", stacklevel=3)
    if not results:
        raise RuntimeError(f"every method failed: {', '.join(methods)}")
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).astype(float)
    return Comparison(table.rename_axis("method"), results, dict(moments))


def _moments(truth: Moments | Callable[[Any, Any], Moments] | None, build: Callable[[], Any], data: Any) -> Moments:
    try:
        return dict(truth(build(), data) if callable(truth) else truth or {})
    except ArithmeticError as error:
        warnings.warn(f"truth left out: {error}", stacklevel=4)
        return {}


def _score(result: Result, truth: Moments, heldout: Any, label: str | None) -> dict[str, float]:
    run = result.seconds["run"]
    diagnosis = result.diagnosis
    ess, r_hat = diagnosis.min_ess_bulk, diagnosis.worst_r_hat
    row = {
        "ess": ess,
        "ess_per_s": ess / run if r_hat <= R_HAT else math.nan,
        "r_hat": r_hat,
        "divergences": _number(diagnosis.divergences),
        "pareto_k": _number(diagnosis.pareto_k),
        "seconds": run,
        "seconds_total": run + result.seconds["setup"],
    }
    return row | truth_scores(result, truth) | heldout_scores(result, heldout, label)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
