"""``python -m tests.benchmarks [SUITE ...]``: measure, write tables and a plot.

Suites are svi, chains, growth, start, series and calls.

Contenders take turns, one busy at a time. Every measurement is written as it is made (``records.jsonl``), so that a
run that was interrupted can be rendered (``--render``). The peers come with ``pip install -e '.[benchmarks]'``.
``ranks`` (a fit in two processes against one), ``memory`` (its peak by the number of rows), ``checkpoints`` (what they
cost), ``bernoulli_mixtures`` (a recipe of the ledger, one thing changed at a time) and the questions to a fitted pair
(``outliers``, ``imputation``, ``compression``, ``denoising_digits``, ``semi_supervised``) stand for themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import chains, posteriors, start
from .table import SUITES, render
from .worker import Worker

PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "nutpie", "pymc", "blackjax", "arviz-stats")
QUESTIONS = ("outliers", "imputation", "compression", "denoising_digits", "semi_supervised")
ALONE = ("ranks", "memory", "checkpoints", "bernoulli_mixtures", *QUESTIONS)
Say = Callable[..., None]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], help="default: all")
    parser.add_argument("--quick", action="store_true", help="one warm round, the main contenders, fewer points")
    parser.add_argument("--rounds", type=int, help="warm rounds (default 3; quick 1)")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--contender", default="", help="contenders with one of these parts (a,b) in their name")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds that one measurement may take")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--render", action="store_true", help="measure nothing: tables and plot of what is there")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.suites = options.suites or list(SUITES)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.out.mkdir(parents=True, exist_ok=True)
    book = options.out / "records.jsonl"
    try:
        if not options.render:
            _clear(book, options)
            _measure(book, options)
    except KeyboardInterrupt:
        print("interrupted: what is measured is kept", file=sys.stderr)
    print(render(_read(book), options.out))
    print(f"written to {options.out}: benchmarks.md, benchmarks.png, a CSV each, records.jsonl")


def _measure(book: Path, options: argparse.Namespace) -> None:
    def say(**record: Any) -> None:
        with book.open("a") as file:
            print(json.dumps(record), file=file)
        kept = ("us", "seconds", "since_start", "ess", "r_hat", "kind", "failed")
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items() if k in kept}
        print(*(str(record.get(k, "")) for k in ("suite", "case", "contender", "round")), shown, file=sys.stderr)

    say(suite="meta", suites=" ".join(options.suites), machine=_machine(), versions=_versions())
    for suite in options.suites:
        for case in SUITES[suite].cases(options.quick):
            if options.only in case:
                (_new_processes if suite == "start" else _in_turn)(suite, case, options, book, say)


def _in_turn(suite: str, case: str, options: argparse.Namespace, book: Path, say: Say) -> None:
    """Rounds in which every contender measures once, each in its own process, in an order that turns."""
    module, log = SUITES[suite], options.out / "log" / f"{suite}.txt"
    if suite == "chains":
        _reference(case, options, book, log, say)
    names = _chosen(module, case, options)
    mode = ["quick"] if options.quick else []
    workers: dict[str, Worker] = {}
    # Of chains, the first run of a process is the cold one.
    rounds = options.rounds + (suite in ("chains", "calls"))
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if turn >= module.rounds_of(name, rounds):
                    continue
                if name not in workers:
                    if turn:
                        continue
                    workers[name] = Worker(suite, case, name, *mode, log=log)
                answer = workers[name].ask(turn + 1, options.patience)
                say(suite=suite, case=case, contender=name, round=turn, **answer)
                if "failed" in answer:
                    workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()


def _new_processes(suite: str, case: str, options: argparse.Namespace, book: Path, say: Say) -> None:
    log = options.out / "log" / "start.txt"
    for turn in range(options.rounds):
        for name in _chosen(start, case, options):

            def told(answer: dict[str, Any], name: str = name, turn: int = turn) -> None:
                say(suite=suite, case=case, contender=name, round=turn, **answer)

            start.measure(case, name, log, options.patience, told)


def _reference(case: str, options: argparse.Namespace, book: Path, log: Path, say: Say) -> None:
    """A long run once for an output directory; it outlives later runs, as long as the posteriors stay as they are."""
    mark = hashlib.sha256(Path(posteriors.__file__).read_bytes()).hexdigest()[:16]
    records = _read(book)
    old = [r for r in records if r.get("case") == case and r.get("contender") == chains.REFERENCE]
    if any(r.get("posteriors") == mark and "failed" not in r for r in old):
        return
    _write(book, [r for r in records if r not in old])
    worker = Worker("chains", case, chains.REFERENCE, log=log)
    answer = worker.ask(12345, options.patience)
    say(suite="chains", case=case, contender=chains.REFERENCE, round=0, posteriors=mark, **answer)
    worker.close()


def _chosen(module: Any, case: str, options: argparse.Namespace) -> list[str]:
    return [n for n in module.contenders(case, options.quick) if _is_asked(n, options)]


def _is_asked(contender: str, options: argparse.Namespace) -> bool:
    return any(part in contender.lower() for part in options.contender.lower().split(","))


def _clear(book: Path, options: argparse.Namespace) -> None:
    """Drop what is about to be measured again; references stay."""

    def stays(record: dict[str, Any]) -> bool:
        if record["suite"] not in options.suites or record.get("contender") == chains.REFERENCE:
            return True
        return options.only not in record["case"] or not _is_asked(record["contender"], options)

    _write(book, [r for r in _read(book) if stays(r)])


def _write(book: Path, records: list[dict[str, Any]]) -> None:
    book.write_text("".join(json.dumps(r) + "\n" for r in records))


def _read(book: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []


def _machine() -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{os.cpu_count()} cores ({_processor()}), load {load:.1f} before the run, {when}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _versions() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ALONE:
        import_module(f"tests.benchmarks.{sys.argv[1]}").main()
    else:
        main()
