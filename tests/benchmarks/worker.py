"""A process for each contender: it compiles once, stays warm between rounds, and its peak memory is its own.

The parent writes a seed a line; the worker answers with a line of JSON. ``prepare`` of the suite runs at the first
seed, so that the first answer, timed from the start of the process, is the cold figure.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STARTED = "BENCHMARK_STARTED"


def stamp() -> dict[str, float]:
    """What is read at the end of the timed part, before the draws are judged: the time and the peak memory."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"since_start": time.time() - float(os.environ.get(STARTED, "nan")), "peak_mib": peak / 1024}


class Worker:
    """The parent's side.

    Args:
        argv: Suite, case and contender, and further words for the suite.
        log: Where the worker's own output goes.
        environment: Variables to set beside the parent's.
    """

    def __init__(self, *argv: str, log: Path, environment: dict[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, **(environment or {}), STARTED: str(time.time())},
        )

    def ask(self, seed: int, patience: float) -> dict[str, Any]:
        """One measurement; ``failed`` in the answer says why there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(seed, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return {"failed": "the process has ended"}
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.process.kill()
            return {"failed": f"took more than {patience:.0f} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failed": f"the process ended (code {self.process.wait()})"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()


def serve(suite: str, *argv: str) -> None:
    """The worker's side."""
    answers = os.fdopen(os.dup(1), "w")
    # Libraries print; the answers' channel is for answers alone.
    os.dup2(2, 1)
    measure = None
    for line in sys.stdin:
        try:
            measure = measure or importlib.import_module(f"tests.benchmarks.{suite}").prepare(*argv)
            answer = measure(int(line))
        except ImportError as error:
            answer = {"failed": f"{error}: pip install -e '.[benchmarks]'", "missing": True}
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
