"""A model zoo on Pyro: every model is a pair of a model and a guide.

The names of this package, which are read when they are first asked for:

- pairs: ``GaussianNaiveBayes``, ``VAE``, ``GAN``, ``DiffusionChain`` and all others of :data:`ZOO`;
- :data:`ZOO`, ``find``: each pair with its data sets, its methods and its truth;
- ``load``: real data by name;
- ``Pair``: the base class for a pair of your own.
"""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_INFERENCE = Path(__file__).parent.parent / "inference"
_spec = find_spec("inference")
if _spec is not None and Path(_spec.origin or "").parent != _INFERENCE:
    raise ImportError(f"inference: expected the package in {_INFERENCE}, got {_spec.origin}; rename the latter")

_HOMES = {
    "ppl_models.data": ("Dataset", "load", "simulate_modes", "simulate_naive_bayes", "simulate_returns"),
    "ppl_models.ledger": ("RECIPES", "reproduce"),
    "ppl_models.models.any_order": ("EoNADE",),
    "ppl_models.models.autoregressive": ("FVSBN", "MADE", "NADE"),
    "ppl_models.models.bayesian_network": ("BayesianNetwork",),
    "ppl_models.models.cyclegan": ("CycleGAN",),
    "ppl_models.models.diffusion.chain": ("DiffusionChain",),
    "ppl_models.models.factorial_code": ("FactorialCode",),
    "ppl_models.models.gan": ("GAN", "BiGAN", "ConditionalGAN", "InfoGAN"),
    "ppl_models.models.gaussian_process": ("GaussianProcess",),
    "ppl_models.models.hierarchical": ("HierarchicalRegression", "NormalMeans"),
    "ppl_models.models.item_response": ("RaschModel",),
    "ppl_models.models.linear_factors": ("PPCA", "Autoencoder", "FactorAnalysis"),
    "ppl_models.models.linear_models": ("LinearRegression", "PoissonRegression"),
    "ppl_models.models.markov_chain": ("MarkovChain",),
    "ppl_models.models.mixture": ("BernoulliMixture", "GaussianMixture"),
    "ppl_models.models.naive_bayes": ("BernoulliNaiveBayes", "GaussianNaiveBayes", "MultinomialNaiveBayes"),
    "ppl_models.models.pair": ("Pair",),
    "ppl_models.models.regression": ("LogisticRegression", "NeuralClassifier"),
    "ppl_models.models.sigmoid_belief": ("HelmholtzMachine", "SigmoidBeliefNet"),
    "ppl_models.models.time_series": ("GARCH", "HiddenMarkovModel"),
    "ppl_models.models.topics": ("LDA",),
    "ppl_models.models.vae": ("VAE", "ConditionalVAE", "HierarchicalVAE", "SemiSupervisedVAE"),
    "ppl_models.models.vaegan": ("VAEGAN", "AdversarialAutoencoder"),
    "ppl_models.zoo": ("ZOO", "Entry", "find"),
    "ppl_models.zoo.restore": ("restore",),
}
"""Where each public name is defined."""
_MODULES = {
    "flow": "ppl_models.models.diffusion.flow",
    "inverse": "ppl_models.models.diffusion.inverse",
    "methods": "ppl_models.zoo.methods",
    "pictures": "ppl_models.zoo.pictures",
}
"""Modules under a shorter name."""
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("ppl-models")
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name not in _HOME:
        raise AttributeError(f"module 'ppl_models' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
