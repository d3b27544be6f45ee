r"""Judgement of a guide by its importance weights (:mod:`inference.diagnostics.weights`).

Where all latent sites lie in the plate of rows, the posterior is a product over rows, and so is the guide. The joint
weight of many rows is then useless, however good the guide is: its logarithm is a sum over rows. Each row is judged by
its own weights instead. Where further sites lie outside of the plate, rows are judged given draws of these, which then
are not judged: their weights are the joint ones.
"""

from __future__ import annotations

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
from inference.core.lazy import pd
from inference.core.minibatch import some_rows
from inference.diagnostics.weights import MIN_DRAWS, effective_fraction, pareto_k, weigh_rows
from inference.draws import scoring
from inference.draws.engine import sample_names
from inference.draws.rows import LocalLatents, is_point, probe

JUDGED = 100_000_000
"""Numbers of data times draws that the judgement of a guide may read at the end of a fit."""


PARETO_K = (0.5, 0.7)
"""Pareto k up to which a guide is good, and up to which it is usable with importance weighting (Yao et al. 2018)."""


ROWS, ROW_DRAWS = 100, 1000
"""Rows that are judged one by one, drawn at random, and draws of the guide for each."""


OUTER_DRAWS = 4
"""Draws of the sites outside of the plate of rows that rows are judged given, a quarter of the rows each."""


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
        moments: Misfit of each quantity of a row, over rows, as :func:`weigh_rows` returns it; None where all latent
            sites are judged together.
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
    moments: pd.DataFrame | None = None
    rows: int = 0
    failing: int = 0
    point: bool | None = None
    faults: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()


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
        if rows is not None:
            return replace(_judge_rows(bound, [rows])[0], point=point)
        return replace(_judge_parts(bound, draws, _judge_jointly(bound, draws, density)), point=point)


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
        "and the guide keeps that of one draw, or it is that of a transformed distribution, which torch takes for the "
        "real line; use sample(), or write the site by one of fixed support (x = a * u in place of x ~ Uniform(0, a), "
        "x = a + u in place of a shifted distribution)."
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


def _judge_parts(bound: BoundPair, draws: dict[str, Tensor], joint: GuideCheck) -> GuideCheck:
    """The joint judgement, or that of rows given the other sites where joint weights of so many rows say nothing."""
    k, count = joint.pareto_k, len(next(iter(draws.values())))
    outer = _outside_rows(bound)
    if not outer or not bound.rows or (k is not None and not k > PARETO_K[1]):
        return joint
    given = ({n: draws[n][s].to(bound.device) for n in outer if n in draws} for s in range(min(OUTER_DRAWS, count)))
    parts = [_local(_fixed(bound, values)) for values in given]
    groups = [part for part in parts if part is not None]
    if len(groups) < len(parts):
        return joint
    check, share = _judge_rows(bound, groups)
    # The effective fraction of the joint weights, were all other sites exact, is the product of those of the rows.
    speaks = share * count >= MIN_DRAWS or (bound.rows <= ROWS and not usable(check))
    if check.pareto_k is None or (k is not None and speaks):
        return joint
    why = f"Pareto k of {', '.join(outer)}: joint weights of {bound.rows:,} rows say nothing of sites outside of them"
    return replace(check, unjudged=(why,))


def usable(check: GuideCheck) -> bool:
    """Whether the weights of a guide can be relied on."""
    return check.pareto_k is not None and check.pareto_k <= PARETO_K[1]


def _outside_rows(bound: BoundPair) -> list[str]:
    """Latent sites outside of the plate of rows; empty where none is inside."""
    latent, observed = bound.select("latent"), bound.select("observed").values()
    plates = {p for s in observed for p, size in zip(s.plates, s.shape, strict=False) if p and size == bound.rows}
    outer = [n for n, s in latent.items() if not plates & set(s.plates)]
    return outer if len(outer) < len(latent) else []


def _fixed(bound: BoundPair, values: dict[str, Tensor]) -> BoundPair:
    """The pair given values of the sites outside of the plate of rows, without their density."""
    size = bound.rows

    def outside(site: Any) -> bool:
        frames = site["cond_indep_stack"] if site["type"] == "sample" else ()
        return site["type"] == "sample" and not any(size in (f.size, f.full_size) for f in frames)

    # What else an autoguide draws for these sites is no part of the guide of the rows either.
    model = poutine.block(poutine.condition(bound.model, data=values), hide=list(values))
    guide = poutine.block(poutine.condition(bound.guide, data=values), hide_fn=outside)  # type: ignore[arg-type]
    return replace(bound, model=model, guide=guide, memo={})


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


