r"""A model or a guide run for many draws.

The program of one draw is the semantics: what is computed of many draws is what running the program for each of them
would give. It is mapped over all draws at once (:mod:`inference.draws.mapping`). A program that cannot be mapped,
because its course depends on a draw, runs draw by draw, and a warning gives the reason.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from inference.compiler import policy
from inference.core.bound import BoundPair
from inference.core.handlers import (
    REFUSALS,
    equal_states,
    preserved_rng,
    random_state,
    set_random_state,
    threads_set,
)
from inference.draws.mapping import InvalidDraw, mapped

Draws = Mapping[str, Tensor]
Read = Callable[[Any], dict[str, Tensor]]
"""From a trace of one draw to values by name."""
Wrap = Callable[[Callable[..., Any], int], Callable[..., Any]]
"""From a half and the first dimension that is free for enumeration to a half."""
One = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""From the values of one draw to what is read of it."""


def run(
    bound: BoundPair, half: Any, draws: Draws, count: int | None, read: Read, *, wrap: Wrap | None = None
) -> dict[str, Tensor]:
    r"""Run a half for many draws.

    Args:
        bound: The pair and its data.
        half: ``bound.model`` or ``bound.guide``.
        draws: Values (S, \*shape) of latent sites; the others are drawn.
        count: Number of draws S where there are no values.
        read: Reads the values that are wanted off a trace.
        wrap: Handler around the half, such as :func:`enumerated`.

    Returns:
        What ``read`` gave, for all draws: (S, \*shape).
    """

    def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return read(trace(bound, half, values, wrap))

    check_draws(bound, draws)
    total, place = len(next(iter(draws.values()))) if draws else count or 1, bound.device
    step = policy.draws_per_pass(_width(bound))
    parts = ({n: v[start : start + step].to(place) for n, v in draws.items()} for start in range(0, total, step))
    sizes = [min(step, total - start) for start in range(0, total, step)]
    with threads_by_size(bound, sizes[0]):
        results = [_run_part(bound, half, one, part, size, wrap) for part, size in zip(parts, sizes, strict=True)]
    return {n: results[0][n] if len(results) == 1 else torch.cat([r[n] for r in results]) for n in results[0]}


def trace(bound: BoundPair, half: Any, values: Mapping[str, Tensor], wrap: Wrap | None = None) -> Any:
    """A trace of a half for one draw, given the values of some of its sites."""
    function = poutine.condition(half, dict(values))
    if wrap is not None:
        function = wrap(function, -bound.depth - 1)
    return poutine.trace(function).get_trace(**bound.arguments())


def enumerated(function: Callable[..., Any], dim: int) -> Callable[..., Any]:
    """A half whose finite sites without values are enumerated in dimensions from ``dim`` on."""
    return poutine.enum(config_enumerate(function), first_available_dim=dim)


def sample_names(trace: poutine.Trace) -> list[str]:
    """Sites with a density: neither plates' own nor deterministic ones."""
    return [
        name
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node) and not (node["infer"] or {}).get("_deterministic")
    ]


def contract(trace: Any, names: list[str], keep: list[str]) -> Tensor:
    """Sum the sites' log densities over all plates but the kept and log-sum-exp over enumerated dimensions."""
    trace.compute_log_prob(site_filter=lambda name, _: name in names)
    if not any((trace.nodes[name]["infer"] or {}).get("_dim_to_id") for name in names):
        return _summed(trace, names, keep)
    trace.symbolize_dims()
    frames = {f.name: f for n in names for f in trace.nodes[n]["cond_indep_stack"] if f.vectorized}
    symbol = {name: trace.plate_to_symbol[name] for name in frames}
    plates = set(symbol.values())
    terms: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
    for name in names:
        node = trace.nodes[name]
        # [...] makes a tensor of its own: pack marks it, and a log density may be shared by two sites.
        term: Any = pack(torch.as_tensor(node["log_prob"])[...], node["infer"]["_dim_to_symbol"])
        terms.setdefault(frozenset(plates.intersection(term._pyro_dims)), []).append(term)
    summed = {s for group in terms.values() for t in group for s in t._pyro_dims} - plates
    ring = LogRing(cache={}, dim_to_size={symbol[name]: frame.size for name, frame in frames.items()})
    kept = frozenset(symbol[k] for k in keep if k in symbol)
    total: Any = contract_to_tensor(terms, summed, target_ordinal=kept, ring=ring) if terms else torch.zeros(())
    order = [symbol[k] for k in keep if k in symbol and symbol[k] in getattr(total, "_pyro_dims", "")]
    if order:
        total = total.permute([total._pyro_dims.index(s) for s in order])
    shape = [int(frames[k].size) if k in frames else 1 for k in keep]
    present = [size if k in symbol and symbol[k] in order else 1 for k, size in zip(keep, shape, strict=True)]
    return total.reshape(present).expand(shape)


