r"""One step of a fit: loss, gradients and the move of the parameters, eagerly or as one program."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBO
from pyro.infer.util import zero_grads
from pyro.optim import PyroLRScheduler, PyroOptim
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from inference.compiler.block import SMALL, STEPS, Block
from inference.compiler.capture import Untraceable
from inference.compiler.objective import Compiled
from inference.compiler.update import Adam
from inference.core.bound import BoundPair, unconstrained
from inference.core.contracts import Objective
from inference.optim import Joint
from inference.result import dotted

WINDOW, PACE = 100, 0.5
"""Steps, and seconds, after which a program is asked at the latest whether all was finite."""


Rows = Tensor | None


Loss = float | tuple[float, ...] | Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Failure:
    """A step whose loss or gradients are not finite, its parameters and its sites by name."""

    step: int
    parameters: list[str]
    sites: list[str]


@dataclass
class EagerSteps:
    """Steps by any Pyro optimizer; the objective may be a compiled one."""

    bound: BoundPair
    model: Callable[..., Any]
    objective: ELBO
    optimizer: PyroOptim
    taken: int = 0
    failure: Failure | None = None
    last: dict[str, Tensor] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return self.objective.state if isinstance(self.objective, Compiled) else "eager"

    def __call__(self, rows: Rows) -> Loss:
        """Take a step, unless its loss or its gradients are not finite."""
        arguments = self.bound.arguments(rows)
        loss, params = gradients(self.objective, self.model, self.bound.guide, arguments)
        culprits = _not_finite(loss, params)
        if culprits is not None:
            self.failure = Failure(self.taken, culprits, _sites_not_finite(self.bound, arguments))
            with torch.no_grad():
                for n, p in self.last.items():
                    params[n].copy_(p)
            return loss
        self._remember(params)
        self.optimizer(list(params.values()))
        if isinstance(self.optimizer, PyroLRScheduler):
            self.optimizer.step()
        zero_grads(params.values())
        self.taken += 1
        return loss

    def _remember(self, params: dict[str, Tensor]) -> None:
        """Keep the parameters at which all was finite: the step from them may lead astray."""
        if self.last.keys() != params.keys():
            self.last = {n: torch.empty_like(p) for n, p in params.items()}
        with torch.no_grad():
            torch._foreach_copy_(list(self.last.values()), [params[n] for n in self.last])

    def check(self, now: bool = False) -> Failure | None:
        """What was not finite, if anything."""
        return self.failure


@dataclass
class CompiledSteps:
    """Steps of Adam on a half cosine inside the program; checked for what is not finite from time to time.

    The steps since the last check can be run again with their own noise, to name what was not finite. Small work on
    all rows runs many steps a call, unless each step is to be looked at (``single``).
    """

    bound: BoundPair
    model: Callable[..., Any]
    objective: Compiled
    rate: float
    count: int
    single: bool = False
    adam: Adam | None = None
    done: int = 0
    start: int = 0
    window: list[Rows] = field(default_factory=list)
    checked: float = field(default_factory=perf_counter)
    _same: tuple[Any, list[Tensor]] | None = None
    _block: Block | None = None
    _ahead: deque[float] = field(default_factory=deque)

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return "fused" if self._block else self.objective.state

    def __call__(self, rows: Rows) -> Loss:
        """Take a step; after one that is not finite nothing moves."""
        if not self.window and not self._ahead:
            self.random, self.start = get_rng_state(), self.done
        self.window.append(rows)
        if self._ahead:
            return self._ahead.popleft()
        if self._block is not None and self.count - self.done >= STEPS:
            try:
                self._ahead.extend(self._block())
                self.done += STEPS
                return self._ahead.popleft()
            except Untraceable as error:
                self.objective.give_up(str(error))
                self._same = self._block = None
        self.done += 1
        return self._step(rows)

    def check(self, now: bool = False) -> Failure | None:
        """What was not finite, as far as it is known: ``now``, or when many steps or much time have passed."""
        pause = self._ahead or (len(self.window) < WINDOW and perf_counter() - self.checked < PACE)
        if (pause and not now) or self.adam is None:
            return None
        self.checked = perf_counter()
        good = int(self.adam.good)
        if good == self.done:
            self.window = []
            return None
        with pyro.validation_enabled(False):
            return self._find(good)

    def _find(self, good: int) -> Failure:
        """Run the steps since the last check again, up to the one that failed, and name what is not finite."""
        assert self.adam is not None
        set_rng_state(self.random)
        seen = [*self.window, *[None] * len(self._ahead)]
        for rows in seen[: good - self.start]:
            self._step(rows)
        arguments = self.bound.arguments(seen[good - self.start])
        noise = get_rng_state()
        sites = _sites_not_finite(self.bound, arguments)
        set_rng_state(noise)
        loss, params = gradients(self.objective.objective, self.model, self.bound.guide, arguments)
        culprits = _not_finite(loss, params) or []
        with torch.no_grad():
            self.adam.back(self._params())
        return Failure(good, culprits, sites)

    def _compiled(self, program: Any, inputs: list[Tensor], rows: Rows) -> bool:
        """Compile a new program: many steps of small work on all rows, or the one step."""
        if program.calls:
            return True
        numbers = sum(t.numel() for t in inputs)
        on_cpu = all(t.device.type == "cpu" for t in inputs)
        if rows is None and not self.single and numbers <= SMALL and on_cpu and self.count - self.done > STEPS:
            try:
                self._block = Block(program, inputs)
                return True
            except Untraceable:
                pass
        try:
            program.fuse(inputs)
            program.hold_against_eager(program.call)
        except Untraceable as error:
            self.objective.give_up(str(error))
        return self.objective.state != "eager"

    def _step(self, rows: Rows) -> Loss:
        if self._same is not None and not self._same[0].due():
            return self._same[0].losses(self._same[1])
        arguments = self.bound.arguments(rows)
        if self.adam is not None:
            program, inputs = self.objective.prepare(self.model, self.bound.guide, (), arguments, self.adam)
            if program is not None and self._compiled(program, inputs, rows):
                # All rows at every step: the inputs are the same tensors each time.
                self._same = (program, inputs) if rows is None else None
                return program.losses(inputs)
            self._same = None
        loss, params = gradients(self.objective.objective, self.model, self.bound.guide, arguments)
        if self.adam is None:
            self.adam = Adam(params, self.rate, self.count)
        found = [params[n].grad if n in params else None for n in self.adam.names]
        with torch.no_grad():
            self.adam(self._params(), found, torch.as_tensor(np.sum(loss)))
        for p in params.values():
            p.grad = None
        return loss

    def _params(self) -> list[Tensor]:
        store = pyro.get_param_store()._params
        return [store[n] for n in (self.adam.names if self.adam else ())]


def by_adam(
    bound: BoundPair, model: Any, objective: ELBO, rate: float, steps: int, mode: str, single: bool = False
) -> EagerSteps | CompiledSteps:
    """Steps of Adam whose learning rate falls from ``rate`` to a hundredth of it on a half cosine."""
    if mode == "fused" and not Objective.of(objective).cycle:
        return CompiledSteps(bound, model, Compiled(objective, fuse=False), rate, steps, single)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = Joint(
        torch.optim.Adam, {"lr": rate}, schedule=lambda adam: schedule(adam, max(steps, 1), eta_min=rate / 100)
    )
    chosen = objective if mode == "eager" else Compiled(objective, fuse=mode == "fused")
    return EagerSteps(bound, model, chosen, optimizer)


def gradients(
    objective: ELBO, model: Callable[..., Any], guide: Callable[..., Any] | None, arguments: dict[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Loss of an objective as a number or numbers, and the parameters that it met, with their gradients."""
    with poutine.trace(param_only=True) as capture:
        loss = objective.loss_and_grads(model, guide, **arguments)  # type: ignore[attr-defined]
    params = unconstrained(capture.trace)
    if not params:
        raise ValueError("pair: expected parameters to fit, got none in model and guide; use steps=0")
    if isinstance(loss, tuple):
        return tuple(map(float, loss)), params
    return float(loss), params


def _not_finite(loss: Any, params: dict[str, Tensor]) -> list[str] | None:
    """Names of the parameters whose gradients are not finite; None when all is well."""
    found = {n: p.grad for n, p in params.items() if p.grad is not None}
    norms = torch._foreach_norm(list(found.values())) if found else []
    if np.isfinite(loss).all() and all(torch.stack(list(norms)).isfinite().tolist() if norms else []):
        return None
    return sorted(dotted(n) for n, g in found.items() if not g.isfinite().all())


def _sites_not_finite(bound: BoundPair, arguments: dict[str, Any]) -> list[str]:
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(bound.guide).get_trace(**arguments)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(**arguments)
        found = []
        for trace in (guide, model):
            trace.compute_log_prob()
            scores = {n: torch.as_tensor(v["log_prob"]) for n, v in trace.nodes.items() if v["type"] == "sample"}
            found += [n for n, score in scores.items() if not score.isfinite().all()]
    return list(dict.fromkeys(found))
