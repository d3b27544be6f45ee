"""The opening of every recipe: a pair built from its seed and fitted to as many rows as its size has."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pyro.optim import PyroOptim
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from inference import Checkpoint, Result, fit, isolated, write_whole
from ppl_models.models.pair import Pair

P = TypeVar("P", bound=Pair)


T = TypeVar("T", bound=Tensor | nn.Module)


_PLACE: ContextVar[torch.device | None] = ContextVar("place", default=None)


class Weights:
    """What training has changed of the pairs of a recipe, in a file.

    Half precision is enough: it changes a log density by less than a thousandth of a nat per row.

    Args:
        path: The file.
        read: Whether pairs are taken from it and not trained.
    """

    def __init__(self, path: Path, read: bool = False) -> None:
        self.path, self.read = path, read
        self._held, self._parts = dict[str, Tensor](), count(1)

    def part(self) -> str:
        """Prefix of the names of the next pair that is fitted at once."""
        return f"{next(self._parts)}/"

    def restore(self, pair: nn.Module, part: str = "", call: Callable[[], Any] | None = None) -> None:
        """Put a pair where it was.

        Args:
            pair: The pair.
            part: Its prefix in the file.
            call: Called where the pair does not have all that is in the file, as a guide until it was called.

        Raises:
            ValueError: The file is not whole, has nothing of the pair, or something that it does not have.
        """
        try:
            held = load(gzip.decompress(self.path.read_bytes()))
        except (EOFError, OSError, SafetensorError, zlib.error) as error:
            raise ValueError(f"weights: expected a whole file of weights, got {self.path} ({error})") from None
        own = {n.removeprefix(part): v for n, v in held.items() if n.startswith(part)}
        if not own:
            raise ValueError(f"weights: expected those of fit {part.rstrip('/')} in {self.path}, got none")
        others = pair.load_state_dict(own, strict=False).unexpected_keys
        if others and call:
            call()
            others = pair.load_state_dict(own, strict=False).unexpected_keys
        if others:
            raise ValueError(f"weights: expected those of {type(pair).__name__}, got {', '.join(others)} too")

    def keep(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], part: str = "") -> None:
        """Write what differs of the state of a pair, with that of the pairs before it.

        But for discriminators, by which nothing is evaluated.
        """
        named = {n: v for n, v in after.items() if not n.startswith("discriminator")}
        changed = {n: v for n, v in named.items() if n not in before or not torch.equal(before[n], v)}
        self._held |= {f"{part}{n}": _halved(v).cpu().contiguous() for n, v in changed.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, lambda file: file.write_bytes(gzip.compress(save(self._held), mtime=0)))


def _halved(value: Tensor) -> Tensor:
    """A tensor in half precision, unless it is of integers or has numbers beyond 65,504."""
    return value.half() if value.is_floating_point() and bool(value.half().isfinite().all()) else value


_WEIGHTS: ContextVar[Weights | None] = ContextVar("weights", default=None)


_KEPT: ContextVar[tuple[Checkpoint, Iterator[int]] | None] = ContextVar("kept", default=None)


@dataclass(frozen=True)
class Shown:
    """A fit that is drawn.

    Attributes:
        result: The Result.
        rows: The data, by name.
        losses: Loss per row of each step.
        valid: Steps, and the loss per validation row after them.
        points: Points (N, 2) of the plane and what they are, in place of rows that the pair makes.
    """

    result: Result
    rows: Mapping[str, Tensor]
    losses: np.ndarray
    valid: Sequence[tuple[int, float]] = ()
    points: Sequence[tuple[Tensor, str]] = ()


@dataclass(frozen=True)
class Judged:
    """Several cases that are judged, and are drawn in place of a fit.

    Attributes:
        figures: What each case has of each measure, by measure and case.
        limits: What a case that is right has at most, by measure.
    """

    figures: Mapping[str, Mapping[str, float]]
    limits: Mapping[str, float]


_SHOWN: ContextVar[list[Shown | Judged] | None] = ContextVar("shown", default=None)


@contextmanager
def seen() -> Iterator[list[Shown | Judged]]:
    """Collect the fit that is to be drawn of the recipes in the block: the last that they show, else their first."""
    held: list[Shown | Judged] = []
    token = _SHOWN.set(held)
    try:
        yield held
    finally:
        _SHOWN.reset(token)


def show(
    result: Result,
    data: Any,
    losses: np.ndarray | None = None,
    valid: Sequence[tuple[int, float]] = (),
    *,
    first: bool = False,
) -> None:
    """Let a fit be drawn, in place of another, or (``first``) if there is no other."""
    held = _SHOWN.get()
    if held is None or (first and held):
        return
    rows = data if isinstance(data, Mapping) else {"x": data}
    count = len(next(iter(rows.values())))
    losses = np.asarray(result.losses if losses is None else losses) / count
    held[:] = [Shown(result, rows, losses, tuple(valid))]


def show_judged(judged: Judged) -> None:
    """Let cases that are judged be drawn."""
    held = _SHOWN.get()
    if held is not None:
        held[:] = [judged]


def show_points(*points: tuple[Tensor, str]) -> None:
    """Let points (N, 2) of the plane, each set with its name, be drawn beside the fit that is shown."""
    held = _SHOWN.get()
    if held and isinstance(held[0], Shown):
        held[:] = [replace(held[0], points=points)]


@contextmanager
def checkpoints_in(folder: Path) -> Iterator[None]:
    """Let each call of :func:`trained` in the block keep its checkpoint in a folder: the first in ``1``, and so on."""
    token = _KEPT.set((Checkpoint(folder), count(1)))
    try:
        yield
    finally:
        _KEPT.reset(token)


@contextmanager
def running_on(device: torch.device | None) -> Iterator[None]:
    """Let recipes in the block run on a device; None: where data and pairs are."""
    token = _PLACE.set(device)
    try:
        yield
    finally:
        _PLACE.reset(token)


@contextmanager
def weights_at(path: Path, *, read: bool = False) -> Iterator[None]:
    """Let recipes in the block write the weights of their pairs to a file, or take them from it and train nothing."""
    token = _WEIGHTS.set(Weights(path, read))
    try:
        yield
    finally:
        _WEIGHTS.reset(token)


def reads_weights() -> bool:
    """Whether recipes take the weights of their pair from a file, and train nothing."""
    weights = _WEIGHTS.get()
    return weights is not None and weights.read


def placed(what: T) -> T:
    """Data or a module where the recipe runs."""
    place = _PLACE.get()
    moved: Any = what if place is None else what.to(place)
    return moved  # type: ignore[no-any-return]


def trained(
    make: Callable[[], P], data: Any, *objective: Any, method: Callable[..., Result] = fit, seed: int, **arguments: Any
) -> tuple[P, Result]:
    """Build a pair from a seed and fit it, from where it was if it was killed.

    Args:
        make: Builds the pair.
        data: Data of the fit.
        objective: The objective, unless it is the default one.
        method: ``fit``, or another method of the same arguments.
        seed: Seed of the pair and of the fit.
        **arguments: Those of the method.
    """
    pair = _built(make, seed)
    return pair, fitted(pair, data, *objective, method=method, seed=seed, **arguments)


def _built(make: Callable[[], P], seed: int) -> P:
    with isolated(seed):
        return placed(make())


def fitted(
    pair: Any, data: Any, *objective: Any, method: Callable[..., Result] = fit, keep: bool = True, **arguments: Any
) -> Result:
    """Fit a pair, from where it was if it was killed.

    Args:
        pair: The pair, or a (model, guide) tuple.
        data: Data of the fit.
        objective: The objective, unless it is the default one.
        method: ``fit``, or another method of the same arguments.
        keep: Whether weights are kept, and taken from where they are. Not where the losses of the fit are used.
        **arguments: Those of the method.
    """
    weights, halves = _WEIGHTS.get(), pair if isinstance(pair, tuple) else (pair,)
    modules = [half for half in halves if isinstance(half, nn.Module)]
    if weights is None or not modules or not keep:
        return _fitted(pair, data, *objective, method=method, **arguments)
    module, part = pair if isinstance(pair, nn.Module) else nn.ModuleList(modules), weights.part()
    if weights.read:
        again = partial(method, pair, data, *objective, **(arguments | {"steps": 0}))
        weights.restore(module, part, again)
        return again()
    before = _state(module)
    result = _fitted(pair, data, *objective, method=method, **arguments)
    weights.keep(before, module.state_dict(), part)
    return result


def _fitted(pair: Any, data: Any, *objective: Any, method: Callable[..., Result], **arguments: Any) -> Result:
    """Fit a pair, from where it was if it was killed; its weights are kept by whoever calls."""
    kept = _KEPT.get()
    if kept is not None:
        arguments["checkpoint"] = kept[0].part(str(next(kept[1])))
    result = method(pair, data, *objective, **arguments)
    show(result, data, first=True)
    return result


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in module.state_dict().items()}


def kept(name: str, compute: Callable[[], float]) -> float:
    """A figure that takes long to compute, as it was found before the recipe was killed.

    Args:
        name: Its name in the recipe.
        compute: Computes it.
    """
    checkpoints = _KEPT.get()
    if checkpoints is None:
        return compute()
    path = checkpoints[0].folder / f"{name}.json"
    if not path.exists():
        value = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write_text(json.dumps(value)))
    return float(json.loads(path.read_text()))


def trained_by_stages(
    make: Callable[[], P],
    data: Tensor | Callable[[int, int], Tensor],
    *objective: Any,
    stages: Sequence[tuple[int, float]],
    score: Callable[[Result], float],
    weight_decay: float = 0.0,
    batch: int = 100,
    seed: int,
) -> tuple[Result, dict[str, float]]:
    """Fit a pair in stages, each by an Adam of its own, and keep the best by validation rows.

    After a stage that is no better, the next one with a lower rate begins at the best so far.

    Args:
        make: Builds the pair.
        data: Rows of the fit, or a function from a stage and its epochs to its rows: some copies of the training rows,
            each with noise of its own.
        objective: The objective, unless it is the default one.
        stages: Epochs and learning rate of each stage.
        score: From a Result to its mean log density of validation rows, in nats.
        weight_decay: Precision of a normal prior of all parameters, whose mode Adam looks for.
        batch: Rows of a step.
        seed: Seed of the pair and of the fits.

    Returns:
        The Result of the best stage, and ``valid``, its negative score, ``epochs`` until its end, and ``train``, its
        mean loss per row in its last epoch.
    """
    pair = _built(make, seed)
    weights = _WEIGHTS.get()
    rows_of = data if callable(data) else lambda *_: data
    rows = rows_of(0, 1)
    per_epoch = max(1, len(rows) // batch)
    if weights is not None and weights.read:
        weights.restore(pair)
        return fit(pair, rows, *objective, steps=0, draws=1, seed=seed, progress=False), {}
    before = _state(pair)
    best, held, done, left = None, before, 0, list(enumerate(stages))
    losses, scores = list[np.ndarray](), list[tuple[int, float]]()
    found = {"valid": math.inf}
    while left:
        k, (epochs, rate) = left.pop(0)
        # Those of the last stage may be large.
        del rows
        rows = rows_of(k, epochs)
        result = _fitted(
            pair,
            rows,
            *objective,
            method=fit,
            seed=seed * len(stages) + k,
            steps=epochs * per_epoch,
            batch=batch,
            draws=1,
            optimizer=PyroOptim(torch.optim.Adam, {"lr": rate, "weight_decay": weight_decay}),
        )
        done, valid = done + epochs, -score(result)
        losses.append(np.asarray(result.losses) / len(rows))
        scores.append((done * per_epoch, valid))
        if valid < found["valid"]:
            best, held = result, _state(pair)
            found = {"valid": valid, "epochs": done, "train": float(losses[-1][-per_epoch:].mean())}
        elif best is not None:
            pair.load_state_dict(held)
            left = [stage for stage in left if stage[1][1] < rate]
    if best is None:
        raise ArithmeticError("valid: expected a finite score of the first stage, got none")
    show(best, rows, np.concatenate(losses) * len(rows), scores)
    if weights is not None:
        weights.keep(before, held)
    return best, found
