r"""A pair bound to its data.

A pair is an object with ``model`` and ``guide``, a ``(model, guide)`` tuple of plain Pyro functions, or, where no guide
is needed, a model alone. :func:`bind` turns any of them and its data into a :class:`BoundPair`, which all verbs use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference.core.checks import check_count, check_device
from inference.core.contracts import Pair
from inference.core.given import (
    Names,
    by_name,
    check_rounding,
    check_same_length,
    checked,
    doubtful,
    names_in,
    readings,
    to_tensor,
)
from inference.core.halves import (
    accepted_by,
    fitted,
    halves_of,
    held_by,
    modules_of,
    move,
    name_of,
    parameters_of,
    precision_of,
)
from inference.core.handlers import REFUSALS, Uncondition, evaluating, first_valid, isolated
from inference.core.minibatch import count_rows, cut_by_rows
from inference.core.packing import fingerprints
from inference.core.sites import Site, sites_of
from inference.core.source import Source, source_of


class _Structure(NamedTuple):
    """What one run of the model on its data shows."""

    sites: dict[str, Site]
    depth: int
    observes: bool
    observations: dict[str, Any]
    subsampled: tuple[str, ...]
    double: bool
    layers: int


class _GuideStructure(NamedTuple):
    """What one run of the guide on the data shows."""

    latent: frozenset[str] = frozenset()
    enumerated: bool = False
    alien: tuple[str, ...] = ()
    layers: int = 0


@dataclass(frozen=True, eq=False)
class BoundPair:
    """A model, a guide and data by name.

    Attributes:
        pair: The pair as it was given.
        name: Its name, for messages.
        model: The model, called by name with those data that it takes.
        guide: The guide likewise; None where there is none.
        data: Data by name.
        takes_rows: Whether the model has the arguments ``size`` and ``rows``.
        asked: The pair as its contract sees it.
        names: Names that frames among the data bring along.
        memo: What has been found out about the pair and these data, whichever guide.
        source: Where minibatches are read from; ``data`` then hold a sample of the rows, with their ``rows`` and full
            ``size``. None: ``data`` hold all rows.
    """

    pair: Any
    name: str
    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    data: dict[str, Any]
    takes_rows: bool
    asked: Pair
    names: Names = field(default_factory=Names)
    memo: dict[str, Any] = field(default_factory=dict)
    source: Source | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What has been found out holds graphs; another process finds it out again.
        return {**vars(self), "memo": {}}

    @cached_property
    def rows(self) -> int:
        """Number of rows: the common first dimension of the data, or of those in the plate of rows; 0 without data."""
        return count_rows(self) if self.source is None else len(self.source)

    @cached_property
    def cut(self) -> frozenset[str]:
        """Names of the data that have one entry per row, which a minibatch cuts."""
        return cut_by_rows(self)

    @property
    def generated(self) -> tuple[str, ...]:
        """Deterministic sites that bear the name of data: what a model without a likelihood generates."""
        return tuple(n for n in self.select("deterministic") if n in self.data)

    @property
    def numel(self) -> int:
        """Number of numbers in the data, all rows included."""
        return self.held if self.source is None else self.held * self.rows // len(self.data["rows"])

    @property
    def held(self) -> int:
        """Number of numbers of the data that are in memory."""
        return sum(v.numel() for v in self.data.values() if isinstance(v, Tensor))

    @property
    def shown_rows(self) -> str:
        """Which rows are in memory, in words: ``1,000 of 20,000, evenly spaced``; empty where all are."""
        return "" if self.source is None else f"{len(self.data['rows']):,} of {self.rows:,}, evenly spaced"

    def check_in_memory(self, what: str) -> None:
        """Raise a ValueError where rows are read by minibatches, so that those in memory are not all of them."""
        if self.source is not None:
            raise ValueError(
                f"data: expected all rows in memory for {what}, got {self.shown_rows}; give an array in memory"
            )

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The torch modules behind the pair."""
        return modules_of(self.pair)

    @property
    def device(self) -> torch.device:
        """Where the data are; without data, where the parameters are."""
        halves = self.pair if isinstance(self.pair, tuple) else (self.pair,)
        tensors = chain((v for v in self.data.values() if isinstance(v, Tensor)), *map(held_by, halves))
        return next((t.device for t in tensors), torch.device("cpu"))

    def arguments(self, rows: Tensor | None = None) -> dict[str, Any]:
        """Arguments of the model: all data, or those of a minibatch with its ``rows`` and full ``size``."""
        if rows is None:
            return dict(self.data)
        if self.source is not None:
            batch = {**self.data, **self.source.read(rows)}
        else:
            batch = {k: v[rows] if k in self.cut else v for k, v in self.data.items()}
        return {**batch, "size": self.rows, "rows": rows}

    def minibatch(self, rows: Tensor) -> BoundPair:
        """The pair bound to some rows, which count as a part of all."""
        memo = {"ways": self.memo.setdefault("ways", {})} | {k: v for k, v in self.memo.items() if k == "redrawn"}
        return replace(self, data=self.arguments(rows), memo=memo, source=None)

    def fingerprints(self) -> dict[str, Any]:
        """Shape, type and SHA-256 of the data by name, read by blocks of rows."""
        if self.source is None:
            return fingerprints(self.data)
        read = self.source.fingerprints()
        return {**fingerprints({n: v for n, v in self.data.items() if n not in read and n != "rows"}), **read}

    def generator(self, size: int | None = None) -> BoundPair:
        """The pair with nothing observed: a run of its model draws all sites."""
        if size is not None:
            check_count("size", size)
            if "size" not in parameters_of(self.model):
                raise ValueError(f"size: expected none, for the model has no argument size, got {size}; give it data")
        # The rows in memory are those of another size.
        kept = {n: v for n, v in self.data.items() if n != "rows" or self.source is None}
        data = self.data if size is None else {**kept, "size": size}
        return replace(self, model=Uncondition()(self.model), guide=None, data=data, memo={})

    def with_data(self, data: Any) -> BoundPair:
        """The model with other data, to predict or score them. The guide, which may read its data, is left out."""
        return replace(self.rebound(data), guide=None)

    def rebound(self, data: Any) -> BoundPair:
        """The pair bound to other data, which are moved to where its own are."""
        bound = _bind(self.pair, data, self.device)
        bound.names.check(self.names)
        return bound

    @property
    def _structure(self) -> _Structure:
        if "structure" not in self.memo:
            try:
                self.memo["structure"] = self.run()
            except RuntimeError as error:
                _check_together(self, error)
                raise
        return self.memo["structure"]

    def run(self, *, scored: bool = False) -> _Structure:
        """Run the model on its data; with ``scored`` observed whole numbers and booleans are scored as well."""
        model = poutine.trace(poutine.mask(self.model, mask=False))
        with isolated(0), torch.no_grad(), poutine.block():
            trace = first_valid(lambda: model.get_trace(**self.arguments()))
        sites = sites_of(trace)
        nodes: list[Any] = [n for n in trace.nodes.values() if n["type"] == "sample"]
        dims = [-f.dim for n in nodes for f in n["cond_indep_stack"] if f.vectorized]
        batch = [s.batch for s in sites.values()]
        observes = any(n["is_observed"] and not n["infer"].get("_deterministic") for n in nodes)
        values: dict[str, Any] = {n: trace.nodes[n]["value"] for n, s in sites.items() if s.role == "observed"}
        # The plate of a minibatch is subsampled by its caller.
        stacks = [n["cond_indep_stack"] for n in nodes] if self.data.get("rows") is None else []
        frames = [f for stack in stacks for f in stack if f.full_size is not None]
        subsampled = tuple(dict.fromkeys(f.name for f in frames if f.size < f.full_size))
        params = [n["value"] for n in trace.nodes.values() if n["type"] == "param"]
        numbers = [*params, *(n["value"] for n in nodes if not n["is_observed"])]
        double = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in numbers)
        for node in nodes if scored else ():
            if node["is_observed"] and isinstance(node["value"], Tensor) and not node["value"].is_floating_point():
                # A distribution that does not take them says so.
                node["fn"].log_prob(node["value"])
        return _Structure(sites, max(dims + batch, default=0), observes, values, subsampled, double, _layers(trace))

    @property
    def sites(self) -> dict[str, Site]:
        """Sites of the model in the order of a run on the data."""
        return self._structure.sites

    @property
    def depth(self) -> int:
        """Number of dimensions that plates use, from the right (Pyro's ``max_plate_nesting``)."""
        return self._structure.depth

    @property
    def observes(self) -> bool:
        """Whether the model observes anything: a site with data, or a factor."""
        return self._structure.observes

    @property
    def observations(self) -> dict[str, Tensor]:
        """Values of the observed sites."""
        return self._structure.observations

    @property
    def subsampled(self) -> tuple[str, ...]:
        """Names of the plates that the model itself subsamples: each of its runs sees other elements of them."""
        return self._structure.subsampled

    @property
    def redrawn(self) -> tuple[str, ...]:
        """Observed sites whose values each run draws anew, given the latent ones: rows that a model picks itself."""
        if "redrawn" not in self.memo:
            with isolated(0), torch.no_grad(), poutine.block(), evaluating(self.modules):
                first = first_valid(lambda: poutine.trace(self.model).get_trace(**self.arguments()))
                again = poutine.trace(poutine.replay(self.model, trace=first)).get_trace(**self.arguments())
            values = {n: [t.nodes[n]["value"] if n in t.nodes else None for t in (first, again)] for n in self.sites}
            self.memo["redrawn"] = tuple(n for n in self.select("observed") if not _alike(*values[n]))
        return self.memo["redrawn"]

    def check_whole(self) -> None:
        """Raise a ValueError where each run of the model sees other data than the one before."""
        if self.subsampled:
            got = f"a plate that it subsamples: {', '.join(self.subsampled)}"
            raise ValueError(f"model: expected all rows in each run, got {got}")
        if self.redrawn:
            got = f"a part that it draws itself: {', '.join(self.redrawn)}"
            raise ValueError(f"model: expected the same data in each run, got {got}; fit(batch=) draws rows")

    @cached_property
    def _guide_structure(self) -> _GuideStructure:
        if self.guide is None:
            return _GuideStructure()
        with isolated(0), torch.no_grad(), poutine.block():
            trace = poutine.trace(self.guide).get_trace(**self.arguments())
        sites = sites_of(trace)
        latent = frozenset(n for n, s in sites.items() if s.role == "latent")
        observed = {n for n, s in sites.items() if s.role == "observed"} & set(self.select("observed"))
        nodes: dict[str, Any] = dict(trace.nodes)
        marked = any(n["type"] == "sample" and n["infer"].get("enumerate") for n in nodes.values())
        extra = observed | (latent - set(self.select("latent")))
        alien = tuple(n for n in sorted(extra) if not nodes[n]["infer"].get("is_auxiliary"))
        layers = 0 if isinstance(getattr(self.guide, "__self__", self.guide), AutoGuide) else _layers(trace)
        return _GuideStructure(latent & set(self.sites), marked, alien, layers)

    @property
    def layers(self) -> int:
        """Number of layers of networks in the model: matrices of torch modules."""
        return self._structure.layers

    @property
    def guide_layers(self) -> int:
        """The same of the guide; none of an autoguide."""
        return self._guide_structure.layers

    @property
    def guided(self) -> frozenset[str]:
        """Names of the latent sites that the guide draws."""
        return self._guide_structure.latent

    @property
    def unguided(self) -> tuple[str, ...]:
        """Latent sites that the guide leaves out and that cannot be summed out."""
        return tuple(n for n, s in self.select("latent").items() if not s.finite and n not in self.guided)

    @property
    def alien(self) -> tuple[str, ...]:
        """Sites of the guide that are no latent sites of the model: not auxiliary ones, or observed in both."""
        return self._guide_structure.alien

    @property
    def summed(self) -> bool:
        """Whether a finite site is summed out: the guide leaves it out, or marks it for enumeration."""
        return self._guide_structure.enumerated or bool(self.enumerated)

    @cached_property
    def enumerated(self) -> tuple[str, ...]:
        """Finite latent sites that the guide leaves out; they are summed out exactly."""
        return tuple(n for n, s in self.select("latent").items() if s.finite and n not in self.guided)

    def select(self, role: str) -> dict[str, Site]:
        """The sites of one role."""
        return {s.name: s for s in self.sites.values() if s.role == role}