def _judge_rows(bound: BoundPair, groups: list[LocalLatents]) -> tuple[GuideCheck, float]:
    """Judgement of rows, and the product of the effective fractions of all of them.

    Args:
        bound: The pair and its data.
        groups: The latent sites of rows, given each of some draws of all others. Each judges as many rows.
    """
    found = [_weights_of_rows(bound, rows, -(-ROWS // len(groups))) for rows in groups]
    draws, weights = (torch.cat(v, 1) for v in zip(*found, strict=True))
    if len(weights) < MIN_DRAWS:
        return GuideCheck(unjudged=(f"Pareto k: the data are long ({bound.numel:,} numbers)",)), 0.0
    k = np.array([pareto_k(w) for w in weights.mT])
    rows, sites = groups[0], groups[0].bound.sites
    real = [sites[n] for n in rows.drawn if not sites[n].discrete]
    size = sum(torch.Size(s.shape).numel() for s in real) // max(rows.bound.rows, 1)
    # A row whose weights are not finite is one where the guide fails.
    worse = np.nan_to_num(k, nan=np.inf, neginf=-np.inf)
    tail = float("nan") if np.isnan(k).all() else _quantile(worse)
    effective, failing = effective_fraction(weights), int((worse > PARETO_K[1]).sum())
    passing = worse <= PARETO_K[1]
    moments = None
    if passing.any() and draws.shape[-1]:
        moments = weigh_rows(draws.cpu().numpy()[:, passing], weights.cpu().numpy()[:, passing])
        moments.index = pd.Index(_row_names(rows), name="quantity")
    share = float((effective.nan_to_num(0.0).log().mean() * bound.rows).exp())
    check = GuideCheck(tail, float(effective.nanmedian()), size, moments=moments, rows=len(k), failing=failing)
    return check, share


def _weights_of_rows(bound: BoundPair, rows: LocalLatents, number: int) -> tuple[Tensor, Tensor]:
    """Draws (S, rows, D) of a number of rows at most, and log weights (S, rows); no draws where the data are long."""
    chosen = some_rows(bound.rows, number).sort().values
    part = rows.take(chosen.to(bound.device)) if rows.splits else rows
    count = min(ROW_DRAWS, JUDGED // (rows.width * part.bound.rows))
    if count < MIN_DRAWS:
        return torch.zeros(0, 0, 0), torch.zeros(0, 0)
    step = policy.latents_per_pass(rows.width * part.bound.rows)
    found = [_row_weights(part, min(step, count - done)) for done in range(0, count, step)]
    draws, weights = (torch.cat(v) for v in zip(*found, strict=True))
    return (draws, weights) if rows.splits else (draws[:, chosen], weights[:, chosen])


def _row_weights(part: LocalLatents, count: int) -> tuple[Tensor, Tensor]:
    """Draws (S, rows, D) of the continuous sites and log weights (S, rows)."""
    draws, density = part.guide({}, count)
    weights = part.model(draws, count)[0].double() - density.double()
    real = [n for n in part.drawn if n in draws and not part.bound.sites[n].discrete]
    moved = [draws[n].movedim(1 + part.axis(n), 1).reshape(*weights.shape, -1) for n in real]
    return torch.cat([*moved, weights.new_zeros(*weights.shape, 0)], -1), weights


def _row_names(rows: LocalLatents) -> list[str]:
    """Names of the continuous quantities of a row, in the order of the draws."""
    bound, named = rows.bound, list[str]()
    for name in (n for n in rows.drawn if n in bound.guided and not bound.sites[n].discrete):
        shape = list(bound.sites[name].shape)
        del shape[rows.axis(name)]
        named += [f"{name}{list(map(int, at)) if at else ''}" for at in np.ndindex(*shape)]
    return named


def _quantile(k: np.ndarray) -> float:
    """The smallest k that the stated fraction of rows does not exceed."""
    return float(np.sort(k)[int(np.ceil(ROW_QUANTILE * len(k))) - 1])
