r"""Methods as functions from a pair and its data to a Result: their settings and their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from inference.result import Result

Method = Callable[..., Result]
"""A way to fit or sample, mostly ``partial(fit, ...)`` or ``partial(sample, ...)``. ``compare`` calls it with a pair
and its data; the zoo and the command line also pass settings of the verb, such as ``seed``."""


def accepted(method: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Those settings that a method takes: by name, or with all that it hands on."""
    parameters = inspect.signature(method).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {n: v for n, v in settings.items() if takes_all or n in parameters}


def name_of(method: Callable[..., Any]) -> str:
    """Name of a method, with the kernel or the objective of a partial: ``fit``, ``sample (NUTS)``."""
    settings = getattr(method, "keywords", {})
    inner = settings.get("kernel") or settings.get("objective")
    return _name(method) if inner is None else f"{_name(method)} ({_name(inner)})"


def _name(what: Any) -> str:
    function = getattr(what, "func", what)
    return getattr(function, "__name__", type(function).__name__)
