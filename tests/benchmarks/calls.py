"""Whole calls as the user makes them: a model and data go in, draws come out, the first time and again.

A contender makes 400 draws of each chain after 400 of warmup. The first call of a process includes building and
compiling, with empty caches of every compiler; imports are left out. Later calls have other seeds. What a library keeps
between calls is kept. Of ours, seconds beyond sampling are the call's less those of its transitions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from time import perf_counter
from typing import Any

import numpy as np

from . import chains, samplers, start
from .posteriors import POSTERIORS, Posterior, tensors
from .timeseries import SERIES
from .worker import stamp

SHAPE = {"draws": 400, "warmup": 400}
TARGET = 1_000
"""Minimum ESS to which the seconds of a call are scaled."""


@dataclass(frozen=True)
class Contender:
    """A sampler and its number of chains.

    Attributes:
        imports: What is imported before the clock starts.
        lacks: Cases for which its model is not written.
    """

    sampler: Callable[..., samplers.Run]
    chains: int
    imports: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    quick: bool = False


def ours(posterior: Posterior, **settings: Any) -> samplers.Run:
    """``inference.sample``, all of it."""
    import torch

    torch.set_default_dtype(torch.float64)
    from inference import sample

    pair, data = posterior.pyro(), tensors(posterior.data(), torch.float64)
    pair = pair.double() if isinstance(pair, torch.nn.Module) else pair

    def run(seed: int) -> tuple[samplers.Draws, float]:
        result = sample(pair, data, seed=seed, progress=False, **settings)
        # The other groups are made when they are asked for; peers return draws alone.
        drawn = result.groups["posterior"]
        return {n: drawn[n].values for n in posterior.sites}, result.seconds["run"]

    return run


_OURS = ("torch", "pyro", "inference", "arviz_stats", "torch._inductor.compile_fx", "torch.export")
_NUMPYRO = ("jax", "numpyro.infer", "arviz_stats")
_NUTPIE = ("nutpie", "pymc", "arviz_stats")
CONTENDERS = {
    **{f"sample, {k} chains": Contender(ours, k, _OURS, quick=k == 4) for k in (4, 64, 256)},
    **{
        f"sample, {k} chains, compile=True": Contender(ours, k, _OURS, {"compile": True}, quick=k < 256)
        for k in (4, 64, 256)
    },
    **{
        f"NumPyro NUTS, {k} chains": Contender(samplers.numpyro, k, _NUMPYRO, SHAPE, quick=k == 4) for k in (4, 64, 256)
    },
    **{f"nutpie, {k} chains": Contender(samplers.nutpie, k, _NUTPIE, SHAPE, ("garch",), k == 4) for k in (4, 16)},
}


def cases(quick: bool) -> list[str]:
    return ["eight_schools"] if quick else [*POSTERIORS, "garch"]


def contenders(case: str, quick: bool) -> list[str]:
    return [n for n, c in CONTENDERS.items() if case not in c.lacks and (c.quick or not quick)]


def rounds_of(contender: str, rounds: int) -> int:
    return rounds


def posterior_of(case: str) -> Posterior:
    if case in POSTERIORS:
        return POSTERIORS[case]
    series = SERIES[case]
    sites = tuple(series.columns({n: np.zeros((1, 1)) for n in ("mu", "alpha0", "alpha1", "beta1")}))
    numpyro: Any = series.numpyro
    return Posterior(case, sites, series.data, series.pyro, numpyro, lambda **_: None)


def prepare(case: str, contender: str, *more: str) -> Callable[[int], dict[str, Any]]:
    os.environ.update(start.fresh())
    chosen = CONTENDERS[contender]
    for name in chosen.imports:
        import_module(name)
    began: list[float] = [perf_counter()]
    run = chosen.sampler(posterior_of(case), chains=chosen.chains, **SHAPE | chosen.settings)

    def measure(seed: int) -> dict[str, Any]:
        # The first call includes what was made before it.
        started = began.pop() if began else perf_counter()
        draws, running = run(seed)
        seconds = perf_counter() - started
        return {"seconds": seconds, "beyond": seconds - running, **stamp(), **chains.judge(draws)}

    return measure


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for case, contender in dict.fromkeys((r["case"], r["contender"]) for r in records):
        mine = [r for r in records if (r["case"], r["contender"]) == (case, contender)]
        row: dict[str, Any] = {"case": case, "contender": contender, "family": contender.split(",")[0]}
        for kind, calls in (("cold", mine[:1]), ("warm", mine[1:])):
            done = [r for r in calls if "failed" not in r]
            if not done:
                continue
            good = [r["ess"] / r["seconds"] if r["r_hat"] < chains.LIMIT else 0.0 for r in done]
            rate = float(np.median(good))
            row[f"{kind} s"] = float(np.median([r["seconds"] for r in done]))
            row[f"{kind} ess/s"] = rate
            row[f"{kind} s to {TARGET:,}"] = TARGET / rate if rate else None
            if kind == "warm" and contender.startswith("sample"):
                row["beyond sampling"] = float(np.median([r["beyond"] for r in done]))
        row["r_hat"] = max((r["r_hat"] for r in mine if "failed" not in r), default=None)
        row["note"] = next((r["failed"] for r in mine if "failed" in r), "")
        made.append(row)
    return made
