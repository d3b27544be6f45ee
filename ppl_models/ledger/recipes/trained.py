"""The opening of every recipe: a pair built from its seed and fitted to as many rows as its size has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inference import Checkpoint, Result, fit, isolated
from ppl_models.models.pair import Pair

P = TypeVar("P", bound=Pair)


T = TypeVar("T", bound=Tensor | nn.Module)


_PLACE: ContextVar[torch.device | None] = ContextVar("place", default=None)


_KEPT: ContextVar[tuple[Checkpoint, Iterator[int]] | None] = ContextVar("kept", default=None)


@contextmanager
def checkpoints_in(folder: Path) -> Iterator[None]:
    """Let each call of :func:`trained` in the block keep its checkpoint in a folder: the first in ``1``, and so on."""
    token = _KEPT.set((Checkpoint(folder), count(1)))
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def running_on(device: torch.device | None) -> Iterator[None]:
    """Let recipes in the block run on a device; None: where data and pairs are."""
    token = _PLACE.set(device)
    try:
        yield
    finally:
        _PLACE.reset(token)


def placed(what: T) -> T:
    """Data or a module where the recipe runs."""
    place = _PLACE.get()
    moved: Any = what if place is None else what.to(place)
    return moved  # type: ignore[no-any-return]


def trained(
    make: Callable[[], P], data: Any, *objective: Any, method: Callable[..., Result] = fit, seed: int, **arguments: Any
) -> tuple[P, Result]:
    """Build a pair from a seed and fit it, from where it was if it was killed.

    Args:
        make: Builds the pair.
        data: Data of the fit.
        objective: The objective, unless it is the default one.
        method: ``fit``, or another method of the same arguments.
        seed: Seed of the pair and of the fit.
        **arguments: Those of the method.
    """
    with isolated(seed):
        pair = placed(make())
    kept = _KEPT.get()
    if kept is not None:
        arguments["checkpoint"] = kept[0].part(str(next(kept[1])))
    return pair, method(pair, data, *objective, seed=seed, **arguments)
