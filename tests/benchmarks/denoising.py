"""What does a training step of a diffusion chain cost, beside the same step written by hand in PyTorch?

The simple loss (velocities, cosine schedule of 100 steps) by Adam in float32: dense layers 3 x 128 on the plane,
minibatches of 256; and the small U-Net of the zoo on 8 x 8 digits, minibatches of 128. Both train the same network. All
take turns, in rounds of as many steps; medians of microseconds a step. At last 1,000 digits are drawn by 50
deterministic steps. Run: python tests/benchmarks/denoising.py
"""

import copy
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor, nn

from inference import Joint
from inference.objectives import Compiled, Denoising
from ppl_models.data.simulate import simulate_modes
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.schedules import cosine
from ppl_models.zoo.entries import find

ROUNDS = 7


class ByHand:
    """The simple loss as people write it."""

    def __init__(self, network: nn.Module, x: Tensor, fused: bool) -> None:
        self.network, self.x, self.signal = copy.deepcopy(network), x, cosine(100).float()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3, fused=fused)

    def step(self, rows: Tensor) -> float:
        x = self.x[rows]
        t = torch.randint(1, 101, (len(x),))
        signal = self.signal[t - 1][:, None]
        noise = torch.randn_like(x)
        noised = signal.sqrt() * x + (1 - signal).sqrt() * noise
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * x
        loss = nn.functional.mse_loss(self.network(noised, t), velocity)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """Pyro's SVI with our objective, compiled or not."""

    def __init__(self, network: nn.Module, x: Tensor, compile: bool) -> None:
        self.x = x
        pair = DiffusionChain(x.shape[1], copy.deepcopy(network), steps=100)
        objective = Denoising(100, simple=True)
        optimizer = Joint(torch.optim.Adam, {"lr": 1e-3})
        self.svi = SVI(pair.model, pair.guide, optimizer, loss=Compiled(objective) if compile else objective)
        with pyro.get_param_store().scope() as self.store:
            pass

    def step(self, rows: Tensor) -> Any:
        return self.svi.step(x=self.x[rows], size=len(self.x), rows=rows)


def measure(contender: ByHand | Ours, batch: int, steps: int) -> float:
    """Microseconds a step, of whole minibatches."""
    count = len(contender.x)
    whole = count // batch
    rows = [r for _ in range(1 + steps // whole) for r in torch.randperm(count).split(batch)[:whole]]
    with pyro.get_param_store().scope(getattr(contender, "store", None)):
        started = perf_counter()
        for each in rows[:steps]:
            contender.step(each)
        return 1e6 * (perf_counter() - started) / steps


def cases() -> dict[str, tuple[nn.Module, Tensor, int, int]]:
    """Network, rows, rows a minibatch and steps a round."""
    plane, _, _ = simulate_modes("ring", 20_000)
    row = find("diffusion")
    digits = row.load()
    torch.manual_seed(0)
    wide: Callable[..., Any] = row.pair
    network = wide(digits).network
    network.leave = nn.Conv2d(network.leave.in_channels, 1, 3, padding=1)
    return {
        "plane": (DiffusionChain(2, steps=100).network, plane, 256, 300),
        "digits": (network, 2 * digits.train["x"] - 1, 128, 15),
    }


def main() -> None:
    torch.set_num_threads(1)
    for case, (network, x, batch, steps) in cases().items():
        contenders = {
            "Denoising, compiled": Ours(network, x, True),
            "Denoising, eager": Ours(network, x, False),
            "by hand": ByHand(network, x, False),
            "by hand, Adam fused": ByHand(network, x, True),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for each in contenders.values():
            measure(each, batch, 12)  # compiles
        for _ in range(ROUNDS):
            for name, each in contenders.items():
                times[name].append(measure(each, batch, steps))
        base = statistics.median(times["by hand"])
        for name, found in times.items():
            middle = statistics.median(found)
            print(f"{case:8}{name:22}{middle:8.0f} us a step, {middle / base:.2f}x of by hand", flush=True)
    row = find("diffusion")
    pair = row.pair(row.load())
    started = perf_counter()
    pair.generate(1000, steps=50)
    print(f"1,000 digits by 50 deterministic steps: {perf_counter() - started:.1f} s, one thread")


if __name__ == "__main__":
    main()
