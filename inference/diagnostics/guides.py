r"""What importance weights say of a guide: Pareto k, effective fraction, and moments after weighting.

The weights of draws :math:`z_s \sim q` are :math:`w_s = p(x, z_s) / q(z_s)`. Their effective fraction

.. math:: \frac{(\sum_s w_s)^2}{S \sum_s w_s^2} \to \frac{\mathrm{E}_q[w]^2}{\mathrm{E}_q[w^2]}

is 1 for the exact posterior. A normal guide with r times the standard deviations of a normal posterior of D dimensions
has :math:`(\sqrt{2 r^2 - 1} / r^2)^D`.

Where all latent sites lie in the plate of rows, the posterior is a product over rows, and so is the guide. The joint
weight of many rows is then useless, however good the guide is: its logarithm is a sum over rows. Each row is judged by
its own weights instead.

References: Yao et al. 2018, "Yes, but did it work?" (https://arxiv.org/abs/1802.02538); Vehtari et al. 2024, "Pareto
smoothed importance sampling" (https://arxiv.org/abs/1507.02646); Zhang and Stephens 2009, "A new and efficient
estimation method for the generalized Pareto distribution" (https://doi.org/10.1198/tech.2009.08017).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from inference.compiler import policy
from inference.core.bound import BoundPair
from inference.core.handlers import REFUSALS, preserved_rng
from inference.core.lazy import pd, special
from inference.draws import scoring
from inference.draws.engine import sample_names
from inference.draws.rows import LocalLatents, is_point, probe

JUDGED = 100_000_000
"""Numbers of data times draws that the judgement of a guide may read at the end of a fit."""


MIN_DRAWS = 25
"""Draws below which the tail of the weights cannot be fitted."""


MIN_TAIL = 5
"""Weights in the tail below which its shape cannot be fitted."""


PARETO_K = (0.5, 0.7)
"""Pareto k up to which a guide is good, and up to which it is usable with importance weighting (Yao et al. 2018)."""


WIDTH = 1.3
"""Ratio of a guide's standard deviation to that after weighting from which it is reported, in either direction: a
normal interval of 90 % then holds 97 % (too wide) or 79 % (too narrow)."""


SHIFT = 0.5
"""Distance of a guide's mean from that after weighting from which it is reported, in standard deviations of the guide.
"""


EFFECTIVE = 0.5
"""Effective fraction below which it is reported in few dimensions. By Cauchy and Schwarz no posterior mean is off by
more than sqrt(1 / fraction - 1) standard deviations of the guide: one, at a half. The weights of many small errors
multiply, so in D dimensions the fraction may be as low as that of a normal guide ``WIDTH`` times too wide in each."""


FALSE_ALARMS = 1e-3
"""Probability of a report by chance, over all quantities: it sets by how many standard errors a limit is exceeded."""


ROWS, ROW_DRAWS = 100, 1000
"""Rows that are judged one by one, drawn at random, and draws of the guide for each."""


ROW_QUANTILE = 0.9
"""Pareto k of a guide of rows is this quantile over rows: a guide may fail for one row in ten."""


@dataclass(frozen=True)
class GuideCheck:
    """Judgement of a guide.

    Attributes:
        pareto_k: Pareto k of the weights; the 90 % quantile over rows where rows are judged one by one; None: not
            judged.
        effective: Effective fraction of the weights, in (0, 1]; the median over rows; None: not judged.
        size: Number of continuous quantities that the weights compare: of all latent sites, or of those of one row.
        log_weights: Log weights of the first draws, (S,); None where rows are judged one by one.
        rows: Number of rows judged; 0 where all latent sites are judged together.
        failing: Number of these rows with Pareto k above 0.7, or weights that are not finite.
        point: Whether the guide is a point mass at its continuous sites; None: not asked, as their draws differ.
        faults: Sentences on sites that guide and model do not share.
        unjudged: What could not be judged, each with the reason.
    """

    pareto_k: float | None = None
    effective: float | None = None
    size: int = 0
    log_weights: np.ndarray | None = None
    rows: int = 0
    failing: int = 0
    point: bool | None = None
    faults: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()


def pareto_k(log_weights: Tensor) -> float:
    r"""Pareto k of importance weights (Yao et al. 2018, "Yes, but did it work?").

    The shape of a generalised Pareto distribution fitted to the largest
    :math:`\lceil \min(S / 5, 3 \sqrt S) \rceil` weights (Vehtari et al. 2024).

    Args:
        log_weights: Log density of the model minus that of the guide, per draw (S,), with S at least 25.
            ``psislw`` of ArviZ takes their negative, the log likelihood of an observation that is left out.

    Returns:
        k. Below 0.5 the guide is good; below 0.7 it is usable with importance weighting; above 0.7 it is unreliable.
        -inf if all weights are equal (the guide is the posterior), inf if fewer than five weights lie above the
        threshold of the tail, nan if some are not finite.

    Raises:
        ValueError: There are fewer than 25 draws.
    """
    if not isinstance(log_weights, Tensor) or log_weights.dim() != 1:
        got = tuple(log_weights.shape) if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise ValueError(f"log_weights: expected a tensor (draws,), got {got}")
    weights = log_weights.detach().double().cpu().numpy()
    if len(weights) < MIN_DRAWS:
        raise ValueError(f"log_weights: expected at least {MIN_DRAWS} draws, got {len(weights)}")
    if not np.isfinite(weights).all():
        return float("nan")
    if np.ptp(weights) < 1e-6 * max(1.0, abs(weights).max()):
        return float("-inf")
    ordered = np.exp(np.sort(weights - weights.max()))
    count = math.ceil(min(len(ordered) / 5, 3 * len(ordered) ** 0.5))
    # Weights that underflow beside the largest are not part of the tail.
    cutoff = max(ordered[-count - 1], np.finfo(float).tiny)
    tail = ordered[ordered > cutoff] - cutoff
    return _pareto_shape(tail) if len(tail) >= MIN_TAIL else float("inf")


def _pareto_shape(x: np.ndarray) -> float:
    r"""Shape k of a generalised Pareto distribution from ascending values x (n,) above its threshold.

    The posterior mean of Zhang and Stephens (2009) over a grid of :math:`b = -k / \sigma`, then shrunk towards 1/2 with
    the weight of ten observations (Vehtari et al. 2024).
    """
    n, points = len(x), 30 + int(len(x) ** 0.5)
    with np.errstate(all="ignore"):
        b = 1 / x[-1] + (1 - np.sqrt(points / (np.arange(points) + 0.5))) / (3 * x[int(n / 4 + 0.5) - 1])
        k = np.log1p(-b[:, None] * x).mean(1)
        weights = special.softmax(n * (np.log(-b / k) - k - 1))
        # Grid points of negligible weight are dropped, as ArviZ and the R package loo do.
        kept = weights >= 10 * np.finfo(float).eps
        mean = (weights * b)[kept].sum() / weights[kept].sum()
        shape = np.log1p(-mean * x).mean()
    return float((n * shape + 5) / (n + 10))


def effective_fraction(log_weights: Tensor) -> Tensor:
    r"""Effective fraction :math:`(\sum w)^2 / (S \sum w^2)` of weights along the first dimension; nan if not finite.

    Example:
        >>> f"{effective_fraction(torch.tensor([0.0, 0.0, -50.0, -50.0])):.2f}"
        '0.50'
    """
    weights = log_weights.detach().double()
    return (2 * weights.logsumexp(0) - (2 * weights).logsumexp(0)).exp() / len(weights)


@torch.no_grad()
def judge_guide(bound: BoundPair, draws: dict[str, Tensor], density: Tensor) -> GuideCheck:
    r"""Judge the guide of a pair, with the parameters that are in the store.

    Args:
        bound: The pair and its data.
        draws: Draws (S, \*shape) of the guide.
        density: Their log density under the guide, (S,).
    """
    with preserved_rng(), pyro.validation_enabled(False):
        real = {n: v for n, v in draws.items() if v.is_floating_point()}
        point = _is_point(bound) if real and _equal(real) else None
        if _equal(draws) and (point is not False or len(density) > 1):
            return GuideCheck(point=point)
        outside = scoring.outside_supports(bound, draws)
        if outside:
            faults = tuple(map(_outside, outside, outside.values()))
            return GuideCheck(point=point, faults=faults, unjudged=("Pareto k: see above",))
        rows = _local(bound)
        check = _judge_rows(bound, rows) if rows is not None else _judge_jointly(bound, draws, density)
        return replace(check, point=point)


def _equal(draws: dict[str, Tensor]) -> bool:
    return not any((v != v[:1]).any() for v in draws.values())


def _is_point(bound: BoundPair) -> bool:
    """Whether the guide is a point mass at its continuous sites, not one whose draws are equal by rounding."""
    with poutine.block():
        trace: Any = poutine.trace(bound.guide).get_trace(**bound.arguments())
    fns = [trace.nodes[n]["fn"] for n in sample_names(trace)]
    return all(is_point(fn) or fn.support.is_discrete for fn in fns)


def _outside(name: str, fraction: float) -> str:
    return (
        f"{100 * fraction:.2g} % of the guide's draws of {name} have density zero: its support moves with other sites, "
        "and the guide keeps that of one draw; use sample(), or write the site by one of fixed support "
        "(x = a * u in place of x ~ Uniform(0, a))."
    )


def _judge_jointly(bound: BoundPair, draws: dict[str, Tensor], density: Tensor) -> GuideCheck:
    if len(density) < MIN_DRAWS:
        return GuideCheck(unjudged=(f"Pareto k: {len(density)} draws, of at least {MIN_DRAWS} that it takes",))
    affordable = min(len(density), JUDGED // max(bound.numel, 1))
    if affordable < MIN_DRAWS:
        how = "ask pareto_k(log_weights(result, draws=100))"
        return GuideCheck(unjudged=(f"Pareto k: the data are long ({bound.numel:,} numbers); {how}",))
    judged = {n: v[:affordable] for n, v in draws.items()}
    weights = (scoring.log_joint(bound, judged) - density[:affordable]).double().cpu()
    size = sum(v[0].numel() for v in draws.values() if v.is_floating_point())
    return GuideCheck(pareto_k(weights), float(effective_fraction(weights)), size, weights.numpy())


def _local(bound: BoundPair) -> LocalLatents | None:
    """The latent sites as those of rows; None where not all of them lie in the plate of rows."""
    if not bound.rows or not all(any(s.plates) for s in bound.select("latent").values()):
        return None
    with warnings.catch_warnings():
        # That draws run one by one is said where it takes long.
        warnings.filterwarnings("ignore", message=".* cannot be mapped over draws")
        try:
            return probe(bound, True)
        except REFUSALS:
            return None


def _judge_rows(bound: BoundPair, rows: LocalLatents) -> GuideCheck:
    chosen = torch.randperm(bound.rows)[:ROWS].sort().values
    part = rows.take(chosen.to(bound.device)) if rows.splits else rows
    count = min(ROW_DRAWS, JUDGED // (rows.width * part.bound.rows))
    if count < MIN_DRAWS:
        return GuideCheck(unjudged=(f"Pareto k: the data are long ({bound.numel:,} numbers)",))
    step = policy.latents_per_pass(rows.width * part.bound.rows)
    weights = torch.cat([_row_weights(part, min(step, count - done)) for done in range(0, count, step)])
    weights = weights if rows.splits else weights[:, chosen]
    k = np.array([pareto_k(w) for w in weights.mT])
    sites = [bound.sites[n] for n in rows.drawn if not bound.sites[n].discrete]
    size = sum(torch.Size(s.shape).numel() for s in sites) // max(bound.rows, 1)
    # A row whose weights are not finite is one where the guide fails.
    worse = np.nan_to_num(k, nan=np.inf, neginf=-np.inf)
    tail = float("nan") if np.isnan(k).all() else _quantile(worse)
    middle, failing = float(effective_fraction(weights).nanmedian()), int((worse > PARETO_K[1]).sum())
    return GuideCheck(tail, middle, size, rows=len(k), failing=failing)


def _row_weights(part: LocalLatents, count: int) -> Tensor:
    draws, density = part.guide({}, count)
    return part.model(draws, count)[0].double() - density.double()


def _quantile(k: np.ndarray) -> float:
    """The smallest k that the stated fraction of rows does not exceed."""
    return float(np.sort(k)[int(np.ceil(ROW_QUANTILE * len(k))) - 1])


def weigh(draws: np.ndarray, log_weights: np.ndarray) -> pd.DataFrame:
    r"""Moments of quantities after importance weighting, beside those before.

    Args:
        draws: Draws (S, quantities).
        log_weights: Their log weights, (S,).

    Returns:
        A line per quantity: ``mean`` and ``sd`` after weighting; ``shift``, the raw mean minus the weighted one in raw
        standard deviations; ``width``, the logarithm of the raw standard deviation over the weighted one; and the
        standard errors ``shift_error`` and ``width_error``, by the delta method over draws. Of a quantity that is the
        same in all draws these are nan.
    """
    x, count = draws.astype(float), len(draws)
    relative = np.exp(log_weights - log_weights.max())
    weights = (relative / relative.mean())[:, None]
    centred, after = x - x.mean(0), x - (weights * x).mean(0)
    raw, weighted = (centred**2).mean(0), (weights * after**2).mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = np.sqrt(raw)
        width = 0.5 * (np.log(raw) - np.log(weighted))
        of_width = 0.5 * (centred**2 / raw - weights * after**2 / weighted)
        of_shift = (centred - weights * after) / sd
        shift = (x.mean(0) - (weights * x).mean(0)) / sd
        errors = {"shift_error": of_shift.std(0) / count**0.5, "width_error": of_width.std(0) / count**0.5}
    mean = (weights * x).mean(0)
    return pd.DataFrame({"mean": mean, "sd": np.sqrt(weighted), "shift": shift, "width": width, **errors})


def advise_guide(check: GuideCheck, weighted: pd.DataFrame | None) -> tuple[str, ...]:
    """One sentence on a guide that the weights show to be wrong.

    Args:
        check: Its judgement.
        weighted: Moments after weighting, as :func:`weigh` returns them, by quantity.
    """
    good, usable = PARETO_K
    k = check.pareto_k
    if k is None:
        return check.faults
    if np.isnan(k):
        return ("Pareto k could not be computed: the log density is not finite at some draws of the guide.",)
    if k > usable and check.rows:
        return (
            f"Pareto k of the guide is above {usable} for {check.failing} of {check.rows} rows: its posterior of these "
            "is unreliable; train longer, use a richer guide (a larger encoder, a flow), or fit with IWAE.",
        )
    if k > usable:
        return (
            f"Pareto k of the guide is {k:.2f}, above {usable}: its posterior is unreliable; "
            "use sample(), or a richer guide (AutoMultivariateNormal, a flow).",
        )
    if k > good and not check.rows:
        return (
            f"Pareto k of the guide is {k:.2f}, above {good}: usable for means after importance weighting; "
            "train longer, or use a richer guide for variances and tails.",
        )
    return _advise_fraction(check, weighted)


def _advise_fraction(check: GuideCheck, weighted: pd.DataFrame | None) -> tuple[str, ...]:
    problems = [] if weighted is None else _misfits(weighted)
    least = min(EFFECTIVE, (math.sqrt(2 * WIDTH**2 - 1) / WIDTH**2) ** check.size)
    low = check.effective is not None and check.effective < least
    if not problems and not low:
        return ()
    of_rows = " for half of the rows or fewer" if check.rows else ""
    share = (
        f"{100 * (check.effective or 0):.2g} % of the guide's draws are effective by their importance weights{of_rows}"
    )
    remedy = "train longer, or use a richer guide" + ("" if check.rows else "; log_weights(result) corrects its means")
    return (f"{'; '.join([share, *problems])}: {remedy}.",)


def _misfits(weighted: pd.DataFrame) -> list[str]:
    """The quantities whose width and whose mean are off most, if by more than chance."""
    errors = math.sqrt(2 * math.log(2 * max(len(weighted), 1) / FALSE_ALARMS))
    widths = weighted["width"].abs() - errors * weighted["width_error"]
    shifts = weighted["shift"].abs() - errors * weighted["shift_error"]
    said = []
    if (widths > math.log(WIDTH)).any():
        worst = widths.idxmax()
        ratio = math.exp(weighted.loc[worst, "width"])
        said.append(f"the standard deviation of {worst} is {ratio:.2g} times that after weighting")
    if (shifts > SHIFT).any():
        worst = shifts.idxmax()
        shift = abs(weighted.loc[worst, "shift"])
        said.append(f"the mean of {worst} is {shift:.2g} standard deviations off that after weighting")
    return said
