"""Rows per second of a fit in one process and in two, each of one thread.

A VAE of 784-1000-20 on minibatches of 2,000 rows, whose work is matrix products. One process and a group of two take
turns, each in new processes. The ratio by CPU time counts the time that a process computes, and not that for which it
waits, on a busy machine, for a core: it is that of two cores which nobody else uses. Run: ``python -m tests.benchmarks
ranks``.
"""

import os
import statistics
import sys
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

BATCH, STEPS, ROUNDS = 2000, 16, 5


def measure(rank: int, count: int, store: str) -> tuple[float, float, float]:
    """Rows per second, and per second that this process computed, and the last loss per row, in a group of so many."""
    import torch
    from pyro.infer import Trace_ELBO
    from torch import distributed

    from inference import fit, isolated
    from ppl_models.models.vae import VAE

    marks: list[tuple[float, float]] = []

    class Timed(Trace_ELBO):
        """The bound, with the time at the start of each step."""

        has_posterior = False

        def advise(self, bound: object, losses: object) -> tuple[str, ...]:
            return ()

        def loss_and_grads(self, *args: object, **named: object) -> float:
            marks.append((perf_counter(), process_time()))
            return float(super().loss_and_grads(*args, **named))

    torch.set_num_threads(1)
    if count > 1:
        further = {"rank": rank, "world_size": count, "timeout": timedelta(seconds=300)}
        distributed.init_process_group("gloo", init_method=f"file://{store}", **further)
    with isolated(0):
        pair, x = VAE(784, 20, hidden=(1000,)), (torch.rand(4 * BATCH, 784) < 0.3).float()
    result = fit(pair, x, Timed(), steps=STEPS, batch=BATCH, progress=False)
    if count > 1:
        distributed.destroy_process_group()
    rows = BATCH * (STEPS - 2)
    wall, busy = (last - first for first, last in zip(marks[1], marks[-1], strict=True))
    return rows / wall, rows / busy, result.losses[-1] / len(x)


def run(count: int) -> tuple[float, float, float]:
    """:func:`measure` of the first of so many new processes."""
    with TemporaryDirectory() as folder, get_context("spawn").Pool(count) as pool:
        return pool.starmap(measure, [(k, count, str(Path(folder) / "store")) for k in range(count)], chunksize=1)[0]


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the run")
    print(f"{'round':>5} {'rows/s of one':>14} {'of two':>8} {'ratio':>6} {'by CPU time':>12} {'loss per row':>16}")
    ratios = []
    for k in range(ROUNDS):
        (one, alone, loss), (two, shared, other) = run(1), run(2)
        ratios.append((two / one, shared / alone))
        shown = f"{two / one:>6.2f} {shared / alone:>12.2f} {loss:>8.2f}{other:>8.2f}"
        print(f"{k:>5} {one:>14,.0f} {two:>8,.0f} {shown}", flush=True)
    wall, busy = map(statistics.median, zip(*ratios, strict=True))
    print(f"median ratio {wall:.2f}, by CPU time {busy:.2f}; load {os.getloadavg()[0]:.1f} after it")


if __name__ == "__main__":
    sys.exit(main())
