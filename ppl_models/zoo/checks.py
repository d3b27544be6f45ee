r"""Checks of an entry against figures from outside: exact posteriors, brute force, plain Pyro, simulated data.

Each check computes one figure in two ways that share no code but the pair, on few rows and with the entry's small
networks, and says whether they agree up to the Monte Carlo error of both. ``LIMIT`` standard errors are allowed, so
that a right entry fails by chance about once in a million checks.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from scipy.stats import t as student
from torch import Tensor

from inference import (
    Method,
    Result,
    calibrate,
    compare,
    fit,
    isolated,
    log_evidence,
    pointwise_log_likelihood,
    sample,
)
from inference.objectives import IWAE, VIMCO, BetaELBO
from ppl_models.data.sets import Dataset
from ppl_models.models.linear_factors import PPCA, FactorAnalysis
from ppl_models.models.pair import Pair
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import exact, settings

LIMIT = 5.0
"""Standard errors by which two figures may differ."""


ROWS, FULL_ROWS = 40, 200
"""Rows of the data set, in the quick size and in full."""


CALIBRATED = 40
"""Rows of a simulated data set."""


STATES = 4096
"""States, or points of a grid, that latent sites of a row are summed over at most."""


REACH, STEP, FINE = 6.0, 0.3, 0.1
"""Reach and step of the grid over a standard normal latent, and the step where there is one. For a normal posterior of
standard deviation s the sum is off by exp(-2 (pi s / step)^2): 1e-8 from s = 0.1 at the fine step, 0.3 at the other."""


ALARMS = 1e-5
"""Probability that exact posteriors fail the check of calibration."""


TELLING = 0.5
"""Difference in nats per row up to which the check of log p(x) may allow for its own error: one that allows more, as at
a guide far from the posterior, would not see a density that is off by a factor of two."""


CHAINS: Mapping[str, Any] = {"chains": 64, "draws": 150, "warmup": 200}
"""Size of chains in the quick size."""


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        name: What was checked.
        passed: Whether the figures agree; None: it could not be checked.
        figure: The figures, or why there are none.
        word: The verdict where it is none of ``ok``, ``FAILED`` and ``not checked``.
    """

    name: str
    passed: bool | None
    figure: str
    word: str = ""

    @property
    def verdict(self) -> str:
        """``ok``, ``FAILED`` or ``not checked``, or another word."""
        return self.word or {True: "ok", False: "FAILED", None: "not checked"}[self.passed]


def verify(entry: Entry, method: str | None = None, *, quick: bool = False, seed: int = 0) -> Iterator[Check]:
    """Run the checks that an entry has.

    Args:
        entry: An entry of the zoo.
        method: Check this method alone. Default: in the quick size the first method and the first chains, else all.
        quick: Whether to take few rows, short chains and few simulations.
        seed: Seed of all randomness.
    """
    whole, rows = entry.load(), ROWS if quick else FULL_ROWS
    train, test = ({k: v[:rows] for k, v in split.items()} for split in (whole.train, whole.test))
    dataset = replace(whole, train=train, test=test)
    for name in _methods(entry, method, quick):
        yield from _of_method(entry, dataset, name, quick, seed)
    if method is None:
        yield _guarded("log p(x)", partial(check_evidence, entry, dataset, seed))


def _methods(entry: Entry, method: str | None, quick: bool) -> list[str]:
    if method is not None or not quick:
        return [method] if method is not None else list(entry.methods)
    chains = [n for n in entry.methods if n not in entry.fits][:1] if entry.truth is not None else []
    return [next(iter(entry.methods)), *chains]


def _of_method(entry: Entry, dataset: Dataset, name: str, quick: bool, seed: int) -> Iterator[Check]:
    method = entry.methods[name]
    if entry.truth is not None:
        yield _guarded(f"posterior, {name}", partial(check_posterior, entry, dataset, name, method, quick, seed))
    objective = _objective(method)
    if objective is not None:
        yield _guarded(f"bound, {name}", partial(check_bound, entry, dataset, objective, seed))
    if _draws_exactly(entry, method):
        count = 60 if quick else 300
        yield _guarded(f"calibration, {name}", partial(check_calibration, entry, dataset, name, method, count, seed))


