r"""The ledger: published figures against those that a recipe here obtains.

A :class:`Recipe` is a pair, its data, a method and a schedule, with the published figure, its source, its protocol and
how sure the figure is. :func:`reproduce` runs it once a seed and appends a record, one line of JSON, to
``NAME.jsonl`` in a directory: the figure with its standard error over seeds, seconds, versions, machine, date, commit.
:func:`table` is the table of all records. A figure without its protocol is no figure: static and dynamic binarization
of MNIST are different benchmarks, and a bound is no likelihood.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.special import logsumexp
from torch import Tensor

from inference import fit, log_likelihood, pointwise_log_likelihood
from inference.objectives import EM, IWAE, RWS, WakeSleep
from inference.program import isolated
from ppl_models import data
from ppl_models.autoregressive import FVSBN, MADE, NADE, Autoregressive
from ppl_models.mixture import BernoulliMixture
from ppl_models.sigmoid_belief import HelmholtzMachine
from ppl_models.vae import VAE, SemiSupervisedVAE

LN2 = math.log(2)
RECORDS = Path(__file__).parent / "ledger"
"""Records that come with the package."""
GRADES = {"checked": "read in a copy of the source", "quoted": "as quoted elsewhere", "recalled": "recalled, unchecked"}
Run = Callable[[bool, int], Mapping[str, float]]


@dataclass(frozen=True)
class Recipe:
    """One published figure and how it is obtained here.

    Attributes:
        name: Its name on the command line.
        title: What is measured, with its unit.
        run: From ``quick`` (a size for tests) and a seed to figures by name, ``figure`` among them.
        published: The published figure.
        source: Where it was published.
        protocol: Data, split and estimator that make it comparable.
        sure: A key of ``GRADES``.
        better: ``lower`` or ``higher``.
        seeds: Number of seeds of a full run.
    """

    name: str
    title: str
    run: Run
    published: float
    source: str
    protocol: str
    sure: str
    better: str = "lower"
    seeds: int = 1


def reproduce(recipe: Recipe, directory: Path, *, quick: bool = False, seeds: int | None = None) -> dict[str, Any]:
    """Run a recipe and append its record to ``NAME.jsonl`` in a directory.

    Args:
        recipe: What to run.
        directory: Where records are kept; made if it is not there.
        quick: Run the size for tests; its record says so and is left out of the table.
        seeds: Number of seeds; None: the recipe's.

    Returns:
        The record.
    """
    count = seeds or (1 if quick else recipe.seeds)
    started = perf_counter()
    found = [recipe.run(quick, seed) for seed in range(count)]
    values = torch.tensor([f["figure"] for f in found], dtype=torch.float64)
    record: dict[str, Any] = {
        "recipe": recipe.name,
        "figure": float(values.mean()),
        "standard_error": float(values.std() / count**0.5) if count > 1 else None,
        "seeds": count,
        "quick": quick,
        "details": {k: [round(f[k], 4) for f in found] for k in found[0]},
        "seconds": round(perf_counter() - started, 1),
        "versions": {name: version(name) for name in ("torch", "pyro-ppl")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    if not math.isfinite(record["figure"]):
        raise ArithmeticError(f"{recipe.name}: the figure is {record['figure']}; nothing was recorded")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{recipe.name}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def records(directory: Path = RECORDS) -> list[dict[str, Any]]:
    """All records of a directory, in the order of the recipes and of time."""
    files = [directory / f"{name}.jsonl" for name in RECIPES]
    return [json.loads(line) for f in files if f.exists() for line in f.read_text().splitlines()]


def table(directory: Path = RECORDS) -> str:
    """The last full record of every recipe as a Markdown table; a recipe without one has a dash."""
    latest = {r["recipe"]: r for r in records(directory) if not r["quick"]}
    lines = [
        "| recipe | figure | published | obtained | seeds | protocol | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in RECIPES.values():
        record = latest.get(recipe.name)
        got, seeds = (_figure(record), record["seeds"]) if record else ("-", "-")
        source = f"{recipe.source} ({GRADES[recipe.sure]})"
        cells = f"`{recipe.name}`", recipe.title, f"{recipe.published:g}", got, str(seeds), recipe.protocol, source
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(record: Mapping[str, Any]) -> str:
    error = record["standard_error"]
    return f"{record['figure']:.2f}" + (f" ± {error:.2f}" if error else "")


def _commit() -> str:
    try:
        here = Path(__file__).parent
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def bernoulli_mixture(quick: bool, seed: int, *, components: int) -> dict[str, float]:
    """Test NLL of a Bernoulli mixture fitted by EM, in nats an image, exact."""
    images = data.load("binarized_mnist")
    count, few, steps = (20, 500, 5) if quick else (components, None, 40)
    x, test = images.train["x"][:few], images.test["x"][:few]
    pair = BernoulliMixture(images.features, count, alpha=0.1, concentration=2.0, guide=AutoDelta)
    start = pair.start(x, seed=seed)
    result = fit(pair, x, EM(pair.maximise, start, max_plate_nesting=1), steps=steps, draws=1, seed=seed)
    return {
        "figure": -float(pointwise_log_likelihood(result, test).double().mean()),
        "the same by numpy": -_by_numpy(result.draws, test),
        "train": -float(pointwise_log_likelihood(result, x).double().mean()),
    }


def vae(quick: bool, seed: int, *, particles: int) -> dict[str, float]:
    """Test NLL of a VAE with one stochastic layer, in nats an image, by importance sampling with 5,000 particles."""
    images = data.load("binarized_mnist")
    few, steps, k, rows = (300, 20, 20, 20) if quick else (None, 100 * 500, 5000, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = VAE(images.features, 50)
    objective = IWAE(particles) if particles > 1 else Trace_ELBO()
    result = fit(pair, x, objective, steps=steps, batch=100, learning_rate=0.002, draws=1, seed=seed)
    found = log_likelihood(result, test, k=k)
    with torch.no_grad():
        active = int(pair.active(x).sum())
    bound = result.losses[-max(1, steps // 100) :].mean() / len(x)
    return {"figure": -found.mean, "train bound": float(bound), "active factors": active}


def autoregressive(
    quick: bool, seed: int, *, make: Callable[..., Autoregressive], epochs: int, learning_rate: float
) -> dict[str, float]:
    """Test NLL of an autoregressive pair fitted by maximum likelihood, in nats an image, exact."""
    images = data.load("binarized_mnist")
    few, steps, rows = (100, 4, 20) if quick else (None, epochs * 500, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = make(images.features)
    result = fit(pair, x, steps=steps, batch=100, learning_rate=learning_rate, draws=1, seed=seed)
    bound = result.losses[-max(1, steps // epochs) :].mean() / len(x)
    return {"figure": -log_likelihood(result, test, "exact", batch=100).mean, "train": float(bound)}


def belief_net(
    quick: bool, seed: int, *, layers: Sequence[int], objective: Callable[[], Any], epochs: int
) -> dict[str, float]:
    """Test NLL of a Helmholtz machine, in nats an image, by importance sampling with 5,000 particles."""
    images = data.load("binarized_mnist")
    few, steps, k, rows = (200, 20, 20, 20) if quick else (None, epochs * 500, 5000, None)
    x, test = images.train["x"][:few], images.test["x"][:rows]
    with isolated(seed):
        pair = HelmholtzMachine(images.features, layers)
    pair.centre(x)
    result = fit(pair, x, objective, steps=steps, batch=100, learning_rate=0.003, draws=1, seed=seed)
    found = log_likelihood(result, test, k=k, seed=seed)
    bound = result.losses[-max(1, steps // epochs) :].mean() / len(x)
    return {"figure": -found.mean, "Monte Carlo error": found.monte_carlo_error, "train bound": float(bound)}


def bars_law() -> tuple[Tensor, Tensor]:
    """The bars of Hinton et al. 1995 in 4 x 4 pixels: images that can be (30, 16), and their probabilities.

    Vertical bars with probability 2/3, else horizontal; each of the four is there with probability 0.2.
    """
    there = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4)
    chance = (0.2**there * 0.8 ** (1 - there)).prod(1)
    upright = there[:, None, :].expand(-1, 4, -1).flatten(1)
    flat = there[:, :, None].expand(-1, -1, 4).flatten(1)
    images, which = torch.cat([upright, flat]).unique(dim=0, return_inverse=True)
    probability = torch.zeros(len(images), dtype=torch.float64).index_add(0, which, torch.cat([2 * chance, chance]) / 3)
    return images, probability


def bars(quick: bool, seed: int) -> dict[str, float]:
    """KL of a Helmholtz machine 16-8-1 from the law of the bars, in bits, exact: the best of restarts by its bound.

    Beside it what the same starts come to by the exact likelihood.
    """
    images, probability = bars_law()
    rows, steps, starts = (200, 50, 2) if quick else (20_000, 10_000, 5)
    random = torch.Generator().manual_seed(seed)
    x = images[torch.multinomial(probability, rows, replacement=True, generator=random)].float()

    def divergence(pair: HelmholtzMachine) -> float:
        with torch.no_grad():
            return float((probability * (probability.log() - pair.log_evidence(images.float()).double())).sum()) / LN2

    found: list[dict[str, float]] = []
    for start in range(starts):
        with isolated(1000 * seed + start):
            pair = HelmholtzMachine(16, (8, 1))
        pair.centre(x)
        exact = deepcopy(pair)
        result = fit(pair, x, partial(RWS, 10), steps=steps, batch=100, learning_rate=0.02, draws=1, seed=start)
        fit((exactly(exact, probability), nothing), images.float(), steps=steps // 5, learning_rate=0.05, draws=1)
        bound = result.losses[-max(1, steps // 10) :].mean() / len(x)
        found.append({"bound": float(bound), "kl": divergence(pair), "exact": divergence(exact)})
    best = min(found, key=lambda f: f["bound"])
    return {
        "figure": best["kl"],
        "first start": found[0]["kl"],
        "median start": float(np.median([f["kl"] for f in found])),
        "exact likelihood, first start": found[0]["exact"],
        "exact likelihood, best start": min(f["exact"] for f in found),
    }


def exactly(pair: HelmholtzMachine, probability: Tensor) -> Callable[..., None]:
    """The exact likelihood of images that come with given probabilities, causes summed out by the pair itself."""

    def model(x: Tensor) -> None:
        pyro.module("pair", pair)
        pyro.factor("x", (probability * pair.log_evidence(x)).sum())

    return model


def nothing(*_: Any, **__: Any) -> None:
    """A guide of nothing."""


def semi_supervised(quick: bool, seed: int, *, labels: int) -> dict[str, float]:
    """Test accuracy of M2 in percent, with as many labels of each class."""
    images = data.load("mnist", binarise=True)
    few, steps, rows = (400, 20, 200) if quick else (None, 60 * 600, None)
    x, y = images.train["x"][:few], images.train["y"][:few].float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    each = labels // len(images.classes)
    known = torch.cat([order[y[order] == k][:each] for k in range(len(images.classes))])
    given = torch.full_like(y, torch.nan)
    given[known] = y[known]
    with isolated(seed):
        pair = SemiSupervisedVAE(images.features, 50, images.classes, auxiliary=0.1 * len(y) / 10)
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    fit(pair, {"x": x, "y": given}, objective, steps=steps, batch=100, learning_rate=0.001, draws=1, seed=seed)
    with torch.no_grad():
        right = pair.probabilities(images.test["x"][:rows]).argmax(-1) == images.test["y"][:rows]
    return {"figure": 100 * float(right.double().mean()), "labels": len(known)}


def _by_numpy(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean log likelihood of a Bernoulli mixture without torch and Pyro, in float64."""
    probs, weights = (draws[n][0].double().numpy() for n in ("probs", "weights"))
    probs, rows = probs.clip(1e-7, 1 - 1e-7), x.double().numpy()
    joint = rows @ np.log(probs).T + (1 - rows) @ np.log1p(-probs).T + np.log(weights)
    return float(logsumexp(joint, 1).mean())


