r"""Draws through a model: predictive samples, log joint density, pointwise log likelihood.

All S draws run through the model at once, in a plate to the left of the model's own. Finite sites
that have no draws are summed out exactly,

.. math:: \log p(x_n \mid \theta_s) = \log \sum_y p(x_n, y \mid \theta_s).

Before a model is trusted with that, two draws are scored both at once and one by one. Where the two disagree, one
draw's run is recorded as a graph and mapped over all; where that fails too the draws run one by one, and a warning
gives the reason.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate, infer_discrete
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.compiler import policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.fuse import quietly
from inference.core.bound import BoundPair, Site
from inference.core.handlers import preserved_rng

Draws = Mapping[str, Tensor]


PLATE = "_draws"


UNLIFTED = (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, IndexError)
"""What a model written for one draw may raise when it meets many: torch, Pyro and numpy refuse in their own ways."""


def rowwise(bound: BoundPair, draws: Draws) -> Tensor:
    """:func:`pointwise_log_likelihood` of given draws, in the current parameter store."""
    score = _scored(bound, draws, "rows")
    if score.dim() < 2:
        observed = ", ".join(bound.select("observed")) or "nothing"
        raise ValueError(f"model: expected observed sites in a plate of rows, got {observed} outside of one")
    return score.flatten(2).sum(-1) if score.dim() > 2 else score


def log_joint(bound: BoundPair, draws: Draws) -> Tensor:
    r"""Log density of draws (S, \*shape) and data, finite sites without draws summed out: (S,)."""
    return _scored(bound, draws, "joint")


def log_likelihood_by_site(bound: BoundPair, draws: Draws) -> dict[str, Tensor]:
    r"""Log likelihood (S, \*plates) of each observed site; of all in one where a site is summed out."""
    observed = bound.select("observed")
    if any(s.name not in draws for s in bound.select("latent").values()):
        return {"_and_".join(observed): _scored(bound, draws, "rows")}
    return {name: _scored(bound, draws, name) for name in observed}


def latent_functions(bound: BoundPair, draws: Draws) -> dict[str, Tensor]:
    """Deterministic sites at the draws, and the summed-out sites drawn from their posterior."""
    free = [s.name for s in bound.select("latent").values() if s.finite and s.name not in draws]
    wanted = {n: s for n, s in bound.sites.items() if s.role == "deterministic" or n in free}

    def body(chunk: Draws, count: int | None) -> dict[str, Tensor]:
        model = lift(bound, bound.model, chunk, count)
        if free:
            dim = -bound.depth - (1 if count is None else 2)
            model = infer_discrete(config_enumerate(model), first_available_dim=dim)
        trace = poutine.trace(model).get_trace(**bound.arguments())
        return {n: unstack(trace.nodes[n]["value"], s, bound.depth, count) for n, s in wanted.items()}

    return run_draws(bound, draws, body) if wanted else {}


def sample_guide(bound: BoundPair, size: int) -> tuple[dict[str, Tensor], Tensor]:
    r"""Draw the model's latent sites from the guide: values (S, \*shape), log density (S,)."""
    wanted = {n: s for n, s in bound.sites.items() if n in bound.guided}
    if not wanted:
        return {}, torch.zeros(size)

    def run(count: int | None) -> dict[str, Tensor]:
        trace = poutine.trace(lift(bound, bound.guide, {}, count)).get_trace(**bound.arguments())
        density = contract(trace, sample_names(trace), [], count)
        return {
            "": density,
            **{n: unstack(trace.nodes[n]["value"], s, bound.depth, count) for n, s in wanted.items()},
        }

    step = policy.draws_per_pass(_width(bound))
    with torch.no_grad():
        try:
            parts = [run(min(step, size - start)) for start in range(0, size, step)]
        except UNLIFTED as error:
            say_slow(bound, "guide", error)
            parts = [run(None) for _ in range(size)]
    values = {n: torch.cat([part[n] for part in parts]) for n in parts[0]}
    return values, values.pop("")


def draw_sites(bound: BoundPair, draws: Draws, count: int) -> dict[str, Tensor]:
    """Draw the sites of a :meth:`Program.generator` that have no draws, given those that have."""
    known = {n: v for n, v in draws.items() if n in bound.sites}

    def body(chunk: Draws, number: int | None) -> dict[str, Tensor]:
        trace = poutine.trace(lift(bound, bound.model, chunk, number)).get_trace(**bound.arguments())
        return {n: unstack(trace.nodes[n]["value"], s, bound.depth, number) for n, s in bound.sites.items()}

    return run_draws(bound, known, body, count)


def _scored(bound: BoundPair, draws: Draws, what: str) -> Tensor:
    return run_draws(bound, draws, lambda chunk, count: {"": _score(bound, chunk, count, what)})[""]