def _guarded(name: str, run: Callable[[], tuple[bool | None, str]]) -> Check:
    """The outcome of a check; what raises an error has failed, and what does not apply says so."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            passed, figure = run()
            return Check(name, passed if passed is None else bool(passed), figure)
    except _Inapplicable as error:
        return Check(name, None, str(error))
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")


class _Inapplicable(Exception):
    """There is no figure to check against."""


def _pair(entry: Entry, dataset: Dataset, seed: int, **overrides: Any) -> Pair:
    with isolated(seed):
        return entry.pair(dataset, **{**entry.small, **overrides})


def _is(method: Method, function: Any) -> bool:
    return getattr(method, "func", method) is function


# The posterior


def check_posterior(
    entry: Entry, dataset: Dataset, name: str, method: Method, quick: bool, seed: int
) -> tuple[bool | None, str]:
    """Means and standard deviations of a method against the exact posterior."""
    if not (_is(method, exact) or _is(method, sample)):
        raise _Inapplicable("approximate: `compare` shows its errors")
    chains = CHAINS if quick and _is(method, sample) else {}
    known: dict[str, Any] = {n: v for n, v in {**chains, "seed": seed, "progress": False}.items()}
    settled = partial(method, **{n: v for n, v in known.items() if n in settings(method)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = compare(lambda: _pair(entry, dataset, seed), dataset.train, {name: settled}, truth=entry.truth)
    lost = [str(w.message) for w in said if str(w.message).startswith("truth left out")]
    if lost:
        raise _Inapplicable(lost[0])
    result, row = found.results[name], found.table.loc[name]
    size = result.size if math.isnan(row["ess"]) else min(row["ess"], result.size)
    count = sum(v[0].numel() for v in result.draws.values())
    worst, limit = float(row["error_max"]), (LIMIT + math.sqrt(2 * math.log(2 * count))) / math.sqrt(size)
    ratio, narrow = float(row["sd_ratio"]), LIMIT / math.sqrt(size) / 2 + 0.03
    passed = worst < limit and abs(math.log(max(ratio, 1e-9))) < narrow
    figures = f"largest error of a mean {worst:.3f} sd (< {limit:.3f}), sd ratio {ratio:.3f} (1 ± {narrow:.3f})"
    if _is(method, exact) or "exact" not in entry.methods:
        return passed, figures
    conjugate: Any = _pair(entry, dataset, seed)
    reference = exact(conjugate, dataset.train, draws=4000, seed=seed + 1, progress=False)
    close, also = _same_likelihood(result, reference)
    return passed and close, f"{figures}, {also}"


def _same_likelihood(chains: Result, reference: Result) -> tuple[bool, str]:
    """The mean log likelihood of chains against that of exact draws: it sees small errors of many quantities at once.

    The standard error is that over chains, whose number is small: the limit is that of Student's t.
    """
    count = chains.groups["posterior"].sizes["chain"]
    one, other = (pointwise_log_likelihood(r).double().sum(1).numpy() for r in (chains, reference))
    means = one.reshape(count, -1).mean(1)
    error = math.hypot(means.std(ddof=1) / count**0.5, other.std() / len(other) ** 0.5)
    gap, limit = float(one.mean() - other.mean()), student.ppf(1 - ALARMS / 2, count - 1) * error
    return abs(gap) < limit, f"log likelihood off by {gap:.2f} (± {limit:.2f})"


# The calibration


def _draws_exactly(entry: Entry, method: Method) -> bool:
    """Whether a method draws from the posterior, so that its ranks are uniform: conjugate, or an exact guide."""
    return _is(method, exact) or (_exact_guide(entry) and _is(method, fit))


def _exact_guide(entry: Entry) -> bool:
    """Whether the guide of the pair is the posterior of each row, at any parameters."""
    return isinstance(entry.make, type) and issubclass(entry.make, FactorAnalysis | PPCA)


def check_calibration(
    entry: Entry, dataset: Dataset, name: str, method: Method, simulations: int, seed: int
) -> tuple[bool | None, str]:
    """Ranks of parameters in the posteriors of simulated data."""
    few = {k: v[:CALIBRATED] for k, v in dataset.train.items()}
    wanted: dict[str, Any] = {"simulations": simulations, "draws": 100, "alpha": ALARMS, "seed": seed}
    if _exact_guide(entry):
        fitted = method(_pair(entry, dataset, seed), few, steps=20, draws=30, seed=seed, progress=False)
        found = calibrate(fitted, **wanted)
    else:
        found = calibrate(lambda: _pair(entry, dataset, seed), few, method, **wanted)
    return found.passed, found.verdict


# The bound


def _objective(method: Method) -> Any:
    """The objective of a method if its loss is a bound that plain Pyro can tell; else None."""
    if not _is(method, fit):
        return None
    chosen = getattr(method, "keywords", {}).get("objective") or Trace_ELBO
    made = chosen() if callable(chosen) else chosen
    return made if isinstance(made, IWAE | VIMCO | Trace_ELBO) and not isinstance(made, BetaELBO) else None


def check_bound(entry: Entry, dataset: Dataset, objective: Any, seed: int, repeats: int = 200) -> tuple[bool, str]:
    r"""The loss of an objective against :math:`\sum_n \log \frac{1}{K} \sum_k w_{nk}` of weights by plain Pyro."""
    pair = _pair(entry, dataset, seed)
    count = objective.num_particles if isinstance(objective, IWAE | VIMCO) else 1
    with isolated(seed), torch.no_grad():
        weights = torch.stack([row_weights(pair, dataset.train) for _ in range(repeats * count)])
        bounds = (weights.reshape(repeats, count, -1).logsumexp(1) - math.log(count)).sum(1).numpy()
        losses = np.array([-objective.loss(pair.model, pair.guide, **dataset.train) for _ in range(repeats)])
    return _agree("bound", losses, bounds, "by plain Pyro")


def _agree(what: str, one: np.ndarray, other: np.ndarray, how: str) -> tuple[bool, str]:
    error = math.hypot(*(v.std(ddof=1) / len(v) ** 0.5 for v in (one, other)))
    gap = float(one.mean() - other.mean())
    passed = abs(gap) < LIMIT * error + 1e-5 * abs(float(other.mean()))
    return passed, f"{what} {one.mean():.2f}, {how} {other.mean():.2f} (difference {gap:.2g} ± {error:.2g})"


def row_weights(pair: Pair, data: Mapping[str, Tensor]) -> Tensor:
    """Log weights (rows,) of one draw of the guide: the log density of the model minus that of the guide."""
    drawn = poutine.trace(pair.guide).get_trace(**data)
    left = [n for n in _latent(poutine.trace(pair.model).get_trace(**data)) if n not in drawn.nodes]
    if left:
        raise _Inapplicable(f"the guide leaves {', '.join(left)} to be summed out")
    return _by_row(poutine.trace(poutine.replay(pair.model, trace=drawn)).get_trace(**data)) - _by_row(drawn)


def _by_row(trace: Any) -> Tensor:
    """Log density of a trace, row by row."""
    trace.compute_log_prob()
    total = torch.zeros(())
    for site in (n for n in trace.nodes.values() if n["type"] == "sample"):
        frames = [f for f in site["cond_indep_stack"] if f.name == "rows"]
        if type(site["fn"]).__name__ == "_Subsample":
            continue
        if not frames or site["log_prob"].dim() != 1:
            raise _Inapplicable("sites outside of the plate of rows")
        total = total + site["log_prob"].double()
    return total


# The evidence


def check_evidence(entry: Entry, dataset: Dataset, seed: int) -> tuple[bool, str]:
    """The importance estimate of log p(x), and the pair's own if it has one, against the sum over all latents."""
    small = {n: v for n, v in _few(entry).items() if n in inspect.signature(entry.make).parameters}
    pair = _pair(entry, dataset, seed, **small)
    data = {k: v[:10] for k, v in dataset.train.items()}
    with isolated(seed), torch.no_grad():
        summed = brute_force(pair, data)
        if any(_is_point(s["fn"]) for s in _latent(poutine.trace(pair.guide).get_trace(**data)).values()):
            raise _Inapplicable("the guide is a point, which has no weights")
    passed, own = _own_evidence(pair, data, summed)
    found = log_evidence(pair, data, k=4000, seed=seed, progress=False)
    gap = float((found.values - summed).mean())
    # The logarithm of a mean of weights lies below, by half its squared error.
    allowed = LIMIT * found.monte_carlo_error + float(found.errors.square().mean()) + 1e-5 * float(summed.abs().mean())
    said = f"importance {found.mean:.4f}, sum over latents {float(summed.mean()):.4f} (difference {gap:.2g}, "
    if passed and allowed > TELLING:
        raise _Inapplicable(f"{said}± {allowed:.2g}, of {TELLING} at most): the guide is too far from the posterior")
    return passed and abs(gap) < allowed, f"{said}{own}< {allowed:.2g})"


