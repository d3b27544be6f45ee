r"""Optimisation: one loop for every objective.

An objective is a subclass of ``pyro.infer.elbo.ELBO``: ``loss_and_grads(model, guide, *args, **kwargs)``
returns the loss and leaves the gradients; the loop moves the parameters.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import pyro.optim
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.elbo import ELBO
from pyro.infer.util import zero_grads
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from inference import predict
from inference.diagnostics import diagnose, pareto_k
from inference.program import Program, bind, enumerate_finite, isolated
from inference.result import STORED, Result, State, dotted, to_idata

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
    progress: bool = True,
) -> Result:
    r"""Fit a guide (and the parameters of a model) by stochastic gradient steps on an objective.

    Modules are trained in place, as torch trains them: fitting the same pair again goes on from where
    it stands. The global parameter store is left as it was.

    Args:
        pair: A pair, or a ``(model, guide)`` tuple of Pyro functions.
        data: A tensor (the model's first argument) or a mapping of names to tensors.
        objective: An ELBO or a factory of one. Default: Trace_ELBO, or TraceEnum_ELBO where finite sites
            are summed out, or TraceGraph_ELBO where the guide draws discrete sites.
        steps: Number of steps; 0 takes the guide as it is.
        batch: Rows a minibatch, drawn without replacement in every pass over the data (the last batch of a
            pass may be short). None: all rows at every step.
        optimizer: A Pyro optimizer; one with a schedule is moved on at each step. Default: Adam whose
            learning rate falls from ``learning_rate`` to a hundredth of it on a half cosine.
        learning_rate: Start of the default schedule, in units of the unconstrained parameters.
        patience: Stop when the mean loss of the last ``patience`` steps is not below that of the
            ``patience`` steps before by more than its standard error. None: never.
        draws: Draws of the posterior to keep.
        seed: Seed of all randomness; the global random state is left as it was.
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
    program = bind(pair, data)
    _check(program, steps=steps, batch=batch, draws=draws, patience=patience, optimizer=optimizer)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate}")
    started = perf_counter()
    with isolated(seed):
        chosen = _objective(program, objective)
        movers = optimizer or _adam(learning_rate, steps)
        losses, first = _descend(program, chosen, movers, steps, batch, patience, progress)
        trained = perf_counter()
        setup = (first or trained) - started
        return _conclude(program, chosen, losses, draws, {"setup": setup, "run": trained - started - setup})


def _descend(
    program: Program,
    objective: ELBO,
    optimizer: PyroOptim,
    steps: int,
    batch: int | None,
    patience: int | None,
    progress: bool,
) -> tuple[np.ndarray, float | None]:
    model = enumerate_finite(program) if isinstance(objective, TraceEnum_ELBO) else program.model
    rows, losses, first = _minibatches(program, batch), [], None
    validate = pyro.settings.get("validate_distributions_pyro")
    bar = tqdm(total=steps, desc=f"fit {program.name}", disable=None if progress else True, leave=False)
    with bar, warnings.catch_warnings():
        # Pyro's word for a loss that is not finite; ours names the step, the sites and the parameters.
        warnings.filterwarnings("ignore", message="Encountered (NaN|[+-]?inf)")
        try:
            for step in range(steps):
                arguments = program.arguments(next(rows))
                # One validated step finds what is wrong with a model; later steps find what is not finite.
                with pyro.validation_enabled(step == 0 and validate):
                    loss, params = _gradients(objective, model, program.guide, arguments)
                culprit = _not_finite(loss, params)
                if culprit is not None:
                    _give_up(program, step, culprit, arguments)
                    break
                optimizer(list(params))
                if isinstance(optimizer, PyroLRScheduler):
                    optimizer.step()
                zero_grads(params)
                losses.append(loss)
                first = first or perf_counter()
                bar.update()
                if step % 20 == 0:
                    bar.set_postfix(loss=f"{np.sum(loss):.5g}", refresh=False)
                if patience and _settled(losses, patience):
                    break
        except KeyboardInterrupt:
            warnings.warn(f"fit of {program.name} interrupted at step {len(losses)} of {steps}", stacklevel=3)
    return np.asarray(losses, dtype=float), first