def _score(bound: BoundPair, draws: Draws, count: int | None, what: str) -> Tensor:
    r"""Log density of draws: ``joint`` (S,), ``rows`` (S, \*common plates), or a site's (S, \*its plates)."""
    free = [s.name for s in bound.select("latent").values() if s.name not in draws]
    unknown = [n for n in free if not bound.sites[n].finite]
    if unknown:
        raise ValueError(f"draws: expected values of {', '.join(unknown)}, got only {', '.join(draws) or 'none'}")
    model = lift(bound, bound.model, draws, count)
    if free:
        dim = -bound.depth - (1 if count is None else 2)
        model = poutine.enum(config_enumerate(model), first_available_dim=dim)
    trace = poutine.trace(model).get_trace(**bound.arguments())
    if what not in ("joint", "rows"):
        return _unstack_score(trace.nodes[what], bound.sites[what], bound.depth, count)
    names = [n for n in sample_names(trace) if what == "joint" or n not in draws]
    return contract(trace, names, [] if what == "joint" else _common_plates(trace, names), count)


def sample_names(trace: poutine.Trace) -> list[str]:
    """Sites with a density: neither plates' own nor deterministic ones."""
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node) and not (node["infer"] or {}).get("_deterministic")
    ]


def _common_plates(trace: poutine.Trace, names: list[str]) -> list[str]:
    """Plates that all sites share, outermost dimension first."""
    stacks = [{f.name: f.dim or 0 for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized} for n in names]
    shared = set.intersection(*map(set, stacks)) - {PLATE} if stacks else set()
    return sorted(shared, key=lambda name: stacks[0][name])


def contract(trace: Any, names: list[str], keep: list[str], count: int | None) -> Tensor:
    """Sum the sites' log densities over all plates but the kept and log-sum-exp over enumerated dimensions."""
    trace.compute_log_prob(site_filter=lambda name, _: name in names)
    trace.symbolize_dims()
    frames = {f.name: f for n in names for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized}
    symbol = {name: trace.plate_to_symbol[name] for name in frames}
    plates = {symbol[name] for name in frames if name != PLATE}
    terms: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for name in names:
        node = trace.nodes[name]
        # [...] makes a tensor of its own: pack marks it, and a log density may be shared by two sites.
        term: Any = pack(torch.as_tensor(node["log_prob"])[...], node["infer"]["_dim_to_symbol"])
        terms.setdefault(frozenset(plates.intersection(term._pyro_dims)), []).append(term)
    summed = {s for group in terms.values() for t in group for s in t._pyro_dims} - plates - {symbol.get(PLATE)}
    sizes = {symbol[name]: frame.size for name, frame in frames.items()}
    ring = LogRing(cache={}, dim_to_size=sizes)
    target = [*([PLATE] if count is not None else []), *keep]
    kept = frozenset(symbol[k] for k in keep if k in symbol)
    total: Any = contract_to_tensor(terms, summed, target_ordinal=kept, ring=ring) if terms else torch.zeros(())
    order = [symbol[t] for t in target if t in symbol and symbol[t] in getattr(total, "_pyro_dims", "")]
    if order:
        total = total.permute([total._pyro_dims.index(s) for s in order])
    shape = [int(frames[t].size if t in frames else count or 1) for t in target]
    present = [size if t in symbol and symbol[t] in order else 1 for t, size in zip(target, shape, strict=True)]
    total = total.reshape(present).expand(shape)
    return total if count is not None else total[None]


def lift(bound: BoundPair, function: Any, draws: Draws, count: int | None) -> Callable[..., Any]:
    """The function run once for ``count`` draws, or for a single one without a plate (count None)."""
    if count is None:
        return poutine.condition(function, {n: v[0] for n, v in draws.items()})
    room = {n: (1,) * (bound.depth - bound.sites[n].batch) for n in draws}
    values = {n: v.reshape(v.shape[:1] + room[n] + v.shape[1:]) for n, v in draws.items()}
    return poutine.condition(pyro.plate(PLATE, count, dim=-bound.depth - 1)(function), values)


def unstack(value: Any, site: Site, depth: int, count: int | None) -> Tensor:
    r"""A value as the lifted model returned it, as (S, \*shape)."""
    if count is None:
        return value.expand(site.shape)[None]
    if site.role == "deterministic" and value.numel() == count * torch.Size(site.shape).numel():
        return value.reshape(count, *site.shape)
    room = (1,) * (depth - site.batch)
    try:
        return value.expand(count, *room, *site.shape).reshape(count, *site.shape)
    except RuntimeError:
        raise ValueError(f"{site.name}: expected {(count, *room, *site.shape)}, got {tuple(value.shape)}") from None


def _unstack_score(node: Any, site: Site, depth: int, count: int | None) -> Tensor:
    value = node["fn"].log_prob(node["value"])
    value = pyro.distributions.util.scale_and_mask(value, node["scale"], node["mask"])
    plain = Site(**{**vars(site), "shape": site.shape[: site.batch]})
    return unstack(value, plain, depth, count)