def _own_evidence(pair: Pair, data: Mapping[str, Tensor], summed: Tensor) -> tuple[bool, str]:
    """Whether the pair's own log p(x), if it has one, is the sum over latents, and how far it is off."""
    if not callable(getattr(pair, "log_evidence", None)):
        return True, ""
    own: Tensor = pair.log_evidence(**data).double()
    off = float((own - summed).abs().max())
    return off < 1e-4 * float(summed.abs().max()), f"its own {off:.1g}, "


def _few(entry: Entry) -> dict[str, Any]:
    """Overrides by which the latents of a row are few."""
    factors: Any = (1, 1) if entry.name.startswith("hierarchical") else 1
    return {"factors": factors}


def _latent(trace: Any) -> dict[str, Any]:
    """Nodes of the latent sites."""
    nodes = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    return {n: s for n, s in nodes.items() if type(s["fn"]).__name__ != "_Subsample"}


def _states(fn: Any) -> Tensor:
    """States of each unit of a finite site."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.enumerate_support(expand=False).flatten().double()


def _is_point(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def brute_force(pair: Pair, data: Mapping[str, Tensor]) -> Tensor:
    """Log evidence (rows,): the sum over all states of finite latents, and over a grid of continuous ones."""
    latent = _latent(poutine.trace(pair.model).get_trace(**data))
    if not latent:
        raise _Inapplicable("no latent sites")
    if any(n.endswith("_unobserved") for n in latent):
        raise _Inapplicable("sites that some rows observe")
    if any([f.name for f in s["cond_indep_stack"]] != ["rows"] for s in latent.values()):
        raise _Inapplicable("latent sites outside of the plate of rows")
    axes: list[tuple[str, Tensor]] = []
    volume = 0.0
    real = sum(s["value"][0].numel() for s in latent.values() if not s["fn"].support.is_discrete)
    step = FINE if real == 1 else STEP
    for name, site in latent.items():
        finite = site["fn"].support.is_discrete
        line = _states(site["fn"]) if finite else torch.arange(-REACH, REACH + step / 2, step)
        width = site["value"][0].numel()
        axes += [(name, line)] * width
        volume += 0.0 if finite else width * math.log(step)
    if math.prod(len(line) for _, line in axes) > STATES:
        raise _Inapplicable("too many latents to sum over")
    total = torch.full((len(next(iter(data.values()))),), -torch.inf, dtype=torch.double)
    for point in itertools.product(*(line.tolist() for _, line in axes)):
        values = {}
        for name, site in latent.items():
            own = torch.tensor([v for v, (n, _) in zip(point, axes, strict=True) if n == name])
            values[name] = own.reshape(site["value"][0].shape).expand(site["value"].shape).to(site["value"])
        with_latents = poutine.condition(pair.model, data=values)
        total = torch.logaddexp(total, _by_row(poutine.trace(with_latents).get_trace(**data)))
    return total + volume
