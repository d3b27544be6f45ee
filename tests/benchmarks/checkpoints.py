"""What checkpoints cost at the default interval: the share of a run that is spent in writing them.

A VAE of 784-200-200-50 on minibatches of 100, naive Bayes on 100,000 rows of ten features, and 64 chains of a normal of
100 dimensions whose draws go to files. Each runs for about ``SECONDS`` seconds, so that two checkpoints are due. Run:
``python -m tests.benchmarks checkpoints``.
"""

from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

SECONDS = 75.0


def vae(count: int, **further: Any) -> None:
    """So many steps of a VAE."""
    import torch

    from inference import fit, isolated
    from ppl_models.models.vae import VAE

    with isolated(0):
        pair, x = VAE(784, 50, hidden=(200, 200)), (torch.rand(10_000, 784) < 0.3).float()
    fit(pair, x, steps=count, batch=100, draws=2, progress=False, **further)


def bayes(count: int, **further: Any) -> None:
    """So many steps of Gaussian naive Bayes."""
    from inference import fit, isolated
    from ppl_models.data.simulate import simulate_naive_bayes
    from ppl_models.models.naive_bayes import GaussianNaiveBayes

    data, _ = simulate_naive_bayes(100_000, 10)
    with isolated(0):
        pair = GaussianNaiveBayes(10, 2)
    fit(pair, data, steps=count, batch=1000, draws=10, progress=False, **further)


def chains(count: int, **further: Any) -> None:
    """So many draws of each of 64 chains."""
    import pyro
    import pyro.distributions as dist
    import torch

    from inference import sample

    def normal() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(100), 1.0).to_event(1))

    sample(normal, None, draws=count, warmup=100, compile=False, progress=False, **further)


CASES: dict[str, tuple[Callable[..., None], int]] = {
    "VAE": (vae, 200),
    "naive Bayes": (bayes, 200),
    "chains": (chains, 50),
}


def timed(run: Callable[[], None]) -> float:
    """Seconds that a run takes."""
    started = perf_counter()
    run()
    return perf_counter() - started


def main() -> None:
    from inference import Checkpoint

    class Clocked(Checkpoint):
        """A checkpoint that counts its files and the seconds that they took."""

        written, seconds = 0, 0.0

        def write(self, *arguments: Any, **named: Any) -> bool:
            started = perf_counter()
            try:
                return super().write(*arguments, **named)
            finally:
                self.written, self.seconds = self.written + 1, self.seconds + perf_counter() - started

    print(f"{'run':>12} {'seconds':>8} {'checkpoints':>12} {'seconds in writing':>19} {'share':>7}")
    for name, (run, few) in CASES.items():
        short, longer = (timed(partial(run, n)) for n in (few, 3 * few))
        count = few + int(max(SECONDS - short, 1) / max(longer - short, 1e-3) * 2 * few)
        with TemporaryDirectory() as folder:
            kept = Clocked(folder)
            seconds = timed(partial(run, count, checkpoint=kept))
        share = kept.seconds / seconds
        print(f"{name:>12} {seconds:>8.1f} {kept.written:>12} {kept.seconds:>19.2f} {share:>7.2%}", flush=True)


if __name__ == "__main__":
    main()