def bind_by_rows(pair: Any, data: Any, device: Any = None) -> BoundPair:
    """:func:`bind`, with memory-mapped arrays and datasets left where they are: minibatches read their rows.

    The checks of the pair see the arrays by blocks of rows, and of a dataset a sample.

    Raises:
        ValueError: The model has no arguments ``size`` and ``rows``, or the data do not fit it.
    """
    accepted, _ = accepted_by(halves_of(pair)[0])
    given = by_name(data, accepted)
    source = source_of(given, [n for n in accepted if n not in ("size", "rows")])
    if source is None:
        return bind(pair, data, device)
    if not {"size", "rows"} <= set(accepted):
        raise ValueError("data: expected a model with the arguments size and rows, whose rows can be read one by one")
    rows = source.sample()
    rest = {n: v for n, v in given.items() if n not in source.columns and v is not source.items}
    # Floats of arrays are rounded to the precision of the model, those of tensors are not.
    arrays = {n for n, v in source.columns.items() if not isinstance(v, Tensor)}
    read = {n: v.numpy() if n in arrays else v for n, v in source.read(rows).items()}
    if len(rows) == len(source):
        return bind(pair, {**rest, **read}, device)
    bound = bind(pair, {**rest, **read, "size": len(source), "rows": rows}, device)
    types = {n: bound.data[n].dtype for n in read}
    source = replace(source, dtypes=types)
    if bound.asked.rowwise and source.columns:
        for block in source.blocks():
            bound.asked.check(**{**{n: bound.data[n] for n in rest}, **{n: v.to(types[n]) for n, v in block.items()}})
    return replace(bound, source=source)


