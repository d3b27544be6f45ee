"""The runs behind the ledger: from ``quick`` (a size for tests) and a seed to figures, ``figure`` among them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp
from scipy.stats import entropy
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import confusion_matrix
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from inference import fit, log_likelihood, pointwise_log_likelihood
from inference.objectives import EM, IWAE, RWS, Adversarial, Denoising
from inference.program import isolated
from inference.two_sample import energy_distance, modes, precision, recall, reverse_kl
from ppl_models import data
from ppl_models.autoregressive import Autoregressive
from ppl_models.cyclegan import CycleGAN
from ppl_models.denoisers import UNet
from ppl_models.diffusion import DiffusionChain
from ppl_models.gan import GAN, ConditionalGAN, InfoGAN, Leaky
from ppl_models.methods import adversaries
from ppl_models.mixture import BernoulliMixture
from ppl_models.networks import Beside, conv_decoder, conv_encoder, mlp
from ppl_models.pair import nothing
from ppl_models.schedules import log_snr
from ppl_models.sigmoid_belief import HelmholtzMachine
from ppl_models.vae import VAE, SemiSupervisedVAE
from ppl_models.warps import Shaken, Warp

LN2 = math.log(2)


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


def dropped_modes(quick: bool, seed: int, *, name: str, steps: int, r1: float) -> dict[str, float]:
    """Modes of a ring or a grid that a GAN with R1 finds, on 100,000 rows of it, beside the plain GAN."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, steps, 100_000)
    x, centres, deviation = data.simulate_modes(name, rows, seed)
    found: dict[str, float] = {}
    for label, penalty in (("", r1), ("plain ", 0.0)):
        with isolated(seed):
            pair = GAN(2, 2, hidden=(128, 128, 128))
        adversaries(pair, x, Adversarial(r1=penalty), steps=steps, batch=256, learning_rate=0.001, seed=seed)
        seen = modes(pair.generate(drawn, seed=seed), centres, deviation)
        found[f"{label}modes" if label else "figure"] = seen.found
        found[f"{label}quality, %"] = 100 * seen.quality.value
        found[f"{label}reverse KL"] = seen.reverse_kl
    return found


def diffused_modes(quick: bool, seed: int, *, name: str) -> dict[str, float]:
    """Modes of a ring or a grid that a diffusion chain of 100 steps finds, on 100,000 rows of it; the same by the
    deterministic sampler."""
    rows, steps, drawn = (2000, 60, 2000) if quick else (100_000, 10_000, 100_000)
    x, centres, deviation = data.simulate_modes(name, rows, seed)
    finest = -2 * math.log(deviation / float(x.std())) + 2
    with isolated(seed):
        pair = DiffusionChain(2, schedule=log_snr(100, finest, -8), spread=float(x.std()))
    fit(pair, x, Denoising(100, simple=True), steps=steps, batch=256, learning_rate=0.002, seed=seed)
    found: dict[str, float] = {}
    for label, chosen in (("", None), ("deterministic ", 50)):
        seen = modes(pair.generate(drawn, steps=chosen, seed=seed), centres, deviation)
        found[f"{label}modes" if label else "figure"] = seen.found
        found[f"{label}quality, %"] = 100 * seen.quality.value
        found[f"{label}reverse KL"] = seen.reverse_kl
    return found


def diffusion(quick: bool, seed: int) -> dict[str, float]:
    """Bits a pixel of test images by the bound of a chain of 1,000 steps with a U-Net and learned variances."""
    images = data.load("mnist")
    few, rows, chain, steps, batch = (200, 20, 20, 20, 20) if quick else (None, 2000, 1000, 40_000, 128)
    channels = (8, 16, 16) if quick else (32, 64, 64)
    with isolated(seed):
        network = UNet((28, 28), chain, channels=channels, wide=True)
        pair = DiffusionChain(images.features, network, steps=chain, variance="learned", likelihood="pixels")
    x, test = images.train["x"][:few], images.test["x"][:rows]
    objective = Denoising(chain, simple=True, bound=0.001)
    fit(pair, x, objective, steps=steps, batch=batch, learning_rate=0.001, seed=seed)
    bits = pair.bound(test).bits()
    drawn = pair.generate(len(test), steps=min(50, chain), seed=seed)
    return {
        "figure": bits.pop("total"),
        **bits,
        "energy distance": energy_distance(test, drawn).value,
        "precision, %": 100 * precision(test, drawn).value,
        "recall, %": 100 * recall(test, drawn).value,
    }


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
    return {"figure": int((shares > 0).sum()), "reverse KL": reverse_kl(shares)}


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
            trunk = nn.Sequential(Shaken((8, 8)), mlp(64, 256, 256, activation=Leaky), Leaky())
            pair = InfoGAN(digits.features, 10, 8, generator=maker, trunk=trunk)
        objective = Adversarial(r1=1.0, information=("c",))
        schedule: dict[str, Any] = {"steps": steps, "batch": 64, "learning_rate": 0.001, "draws": 1}
        adversaries(pair, x, objective, seed=start, **schedule)
        seen = judge.predict(pair.generate(drawn, seed=seed).numpy())
        table = confusion_matrix(asked, seen, labels=range(10), normalize="all")
        with isolated(start), torch.no_grad():
            one, other = (pair.reader(pair.trunk(x)).softmax(-1).double() for _ in range(2))
        # Not scikit-learn's mutual information, which takes the counts of a table for whole numbers.
        met = (one.mT @ other + other.mT @ one).numpy()
        told = float(2 * entropy(met.sum(0)) - entropy(met.flatten()))
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
        return energy_distance(there, b[:rows]).value + energy_distance(back, a[:rows]).value

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
        judge = Beside(
            judge, pixels, nn.Sequential(Leaky(), nn.Linear(outputs + labels, 128), Leaky(), nn.Linear(128, 1))
        )
    return {"generator": nn.Sequential(made, nn.Sigmoid()), "discriminator": judge}


def classifier(x: Tensor, y: Tensor, quick: bool) -> MLPClassifier:
    """A network of scikit-learn that tells digits, fitted here."""
    judge = MLPClassifier((256,), early_stopping=not quick, max_iter=5 if quick else 30, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return judge.fit(x.numpy(), y.numpy())


def _by_numpy(draws: Mapping[str, Tensor], x: Tensor) -> float:
    """Mean log likelihood of a Bernoulli mixture without torch and Pyro, in float64."""
    probs, weights = (draws[n][0].double().numpy() for n in ("probs", "weights"))
    probs, rows = probs.clip(1e-7, 1 - 1e-7), x.double().numpy()
    joint = rows @ np.log(probs).T + (1 - rows) @ np.log1p(-probs).T + np.log(weights)
    return float(logsumexp(joint, 1).mean())
