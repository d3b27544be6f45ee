r"""All that later steps of a fit depend on, besides its optimizer: taken for a checkpoint, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBO
from torch import Tensor

from inference.checkpoint import CheckpointError
from inference.compiler.closure import reachable
from inference.compiler.reads import is_library
from inference.core.bound import BoundPair
from inference.core.contracts import Objective
from inference.core.handlers import random_state, set_random_state
from inference.saved import dotted


def take(bound: BoundPair, objective: ELBO, pending: Mapping[str, Tensor]) -> dict[str, Any]:
    """Parameters, buffers, numbers of the modules, the state of an objective, and the random state, as they are now.

    Args:
        bound: The pair and its data.
        objective: The objective.
        pending: Parameters that have not appeared since the run went on, as :func:`put` returned them.
    """
    store = pyro.get_param_store()._params
    modules = reachable(bound.model, bound.guide, *_modules_of(objective))
    return {
        "parameters": {**pending, **{n: v.detach() for n, v in store.items()}},
        "buffers": _buffers(modules),
        "numbers": [plain_of(m) for m in own_modules(bound, *_modules_of(objective))],
        "objective": _attributes(objective),
        "random": random_state(),
    }


def _modules_of(objective: ELBO) -> list[torch.nn.Module]:
    return [v for v in vars(objective).values() if isinstance(v, torch.nn.Module)]


def _buffers(modules: Sequence[torch.nn.Module]) -> dict[str, Tensor]:
    """Buffers of each module's own, by its number and their name."""
    return {f"{k}.{n}": b for k, m in enumerate(modules) for n, b in m.named_buffers(recurse=False)}


def put(held: Mapping[str, Any], bound: BoundPair, objective: ELBO) -> dict[str, Tensor]:
    """Put what :func:`take` has taken into the parameters, buffers and attributes that there are.

    Returns:
        Unconstrained values of parameters that are not there. Each leaves this mapping, and gets its value, when a step
        asks for it, until the end of the scope of the parameter store.

    Raises:
        CheckpointError: A parameter or buffer has another shape, or a module has one more or less.
    """
    modules = reachable(bound.model, bound.guide, *_modules_of(objective))
    store, then = pyro.get_param_store(), dict(held["parameters"])
    owned = {dotted(n) for m in modules for n, _ in m.named_parameters()}
    for name in [n for n in store._params if n not in then and dotted(n) not in owned]:
        # Made by a row that the run has not seen.
        del store[name]
    pending = {n: then.pop(n).to(bound.device) for n in list(then) if n not in store and dotted(n) not in owned}
    for what, now, values in (("parameter", store._params, then), ("buffer", _buffers(modules), held["buffers"])):
        for name in {**values, **now}:
            wanted, got = (tuple(d[name].shape) if name in d else "none" for d in (values, now))
            if wanted != got:
                told = f"a {what} {dotted(name)} of shape {wanted}, and the pair {got}"
                raise CheckpointError(f"checkpoint: it holds {told}")
        with torch.no_grad():
            for name, value in values.items():
                # One that was expanded cannot be written to.
                if not torch.equal(now[name].cpu(), value):
                    now[name].copy_(value)
    _hand_out(pending)
    for module, numbers in zip(own_modules(bound, *_modules_of(objective)), held["numbers"], strict=True):
        vars(module).update(numbers)
    _assign(objective, held["objective"])
    set_random_state(held["random"])
    return pending


def _hand_out(pending: dict[str, Tensor]) -> None:
    """Let the parameter store give a parameter its pending value when it is made."""
    store = pyro.get_param_store()
    enter = store.setdefault

    def setdefault(name: str, value: Any, *constraint: Any, **named: Any) -> Any:
        made = enter(name, value, *constraint, **named)
        if name not in pending:
            return made
        with torch.no_grad():
            store._params[name].copy_(pending.pop(name))
        return store[name]

    if pending:
        # ``isolated`` takes it away with its own.
        store.setdefault = setdefault  # type: ignore[assignment, method-assign]


def _attributes(objective: ELBO) -> dict[str, Any]:
    """Attributes of an objective that steps may change, and those of the objectives that it has."""
    asked = Objective.of(objective)
    inner = {n: _attributes(v) for n, v in vars(objective).items() if isinstance(v, ELBO)}
    tensors = {n: v for n, v in vars(objective).items() if isinstance(v, Tensor)}
    return {"plain": asked.constants(), "tensors": tensors, "inner": inner}


def _assign(objective: ELBO, held: Mapping[str, Any]) -> None:
    own = vars(objective)
    own.update(held["plain"])
    for name, value in held["tensors"].items():
        now = own.get(name)
        if isinstance(now, Tensor) and (now.shape, now.dtype) == (value.shape, value.dtype):
            now.copy_(value)
        else:
            own[name] = value.to(now.device) if isinstance(now, Tensor) else value
    for name, inner in held["inner"].items():
        _assign(own[name], inner)


def own_modules(bound: BoundPair, *more: Any) -> list[torch.nn.Module]:
    """Modules that a pair uses, in closures too, whose classes are neither Pyro's nor torch's."""
    return [m for m in reachable(bound.model, bound.guide, *more) if not is_library(type(m).__module__)]


def plain_of(module: torch.nn.Module) -> dict[str, Any]:
    """Public attributes of a module that are numbers and strings."""
    held = {n: v for n, v in vars(module).items() if not n.startswith("_") and n != "training"}
    return {n: v for n, v in held.items() if isinstance(v, bool | int | float | str)}


OWN = ("buffers", "numbers", "objective", "random", "openings", "eager")
"""Parts of the state of the steps that each process of a group has for itself."""


def own_state(steps: Mapping[str, Any]) -> dict[str, Any]:
    """What a process of a group has for itself of the state of its steps."""
    baselines = {n: v for n, v in steps["parameters"].items() if n.startswith("__baseline")}
    return {"parameters": baselines, **{n: steps[n] for n in OWN}}


def of_rank(steps: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The state of the steps of another process than the first, from that of the first and its own."""
    return {**steps, **own, "parameters": {**steps["parameters"], **own["parameters"]}}
