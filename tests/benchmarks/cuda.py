"""``python -m tests.benchmarks.cuda``: steps and chains on a GPU, as tables, in less than five minutes.

A step of a VAE, 784-200-200-50 at batch 100 with fused Adam, is taken by hand (eagerly, by ``torch.compile`` with
``mode="reduce-overhead"``, and as a CUDA graph that is captured by hand) and by ``fit``. Steps of reweighted wake-sleep
and of a diffusion chain are those of ``fit`` alone. Chains are those of a logistic regression, 569 x 30, in float64,
beside NumPyro's vectorised NUTS where NumPyro and a JAX for GPUs are installed (``pip install '.[benchmarks]'``).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from inference import fit
from inference.objectives import RWS, Denoising
from ppl_models import VAE, DiffusionChain, HelmholtzMachine
from ppl_models.models.diffusion.denoisers import UNet

from . import samplers
from .chains import judge
from .posteriors import POSTERIORS, Posterior

BATCH, ROWS, HIDDEN, CODE = 100, 10_000, (200, 200), 50
Row = tuple[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cuda", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the steps, to see that all of it runs")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("device: expected a GPU, got none that torch can use", file=sys.stderr)
        return 1
    device = torch.device(options.device)
    warnings.simplefilter("ignore", FutureWarning)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}\n")
    share = 0.01 if options.quick else 1.0
    started = perf_counter()
    table("a step, microseconds", chain(vae_steps(device, share), other_steps(device, share)))
    table("minimum bulk ESS per second of running", chains(device, share))
    print(f"took {perf_counter() - started:.0f} s")
    return 0


def table(title: str, rows: Iterable[Row]) -> None:
    print(f"| {title} | |\n| --- | --- |")
    for what, figure in rows:
        print(f"| {what} | {figure} |", flush=True)
    print()


def images(device: torch.device) -> Tensor:
    """Binary images. No step depends on what they show, so they are drawn, not loaded."""
    random = torch.Generator().manual_seed(0)
    return (torch.rand(ROWS, 784, generator=random) < torch.rand(784, generator=random) ** 3).float().to(device)


class Network(nn.Module):
    """The VAE as a module whose call is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_layers(784, *HIDDEN, 2 * CODE))
        self.decoder = nn.Sequential(*_layers(CODE, *HIDDEN[::-1], 784))

    def forward(self, x: Tensor) -> Tensor:
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        misfit = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return misfit + 0.5 * (loc**2 + (2 * log_scale).exp() - 1).sum() - log_scale.sum()


