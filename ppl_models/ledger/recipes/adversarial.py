r"""Runs of adversarial training."""

from __future__ import annotations

import math
import warnings
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
from ppl_models.models.cyclegan import CycleGAN
from ppl_models.models.gan import GAN, ConditionalGAN, InfoGAN, Leaky
from ppl_models.models.parts.information import mutual_information
from ppl_models.models.parts.networks import LateFusion, conv_decoder, conv_encoder, mlp
from ppl_models.models.parts.warps import RandomWarp, Warp
from ppl_models.zoo.methods import adversaries


def dropped_modes(quick: bool, seed: int, *, name: str, steps: int, r1: float) -> dict[str, float]:
    """Modes of a ring or a grid that a GAN with R1 finds, on 100,000 rows of it, beside the plain GAN."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, steps, 100_000)
    x, centres, deviation = simulate_modes(name, rows, seed)
    found: dict[str, float] = {}
    for label, penalty in (("", r1), ("plain ", 0.0)):
        with isolated(seed):
            pair = GAN(2, 2, hidden=(128, 128, 128))
        adversaries(pair, x, Adversarial(r1=penalty), steps=steps, batch=256, learning_rate=0.001, seed=seed)
        seen = two_sample.modes(pair.generate(drawn, seed=seed), centres, deviation)
        found[f"{label}modes" if label else "figure"] = seen.found
        found[f"{label}quality, %"] = 100 * seen.quality.value
        found[f"{label}reverse KL"] = seen.reverse_kl
    return found


def conditional_gan(quick: bool, seed: int) -> dict[str, float]:
    """Percent of a conditional GAN's digits that a classifier trained here takes for what was asked."""
    images = data.load("mnist")
    few, steps, drawn = (400, 20, 100) if quick else (None, 20_000, 10_000)
    x, y = images.train["x"][:few], images.train["y"][:few]
    with isolated(seed):
        pair = ConditionalGAN(images.features, images.classes, 50, **dcgan(50 + 10, 10))
    adversaries(pair, {"x": x, "y": y}, Adversarial(r1=1.0), steps=steps, batch=64, learning_rate=5e-4, seed=seed)
    judge = classifier(x, y, quick)
    asked = torch.arange(drawn) % 10
    right = judge.predict(pair.generate(drawn, seed=seed, y=asked).numpy()) == asked.numpy()
    test = judge.score(images.test["x"][:few].numpy(), images.test["y"][:few].numpy())
    return {"figure": 100 * float(right.mean()), "the classifier on test images, %": 100 * float(test)}


def stacked_mnist(quick: bool, seed: int) -> dict[str, float]:
    """Modes of 1,000 that a DCGAN with R1 finds on three digits in three planes, in 26,000 samples."""
    images = data.load("mnist")
    few, rows, steps, drawn = (400, 400, 6, 300) if quick else (None, 60_000, 50_000, 26_000)
    random = torch.Generator().manual_seed(seed)
    x, y = images.train["x"][:few], images.train["y"][:few]
    x = x[torch.randint(len(x), (rows, 3), generator=random)].flatten(1)
    with isolated(seed):
        pair = GAN(x.shape[1], 100, **dcgan(100, 0, planes=3))
    adversaries(pair, x, Adversarial(r1=1.0), steps=steps, batch=64, learning_rate=2e-4, seed=seed)
    judge = classifier(images.train["x"][:few], y, quick)
    planes = judge.predict(pair.generate(drawn, seed=seed).reshape(-1, 784).numpy()).reshape(-1, 3)
    shares = torch.bincount(torch.as_tensor(planes @ [100, 10, 1]), minlength=1000).double() / drawn
    return {"figure": int((shares > 0).sum()), "reverse KL": two_sample.reverse_kl(shares)}


