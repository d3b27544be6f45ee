r"""What draws say: log densities, and the values of sites given them.

Finite sites without draws are summed out exactly,

.. math:: \log p(x_n \mid \theta_s) = \log \sum_y p(x_n, y \mid \theta_s).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from torch import Tensor

from inference.compiler.supports import is_image, limits_of, support_of
from inference.core.bound import BoundPair
from inference.core.sites import Site
from inference.draws.engine import Draws, Read, check_draws, contract, enumerated, run, sample_names, trace

JOINT_ROWS = 8192
"""Rows that are read at once for the log density of all."""


def rowwise(bound: BoundPair, draws: Draws, *, scaled: bool = False) -> Tensor:
    """:func:`pointwise_log_likelihood` of given draws, in the current parameter store.

    ``scaled`` keeps the factors of ``poutine.scale``: rows as they count in the density of all.
    """
    bound.check_in_memory("the log likelihood of each row")
    density = score(bound, draws, "scaled rows" if scaled else "rows")
    if density.dim() < 2:
        observed = ", ".join(bound.select("observed")) or "nothing"
        outside = [s.name for s in bound.select("latent").values() if s.name not in draws and not any(s.plates)]
        if outside and any(any(s.plates) for s in bound.select("observed").values()):
            raise ValueError(
                f"model: expected rows that are independent given the draws, got {observed}, whose rows share "
                f"{', '.join(outside)}, which is summed out; the group log_likelihood of idata draws it"
            )
        raise ValueError(f"model: expected observed sites in a plate of rows, got {observed} outside of one")
    return density.flatten(2).sum(-1) if density.dim() > 2 else density


def log_joint(bound: BoundPair, draws: Draws) -> Tensor:
    r"""Log density of draws (S, \*shape) and data, finite sites without draws summed out: (S,).

    Rows that are not in memory are read by blocks, each scaled up to all rows: their weighted mean is exact.

    Raises:
        ValueError: The rows are read by blocks, and a site has a value for each of them.
    """
    if bound.source is None:
        return score(bound, draws, "joint")
    local = sorted(_of_rows(bound, draws))
    if local:
        raise ValueError(
            f"data: expected all rows in memory where {local[0]} has a value for each, got rows to be read"
        )
    total = torch.zeros((), device=bound.device)
    for start in range(0, bound.rows, JOINT_ROWS):
        rows = torch.arange(start, min(start + JOINT_ROWS, bound.rows), device=bound.device)
        total = total + len(rows) / bound.rows * score(bound.minibatch(rows), draws, "joint")
    return total


def _of_rows(bound: BoundPair, draws: Draws) -> set[str]:
    """Sites with draws that lie in the plate of rows, of which a run sees a part."""
    nodes = trace(bound, bound.model, {n: v[0] for n, v in draws.items()}).nodes
    parts = {n: [f for f in nodes[n]["cond_indep_stack"] if f.vectorized and f.size != f.full_size] for n in draws}
    return {n for n, frames in parts.items() if frames}


def log_likelihood_by_site(bound: BoundPair, draws: Draws) -> dict[str, Tensor]:
    r"""Log likelihood (S, \*plates) of each observed site; of all in one where a site is summed out.

    That of a finite site of a group sums over it, and has one number per group. All rows depend on one another through
    one that shares no plate with them: it is drawn from its posterior, so that each row has a likelihood given it.
    What weighs the rows (``poutine.scale``) is left out, as in ``log_evidence``.
    """
    observed, free = bound.select("observed"), [s for s in bound.select("latent").values() if s.name not in draws]
    inside, _ = summed_within(bound, draws)
    if outside := [s.name for s in free if s.name not in inside]:
        functions = latent_functions(bound, draws, outside)
        draws = {**draws, **{n: functions[n] for n in outside}}
    if len(free) > len(outside):
        return {"_and_".join(observed): score(bound, draws, "rows")}
    return _scored(
        bound, draws, lambda trace: {n: _score_of_site(trace.nodes[n], s) for n, s in observed.items()}, unscaled=True
    )


def summed_within(bound: BoundPair, draws: Collection[str]) -> tuple[list[str], list[str]]:
    """The finite sites without draws that share plates with all observed sites, and the plates that all of them share.

    A likelihood that sums over them has one number for each element of these plates.
    """
    observed = list(bound.select("observed").values())
    common = set.intersection(*({p for p in s.plates if p} for s in observed)) if observed else set[str]()
    free = [s for s in bound.select("latent").values() if s.name not in draws and common & set(s.plates)]
    shared = common.intersection(*(s.plates for s in free))
    if not free or not shared:
        return [], []
    return [s.name for s in free], [p for p in observed[0].plates if p in shared]


@torch.no_grad()
def latent_functions(bound: BoundPair, draws: Draws, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Deterministic sites at the draws, and the summed-out sites drawn from their posterior; those of some names."""
    free = [s.name for s in bound.select("latent").values() if s.finite and s.name not in draws]
    wanted = {n: s for n, s in bound.sites.items() if s.role == "deterministic" or n in free}
    wanted = {n: s for n, s in wanted.items() if names is None or n in names}

    def drawn(function: Any, dim: int) -> Any:
        chosen = poutine.infer_config(config_enumerate(function), _drawn_where_certain)
        # Pyro warns where all finite sites have one state.
        return infer_discrete(chosen, first_available_dim=dim, strict_enumeration_warning=False)

    if not wanted:
        return {}
    return run(bound, bound.model, draws, None, lambda trace: values_of(trace, wanted), wrap=drawn if free else None)


