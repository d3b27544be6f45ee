"""Time series and Gaussian processes by default ``sample`` and by NumPyro's NUTS, each in a new process.

Seconds are those of the whole call, compiling included. The error is the largest distance of a mean from that of the
reference, in posterior standard deviations; beside it stands the noise floor, the largest Monte Carlo error of such a
distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from .timeseries import SERIES, Arrays, Series
from .worker import stamp

OURS, PEER = "sample(pair, data)", "NumPyro NUTS 4x1000"


def cases(quick: bool) -> list[str]:
    return ["gp_regr", "hmm_example"] if quick else list(SERIES)


def contenders(case: str, quick: bool) -> list[str]:
    return [OURS, *([PEER] if SERIES[case].numpyro else [])]


def rounds_of(contender: str, rounds: int) -> int:
    """One run: what is measured is the first of a process."""
    return 1


def ours(series: Series, seed: int, **settings: Any) -> Arrays:
    import torch

    torch.set_default_dtype(torch.float64)
    from inference import sample

    data = {n: torch.as_tensor(v) for n, v in series.data().items()}
    result = sample(series.pyro(), data, seed=seed, progress=False, **settings)
    return {n: result.idata.posterior[n].values for n in result.draws}


def numpyro(series: Series, seed: int) -> Arrays:
    import jax
    import numpyro
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    assert series.numpyro is not None
    settings: dict[str, Any] = {"num_warmup": 1000, "num_samples": 1000, "num_chains": 4, "progress_bar": False}
    mcmc = MCMC(NUTS(series.numpyro()), chain_method="vectorized", **settings)
    mcmc.run(jax.random.PRNGKey(seed), **{n: jax.numpy.asarray(v) for n, v in series.data().items()})
    return {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}


def prepare(case: str, contender: str, *more: str) -> Callable[[int], dict[str, Any]]:
    series = SERIES[case]

    def measure(seed: int) -> dict[str, Any]:
        started = perf_counter()
        draws = (ours if contender == OURS else numpyro)(series, seed)
        seconds = perf_counter() - started
        return {"seconds": seconds, **stamp(), **judge(series.columns(draws), series.reference())}

    return measure


def judge(draws: Arrays, reference: Arrays) -> dict[str, float]:
    """Smallest bulk ESS, largest R-hat, and the error of the means against the reference with its noise floor."""
    import arviz_base as azb
    import arviz_stats as azs

    ours, theirs = (azb.convert_to_dataset(d) for d in (draws, {n: reference[n] for n in draws}))
    ess, r_hat = azs.ess(ours, method="bulk"), azs.rhat(ours)
    errors = [azs.mcse(d, method="mean") for d in (ours, theirs)]
    off, floor = [], []
    for name in draws:
        sd = float(theirs[name].std())
        off.append(abs(float(ours[name].mean() - theirs[name].mean())) / sd)
        floor.append(math.hypot(*(float(e[name]) for e in errors)) / sd)
    return {
        "ess": min(float(ess[n]) for n in draws),
        "r_hat": max(float(r_hat[n]) for n in draws),
        "error": max(off),
        "floor": max(floor),
    }


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each case: ours, and NumPyro's numbers beside it."""
    made = []
    for case in dict.fromkeys(r["case"] for r in records):
        row: dict[str, Any] = {"case": case}
        for name, mark in ((OURS, ""), (PEER, "NumPyro ")):
            mine = [r for r in records if (r["case"], r["contender"]) == (case, name)]
            if not mine:
                continue
            last = mine[-1]
            if "failed" in last:
                row[f"{mark}note"] = last["failed"]
                continue
            row[f"{mark}seconds"] = last["seconds"]
            row[f"{mark}ess/s"] = last["ess"] / last["seconds"]
            row |= {f"{mark}{k}": last[k] for k in ("r_hat", "error", "floor")}
        made.append(row)
    return made
