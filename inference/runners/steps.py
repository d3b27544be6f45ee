r"""Steps of a fit: loss, gradients and the update of the parameters, eagerly or as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from inference.core.bound import BoundPair
from inference.core.contracts import Objective
from inference.core.group import ranks
from inference.core.handlers import random_state, set_random_state
from inference.core.private import copy_all, norms
from inference.core.sites import unconstrained
from inference.objectives.shared import Shared, over_processes
from inference.optim import Joint, check_rates
from inference.result import dotted
from inference.runners.state import put, take

CHECK_STEPS, CHECK_SECONDS = 100, 0.5
"""Steps, or seconds, after which a program is asked whether all its steps were finite."""


Rows = Tensor | None


Opening = tuple[int | None, tuple[Any, ...]]
"""Rows of a minibatch (None: all rows) and the turn of an objective: what the first step of its like is known by."""


Loss = float | tuple[float, ...] | Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Failure:
    """The first step whose loss or gradients are not finite, with the parameters and sites concerned."""

    step: int
    parameters: list[str]
    sites: list[str]


@dataclass
class EagerSteps:
    """Steps by any Pyro optimizer; the objective may be a compiled one, and shared among processes."""

    bound: BoundPair
    model: Callable[..., Any]
    objective: ELBO
    optimizer: PyroOptim
    done: int = 0
    failure: Failure | None = None
    last: dict[str, Tensor] = field(default_factory=dict)
    _rows: Rows = None
    _arguments: dict[str, Any] = field(default_factory=dict)
    _openings: dict[Opening, None] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)  # parameters that wait to appear again

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return "eager" if self.compiled is None else self.compiled.state

    @property
    def own(self) -> ELBO:
        """The objective on the rows of this process alone."""
        return self.objective.objective if isinstance(self.objective, Shared) else self.objective

    @property
    def compiled(self) -> Compiled | None:
        """The compiled objective, if it is one."""
        return self.own if isinstance(self.own, Compiled) else None

    @property
    def inner(self) -> ELBO:
        """The objective that is not compiled."""
        return self.own.objective if isinstance(self.own, Compiled) else self.own

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, besides the rows of minibatches."""
        return {
            **take(self.bound, self.inner, self.pending),
            "done": self.done,
            # What no parameter has taken up since the run went on is the optimizer's too.
            "optimizer": {**self.optimizer._state_waiting_to_be_consumed, **self.optimizer.get_state()},
            "openings": list(self._openings),
            "eager": None if self.compiled is None else self.compiled.reason,
            "last": self.last,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for rows, turns in state["openings"]:
            # Parameters, players and programs of the optimizer are made in the order of the first run.
            vars(self.inner).update(zip(Objective.of(self.inner).cycle, turns, strict=True))
            arguments = self.bound.arguments(_first_rows(self.bound, rows))
            self._openings[rows, turns] = None
            params = gradients(self.own, self.model, self.bound.guide, arguments)[1]
            self.optimizer(list(params.values()))
            zero_grads(params.values())
        if not isinstance(self.optimizer, Joint):
            # Pyro's take a state up when they see a parameter for the first time.
            self.optimizer.optim_objs.clear()
        self.optimizer.set_state(state["optimizer"])
        self.pending = put(state, self.bound, self.inner)
        self.done, self.last = state["done"], {n: v.to(self.bound.device) for n, v in state["last"].items()}
        if self.compiled is not None:
            self.compiled.reason = state["eager"]

    def advance(self, batches: Iterator[Rows]) -> list[Loss]:
        """Take one step and return its loss; nothing if loss or gradients are not finite, and no step is taken."""
        rows = next(batches)
        turns = tuple(getattr(self.inner, n) for n in Objective.of(self.inner).cycle)
        if rows is None or len(rows):
            # A process whose share of a small minibatch is empty does not run the objective.
            self._openings[None if rows is None else len(rows), turns] = None
        if rows is None or rows is not self._rows:
            self._rows, self._arguments = rows, self.bound.arguments(rows)
        arguments = self._arguments
        loss, params = gradients(self.objective, self.model, self.bound.guide, arguments)
        culprits = _not_finite(loss, params)
        if culprits is not None:
            self.failure = Failure(self.done, culprits, _sites_not_finite(self.bound, arguments))
            with torch.no_grad():
                for n, p in self.last.items():
                    params[n].copy_(p)
            return []
        self._remember(params)
        if not self.done:
            check_rates(self.optimizer, params.values())
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

    def check(self, now: bool = False, compare: bool = True) -> Failure | None:
        """The step that was not finite, if there was one; looked at ``now``, at the end, a program is compared too."""
        if now and compare and self.failure is None and self.compiled is not None:
            self.compiled.compare(self.model, self.bound.guide, (), self._arguments)
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
    _openings: dict[int | None, None] = field(default_factory=dict)  # rows of steps that were prepared
    pending: dict[str, Tensor] = field(default_factory=dict)  # parameters that wait to appear again

    @property
    def how(self) -> str:
        """How steps run: ``eager``, ``traced`` or ``fused``."""
        return "fused" if self._block else self.objective.state

    def state(self) -> dict[str, Any]:
        """All that later steps depend on, besides the rows of minibatches; asked for after a check."""
        adam = self.adam
        return {
            **take(self.bound, self.objective.objective, self.pending),
            "done": self.done,
            "optimizer": None if adam is None else {"names": adam.names, "tensors": adam.changing},
            "openings": list(self._openings),
            "block": self._block is not None,
            "eager": self.objective.reason,
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        openings = [_first_rows(self.bound, rows) for rows in state["openings"]]
        if state["optimizer"] is not None:
            first = self.bound.arguments(openings[0] if openings else None)
            params = gradients(self.objective.objective, self.model, self.bound.guide, first)[1]
            # Those that appeared later are as large as they were.
            held = state["parameters"]
            named = {n: params.get(n, held[n].to(self.bound.device)) for n in state["optimizer"]["names"]}
            self.adam = Adam(named, self.rate, self.count)
            with torch.no_grad():
                for now, then in zip(self.adam.changing, state["optimizer"]["tensors"], strict=True):
                    now.copy_(then)
            for p in params.values():
                p.grad = None
        self._openings = dict.fromkeys(state["openings"])
        for rows in openings:
            self.objective.prepare(self.model, self.bound.guide, (), self.bound.arguments(rows), self.adam)
        self.pending = put(state, self.bound, self.objective.objective)
        self.done = self.checked = state["done"]
        self.objective.reason = state["eager"]
        if state["block"]:
            whole = self.bound.arguments(None)
            program, inputs = self.objective.prepare(self.model, self.bound.guide, (), whole, self.adam)
            if program is None:
                raise ValueError("checkpoint: its steps were compiled, and this objective cannot be")
            self._block, self._same = Block(program, inputs), (program, inputs)
            program.calls = self.done - 1

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

    def check(self, now: bool = False, compare: bool = True) -> Failure | None:
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
            if now and compare:
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
            self._openings[None if rows is None else len(rows)] = None
            program, inputs = self.objective.prepare(self.model, self.bound.guide, (), arguments, self.adam)
            if program is not None and self._compiled(program, inputs, rows):
                # With all rows in every step the inputs are the same tensors each time.
                self._same = (program, inputs) if rows is None else None
                return program.losses(inputs)
            self._same = None
        loss, params = gradients(self.objective.objective, self.model, self.bound.guide, arguments)
        if self.adam is None:
            self.adam = Adam(params, self.rate, self.count)
        late = {n: p for n, p in params.items() if n not in self.adam.names}
        if late:
            self.adam.extend(late)
            self.objective.forget()
            self._same = None
        grads = [params[n].grad if n in params else None for n in self.adam.names]
        with torch.no_grad():
            self.adam(self._params(), grads, torch.as_tensor(np.sum(loss)))
        for p in params.values():
            p.grad = None
        return loss

    def _params(self) -> list[Tensor]:
        store = pyro.get_param_store()._params
        # One that has not appeared since the run went on has no gradient, and rests.
        return [store[n] if n in store else self.pending[n] for n in (self.adam.names if self.adam else ())]


def _first_rows(bound: BoundPair, count: int | None) -> Rows:
    return None if count is None else torch.arange(count, device=bound.device)


def by_adam(
    bound: BoundPair, model: Any, objective: ELBO, rate: float, steps: int, mode: str, single: bool = False
) -> EagerSteps | CompiledSteps:
    """Steps of Adam whose learning rate falls from ``rate`` to a hundredth of it along half a cosine."""
    # Processes sum their gradients between a program and the update, which can then be no part of it.
    if mode == "fused" and not Objective.of(objective).cycle and ranks()[1] == 1:
        return CompiledSteps(bound, model, Compiled(objective, fuse=False), rate, steps, single)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = Joint(
        torch.optim.Adam, {"lr": rate}, schedule=lambda adam: schedule(adam, max(steps, 1), eta_min=rate / 100)
    )
    chosen = objective if mode == "eager" else Compiled(objective, fuse=mode == "fused")
    return EagerSteps(bound, model, over_processes(chosen), optimizer)


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
