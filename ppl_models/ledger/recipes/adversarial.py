r"""Recipes of adversarial training."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import confusion_matrix
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from inference import isolated, two_sample
from inference.objectives import Adversarial
from ppl_models import data
from ppl_models.data import simulate_modes
from ppl_models.ledger.recipes.trained import fitted, placed, show, trained
from ppl_models.models.cyclegan import CycleGAN
from ppl_models.models.gan import GAN, ConditionalGAN, InfoGAN, Leaky
from ppl_models.models.parts.information import mutual_information
from ppl_models.models.parts.networks import conv_encoder, mlp
from ppl_models.models.parts.warps import RandomWarp, Warp
from ppl_models.zoo.arguments import dcgan
from ppl_models.zoo.methods import adversaries

duelled = partial(trained, method=adversaries)
"""A GAN built from its seed and trained by adversaries."""


def dropped_modes(quick: bool, seed: int, *, name: str, steps: int, r1: float) -> dict[str, float]:
    """Modes of a ring or a grid found by a GAN with R1, and by the plain GAN."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, steps, 100_000)
    x, centres, deviation = simulate_modes(name, rows, seed)
    schedule: dict[str, Any] = {"steps": steps, "batch": 256, "learning_rate": 0.001}
    metrics: dict[str, float] = {}
    for label, penalty in (("", r1), ("plain ", 0.0)):
        objective = Adversarial(r1=penalty)
        pair, _ = duelled(lambda: GAN(2, 2, hidden=(128, 128, 128)), placed(x), objective, seed=seed, **schedule)
        modes = two_sample.modes(pair.generate(drawn, seed=seed).cpu(), centres, deviation)
        metrics[f"{label}modes" if label else "figure"] = modes.found
        metrics[f"{label}quality, %"] = 100 * modes.quality.value
        metrics[f"{label}reverse KL"] = modes.reverse_kl
    return metrics


def conditional_gan(quick: bool, seed: int) -> dict[str, float]:
    """Percent of a conditional GAN's digits that a classifier assigns to the label asked for."""
    images = data.load("mnist")
    few, steps, drawn = (400, 20, 100) if quick else (None, 20_000, 10_000)
    x, y = images.train["x"][:few], images.train["y"][:few]
    schedule: dict[str, Any] = {"steps": steps, "batch": 64, "learning_rate": 5e-4}
    make = lambda: ConditionalGAN(images.features, images.classes, 50, **dcgan(50 + 10, 10))  # noqa: E731
    pair, _ = duelled(make, {"x": placed(x), "y": placed(y)}, Adversarial(r1=1.0), seed=seed, **schedule)
    network = classifier(x, y, quick)
    asked = torch.arange(drawn) % 10
    right = network.predict(pair.generate(drawn, seed=seed, y=placed(asked)).cpu().numpy()) == asked.numpy()
    test = network.score(images.test["x"][:few].numpy(), images.test["y"][:few].numpy())
    return {"figure": 100 * float(right.mean()), "the classifier on test images, %": 100 * float(test)}


def stacked_mnist(quick: bool, seed: int) -> dict[str, float]:
    """Modes, of 1,000, found by a DCGAN with R1 on three digits in three planes, in 26,000 samples."""
    images = data.load("mnist")
    few, rows, steps, drawn = (400, 400, 6, 300) if quick else (None, 60_000, 50_000, 26_000)
    random = torch.Generator().manual_seed(seed)
    x, y = images.train["x"][:few], images.train["y"][:few]
    x = x[torch.randint(len(x), (rows, 3), generator=random)].flatten(1)
    schedule: dict[str, Any] = {"steps": steps, "batch": 64, "learning_rate": 2e-4}
    make = lambda: GAN(x.shape[1], 100, **dcgan(100, 0, planes=3))  # noqa: E731
    pair, _ = duelled(make, placed(x), Adversarial(r1=1.0), seed=seed, **schedule)
    network = classifier(images.train["x"][:few], y, quick)
    planes = network.predict(pair.generate(drawn, seed=seed).reshape(-1, 784).cpu().numpy()).reshape(-1, 3)
    fractions = torch.bincount(torch.as_tensor(planes @ [100, 10, 1]), minlength=1000).double() / drawn
    return {"figure": int((fractions > 0).sum()), "reverse KL": two_sample.reverse_kl(fractions)}