def bind(pair: Any, data: Any = None, device: Any = None) -> BoundPair:
    """Read a pair and its data into a :class:`BoundPair`.

    Args:
        pair: Anything with ``.model`` (and ``.guide``), a ``(model, guide)`` tuple, or a model.
        data: A tensor or array (the model's first argument, ``x`` of a pair), a mapping of names to them, a frame, or
            None for a model that needs no argument. Columns of a frame with the name of an argument are that argument,
            the others together the first one; a column of type category becomes codes, with names as coordinates.
            Floats of arrays and frames take torch's default precision, unless the model's own numbers are float64;
            tensors keep theirs. Whole numbers and booleans become floats where a site, or the model, does not take
            them.
        device: Where to move the modules of the pair, in place, and the data. Default: they stay where they are.

    Raises:
        TypeError: The pair is none of these.
        ValueError: The data do not fit the model's arguments or the pair's own checks, or there is no such device.
    """
    place = check_device(device)
    if place is not None:
        move(pair, place)
    return _bind(pair, data, place)


def _bind(pair: Any, data: Any, place: torch.device | None) -> BoundPair:
    """:func:`bind` with the data moved to a place."""
    model, guide = halves_of(pair)
    accepted, free = accepted_by(model)
    given = by_name(data, accepted)
    named = {k: to_tensor(v, k) for k, v in given.items()}
    # Nothing can be differentiated that depends on a tensor of torch.inference_mode.
    named = {k: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for k, v in named.items()}
    unknown = sorted(set(named) - set(accepted))
    if unknown and not free:
        known = ", ".join(accepted) or "none"
        raise ValueError(f"data: expected arguments of the model ({known}), got {', '.join(unknown)}")
    if place is not None:
        named = {k: v.to(place) if isinstance(v, Tensor) else v for k, v in named.items()}
    missing = [k for k, required in accepted.items() if required and k not in named]
    if missing:
        got = ", ".join(named) or "none"
        raise ValueError(f"data: expected {', '.join(missing)}, which the model needs, got {got}")
    owner = pair if not isinstance(pair, tuple) else getattr(model, "__self__", model)
    asked = Pair.of(owner)
    if asked.rowwise:
        check_same_length(named)
    taken = checked(asked, named, precision_of(pair))
    made = [n for m in modules_of(pair) for n, p in m.named_parameters() if p.is_inference()]
    if made:
        raise ValueError(f"pair: expected parameters made outside of torch.inference_mode, got {', '.join(made)}")
    empty = [n for n, v in named.items() if isinstance(v, Tensor) and v.dim() and not len(v)]
    if empty:
        raise ValueError(f"{empty[0]}: expected at least one row, got none")
    bound = BoundPair(
        pair=pair,
        name=name_of(pair),
        model=fitted(model),
        guide=None if guide is None else fitted(guide),
        data=taken,
        takes_rows={"size", "rows"} <= set(accepted),
        asked=asked,
        names=names_in(given),
    )
    if doubtful(taken):
        bound = _typed(bound, given)
    check_rounding(named, bound.data)
    return bound


