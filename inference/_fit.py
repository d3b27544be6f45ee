r"""``fit``: stochastic gradient steps on any objective.

An objective is a subclass of ``pyro.infer.elbo.ELBO``: ``loss_and_grads(model, guide, *args, **kwargs)`` returns the
loss and leaves the gradients, by which the optimizer moves the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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

from inference.compiler import policy
from inference.compiler.denormals import subnormals_flushed
from inference.compiler.objective import Compiled
from inference.compiler.step import numbers
from inference.core.bound import BoundPair, bind, enumerate_finite
from inference.core.checks import check_count, check_one_of, check_positive
from inference.core.contracts import Objective
from inference.core.handlers import called_by_exclusive, exclusive, isolated
from inference.diagnostics.losses import settled as is_settled
from inference.draws import scoring
from inference.idata import STORED
from inference.result import GuideDraws, Posterior, Result, conclude
from inference.runners.base import interrupts_deferred
from inference.runners.steps import CHECK_STEPS, CompiledSteps, EagerSteps, Failure, by_adam
from inference.runners.work import threads_by_work

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
        rows = _minibatches(bound, batch)
        plan = _plan(bound, chosen, optimizer, learning_rate, steps, patience, compile)
        with subnormals_flushed():
            losses, first, ended = _descend(plan, steps, rows, patience, f"fit of {bound.name}", progress)
        trained = perf_counter()
        setup = (first or trained) - started
        seconds = {"setup": setup, "run": trained - started - setup}
        return _conclude(whole, chosen, plan.how, losses, draws, seconds, ended)


def _descend(
    steps: EagerSteps | CompiledSteps,
    count: int,
    batches: Iterator[Tensor | None],
    patience: int | None,
    name: str,
    progress: bool,
) -> tuple[np.ndarray, float | None, str]:
    """Take the steps; return the losses of those that were finite, when the first was done, and why it ended early."""
    losses: list[Any] = []
    validate, first, failure, ended = pyro.settings.get("validate_distributions_pyro"), None, None, ""
    bar = tqdm(total=count, desc=name, disable=None if progress else True, leave=False)
    validated = pyro.validation_enabled(validate)
    with bar, warnings.catch_warnings(), validated, interrupts_deferred() as interrupts, threads_by_work() as call:
        # Pyro's warning of a loss that is not finite; ours names the step, the sites and the parameters.
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        try:
            while len(losses) < count:
                taken = call(steps.advance, batches)
                losses += taken
                if first is None:
                    # One validated step finds errors in the model; later steps are checked for finite numbers alone.
                    pyro.enable_validation(False)
                if len(losses) % CHECK_STEPS == 0:
                    losses[-CHECK_STEPS:] = map(_read, losses[-CHECK_STEPS:])
                settled = bool(patience) and _settled(losses, patience or 0)
                failure = steps.check(now=settled or first is None or len(losses) == count)
                if failure is not None:
                    break
                first = first or perf_counter()
                _show(bar, losses, len(taken))
                interrupts()
                if settled:
                    break
        except KeyboardInterrupt:
            if called_by_exclusive() or interrupts.pressed > 1:
                raise
            ended = f"interrupted at step {len(losses)} of {count}"
            warnings.warn(f"{name} {ended}", stacklevel=4)
            failure = steps.check(now=True)
    if failure is not None:
        _give_up(name, failure)
        losses = losses[: failure.step]
        ended = f"stopped at step {failure.step} of {count}, where loss or gradient is not finite"
    return np.array([_read(x) for x in losses], dtype=float), first, ended


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


def _minibatches(bound: BoundPair, batch: int | None) -> Iterator[Tensor | None]:
    """Rows of each step, drawn from a random state of their own: a step that is run again has its noise again."""
    random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    while True:
        if batch is None:
            yield None
        else:
            yield from torch.randperm(bound.rows, generator=random).to(bound.device).split(batch)


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
