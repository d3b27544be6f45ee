"""``ppl-models fit`` and ``sample``: one method on one pair."""

from __future__ import annotations

import os
import warnings
from typing import Any

import inference
from inference import launched
from ppl_models.commands.arguments import named, taken
from ppl_models.commands.job import Job
from ppl_models.commands.printing import announce, frame, out, print_whole
from ppl_models.models.pair import Pair
from ppl_models.zoo.pictures import save
from ppl_models.zoo.restore import opened


def fit(**arguments: Any) -> None:
    """Fit a pair by a method of its own, report on it, and draw its pictures.

    Processes that torchrun has started share the rows; the first one prints and writes.
    """
    job, own = Job.of(arguments)
    with launched(job.device) as first:
        if not first:
            warnings.simplefilter("ignore")
        _fit(job, first, **own)


def _fit(job: Job, first: bool, method: str | None, **options: Any) -> None:
    name = _method(job, method)
    chosen = taken(name, job.entry.fits[name], {n: v for n, v in options.items() if v is not None})
    dataset, folder = job.prepared
    model = job.new_pair() if job.start is None else _fitted(job.start, name).to(job.device)
    if first:
        announce(f"fitting {job.entry.title} to {dataset.name} by {name}: {dataset.rows:,} rows")
    result = job.entry.fits[name](model, dataset.train, seed=job.seed, **chosen)
    if not first:
        return
    job.conclude(result, name, name)
    if job.entry.report:
        print_whole(frame(job.entry.report(model, dataset.test)))
    for path in save(model, dataset.test, dataset.shape, folder) if dataset.shape else ():
        out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)


def _method(job: Job, asked: str | None) -> str:
    """Name of the method that fits: the one asked for, that of the folder, or the pair's first."""
    if job.start is not None:
        job.check_begun(job.begun, "method", asked)
        asked = job.begun["method"]
        if asked == "chains":
            raise ValueError(
                f"from: expected the folder of a fit, got one of chains, {job.start}; use ppl-models sample"
            )
    fits = job.entry.fits
    name = next(iter(fits)) if asked is None else named("method", asked, job.entry.methods)
    if name not in fits:
        raise ValueError(f"method: expected {' or '.join(fits)}, got chains, {name}; use ppl-models sample")
    return name


def _fitted(start: str, name: str) -> Pair:
    """The pair of a folder, with the parameters that its fit has found."""
    pair = opened(start).result.bound.pair
    if not isinstance(pair, Pair):
        raise ValueError(f"from: expected a fit of the pair's own guide, got {name}, which has one of its own")
    return pair


def sample(**arguments: Any) -> None:
    """Sample a pair's posterior, or more of it, and report on it.

    Processes that torchrun has started run chains of their own each; the first one prints and writes those of all.
    """
    job, own = Job.of(arguments)
    if job.start is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("from: expected one process, got a group: chains of a folder go on in one")
        result = _more_chains(job, job.start, **own)
        job.conclude(result, "chains", result.method)
        return
    with launched(job.device) as first:
        if not first:
            warnings.simplefilter("ignore")
        result = _chains(job, first, **own)
        if first:
            job.conclude(result, "chains", result.method)


def _chains(job: Job, first: bool, kernel: str | None, **options: Any) -> inference.Result:
    chosen = None if kernel is None else getattr(inference.kernels, named("kernel", kernel, inference.kernels.__all__))
    dataset, _ = job.prepared
    if first:
        announce(f"sampling {job.entry.title} on {dataset.name}: {dataset.rows:,} rows")
    return inference.sample(job.new_pair(), dataset.train, chosen, seed=job.seed, **options)


def _more_chains(job: Job, start: str, draws: int | None, **others: Any) -> inference.Result:
    """More draws of the chains of a folder, which keep their kernel and their number."""
    for option, value in others.items():
        if value is not None:
            raise ValueError(f"{option}: expected none beside --from, which goes on with its own, got {value}")
    # A folder that cannot be written to is told before any work.
    _ = job.prepared
    return opened(start).result.extend(**({} if draws is None else {"draws": draws}), seed=job.seed)
