"""Peak memory of a fit by the number of rows, each in a new process, on a memory-mapped array of four columns.

Gaussian naive Bayes of two classes, minibatches of 1,000 rows, with its checks and the hash of a checkpoint, which read
all rows; then of chains by the number of their draws, which go to the files of a checkpoint. ``anonymous`` is the
memory of the process itself (RssAnon of Linux, looked at every few milliseconds): the pages of files are the system's,
which takes them back. Run: ``python -m tests.benchmarks memory``.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import numpy as np

SIZES, COLUMNS, STEPS, BATCH = (100_000, 1_000_000, 10_000_000), 4, 300, 1000
DRAWS, SITE = (500, 2_000, 8_000), 500
"""Draws of each of 32 chains that are kept in a checkpoint, and the number of values in each."""


SAMPLES = (2_000, 10_000)
"""Rows of each of two samples of 64 columns whose distance is measured."""


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """Give a function that returns the largest anonymous memory so far, in MiB."""
    seen, over = [_anonymous()], threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen[0] = max(seen[0], _anonymous())
            sleep(0.003)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: seen[0]
    finally:
        over.set()
        thread.join()


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def fitted(path: str, rows: int) -> tuple[float, float, float]:
    """Anonymous MiB before the fit and at its peak, and microseconds per row that a step reads."""
    import torch

    from inference import fit, isolated
    from ppl_models.models.naive_bayes import GaussianNaiveBayes

    torch.set_num_threads(1)
    x = np.memmap(path, np.float32, "r", shape=(rows, COLUMNS))
    with isolated(0):
        pair = GaussianNaiveBayes(COLUMNS, 2)
    with TemporaryDirectory() as kept, peak() as most:
        before = most()
        settings = {"steps": STEPS, "batch": BATCH, "compile": False, "progress": False}
        result = fit(pair, {"x": x}, checkpoint=kept, **settings)
        return before, most(), result.seconds["run"] / (STEPS - 1) / BATCH * 1e6


def sampled(draws: int) -> tuple[float, float, float]:
    """Anonymous MiB before chains and at their peak, with their Result, and MiB of the draws."""
    import pyro
    import pyro.distributions as dist
    import torch

    from inference import sample
    from inference.kernels import ChEES

    def normal() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(SITE), 1.0).to_event(1))

    torch.set_num_threads(1)
    with TemporaryDirectory() as kept, peak() as most:
        before = most()
        settings = {"draws": draws, "warmup": 50, "chains": 32, "compile": False, "progress": False}
        result = sample(normal, None, ChEES, checkpoint=kept, **settings)
        return before, most(), result.draws["x"].nbytes / 2**20


def compared(what: str, rows: int) -> tuple[float, float, float]:
    """Anonymous MiB before a distance of two samples and at its peak, and its seconds."""
    import torch

    from inference import two_sample

    torch.set_num_threads(1)
    x, y = torch.randn(2, rows, 64).unbind()
    with peak() as most:
        before, started = most(), perf_counter()
        getattr(two_sample, what)(x, y)
        return before, most(), perf_counter() - started


def main() -> None:
    if len(sys.argv) > 3:
        what, *more = sys.argv[2:]
        cases = {"fit": lambda: fitted(more[0], int(more[1])), "sample": lambda: sampled(int(more[0]))}
        print(*cases.get(what, lambda: compared(what, int(more[0])))())
        return
    print(f"{'rows':>12} {'MiB before':>11} {'MiB at peak':>12} {'us per row':>11}")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for rows in SIZES:
            random = np.random.default_rng(0)
            with path.open("wb") as file:
                for _ in range(rows // 100_000):
                    file.write(random.normal(size=(100_000, COLUMNS)).astype(np.float32).tobytes())
            before, most, cost = _run("fit", str(path), str(rows))
            print(f"{rows:>12,} {before:>11,.0f} {most:>12,.0f} {cost:>11.2f}", flush=True)
    print(f"\n{'draws':>12} {'MiB before':>11} {'MiB at peak':>12} {'MiB drawn':>10}")
    for draws in DRAWS:
        before, most, size = _run("sample", str(draws))
        print(f"{draws:>12,} {before:>11,.0f} {most:>12,.0f} {size:>10,.0f}", flush=True)
    print(f"\n{'two samples':>16} {'rows':>7} {'MiB before':>11} {'MiB at peak':>12} {'seconds':>8}")
    for what in ("energy_distance", "mmd", "precision", "coverage"):
        for rows in SAMPLES:
            before, most, seconds = _run(what, str(rows))
            print(f"{what:>16} {rows:>7,} {before:>11,.0f} {most:>12,.0f} {seconds:>8.1f}", flush=True)


def _run(*arguments: str) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks", "memory", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(map(float, answer.stdout.split()))


if __name__ == "__main__":
    main()
