r"""``Result``, which every method returns, and how a method ends in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import check_count
from inference.core.files import write_whole
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import pd, xr
from inference.diagnostics.convergence import Diagnosis, diagnose
from inference.diagnostics.guides import GuideCheck, judge_guide
from inference.diagnostics.latents import local_latent_kl
from inference.idata import LeftOut, to_idata, write_netcdf


class State:
    """Parameters and buffers of a pair as a fit left them.

    ``with state():`` restores them, in the parameter store and in modules that have been trained since, for the length
    of the block.
    """

    def __init__(self, modules: tuple[torch.nn.Module, ...] = ()) -> None:
        store = pyro.get_param_store().get_state()
        self._store = store
        self._modules = modules
        tensors = [*store["params"].values(), *(b for m in modules for b in m.buffers())]
        self._tensors = [(t, t.detach().clone()) for t in tensors]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Restore the parameters in a scope of the store, with modules in evaluation mode and without gradients."""
        now = [t.detach().clone() for t, _ in self._tensors]
        training = [m for module in self._modules for m in module.modules() if m.training]
        try:
            for module in training:
                module.training = False
            with pyro.get_param_store().scope(self._store.copy()), torch.no_grad():
                self._put(then for _, then in self._tensors)
                yield
        finally:
            self._put(now)
            for module in training:
                module.training = True

    def _put(self, values: Any) -> None:
        with torch.no_grad():
            for (tensor, _), value in zip(self._tensors, values, strict=True):
                tensor.copy_(value)

    def values(self) -> dict[str, Tensor]:
        """Constrained values by dotted name, on the CPU."""
        with isolated(), self():
            return {dotted(n): v.detach().cpu().clone() for n, v in pyro.get_param_store().items()}


def dotted(name: str) -> str:
    """Name of a parameter as torch writes it: ``decoder.0.weight`` for ``decoder$$$0.weight``."""
    return name.replace("$$$", ".")


