r"""The zoo: one row a pair. How to build it, its data, the methods that apply, the truth it is held against."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from pyro.infer import NUTS
from torch import nn

from inference import Method, Moments, fit, sample
from inference.objectives import RWS, VIMCO, WakeSleep
from ppl_models.data.sets import Dataset
from ppl_models.models.autoregressive import MADE
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.diffusion.denoisers import UNet
from ppl_models.models.gan import GAN, ConditionalGAN
from ppl_models.models.linear_factors import PPCA, FactorAnalysis
from ppl_models.models.markov_chain import MarkovChain
from ppl_models.models.mixture import BernoulliMixture, GaussianMixture, Mixture
from ppl_models.models.naive_bayes import BernoulliNaiveBayes, GaussianNaiveBayes, MultinomialNaiveBayes, NaiveBayes
from ppl_models.models.pair import Pair
from ppl_models.models.parts.networks import mlp
from ppl_models.models.regression import LogisticRegression, NeuralClassifier
from ppl_models.models.sigmoid_belief import HelmholtzMachine
from ppl_models.models.vae import VAE, ConditionalVAE, HierarchicalVAE
from ppl_models.zoo import pictures
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import adversarial, by_minibatches, closed_form, counted, denoising, em, exact, point


def _sizes(make: Callable[..., Pair]) -> Callable[..., Pair]:
    def build(dataset: Dataset, **arguments: Any) -> Pair:
        if "y" not in dataset.train:
            raise ValueError(f"data: expected a set with labels, got {dataset.name} without")
        return make(dataset.features, dataset.classes, **arguments)

    return build


def _tree(dataset: Dataset, **arguments: Any) -> Pair:
    return BayesianNetwork.chow_liu(dataset.train["x"], dataset.features, **arguments)


def _conjugate(pair: NaiveBayes | BayesianNetwork, given: Any) -> Moments:
    return pair.moments(**given)


def _codes(dataset: Dataset) -> int:
    """Factors of a VAE: ten for the small digits, fifty for images of 784 pixels (Burda et al. 2016)."""
    return 10 if len(dataset.features) < 784 else 50


def _units(dataset: Dataset) -> tuple[int, int]:
    """Binary units of two layers: those of the published figures for images of 784 pixels."""
    return (40, 20) if len(dataset.features) < 784 else (200, 200)


def _layers(dataset: Dataset) -> tuple[int, int]:
    """Factors of two layers: those of Burda et al. 2016 for images of 784 pixels."""
    return (20, 10) if len(dataset.features) < 784 else (100, 50)


def _images(**own: Any) -> Entry:
    """A row of a pair of binary images, digits first, whose methods learn by minibatches."""
    shared: dict[str, Any] = {
        "data": "digits",
        "also": ("binarized_mnist", "mnist", "fashion_mnist", "omniglot"),
        "prepare": {"binarise": True},
        "truth": None,
        "source": "held-out likelihood",
        "dtype": torch.float32,
        "takes": ("x",),
        "label": None,
        "draw": pictures.save,
    }
    return Entry(**{**shared, **own})


def _chain(dataset: Dataset, **arguments: Any) -> DiffusionChain:
    """A chain over pixels of as many levels as the data hold."""
    side, steps = math.isqrt(len(dataset.features)), arguments.pop("steps", 100)
    levels = {"digits": 17, "binarized_mnist": 2}.get(dataset.name, 256)
    network = UNet((side, side), steps, channels=(32, 64) if side < 28 else (16, 32, 32), learned_variance=True)
    shared = {"network": network, "variance": "learned", "likelihood": "pixels", "levels": levels}
    return DiffusionChain(dataset.features, steps=steps, **{**shared, **arguments})


def bits(pair: DiffusionChain, given: Mapping[str, Any]) -> pd.DataFrame:
    """The bound of a chain on rows, in bits per dimension, term by term, with standard errors over rows."""
    each = pair.bound(**given).row_bits()
    return pd.DataFrame(
        [(name, float(v.mean()), float(v.std()) / len(v) ** 0.5) for name, v in each.items()],
        columns=["bits per dimension, held out", "mean", "standard error"],
    )


def _dense(make: Callable[..., GAN], inputs: int, *sizes: Any) -> GAN:
    """An adversarial pair of images in [0, 1] with dense networks."""
    pixels = len(sizes[0])
    generator = nn.Sequential(mlp(inputs, 256, 256, pixels, activation=nn.ReLU), nn.Sigmoid())
    return make(*sizes, hidden=(256, 256), generator=generator)


def _mixture(make: Callable[..., Mixture], components: int) -> Callable[..., Mixture]:
    return lambda dataset, **arguments: make(dataset.features, components, **arguments)


# A mode without noise in its gradient: large steps at first, and a schedule that brings them to rest.
_SVI: dict[str, Method] = {"MAP": partial(point, steps=1000, learning_rate=0.5), "SVI": partial(fit, steps=3000)}


_CONJUGATE: dict[str, Method] = {"exact": exact, **_SVI}


_CHAINS: dict[str, Method] = {"ChEES": sample, "NUTS": partial(sample, kernel=NUTS, draws=1000, warmup=500, chains=2)}


ZOO: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="naive_bayes",
            title="Gaussian naive Bayes, Normal-Inverse-Gamma prior",
            build=_sizes(GaussianNaiveBayes),
            data="breast_cancer",
            also=("wine", "iris", "digits"),
            prepare={"standardise": True},
            methods={**_CONJUGATE, **_CHAINS},
            truth=_conjugate,
            source="conjugate posterior",
        ),
        Entry(
            name="bernoulli_naive_bayes",
            title="Bernoulli naive Bayes, Beta prior",
            build=_sizes(BernoulliNaiveBayes),
            data="digits",
            also=("xwindows", "news20_w100", "sms_spam", "mnist", "fashion_mnist"),
            prepare={"binarise": True},
            methods={**_CONJUGATE, **_CHAINS},
            truth=_conjugate,
            source="conjugate posterior",
        ),
        Entry(
            name="multinomial_naive_bayes",
            title="Multinomial naive Bayes, Dirichlet prior",
            build=_sizes(MultinomialNaiveBayes),
            data="digits",
            also=("sms_spam", "xwindows", "news20_w100"),
            prepare={},
            methods={**_CONJUGATE, **_CHAINS},
            truth=_conjugate,
            source="conjugate posterior",
        ),
        Entry(
            name="logistic_regression",
            title="Bayesian logistic regression, binary or multiclass",
            build=_sizes(LogisticRegression),
            data="breast_cancer",
            also=("wine", "iris", "digits"),
            prepare={"standardise": True},
            methods={**_SVI, **_CHAINS},
            truth=lambda pair, given: pair.moments(**given),
            source="importance sampling, its own",
        ),
        Entry(
            name="neural_classifier",
            title="Bayesian neural network, one hidden layer",
            build=_sizes(NeuralClassifier),
            data="wine",
            also=("breast_cancer", "iris", "digits"),
            prepare={"standardise": True},
            methods={
                "MAP": partial(point, steps=1500, learning_rate=0.05),
                "SVI": partial(fit, steps=3000),
                **_CHAINS,
            },
            truth=None,
            source="held-out predictions only: its modes are many",
        ),
        Entry(
            name="bayesian_network",
            title="Bayesian network, Chow and Liu's tree, Dirichlet prior",
            build=_tree,
            data="wine",
            also=("breast_cancer", "digits", "xwindows", "news20_w100"),
            prepare={"binarise": True},
            methods={**_CONJUGATE, **_CHAINS},
            truth=_conjugate,
            source="conjugate posterior; queries by brute force",
            takes=("x",),
            label=None,
        ),
        Entry(
            name="gaussian_mixture",
            title="Gaussian mixture, three components, diagonal covariances",
            build=_mixture(partial(GaussianMixture, covariance="diagonal"), 3),
            data="iris",
            also=("wine", "breast_cancer"),
            prepare={"standardise": True},
            methods={"EM": partial(em, steps=200), "SVI": partial(fit, steps=3000), **_CHAINS},
            truth=None,
            source="EM is scikit-learn's, step by step; held-out predictions",
            takes=("x",),
            label="z",
        ),
        Entry(
            name="bernoulli_mixture",
            title="Bernoulli mixture, twenty components, Beta prior",
            build=_mixture(BernoulliMixture, 20),
            data="digits",
            also=("binarized_mnist", "mnist", "omniglot", "xwindows", "news20_w100"),
            prepare={"binarise": True},
            methods={"EM": partial(em, steps=100), "SVI": partial(fit, steps=3000, learning_rate=0.05)},
            truth=None,
            source="held-out predictions; a published likelihood in the ledger",
            takes=("x",),
            label="z",
        ),
        Entry(
            name="factor_analysis",
            title="Factor analysis, two factors, exact guide",
            build=lambda dataset, **arguments: FactorAnalysis(dataset.features, 2, **arguments),
            data="wine",
            also=("breast_cancer", "iris", "digits"),
            prepare={"standardise": True},
            methods={"SVI": partial(fit, steps=1500)},
            truth=None,
            source="scikit-learn's likelihood; the ELBO is log p(x)",
            takes=("x",),
            label=None,
        ),
        Entry(
            name="ppca",
            title="Probabilistic PCA, two factors, exact guide",
            build=lambda dataset, **arguments: PPCA(dataset.features, 2, **arguments),
            data="wine",
            also=("breast_cancer", "iris", "digits"),
            prepare={"standardise": True},
            methods={"SVI": partial(fit, steps=1500), "closed form": closed_form},
            truth=None,
            source="its closed form; the ELBO is log p(x)",
            takes=("x",),
            label=None,
        ),
        Entry(
            name="made",
            title="MADE, binary features one after another",
            build=lambda dataset, **arguments: MADE(dataset.features, **arguments),
            data="digits",
            also=("binarized_mnist", "mnist", "omniglot", "xwindows", "news20_w100"),
            prepare={"binarise": True},
            methods={"maximum likelihood": partial(fit, steps=2000, batch=100, learning_rate=0.005)},
            truth=None,
            source="densities that sum to one; held-out likelihood",
            dtype=torch.float32,
            takes=("x",),
            label=None,
        ),
        Entry(
            name="markov_chain",
            title="Markov chain over the letters of a text",
            build=lambda dataset, **arguments: MarkovChain(dataset.features, dataset.symbols, **arguments),
            data="descriptions",
            also=("sms_text",),
            prepare={},
            methods={"counts": counted, "maximum likelihood": partial(fit, steps=1000, learning_rate=0.1)},
            truth=None,
            source="counts; brute force in the tests; held-out likelihood",
            dtype=torch.float32,
            takes=("x",),
            label=None,
        ),
        _images(
            name="helmholtz_machine",
            title="Helmholtz machine, two layers of binary causes",
            build=lambda dataset, **arguments: HelmholtzMachine(dataset.features, _units(dataset), **arguments),
            also=("binarized_mnist", "mnist", "omniglot"),
            methods={
                "wake-sleep": by_minibatches(objective=WakeSleep),
                "RWS": by_minibatches(objective=partial(RWS, 10)),
                "VIMCO": by_minibatches(objective=partial(VIMCO, 10)),
            },
            source="held-out likelihood; all states in the tests; published ones in the ledger",
        ),
        _images(
            name="vae",
            title="Variational autoencoder, Bernoulli likelihood",
            build=lambda dataset, **arguments: VAE(dataset.features, _codes(dataset), **arguments),
            methods={"SVI": by_minibatches()},
            source="held-out likelihood; a published one in the ledger",
        ),
        _images(
            name="hierarchical_vae",
            title="VAE with two stochastic layers",
            build=lambda dataset, **arguments: HierarchicalVAE(dataset.features, _layers(dataset), **arguments),
            methods={"SVI": by_minibatches(learning_rate=0.003)},
        ),
        _images(
            name="conditional_vae",
            title="VAE of images given their label",
            build=_sizes(lambda features, classes, **arguments: ConditionalVAE(features, 10, classes, **arguments)),
            also=("mnist", "fashion_mnist"),
            methods={"SVI": by_minibatches()},
            takes=("x", "y"),
        ),
        _images(
            name="gan",
            title="GAN, dense networks",
            build=lambda dataset, **arguments: _dense(partial(GAN, **arguments), 16, dataset.features, 16),
            methods={
                "GAN": adversarial(),
                "R1": adversarial(r1=1.0),
                "WGAN-GP": adversarial("wasserstein", penalty=1.0),
            },
            source="two-sample figures; ring and grid in the ledger",
            fit=adversarial(r1=1.0),
        ),
        _images(
            name="conditional_gan",
            title="GAN of images given their label",
            build=_sizes(lambda *sizes, **own: _dense(partial(ConditionalGAN, **own), 20 + len(sizes[1]), *sizes, 20)),
            also=("mnist", "fashion_mnist"),
            methods={"R1": adversarial(r1=1.0)},
            takes=("x", "y"),
            source="two-sample figures; digits as asked in the tests",
            fit=adversarial(r1=1.0),
        ),
        _images(
            name="diffusion",
            title="Diffusion chain of 100 steps, a small U-Net",
            build=_chain,
            also=("mnist", "fashion_mnist", "binarized_mnist", "omniglot"),
            prepare={"unit": True},
            methods={"hybrid": denoising(simple=True, bound=0.01), "bound": denoising(importance=True)},
            source="its exact case in the tests; ring and grid in the ledger",
            fit=denoising(simple=True, bound=0.01),
            report=bits,
        ),
    )
}


def find(name: str) -> Entry:
    """The row of a name, or a ValueError with the nearest names."""
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(f"pair: unknown {name!r}; {hint}known: {', '.join(ZOO)}")
    return ZOO[name]


def table() -> str:
    """The zoo as a Markdown table."""
    lines = ["| pair | what | data | methods | held against |", "| --- | --- | --- | --- | --- |"]
    for entry in ZOO.values():
        sets = ", ".join((f"**{entry.data}**", *entry.also))
        lines.append(f"| `{entry.name}` | {entry.title} | {sets} | {', '.join(entry.methods)} | {entry.source} |")
    return "\n".join(lines)