def _gradients(
    objective: ELBO, model: Callable[..., Any], guide: Callable[..., Any] | None, arguments: dict[str, Any]
) -> tuple[float | tuple[float, ...], set[Tensor]]:
    with poutine.trace(param_only=True) as capture:
        loss = objective.loss_and_grads(model, guide, **arguments)  # type: ignore[attr-defined]
    params = {node["value"].unconstrained() for node in capture.trace.nodes.values()}  # type: ignore[union-attr]
    if isinstance(loss, tuple):
        return tuple(map(float, loss)), params
    return float(loss), params


def _not_finite(loss: float | tuple[float, ...], params: set[Tensor]) -> list[str] | None:
    """Names of the parameters whose gradients are not finite; None when all is well."""
    gradients = {p: p.grad for p in params if p.grad is not None}
    norms = torch._foreach_norm(list(gradients.values())) if gradients else []
    if np.isfinite(loss).all() and all(torch.stack(list(norms)).isfinite().tolist() if norms else []):
        return None
    store = pyro.get_param_store()
    return sorted(dotted(store.param_name(p) or "?") for p, g in gradients.items() if not g.isfinite().all())


def _give_up(program: Program, step: int, parameters: list[str], arguments: dict[str, Any]) -> None:
    said = f"fit of {program.name}: loss or gradient is not finite at step {step}"
    sites = _sites_not_finite(program, arguments)
    if sites:
        said += f"; sites {', '.join(sites)}"
    if parameters:
        said += f"; gradients of {', '.join(parameters[:5])}"
    hint = "try a lower learning_rate, and check the data and the priors' scale"
    if step == 0:
        raise FloatingPointError(f"{said}; {hint}")
    warnings.warn(f"{said}; the parameters before it are returned; {hint}", stacklevel=4)


def _sites_not_finite(program: Program, arguments: dict[str, Any]) -> list[str]:
    with torch.no_grad(), pyro.validation_enabled(False):
        guide = poutine.trace(program.guide).get_trace(**arguments)
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(**arguments)
        found = []
        for trace in (guide, model):
            trace.compute_log_prob()
            scores = {n: torch.as_tensor(v["log_prob"]) for n, v in trace.nodes.items() if v["type"] == "sample"}
            found += [n for n, score in scores.items() if not score.isfinite().all()]
    return list(dict.fromkeys(found))


def _settled(losses: list[Any], patience: int) -> bool:
    if len(losses) < 2 * patience or len(losses) % patience:
        return False
    recent = np.asarray(losses[-2 * patience :], dtype=float).reshape(2, patience, -1).sum(-1)
    before, after = recent
    error = math.sqrt((before.var() + after.var()) / patience)
    return bool(before.mean() - after.mean() <= error)


def _minibatches(program: Program, batch: int | None) -> Iterator[Tensor | None]:
    while True:
        if batch is None:
            yield None
        else:
            device = next(v.device for v in program.data.values() if isinstance(v, Tensor))
            yield from torch.randperm(program.rows).to(device).split(batch)


def _adam(learning_rate: float, steps: int) -> PyroOptim:
    schedule = {"T_max": max(steps, 1), "eta_min": learning_rate / 100}
    # pyro.optim makes its schedulers by name, out of sight of a type checker.
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": learning_rate}, **schedule}
    return pyro.optim.CosineAnnealingLR(arguments)  # type: ignore[attr-defined]


