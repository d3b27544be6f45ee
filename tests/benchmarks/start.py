"""Seconds from a new process to a minimum bulk ESS of 1,000 and of 10,000: imports, model, compiling, sampling.

Three processes in a row for each: one that finds how many draws it takes (its caches are thrown away), one with every
compiler's disk cache empty (``cold``), and a second on the cache that this one left (``warm``). Every library keeps
what it keeps by default: Inductor its code, Numba and PyTensor what they cache by themselves, JAX nothing.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from . import chains
from .worker import Worker

TARGETS = (1_000, 10_000)
TRIES = 4
CONTENDERS = {
    "sample(pair, data)": 1000,
    "sample, kernel=NUTS": 1000,
    "NumPyro NUTS 4x1000": 1000,
    "NumPyro NUTS 64x500": 500,
    "nutpie 4x1000": 1000,
    "nutpie 16x1000": 1000,
    "BlackJAX ChEES 64x1000": 500,
}
"""Contenders of ``chains`` and the draws a chain to begin with."""
LEAST = 100
"""Draws a chain at least: R-hat and ESS are not to be had from fewer."""


def cases(quick: bool) -> list[str]:
    return [
        f"{name} {target}"
        for name in ("eight_schools", "logistic_regression")[: 1 if quick else 2]
        for target in TARGETS[: 1 if quick else 2]
    ]


def contenders(case: str, quick: bool) -> list[str]:
    return [n for n in CONTENDERS if chains.CONTENDERS[n].quick or not quick]


def fresh() -> dict[str, str]:
    """Variables that give every compiler an empty disk cache."""
    root = Path(mkdtemp(prefix="benchmark-"))
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
        "PPL_MODELS_PROGRAMS": str(root / "programs"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "NUMBA_CACHE_DIR": str(root / "numba"),
        "PYTENSOR_FLAGS": f"base_compiledir={root / 'pytensor'}",
        "JAX_COMPILATION_CACHE_DIR": "",
    }


def _discard(environment: dict[str, str]) -> None:
    shutil.rmtree(Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent, ignore_errors=True)


def once(case: str, contender: str, draws: int, environment: dict[str, str], log: Path, limit: float) -> Any:
    """One run in a new process."""
    worker = Worker("chains", case, contender, str(draws), log=log, environment=environment)
    try:
        return worker.ask(draws, limit)
    finally:
        worker.close()


def measure(case: str, contender: str, log: Path, limit: float, say: Callable[[dict[str, Any]], None]) -> None:
    """All of one contender's processes; each is said as it ends."""
    posterior, target = case.split()
    environment = fresh()
    draws, answer = CONTENDERS[contender], {}
    for _ in range(TRIES):
        answer = once(posterior, contender, draws, environment, log, limit)
        if "failed" in answer:
            say({"failed": answer["failed"]})
            break
        reached = answer["ess"] / int(target)
        if 1.0 <= reached < 1.5 or (reached >= 1.0 and draws == LEAST):
            break
        draws = max(LEAST, math.ceil(1.15 * draws / max(reached, 0.05)))
    _discard(environment)
    if "failed" in answer:
        return
    environment = fresh()
    for kind in ("cold", "warm"):
        answer = once(posterior, contender, draws, environment, log, limit)
        kept = ("failed", "since_start", "ess", "r_hat", "chains", "draws", "seconds", "peak_mib")
        say({"kind": kind, **{k: answer[k] for k in kept if k in answer}})
    _discard(environment)


def rows(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for case, contender in dict.fromkeys((r["case"], r["contender"]) for r in records):
        mine = [r for r in records if (r["case"], r["contender"]) == (case, contender)]
        done = [r for r in mine if "failed" not in r]
        posterior, target = case.split()
        row: dict[str, Any] = {"case": posterior, "target": int(target), "contender": contender}
        row["family"] = chains.CONTENDERS[contender].family
        if not done:
            made.append({**row, "note": mine[-1]["failed"]})
            continue
        by = {kind: [r["since_start"] for r in done if r["kind"] == kind] for kind in ("cold", "warm")}
        ess, r_hat = (float(np.median([r[k] for r in done])) for k in ("ess", "r_hat"))
        short = ess < int(target)
        made.append(
            row
            | {k: float(np.median(v)) if v else None for k, v in by.items()}
            | {
                "min ess": ess,
                "r_hat": r_hat,
                "chains": done[0]["chains"],
                "draws": done[0]["draws"],
                "rounds": len(by["warm"]),
                "note": f"reached {ess:.0f} only" if short else "R-hat above 1.01" if r_hat > chains.LIMIT else "",
            }
        )
    return made
