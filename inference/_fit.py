r"""Optimisation: one loop for every objective.

An objective is a subclass of ``pyro.infer.elbo.ELBO``: ``loss_and_grads(model, guide, *args, **kwargs)``
returns the loss and leaves the gradients; the loop moves the parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
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
from inference.core.handlers import isolated
from inference.diagnostics.convergence import Diagnosis, diagnose, pareto_k
from inference.diagnostics.latents import local_latent_kl
from inference.draws import engine
from inference.objectives.adversarial import SITE
from inference.result import STORED, Result, State, to_idata
from inference.runners.base import interrupts_deferred
from inference.runners.steps import CHECK_STEPS, CompiledSteps, EagerSteps, Failure, by_adam

JUDGED = 100_000_000
"""Numbers of data times draws that Pareto k may read at the end of a fit."""


def fit(
    pair: Any,
    data: Any = None,
    objective: ELBO | Callable[[], ELBO] | None = None,
    *,
    steps: int = 2000,
    batch: int | None = None,
    optimizer: PyroOptim | None = None,
    learning_rate: float = 0.02,
    patience: int | None = None,
    draws: int = 1000,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool = True,
) -> Result:
    r"""Fit a guide (and the parameters of a model) by stochastic gradient steps on an objective.

    Subnormal numbers (below 1e-38 in float32) count as zero meanwhile, as XLA has it.

    Modules are trained in place, as torch trains them: fitting the same pair again goes on from where
    it stands. The global parameter store is left as it was.

    Args:
        pair: A pair, or a ``(model, guide)`` tuple of Pyro functions.
        data: A tensor (the model's first argument) or a mapping of names to tensors.
        objective: An ELBO or a factory of one. Default: Trace_ELBO, or TraceEnum_ELBO where finite sites are summed
            out (the guide leaves them out, or marks them for enumeration), or TraceGraph_ELBO where the guide draws
            discrete sites.
        steps: Number of steps; 0 takes the guide as it is.
        batch: Rows a minibatch, drawn without replacement in every pass over the data (the last batch of a
            pass may be short). None: all rows at every step.
        optimizer: A Pyro optimizer (``optim.Joint`` holds one torch optimizer over all parameters); one with a
            schedule is moved on at each step. Default: Adam whose learning rate falls from ``learning_rate`` to a
            hundredth of it on a half cosine, inside the program where the steps are compiled.
        learning_rate: Start of the default schedule, in units of the unconstrained parameters.
        patience: Stop when the mean loss of the last ``patience`` steps is not below that of the
            ``patience`` steps before by more than its standard error. None: never.
        draws: Draws of the posterior to keep.
        seed: Seed of all randomness; the global random state is left as it was.
        compile: True: run each step as one compiled program. "auto": trace it, or compile it too, where that many
            steps are worth it; ``idata.attrs["execution"]`` says what was chosen. False: as Pyro runs it.
        progress: Show a progress bar with the running loss (on a terminal).

    Returns:
        A Result. Interrupting the fit (Ctrl-C), or a loss or gradient that is not finite, ends it early
        with the last good parameters and a warning.

    Raises:
        ValueError: An argument does not fit the pair or the data.
        FloatingPointError: The loss is not finite at the first step: nothing was learned.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> result = fit((model, AutoNormal(model)), torch.tensor([1.0, 2.0, 3.0]), steps=500, progress=False)
        >>> print(f"{result.draws['mu'].mean():.1f}", result.idata.groups())
        2.0 ['posterior', 'posterior_predictive', 'log_likelihood', 'observed_data']
    """
    if callable(objective) and not isinstance(objective, ELBO):
        objective = objective()
    if isinstance(objective, Compiled):
        objective, compile = objective.objective, compile if compile is False else True
    whole = bind(pair, data)
    bound = replace(whole, data={**whole.data, **getattr(objective, "arguments", {})}, memo={})
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
    started = perf_counter()
    with isolated(seed):
        chosen = _objective(bound, objective)
        _check_likelihood(bound, chosen)
        rows = _minibatches(bound, batch)
        plan = _plan(bound, chosen, optimizer, learning_rate, steps, patience, compile)
        with subnormals_flushed():
            losses, first = _descend(plan, steps, rows, patience, f"fit of {bound.name}", progress)
        trained = perf_counter()
        setup = (first or trained) - started
        return _conclude(whole, chosen, plan.how, losses, draws, {"setup": setup, "run": trained - started - setup})


def _descend(
    steps: EagerSteps | CompiledSteps,
    count: int,
    batches: Iterator[Tensor | None],
    patience: int | None,
    name: str,
    progress: bool,
) -> tuple[np.ndarray, float | None]:
    """Take the steps; return the losses of those that were finite, and the time at which the first was done."""
    losses: list[Any] = []
    validate, first, failure = pyro.settings.get("validate_distributions_pyro"), None, None
    bar = tqdm(total=count, desc=name, disable=None if progress else True, leave=False)
    with bar, warnings.catch_warnings(), pyro.validation_enabled(validate), interrupts_deferred() as raise_deferred:
        # Pyro's warning of a loss that is not finite; ours names the step, the sites and the parameters.
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        try:
            while len(losses) < count:
                taken = steps.advance(batches)
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
                raise_deferred()
                if settled:
                    break
        except KeyboardInterrupt:
            warnings.warn(f"{name} interrupted at step {len(losses)} of {count}", stacklevel=3)
            failure = steps.check(now=True)
    if failure is not None:
        _give_up(name, failure)
        losses = losses[: failure.step]
    return np.array([_read(x) for x in losses], dtype=float), first


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
    warnings.warn(f"{text}; the parameters before it are returned; {hint}", stacklevel=4)


def _settled(losses: list[Any], patience: int) -> bool:
    """Whether the mean of the last losses is not below that of the losses before by more than its standard error."""
    if len(losses) < 2 * patience or len(losses) % patience:
        return False
    recent = np.array([sum(numbers(x)) for x in losses[-2 * patience :]]).reshape(2, patience)
    before, after = recent
    error = math.sqrt((before.var() + after.var()) / patience)
    return bool(before.mean() - after.mean() <= error)


def _minibatches(bound: BoundPair, batch: int | None) -> Iterator[Tensor | None]:
    """Rows of each step, drawn from a random state of their own: a step that is run again has its noise again."""
    random = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    while True:
        if batch is None:
            yield None
        else:
            device = next(v.device for v in bound.data.values() if isinstance(v, Tensor))
            yield from torch.randperm(bound.rows, generator=random).to(device).split(batch)


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
    model = enumerate_finite(bound) if isinstance(objective, TraceEnum_ELBO) else bound.model
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
    summed = isinstance(chosen, TraceEnum_ELBO) or getattr(chosen, "likelihood_free", False)
    if bound.enumerated and not summed:
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
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile: expected True, False or "auto", got {compile!r}')
    for name, value, least in (("steps", steps, 0), ("draws", draws, 1), ("patience", patience or 2, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if bound.guide is None:
        raise ValueError("pair: expected a guide beside the model; give a (model, guide) tuple, or use sample()")
    if optimizer is not None and not isinstance(optimizer, PyroOptim):
        raise TypeError(f"optimizer: expected a pyro.optim.PyroOptim, got {type(optimizer).__name__}")
    if not bound.observes and SITE not in bound.sites:
        given = ", ".join(bound.data) or "no data"
        raise ValueError(f"data: the model observes nothing, so there is nothing to fit; got {given}")
    if batch is None:
        return
    if not bound.takes_rows:
        raise ValueError("batch: expected a model with the arguments size and rows (their plate's), got one without")
    if not isinstance(batch, int) or not 1 <= batch <= bound.rows:
        raise ValueError(f"batch: expected 1 to {bound.rows} (the rows of the data), got {batch!r}")


def _check_likelihood(bound: BoundPair, objective: ELBO) -> None:
    if bound.observes or getattr(objective, "likelihood_free", False):
        return
    raise ValueError(
        f"objective: {type(objective).__name__} needs a likelihood, and the model observes nothing: its number would "
        "mean nothing; use Adversarial()"
    )


def _conclude(
    bound: BoundPair, objective: ELBO, how: str, losses: np.ndarray, draws: int, seconds: dict[str, float]
) -> Result:
    started, state = perf_counter(), State(bound.modules)
    kind, bare = type(objective).__name__, not getattr(objective, "has_posterior", True)
    method = kind if bare else f"SVI ({kind})"
    attrs = {"method": method, "execution": how}
    with state():
        if bare:
            posterior: dict[str, Tensor] = {}
            idata = az.InferenceData(attrs=attrs)
            diagnosis = Diagnosis(pd.DataFrame(), None, None, objective.advise(bound, losses))  # type: ignore[attr-defined]
        else:
            posterior, density = engine.sample_guide(bound, _affordable(bound, draws))
            k = _pareto_k(bound, posterior, density)
            found = local_latent_kl(bound)
            idata = to_idata(bound, posterior, attrs=attrs)
            diagnosis = diagnose(idata, k, found)

    def more(size: int, seed: int) -> dict[str, Tensor]:
        if bare:
            raise ValueError(f"draw: {kind} learns a model and no posterior; use prior_predictive, or the pair itself")
        return engine.sample_guide(bound, size)[0]

    return Result(
        idata=idata,
        params=state.values(),
        losses=losses,
        seconds={**seconds, "draws": perf_counter() - started},
        method=method,
        diagnosis=diagnosis,
        draws=posterior,
        bound=bound,
        state=state,
        more=more,
    )


def _affordable(bound: BoundPair, draws: int) -> int:
    width = sum(torch.Size(bound.sites[n].shape).numel() for n in bound.guided)
    kept = max(1, min(draws, 10 * STORED // max(width, 1)))
    if kept < draws:
        warnings.warn(f"{bound.name}: kept {kept} of {draws} draws ({width:,} numbers each)", stacklevel=4)
    return kept


def _pareto_k(bound: BoundPair, posterior: dict[str, Tensor], density: Tensor) -> float | None:
    """Pareto k of the guide; None for a point estimate, and where it would take too long."""
    affordable = min(len(density), JUDGED // max(bound.numel, 1))
    if not any((v != v[:1]).any() for v in posterior.values()):
        return None
    if len(density) < 25:
        return None
    if affordable < 25:
        warnings.warn(
            f"{bound.name}: Pareto k left out ({bound.numel:,} numbers a draw); ask "
            "diagnostics.pareto_k(log_weights(result, draws=100))",
            stacklevel=5,
        )
        return None
    judged = {n: v[:affordable] for n, v in posterior.items()}
    try:
        return pareto_k(engine.log_joint(bound, judged) - density[:affordable])
    except ValueError as error:
        warnings.warn(f"{bound.name}: Pareto k left out: {error}", stacklevel=5)
        return None
