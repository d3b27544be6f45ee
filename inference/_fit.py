r"""``fit``: stochastic gradient steps on any objective.

An objective is a subclass of ``pyro.infer.elbo.ELBO``: ``loss_and_grads(model, guide, *args, **kwargs)`` returns the
loss and leaves the gradients, by which the optimizer moves the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from inference import checkpoint as checkpoints
from inference.checkpoint import Checkpoint
from inference.compiler import policy
from inference.compiler.denormals import subnormals_flushed
from inference.compiler.objective import Compiled
from inference.compiler.step import numbers
from inference.core.bound import BoundPair, bind, enumerate_finite
from inference.core.checks import check_count, check_one_of, check_positive
from inference.core.contracts import Objective
from inference.core.handlers import REFUSALS, called_by_exclusive, exclusive, isolated, preserved_rng
from inference.diagnostics.losses import settled as is_settled
from inference.draws import scoring
from inference.idata import STORED
from inference.result import GuideDraws, Posterior, Result, conclude
from inference.runners.base import interrupts_deferred, threads_set
from inference.runners.steps import CHECK_STEPS, CompiledSteps, EagerSteps, Failure, by_adam
from inference.runners.work import threads_by_work
from inference.saved import make_parameters

LEARNING_RATE = 0.02
"""Initial learning rate of pairs that say nothing."""


@exclusive
def fit(
    pair: Any,
    data: Any = None,
    objective: ELBO | Callable[[], ELBO] | None = None,
    *,
    steps: int = 2000,
    batch: int | None = None,
    optimizer: PyroOptim | None = None,
    learning_rate: float | None = None,
    patience: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    compile: bool | str = "auto",
    device: str | torch.device | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> Result:
    r"""Fit a guide, and the parameters of a model, by stochastic gradient steps on an objective.

    Modules are trained in place: fitting the same pair again continues from its present parameters. The global
    parameter store is left as it was. During the fit subnormal numbers (below 1e-38 in float32) count as zero.

    Args:
        pair: A pair, or a ``(model, guide)`` tuple of Pyro functions.
        data: A tensor, array or frame (the model's first argument) or a mapping of names to them. Floats of arrays and
            frames take the precision of the model's numbers; whole numbers and booleans become floats where the model
            does not take them as they are.
        objective: An ELBO or a factory of one. Default: Trace_ELBO; TraceEnum_ELBO where finite sites are summed out
            (the guide leaves them out, or marks them for enumeration); TraceGraph_ELBO where the guide draws discrete
            sites.
        steps: Number of steps; 0 takes the guide as it is.
        batch: Minibatch size. Rows are drawn without replacement in each epoch; the last minibatch of an epoch may be
            smaller. Data with one entry per element of the plate of rows are cut, others stay whole. Default: all rows.
        optimizer: A Pyro optimizer (``Joint`` holds one torch optimizer over all parameters); its schedule, if it has
            one, advances at each step. Default: Adam with a learning rate that falls from ``learning_rate`` to a
            hundredth of it on a half cosine, inside the program where the steps are compiled.
        learning_rate: Initial rate of the default schedule, in units of the unconstrained parameters. Default: the
            pair's own (``pair.learning_rate``: 0.002 for a VAE), or 0.02.
        patience: Stop when the mean loss of the last ``patience`` steps is not below that of the ``patience`` steps
            before by more than its standard error. Default: never.
        draws: Number of posterior draws to keep.
        seed: Seed of all randomness. The global random state is left as it was.
        compile: True: run each step as one compiled program. "auto": trace it, or compile it too, where the number of
            steps is worth the cost; ``idata.attrs["execution"]`` says what was chosen. False: run as Pyro does.
        device: Where to run, such as "cuda". The modules of the pair are moved there, in place, and so are the data;
            tensors that a plain function makes itself are its own affair. Draws and parameters of the Result are on
            the CPU. Default: where pair and data are.
        checkpoint: A folder that holds where the fit is, renewed every half minute (``Checkpoint(folder, every=...)``:
            as often as you say). Called again with the same arguments, ``fit`` goes on from there, and returns what it
            would have returned; a fit that was finished is not repeated. Default: none.
        progress: Show a progress bar with the running loss on a terminal.

    Returns:
        A Result. An interrupt (Ctrl-C), or a loss or gradient that is not finite, ends the fit early with the last good
        parameters and a warning; ``result.ended`` and the diagnosis say so. The step that is under way, or its
        compilation, is finished first; a second Ctrl-C raises KeyboardInterrupt at once, and so does the first one in
        ``compare`` and other functions that are :func:`exclusive`.

    Raises:
        ValueError: An argument does not fit the pair or the data.
        FloatingPointError: The loss is not finite at the first step.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> result = fit((model, AutoNormal(model)), torch.tensor([1.0, 2.0, 3.0]), steps=500, progress=False)
        >>> print(f"{result.draws['mu'].mean():.1f}", *result.idata.children)
        2.0 posterior posterior_predictive log_likelihood observed_data
    """
    if callable(objective) and not isinstance(objective, ELBO):
        objective = objective()
    if isinstance(objective, Compiled):
        objective, compile = objective.objective, compile if compile is False else True
    whole = bind(pair, data, device)
    if learning_rate is None:
        learning_rate = whole.asked.learning_rate or LEARNING_RATE
    probe = {} if objective is None else Objective.of(objective).probe
    bound = replace(whole, data={**whole.data, **probe}, memo={}) if probe else whole
    _check(
        bound,
        steps=steps,
        batch=batch,
        draws=draws,
        patience=patience,
        optimizer=optimizer,
        learning_rate=learning_rate,
        compile=compile,
    )
    asked = Objective.of(Trace_ELBO() if objective is None else objective)
    asked.check(bound)
    if batch is not None and asked.all_rows:
        raise ValueError(f"batch: {type(objective).__name__} expected all rows at every step: {asked.all_rows}")
    if asked.has_posterior:
        _check_guide(bound)
    started = perf_counter()
    # A caller's no_grad would leave every parameter where it is.
    with isolated(seed), torch.enable_grad():
        chosen = _objective(bound, objective)
        asked_for = checkpoints.asked_of(
            bound,
            method="fit",
            objective=checkpoints.named(chosen),
            steps=steps,
            batch=batch,
            optimizer=optimizer and checkpoints.named(optimizer),
            learning_rate=learning_rate,
            patience=patience,
            seed=seed,
            compile=compile,
        )
        rows = _Minibatches(bound, batch)
        plan = _plan(bound, chosen, optimizer, learning_rate, steps, patience, compile)
        run = _Run(plan, rows, Checkpoint.of(checkpoint), f"fit of {bound.name}")
        with subnormals_flushed():
            run.begin(asked_for, started)
            losses, ended = _descend(run, steps, patience, progress)
        if not steps:
            with preserved_rng(), suppress(*REFUSALS):
                make_parameters(whole)
        return _conclude(whole, chosen, run.how, losses, draws, run.seconds, ended)


class _Run:
    """A fit in the middle of its steps, and its checkpoint."""

    def __init__(
        self, steps: EagerSteps | CompiledSteps, batches: _Minibatches, kept: Checkpoint | None, name: str
    ) -> None:
        self.steps, self.batches, self.kept, self.name = steps, batches, kept, name
        self.losses: list[Any] = []
        self.setup: float | None = None
        self.over = ""
        self.threads: int | None = None

    def begin(self, asked: Mapping[str, Any], started: float) -> None:
        """Start the clock, and go on where the checkpoint is."""
        self._started, self._before = started, 0.0
        held = None if self.kept is None else self.kept.begin(asked)
        if held is not None:
            self.threads = held["threads"]
            # A program is made for a number of threads; the first step has validated the model.
            with threads_set(self.threads or 1), pyro.validation_enabled(False):
                self.steps.resume(held["steps"])
            self.batches.resume(held["batches"])
            self.losses, self.over = checkpoints.losses_of(held["losses"]), held["over"]
            self.setup, self._before = held["setup"], held["seconds"]

    @property
    def how(self) -> str:
        """How steps run, or ran where all had been taken: ``eager``, ``traced`` or ``fused``."""
        return self.over or self.steps.how

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, in all its parts."""
        return self._before + perf_counter() - self._started

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds until the first step was done, and of the others."""
        setup, elapsed = self.setup, self.elapsed
        return {"setup": elapsed, "run": 0.0} if setup is None else {"setup": setup, "run": elapsed - setup}

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.kept is not None and self.kept.due

    def keep(self, over: bool = False) -> None:
        """Write the checkpoint; the steps were found to be finite."""
        if self.kept is not None:
            held = {
                "steps": self.steps.state(),
                "batches": self.batches.state(),
                "losses": np.array([_read(x) for x in self.losses], dtype=float),
                "setup": self.setup,
                "threads": torch.get_num_threads(),
                "seconds": self.elapsed,
                "over": self.steps.how if over else "",
            }
            self.kept.write(held)


def _descend(run: _Run, count: int, patience: int | None, progress: bool) -> tuple[np.ndarray, str]:
    """Take the steps; return the losses of those that were finite, and why the fit ended early."""
    steps, name, losses = run.steps, run.name, run.losses
    first, failure, ended = not losses, None, ""
    validate = first and pyro.settings.get("validate_distributions_pyro")
    bar = tqdm(total=count, initial=len(losses), desc=name, disable=None if progress else True, leave=False)
    validated = pyro.validation_enabled(validate)
    with (
        bar,
        warnings.catch_warnings(),
        validated,
        interrupts_deferred() as interrupts,
        threads_by_work(run.threads) as call,
    ):
        # Pyro's warning of a loss that is not finite; ours names the step, the sites and the parameters.
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        try:
            while len(losses) < count and not run.over:
                taken = call(steps.advance, run.batches)
                losses += taken
                if first:
                    # One validated step finds errors in the model; later steps are checked for finite numbers alone.
                    pyro.enable_validation(False)
                if len(losses) % CHECK_STEPS == 0:
                    losses[-CHECK_STEPS:] = map(_read, losses[-CHECK_STEPS:])
                settled, keeps = bool(patience) and _settled(losses, patience or 0), run.due
                ends = settled or len(losses) == count
                failure = steps.check(now=ends or first or keeps, compare=ends or first)
                if failure is not None:
                    break
                first, run.setup = False, run.elapsed if run.setup is None else run.setup
                _show(bar, losses, len(taken))
                if ends or keeps:
                    run.keep(over=ends)
                interrupts()
                if settled:
                    break
        except KeyboardInterrupt:
            if interrupts.pressed == 1 and run.kept is not None and steps.check(now=True, compare=False) is None:
                run.keep()
            if called_by_exclusive() or interrupts.pressed > 1:
                raise
            failure = steps.check(now=True)
            ended = f"interrupted at step {len(losses)} of {count}"
            warnings.warn(f"{name} {ended}", stacklevel=4)
    if failure is not None:
        _give_up(name, failure)
        losses = losses[: failure.step]
        ended = f"stopped at step {failure.step} of {count}, where loss or gradient is not finite"
    return np.array([_read(x) for x in losses], dtype=float), ended


def _show(bar: Any, losses: list[Any], taken: int) -> None:
    """Move the progress bar, with a new loss after every twenty steps."""
    bar.update(taken)
    if (len(losses) - 1) % 20 < taken and not bar.disable:
        bar.set_postfix(loss=f"{sum(numbers(losses[-1])):.5g}", refresh=False)


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


class _Minibatches(Iterator[Tensor | None]):
    """Rows of each step, drawn from a random state of their own: a step that is run again has its noise again."""

    def __init__(self, bound: BoundPair, batch: int | None) -> None:
        self._bound, self._batch = bound, batch
        self._random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self._parts: list[Tensor] = []
        self._start, self._taken = self._random.get_state(), 0

    def __next__(self) -> Tensor | None:
        if self._batch is None:
            return None
        if self._taken == len(self._parts):
            self._shuffle()
        self._taken += 1
        return self._parts[self._taken - 1]

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
        order = torch.randperm(self._bound.rows, generator=self._random).to(self._bound.device)
        self._parts = list(order.split(self._batch or 1))


def _plan(
    bound: BoundPair,
    objective: ELBO,
    optimizer: PyroOptim | None,
    learning_rate: float,
    steps: int,
    patience: int | None,
    compile: bool | str,
) -> EagerSteps | CompiledSteps:
    """How to take the steps: whole ones inside a program for the default optimizer, else the objective alone."""
    mode = policy.execution_of_fit(steps, compile)
    model = enumerate_finite(bound) if Objective.of(objective).sums_out else bound.model
    if optimizer is None:
        return by_adam(bound, model, objective, learning_rate, steps, mode, single=patience is not None)
    chosen = objective if mode == "eager" else Compiled(objective, fuse=mode == "fused")
    return EagerSteps(bound, model, chosen, optimizer)


def _objective(bound: BoundPair, chosen: ELBO | None) -> ELBO:
    if chosen is None:
        if bound.summed:
            return TraceEnum_ELBO(max_plate_nesting=bound.depth)
        discrete = any(bound.sites[n].units for n in bound.guided)
        return TraceGraph_ELBO() if discrete else Trace_ELBO()
    if not isinstance(chosen, ELBO):
        raise TypeError(f"objective: expected an ELBO or a factory of one, got {type(chosen).__name__}")
    if bound.enumerated and bound.observes and not Objective.of(chosen).sums_out:
        named, kind = ", ".join(bound.enumerated), type(chosen).__name__
        raise ValueError(f"objective: {kind} cannot sum out {named}; expected TraceEnum_ELBO")
    return chosen


def _check(
    bound: BoundPair,
    *,
    steps: int,
    batch: int | None,
    draws: int,
    patience: int | None,
    optimizer: PyroOptim | None,
    learning_rate: float,
    compile: Any,
) -> None:
    check_positive("learning_rate", learning_rate)
    check_one_of("compile", compile, (True, False, "auto"))
    for name, value, least in (("steps", steps, 0), ("draws", draws, 1), ("patience", patience or 2, 2)):
        check_count(name, value, least)
    if bound.guide is None:
        raise ValueError("pair: expected a guide beside the model; give a (model, guide) tuple, or use sample()")
    if optimizer is not None and not isinstance(optimizer, PyroOptim):
        raise TypeError(f"optimizer: expected a pyro.optim.PyroOptim, got {type(optimizer).__name__}")
    if batch is None:
        return
    if not bound.takes_rows:
        raise ValueError("batch: expected a model with the arguments size and rows (their plate's), got one without")
    if not isinstance(batch, int) or not 1 <= batch <= bound.rows:
        raise ValueError(f"batch: expected 1 to {bound.rows} (the rows of the data), got {batch!r}")


def _check_guide(bound: BoundPair) -> None:
    """Raise a ValueError unless the guide draws the model's latent sites, except those that are summed out."""
    if bound.unguided:
        named = ", ".join(bound.unguided)
        raise ValueError(
            f"guide: expected all latent sites of the model, got none named {named}; draw it in the guide (from its "
            "prior, if that is meant)"
        )
    if bound.alien:
        observed = [n for n in bound.alien if n in bound.select("observed")]
        why = "which the model observes" if observed else 'or ones with infer={"is_auxiliary": True}'
        raise ValueError(f"guide: expected latent sites of the model, got {', '.join(observed or bound.alien)}, {why}")


def _conclude(
    bound: BoundPair,
    objective: ELBO,
    execution: str,
    losses: np.ndarray,
    draws: int,
    seconds: dict[str, float],
    ended: str,
) -> Result:
    kind, asked = type(objective).__name__, Objective.of(objective)

    def make() -> Posterior | Sequence[str]:
        if not asked.has_posterior:
            return asked.advise(bound, losses)
        values, density = scoring.sample_guide(bound, _affordable(bound, draws))
        return Posterior(values, density=density)

    more = GuideDraws(bound, "" if asked.has_posterior else kind)
    method = f"SVI ({kind})" if asked.has_posterior else kind
    return conclude(bound, make, more, seconds, method=method, execution=execution, losses=losses, ended=ended)


def _affordable(bound: BoundPair, draws: int) -> int:
    width = sum(torch.Size(bound.sites[n].shape).numel() for n in bound.guided)
    kept = max(1, min(draws, 10 * STORED // max(width, 1)))
    if kept < draws:
        warnings.warn(f"{bound.name}: kept {kept} of {draws} draws ({width:,} numbers each)", stacklevel=4)
    return kept
