"""Does the cost of a row stay flat, and does a million rows fit in memory?

A full-batch fit of Gaussian naive Bayes on N simulated rows by 30 columns, each N in a process of its own, on one
thread. Run: python tests/benchmarks/cost_per_row.py
"""

import resource
import subprocess
import sys

SIZES = (10_000, 100_000, 1_000_000)


def measure(rows: int, steps: int = 15) -> tuple[float, float]:
    """Microseconds a row and step, and peak memory in GiB, of a fit in this process."""
    import warnings

    import torch

    from inference import fit
    from ppl_models.data.simulate import simulate_naive_bayes
    from ppl_models.models.naive_bayes import GaussianNaiveBayes

    torch.set_num_threads(1)
    data, _ = simulate_naive_bayes(rows, 30, 2)
    with warnings.catch_warnings():
        # So many rows leave the predictive groups out, and say so.
        warnings.simplefilter("ignore", UserWarning)
        result = fit(GaussianNaiveBayes(30, 2), data, steps=steps, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return result.seconds["run"] / (steps - 1) / rows * 1e6, peak


def run(rows: int) -> tuple[float, float]:
    """:func:`measure` in a new process."""
    answer = subprocess.run([sys.executable, __file__, str(rows)], capture_output=True, text=True, check=True)
    cost, peak = map(float, answer.stdout.split())
    return cost, peak


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(int(sys.argv[1])))
    else:
        print(f"{'rows':>10} {'us a row and step':>18} {'peak GiB':>9}")
        for size in SIZES:
            cost, peak = run(size)
            print(f"{size:>10,} {cost:>18.2f} {peak:>9.2f}")
