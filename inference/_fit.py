r"""``fit``: stochastic gradient steps on any objective.

An objective is a subclass of ``pyro.infer.elbo.ELBO``: ``loss_and_grads(model, guide, *args, **kwargs)`` returns the
loss and leaves the gradients, by which the optimizer moves the parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim

from inference.checkpoint import Checkpoint
from inference.compiler import policy
from inference.compiler.denormals import subnormals_flushed
from inference.compiler.objective import Compiled
from inference.core.bound import BoundPair, bind, bind_by_rows, enumerate_finite
from inference.core.checks import check_count, check_one_of, check_positive, made_of
from inference.core.contracts import Objective
from inference.core.group import check_same, from_first, part_ways, ranks
from inference.core.handlers import (
    REFUSALS,
    exclusive,
    isolated,
    preserved_rng,
    random_state,
    set_random_state,
)
from inference.core.precision import PRECISIONS, with_precision
from inference.draws import scoring
from inference.further import GuideDraws
from inference.groups import STORED
from inference.objectives.shared import Shared, over_processes
from inference.optim import check_rates
from inference.result import Posterior, Result, conclude
from inference.runners.asked import asked_of, named
from inference.runners.descent import Descent, Minibatches
from inference.runners.steps import CompiledSteps, EagerSteps, by_adam
from inference.saved import make_parameters

LEARNING_RATE = 0.02
"""Initial learning rate of pairs that say nothing."""
NETWORK_RATE = 0.002
"""The same where model and guide hold networks."""
NETWORK_LAYERS = 2
"""Layers from which they do: one layer is a linear map."""


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
    precision: str | None = None,
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> Result:
    r"""Fit a guide, and the parameters of a model, by stochastic gradient steps on an objective.

    Modules are trained in place: fitting the same pair again continues from its present parameters. The global
    parameter store is left as it was. During the fit subnormal numbers (below 1e-38 in float32) count as zero.

    Args:
        pair: A pair, or a ``(model, guide)`` tuple of Pyro functions.
        data: A tensor or array (the model's first argument), a mapping of names to them, or a frame. Columns of a
            frame with the name of an argument are that argument, the others together the first one; a column of type
            category becomes codes, and its names coordinates of the plate of its name. Floats of arrays and frames take
            the precision of the model's numbers; whole numbers and booleans become floats where the model does not take
            them as they are.
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
            pair's own (``pair.learning_rate``), or 0.002 where model and guide hold networks (two or more layers of
            torch's modules, autoguides apart), or 0.02.
        patience: Stop when the mean loss of the last ``patience`` steps is not below that of the ``patience`` steps
            before by more than its standard error. Default: never.
        draws: Number of posterior draws to keep.
        seed: Seed of all randomness. The global random state is left as it was.
        compile: True: run each step as one compiled program. "auto": trace it, or compile it too, where the number of
            steps is worth the cost; ``idata.attrs["execution"]`` says what was chosen. False: run as Pyro does.
        device: Where to run, such as "cuda". The modules of the pair are moved there, in place, and so are the data;
            tensors that a plain function makes itself are its own affair. Draws and parameters of the Result are on
            the CPU. Default: where pair and data are.
        precision: "bfloat16": mixed precision. Linear and convolutional layers multiply in bfloat16, in model and
            guide, while the steps are taken; their outputs are float32 again, and so are parameters, log densities,
            sums and the optimizer. Draws, and all that is computed from the Result, are in float32. Default: the
            precision of the parameters.
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
    made = None if objective is None else made_of("objective", objective, ELBO, "an ELBO or a factory of one")
    if isinstance(made, Shared):
        made = made.objective
    if isinstance(made, Compiled):
        made, compile = made.objective, compile if compile is False else True
    whole = bind(pair, data, device) if batch is None else bind_by_rows(pair, data, device)
    probe = {} if made is None else Objective.of(made).probe
    bound = replace(whole, data={**whole.data, **probe}, memo={}) if probe else whole
    _check(
        bound,
        steps=steps,
        batch=batch,
        draws=draws,
        patience=patience,
        optimizer=optimizer,
        learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
        compile=compile,
    )
    check_one_of("precision", precision, PRECISIONS)
    bound = with_precision(bound, precision)
    asked = Objective.of(Trace_ELBO() if made is None else made)
    asked.check(bound)
    if batch is not None and asked.all_rows:
        raise ValueError(f"batch: {type(made).__name__} expected all rows at every step: {asked.all_rows}")
    if asked.has_posterior:
        _check_guide(bound)
    if learning_rate is None:
        learning_rate = bound.asked.learning_rate or _rate(bound, asked)
    _check_group(bound, asked, batch, steps=steps, seed=seed, learning_rate=learning_rate, patience=patience)
    started = perf_counter()
    kept = Checkpoint.of(checkpoint)
    with isolated(seed), kept or nullcontext():
        chosen = _objective(bound, made)
        plan = _plan(bound, chosen, optimizer, learning_rate, steps, patience, compile)
        run = Descent(plan, Minibatches(bound, batch), f"fit of {bound.name}", started)
        part_ways()
        with subnormals_flushed():
            if kept is not None:
                kind = {"method": "fit", "objective": named(chosen), "optimizer": optimizer and named(optimizer)}
                lengths: dict[str, Any] = {
                    "steps": steps,
                    "batch": batch,
                    "learning_rate": learning_rate,
                    "patience": patience,
                }
                if precision is not None:
                    lengths["precision"] = precision
                if ranks()[1] > 1:
                    lengths["processes"] = ranks()[1]
                run.resume(kept, asked_of(bound, **kind, **lengths, seed=seed, compile=compile))
            losses, ended = run.descend(steps, patience, progress)
        set_random_state(from_first(random_state))
        if not steps or plan.pending:
            # Those that no step has made, or made again since the fit went on.
            with preserved_rng(), suppress(*REFUSALS):
                make_parameters(whole)
        if plan.pending:
            warnings.warn(
                f"{run.name}: left out parameters that did not appear again: {', '.join(plan.pending)}", stacklevel=3
            )
        return _conclude(whole, chosen, run.how, losses, draws, run.seconds, ended)


def _rate(bound: BoundPair, asked: Objective) -> float:
    """The default learning rate of a pair that says nothing of its own."""
    # A guide that is no posterior was not run by the checks either.
    layers = bound.layers + (bound.guide_layers if asked.has_posterior else 0)
    return NETWORK_RATE if layers >= NETWORK_LAYERS else LEARNING_RATE


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
    return EagerSteps(bound, model, over_processes(chosen), optimizer)


def _objective(bound: BoundPair, chosen: ELBO | None) -> ELBO:
    if chosen is None:
        if bound.summed:
            return TraceEnum_ELBO(max_plate_nesting=bound.depth)
        discrete = any(bound.sites[n].units for n in bound.guided)
        return TraceGraph_ELBO() if discrete else Trace_ELBO()
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
    for name, value, least in (("steps", steps, 0), ("draws", draws, 1)):
        check_count(name, value, least)
    if patience is not None:
        check_count("patience", patience, 2)
    if bound.guide is None:
        raise ValueError("pair: expected a guide beside the model; give a (model, guide) tuple, or use sample()")
    if optimizer is not None and not isinstance(optimizer, PyroOptim):
        raise TypeError(f"optimizer: expected a pyro.optim.PyroOptim, got {type(optimizer).__name__}")
    if optimizer is not None:
        check_rates(optimizer)
    if batch is None:
        return
    if not bound.takes_rows:
        raise ValueError("batch: expected a model with the arguments size and rows (their plate's), got one without")
    if not isinstance(batch, int) or not 1 <= batch <= bound.rows:
        raise ValueError(f"batch: expected 1 to {bound.rows} (the rows of the data), got {batch!r}")


def _check_group(bound: BoundPair, asked: Objective, batch: int | None, **settings: Any) -> None:
    """Raise a ValueError unless the processes of a group can share the rows, and were all asked for the same."""
    count = ranks()[1]
    if count == 1:
        return
    if not bound.takes_rows:
        raise ValueError(
            f"pair: expected a model with the arguments size and rows, by which {count} processes share the rows of "
            "the data, got one without; fit it in one process"
        )
    if asked.all_rows:
        raise ValueError(
            f"objective: expected one whose rows {count} processes can share, got one that sees all rows at every "
            f"step: {asked.all_rows}; or fit in one process"
        )
    least = bound.rows if batch is None else batch
    if least < count:
        raise ValueError(f"{'data' if batch is None else 'batch'}: expected a row per process, {count}, got {least}")
    check_same({"pair": bound.name, "batch": batch, **settings, **bound.data})


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