@dataclass(frozen=True, eq=False)
class Result:
    r"""A fitted posterior.

    Attributes:
        idata: ``xarray.DataTree`` that ``arviz_base``, ``arviz_stats``, ``arviz_plots`` and ``arviz`` 1.x read. Its
            groups are ``posterior``, ``posterior_predictive``, ``log_likelihood``, ``sample_stats`` and
            ``observed_data``, as far as the method has them and memory allows; ``idata.children`` has their names.
        params: Constrained parameters by dotted name, on the CPU; empty for chains without parameters.
        losses: Loss of each step (steps,), or (steps, 2) for an objective with two losses; empty for chains.
        seconds: ``setup`` (until the first step or transition is done), ``run`` (the other steps or transitions) and
            ``draws`` (posterior draws, predictions and diagnostics).
        method: Name of the method, for tables: ``SVI (Trace_ELBO)``, ``NUTS``.
        diagnosis: R-hat, effective sample sizes, divergences, Pareto k, each with advice.
        draws: Posterior draws of the latent sites, (S, \*shape), chains one after another, on the CPU.
        bound: The pair and its data.
        state: Parameters and buffers as the method left them.
        more: From a number of draws and a seed to further draws.
    """

    idata: xr.DataTree
    params: dict[str, Tensor]
    losses: np.ndarray
    seconds: Mapping[str, float]
    method: str
    diagnosis: Diagnosis
    draws: dict[str, Tensor]
    bound: BoundPair = field(repr=False)
    state: State = field(repr=False)
    more: Callable[[int, int], dict[str, Tensor]] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of posterior draws S."""
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def ended(self) -> str:
        """Why and at which step a fit ended early, ``interrupted at step 20 of 100``; empty if it did not."""
        return str(self.idata.attrs.get("ended", ""))

    @property
    def interrupted(self) -> bool:
        """Whether the fit was interrupted (Ctrl-C), so that the Result is that of the steps taken until then."""
        return self.ended.startswith("interrupted")

    def save(self, path: str | Path) -> Path:
        """Write ``idata`` to a NetCDF file, by :func:`inference.write_whole`; return the path.

        ``xarray.open_datatree`` reads it back, which ``arviz`` 1.x calls ``from_netcdf``.

        Raises:
            ValueError: There is nothing to write: the method has no posterior, and the pair observes nothing.
        """
        if not self.idata.children:
            raise ValueError(f"save: expected a posterior or observed data, got none of {self.method}")
        return write_whole(path, partial(write_netcdf, self.idata))

    @exclusive
    def draw(self, size: int = 1000, *, seed: int = 1) -> dict[str, Tensor]:
        r"""Draw more from the posterior: from the guide, or by continuing the chains.

        Returns:
            A tensor (size, \*shape) for each latent site.
        """
        check_count("size", size)
        with isolated(seed), self.state():
            return _on_cpu(self.more(size, seed))

    def summary(self) -> Any:
        """Table of the posterior: mean and sd; for chains also Monte Carlo error, effective sample sizes and R-hat."""
        return self.diagnosis.table

    def __str__(self) -> str:
        took = self.seconds["setup"] + self.seconds["run"]
        count = f"{self.size} draws" if self.draws else f"{len(self.losses)} steps"
        return f"{self.method} on {self.bound.name}: {count} in {took:.1f} s. {self.diagnosis}"


@dataclass(frozen=True)
class Posterior:
    r"""Posterior draws and what they are judged by.

    Attributes:
        draws: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        chains: Number of chains.
        stats: Statistics (chains, draws) of each transition; None without chains.
        density: Log density (S,) of the draws under the guide; None for chains.
        attrs: Further attributes of the DataTree.
    """

    draws: dict[str, Tensor]
    chains: int = 1
    stats: Mapping[str, np.ndarray] | None = None
    density: Tensor | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


def conclude(
    bound: BoundPair,
    make: Callable[[], Posterior | Sequence[str]],
    more: Callable[[int, int], dict[str, Tensor]],
    seconds: Mapping[str, float],
    *,
    method: str,
    execution: str,
    losses: np.ndarray | None = None,
    ended: str = "",
) -> Result:
    """Turn what a fit or chains have left in the parameter store into a Result.

    What cannot be computed is left out with a warning, and the diagnosis says so: no failure here loses the fit.

    Args:
        bound: The pair and its data.
        make: Makes the posterior from the parameters as they are now; a method without a posterior gives its advice.
        more: From a number of draws and a seed to further draws.
        seconds: ``setup`` and ``run``.
        method: Name of the method, for tables.
        execution: How it ran: ``eager``, ``traced`` or ``fused``.
        losses: Loss of each step; None for chains.
        ended: Why and at which step the run ended early; empty if it did not.
    """
    started, state, left_out = perf_counter(), State(bound.modules), LeftOut(bound.name)
    attrs = {"method": method, "execution": execution, **({"ended": ended} if ended else {})}
    with state():
        made = left_out.unless("posterior", make, ())
        if isinstance(made, Posterior):
            idata = to_idata(
                bound, made.draws, made.stats, chains=made.chains, attrs={**attrs, **made.attrs}, left_out=left_out
            )
            diagnosis = left_out.unless("diagnosis", partial(_judge, bound, made, idata, losses, left_out), _unknown())
        else:
            idata = xr.DataTree(xr.Dataset(attrs=attrs))
            diagnosis = replace(_unknown(), advice=tuple(made))
    advice = (f"The run was {ended}: what it returns is not finished.",) if ended else ()
    return Result(
        idata=idata,
        params=state.values(),
        losses=np.zeros(0) if losses is None else losses,
        seconds={**seconds, "draws": perf_counter() - started},
        method=method,
        diagnosis=replace(
            diagnosis,
            advice=(*advice, *diagnosis.advice),
            unjudged=tuple(dict.fromkeys((*diagnosis.unjudged, *left_out.said))),
        ),
        draws=_on_cpu(made.draws) if isinstance(made, Posterior) else {},
        bound=bound,
        state=state,
        more=more,
    )


def _on_cpu(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.cpu() for n, v in draws.items()}


def _unknown() -> Diagnosis:
    return Diagnosis(pd.DataFrame(), None, None, ())


def _judge(
    bound: BoundPair, made: Posterior, idata: xr.DataTree, losses: np.ndarray | None, left_out: LeftOut
) -> Diagnosis:
    if made.density is None:
        return diagnose(idata)
    check = left_out.unless("Pareto k", partial(judge_guide, bound, made.draws, made.density), GuideCheck())
    kl = left_out.unless("KL of the latent sites", partial(local_latent_kl, bound), None)
    return diagnose(idata, check, kl, losses=losses)