def coded(quick: bool, seed: int) -> dict[str, float]:
    """Percent of an InfoGAN's digits that a classifier takes for the digit of their code, codes and digits matched.

    Of four starts it is the one whose code tells most of the data: labels have no part in it.
    """
    digits = data.load("digits")
    few, steps, starts, drawn = (200, 20, 2, 100) if quick else (None, 6000, 4, 2000)
    x, y = digits.train["x"][:few] / 16, digits.train["y"][:few]
    judge = SVC().fit(x.numpy(), y.numpy())
    asked = torch.arange(drawn) % 10
    found: list[tuple[float, float]] = []
    for start in range(starts * seed, starts * (seed + 1)):
        with isolated(start):
            maker = nn.Sequential(mlp(8 + 10, 256, 256, 64, activation=nn.ReLU), nn.Sigmoid())
            trunk = nn.Sequential(RandomWarp((8, 8)), mlp(64, 256, 256, activation=Leaky), Leaky())
            pair = InfoGAN(digits.features, 10, 8, generator=maker, trunk=trunk)
        objective = Adversarial(r1=1.0, information=("c",))
        schedule: dict[str, Any] = {"steps": steps, "batch": 64, "learning_rate": 0.001, "draws": 1}
        adversaries(pair, x, objective, seed=start, **schedule)
        seen = judge.predict(pair.generate(drawn, seed=seed).numpy())
        table = confusion_matrix(asked, seen, labels=range(10), normalize="all")
        with isolated(start), torch.no_grad():
            one, other = (pair.reader(pair.trunk(x)).softmax(-1).double() for _ in range(2))
        told = float(mutual_information(one.mT @ other + other.mT @ one))
        found.append((told, 100 * float(table[linear_sum_assignment(-table)].sum())))
    rows = digits.test["x"].numpy() / 16, digits.test["y"].numpy()
    figures = sorted(figure for _, figure in found)
    return {
        "figure": max(found)[1],
        "of the starts' upper median": figures[starts // 2],
        "information, nats": max(found)[0],
        "the classifier on test images, %": 100 * float(judge.score(*rows)),
    }


def unpaired(quick: bool, seed: int) -> dict[str, float]:
    """Squared error, in percent of the variance, of the map that a CycleGAN finds to turned and inverted digits.

    It starts from each quarter of a turn, and goes on from where images look most like those of the other domain.
    """
    images = data.load("mnist")
    few, rows, short, long = (200, 100, 4, 8) if quick else (20_000, 1000, 300, 1500)
    shape = (28, 28)

    def turned(x: Tensor, quarters: int) -> Tensor:
        return torch.rot90(x.reshape(-1, *shape), quarters, (1, 2)).flatten(1)

    x = images.train["x"][torch.randperm(len(images.train["x"]), generator=torch.Generator().manual_seed(seed))]
    a, b = x[:few], 1 - turned(x[few : 2 * few], 1)
    one, other = images.test["x"][:rows], 1 - turned(images.test["x"][rows : 2 * rows], 1)

    def train(pair: CycleGAN, steps: int, learning_rate: float) -> float:
        schedule: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch": 64, "draws": 1}
        adversaries(pair, {"a": a, "b": b}, Adversarial(r1=0.1), seed=seed, **schedule)
        there, back = pair.translate(a[:rows]), pair.translate(b[:rows], back=True)
        return two_sample.energy_distance(there, b[:rows]).value + two_sample.energy_distance(back, a[:rows]).value

    starts: list[tuple[float, int, CycleGAN]] = []
    for quarter in range(4):
        with isolated(seed):
            there, back = (Warp(shape, angle=sign * quarter * math.pi / 2) for sign in (1, -1))
            judges = conv_encoder(shape, 1, activation=Leaky), conv_encoder(shape, 1, activation=Leaky)
            pair = CycleGAN((784, 784), scale=80.0, forward_map=there, backward_map=back, discriminators=judges)
        starts.append((train(pair, short, 0.005), quarter, pair))
    (best, _, pair), (second, *_), *_ = sorted(starts)
    distance = train(pair, long, 0.002)

    def error(found: Tensor, truth: Tensor) -> float:
        return 100 * float((found - truth).square().mean() / truth.var(0).mean())

    return {
        "figure": error(pair.translate(one), 1 - turned(one, 1)),
        "of the way back, %": error(pair.translate(other, back=True), turned(1 - other, -1)),
        "energy distances": distance,
        "of the best start": best,
        "of the second": second,
    }


def dcgan(inputs: int, labels: int, *, planes: int = 1) -> dict[str, Any]:
    """Convolutional networks of images of 28 x 28: a generator of noise and labels, a discriminator of image and label.

    Labels come after the pixels, where convolutions cannot read them: a dense layer joins what both make of theirs.
    """
    shape, pixels = (28, 28), planes * 784
    made = conv_decoder(inputs, shape, channels=(64, 32), planes=planes, activation=nn.ReLU, normalise=True)
    outputs = 128 if labels else 1
    judge: nn.Module = conv_encoder(shape, outputs, channels=(32, 64), planes=planes, activation=Leaky)
    if labels:
        judge = LateFusion(
            judge, pixels, nn.Sequential(Leaky(), nn.Linear(outputs + labels, 128), Leaky(), nn.Linear(128, 1))
        )
    return {"generator": nn.Sequential(made, nn.Sigmoid()), "discriminator": judge}


def classifier(x: Tensor, y: Tensor, quick: bool) -> MLPClassifier:
    """A network of scikit-learn that tells digits, fitted here."""
    judge = MLPClassifier((256,), early_stopping=not quick, max_iter=5 if quick else 30, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return judge.fit(x.numpy(), y.numpy())
