r"""A recipe for a published figure, and the record of a run."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from inference import exclusive
from ppl_models.data.sets import usable
from ppl_models.ledger.recipes.trained import checkpoints_in, running_on, seen, weights_at

try:
    import fcntl
except ImportError:  # Windows has no locks of this kind
    fcntl = None  # type: ignore[assignment]

RECORDS = Path(__file__).parent / "records"
"""Records that come with the package."""


GRADES = {"checked": "read in a copy of the source", "quoted": "as quoted elsewhere", "recalled": "recalled, unchecked"}


NEEDED = {"recipe", "figure", "standard_error", "seeds", "quick"}
"""What is read of a record."""


SEED_NEEDED = {"recipe", "seed", "quick", "found", "seconds", "versions", "machine", "date", "commit"}
"""What is read of the line of a seed."""


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
        entry: The entry of the zoo that it is a figure of.
        limits: What keeps its figure from the published one, or it from being run.
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
    entry: str = ""
    limits: str = ""

    @property
    def known(self) -> str:
        """The published figure, or a dash."""
        return "-" if self.published is None else f"{self.published:g}"

    def met(self, record: Mapping[str, Any]) -> bool | None:
        """Whether a record is at or beyond the published figure, within two standard errors; None if there is none."""
        if self.published is None:
            return None
        ahead = record["figure"] - self.published
        ahead = ahead if self.better == "higher" else -ahead
        return bool(ahead >= -2 * (record["standard_error"] or 0.0))

    @property
    def origin(self) -> str:
        """Source of the published figure, and how it was checked."""
        return self.source if self.published is None else f"{self.source} ({GRADES[self.sure]})"


def reproduce(
    recipe: Recipe,
    directory: Path,
    *,
    quick: bool = False,
    seeds: int | None = None,
    only: int | None = None,
    missing: bool = False,
    jobs: int = 1,
    device: str | torch.device | None = None,
) -> dict[str, Any] | None:
    """Run a recipe once per seed and append its record to ``NAME.jsonl`` in a directory.

    Each seed's line is appended to ``NAME.seeds.jsonl`` as soon as it has ended, and a seed whose line is there is not
    run again. A seed that was killed goes on from its checkpoint when it is started again. So any number of processes
    may run seeds of one recipe, each of them other ones; the last of them writes the record.

    Args:
        recipe: What to run.
        directory: Where records are kept; created if missing.
        quick: Run the size for tests; the record is marked and left out of the table.
        seeds: Number of seeds; None: the recipe's.
        only: Run this seed alone; None: all of them.
        missing: Whether lines of other commits count as well. Default: only those of this commit do.
        jobs: Number of seeds that run side by side, in processes.
        device: Where pairs and data are, such as "cuda". Default: the CPU.

    Returns:
        The record; None where lines of other seeds are still missing.

    Raises:
        ValueError: torch cannot use the device here.
        ArithmeticError: A figure is not finite; nothing is recorded.
        KeyboardInterrupt: It was interrupted; seeds that have ended are recorded.
    """
    place = None if device is None else usable(device)
    count = seeds or (1 if quick else recipe.seeds)
    commit = None if missing else _commit()
    there = _lines(directory, recipe, quick, commit)
    wanted = [seed for seed in (range(count) if only is None else (only,)) if seed not in there]
    if jobs > 1 and len(wanted) > 1:
        # A second to import.
        from joblib import Parallel, delayed, parallel_config

        with parallel_config("loky", inner_max_num_threads=max(1, torch.get_num_threads() // jobs)):
            Parallel(n_jobs=jobs)(delayed(_run_seed)(recipe, directory, quick, seed, place) for seed in wanted)
    else:
        for seed in wanted:
            _run_seed(recipe, directory, quick, seed, place)
    there = _lines(directory, recipe, quick, commit)
    if any(seed not in there for seed in range(count)):
        return None
    record = _joined([there[seed] for seed in range(count)])
    path, line = directory / f"{recipe.name}.jsonl", json.dumps(record)
    if wanted or not path.exists() or line.encode() not in path.read_bytes().split(b"\n"):
        append_line(path, line)
    return record


@exclusive
def check(
    recipe: Recipe, directory: Path = RECORDS, *, device: str | torch.device | None = None
) -> tuple[float, float]:
    """Evaluate a recipe again by the weights that its first seed has left.

    Args:
        recipe: What to evaluate.
        directory: Where the records are, with ``weights`` beside them.
        device: Where to run, such as "cuda". Default: the CPU.

    Returns:
        The figure now, and that of the first seed on record.

    Raises:
        ValueError: There are no weights, or no record.
    """
    path, records = directory / "weights" / f"{recipe.name}.safetensors.gz", directory / f"{recipe.name}.jsonl"
    kept = [r for r in read_lines(records) if not r["quick"]] if records.exists() else []
    if not path.exists() or not kept:
        raise ValueError(f"recipe: expected weights on record, got none of {recipe.name} in {directory}")
    with running_on(None if device is None else usable(device)), weights_at(path, read=True):
        return float(recipe.run(False, 0)["figure"]), float(kept[-1]["details"]["figure"][0])


@exclusive
def _run_seed(recipe: Recipe, directory: Path, quick: bool, seed: int, place: torch.device | None) -> None:
    """Run one seed and append its line."""
    started = perf_counter()
    commit = _commit()
    # Of one code only: what another has begun it must not end.
    folder = directory / ".running" / f"{recipe.name}-{seed}{'-quick' if quick else ''}-{commit}"
    # Weights of the first seed are kept, with which ``check`` evaluates again.
    keeps = nullcontext() if quick or seed else weights_at(directory / "weights" / f"{recipe.name}.safetensors.gz")
    with checkpoints_in(folder), running_on(place), keeps, seen() as shown:
        found = dict(recipe.run(quick, seed))
    if not math.isfinite(found["figure"]):
        shutil.rmtree(folder, ignore_errors=True)
        raise ArithmeticError(f"{recipe.name}: the figure is {found['figure']}; nothing was recorded")
    line = {
        "recipe": recipe.name,
        "seed": seed,
        "quick": quick,
        "protocol": recipe.protocol,
        "found": found,
        "seconds": round(perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit,
    }
    directory.mkdir(parents=True, exist_ok=True)
    append_line(directory / f"{recipe.name}.seeds.jsonl", json.dumps(line))
    if shown and not quick and not seed:
        # A second to import.
        from ppl_models.ledger.pictures import write

        title = f"{recipe.name}: {recipe.title}: {found['figure']:.2f}, published {recipe.known}"
        write(shown[0], title, directory / "pictures" / f"{recipe.name}.png")
    shutil.rmtree(folder, ignore_errors=True)


def _lines(directory: Path, recipe: Recipe, quick: bool, commit: str | None) -> dict[int, dict[str, Any]]:
    """The last line of each seed, of one commit or of any."""
    path = directory / f"{recipe.name}.seeds.jsonl"
    lines = read_lines(path, SEED_NEEDED) if path.exists() else []
    return {x["seed"]: x for x in lines if x["quick"] == quick and commit in (None, x["commit"])}


def _joined(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of all seeds."""
    runs, last = [line["found"] for line in lines], lines[-1]
    values = torch.tensor([run["figure"] for run in runs], dtype=torch.float64)
    return {
        "recipe": last["recipe"],
        "figure": float(values.mean()),
        "standard_error": float(values.std() / len(runs) ** 0.5) if len(runs) > 1 else None,
        "seeds": len(runs),
        "quick": last["quick"],
        **({"protocol": last["protocol"]} if "protocol" in last else {}),
        "details": {k: [round(run[k], 4) for run in runs] for k in runs[0]},
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        **{k: last[k] for k in ("versions", "machine", "date")},
        "commit": ", ".join(dict.fromkeys(line["commit"] for line in lines)),
    }


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, all of it or nothing, and wait until it is on the disk.

    A last line that was cut short by a crash is ended first, so that it stays alone.

    Raises:
        OSError: The line cannot be written; the file is as it was.
    """
    with path.open("ab+", buffering=0) as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        text = (b"" if file.read(1) in (b"", b"\n") else b"\n") + line.encode() + b"\n"
        try:
            # One call of the system, which other processes see as a whole.
            if file.write(text) != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(size)
            raise


def read_lines(path: Path, needed: Collection[str] = NEEDED) -> list[dict[str, Any]]:
    """The records of a file; a line that is no record is left out with a warning."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = line
        if isinstance(record, dict) and record.keys() >= set(needed):
            found.append(record)
        elif record is not None:
            start = line[:40].decode(errors="replace")
            warnings.warn(f"{path}, line {number}: expected a record, got {start!r}; it is left out", stacklevel=3)
    return found


def shown_figure(record: Mapping[str, Any]) -> str:
    """The figure of a record with its standard error."""
    error = record["standard_error"]
    return f"{record['figure']:.2f}" + (f" ± {error:.2f}" if error else "")


def _commit() -> str:
    """The commit of the project's own repository; where there is none, or files differ from it, a hash of all files."""
    root = Path(__file__).parents[2]
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        own = Path(top).resolve() == root.resolve() and _git(root, "ls-files", Path(__file__).relative_to(root))
        named = _git(root, "describe", "--always", "--dirty", "--abbrev=12") if own else "unknown"
    except (OSError, subprocess.SubprocessError):
        named = "unknown"
    return named if named != "unknown" and not named.endswith("-dirty") else f"{named}-{_hash_of_sources(root)}"


def _hash_of_sources(root: Path) -> str:
    files = sorted(p for package in ("inference", "ppl_models") for p in (root / package).rglob("*.py"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:8]


def _git(folder: Path, *arguments: Any) -> str:
    command = ["git", "-C", str(folder), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
