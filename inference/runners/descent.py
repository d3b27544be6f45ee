r"""The steps of a fit, from the first to the last: their losses, their end, and their checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.checkpoint import Checkpoint
from inference.compiler.step import numbers
from inference.core.bound import BoundPair
from inference.core.group import Agreement, from_first, gathered, ranks
from inference.core.handlers import called_by_exclusive, threads_set
from inference.core.minibatch import PERMUTED_ROWS, Permutation
from inference.core.progress import Bar, bar
from inference.diagnostics.losses import settled as is_settled
from inference.runners.base import interrupts_deferred
from inference.runners.state import of_rank, own_state
from inference.runners.steps import CHECK_STEPS, CompiledSteps, EagerSteps, Failure
from inference.runners.work import threads_by_work

AHEAD_ROWS = 65_536
"""Rows of many whose order is computed at once."""


class Descent:
    """A fit in the middle of its steps.

    Args:
        steps: How a step is taken.
        batches: Rows of each step.
        name: Name of the fit, for the progress bar and warnings.
        started: When it began.
    """

    def __init__(self, steps: EagerSteps | CompiledSteps, batches: Minibatches, name: str, started: float) -> None:
        self.steps, self.batches, self.name = steps, batches, name
        self.losses: list[Any] = []
        self.over = ""
        self._started, self._before = started, 0.0
        self._setup: float | None = None
        self._kept: Checkpoint | None = None
        self._threads: int | None = None
        self._agree = Agreement()

    def resume(self, kept: Checkpoint, asked: Mapping[str, Any]) -> None:
        """Keep a checkpoint from now on, and go on from where it is."""
        self._kept = kept
        held = from_first(lambda: kept.begin(asked))
        if held is None:
            return
        if ranks()[0]:
            held["steps"] = of_rank(held["steps"], held["others"][ranks()[0] - 1])
        self._threads = held["threads"]
        # A program is made for a number of threads; the first step has validated the model.
        with threads_set(held["threads"]), pyro.validation_enabled(False):
            self.steps.resume(held["steps"])
        self.batches.resume(held["batches"])
        self.losses, self.over = _losses_of(held["losses"]), held["over"]
        self._setup, self._before = held["setup"], held["seconds"]

    def descend(self, count: int, patience: int | None, progress: bool) -> tuple[np.ndarray, str]:
        """Take the steps; return the losses of those that were finite, and why the fit ended early."""
        losses, first, failure, ended, agreed = self.losses, not self.losses, None, "", False
        validate = first and pyro.settings.get("validate_distributions_pyro")
        shown = bar(count, self.name, shown=progress and ranks()[0] == 0, initial=len(losses))
        validated = pyro.validation_enabled(validate)
        with (
            shown,
            warnings.catch_warnings(),
            validated,
            interrupts_deferred() as interrupts,
            threads_by_work(self._threads) as call,
        ):
            # Pyro's warning of a loss that is not finite; ours names the step, the sites and the parameters.
            warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
            try:
                while len(losses) < count and not self.over:
                    taken = call(self.steps.advance, self.batches)
                    losses += taken
                    if first:
                        # One validated step finds errors in the model; later ones are checked for finite numbers.
                        pyro.enable_validation(False)
                    if len(losses) % CHECK_STEPS == 0:
                        losses[-CHECK_STEPS:] = map(_read, losses[-CHECK_STEPS:])
                    settled = bool(patience) and _settled(losses, patience or 0)
                    keeps, stops = self._agree(len(losses), self._due, interrupts.pressed)
                    ends = settled or len(losses) == count
                    failure = self.steps.check(now=ends or first or keeps, compare=ends or first)
                    if failure is not None:
                        break
                    first, self._setup = False, self.elapsed if self._setup is None else self._setup
                    _show(shown, losses, len(taken))
                    if ends or keeps:
                        self._keep(over=ends)
                    if stops:
                        agreed = True
                        raise KeyboardInterrupt
                    if settled:
                        break
            except KeyboardInterrupt:
                # A second Ctrl-C, or a handler of the user's, may fall between a step and the record of it.
                if agreed and self._kept is not None and self.steps.check(now=True, compare=False) is None:
                    self._keep()
                if called_by_exclusive() or interrupts.pressed > 1:
                    raise
                failure = self.steps.check(now=True)
                ended = f"interrupted at step {len(losses)} of {count}"
                warnings.warn(f"{self.name} {ended}", stacklevel=4)
        if failure is not None:
            _give_up(self.name, failure)
            losses = losses[: failure.step]
            ended = f"stopped at step {failure.step} of {count}, where loss or gradient is not finite"
        return np.array([_read(x) for x in losses], dtype=float), ended

    @property
    def how(self) -> str:
        """How steps run, or ran where all had been taken: ``eager``, ``traced`` or ``fused``."""
        return self.over or self.steps.how

    @property
    def elapsed(self) -> float:
        """Seconds that the fit has taken, in all its parts."""
        return self._before + perf_counter() - self._started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds until the first step was done, and of the others."""
        setup, elapsed = self._setup, self.elapsed
        return {"setup": elapsed, "run": 0.0} if setup is None else {"setup": setup, "run": elapsed - setup}

    @property
    def _due(self) -> bool:
        return self._kept is not None and self._kept.due

    def _keep(self, over: bool = False) -> None:
        """Write the checkpoint; the steps were found to be finite."""
        if self._kept is None:
            return
        steps = self.steps.state()
        others = gathered(own_state(steps))[1:]
        if ranks()[0] == 0:
            held = {
                "steps": steps,
                "others": others,
                "batches": self.batches.state(),
                "losses": np.array([_read(x) for x in self.losses], dtype=float),
                "setup": self._setup,
                "threads": torch.get_num_threads(),
                "seconds": self.elapsed,
                "over": self.steps.how if over else "",
            }
            self._kept.write(held)