def coded(quick: bool, seed: int) -> dict[str, float]:
    """Percent of an InfoGAN's digits that a classifier assigns to the digit matched to their code.

    Of four starts the one whose code has the most information on the data is taken, without labels.
    """
    digits = data.load("digits")
    few, steps, starts, drawn = (200, 20, 2, 100) if quick else (None, 6000, 4, 2000)
    x, y = digits.train["x"][:few] / 16, digits.train["y"][:few]
    machine = SVC().fit(x.numpy(), y.numpy())
    x = placed(x)
    asked = torch.arange(drawn) % 10

    def make() -> InfoGAN:
        generator = nn.Sequential(mlp(8 + 10, 256, 256, 64, activation=nn.ReLU), nn.Sigmoid())
        trunk = nn.Sequential(RandomWarp((8, 8)), mlp(64, 256, 256, activation=Leaky), Leaky())
        return InfoGAN(digits.features, 10, 8, generator=generator, trunk=trunk)

    schedule: dict[str, Any] = {"steps": steps, "batch": 64, "learning_rate": 0.001, "draws": 1}
    runs, results = list[tuple[float, float]](), []
    for start in range(starts * seed, starts * (seed + 1)):
        pair, result = duelled(make, x, Adversarial(r1=1.0, information=("c",)), seed=start, **schedule)
        predicted = machine.predict(pair.generate(drawn, seed=seed).cpu().numpy())
        table = confusion_matrix(asked, predicted, labels=range(10), normalize="all")
        with isolated(start), torch.no_grad():
            one, other = (pair.reader(pair.trunk(x)).softmax(-1).double() for _ in range(2))
        information = float(mutual_information(one.mT @ other + other.mT @ one))
        results.append(result)
        runs.append((information, 100 * float(table[linear_sum_assignment(-table)].sum())))
    rows = digits.test["x"].numpy() / 16, digits.test["y"].numpy()
    show(results[runs.index(max(runs))], x)
    figures = sorted(figure for _, figure in runs)
    return {
        "figure": max(runs)[1],
        "of the starts' upper median": figures[starts // 2],
        "information, nats": max(runs)[0],
        "the classifier on test images, %": 100 * float(machine.score(*rows)),
    }


def unpaired(quick: bool, seed: int) -> dict[str, float]:
    """Squared error, in percent of the variance, of a CycleGAN's map to turned and inverted digits.

    It starts from each quarter of a turn and continues the start with the smallest energy distance.
    """
    images = data.load("mnist")
    few, rows, short, long = (200, 100, 4, 8) if quick else (20_000, 1000, 300, 1500)
    shape = (28, 28)

    def turned(x: Tensor, quarters: int) -> Tensor:
        return torch.rot90(x.reshape(-1, *shape), quarters, (1, 2)).flatten(1)

    x = images.train["x"][torch.randperm(len(images.train["x"]), generator=torch.Generator().manual_seed(seed))]
    a, b = placed(x[:few]), placed(1 - turned(x[few : 2 * few], 1))
    one, other = placed(images.test["x"][:rows]), placed(1 - turned(images.test["x"][rows : 2 * rows], 1))

    def train(pair: CycleGAN, steps: int, learning_rate: float) -> float:
        schedule: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch": 64, "draws": 1}
        result = fitted(pair, {"a": a, "b": b}, Adversarial(r1=0.1), method=adversaries, seed=seed, **schedule)
        show(result, {"a": a, "b": b})
        there, back = pair.translate(a[:rows]), pair.translate(b[:rows], back=True)
        return two_sample.energy_distance(there, b[:rows]).value + two_sample.energy_distance(back, a[:rows]).value

    starts: list[tuple[float, int, CycleGAN]] = []
    for quarter in range(4):
        with isolated(seed):
            there, back = (Warp(shape, angle=sign * quarter * math.pi / 2) for sign in (1, -1))
            networks = conv_encoder(shape, 1, activation=Leaky), conv_encoder(shape, 1, activation=Leaky)
            maps: dict[str, Any] = {"forward_map": there, "backward_map": back}
            pair = placed(CycleGAN((784, 784), scale=80.0, discriminators=networks, **maps))
        starts.append((train(pair, short, 0.005), quarter, pair))
    (best, _, pair), (second, *_), *_ = sorted(starts)
    distance = train(pair, long, 0.002)

    def error(mapped: Tensor, truth: Tensor) -> float:
        return 100 * float((mapped - truth).square().mean() / truth.var(0).mean())

    return {
        "figure": error(pair.translate(one), 1 - turned(one, 1)),
        "of the way back, %": error(pair.translate(other, back=True), turned(1 - other, -1)),
        "energy distances": distance,
        "of the best start": best,
        "of the second": second,
    }


def classifier(x: Tensor, y: Tensor, quick: bool) -> MLPClassifier:
    """A network of scikit-learn fitted to classify digits."""
    network = MLPClassifier((256,), early_stopping=not quick, max_iter=5 if quick else 30, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(x.numpy(), y.numpy())