def _summed(trace: Any, names: list[str], keep: list[str]) -> Tensor:
    """:func:`contract` where nothing is enumerated: a sum over all plates but the kept."""
    total, sizes = torch.zeros(()), dict.fromkeys(keep, 1)
    for name in names:
        density = torch.as_tensor(trace.nodes[name]["log_prob"])
        dims = {
            f.name: f.dim for f in trace.nodes[name]["cond_indep_stack"] if f.vectorized and -f.dim <= density.dim()
        }
        kept = {k: density.dim() + dims[k] for k in keep if k in dims}
        order = [*kept.values(), *(d for d in range(density.dim()) if d not in kept.values())]
        density = (
            density.permute(order).flatten(len(kept)).sum(-1) if len(kept) < density.dim() else density.permute(order)
        )
        sizes |= dict(zip(kept, density.shape, strict=True))
        total = total + density.reshape([sizes[k] if k in kept else 1 for k in keep])
    return total.expand(list(sizes.values()))


def _run_part(bound: BoundPair, half: Any, one: One, draws: Draws, count: int, wrap: Wrap | None) -> dict[str, Tensor]:
    """Run ``one`` for as many draws as fit into memory."""
    if count == 1:
        return {n: v[None] for n, v in one({n: v[0] for n, v in draws.items()}).items()}
    name = "model" if half is bound.model else "guide"
    ways = bound.memo.setdefault("ways", {})
    key, obstacle = f"{name} {getattr(wrap, '__name__', '')} given {sorted(draws)}", ""
    if key not in ways:
        with preserved_rng(), torch.no_grad():
            # The first run makes parameters, and shows errors as they are.
            one({n: v[0] for n, v in draws.items()})
    # A program may write to a tensor that it makes, such as the means of a recursion: each draw then has its own.
    for buffers in (False, True):
        if ways.get(key, buffers) != buffers:
            continue
        state = random_state()
        try:
            results = mapped(one, draws, count, bound.device, buffers=buffers)
            ways[key] = buffers
            return results
        except InvalidDraw as error:
            raise ValueError(f"{bound.name}: {error}") from None
        except REFUSALS as error:
            set_random_state(state)
            obstacle = str(error) or type(error).__name__
    if obstacle:
        ways[key] = None
        _warn_slow(bound, name, obstacle)
    return _one_by_one(one, draws, count)


def _one_by_one(one: One, draws: Draws, count: int) -> dict[str, Tensor]:
    parts: list[dict[str, Tensor]] = []
    same = bool(draws) and all(bool((v == v[:1]).all()) for v in draws.values())
    state = random_state() if same else {}
    for k in range(count):
        parts.append(one({n: v[k] for n, v in draws.items()}))
        # Of a point estimate one draw will do, but where noise is drawn: two results may be equal by chance.
        same = same and k < 2 and equal_states(state, random_state())
        if same and k == 1 and all(torch.equal(parts[0][n], parts[1][n]) for n in parts[0]):
            return {n: v.expand(count, *v.shape) for n, v in parts[0].items()}
    return {n: torch.stack([part[n] for part in parts]) for n in parts[0]}


def threads_by_size(bound: BoundPair, count: int) -> AbstractContextManager[None]:
    """Run in one thread if the largest operation of a pass over so many draws is too small for several, as in a fit."""
    weights = max((p.numel() for m in bound.modules for p in m.parameters()), default=0)
    products = weights * max(1, bound.rows) // policy.PRODUCTS_PER_NUMBER
    small = policy.threads_of_fit(count * max(_width(bound), weights, products), 2) == 1
    return threads_set(1) if small else nullcontext()


def _width(bound: BoundPair) -> int:
    """Numbers that the largest site holds for one draw, times the states summed out."""
    largest = max([torch.Size(s.shape).numel() for s in bound.sites.values()], default=1)
    return max(largest, bound.held) * (4 if bound.enumerated else 1)


def _warn_slow(bound: BoundPair, half: str, reason: str) -> None:
    """Warn that a half runs draw by draw, and why."""
    short = _shortly(reason)
    warnings.warn(f"{bound.name}: the {half} cannot be mapped over draws ({short}); they run one by one", stacklevel=2)


def _shortly(reason: str) -> str:
    """What keeps a program from being mapped, in a few words."""
    if "data-dependent" in reason or ".item()" in reason or "data pointer" in reason or "dynamic shape" in reason:
        return "its course depends on the value of a draw"
    return " ".join(reason.split("Trace Shapes:")[0].split())[:160]


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