class Minibatches(Iterator[Tensor | None]):
    """Rows of each step, drawn from a random state of their own: a step that is run again has its noise again.

    The processes of a group draw the same rows and take a share each.
    """

    def __init__(self, bound: BoundPair, batch: int | None) -> None:
        self._bound, self._batch = bound, batch
        # In a group all rows are those of all processes.
        alone = batch is not None or ranks()[1] == 1
        self._whole = None if alone else _share_of(torch.arange(bound.rows, device=bound.device))
        self._random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self._part: Callable[[int], Tensor] | None = None
        self._start, self._taken = self._random.get_state(), 0

    def __next__(self) -> Tensor | None:
        if self._batch is None:
            return self._whole
        if self._part is None or self._taken == -(-self._bound.rows // self._batch):
            self._shuffle()
        assert self._part is not None
        self._taken += 1
        return _share_of(self._part(self._taken - 1))

    def state(self) -> dict[str, Any]:
        """The random state before this epoch, and the number of its minibatches that were taken."""
        return {"random": self._start, "taken": self._taken}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._random.set_state(state["random"])
        if state["taken"]:
            self._shuffle()
            self._taken = state["taken"]

    def _shuffle(self) -> None:
        self._start, self._taken = self._random.get_state(), 0
        rows = self._bound.rows
        if rows <= PERMUTED_ROWS:
            order = torch.randperm(rows, generator=self._random).to(self._bound.device)
            self._part = order.split(self._batch or 1).__getitem__
            return
        permutation, size = Permutation(rows, self._random), self._batch or 1
        # Those of several minibatches at once: they cost little more than those of one.
        ahead = max(1, AHEAD_ROWS // size)

        @lru_cache(maxsize=1)
        def parts(k: int) -> tuple[Tensor, ...]:
            places = torch.arange(k * ahead * size, min((k + 1) * ahead * size, rows))
            return permutation(places).to(self._bound.device).split(size)

        self._part = lambda k: parts(k // ahead)[k % ahead]


def _share_of(rows: Tensor) -> Tensor:
    """The rows of this process."""
    rank, count = ranks()
    return rows if count == 1 else rows.tensor_split(count)[rank]


def _show(shown: Bar, losses: list[Any], taken: int) -> None:
    """Move the progress bar, with a new loss after every twenty steps."""
    shown.advance(taken)
    if (len(losses) - 1) % 20 < taken and not shown.disable:
        shown.set_postfix(loss=f"{sum(numbers(losses[-1])):.5g}", refresh=False)


def _read(loss: Any) -> Any:
    """A loss as one number or several: keeping a small tensor from every step would fragment memory."""
    return tuple(numbers(loss)) if isinstance(loss, tuple) else float(loss)


def _give_up(name: str, failure: Failure) -> None:
    text = f"{name}: loss or gradient is not finite at step {failure.step}"
    if failure.sites:
        text += f"; sites {', '.join(failure.sites)}"
    if failure.parameters:
        text += f"; gradients of {', '.join(failure.parameters[:5])}"
    hint = "try a lower learning_rate, and check the data and the scale of the priors"
    if failure.step == 0:
        raise FloatingPointError(f"{text}; {hint}")
    warnings.warn(f"{text}; the parameters before it are returned; {hint}", stacklevel=5)


def _settled(losses: list[Any], patience: int) -> bool:
    """Whether the fit may stop: asked once after every ``patience`` steps."""
    if len(losses) < 2 * patience or len(losses) % patience:
        return False
    return is_settled(np.array([sum(numbers(x)) for x in losses[-2 * patience :]]))


def _losses_of(held: Any) -> list[Any]:
    """Losses from an array (steps,) or (steps, k): numbers or tuples of them."""
    values = np.asarray(held, dtype=float)
    return values.tolist() if values.ndim < 2 else [tuple(row) for row in values.tolist()]
