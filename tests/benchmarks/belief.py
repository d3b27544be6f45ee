"""What does a step of reweighted wake-sleep cost, beside the same step written by hand in PyTorch?

A sigmoid belief net 784-200-200 and its recognition network, ten particles, minibatches of 100, Adam, float32. The two
take turns, in rounds of as many steps; medians. Run: python tests/benchmarks/belief.py
"""

import statistics
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from inference import fit
from inference.objectives import RWS
from ppl_models.models.sigmoid_belief import HelmholtzMachine

PIXELS, LAYERS, PARTICLES, BATCH = 784, (200, 200), 10, 100
STEPS, ROUNDS = 300, 7


def density(value: Tensor, logits: Tensor) -> Tensor:
    """Log probability of binary units (..., units): (...)."""
    return logsigmoid((2 * value - 1) * logits).sum(-1)


class ByHand:
    """The objective and Adam as people write them."""

    def __init__(self, fused: bool) -> None:
        torch.manual_seed(0)
        one, two = LAYERS
        shapes = {"w0": (PIXELS, one), "w1": (one, two), "b0": (PIXELS,), "b1": (one,), "b2": (two,)}
        shapes |= {"r1": (one, PIXELS), "r2": (two, one), "c1": (one,), "c2": (two,)}
        self.p = {n: (0.05 * torch.randn(s)).requires_grad_() for n, s in shapes.items()}
        self.optimizer = torch.optim.Adam(self.p.values(), lr=0.001, fused=fused)

    def loss(self, x: Tensor) -> Tensor:
        p = self.p
        up = linear(x, p["r1"], p["c1"]).expand(PARTICLES, -1, -1)
        one = up.sigmoid().bernoulli().detach()
        further = linear(one, p["r2"], p["c2"])
        two = further.sigmoid().bernoulli().detach()
        guide = density(one, up) + density(two, further)
        model = density(two, p["b2"]) + density(one, linear(two, p["w1"], p["b1"]))
        model = model + density(x, linear(one, p["w0"], p["b0"]))
        weights = (model - guide).detach().softmax(0)
        return -(weights * (model + guide)).sum()

    def run(self, x: Tensor, steps: int) -> float:
        """Seconds a step."""
        started, done = perf_counter(), 0
        while done < steps:
            for rows in torch.randperm(len(x)).split(BATCH)[: steps - done]:
                self.optimizer.zero_grad()
                self.loss(x[rows]).backward()
                self.optimizer.step()
                done += 1
        return (perf_counter() - started) / steps


class Ours:
    """``fit`` of the pair of the zoo."""

    def __init__(self, compile: bool) -> None:
        torch.manual_seed(0)
        self.pair, self.objective, self.compile = HelmholtzMachine(PIXELS, LAYERS), RWS(PARTICLES), compile

    def run(self, x: Tensor, steps: int) -> float:
        """Seconds a step, set-up left out."""
        fitted = partial(fit, self.pair, x, self.objective, batch=BATCH, draws=1, learning_rate=0.001)
        result = fitted(steps=steps, compile=self.compile, progress=False)
        return result.seconds["run"] / (steps - 1)


def main() -> dict[str, float]:
    """Print and return milliseconds a step of each contender, and their ratio to the step written by hand."""
    x = (torch.rand(5000, PIXELS, generator=torch.Generator().manual_seed(0)) < 0.2).float()
    contenders = {
        "fit, compiled": Ours(True),
        "fit, eager": Ours(False),
        "by hand": ByHand(False),
        "by hand, fused Adam": ByHand(True),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        for name, contender in contenders.items():
            seconds = contender.run(x, STEPS)
            # The first round warms up.
            taken[name] += [1e3 * seconds] if turn else []
    middle = {name: statistics.median(each) for name, each in taken.items()}
    print(f"{'':22} {'ms a step':>9} {'over by hand':>13}")
    for name, value in middle.items():
        print(f"{name:22} {value:>9.2f} {value / middle['by hand']:>13.2f}")
    return middle


if __name__ == "__main__":
    main()
