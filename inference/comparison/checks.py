"""What ``compare`` is asked, checked before any method runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inference.checkpoint import Checkpoint
from inference.comparison.methods import Method
from inference.comparison.scores import Moments
from inference.core.sites import Site
from inference.result import Result


def check_methods(make_pair: Any, methods: Any, truth: Any) -> None:
    """Raise a TypeError or a ValueError unless pair, methods and truth are of the types that they have to be."""
    if not callable(make_pair):
        raise TypeError(f"make_pair: expected a function that builds a pair, got {make_pair!r}")
    if not isinstance(methods, Mapping):
        raise TypeError(f"methods: expected a mapping of names to functions (pair, data), got {methods!r}")
    if not methods:
        raise ValueError("methods: expected at least one, got none")
    for name, method in methods.items():
        if not isinstance(name, str) or not callable(method):
            raise TypeError(f"methods: expected a mapping of names to functions (pair, data), got {name!r}: {method!r}")
    if not (truth is None or callable(truth) or isinstance(truth, Mapping | Result)):
        raise TypeError(f"truth: expected a mapping of sites to (mean, standard deviation), got {truth!r}")
    for site, moments in truth.items() if isinstance(truth, Mapping) else ():
        if not isinstance(moments, tuple | list) or len(moments) != 2:
            raise TypeError(f"truth: expected (mean, standard deviation) for {site}, got {type(moments).__name__}")


def check_names(
    sites: Mapping[str, Site], truth: Moments, drawn: Mapping[str, Tensor], heldout: Any, label: str | None
) -> None:
    """Raise a ValueError for names that the model does not have."""
    for name, moments in truth.items():
        if name not in sites:
            raise ValueError(f"truth: expected sites of the model ({', '.join(sites)}), got {name!r}")
        wrong = [tuple(v.shape) for v in moments if tuple(v.shape) != sites[name].shape]
        if wrong:
            raise ValueError(f"truth: expected mean and sd of {name} of shape {sites[name].shape}, got {wrong[0]}")
    for name, value in drawn.items():
        if name not in sites:
            raise ValueError(f"drawn: expected sites of the model ({', '.join(sites)}), got {name!r}")
        if tuple(value.shape) != sites[name].shape:
            raise ValueError(f"drawn: expected {name} of shape {sites[name].shape}, got {tuple(value.shape)}")
    if label is not None:
        _check_label(sites, heldout, label)


def _check_label(sites: Mapping[str, Site], heldout: Any, label: str) -> None:
    finite = [n for n, s in sites.items() if s.finite]
    if label not in finite:
        raise ValueError(f"label: expected a finite site of the model ({', '.join(finite) or 'none'}), got {label!r}")
    if not isinstance(heldout, Mapping) or label not in heldout:
        got = ", ".join(heldout) if isinstance(heldout, Mapping) else "no names" if heldout is not None else "none"
        raise ValueError(f"label: expected held-out rows with {label!r}, got {got}")


def check_parts(methods: Mapping[str, Method], kept: Checkpoint) -> None:
    """Raise a ValueError where two methods would have one folder."""
    folders: dict[Any, str] = {}
    for name in methods:
        other = folders.setdefault(kept.part(name).folder, name)
        if other != name:
            raise ValueError(f"methods: expected names that differ in their letters and digits, got {other}, {name}")
