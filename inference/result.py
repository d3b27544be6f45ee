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
from torch.utils.data import Dataset

from inference.core.bound import BoundPair, bind, bind_by_rows
from inference.core.checks import check_count
from inference.core.files import write_whole
from inference.core.handlers import evaluating, exclusive, isolated
from inference.core.lazy import pd, xr
from inference.diagnostics.convergence import Diagnosis, diagnose, with_intervals
from inference.diagnostics.guides import GuideCheck, judge_guide
from inference.diagnostics.latents import local_latent_kl
from inference.diagnostics.losses import rise
from inference.further import RESTORED, FurtherDraws, NoDraws
from inference.groups import Groups, LeftOut, groups_of
from inference.idata import write_netcdf
from inference.report.page import excerpt, page_of_result
from inference.saved import Saved, buffers_of, compare_data, dotted, put_parameters, versions_of_packages

PREDICTIVE = 2**32 - 1
"""What stands in place of a number of draws in the seed of predictive draws."""


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
        try:
            with pyro.get_param_store().scope(self._store.copy()), torch.no_grad(), evaluating(self._modules):
                self._put(then for _, then in self._tensors)
                yield
        finally:
            self._put(now)

    def _put(self, values: Any) -> None:
        with torch.no_grad():
            for (tensor, _), value in zip(self._tensors, values, strict=True):
                tensor.copy_(value)

    def parameters(self) -> dict[str, Tensor]:
        """Unconstrained values by the names of the parameter store."""
        names = {id(v): n for n, v in self._store["params"].items()}
        return {names[id(t)]: v for t, v in self._tensors if id(t) in names}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers by the number of their module and their name."""
        values = {id(t): v for t, v in self._tensors}
        return {n: values[id(b)] for n, b in buffers_of(self._modules).items()}

    def values(self) -> dict[str, Tensor]:
        """Constrained values by dotted name, on the CPU."""
        with isolated(), self():
            return {dotted(n): v.detach().cpu().clone() for n, v in pyro.get_param_store().items()}


@dataclass(frozen=True, eq=False)
class Result:
    r"""A fitted posterior.

    Attributes:
        groups: The groups of ``idata`` by name. ``posterior``, ``sample_stats`` and ``observed_data`` are there;
            ``posterior_predictive`` and ``log_likelihood`` are made when they are first asked for, from the data as
            they are then.
        params: Constrained parameters by dotted name, on the CPU; empty for chains without parameters.
        losses: Loss of each step (steps,), or (steps, 2) for an objective with two losses; empty for chains.
        seconds: ``setup`` (until the first step or transition is done), ``run`` (the other steps or transitions) and
            ``draws`` (posterior draws and diagnosis).
        method: Name of the method, for tables: ``SVI (Trace_ELBO)``, ``NUTS``.
        diagnosis: R-hat, effective sample sizes, divergences, Pareto k, each with advice.
        draws: Posterior draws of the latent sites, (S, \*shape), chains one after another, on the CPU.
        bound: The pair and its data.
        state: Parameters and buffers as the method left them.
        more: How it draws more.
    """

    groups: Groups = field(repr=False)
    params: dict[str, Tensor]
    losses: np.ndarray
    seconds: Mapping[str, float]
    method: str
    diagnosis: Diagnosis
    draws: dict[str, Tensor]
    bound: BoundPair = field(repr=False)
    state: State = field(repr=False)
    more: FurtherDraws = field(repr=False)

    @property
    def idata(self) -> xr.DataTree:
        """``xarray.DataTree`` that ``arviz_base``, ``arviz_stats``, ``arviz_plots`` and ``arviz`` 1.x read.

        It has all groups, as far as the method has them and memory allows; ``idata.children`` has their names. Those
        that were not asked for yet are made: predictions and log likelihoods of all rows.
        """
        return self.groups.tree

    @property
    def size(self) -> int:
        """Number of posterior draws S."""
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def ended(self) -> str:
        """Why and where the run ended early, ``interrupted at step 20 of 100``; empty if it did not."""
        return str(self.groups.attrs.get("ended", ""))

    @property
    def loss_rise(self) -> tuple[float, float] | None:
        """Mean loss of the first and last tenth of the steps where the fit diverged: the last is higher; else None."""
        return rise(self.losses)

    @property
    def interrupted(self) -> bool:
        """Whether it was interrupted (Ctrl-C), so that the Result is that of the steps, or draws, until then."""
        return self.ended.startswith("interrupted")

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
        """Write the Result to a folder, which :meth:`load` reads; to a path that ends with ``.nc``, ``idata`` alone.

        The folder holds ``result.json``, ``tensors.safetensors`` (parameters, buffers, draws, losses, and where the
        chains are), ``idata.nc`` and ``losses.csv``. A path ``.nc`` gets a NetCDF file that ``xarray.open_datatree``
        reads, which ``arviz`` 1.x calls ``from_netcdf``. Either is written whole or not at all. The data are not
        written: the folder has their SHA-256. ``about`` is written to ``result.json`` as it is: what made the Result,
        as JSON.

        Raises:
            ValueError: There is nothing for a NetCDF file: the method has no posterior, and the pair observes nothing.
            FileExistsError: The path is a file, or a folder that is no saved Result.
            OSError: It cannot be written; what stood there stands.
        """
        if Path(path).suffix == ".nc":
            if not self.idata.children:
                raise ValueError(f"save: expected a posterior or observed data, got none of {self.method}")
            return write_whole(path, partial(write_netcdf, self.idata))
        more, chains = self.more.record()
        return Saved(
            method=self.method,
            name=self.bound.name,
            seconds=dict(self.seconds),
            attrs={str(n): v for n, v in self.idata.attrs.items()},
            diagnosis=self.diagnosis,
            data=self.bound.fingerprints(),
            more=more,
            tensors={
                **{f"param/{n}": v for n, v in self.state.parameters().items()},
                **{f"buffer/{n}": v for n, v in self.state.buffers().items()},
                **{f"draws/{n}": v for n, v in self.draws.items()},
                **{f"state/{k}": v for k, v in enumerate(chains)},
                "losses": torch.as_tensor(self.losses),
            },
            idata=self.idata,
            about=dict(about or {}),
        ).write(path)

    @classmethod
    @exclusive
    def load(cls, path: str | Path, pair: Any, data: Any = None) -> Result:
        """Read a Result that :meth:`save` has written to a folder.

        Parameters and buffers are put into the modules of the pair. Draws, losses and the diagnosis are those of the
        file; further draws, predictions and the evidence are the same to the last digit on the same machine.

        Args:
            path: The folder.
            pair: The pair, built as it was: a pair, a ``(model, guide)`` tuple or a model.
            data: Its data. Others than those of the fit get a warning, and predictions are about them.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: A file is damaged or foreign, or the pair has other parameters or sites.
        """
        saved = Saved.read(path)
        bound = _bound_again(saved, pair, data)
        compare_data(saved, bound)
        with isolated(0):
            put_parameters(saved, bound)
            state = State(bound.modules)
            drawn = saved.part("draws")
            for name, value in drawn.items():
                site = bound.sites.get(name)
                if site is None or torch.Size(site.shape) != value.shape[1:]:
                    got = "none" if site is None else tuple(site.shape)
                    raise ValueError(f"pair: expected a site {name} of shape {tuple(value.shape[1:])}, got {got}")
            chains = saved.part("state")
            restore = RESTORED.get(saved.more["kind"])
            held = [chains[str(k)] for k in range(len(chains))]
            more = NoDraws(saved.method) if restore is None else restore(bound, saved.more, held)
            return cls(
                groups=Groups.of(saved.idata),
                params=state.values(),
                losses=saved.tensors["losses"].numpy(),
                seconds=saved.seconds,
                method=saved.method,
                diagnosis=saved.diagnosis,
                # The file has them in the order of the alphabet.
                draws={n: drawn[n] for n in bound.sites if n in drawn},
                bound=bound,
                state=state,
                more=more,
            )

    @exclusive
    def draw(self, size: int = 1000, *, seed: int = 1) -> dict[str, Tensor]:
        r"""Draw more from the posterior: from the guide, or by continuing the chains.

        Returns:
            A tensor (size, \*shape) for each latent site.
        """
        check_count("size", size)
        with isolated(seed), self.state():
            return _on_cpu(self.more(size, seed))

    @exclusive
    def extend(self, draws: int = 1000, *, seed: int = 1) -> Result:
        """Let the chains go on, where they ended, by so many draws each.

        The kernel stays as the warmup has adapted it. For ``ChEES``, ``Gibbs`` and ``NUTS``, also from a folder.

        Args:
            draws: Further draws per chain.
            seed: Seed of their randomness, with the number of draws that there are: each call has noise of its own.

        Returns:
            A Result of all draws, those of this one and the new ones after them in each chain.

        Raises:
            ValueError: There are no chains, or they cannot go on.
        """
        check_count("draws", draws)
        with isolated(seed), self.state():
            # Chains that had the same noise before would make the same draws again.
            pyro.set_rng_seed(_seed_after(seed, self.size))
            new = self.more.extend(draws)
            count = next(iter(new.stats.values())).shape[0]
            values = {n: _after(self.draws[n], v.cpu(), count) for n, v in new.draws.items() if n in self.draws}
            before = self.groups["sample_stats"]
            stats = {n: np.concatenate([before[n].values, v], axis=1) for n, v in new.stats.items() if n in before}
            attrs = {"restarted": self.groups.attrs.get("restarted", 0), "seed": seed}
            return conclude(
                self.bound,
                lambda: Posterior(values, count, stats, attrs=attrs),
                new.more,
                {"setup": self.seconds["setup"], "run": self.seconds["run"] + new.seconds},
                method=self.method,
                execution=str(self.groups.attrs["execution"]),
            )

    def summary(self, prob: float = 0.89) -> pd.DataFrame:
        """Table of the posterior, a line per scalar quantity.

        Its columns are mean, sd and the bounds of the central interval, of a guide as of chains (``eti89_lb`` and
        ``eti89_ub``, as ArviZ names them); for chains also the Monte Carlo error of the mean, effective sample sizes
        and R-hat.

        Args:
            prob: Posterior probability of the interval. Default: that of ArviZ.

        Raises:
            ValueError: The probability is not between 0 and 1.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob: expected a probability between 0 and 1, got {prob!r}")
        table = self.diagnosis.table
        return table if table.empty else with_intervals(table, self.groups.drawn, prob)

    @exclusive
    def report(
        self, path: str | Path, *, about: Mapping[str, Any] | None = None, shape: tuple[int, int] | None = None
    ) -> Path:
        """Write one HTML page about the Result, which needs no other file and no network.

        It shows the model and its graph, the data, the diagnosis and what it means, the posterior, chains or learning
        curve, predictive checks, leave-one-out, samples, and how to repeat it.

        Args:
            path: Where the page is to stand. It is written whole or not at all.
            about: What made the Result: ``seed``, ``data``, ``command``, ``title``, and further facts.
            shape: Height and width of an image, for the pictures of pairs of images. Default: a square.

        Returns:
            The path.

        Raises:
            OSError: The page cannot be written.
        """
        return page_of_result(self, versions_of_packages(), about, shape).write(path)

    def _repr_html_(self) -> str:
        return excerpt(str(self).splitlines()[0], self.summary(), str(self.diagnosis))

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
    more: FurtherDraws,
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
    # A verb runs from its seed, which the random state keeps.
    seed = torch.initial_seed()
    attrs = {"method": method, "execution": execution, "seed": seed, **({"ended": ended} if ended else {})}
    attrs |= {"rows": bound.shown_rows} if bound.source is not None else {}
    with state():
        made = left_out.unless("posterior", make, ())
        if isinstance(made, Posterior):
            groups = groups_of(
                bound,
                made.draws,
                made.stats,
                chains=made.chains,
                attrs={**attrs, **made.attrs},
                left_out=left_out,
                within=state,
                seed=_seed_after(seed, PREDICTIVE),
            )
            judge = partial(_judge, bound, made, groups.drawn, losses, left_out)
            diagnosis = left_out.unless("diagnosis", judge, _unknown())
        else:
            groups = Groups.of(xr.DataTree(xr.Dataset(attrs=attrs)))
            diagnosis = replace(_unknown(), advice=tuple(made))
    advice = (f"The run was {ended}: what it returns is not finished.",) if ended else ()
    return Result(
        groups=groups,
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


def _bound_again(saved: Saved, pair: Any, data: Any) -> BoundPair:
    """The pair bound as it was: chains, and fits without minibatches, have all rows in memory."""
    given = data.values() if isinstance(data, Mapping) else [data]
    by_rows = "rows" in saved.attrs or any(isinstance(v, Dataset) for v in given)
    return bind_by_rows(pair, data) if by_rows else bind(pair, data)


def _seed_after(seed: int, draws: int) -> int:
    """Seed of what follows so many draws: another one than that of any other stretch with the same ``seed``."""
    return int(np.random.SeedSequence([seed, draws]).generate_state(1)[0])


def _after(first: Tensor, then: Tensor, chains: int) -> Tensor:
    """Draws of chains with those that follow them, chain after chain."""
    return torch.cat([v.unflatten(0, (chains, -1)) for v in (first, then)], 1).flatten(0, 1)


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
