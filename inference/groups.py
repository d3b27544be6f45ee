r"""The groups of the DataTree of a Result: those of the draws, and those of the data, made when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.handlers import exclusive, isolated
from inference.core.lazy import xr
from inference.core.packing import stamp
from inference.draws import dependence, scoring
from inference.idata import dataset_of, dims_of, observed_of, renamed, rows_seen, seen_of, stats_of

STORED, SCORED = 20_000_000, 500_000_000
"""Largest size of a predictive group of a Result, and largest input of its log likelihood, in numbers."""

ORDER = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data")
"""Groups in the order of the DataTree."""


Later = Callable[[], "tuple[xr.Dataset | None, str]"]
"""Makes a group, and says what is to be known of it."""

T = TypeVar("T")


U = TypeVar("U")


@dataclass
class LeftOut:
    """What a Result goes without, each with the reason.

    Attributes:
        name: Name of the pair, for warnings.
        said: The reasons.
    """

    name: str
    said: list[str] = field(default_factory=list)

    def unless(self, what: str, compute: Callable[[], T], otherwise: U) -> T | U:
        """What ``compute`` returns; if it fails, a warning, a reason and ``otherwise``."""
        try:
            return compute()
        except Exception as error:
            # Any failure: the fit is over, and is worth more than what is derived from it.
            reason = reason_of(error, 300)
            self.add(f"{what}: {reason}")
            warnings.warn(f"{self.name}: {what} left out: {reason}", stacklevel=2)
            return otherwise

    def add(self, reason: str) -> None:
        """Note one reason."""
        self.said.append(reason)


@dataclass(eq=False)
class Groups:
    """Groups of a DataTree by name: some are there, others are made when they are first asked for.

    ``groups[name]`` is a Dataset, and :attr:`tree` the DataTree of all.

    Attributes:
        made: What was made, by group; None for a group that is left out.
        attrs: Attributes of the DataTree and of its posterior group.
        later: How to make the groups that were not asked for yet.
        within: Restores the parameters that they are made with.
        seed: Seed of their randomness.
        left_out: Takes the reason for each group that is left out.
    """

    made: dict[str, xr.Dataset | None]
    attrs: dict[str, Any]
    later: dict[str, Later] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    seed: int = 0
    left_out: LeftOut = field(default_factory=lambda: LeftOut(""))
    _tree: Any = None

    @classmethod
    def of(cls, tree: xr.DataTree) -> Groups:
        """Those of a DataTree that is whole."""
        made: dict[str, xr.Dataset | None] = {str(n): g.to_dataset() for n, g in tree.children.items()}
        return cls(made, {str(n): v for n, v in tree.attrs.items()}, _tree=tree)

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __getitem__(self, name: str) -> xr.Dataset:
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def __bool__(self) -> bool:
        return bool(self.later) or any(group is not None for group in self.made.values())

    @exclusive
    def get(self, name: str) -> xr.Dataset | None:
        """A group; None where there is none."""
        if name in self.later:
            make, said = self.later[name], len(self.left_out.said)
            with isolated(self.seed), self.within():
                self.made[name], note = self.left_out.unless(name, make, (None, ""))
            # Not before: an interrupt leaves it to be asked for again.
            del self.later[name]
            if len(self.left_out.said) > said:
                note = f"left out: {self.left_out.said[-1].removeprefix(f'{name}: ')}"
            self.attrs |= {name: note} if note else {}
            posterior = self.made.get("posterior")
            if posterior is not None:
                posterior.attrs.update(self.attrs)
        return self.made.get(name)

    @property
    def drawn(self) -> xr.DataTree:
        """The DataTree of the groups that are there."""
        return self.joined(self.made)

    @property
    def tree(self) -> xr.DataTree:
        """The DataTree of all groups, always the same one."""
        if self._tree is None:
            self._tree = self.joined(ORDER)
        return self._tree

    def joined(self, names: Collection[str]) -> xr.DataTree:
        """The DataTree of some groups, as far as there are any."""
        kept = {n: group for n in ORDER if n in names and (group := self.get(n)) is not None}
        # A pair without latent sites has no posterior, and so no such group.
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=self.attrs), **renamed(kept)})


def groups_of(
    bound: BoundPair,
    posterior: Mapping[str, Tensor],
    sample_stats: Mapping[str, np.ndarray] | None = None,
    *,
    chains: int = 1,
    attrs: Mapping[str, Any] | None = None,
    left_out: LeftOut,
    within: Callable[[], AbstractContextManager[None]],
    seed: int,
) -> Groups:
    r"""The groups of draws of any method, with the parameters that are in the store.

    Args:
        bound: The pair and its data.
        posterior: Draws of the latent sites (chains * draws, \*shape), chains one after another.
        sample_stats: Statistics (chains, draws) of each transition.
        chains: Number of chains.
        attrs: Attributes of the DataTree and of its posterior group.
        left_out: Takes the reason for each group that is left out.
        within: Restores the parameters for what is made later.
        seed: Seed of predictive draws.

    Dimensions are named after the plates (``rows``) and the pair's ``dims``; coordinates are the pair's ``coords``. A
    ``/`` in a name, which NetCDF does not allow, becomes ``_``, and a site with the name of a dimension (``draw``,
    ``chain``) gets a ``_`` at its end; the attribute ``site`` has the name of the site.
    Deterministic sites and posterior draws of summed-out sites are added. A group that cannot be computed is left out
    with a warning, and so are predictive groups of more than ``STORED`` numbers and a log likelihood that would read
    more than ``SCORED``.

    ``log_likelihood`` holds what was observed: entries that a mask hides are dropped, and the rest lies along one
    dimension, ``y_observed`` of the site ``y``. Where a latent site has a value for each observation, the group is left
    out, and ``attrs["log_likelihood"]`` says so: the weights of ``arviz_stats.loo`` would be those of that value, and
    heavy-tailed (for z ~ N(0, 1) and x ~ N(z, s) their Pareto k is 1 / (1 + s^2)). Where ``poutine.scale`` weighs rows,
    the group is without it, and ``attrs["log_likelihood"]`` says that leaving a row out is then another thing.
    """
    size = len(next(iter(posterior.values()))) if posterior else 1
    values, dims = dict(posterior), _dims(bound)
    derived = _affordable(bound, size, left_out)
    if derived:
        functions = partial(scoring.latent_functions, bound, posterior, derived)
        values |= left_out.unless("deterministic sites", functions, {})
    made: dict[str, xr.Dataset | None] = {}
    if values:
        made["posterior"] = left_out.unless("posterior", partial(dataset_of, bound, values, dims, chains), None)
    if sample_stats:
        made["sample_stats"] = stats_of(dict(sample_stats))
    data = {n: v.detach().cpu().numpy() for n, v in bound.observations.items()}
    if data:
        made["observed_data"] = left_out.unless("observed_data", lambda: observed_of(bound, data, dims), None)
    drawn = made.get("posterior")
    if drawn is not None:
        held = {v.attrs.get("site", n) for n, v in drawn.data_vars.items()}
        for name in (n for n in values if n not in held):
            left_out.add(f"{name}: it is in result.draws alone")
        drawn.attrs.update(attrs or {})
    later = _later(bound, posterior, chains, size)
    return Groups(made, dict(attrs or {}), later, within, seed, left_out)


def _later(bound: BoundPair, posterior: Mapping[str, Tensor], chains: int, size: int) -> dict[str, Later]:
    """How to make the groups of the data; one that memory does not allow says so."""
    observed = bound.select("observed").values()
    if not observed:
        return {}
    replicated = size * sum(torch.Size(s.shape).numel() for s in observed)
    scored = size * sum(torch.Size(s.shape[: s.batch]).numel() for s in observed)
    draws, now = {n: v.cpu() for n, v in posterior.items()}, stamp(bound.data)
    found: dict[str, Later] = {}
    for name, make, count, reads, verb in (
        ("posterior_predictive", _predictive, replicated, 0, "posterior_predictive(result, data)"),
        ("log_likelihood", _log_likelihood, scored, replicated, "pointwise_log_likelihood(result, data)"),
    ):
        fits = count <= STORED and reads <= SCORED
        reason = "" if fits else f"{count:,} numbers, for fewer rows or draws; ask {verb}"
        found[name] = partial(_checked, partial(make, bound, draws, chains), bound, now, verb, reason)
    return found


def _checked(make: Later, bound: BoundPair, before: Any, verb: str, reason: str) -> tuple[xr.Dataset | None, str]:
    """A group of the data that the draws belong to.

    Raises:
        ValueError: It is too large, or the data were changed in place.
    """
    if reason:
        raise ValueError(reason)
    if stamp(bound.data) != before:
        raise ValueError(f"expected the data as they were, got them changed in place since; ask {verb}")
    return make()


def _predictive(bound: BoundPair, draws: Mapping[str, Tensor], chains: int) -> tuple[xr.Dataset | None, str]:
    size = len(next(iter(draws.values()))) if draws else 1
    found = scoring.draw_sites(bound.generator(), draws, size, bound.select("observed"))
    return dataset_of(bound, found, _dims(bound), chains), ""


def _log_likelihood(bound: BoundPair, posterior: Mapping[str, Tensor], chains: int) -> tuple[xr.Dataset | None, str]:
    draws = {n: v.to(bound.device) for n, v in posterior.items()}
    own = dependence.of_observations(bound, draws) if bound.source is None else dependence.by_plates(bound, draws)
    if own:
        return None, (
            f"left out: {', '.join(own)} has a value for each observation; pointwise_log_likelihood(result) is given "
            "it, log_evidence(result) integrates it out"
        )
    scores, flat = _likelihood(bound, draws)
    if not scores:
        return None, ""
    weighed = scoring.scaled_sites(bound, draws)
    note = (
        f"without the scale of {', '.join(weighed)}: arviz_stats.loo would leave out a part of a row, or a row that "
        "counts many times once"
    )
    plates = {n: d[: bound.sites[n].batch] for n, d in _dims(bound).items()}
    return dataset_of(bound, scores, plates | flat, chains), note if weighed else ""


def _likelihood(bound: BoundPair, posterior: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    r"""Log likelihood (S, \*plates) by site, masked entries dropped, and the dimensions of those that are flat."""
    if not bound.select("observed"):
        return {}, {}
    scores = scoring.log_likelihood_by_site(bound, posterior)
    seen = seen_of(bound, posterior)
    kept: dict[str, Tensor] = {}
    # What is summed over has the plates that it shares with all observed sites.
    summed, plates = scoring.summed_within(bound, posterior)
    flat = {n: list(plates) for n in scores} if summed and all(plates) else {}
    if all(bool(m.all()) for m in seen.values()):
        return scores, flat
    for name, score in scores.items():
        mask = rows_seen(bound, seen, plates if summed else None) if summed or name not in seen else seen[name]
        kept[name] = score if mask.all() else score[:, mask.to(score.device)]
        if not mask.all():
            flat[name] = [f"{name}_observed"]
    return {n: v for n, v in kept.items() if v[0].numel()}, flat


def _affordable(bound: BoundPair, size: int, left_out: LeftOut) -> list[str]:
    """Deterministic and summed-out sites whose size memory allows; the others are left out with a warning.

    They are taken from the smallest on: one that is wide costs no other one its place.
    """
    derived = [s for s in bound.sites.values() if s.role == "deterministic" or (s.role == "latent" and s.finite)]
    numbers = {s.name: size * torch.Size(s.shape).numel() for s in (*bound.select("observed").values(), *derived)}
    replicated = sum(numbers[n] for n in bound.select("observed"))
    kept, total = set[str](), 0
    for site in sorted(derived, key=lambda s: numbers[s.name]):
        total += numbers[site.name]
        if total <= STORED and replicated <= SCORED:
            kept.add(site.name)
    if wide := [s.name for s in derived if s.name not in kept]:
        said = f"left out {', '.join(wide)} ({sum(numbers[n] for n in wide):,} numbers), for fewer rows or draws"
        left_out.add(said)
        warnings.warn(f"{bound.name}: {said}", stacklevel=5)
    return [s.name for s in derived if s.name in kept]


def _dims(bound: BoundPair) -> dict[str, list[str]]:
    return {n: dims_of(bound, n) for n in bound.sites}
