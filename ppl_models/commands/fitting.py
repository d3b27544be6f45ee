"""``ppl-models fit`` and ``sample``: one method on one pair."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.markup import escape

import inference
from inference import Comparison, Result, Saved, isolated, launched, stem_of
from ppl_models.commands.arguments import about, changed, named, prepare, taken
from ppl_models.commands.printing import FAILED, INTERRUPTED, complain, frame, out, print_summary, print_whole
from ppl_models.data.sets import Dataset
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import find
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.pictures import save
from ppl_models.zoo.restore import entry_of, opened


def fit(device: str, **arguments: Any) -> None:
    """Fit a pair by a method of its own, report on it, and draw its pictures.

    Processes that torchrun has started share the rows; the first one prints and writes.
    """
    with launched(device) as first:
        if not first:
            warnings.simplefilter("ignore")
        _fit(first, device=device, **arguments)


def _fit(
    first: bool,
    pair: str | None,
    data_name: str | None,
    label: str | None,
    settings: list[str] | None,
    method: str | None,
    start: str | None,
    seed: int,
    device: str,
    out_dir: str | None,
    page: bool,
    **options: Any,
) -> None:
    begun: Mapping[str, Any] = {}
    if start is not None:
        begun = _begun(start, pair=pair, data=data_name, method=method, label=label, set=settings or None)
        pair, data_name, method = begun["pair"], begun["data"], begun["method"]
        if method == "chains":
            raise ValueError(f"from: expected the folder of a fit, got one of chains, {start}; use ppl-models sample")
    entry = changed(find(_given(pair)), settings) if start is None else entry_of(begun)
    name = next(iter(entry.fits)) if method is None else named("method", method, entry.methods)
    if name not in entry.fits:
        raise ValueError(f"method: expected {' or '.join(entry.fits)}, got chains, {name}; use ppl-models sample")
    chosen = taken(name, entry.fits[name], {n: v for n, v in options.items() if v is not None})
    dataset, folder = prepare(entry, data_name, out_dir, device, label)
    if start is None:
        with isolated(seed):
            model = entry.pair(dataset)
    else:
        model = opened(start).result.bound.pair
        if not isinstance(model, Pair):
            raise ValueError(f"from: expected a fit of the pair's own guide, got {name}, which has one of its own")
        model = model.to(device)
    result = entry.fits[name](model, dataset.train, seed=seed, **chosen)
    if not first:
        return
    # A pair that is restored is built from the seed that it was first built from.
    made = about(entry, dataset, name, int(begun.get("seed", seed)))
    report(result, folder, name, made)
    if page:
        say_page(result, folder, made, entry, dataset)
    check_whole(result)
    if entry.report:
        print_whole(frame(entry.report(model, dataset.test)))
    for path in save(model, dataset.test, dataset.shape, folder) if dataset.shape else ():
        out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)


def sample(
    pair: str | None,
    data_name: str | None,
    label: str | None,
    settings: list[str] | None,
    kernel: str | None,
    start: str | None,
    seed: int,
    device: str,
    out_dir: str | None,
    page: bool,
    **options: Any,
) -> None:
    """Sample a pair's posterior, or more of it, and report on it."""
    chosen = None if kernel is None else named("kernel", kernel, inference.kernels.__all__)
    begun: Mapping[str, Any] = {}
    if start is not None:
        begun = _begun(start, pair=pair, data=data_name, label=label, set=settings or None)
        for option in ("warmup", "chains", "checkpoint"):
            if options[option] is not None:
                raise ValueError(f"{option}: expected none beside --from, got {options[option]}")
        if kernel is not None:
            raise ValueError(f"kernel: expected none beside --from, which goes on with its own, got {kernel}")
        entry = entry_of(begun)
        dataset, folder = prepare(entry, begun["data"], out_dir, device)
        more = {} if options["draws"] is None else {"draws": options["draws"]}
        result = opened(start).result.extend(**more, seed=seed)
    else:
        entry = changed(find(_given(pair)), settings)
        dataset, folder = prepare(entry, data_name, out_dir, device, label)
        with isolated(seed):
            model = entry.pair(dataset)
        factory = None if chosen is None else getattr(inference.kernels, chosen)
        result = inference.sample(model, dataset.train, factory, seed=seed, **options)
    made = about(entry, dataset, "chains", int(begun.get("seed", seed)))
    report(result, folder, result.method, made)
    if page:
        say_page(result, folder, made, entry, dataset)
    check_whole(result)


def _given(pair: str | None) -> str:
    """The name of the pair, which only a run that goes on may leave out."""
    if pair is None:
        raise ValueError("pair: expected the name of a pair, or --from with a folder, got none")
    return pair


def _begun(start: str, **asked: Any) -> Mapping[str, Any]:
    """What the folder of a Result says of how it was made, which has to be what was asked for."""
    said = Saved.read(start).about
    for name, value in asked.items():
        if value is not None and value != said.get(name):
            raise ValueError(f"{name}: expected {said.get(name)}, which {start} holds, got {value}")
    return said


def unfit(result: Result) -> str:
    """Why the result of a fit is none: it ended early, or its loss is higher than at the start; empty if it is one."""
    if result.ended:
        return result.ended
    losses, tenth = result.losses, len(result.losses) // 10
    if losses.ndim > 1 or tenth < 10:
        return ""
    first, last = losses[:tenth], losses[-tenth:]
    risen, error = last.mean() - first.mean(), math.sqrt((first.var() + last.var()) / tenth)
    if np.isfinite(last).all() and not risen > 3 * error:
        return ""
    return f"diverged: its loss went from {first.mean():.4g} to {last.mean():.4g}; try a lower learning rate"


def check_whole(result: Result) -> None:
    """End the command where the fit is none; an interrupted one with the code of an interrupt."""
    if problem := unfit(result):
        complain(f"the fit {problem}")
        raise typer.Exit(INTERRUPTED if result.interrupted else FAILED)


def report(result: Result, folder: Path, name: str, about: dict[str, Any]) -> None:
    print_summary(result.summary())
    out.print(escape(str(result)), highlight=False)
    stem = stem_of(name) + ("-partial" if unfit(result) else "")
    out.print(f"[dim]{result.save(folder / stem, about)}[/]", highlight=False, soft_wrap=True)


def say_page(made: Result | Comparison, folder: Path, about: dict[str, Any], entry: Entry, dataset: Dataset) -> None:
    """Write the page of a Result or a comparison, and say where it stands."""
    told = {"title": entry.title, **about}
    path = made.report(folder / "report.html", about=told, shape=dataset.shape)
    out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)
