"""The opening of every recipe: a pair built from its seed and fitted to as many rows as its size has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from inference import Result, fit, isolated
from ppl_models.models.pair import Pair

P = TypeVar("P", bound=Pair)


def trained(
    make: Callable[[], P], data: Any, *objective: Any, method: Callable[..., Result] = fit, seed: int, **arguments: Any
) -> tuple[P, Result]:
    """Build a pair from a seed and fit it.

    Args:
        make: Builds the pair.
        data: Data of the fit.
        objective: The objective, unless it is the default one.
        method: ``fit``, or another method of the same arguments.
        seed: Seed of the pair and of the fit.
        **arguments: Those of the method.
    """
    with isolated(seed):
        pair = make()
    return pair, method(pair, data, *objective, seed=seed, **arguments)
