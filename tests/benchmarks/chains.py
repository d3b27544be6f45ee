"""Minimum bulk ESS per second, at a rank-normalised split R-hat below 1.01 in all quantities.

ArviZ judges every contender's draws, all in float64, over all sampled quantities as the model states them. A warm run
is the second or later of a process, with a fresh seed; its seconds include the warm-up. Means and standard deviations
of the runs together are held against a long reference run by an independent sampler: z-scores by the Monte Carlo
errors of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import samplers
from .posteriors import POSTERIORS
from .worker import stamp

LIMIT = 1.01


@dataclass(frozen=True)
class Contender:
    """A sampler and its settings. Those of one family count as one: the best of them stands for it.

    Attributes:
        most: Rounds at most, for a contender that takes minutes.
        quick: Whether it runs in a quick run too.
    """

    family: str
    sampler: Callable[..., samplers.Run]
    settings: dict[str, Any] = field(default_factory=dict)
    most: int = 99
    quick: bool = False


def _shape(chains: int, warmup: int, draws: int, **more: Any) -> dict[str, Any]:
    return {"chains": chains, "warmup": warmup, "draws": draws, **more}


CONTENDERS = {
    "sample(pair, data)": Contender("ours", samplers.ours, quick=True),
    "sample, draws=1000": Contender("ours", samplers.ours, {"draws": 1000}),
    "sample, kernel=NUTS": Contender("ours, NUTS", samplers.ours, {"kernel": "NUTS"}, most=1),
    "Pyro NUTS 2x500": Contender("Pyro NUTS", samplers.pyro, _shape(2, 300, 500), most=1),
    "NumPyro NUTS 4x1000": Contender("NumPyro NUTS", samplers.numpyro, _shape(4, 1000, 1000), quick=True),
    "NumPyro NUTS 64x500": Contender("NumPyro NUTS", samplers.numpyro, _shape(64, 500, 500)),
    "NumPyro NUTS 256x500": Contender("NumPyro NUTS", samplers.numpyro, _shape(256, 300, 500)),
    "nutpie 4x1000": Contender("nutpie", samplers.nutpie, {"chains": 4, "draws": 1000}, quick=True),
    "nutpie 16x1000": Contender("nutpie", samplers.nutpie, {"chains": 16, "draws": 1000}),
    "nutpie 16x1000 low-rank": Contender(
        "nutpie", samplers.nutpie, {"chains": 16, "draws": 1000, "low_rank_modified_mass_matrix": True}
    ),
    "PyMC NUTS 4x1000": Contender("PyMC NUTS", samplers.pymc, _shape(4, 1000, 1000), most=1),
    "BlackJAX ChEES 64x1000": Contender(
        "BlackJAX ChEES", samplers.blackjax, _shape(64, 500, 1000, kernel="chees", metric="diagonal"), quick=True
    ),
    "BlackJAX ChEES 64x1000 no metric": Contender(
        "BlackJAX ChEES", samplers.blackjax, _shape(64, 500, 1000, kernel="chees")
    ),
    "BlackJAX ChEES 256x500": Contender(
        "BlackJAX ChEES", samplers.blackjax, _shape(256, 500, 500, kernel="chees", metric="diagonal")
    ),
    "BlackJAX NUTS 64x500": Contender("BlackJAX NUTS", samplers.blackjax, _shape(64, 500, 500, kernel="nuts")),
}
REFERENCE = "reference"
_REFERENCE = Contender("reference", samplers.numpyro, _shape(64, 1000, 2000))


def cases(quick: bool) -> list[str]:
    return list(POSTERIORS)


def contenders(case: str, quick: bool) -> list[str]:
    return [n for n, c in CONTENDERS.items() if c.quick or not quick]


def rounds_of(contender: str, rounds: int) -> int:
    return min(rounds, CONTENDERS[contender].most)


def prepare(case: str, contender: str, *more: str) -> Callable[[int], dict[str, Any]]:
    """``more``: draws to make in place of those in the settings."""
    chosen = _REFERENCE if contender == REFERENCE else CONTENDERS[contender]
    settings = dict(chosen.settings)
    if more and more[0].isdigit():
        settings["draws"] = int(more[0])
        if chosen.sampler is samplers.ours:
            # From a new process, as a user starts it: compiled only where the work ahead is worth it.
            settings["compile"] = "auto"
    run = chosen.sampler(POSTERIORS[case], **settings)

    def measure(seed: int) -> dict[str, Any]:
        draws, seconds = run(seed)
        ended = stamp()
        return {"seconds": seconds, **ended, **judge(draws)}

    return measure


def judge(draws: samplers.Draws) -> dict[str, Any]:
    """The worst of R-hat and bulk ESS, and mean, sd and their Monte Carlo errors of every quantity.

    A quantity that does not move at all has neither R-hat nor ESS, and counts as the worst.
    """
    import arviz_base as azb
    import arviz_stats as azs

    def flat(of: Callable[..., Any], draws: Any = draws, **method: str) -> np.ndarray:
        sets = {n: azb.convert_to_dataset({n: v}) for n, v in draws.items()}
        return np.concatenate([np.ravel(of(ds, **method)[n].values) for n, ds in sets.items()])

    shape = next(iter(draws.values())).shape
    r_hat = np.nan_to_num(flat(azs.rhat, method="rank"), nan=np.inf)
    ess = np.nan_to_num(flat(azs.ess, method="bulk"), nan=0.0)
    pooled = [v.reshape(shape[0] * shape[1], -1) for v in draws.values()]
    sd = np.concatenate([p.std(0) for p in pooled])
    squares = {n: (v - v.mean((0, 1))) ** 2 for n, v in draws.items()}
    return {
        "chains": shape[0],
        "draws": shape[1],
        "r_hat": float(min(r_hat.max(), 1e9)),
        "ess": float(ess.min()),
        "mean": np.concatenate([p.mean(0) for p in pooled]).tolist(),
        "sd": sd.tolist(),
        "mean_error": flat(azs.mcse, method="mean").tolist(),
        # By the delta method: the variance's error over 2 sd.
        "sd_error": (flat(azs.mcse, squares, method="mean") / (2 * sd)).tolist(),
    }


def disagreement(records: list[dict[str, Any]], reference: dict[str, Any]) -> float:
    """The largest \\|z\\| of all means and standard deviations, the records' runs taken together."""
    worst = 0.0
    for name in ("mean", "sd"):
        value, error = (np.array([r[k] for r in records]) for k in (name, f"{name}_error"))
        pooled = np.sqrt((error**2).sum(0)) / len(records)
        z = (value.mean(0) - reference[name]) / np.hypot(pooled, reference[f"{name}_error"])
        worst = max(worst, float(np.abs(z).max()))
    return worst


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of the table for each case and contender."""
    made = []
    for case, contender in dict.fromkeys((r["case"], r["contender"]) for r in records):
        if contender == REFERENCE:
            continue
        mine = [r for r in records if (r["case"], r["contender"]) == (case, contender)]
        done = [r for r in mine if "failed" not in r]
        row: dict[str, Any] = {"case": case, "contender": contender, "family": CONTENDERS[contender].family}
        if not done:
            made.append({**row, "note": mine[-1]["failed"]})
            continue
        warm = [r for r in done if r["round"] > 0] or done
        references = [r for r in records if r["case"] == case and r["contender"] == REFERENCE and "failed" not in r]
        rates = [r["ess"] / r["seconds"] for r in warm]
        r_hat = float(np.median([r["r_hat"] for r in warm]))
        met = r_hat < LIMIT
        made.append(
            row
            | {
                "ess/s": float(np.median(rates)) if met else None,
                "spread": float(np.subtract(*np.percentile(rates, [75, 25]))) if met else None,
                "unqualified": float(np.median(rates)),
                "r_hat": r_hat,
                "min ess": float(np.median([r["ess"] for r in warm])),
                "seconds": float(np.median([r["seconds"] for r in warm])),
                "cold": next((r["since_start"] for r in done if r["round"] == 0), None),
                "max |z|": disagreement(done, references[0]) if references else None,
                "of": 2 * len(done[0]["mean"]),
                "peak MiB": max(r["peak_mib"] for r in done),
                "chains": done[0]["chains"],
                "rounds": len(warm),
                "note": "" if met else f"R-hat {r_hat:.3f}: no ESS/s",
            }
        )
    return made