def _layers(*widths: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for a, b in pairwise(widths):
        found += [nn.Linear(a, b), nn.Softplus()]
    return found[:-1]


def vae_steps(device: torch.device, share: float) -> Iterator[Row]:
    x, pair = images(device), partial(VAE, 784, CODE, hidden=HIDDEN)
    name = "VAE 784-200-200-50, batch 100"
    yield f"{name}, by hand, eager", hand(x, share)
    yield f"{name}, by hand, torch.compile", hand(x, share, compiled=True)
    if device.type == "cuda":
        yield f"{name}, by hand, CUDA graph", hand(x, share, captured=True)
    yield f"{name}, fit, eager", ours(pair, x, share, 600, compile=False)
    yield f"{name}, fit, compiled", ours(pair, x, share, 4000, compile=True)


def hand(x: Tensor, share: float, *, compiled: bool = False, captured: bool = False) -> str:
    """A loop by hand with fused Adam: microseconds per step."""
    torch.manual_seed(0)
    network = Network().to(x.device)
    fast = x.device.type == "cuda"
    optimizer = torch.optim.Adam(network.parameters(), lr=0.002, fused=True, capturable=captured and fast)
    loss: Callable[[Tensor], Tensor] = network
    if compiled:
        loss = torch.compile(network, mode="reduce-overhead" if fast else None)
    static = x[:BATCH].clone()

    def step() -> None:
        optimizer.zero_grad(set_to_none=not captured)
        loss(static).backward()
        optimizer.step()

    run = _captured(step) if captured else step

    def one(k: int) -> None:
        at = (k * BATCH) % (ROWS - BATCH)
        static.copy_(x[at : at + BATCH])
        run()

    return timed(one, max(3, int(1000 * share)))


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step: Callable[[int], Any], count: int) -> str:
    """Median of three rounds after a round to warm up, in microseconds per step."""
    found = []
    for turn in range(4):
        _wait()
        started = perf_counter()
        for k in range(count if turn else max(3, count // 10)):
            step(k)
        _wait()
        found.append((perf_counter() - started) / count * 1e6)
    return f"{median(found[1:]):,.0f}"


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ours(make: Callable[[], Any], x: Tensor, share: float, steps: int, **arguments: Any) -> str:
    """Steps of ``fit``: microseconds per step after the first, with how they ran."""
    count = max(20, int(steps * share))
    torch.manual_seed(0)
    pair = make()
    settings = {"batch": BATCH, "draws": 1, "learning_rate": 0.002, "progress": False, **arguments}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(pair, x, steps=count, device=x.device, **settings)
    # The first step is part of the set-up.
    step = result.seconds["run"] / (count - 1) * 1e6
    said = "; ".join(sorted({str(w.message).split(": ")[0][:60] for w in caught if "eager" in str(w.message)}))
    ran = result.idata.attrs["execution"]
    return f"{step:,.0f} ({ran}, set-up {result.seconds['setup']:.0f} s{'; ' + said if said else ''})"


def other_steps(device: torch.device, share: float) -> Iterator[Row]:
    x, rws = images(device), partial(RWS, 10)

    def machine() -> HelmholtzMachine:
        return HelmholtzMachine(784, HIDDEN)

    def diffusion() -> DiffusionChain:
        return DiffusionChain(784, steps=100, network=UNet((28, 28), 100, channels=(32, 64, 64)))

    name = "RWS 784-200-200, 10 particles, batch 100, fit"
    yield f"{name}, eager", ours(machine, x, share, 400, objective=rws, compile=False)
    yield f"{name}, compiled", ours(machine, x, share, 2000, objective=rws, compile=True)
    denoising = ours(diffusion, x, share, 200, objective=Denoising(100), batch=128, compile=False)
    yield "diffusion, U-Net (32, 64, 64), batch 128, fit, eager", denoising


def chains(device: torch.device, share: float) -> Iterator[Row]:
    """Chains of a logistic regression: the second run of each, without compilation."""
    posterior, lengths = POSTERIORS["logistic_regression"], {"warmup": 300, "draws": 250}
    counts = (64, 1024)
    if share < 1:
        counts, lengths = (16,), {"warmup": 20, "draws": 20}
    for count in counts:
        for name, sampler, more in (("ChEES", samplers.ours, {"device": device}), ("NumPyro NUTS", _numpyro, {})):
            yield f"{name}, {count} chains, float64", _rate(sampler, posterior, {"chains": count, **lengths, **more})


def _numpyro(posterior: Posterior, **settings: Any) -> samplers.Run:
    import jax

    if torch.cuda.is_available() and jax.default_backend() != "gpu":
        raise ImportError("JAX sees no GPU")
    return samplers.numpyro(posterior, **settings)


def _rate(sampler: Callable[..., samplers.Run], posterior: Posterior, settings: dict[str, Any]) -> str:
    """Minimum bulk ESS per second, and the worst R-hat."""
    before = torch.get_default_dtype()
    try:
        run = sampler(posterior, **settings)
        run(0)
        draws, seconds = run(1)
    except ImportError as error:
        return f"not run: {error}"
    finally:
        torch.set_default_dtype(before)
    found = judge(draws)
    return f"{found['ess'] / seconds:,.0f} (R-hat {found['r_hat']:.3f}, {seconds:.1f} s)"


if __name__ == "__main__":
    sys.exit(main())