def _exact(name: str, make: Callable[..., Autoregressive], published: float, protocol: str, **own: Any) -> Recipe:
    schedule = {"epochs": 50, "learning_rate": 0.003, **own}
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(autoregressive, make=make, **schedule),
        published=published,
        source="Germain et al. 2015, table of MADE" if name != "fvsbn" else "README of EugenHotaj/pytorch-generative",
        protocol=f"static binarized MNIST, exact; {protocol}",
        sure="recalled" if name != "fvsbn" else "quoted",
    )


def _layered(name: str, layers: Sequence[int], objective: Callable[[], Any], published: float) -> Recipe:
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(belief_net, layers=layers, objective=objective, epochs=100),
        published=published,
        source="Bornschein and Bengio 2015, Q of sigmoid belief nets",
        protocol="static binarized MNIST, 5,000 samples (there up to 100,000); 100 epochs, batch 100",
        sure="recalled",
    )


def _one_layer(name: str, particles: int, published: float) -> Recipe:
    return Recipe(
        name=name,
        title="test NLL, nats",
        run=partial(vae, particles=particles),
        published=published,
        source="Burda et al. 2016, one layer, as nbip/IWAE quotes it",
        protocol="static binarized MNIST, 5,000 samples; here 100 epochs, batch 100, there 3,280, batch 20",
        sure="quoted",
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="bernoulli_mixture_500",
            title="test NLL, nats",
            run=partial(bernoulli_mixture, components=500),
            published=137.64,
            source="Larochelle and Murray 2011; table of MADE, Germain et al. 2015",
            protocol="static binarized MNIST, 50,000 to fit, exact",
            sure="recalled",
        ),
        _one_layer("vae_k1", particles=1, published=88.71),
        _one_layer("iwae_k5", particles=5, published=87.63),
        _exact("fvsbn", FVSBN, 96.58, "there dynamic binarization, another benchmark", learning_rate=0.001),
        _exact("nade", partial(NADE, hidden=500), 88.33, "500 hidden units, fixed order", epochs=20),
        _exact("made", MADE, 88.40, "there one hidden layer of thousands of units, here of 500"),
        _layered("sbn_200", (200,), partial(RWS, 10), 103.1),
        _layered("sbn_200_200", (200, 200), partial(RWS, 10), 93.4),
        _layered("wake_sleep_200_200", (200, 200), WakeSleep, 106.9),
        Recipe(
            name="bars",
            title="KL, bits",
            run=bars,
            published=0.10,
            source="Hinton et al. 1995",
            protocol="4 x 4 bars, law as recalled, 16-8-1 units, exact KL; best of 5 starts by the bound of RWS-10",
            sure="recalled",
            seeds=10,
        ),
        Recipe(
            name="m2_100",
            title="test accuracy, %",
            run=partial(semi_supervised, labels=100),
            published=88.03,
            source="Kingma et al. 2014, as a README of a re-implementation quotes it",
            protocol="MNIST, 100 labels, ten a class; pixels made binary at one half",
            sure="quoted",
            better="higher",
            seeds=5,
        ),
    )
}
