r"""Steps of a fit: loss, gradients and the update of the parameters, eagerly or as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from torch import Tensor

from inference.compiler import policy
from inference.compiler.block import Block
from inference.compiler.capture import Untraceable
from inference.compiler.objective import Compiled
from inference.compiler.update import Adam
from inference.core.bound import BoundPair, unconstrained
from inference.core.contracts import Objective
from inference.core.handlers import random_state, set_random_state
from inference.core.private import copy_all, norms
from inference.optim import Joint
from inference.result import dotted

CHECK_STEPS, CHECK_SECONDS = 100, 0.5
"""Steps, or seconds, after which a program is asked whether all its steps were finite."""


Rows = Tensor | None


Loss = float | tuple[float, ...] | Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Failure:
    """The first step whose loss or gradients are not finite, with the parameters and sites concerned."""

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
    done: int = 0
    failure: Failure | None = None
    last: dict[str, Tensor] = field(default_factory=dict)
    _arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return self.objective.state if isinstance(self.objective, Compiled) else "eager"

    def advance(self, batches: Iterator[Rows]) -> list[Loss]:
        """Take one step and return its loss; nothing if loss or gradients are not finite, and no step is taken."""
        arguments = self._arguments = self.bound.arguments(next(batches))
        loss, params = gradients(self.objective, self.model, self.bound.guide, arguments)
        culprits = _not_finite(loss, params)
        if culprits is not None:
            self.failure = Failure(self.done, culprits, _sites_not_finite(self.bound, arguments))
            with torch.no_grad():
                for n, p in self.last.items():
                    params[n].copy_(p)
            return []
        self._remember(params)
        self.optimizer(list(params.values()))
        if isinstance(self.optimizer, PyroLRScheduler):
            self.optimizer.step()
        zero_grads(params.values())
        self.done += 1
        return [loss]

    def _remember(self, params: dict[str, Tensor]) -> None:
        """Keep the last parameters with finite loss and gradients, to return to if the step from them fails."""
        if self.last.keys() != params.keys():
            self.last = {n: torch.empty_like(p) for n, p in params.items()}
        with torch.no_grad():
            copy_all(list(self.last.values()), [params[n] for n in self.last])

    def check(self, now: bool = False) -> Failure | None:
        """The step that was not finite, if there was one; looked at ``now``, at the end, a program is compared too."""
        if now and self.failure is None and isinstance(self.objective, Compiled):
            self.objective.compare(self.model, self.bound.guide, (), self._arguments)
        return self.failure


@dataclass
class CompiledSteps:
    """Steps of Adam with a cosine schedule inside the program, checked now and then for what is not finite.

    After a step that is not finite the parameters stay as they are. The steps since the last check can be repeated with
    the same noise, to name what was not finite. A small program on all rows takes blocks of steps, unless every step is
    to be looked at (``single``).
    """

    bound: BoundPair
    model: Callable[..., Any]
    objective: Compiled
    rate: float
    count: int
    single: bool = False
    adam: Adam | None = None
    done: int = 0
    checked: int = 0
    checked_at: float = field(default_factory=perf_counter)
    _random: Any = None  # the random state at the last check
    _batches: list[Tensor] = field(default_factory=list)  # minibatches since then
    _same: tuple[Any, list[Tensor]] | None = None
    _block: Block | None = None

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return "fused" if self._block else self.objective.state

    def advance(self, batches: Iterator[Rows]) -> list[Loss]:
        """Take one step, or a block of them, and return their losses."""
        if self.done == self.checked:
            self._random, self._batches = random_state(), []
        losses: list[Loss] = [*self._take_block()]
        if not losses:
            rows = next(batches)
            losses = [self._step(rows)]
            if rows is not None:
                self._batches.append(rows)
        self.done += len(losses)
        return losses

    def check(self, now: bool = False) -> Failure | None:
        """The first step that was not finite, if there was one; looks ``now``, or if enough steps or time have passed.

        Looking waits for an accelerator to finish its work.
        """
        early = self.done - self.checked < CHECK_STEPS and perf_counter() - self.checked_at < CHECK_SECONDS
        if (early and not now) or self.adam is None:
            return None
        self.checked_at = perf_counter()
        good = int(self.adam.good)
        if good >= self.done:
            self.checked = self.done
            if now:
                self._compare()
            return None
        with pyro.validation_enabled(False):
            return self._find(good)

    def _compare(self) -> None:
        """Compare the program with the eager objective: a fit is asked ``now`` when it ends."""
        rows = self._batches[-1] if self._batches else None
        self.objective.compare(self.model, self.bound.guide, (), self.bound.arguments(rows), self.adam)

    def _find(self, good: int) -> Failure:
        """Repeat the steps since the last check, up to the one that failed, and name what is not finite."""
        assert self.adam is not None
        set_random_state(self._random)
        for step in range(self.checked, good):
            self._step(self._rows_of(step))
        arguments = self.bound.arguments(self._rows_of(good))
        noise = random_state()
        sites = _sites_not_finite(self.bound, arguments)
        set_random_state(noise)
        loss, params = gradients(self.objective.objective, self.model, self.bound.guide, arguments)
        culprits = _not_finite(loss, params) or []
        with torch.no_grad():
            self.adam.back(self._params())
        return Failure(good, culprits, sites)

    def _rows_of(self, step: int) -> Rows:
        return self._batches[step - self.checked] if self._batches else None

    def _take_block(self) -> list[float]:
        """Take a block of steps; none where there is no block, or fewer steps are left."""
        if self._block is None or self.count - self.done < policy.BLOCK_STEPS:
            return []
        try:
            return self._block()
        except Untraceable as error:
            self.objective.give_up(str(error))
            self._same = self._block = None
            return []

    def _compiled(self, program: Any, inputs: list[Tensor], rows: Rows) -> bool:
        """Compile a new program, as blocks of steps or step by step; return False if steps have to run eagerly."""
        if program.calls:
            return True
        numbers = sum(t.numel() for t in inputs)
        on_cpu = all(t.device.type == "cpu" for t in inputs)
        blocks = rows is None and not self.single and on_cpu
        if blocks and policy.worth_a_block(numbers, self.count - self.done - 1):
            try:
                self._block = Block(program, inputs)
                return True
            except Untraceable:
                pass
        try:
            program.fuse(inputs)
            program.compare_with_eager(program.call)
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
                # With all rows in every step the inputs are the same tensors each time.
                self._same = (program, inputs) if rows is None else None
                return program.losses(inputs)
            self._same = None
        loss, params = gradients(self.objective.objective, self.model, self.bound.guide, arguments)
        if self.adam is None:
            self.adam = Adam(params, self.rate, self.count)
        grads = [params[n].grad if n in params else None for n in self.adam.names]
        with torch.no_grad():
            self.adam(self._params(), grads, torch.as_tensor(np.sum(loss)))
        for p in params.values():
            p.grad = None
        return loss

    def _params(self) -> list[Tensor]:
        store = pyro.get_param_store()._params
        return [store[n] for n in (self.adam.names if self.adam else ())]


def by_adam(
    bound: BoundPair, model: Any, objective: ELBO, rate: float, steps: int, mode: str, single: bool = False
) -> EagerSteps | CompiledSteps:
    """Steps of Adam whose learning rate falls from ``rate`` to a hundredth of it along half a cosine."""
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
    """Loss of an objective as one number or several, and its parameters with their gradients."""
    with poutine.trace(param_only=True) as capture:
        loss = objective.loss_and_grads(model, guide, **arguments)  # type: ignore[attr-defined]
    params = unconstrained(capture.trace)
    if not params:
        raise ValueError("pair: expected parameters to fit, got none in model and guide; use steps=0")
    if not any(p.requires_grad for p in params.values()):
        named = ", ".join(map(dotted, list(params)[:5]))
        raise ValueError(
            f"pair: expected parameters that require gradients, got only frozen ones ({named}); use steps=0"
        )
    if isinstance(loss, tuple):
        return tuple(map(float, loss)), params
    return float(loss), params


def _not_finite(loss: Any, params: dict[str, Tensor]) -> list[str] | None:
    """Names of the parameters whose gradients are not finite; None if the loss and all gradients are finite."""
    grads = {n: p.grad for n, p in params.items() if p.grad is not None}
    # Stacked: an accelerator is waited for once.
    finite = all(torch.stack(list(norms(list(grads.values())))).isfinite().tolist()) if grads else True
    if finite and np.isfinite(loss).all():
        return None
    return sorted(dotted(n) for n, g in grads.items() if not g.isfinite().all())


def _sites_not_finite(bound: BoundPair, arguments: dict[str, Any]) -> list[str]:
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(bound.guide).get_trace(**arguments)
        model = poutine.trace(poutine.replay(bound.model, trace=guide)).get_trace(**arguments)
        names = []
        for trace in (guide, model):
            trace.compute_log_prob()
            scores = {n: torch.as_tensor(v["log_prob"]) for n, v in trace.nodes.items() if v["type"] == "sample"}
            names += [n for n, score in scores.items() if not score.isfinite().all()]
    return list(dict.fromkeys(names))
