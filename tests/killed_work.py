"""A run that ``test_kills.py`` kills: ``python killed_work.py CASE FOLDER [SECONDS]`` prints a digest of its end.

``FOLDER`` holds its checkpoints, one every so many seconds; ``-`` is none.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from inference import Checkpoint, Joint, Result, compare, fit, isolated, launched, sample
from inference.kernels import NUTS, ChEES, Gibbs
from inference.objectives import Adversarial, Denoising
from ppl_models.ledger.recipes.trained import trained
from ppl_models.ledger.record import Recipe, reproduce
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.gan import GAN
from ppl_models.models.vae import VAE

random = torch.Generator().manual_seed(0)
X = (torch.rand(200, 16, generator=random) < torch.linspace(0.1, 0.9, 16)).float()
Y = torch.randn(50, 3, generator=random) + torch.tensor([0.0, 1.0, 4.0])
NAMES = tuple(f"x{k}" for k in range(16))


def normal(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    sd = pyro.sample("sd", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, sd).to_event(1), obs=y)


def labelled(y: Tensor) -> None:
    means = pyro.sample("means", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(means[z.long()], 1.0), obs=y[:, 2])


def built(make: Callable[[], Any]) -> Any:
    with isolated(0):
        return make()


def simple() -> Any:
    return normal, AutoNormal(normal)


def adversarial(**more: Any) -> Result:
    objective = Adversarial(r1=0.1, turns=(2, 1))
    optimizer = Joint(torch.optim.Adam, objective.settings(guide={"lr": 0.002}, model={"lr": 0.001}))
    pair = built(lambda: GAN(NAMES, 4))
    return fit(pair, X, objective, steps=250, batch=32, optimizer=optimizer, **more)


def denoising(**more: Any) -> Result:
    pair = built(lambda: DiffusionChain(NAMES, steps=20))
    return fit(pair, X, Denoising(20, importance=True), steps=250, batch=64, draws=10, **more)


def compared(checkpoint: Any = None, **_: Any) -> Any:
    quiet: dict[str, Any] = {"progress": False}
    methods = {
        "SVI": partial(fit, steps=700, draws=50, compile=False, **quiet),
        "NUTS": partial(sample, draws=75, warmup=75, chains=2, compile=False, **quiet),
        "enum": partial(fit, objective=TraceEnum_ELBO, steps=300, draws=50, compile=False, **quiet),
    }
    return compare(simple, Y, methods, checkpoint=checkpoint)


def reproduced(checkpoint: Any = None, **_: Any) -> Any:
    def run(quick: bool, seed: int) -> dict[str, float]:
        _, result = trained(lambda: VAE(NAMES, 3), X, steps=150, batch=50, draws=10, seed=seed, progress=False)
        return {"figure": float(result.losses[-1])}

    recipe = Recipe("made", "loss", run, None, "nobody", "none", "recalled", seeds=3)
    with TemporaryDirectory() as fresh:
        return reproduce(recipe, Path(checkpoint.folder if checkpoint else fresh), missing=True)


CASES: dict[str, Callable[..., Any]] = {
    "eager": lambda **m: fit(simple(), Y, steps=900, compile=False, **m),
    "compiled": lambda **m: fit(simple(), Y, steps=200_000, compile=True, **m),
    "minibatched": lambda **m: fit(built(lambda: VAE(NAMES, 3)), X, steps=600, batch=30, draws=10, **m),
    "torchrun": lambda **m: fit(built(lambda: VAE(NAMES, 3)), X, steps=400, batch=30, draws=10, **m),
    "adversarial": adversarial,
    "denoising": denoising,
    "ChEES": lambda **m: sample(normal, Y, ChEES, draws=300, warmup=200, chains=16, compile=False, **m),
    "NUTS": lambda **m: sample(normal, Y, NUTS, draws=150, warmup=150, chains=3, compile=False, **m),
    "Gibbs": lambda **m: sample(labelled, Y, Gibbs, draws=150, warmup=100, chains=8, compile=False, **m),
    "compare": compared,
    "reproduce": reproduced,
}


def digest(result: Any) -> str:
    """SHA-256 of all numbers of a result."""
    sha = hashlib.sha256()
    if isinstance(result, dict):
        sha.update(json.dumps(result["details"]).encode())
        return sha.hexdigest()
    results = result.results if hasattr(result, "results") else {"": result}
    for name, one in results.items():
        sha.update(name.encode() + np.ascontiguousarray(one.losses).tobytes())
        for tensors in (one.params, one.draws):
            for key, value in sorted(tensors.items()):
                sha.update(key.encode() + value.contiguous().numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    case, folder, every = sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.2
    torch.set_num_threads(1)
    with launched() as first:
        if first:
            print("started", flush=True)
        further = {} if folder == "-" else {"checkpoint": Checkpoint(folder, every=every)}
        found = digest(CASES[case](progress=False, **further))
        if first:
            print(found, flush=True)