def run_draws(
    bound: BoundPair,
    draws: Draws,
    body: Callable[[Draws, int | None], dict[str, Tensor]],
    count: int | None = None,
) -> dict[str, Tensor]:
    """Run ``body`` over all draws, as many at once as the memory budget and the model allow."""
    _check_draws(bound, draws)
    total = len(next(iter(draws.values()))) if draws else count or 1
    step = policy.draws_per_pass(_width(bound))
    obstacle = _obstacle(bound, draws)
    with torch.no_grad():
        if obstacle is None:
            spans = [(start, min(total, start + step)) for start in range(0, total, step)]
            parts = [body({n: v[a:b] for n, v in draws.items()}, b - a) for a, b in spans]
        else:
            found = _mapped(draws, body, total, step)
            if found is not None:
                return found
            if "slow" not in bound.memo:
                bound.memo["slow"] = True
                say_slow(bound, "model", obstacle)
            parts = [body({n: v[k : k + 1] for n, v in draws.items()}, None) for k in range(total)]
    return {n: parts[0][n] if len(parts) == 1 else torch.cat([part[n] for part in parts]) for n in parts[0]}


def _mapped(
    draws: Draws, body: Callable[[Draws, int | None], dict[str, Tensor]], total: int, step: int
) -> dict[str, Tensor] | None:
    """Run ``body`` for one draw as a graph, mapped over all draws; None where that cannot be done."""
    names: list[str] = []

    def one(_: Tensor, *values: Tensor) -> list[Tensor]:
        found = body({n: v[None] for n, v in zip(draws, values, strict=True)}, None)
        names[:] = found
        return [v[0] for v in found.values()]

    # Without draws there is still something to map over.
    inputs = [torch.zeros(total), *draws.values()]
    try:
        graph = traced(one, *(v[0] for v in inputs))
        many = torch.vmap(graph, randomness="different")
        with quietly():
            chunks = [many(*(v[start : start + step] for v in inputs)) for start in range(0, total, step)]
        found = {n: torch.cat([chunk[k] for chunk in chunks]) for k, n in enumerate(names)}
        return found if _is_bodys(found, draws, body) else None
    except (Untraceable, *UNLIFTED):
        return None


def _is_bodys(found: dict[str, Tensor], draws: Draws, body: Callable[[Draws, int | None], dict[str, Tensor]]) -> bool:
    """Whether the first and last of what was found are those of the body, as far as it draws nothing."""
    with preserved_rng():
        for k in (0, -1):
            own = {n: v[[k]] for n, v in draws.items()}
            once, again = body(own, None), body(own, None)
            for name, value in once.items():
                tolerance = 1e-3 if value.dtype == torch.float32 else 1e-8
                fixed = torch.equal(value, again[name])
                if fixed and not torch.allclose(
                    found[name][[k]], value, rtol=tolerance, atol=tolerance, equal_nan=True
                ):
                    return False
    return True


def _width(bound: BoundPair) -> int:
    """Numbers that the largest site holds for one draw, times the states summed out."""
    largest = max([torch.Size(s.shape).numel() for s in bound.sites.values()], default=1)
    return max(largest, bound.numel) * (4 if bound.enumerated else 1)


def _obstacle(bound: BoundPair, draws: Draws) -> str | None:
    """Why the model does not give the same densities for two draws at once as one by one; None if it does."""
    key = f"lifts {sorted(draws)}"
    if key not in bound.memo:
        bound.memo[key] = _try_lift(bound, draws)
    return bound.memo[key]


def _try_lift(bound: BoundPair, draws: Draws) -> str | None:
    try:
        with preserved_rng(), torch.no_grad():
            pair = {n: v[[0, -1]] for n, v in draws.items()}
            if any(n not in pair and not s.finite for n, s in bound.select("latent").items()):
                trace = poutine.trace(lift(bound, bound.model, pair, 2)).get_trace(**bound.arguments())
                names = bound.select("latent")
                pair = {n: unstack(trace.nodes[n]["value"], s, bound.depth, 2) for n, s in names.items()}
            together = _score(bound, pair, 2, "joint")
            single = [{n: v[k : k + 1] for n, v in pair.items()} for k in (0, 1)]
            apart = torch.cat([_score(bound, draw, None, "joint") for draw in single])
    except UNLIFTED as error:
        return str(error)
    tolerance = 1e-3 if together.dtype == torch.float32 else 1e-8
    if torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return f"log density {together.tolist()} at once, {apart.tolist()} one by one"


def say_slow(bound: BoundPair, half: str, reason: object) -> None:
    """Warn that a half runs draw by draw, and why."""
    said = " ".join(str(reason).split())[:160]
    warnings.warn(f"{bound.name}: the {half} does not broadcast over draws ({said}); they run one by one", stacklevel=2)


def _check_draws(bound: BoundPair, draws: Draws) -> None:
    for name, value in draws.items():
        site = bound.sites.get(name)
        if site is None:
            raise ValueError(f"draws: the model has no site {name}; it has {', '.join(bound.sites)}")
        if tuple(value.shape[1:]) != site.shape:
            expected = ", ".join(map(str, ("draws", *site.shape)))
            hint = (
                " (a latent of rows that were not fitted; log_evidence integrates it out)"
                if "rows" in site.plates
                else ""
            )
            raise ValueError(f"{name}: expected draws of shape ({expected}), got {tuple(value.shape)}{hint}")
