r"""What a run is asked for, as JSON: a checkpoint is of one run, and goes on when the same is asked for again."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim

from inference.compiler.closure import code_of, is_plain
from inference.core.bound import BoundPair
from inference.core.packing import fingerprints
from inference.runners.state import own_modules, plain_of


def asked_of(bound: BoundPair, **settings: Any) -> dict[str, Any]:
    """What a run is asked for: the pair, its data and settings, as JSON.

    Of functions it holds a hash of their code, with the numbers and strings that they take from defaults, closures and
    globals; of modules their public attributes that are numbers and strings.
    """
    shown = {n: v if v is None or isinstance(v, bool | int | float | str) else str(v) for n, v in settings.items()}
    plain = {n: repr(v) for n, v in bound.data.items() if is_plain(v)}
    halves = {"model": bound.model, "guide": bound.guide}
    return {
        "pair": bound.name,
        "sites": {n: list(s.shape) for n, s in bound.sites.items()},
        "data": {**bound.fingerprints(), **plain},
        **{f"code of the {n}": code_of(half) for n, half in halves.items() if half is not None},
        "attributes": {f"{k}.{n}": v for k, m in enumerate(own_modules(bound)) for n, v in plain_of(m).items()},
        "dtype": str(torch.get_default_dtype()),
        "device": str(bound.device),
        **shown,
    }


def networks_of(bound: BoundPair) -> dict[str, Any]:
    """Fingerprints of the parameters and buffers of a pair's modules, which chains leave as they are."""
    return fingerprints({n: v for m in bound.modules for n, v in m.state_dict().items()})


def named(what: Any) -> str:
    """An objective, an optimizer, or a factory of a kernel as text: its name and its plain settings."""
    given = dict(getattr(what, "keywords", None) or getattr(what, "__dict__", {}))
    if isinstance(what, PyroOptim):
        # Joint has one optimizer, and Pyro's own one for each parameter.
        names = ("clip_norm", "clip_value", "schedule", "kwargs")
        given = {n: v for n, v in vars(what).items() if n.startswith("pt_") or n in names}
    # Pyro writes the nesting that it finds into its objectives.
    hidden = {*getattr(what, "cycle", ()), "max_plate_nesting"}
    shown = {n: _named_value(v) for n, v in sorted(given.items()) if n not in hidden and n[0] != "_"}
    function = getattr(what, "func", what)
    kind = getattr(function, "__name__", type(function).__name__)
    if isinstance(function, FunctionType):
        kind = f"{kind} {code_of(function)}"
    return f"{kind}({', '.join(f'{n}={v}' for n, v in shown.items() if v is not None)})"


def _named_value(value: Any) -> str | None:
    if is_plain(value):
        return repr(value)
    if isinstance(value, ELBO | FunctionType | partial):
        return named(value)
    return value.__name__ if isinstance(value, type) else None
