"""What does a step of adversarial training cost, beside the same step written by hand in PyTorch?

A generator 2-128-128-128-2 and its discriminator on a ring of eight modes, minibatches of 256, non-saturating losses,
Adam, float32, both players at every step: by hand the discriminator moves first, then the generator is judged anew, as
people write it. With a penalty (R1) as well. All take turns, in rounds of as many steps; medians of microseconds a
step. Run: python tests/benchmarks/adversarial.py
"""

import statistics
from time import perf_counter

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor
from torch.nn.functional import softplus

from inference import Joint
from inference.objectives import Adversarial, Compiled
from ppl_models.data.simulate import simulate_modes
from ppl_models.models.gan import GAN

BATCH, HIDDEN, STEPS, ROUNDS = 256, (128, 128, 128), 500, 7
X, _, _ = simulate_modes("ring", 20_000)


class ByHand:
    """The two losses and the two optimizers as people write them."""

    def __init__(self, r1: float, fused: bool) -> None:
        torch.manual_seed(0)
        pair = GAN(2, 2, hidden=HIDDEN)
        self.generator, self.discriminator, self.r1 = pair.generator, pair.discriminator, r1
        settings = {"lr": 1e-3, "betas": (0.5, 0.9), "fused": fused}
        self.of_guide = torch.optim.Adam(self.discriminator.parameters(), **settings)
        self.of_model = torch.optim.Adam(self.generator.parameters(), **settings)

    def step(self, x: Tensor, _: Tensor) -> tuple[float, float]:
        x = x.requires_grad_(self.r1 > 0)
        made = self.generator(torch.randn(len(x), 2))
        real = self.discriminator(x)
        loss = softplus(-real).mean() + softplus(self.discriminator(made.detach())).mean()
        if self.r1:
            (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
            loss = loss + 0.5 * self.r1 * slope.square().sum(1).mean()
        self.of_guide.zero_grad()
        loss.backward()
        self.of_guide.step()
        other = softplus(-self.discriminator(made)).mean()
        self.of_model.zero_grad()
        other.backward()
        self.of_model.step()
        return loss.item(), other.item()


class Ours:
    """Pyro's SVI with our objective, compiled or not."""

    def __init__(self, r1: float, compile: bool) -> None:
        torch.manual_seed(0)
        pair, objective = GAN(2, 2, hidden=HIDDEN), Adversarial(r1=r1)
        optimizer = Joint(torch.optim.Adam, {"lr": 1e-3, "betas": (0.5, 0.9)})
        self.svi = SVI(pair.model, pair.guide, optimizer, loss=Compiled(objective) if compile else objective)

        with pyro.get_param_store().scope() as self.store:
            pass

    def step(self, x: Tensor, rows: Tensor) -> None:
        self.svi.step(x=x, size=len(X), rows=rows)


def measure(contender: ByHand | Ours) -> float:
    """Microseconds a step, of whole minibatches."""
    rows = [r for _ in range(1 + STEPS * BATCH // len(X)) for r in torch.randperm(len(X)).split(BATCH)[:-1]]
    with pyro.get_param_store().scope(getattr(contender, "store", None)):
        started = perf_counter()
        for each in rows[:STEPS]:
            contender.step(X[each], each)
    return 1e6 * (perf_counter() - started) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    for r1 in (0.0, 0.1):
        contenders = {
            "Adversarial, compiled": Ours(r1, True),
            "Adversarial, eager": Ours(r1, False),
            "by hand": ByHand(r1, False),
            "by hand, Adam fused": ByHand(r1, True),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for each in contenders.values():
            measure(each)  # compiles
        for _ in range(ROUNDS):
            for name, each in contenders.items():
                times[name].append(measure(each))
        base = statistics.median(times["by hand"])
        for name, found in times.items():
            middle = statistics.median(found)
            print(f"R1 {r1}: {name:22}{middle:8.0f} us a step, {middle / base:.2f}x of by hand")


if __name__ == "__main__":
    main()
