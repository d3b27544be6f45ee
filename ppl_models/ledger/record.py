r"""A recipe for a published figure, and the record of a run."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RECORDS = Path(__file__).parent / "records"
"""Records that come with the package."""


GRADES = {"checked": "read in a copy of the source", "quoted": "as quoted elsewhere", "recalled": "recalled, unchecked"}


Run = Callable[[bool, int], Mapping[str, float]]


@dataclass(frozen=True)
class Recipe:
    """One published figure and how it is reproduced here.

    Attributes:
        name: Its name on the command line.
        title: What is measured, with its unit.
        run: From ``quick`` (a size for tests) and a seed to results by name; ``figure`` is the one to compare.
        published: The published figure; None if there is none.
        source: Where it was published.
        protocol: Data, split and estimator that make it comparable.
        sure: A key of ``GRADES``.
        better: ``lower`` or ``higher``.
        seeds: Number of seeds of a full run.
    """

    name: str
    title: str
    run: Run
    published: float | None
    source: str
    protocol: str
    sure: str
    better: str = "lower"
    seeds: int = 1

    @property
    def known(self) -> str:
        """The published figure, or a dash."""
        return "-" if self.published is None else f"{self.published:g}"

    @property
    def origin(self) -> str:
        """Source of the published figure, and how it was checked."""
        return self.source if self.published is None else f"{self.source} ({GRADES[self.sure]})"


def reproduce(recipe: Recipe, directory: Path, *, quick: bool = False, seeds: int | None = None) -> dict[str, Any]:
    """Run a recipe and append its record to ``NAME.jsonl`` in a directory.

    Args:
        recipe: What to run.
        directory: Where records are kept; created if missing.
        quick: Run the size for tests; the record is marked and left out of the table.
        seeds: Number of seeds; None: the recipe's.

    Returns:
        The record.
    """
    count = seeds or (1 if quick else recipe.seeds)
    started = perf_counter()
    runs = [recipe.run(quick, seed) for seed in range(count)]
    values = torch.tensor([run["figure"] for run in runs], dtype=torch.float64)
    record: dict[str, Any] = {
        "recipe": recipe.name,
        "figure": float(values.mean()),
        "standard_error": float(values.std() / count**0.5) if count > 1 else None,
        "seeds": count,
        "quick": quick,
        "details": {k: [round(run[k], 4) for run in runs] for k in runs[0]},
        "seconds": round(perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    if not math.isfinite(record["figure"]):
        raise ArithmeticError(f"{recipe.name}: the figure is {record['figure']}; nothing was recorded")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{recipe.name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def shown_figure(record: Mapping[str, Any]) -> str:
    """The figure of a record with its standard error."""
    error = record["standard_error"]
    return f"{record['figure']:.2f}" + (f" ± {error:.2f}" if error else "")


def _commit() -> str:
    try:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
