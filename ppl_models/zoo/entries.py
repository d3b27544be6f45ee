r"""The zoo: one entry per pair with its data, the methods that apply and what it is compared with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from pyro.infer import Trace_ELBO

from inference import Method, Moments, fit, sample
from inference.kernels import NUTS
from inference.objectives import RWS, VIMCO, WakeSleep
from ppl_models.data.frames import Roles
from ppl_models.data.sets import Dataset
from ppl_models.models.any_order import EoNADE
from ppl_models.models.autoregressive import FVSBN, MADE, NADE, Autoregressive
from ppl_models.models.bayesian_network import BayesianNetwork
from ppl_models.models.cyclegan import CycleGAN
from ppl_models.models.diffusion.chain import DiffusionChain
from ppl_models.models.factorial_code import FactorialCode
from ppl_models.models.gan import GAN, BiGAN, ConditionalGAN, InfoGAN
from ppl_models.models.gaussian_process import GaussianProcess
from ppl_models.models.hierarchical import HierarchicalRegression, NormalMeans
from ppl_models.models.item_response import RaschModel
from ppl_models.models.linear_factors import PPCA, Autoencoder, FactorAnalysis
from ppl_models.models.linear_models import LinearRegression, PoissonRegression
from ppl_models.models.markov_chain import MarkovChain
from ppl_models.models.mixture import BernoulliMixture, GaussianMixture
from ppl_models.models.naive_bayes import BernoulliNaiveBayes, GaussianNaiveBayes, MultinomialNaiveBayes
from ppl_models.models.regression import LogisticRegression, NeuralClassifier
from ppl_models.models.sigmoid_belief import HelmholtzMachine, SigmoidBeliefNet
from ppl_models.models.time_series import GARCH, HiddenMarkovModel
from ppl_models.models.topics import LDA
from ppl_models.models.vae import VAE, ConditionalVAE, HierarchicalVAE, SemiSupervisedVAE
from ppl_models.models.vaegan import VAEGAN, AdversarialAutoencoder
from ppl_models.zoo.arguments import bigan, chain, conditional_gan, cyclegan, gan, infogan, sized, vaegan
from ppl_models.zoo.entry import Entry, features, labelled
from ppl_models.zoo.methods import (
    adversarial,
    by_minibatches,
    closed_form,
    counted,
    denoising,
    em,
    exact,
    point,
    unpredictable,
)


def _moments(pair: Any, data: Any) -> Moments:
    return pair.moments(**data)


def _centred(pair: Autoregressive | HelmholtzMachine, dataset: Dataset) -> None:
    pair.centre(dataset.train["x"])


def bits(pair: DiffusionChain, data: Mapping[str, Any]) -> pd.DataFrame:
    """The bound of a chain on rows, in bits per dimension, term by term, with standard errors over rows."""
    terms = pair.bound(**data).row_bits()
    return pd.DataFrame(
        [(name, float(v.mean()), float(v.std()) / len(v) ** 0.5) for name, v in terms.items()],
        columns=["bits per dimension, held out", "mean", "standard error"],
    )


def accuracy(pair: SemiSupervisedVAE, data: Mapping[str, Any]) -> pd.DataFrame:
    """Fraction of held-out rows whose label the classifier of the guide finds, with its standard error."""
    with torch.no_grad():
        right = (pair.probabilities(data["x"]).argmax(-1) == data["y"]).double()
    cells = [("accuracy", float(right.mean()), float(right.std()) / len(right) ** 0.5)]
    return pd.DataFrame(cells, columns=["held out", "mean", "standard error"])


def _of(shared: Mapping[str, Any], **own: Any) -> Entry:
    return Entry(**{**shared, **own})


_TABLES: dict[str, Any] = {
    "data": "wine",
    "also": ("breast_cancer", "iris", "digits"),
    "prepare": {"standardise": True},
}
"""Shared by entries of tables of real numbers."""


_IMAGES: dict[str, Any] = {
    "data": "digits",
    "also": ("binarized_mnist", "mnist", "fashion_mnist", "omniglot"),
    "prepare": {"binarise": True},
    "source": "held-out likelihood",
    "dtype": torch.float32,
    "small": {"hidden": (8,)},
}
"""Shared by entries of binary images, fitted by minibatches."""


_AUTOREGRESSIVE: dict[str, Any] = {
    **_IMAGES,
    "also": ("binarized_mnist", "mnist", "omniglot", "xwindows", "news20_w100"),
    "begin": _centred,
    "methods": {"maximum likelihood": partial(fit, steps=2000, batch=100, learning_rate=0.005)},
    "source": "densities that sum to one; held-out likelihood",
    "small": {},
}


_GANS: dict[str, Any] = {
    **_IMAGES,
    "methods": {"R1": adversarial(r1=1.0)},
    "source": "two-sample metrics",
    "small": {"hidden": (8,), "generator": None},
}


_SERIES = Roles("count", inputs=False, whole=True)


_LABELLED: dict[str, Any] = {"also": ("mnist", "fashion_mnist")}


# A posterior mode has no noise in its gradient: large steps at first, and a schedule that brings them to rest.
_SVI: dict[str, Method] = {"MAP": partial(point, steps=1000, learning_rate=0.5), "SVI": partial(fit, steps=3000)}


_CONJUGATE: dict[str, Method] = {"exact": exact, **_SVI}


_CHAINS: dict[str, Method] = {"ChEES": sample, "NUTS": partial(sample, kernel=NUTS, draws=1000, warmup=500)}


_ANALYSIS: dict[str, Any] = {
    "methods": {"SVI": partial(fit, steps=3000), **_CHAINS},
    "truth": _moments,
    "source": "its own importance sampling",
    "arguments": lambda dataset: {},
}
"""Shared by models of Bayesian data analysis."""


_NUMBERS: dict[str, Any] = {
    **_ANALYSIS,
    "arguments": features,
    "prepare": {"standardise": True, "roles": Roles("number")},
}


_CLASSIFIERS: dict[str, Any] = {
    "arguments": labelled,
    "methods": {**_CONJUGATE, **_CHAINS},
    "truth": _moments,
    "source": "conjugate posterior",
}


_INFO = adversarial(r1=1.0, information=("c",))


_WITH_BOUND = adversarial(r1=1.0, bound=Trace_ELBO, weight=3.0)


ENTRIES = (
    _of(
        _TABLES,
        name="naive_bayes",
        title="Gaussian naive Bayes, Normal-Inverse-Gamma prior",
        make=GaussianNaiveBayes,
        **_CLASSIFIERS,
        data="breast_cancer",
        also=("wine", "iris", "digits"),
    ),
    _of(
        _CLASSIFIERS,
        name="bernoulli_naive_bayes",
        title="Bernoulli naive Bayes, Beta prior",
        make=BernoulliNaiveBayes,
        data="digits",
        also=("xwindows", "news20_w100", "sms_spam", "mnist", "fashion_mnist"),
        prepare={"binarise": True},
    ),
    _of(
        _CLASSIFIERS,
        name="multinomial_naive_bayes",
        title="Multinomial naive Bayes, Dirichlet prior",
        make=MultinomialNaiveBayes,
        data="digits",
        also=("sms_spam", "xwindows", "news20_w100"),
    ),
    _of(
        _TABLES,
        name="logistic_regression",
        title="Bayesian logistic regression, binary or multiclass",
        make=LogisticRegression,
        arguments=labelled,
        methods={"SVI": _SVI["SVI"], "MAP": _SVI["MAP"], **_CHAINS},
        truth=_moments,
        source="its own importance sampling",
        data="breast_cancer",
        also=("wine", "iris", "digits"),
    ),
    _of(
        _TABLES,
        name="neural_classifier",
        title="Bayesian neural network, one hidden layer",
        make=NeuralClassifier,
        arguments=labelled,
        methods={
            "SVI": partial(fit, steps=3000),
            "MAP": partial(point, steps=1500, learning_rate=0.05),
            **_CHAINS,
        },
        source="held-out predictions only: it has many modes",
    ),
    _of(
        _ANALYSIS,
        name="eight_schools",
        title="Normal means with known errors, partially pooled",
        make=NormalMeans,
        data="eight_schools",
        prepare={"roles": Roles("number", own=("error",), inputs=False, whole=True)},
        source="quadrature over tau",
    ),
    _of(
        _ANALYSIS,
        name="hierarchical_regression",
        title="Linear regression in groups, all coefficients partially pooled",
        make=HierarchicalRegression,
        arguments=lambda dataset: {"features": dataset.features, "groups": dataset.names["groups"]},
        data="rats",
        prepare={"standardise": True, "roles": Roles("number", own=("group",))},
    ),
    _of(
        _NUMBERS,
        name="linear_regression",
        title="Linear regression",
        make=LinearRegression,
        data="diabetes",
    ),
    _of(
        _NUMBERS,
        name="robust_regression",
        title="Linear regression with Student noise",
        make=LinearRegression,
        arguments=lambda dataset: {"features": dataset.features, "noise": "student"},
        data="diabetes",
    ),
    _of(
        _NUMBERS,
        name="poisson_regression",
        title="Poisson regression",
        make=PoissonRegression,
        data="linnerud",
        prepare={"standardise": True, "roles": Roles("count")},
    ),
    _of(
        _ANALYSIS,
        name="item_response",
        title="Rasch model of binary answers",
        make=RaschModel,
        arguments=lambda dataset: {"items": dataset.features},
        data="lsat",
    ),
    _of(
        _ANALYSIS,
        name="hidden_markov",
        title="Hidden Markov model of counts, two states",
        make=HiddenMarkovModel,
        data="earthquakes",
        prepare={"roles": _SERIES},
        source="its own importance sampling; published likelihood in the tests",
    ),
    _of(
        _ANALYSIS,
        name="garch",
        title="GARCH(1, 1) of returns",
        make=GARCH,
        data="returns",
        prepare={"roles": _SERIES},
    ),
    _of(
        _ANALYSIS,
        name="gaussian_process",
        title="Gaussian process regression, hyperparameters sampled",
        make=GaussianProcess,
        arguments=features,
        data="nile",
        prepare={"standardise": True, "roles": Roles("number", whole=True)},
    ),
    _of(
        _IMAGES,
        name="lda",
        title="Latent Dirichlet allocation, ten topics, amortized guide",
        make=LDA,
        arguments=lambda dataset: {"features": dataset.features, "topics": 10},
        also=("sms_spam", "news20_w100"),
        prepare={},
        methods={"SVI": by_minibatches(learning_rate=0.01, draws=50)},
        dtype=torch.float64,
        source="scikit-learn's perplexity in the tests",
        small={"topics": 3, "hidden": (8,)},
    ),
    Entry(
        name="bayesian_network",
        title="Bayesian network, Chow and Liu's tree, Dirichlet prior",
        make=BayesianNetwork.chow_liu,
        arguments=lambda dataset: {"x": dataset.train["x"], "names": dataset.features},
        data="wine",
        also=("breast_cancer", "digits", "xwindows", "news20_w100"),
        prepare={"binarise": True},
        methods={**_CONJUGATE, **_CHAINS},
        truth=_moments,
        source="conjugate posterior; queries by brute force",
    ),
    _of(
        _TABLES,
        name="gaussian_mixture",
        title="Gaussian mixture, three components, diagonal covariances",
        make=GaussianMixture,
        arguments=lambda dataset: {"features": dataset.features, "components": 3, "covariance": "diagonal"},
        methods={"EM": partial(em, steps=200), "SVI": partial(fit, steps=3000), **_CHAINS},
        source="EM is scikit-learn's, step by step; held-out predictions",
        data="iris",
        also=("wine", "breast_cancer"),
    ),
    Entry(
        name="bernoulli_mixture",
        title="Bernoulli mixture, twenty components, Beta prior",
        make=BernoulliMixture,
        arguments=lambda dataset: {"features": dataset.features, "components": 20},
        data="digits",
        also=("binarized_mnist", "mnist", "omniglot", "xwindows", "news20_w100"),
        prepare={"binarise": True},
        methods={"EM": partial(em, steps=100), "SVI": partial(fit, steps=3000, learning_rate=0.05)},
        source="held-out predictions; a published likelihood in the ledger",
        small={"components": 3},
    ),
    _of(
        _TABLES,
        name="factor_analysis",
        title="Factor analysis, two factors, exact guide",
        make=FactorAnalysis,
        arguments=lambda dataset: {"features": dataset.features, "factors": 2},
        methods={"SVI": partial(fit, steps=1500)},
        source="scikit-learn's likelihood; the ELBO is log p(x)",
    ),
    _of(
        _TABLES,
        name="ppca",
        title="Probabilistic PCA, two factors, exact guide",
        make=PPCA,
        arguments=lambda dataset: {"features": dataset.features, "factors": 2},
        methods={"SVI": partial(fit, steps=1500), "closed form": closed_form},
        source="its closed form; the ELBO is log p(x)",
    ),
    _of(
        _TABLES,
        name="autoencoder",
        title="Linear autoencoder, a code of two units, Delta guide",
        make=Autoencoder,
        arguments=lambda dataset: {"features": dataset.features, "factors": 2},
        methods={"SVI": partial(fit, steps=1500)},
        source="the subspace of PCA",
    ),
    _of(
        _TABLES,
        name="factorial_code",
        title="Factorial code by predictability minimization, four units",
        make=FactorialCode,
        arguments=lambda dataset: {"features": dataset.features, "units": 4},
        methods={"predictability": unpredictable(weight=1.0), "SVI": partial(fit, steps=1500)},
        source="mutual information of the units, in the tests",
        small={"hidden": (8,), "predictors": (4,)},
    ),
    _of(
        _AUTOREGRESSIVE,
        name="made",
        title="MADE, binary features one after another",
        make=MADE,
        small={"hidden": (20,)},
    ),
    _of(
        _AUTOREGRESSIVE,
        name="nade",
        title="NADE, one hidden layer shared by all features",
        make=NADE,
        arguments=lambda dataset: {"features": dataset.features, "hidden": sized(dataset, 100, 500)},
        small={"hidden": 8},
    ),
    _of(
        _AUTOREGRESSIVE,
        name="eonade",
        title="Order-agnostic NADE, any feature given any others",
        make=EoNADE,
        arguments=lambda dataset: {"features": dataset.features, "hidden": sized(dataset, 100, 500), "orders": 4},
        methods={"random orders": partial(denoising(), steps=8000)},
        small={"hidden": 8},
    ),
    _of(
        _AUTOREGRESSIVE,
        name="fvsbn",
        title="Fully visible sigmoid belief net",
        make=FVSBN,
    ),
    Entry(
        name="markov_chain",
        title="Markov chain over the letters of a text",
        make=MarkovChain,
        arguments=lambda dataset: {"length": dataset.features, "symbols": dataset.symbols},
        data="descriptions",
        also=("sms_text",),
        methods={"counts": counted, "maximum likelihood": partial(fit, steps=1000, learning_rate=0.1)},
        source="counts; brute force in the tests; held-out likelihood",
        dtype=torch.float32,
    ),
    _of(
        _IMAGES,
        name="sigmoid_belief_net",
        title="Sigmoid belief net, a free mean-field guide per row",
        make=SigmoidBeliefNet,
        arguments=lambda dataset: {"features": dataset.features, "layers": sized(dataset, (20,), (200,))},
        also=("binarized_mnist", "mnist", "omniglot"),
        methods={
            "VIMCO": by_minibatches(objective=partial(VIMCO, 10), learning_rate=0.02),
            "mean field": by_minibatches(learning_rate=0.02),
        },
        source="all states in the tests",
        small={"layers": (3, 2)},
    ),
    _of(
        _IMAGES,
        name="helmholtz_machine",
        title="Helmholtz machine, two layers of binary causes",
        make=HelmholtzMachine,
        arguments=lambda dataset: {"features": dataset.features, "layers": sized(dataset, (40, 20), (200, 200))},
        begin=_centred,
        also=("binarized_mnist", "mnist", "omniglot"),
        methods={
            "wake-sleep": by_minibatches(objective=WakeSleep, learning_rate=0.005),
            "RWS": by_minibatches(objective=partial(RWS, 10), learning_rate=0.005),
            "VIMCO": by_minibatches(objective=partial(VIMCO, 10), learning_rate=0.005),
        },
        source="held-out likelihood; all states in the tests; published ones in the ledger",
        small={"layers": (3, 2)},
    ),
    _of(
        _IMAGES,
        name="vae",
        title="Variational autoencoder, Bernoulli likelihood",
        make=VAE,
        arguments=lambda dataset: {"features": dataset.features, "factors": sized(dataset, 10, 50)},
        methods={"SVI": by_minibatches()},
        source="held-out likelihood; a published one in the ledger",
    ),
    _of(
        _IMAGES,
        name="hierarchical_vae",
        title="VAE with two stochastic layers",
        make=HierarchicalVAE,
        arguments=lambda dataset: {"features": dataset.features, "factors": sized(dataset, (20, 10), (100, 50))},
        methods={"SVI": by_minibatches()},
        small={"hidden": (8,), "between": (6,)},
    ),
    _of(
        _IMAGES,
        name="conditional_vae",
        title="VAE of images given their label",
        make=ConditionalVAE,
        arguments=lambda dataset: {**labelled(dataset), "factors": 10},
        methods={"SVI": by_minibatches()},
        **_LABELLED,
    ),
    _of(
        _IMAGES,
        name="semi_supervised_vae",
        title="Semi-supervised VAE (M2) of images, a hundred of them with a label",
        make=SemiSupervisedVAE,
        arguments=lambda dataset: {**labelled(dataset), "factors": sized(dataset, 10, 50)},
        methods={"SVI": by_minibatches()},
        report=accuracy,
        **_LABELLED,
        prepare={"binarise": True, "labels": 100},
        source="held-out accuracy; a published one in the ledger",
    ),
    _of(
        _GANS,
        name="gan",
        title="GAN, convolutional on images of 28 x 28",
        make=GAN,
        arguments=gan,
        methods={
            "R1": adversarial(r1=1.0),
            "GAN": adversarial(),
            "WGAN-GP": adversarial("wasserstein", penalty=1.0),
        },
        source="two-sample metrics; ring and grid in the ledger",
    ),
    _of(
        _GANS,
        name="conditional_gan",
        title="GAN of images given their label",
        make=ConditionalGAN,
        arguments=conditional_gan,
        **_LABELLED,
        source="two-sample metrics; digits as asked in the tests",
    ),
    _of(
        _GANS,
        name="infogan",
        title="InfoGAN: a GAN with a code of ten states that is read from the rows",
        make=InfoGAN,
        arguments=infogan,
        methods={"InfoGAN": _INFO},
        source="two-sample metrics; codes and digits in the ledger",
        small={"hidden": (8,), "generator": None, "trunk": None},
    ),
    _of(
        _GANS,
        name="bigan",
        title="GAN with an encoder (BiGAN)",
        make=BiGAN,
        arguments=bigan,
        source="two-sample metrics; the encoder inverts the generator in the tests",
    ),
    _of(
        _IMAGES,
        name="vaegan",
        title="VAE whose decoder also has to fool a discriminator",
        make=VAEGAN,
        arguments=vaegan,
        methods={"VAE-GAN": _WITH_BOUND, "SVI": by_minibatches()},
    ),
    _of(
        _IMAGES,
        name="adversarial_autoencoder",
        title="Autoencoder whose codes have to pass for draws of N(0, I)",
        make=AdversarialAutoencoder,
        arguments=lambda dataset: {"features": dataset.features, "factors": sized(dataset, 10, 50)},
        prepare={"unit": True},
        methods={"adversarial": _WITH_BOUND, "SVI": by_minibatches()},
        source="energy distance of the codes to the prior, in the tests",
    ),
    _of(
        _GANS,
        name="cyclegan",
        title="CycleGAN between two domains without pairs",
        make=CycleGAN,
        arguments=cyclegan,
        data="turned_digits",
        also=(),
        prepare={"unit": True},
        methods={"R1": adversarial(r1=0.1)},
        source="two-sample metrics; the error of the map in the ledger",
        small={"hidden": (8,)},
    ),
    _of(
        _IMAGES,
        name="diffusion",
        title="Diffusion chain of 100 steps, a small U-Net",
        make=DiffusionChain,
        arguments=chain,
        report=bits,
        also=("mnist", "fashion_mnist", "binarized_mnist", "omniglot"),
        prepare={"unit": True},
        methods={"hybrid": denoising(simple=True, bound=0.01), "bound": denoising(importance=True)},
        source="its exact case in the tests; ring and grid in the ledger",
        small={"steps": 2, "network": None, "hidden": (8,)},
    ),
)


ZOO: dict[str, Entry] = {entry.name: entry for entry in ENTRIES}


def find(name: str) -> Entry:
    """The entry of a name, or a ValueError with the nearest names."""
    if name not in ZOO:
        near = difflib.get_close_matches(str(name), ZOO, n=3, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(f"pair: unknown {name!r}; {hint}`ppl-models list` shows all {len(ZOO)}")
    return ZOO[name]


def table() -> str:
    """The zoo as a Markdown table."""
    lines = ["| pair | what | data | methods | compared with |", "| --- | --- | --- | --- | --- |"]
    for entry in ZOO.values():
        sets = ", ".join((f"**{entry.data}**", *entry.also))
        lines.append(f"| `{entry.name}` | {entry.title} | {sets} | {', '.join(entry.methods)} | {entry.source} |")
    return "\n".join(lines)


def listed() -> list[dict[str, Any]]:
    """What ``ppl-models list`` says of each pair: name, title, data sets and methods, the default ones first."""
    return [
        {"pair": e.name, "what": e.title, "data": [e.data, *e.also], "methods": list(e.methods)} for e in ZOO.values()
    ]
