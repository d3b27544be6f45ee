r"""What a pair is made of: its halves, their arguments, and the modules that they belong to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from inference.core.handlers import OwnSites


def halves_of(pair: Any) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    if isinstance(pair, tuple) and len(pair) == 2 and all(map(callable, pair)):
        return pair
    if callable(getattr(pair, "model", None)) and not isinstance(pair, type):
        guide = getattr(pair, "guide", None)
        return pair.model, guide if callable(guide) else None
    if callable(pair):
        return pair, None
    raise TypeError(
        f"pair: expected an object with .model and .guide, a (model, guide) tuple or a model, got {type(pair).__name__}"
    )


def name_of(pair: Any) -> str:
    if isinstance(pair, tuple):
        return name_of(pair[0])
    pair = getattr(pair, "func", pair)
    owner = getattr(pair, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        return type(owner).__name__
    return getattr(pair, "__name__", None) or type(pair).__name__


def modules_of(pair: Any) -> tuple[torch.nn.Module, ...]:
    """The modules that a pair, or its halves, are or belong to."""
    halves = (pair, *(pair if isinstance(pair, tuple) else ()))
    owners = [getattr(h, "__self__", h) for h in halves]
    return tuple({id(m): m for m in owners if isinstance(m, torch.nn.Module)}.values())


def move(pair: Any, place: torch.device) -> None:
    """Move the modules of a pair to a device, in place."""
    for module in modules_of(pair):
        module.to(place)


def held_by(half: Any) -> Iterator[Tensor]:
    """Tensors that a half holds: what it was given by ``partial``, and parameters and buffers of its module."""
    while True:
        owner = getattr(half, "__self__", half)
        if isinstance(half, partial):
            yield from (v for v in (*half.args, *half.keywords.values()) if isinstance(v, Tensor))
            half = half.func
        elif isinstance(owner, torch.nn.Module):
            yield from chain(owner.parameters(), owner.buffers())
            return
        elif hasattr(half, "__wrapped__"):
            half = half.__wrapped__
        else:
            return


def precision_of(pair: Any) -> torch.dtype:
    """Type of the numbers that a pair holds; torch's default where it holds none."""
    halves = pair if isinstance(pair, tuple) else (pair,)
    held = [t.dtype for t in chain.from_iterable(map(held_by, halves)) if t.is_floating_point()]
    return torch.float64 if torch.float64 in held else torch.get_default_dtype()


def own_sites(guide: Callable[..., Any]) -> Callable[..., Any]:
    """A guide that is a messenger, as a plain one; any other as it is.

    A ``GuideMessenger`` runs the model with its own distributions in place of the priors, and so the model's observed
    sites are in its trace. Whoever traces it would count the likelihood as a part of the guide's density.
    """
    if not isinstance(poutine.unwrap(guide), GuideMessenger):
        return guide

    def call(*args: Any, **kwargs: Any) -> Any:
        with OwnSites():
            return guide(*args, **kwargs)

    call.__wrapped__ = guide  # type: ignore[attr-defined]
    return call


def fitted(half: Callable[..., Any]) -> Callable[..., Any]:
    """The half, called by name with what it takes of the data."""
    half = own_sites(half)
    named, free = accepted_by(half)
    return half if free else _only(half, named)


def _only(function: Callable[..., Any], names: Mapping[str, bool]) -> Callable[..., Any]:
    @wraps(function)
    def call(**arguments: Any) -> Any:
        return function(**{k: v for k, v in arguments.items() if k in names})

    return call


def accepted_by(function: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """Named parameters of a function (True: required) and whether any keyword is taken."""
    parameters = parameters_of(function).values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is p.empty for p in parameters if p.kind in kinds}
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The named parameters of a function, or of a module's ``forward``."""
    owner: Any = function
    target = owner.forward if isinstance(function, torch.nn.Module) else owner
    if getattr(target, "__name__", "") == "_forward_unimplemented":
        # Pyro's messengers are modules that are called themselves.
        target = owner.__call__
    return inspect.signature(target).parameters
