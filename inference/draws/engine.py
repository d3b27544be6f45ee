r"""A model or a guide run for many draws: all at once, mapped over a graph, or one by one.

All S draws run at once in a plate to the left of the model's own. Before a model is trusted with that, two draws are
scored both at once and one by one. Where the two disagree, the run of one draw is recorded as a graph and mapped over
all draws. Where that fails too, draws run one by one, and a warning gives the reason.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
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
Read = Callable[[Any, int | None], dict[str, Tensor]]
"""From a trace and the number of draws in it (None: one, without a plate) to values (S, ...) by name."""
Wrap = Callable[[Callable[..., Any], int], Callable[..., Any]]
"""From a half and the first dimension that is free for enumeration to a half."""
Body = Callable[[Draws, int | None], dict[str, Tensor]]
PLATE = "_draws"
REFUSALS = (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError, IndexError)
"""What a model written for one draw may raise when it meets many: torch, Pyro and numpy refuse in their own ways."""


def run(
    bound: BoundPair,
    half: Any,
    draws: Draws,
    count: int | None,
    read: Read,
    *,
    wrap: Wrap | None = None,
    at_once: bool | None = None,
) -> dict[str, Tensor]:
    r"""Run a half for many draws.

    Args:
        bound: The pair and its data.
        half: ``bound.model`` or ``bound.guide``.
        draws: Values (S, \*shape) of latent sites; the others are drawn.
        count: Number of draws S where there are no values.
        read: Reads the values that are wanted off a trace.
        wrap: Handler around the half, such as :func:`enumerated`.
        at_once: Whether all draws run at once; None: as a comparison of two draws tells.

    Returns:
        What ``read`` gave, for all draws.
    """

    def body(chunk: Draws, number: int | None) -> dict[str, Tensor]:
        return read(trace(bound, half, chunk, number, wrap), number)

    check_draws(bound, draws)
    total = len(next(iter(draws.values()))) if draws else count or 1
    step = policy.draws_per_pass(_width(bound))
    obstacle = _obstacle(bound, half, draws, body) if at_once is None else None if at_once else ""
    if obstacle is None:
        spans = [(start, min(total, start + step)) for start in range(0, total, step)]
        parts = [body({n: v[a:b] for n, v in draws.items()}, b - a) for a, b in spans]
    else:
        mapped = _mapped(draws, body, total, step) if obstacle and half is bound.model else None
        if mapped is not None:
            return mapped
        if obstacle:
            _warn_slow(bound, half, obstacle)
        parts = [body({n: v[k : k + 1] for n, v in draws.items()}, None) for k in range(total)]
    return {n: parts[0][n] if len(parts) == 1 else torch.cat([part[n] for part in parts]) for n in parts[0]}


def trace(bound: BoundPair, half: Any, draws: Draws, count: int | None, wrap: Wrap | None = None) -> Any:
    """A trace of a half for so many draws at once, or for one without a plate of draws (count None)."""
    function = lift(bound, half, draws, count)
    if wrap is not None:
        function = wrap(function, -bound.depth - (1 if count is None else 2))
    return poutine.trace(function).get_trace(**bound.arguments())


def enumerated(function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """A half whose finite sites without values are enumerated in dimensions from ``dim`` on."""
    return poutine.enum(config_enumerate(function), first_available_dim=dim)


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


def sample_names(trace: poutine.Trace) -> list[str]:
    """Sites with a density: neither plates' own nor deterministic ones."""
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node) and not (node["infer"] or {}).get("_deterministic")
    ]


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


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two log densities are equal, as far as sums in another order are."""
    tolerance = 1e-3 if one.dtype == torch.float32 else 1e-8
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def _obstacle_of_model(bound: BoundPair, draws: Draws) -> str | None:
    """Why the model has other densities for two draws at once than one by one; None if it has the same."""
    try:
        with preserved_rng(), torch.no_grad():
            pair = {n: v[[0, -1]] for n, v in draws.items()}
            latent = bound.select("latent")
            if any(n not in pair and not s.finite for n, s in latent.items()):
                drawn = trace(bound, bound.model, pair, 2)
                pair = {n: unstack(drawn.nodes[n]["value"], s, bound.depth, 2) for n, s in latent.items()}

            def joint(chunk: Draws, count: int | None) -> Tensor:
                wrap = None if latent.keys() <= chunk.keys() else enumerated
                scored = trace(bound, bound.model, chunk, count, wrap)
                return contract(scored, sample_names(scored), [], count)

            together = joint(pair, 2)
            apart = torch.cat([joint({n: v[k : k + 1] for n, v in pair.items()}, None) for k in (0, 1)])
    except REFUSALS as error:
        return str(error) or type(error).__name__
    if agree(together, apart):
        return None
    return f"log density {together.tolist()} at once, {apart.tolist()} one by one"


def _obstacle(bound: BoundPair, half: Any, draws: Draws, body: Body) -> str | None:
    """What keeps a half from running for all draws at once; found once for a pair and its data."""
    key = f"{'model' if half is bound.model else 'guide'} given {sorted(draws)}"
    if key not in bound.memo:
        if half is bound.model:
            bound.memo[key] = _obstacle_of_model(bound, draws)
        else:
            try:
                with preserved_rng(), torch.no_grad():
                    body({}, 2)
                bound.memo[key] = None
            except REFUSALS as error:
                bound.memo[key] = str(error) or type(error).__name__
    return bound.memo[key]


def _mapped(draws: Draws, body: Body, total: int, step: int) -> dict[str, Tensor] | None:
    """Run ``body`` for one draw as a graph, mapped over all draws; None where that cannot be done."""
    names: list[str] = []

    def one(_: Tensor, *values: Tensor) -> list[Tensor]:
        read = body({n: v[None] for n, v in zip(draws, values, strict=True)}, None)
        names[:] = read
        return [v[0] for v in read.values()]

    # Without draws there is still something to map over.
    inputs = [torch.zeros(total), *draws.values()]
    try:
        graph = traced(one, *(v[0] for v in inputs))
        many = torch.vmap(graph, randomness="different")
        with quietly():
            chunks = [many(*(v[start : start + step] for v in inputs)) for start in range(0, total, step)]
        values = {n: torch.cat([chunk[k] for chunk in chunks]) for k, n in enumerate(names)}
        return values if _is_of_body(values, draws, body) else None
    except (Untraceable, *REFUSALS):
        return None


def _is_of_body(values: dict[str, Tensor], draws: Draws, body: Body) -> bool:
    """Whether the first and last of the values are those of the body, as far as it draws nothing."""
    with preserved_rng():
        for k in (0, -1):
            single = {n: v[[k]] for n, v in draws.items()}
            once, again = body(single, None), body(single, None)
            fixed = [n for n, value in once.items() if torch.equal(value, again[n])]
            if not all(agree(values[n][[k]], once[n]) for n in fixed):
                return False
    return True


def _width(bound: BoundPair) -> int:
    """Numbers that the largest site holds for one draw, times the states summed out."""
    largest = max([torch.Size(s.shape).numel() for s in bound.sites.values()], default=1)
    return max(largest, bound.numel) * (4 if bound.enumerated else 1)


def _warn_slow(bound: BoundPair, half: Any, reason: str) -> None:
    """Warn once that a half runs draw by draw, and why."""
    name = "model" if half is bound.model else "guide"
    if f"slow {name}" not in bound.memo:
        bound.memo[f"slow {name}"] = True
        warn_slow(bound, name, reason)


def warn_slow(bound: BoundPair, half: str, reason: object) -> None:
    """Warn that a half runs draw by draw, and why."""
    short = " ".join(str(reason).split())[:160]
    warnings.warn(
        f"{bound.name}: the {half} does not broadcast over draws ({short}); they run one by one", stacklevel=2
    )


def check_draws(bound: BoundPair, draws: Draws) -> None:
    """Raise a ValueError unless draws have the names and shapes of sites."""
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