def _typed(bound: BoundPair, given: Mapping[str, Any]) -> BoundPair:
    """The pair bound to its data in types that the model takes.

    Raises:
        ValueError: The model takes the data in no type.
    """
    failure, made = "", None
    for data, rounds in readings(given, bound.data, precision_of(bound.pair)):
        reading = replace(bound, data=data, memo={})
        try:
            found = reading.memo["structure"] = reading.run(scored=True)
        except REFUSALS as error:
            failure = failure or str(error)
            continue
        if not rounds or not found.double:
            return reading
        made = made or reading
    said = " ".join(failure.split("Trace Shapes")[0].split())
    if made is None and any(word in said.lower() for word in ("dtype", "double", "long", "bool", "scalar type")):
        kinds = {k: str(v.dtype).removeprefix("torch.") for k, v in bound.data.items() if isinstance(v, Tensor)}
        got = ", ".join(f"{k} {kind}" for k, kind in kinds.items())
        raise ValueError(
            f"data: expected types that the model takes, got {got} ({said[:200]}); give tensors of the type of its "
            "priors and parameters, such as x.float()"
        )
    # What fails for another reason is the verb's to say.
    return made or bound


def enumerate_finite(bound: BoundPair) -> Callable[..., Any]:
    """The model with the finite sites that the guide leaves out marked for parallel enumeration."""
    if not bound.enumerated:
        return bound.model
    return config_enumerate(bound.model, default="parallel")