def _drawn_where_certain(site: Any) -> Any:
    """Settings by which a site with one state is drawn: ``infer_discrete`` returns enumerated ones in another shape."""
    if not site["infer"].get("enumerate"):
        return {}
    return {"enumerate": None} if len(site["fn"].enumerate_support(expand=False)) == 1 else {}


@torch.no_grad()
def sample_guide(bound: BoundPair, size: int) -> tuple[dict[str, Tensor], Tensor]:
    r"""Draw the model's latent sites from the guide: values (S, \*shape), log density (S,)."""
    wanted = {n: s for n, s in bound.sites.items() if n in bound.guided}
    if not wanted:
        return {}, torch.zeros(size)

    def read(drawn: Any) -> dict[str, Tensor]:
        return {"": contract(drawn, sample_names(drawn), []), **values_of(drawn, wanted)}

    # Draws of their own memory: those of a point are views of its parameter.
    values = {n: v.clone() for n, v in run(bound, bound.guide, {}, size, read).items()}
    return values, values.pop("")


@torch.no_grad()
def draw_sites(bound: BoundPair, draws: Draws, count: int, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """Draw the sites of a :meth:`BoundPair.generator` that have no draws, given those that have.

    Returns:
        Values of all sites, or of those that are wanted: the others take no memory.
    """
    known = {n: v for n, v in draws.items() if n in bound.sites}
    sites = {n: s for n, s in bound.sites.items() if wanted is None or n in wanted}
    return run(bound, bound.model, known, count, lambda trace: values_of(trace, sites))


def values_of(trace: Any, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Values of sites in a trace of one draw, of the sites' shapes."""
    return {n: trace.nodes[n]["value"].expand(s.shape) for n, s in sites.items()}


def score(bound: BoundPair, draws: Draws, what: str) -> Tensor:
    r"""Log density of draws and data: ``joint`` (S,), or ``rows`` (S, \*common plates), without that of the draws.

    Rows are without the factors that weigh them, unless they are ``scaled rows``.
    """

    def read(trace: Any) -> dict[str, Tensor]:
        names = [n for n in sample_names(trace) if what == "joint" or n not in draws]
        return {"": contract(trace, names, [] if what == "joint" else common_plates(trace, names))}

    return _scored(bound, draws, read, unscaled=what == "rows")[""]


@torch.no_grad()
def _scored(bound: BoundPair, draws: Draws, read: Read, *, unscaled: bool = False) -> dict[str, Tensor]:
    """What is read of a run of the model for each draw, finite sites without draws enumerated.

    ``unscaled`` leaves out factors of densities: those of ``poutine.scale``, and that by which the plate of some rows
    scales them up to those of all.
    """
    check_draws(bound, draws)
    bound.check_whole()
    free = [s.name for s in bound.select("latent").values() if s.name not in draws]
    unknown = [n for n in free if not bound.sites[n].finite]
    if unknown:
        raise ValueError(f"draws: expected values of {', '.join(unknown)}, got only {', '.join(draws) or 'none'}")

    def read_unscaled(trace: Any) -> dict[str, Tensor]:
        return read(unscale(trace))

    chosen = read_unscaled if unscaled else read
    return run(bound, bound.model, draws, None, chosen, wrap=enumerated if free else None)


def scaled_sites(bound: BoundPair, draws: Draws) -> list[str]:
    """Observed sites that count more or less than once in the density of the model, by ``poutine.scale``."""
    if bound.source is not None:
        # The plate of some rows scales them.
        return []
    nodes = trace(bound, bound.model, {n: v[0] for n, v in draws.items()}).nodes
    return [n for n in bound.select("observed") if not bool((torch.as_tensor(nodes[n]["scale"]) == 1).all())]


def unscale(trace: Any) -> Any:
    """A trace without the factors that scale its densities: those of ``poutine.scale``, and of a plate of some rows."""
    for node in trace.nodes.values():
        if node["type"] == "sample":
            node["scale"] = 1.0
    return trace


def common_plates(trace: poutine.Trace, names: list[str]) -> list[str]:
    """Plates that all sites share, outermost dimension first."""
    stacks = [{f.name: f.dim or 0 for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized} for n in names]
    shared = set.intersection(*map(set, stacks)) if stacks else set()
    return sorted(shared, key=lambda name: stacks[0][name])


def _score_of_site(node: Any, site: Site) -> Tensor:
    value = node["fn"].log_prob(node["value"])
    value = pyro.distributions.util.scale_and_mask(value, node["scale"], node["mask"])
    return value.expand(site.shape[: site.batch])


@torch.no_grad()
def outside_supports(bound: BoundPair, draws: Draws) -> dict[str, float]:
    """Fraction of draws of each latent site outside of its support, given the other sites of the same draw.

    A guide whose transforms were taken from one draw of the model, as those of Pyro's autoguides are, leaves a support
    that moves with another latent site; and it takes that of a transformed distribution for all real numbers.

    Returns:
        The sites with a positive fraction; empty where no support moves, and none is an image.
    """
    names = [n for n, s in bound.select("latent").items() if n in draws and not s.discrete]

    def supports(values: Mapping[str, Tensor]) -> dict[str, Any]:
        nodes = trace(bound, bound.model, values).nodes
        return {n: support_of(nodes[n]["fn"]) for n in names}

    def inside(trace: Any) -> dict[str, Tensor]:
        return {n: support_of(trace.nodes[n]["fn"]).check(trace.nodes[n]["value"]).all() for n in moving}

    if not names:
        return {}
    first, last = (supports({n: v[k] for n, v in draws.items()}) for k in (0, -1))
    limits = {n: zip(limits_of(first[n]), limits_of(last[n]), strict=True) for n in names}
    moving = [n for n in names if is_image(first[n]) or not all(torch.equal(*pair) for pair in limits[n])]
    if not moving:
        return {}
    fractions = {n: float((~v).double().mean()) for n, v in run(bound, bound.model, draws, None, inside).items()}
    return {n: fraction for n, fraction in fractions.items() if fraction > 0}
