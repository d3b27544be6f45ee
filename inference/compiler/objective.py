r"""``Compiled``: an objective that runs as one program.

It is an objective itself, so it works in a user's plain ``pyro.infer.SVI`` as Pyro's JitTrace_ELBO does, around any
objective.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor
from torch.autograd.function import once_differentiable

from inference.compiler import policy
from inference.compiler.capture import Gradients, Untraceable
from inference.compiler.step import Call, TracedStep, Update, split_arguments
from inference.core.contracts import Objective


class Compiled(ELBO):
    r"""An objective whose loss and gradients are one compiled program.

    The first call of each shape runs eagerly, which creates the parameters and validates the model; the second traces.

    Args:
        objective: Any objective: a subclass of ``pyro.infer.elbo.ELBO`` with ``loss_and_grads``.
        fuse: Whether to compile the graph; otherwise it runs as traced.

    Attributes:
        reason: Why calls run eagerly from now on; None where they need not.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> pyro.set_rng_seed(0)
        >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), loss=Compiled(Trace_ELBO()))
        >>> losses = [svi.step(torch.tensor([1.0, 2.0, 3.0])) for _ in range(300)]
        >>> print(sum(losses[-100:]) < sum(losses[:100]))
        True
    """

    def __init__(self, objective: ELBO, *, fuse: bool = True) -> None:
        if not hasattr(objective, "loss_and_grads"):
            kind = type(objective).__name__
            raise TypeError(f"objective: expected an ELBO with loss_and_grads, got {kind}")
        if Objective.of(objective).shares_rows:
            raise TypeError(
                "objective: expected Shared(Compiled(...)), for a program runs in one process; got the reverse"
            )
        self.objective = objective
        self.fuse = fuse
        self._programs: dict[Any, TracedStep | None] = {}
        self.reason: str | None = None
        self._changes: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        """What the objective has, such as ``num_particles`` or ``compute_marginals``."""
        if name == "objective":
            raise AttributeError(name)
        return getattr(self.objective, name)

    @property
    def state(self) -> str:
        """How calls run: ``fused``, ``traced`` or ``eager``."""
        if self.reason or not any(self._programs.values()):
            return "eager"
        return "fused" if any(p and p.fused for p in self._programs.values()) else "traced"

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss without gradients, eagerly."""
        return self.objective.loss(model, guide, *args, **kwargs)  # type: ignore[attr-defined]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss as a number, or a tuple of numbers; gradients are accumulated in the parameters."""
        program, inputs = self.prepare(model, guide, args, kwargs)
        if program is None:
            return _as_numbers(self.objective.loss_and_grads(model, guide, *args, **kwargs))  # type: ignore[attr-defined]
        losses, gradients = self._run(program, inputs)
        for p, g in zip(inputs, gradients, strict=False):
            if g is not None:
                p.grad = g if p.grad is None else p.grad.add_(g)
            elif program.turning:
                # A zero gradient would still move the parameter, through the optimizer's momentum.
                p.grad = None
        program.turn(self.objective)
        return _as_numbers(losses)

    @property
    def differentiable_loss(self) -> Callable[..., Any]:
        """The loss as a tensor that can be differentiated once, by the parameters, if the objective has one.

        ``Compiled(elbo)(model, guide)`` calls it. Where an argument requires a gradient, and at the first call, it runs
        eagerly.
        """
        return partial(self._differentiable, self.objective.differentiable_loss)  # type: ignore[attr-defined]

    def _differentiable(self, eager: Callable[..., Any], model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        differentiated = any(t.requires_grad for t in split_arguments(args, kwargs)[0])
        program, inputs = (None, []) if differentiated else self.prepare(model, guide, args, kwargs)
        if program is None or not program.single or not torch.is_grad_enabled():
            return eager(model, guide, *args, **kwargs)
        loss, gradients = self._run(program, inputs)
        present = [(p, g) for p, g in zip(inputs, gradients, strict=False) if g is not None]
        program.turn(self.objective)
        return _Loss.apply(loss, len(present), *(g for _, g in present), *(p for p, _ in present))

    def _run(self, program: TracedStep, inputs: list[Tensor]) -> tuple[Any, Gradients]:
        if am_i_wrapped():
            program.declare()
        return program(inputs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    def prepare(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], update: Update | None = None
    ) -> tuple[TracedStep | None, list[Tensor]]:
        """The program for these arguments, or None if this call has to run eagerly, and its inputs."""
        if self.reason:
            return None, []
        call = Call(self.objective, model, guide, *split_arguments(args, kwargs))
        try:
            key = call.key()
            hash(key)
        except TypeError as error:
            self.give_up(f"an argument is neither a tensor nor hashable ({error})")
            return None, []
        if key not in self._programs:
            # The first call runs eagerly and creates the parameters.
            self._programs[key] = None
            if len(self._programs) > policy.MAX_TRACES:
                self.give_up(
                    f"more than {policy.MAX_TRACES} programs: an argument or an attribute that is no tensor changes"
                )
            return None, []
        program = self._programs[key]
        try:
            if program is None or not program.lives() or self._lost(program):
                program = self._programs[key] = TracedStep(call, update)
                if self.fuse:
                    program.fuse(program.inputs(call))
            inputs = program.inputs(call)
            if program.due():
                program.compare_with_eager(call)
        except Untraceable as error:
            self.give_up(str(error))
            return None, []
        return program, inputs

    def compare(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any], update: Update | None = None
    ) -> None:
        """Compare the program for these arguments, if there is one, with the eager objective; warn if they differ."""
        if self.reason:
            return
        call = Call(self.objective, model, guide, *split_arguments(args, kwargs))
        program = self._programs.get(call.key())
        if program is None or program.compared > program.calls:
            return
        try:
            program.compare_with_eager(call)
        except Untraceable as error:
            self.give_up(str(error))

    def forget(self) -> None:
        """Trace all programs again when they are next asked for."""
        self._programs = dict.fromkeys(self._programs)

    def _lost(self, program: TracedStep) -> bool:
        """Whether a value outside the run has changed so that a program is not valid any more."""
        names = program.follow()
        self._changes.update(names)
        often = [n for n in names if self._changes[n] > policy.MAX_TRACES]
        if often:
            raise Untraceable(
                f"{often[0]} changes again and again: make it an argument, or a tensor that is changed in place"
            )
        return bool(names)

    def give_up(self, reason: str) -> None:
        """Run eagerly from now on, with a warning that gives the reason."""
        self.reason = reason
        kind = type(self.objective).__name__
        warnings.warn(f"{kind} runs eagerly from now on, because it cannot be compiled: {reason}", stacklevel=5)


class _Loss(torch.autograd.Function):
    """A loss whose gradients by the parameters are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, None, *[None] * len(gradients), *[outer * g for g in gradients]


def _as_numbers(losses: Any) -> Any:
    """Losses as Pyro's objectives return them: a number or a tuple of them."""
    return tuple(map(float, losses)) if isinstance(losses, tuple) else float(losses)
