"""Advice on guides: what their importance weights, and their distance to the prior, say is wrong with them."""

from __future__ import annotations

import math

import numpy as np

from inference.core.lazy import pd
from inference.diagnostics.guides import PARETO_K, GuideCheck

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


COLLAPSED_KL = 0.01
"""KL divergence, in nats per row, below which a dimension of a latent site has collapsed to its prior."""


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
            "use sample(), or a richer guide (full covariances where it has none, a flow).",
        )
    if k > good and not check.rows:
        return (
            f"Pareto k of the guide is {k:.2f}, above {good}: usable for means after importance weighting; "
            "train longer, or use a richer guide for variances and tails.",
        )
    return _advise_fraction(check, check.moments if check.rows else weighted)


def _advise_fraction(check: GuideCheck, weighted: pd.DataFrame | None) -> tuple[str, ...]:
    problems = [] if weighted is None else _misfits(weighted)
    least = min(EFFECTIVE, (math.sqrt(2 * WIDTH**2 - 1) / WIDTH**2) ** check.size)
    low = check.effective is not None and check.effective < least
    if not problems and not low:
        return ()
    of_rows = " (median over rows)" if check.rows else ""
    share = (
        f"{100 * (check.effective or 0):.2g} % of the guide's draws are effective by their importance weights{of_rows}"
    )
    problems = [f"{p}, over all rows" for p in problems] if check.rows else problems
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


def advise_latents(table: pd.DataFrame) -> tuple[str, ...]:
    """One sentence per site with collapsed dimensions."""
    said = []
    for name, part in table.groupby(lambda n: n.partition("[")[0], sort=False):
        collapsed, count = int((part["kl"] < COLLAPSED_KL).sum()), len(part)
        remedy = "fit with BetaELBO(warmup=...) or BetaELBO(free_bits=...)"
        if collapsed == count:
            said.append(
                f"{name}: posterior collapse: the guide equals the prior for every row (KL below {COLLAPSED_KL} nats), "
                f"so the model does not use {name}; {remedy}, or use a weaker decoder"
            )
        elif collapsed:
            said.append(
                f"{name}: {collapsed} of {count} dimensions have collapsed to the prior (KL below {COLLAPSED_KL} nats "
                f"per row); use fewer dimensions, or {remedy} to use more of them"
            )
    return tuple(said)
