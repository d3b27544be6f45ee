"""Run Pyro's own tests with its objectives compiled and with ChEES in place of HMC and NUTS, and print a table.

Nothing is fetched: give the folder of a checkout of https://github.com/pyro-ppl/pyro at 1.9.1 or later (the source
distribution on PyPI leaves most tests out)::

    git clone https://github.com/pyro-ppl/pyro
    python tests/peers/pyro_suite.py pyro --out /tmp/peers

Each file of tests runs twice on the installed Pyro: as it is, and with the replacements of ``instead.py``. A test that
passes in the first run and not in the second is listed with its error. Runs are kept in ``--out``: a file that is there
is not run again, so that the table can be printed at any time, by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

FILES = (
    "tests/infer/test_gradient.py",
    "tests/infer/test_valid_models.py",
    "tests/infer/test_enum.py",
    "tests/infer/test_inference.py",
    "tests/infer/mcmc/test_hmc.py",
    "tests/infer/mcmc/test_nuts.py",
    "tests/infer/mcmc/test_valid_models.py",
)
OUTCOMES = ("passed", "expected to fail", "skipped", "timed out", "failed")


def main() -> None:
    """Run what has not been run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a checkout of Pyro, which holds tests/infer")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="folder of the outcomes")
    parser.add_argument("--seconds", type=int, default=120, help="longest time of one test")
    parser.add_argument("--every", type=int, default=1, help="run every so many-th test alone")
    parser.add_argument("--files", nargs="*", default=FILES, help="which files of tests")
    parser.add_argument("--table", action="store_true", help="run nothing; print the table of what was run")
    asked = parser.parse_args()
    if not (asked.checkout / "tests" / "infer").is_dir():
        parser.error(f"checkout: expected a folder that holds tests/infer, got {asked.checkout}")
    asked.out.mkdir(parents=True, exist_ok=True)
    for file in asked.files if not asked.table else ():
        for mode in ("plain", "ours"):
            run(asked.checkout, file, mode, asked.out, asked.seconds, asked.every)
    print(table(asked.out, asked.files))


def kept(out: Path, file: str, mode: str) -> Path:
    """The file of outcomes of a run."""
    return out / f"{file.removesuffix('.py').replace('/', '.')}.{mode}.jsonl"


def run(checkout: Path, file: str, mode: str, out: Path, seconds: int, every: int) -> None:
    """Run a file of tests, unless it has been run."""
    path = kept(out, file, mode).resolve()
    if path.exists():
        return
    unfinished = path.with_suffix(".part")
    unfinished.unlink(missing_ok=True)
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PEERS_MODE": mode,
        "PEERS_OUT": str(unfinished),
        "PEERS_SECONDS": str(seconds),
        "PEERS_EVERY": str(every),
    }
    command = [sys.executable, "-P", "-m", "pytest", "-p", "instead", "-q", "--tb=no", "-p", "no:cacheprovider", file]
    ended = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"{file}: pytest ended with {ended.returncode}\n{ended.stdout[-2000:]}")
    unfinished.rename(path)


def table(out: Path, files: Any) -> str:
    """Outcomes per file in Markdown, the tests that pass on plain Pyro alone, and why calls ran eagerly."""
    lines = ["| file | plain Pyro | compiled, ChEES | calls traced | calls eager |", "|---|---|---|---|---|"]
    differ: list[str] = []
    eager: Counter[str] = Counter()
    for file in files:
        plain, ours = (read(kept(out, file, mode)) for mode in ("plain", "ours"))
        runs: Counter[str] = Counter()
        for line in ours.values():
            runs.update(line["runs"])
        traced = runs.pop("traced", 0)
        eager.update(runs)
        lines.append(f"| {file} | {counted(plain)} | {counted(ours)} | {traced} | {runs.total()} |")
        for test, line in ours.items():
            before = plain.get(test, {}).get("outcome", "not run")
            if line["outcome"] != before:
                differ.append(f"- `{test.partition('::')[2]}`: {before}, {line['outcome']}: {line['error']}")
    told = [f"- {count} calls, {reason}" for reason, count in eager.most_common()]
    return "\n".join([*lines, "", "Outcomes that differ:", "", *differ, "", "Why calls ran eagerly:", "", *told])


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Outcomes by test, the last of a test's stages."""
    if not path.exists():
        return {}
    return {line["test"]: line for line in map(json.loads, path.read_text().splitlines())}


def counted(outcomes: dict[str, dict[str, Any]]) -> str:
    """How many tests had each outcome."""
    counts = Counter(line["outcome"] for line in outcomes.values())
    return ", ".join(f"{counts[o]} {o}" for o in OUTCOMES if counts[o]) or "not run"


if __name__ == "__main__":
    main()