def _objective(program: Program, objective: ELBO | Callable[[], ELBO] | None) -> ELBO:
    if objective is None:
        if program.enumerated:
            return TraceEnum_ELBO(max_plate_nesting=program.depth)
        discrete = any(program.sites[n].finite for n in program.guided)
        return TraceGraph_ELBO() if discrete else Trace_ELBO()
    chosen = objective() if callable(objective) and not isinstance(objective, ELBO) else objective
    if not isinstance(chosen, ELBO):
        raise TypeError(f"objective: expected an ELBO or a factory of one, got {type(chosen).__name__}")
    if program.enumerated and not isinstance(chosen, TraceEnum_ELBO):
        named, kind = ", ".join(program.enumerated), type(chosen).__name__
        raise ValueError(f"objective: {kind} cannot sum out {named}; expected TraceEnum_ELBO")
    return chosen


def _check(
    program: Program,
    *,
    steps: int,
    batch: int | None,
    draws: int,
    patience: int | None,
    optimizer: PyroOptim | None,
) -> None:
    for name, value, least in (("steps", steps, 0), ("draws", draws, 1), ("patience", patience or 2, 2)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if program.guide is None:
        raise ValueError("pair: expected a guide beside the model; give a (model, guide) tuple, or use sample()")
    if optimizer is not None and not isinstance(optimizer, PyroOptim):
        raise TypeError(f"optimizer: expected a pyro.optim.PyroOptim, got {type(optimizer).__name__}")
    if not program.observes:
        given = ", ".join(program.data) or "no data"
        raise ValueError(f"data: the model observes nothing, so there is nothing to fit; got {given}")
    if batch is None:
        return
    if not program.takes_rows:
        raise ValueError("batch: expected a model with the arguments size and rows (their plate's), got one without")
    if not isinstance(batch, int) or not 1 <= batch <= program.rows:
        raise ValueError(f"batch: expected 1 to {program.rows} (the rows of the data), got {batch!r}")


def _conclude(program: Program, objective: ELBO, losses: np.ndarray, draws: int, seconds: dict[str, float]) -> Result:
    started = perf_counter()
    method = f"SVI ({type(objective).__name__})"
    state = State(_modules(program))
    with state():
        posterior, density = predict.sample_guide(program, _affordable(program, draws))
        k = _pareto_k(program, posterior, density)
        idata = to_idata(program, posterior, attrs={"method": method})

    def more(size: int, seed: int) -> dict[str, Tensor]:
        return predict.sample_guide(program, size)[0]

    return Result(
        idata=idata,
        params=state.values(),
        losses=losses,
        seconds={**seconds, "draws": perf_counter() - started},
        method=method,
        diagnosis=diagnose(idata, k),
        draws=posterior,
        program=program,
        state=state,
        more=more,
    )


def _affordable(program: Program, draws: int) -> int:
    width = sum(torch.Size(program.sites[n].shape).numel() for n in program.guided)
    kept = max(1, min(draws, 10 * STORED // max(width, 1)))
    if kept < draws:
        warnings.warn(f"{program.name}: kept {kept} of {draws} draws ({width:,} numbers each)", stacklevel=4)
    return kept


def _pareto_k(program: Program, posterior: dict[str, Tensor], density: Tensor) -> float | None:
    """Pareto k of the guide; None for a point estimate, and where it would take too long."""
    affordable = min(len(density), JUDGED // max(program.numel, 1))
    if not any((v != v[:1]).any() for v in posterior.values()):
        return None
    if len(density) < 25:
        return None
    if affordable < 25:
        warnings.warn(
            f"{program.name}: Pareto k left out ({program.numel:,} numbers a draw); ask "
            "diagnostics.pareto_k(log_weights(result, draws=100))",
            stacklevel=5,
        )
        return None
    judged = {n: v[:affordable] for n, v in posterior.items()}
    try:
        return pareto_k(predict.log_joint(program, judged) - density[:affordable])
    except ValueError as error:
        warnings.warn(f"{program.name}: Pareto k left out: {error}", stacklevel=5)
        return None


def _modules(program: Program) -> tuple[torch.nn.Module, ...]:
    halves = (program.pair, *(program.pair if isinstance(program.pair, tuple) else ()))
    owners = [getattr(h, "__self__", h) for h in halves]
    return tuple({id(m): m for m in owners if isinstance(m, torch.nn.Module)}.values())