def _alike(a: Any, b: Any) -> bool:
    """Whether two values that a site observes are the same numbers."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _check_together(bound: BoundPair, error: RuntimeError) -> None:
    """Raise a ValueError in place of an error that torch may raise because pair and data are on several devices."""
    places = {n: v.device for n, v in bound.data.items() if isinstance(v, Tensor)}
    parameters = {t.device for m in bound.modules for t in (*m.parameters(), *m.buffers())}
    if len(parameters | set(places.values())) > 1:
        found = [f"{n} on {place}" for n, place in places.items()]
        found += [f"the pair on {place}" for place in sorted(parameters, key=str)]
        raise ValueError(
            f"device: expected pair and data on one device, got {', '.join(found)}; device= moves both"
        ) from error


def _layers(trace: poutine.Trace) -> int:
    """Layers of networks in a run: parameters of torch's modules that are matrices, by the names of torch."""
    params = [(str(n["name"]), n["value"]) for n in trace.nodes.values() if n["type"] == "param"]
    # ``encoder$$$0.weight`` of a module that a function registers, ``encoder.0.weight`` of a Pyro module.
    weights = [v for name, v in params if ".weight" in name.replace("$$$", ".")]
    return sum(isinstance(v, Tensor) and v.dim() > 1 for v in weights)
