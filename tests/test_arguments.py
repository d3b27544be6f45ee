"""Every public function and command answers a bad argument by one clear line, before any work.

A row of the table is a call, one of its arguments and values that it cannot take: the error names the argument first,
says what was expected and what came, and is one line.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from typer.testing import CliRunner

import inference
import ppl_models
from inference import kernels, objectives, two_sample
from ppl_models.cli import app

NAN, INF = math.nan, math.inf
COUNT = (0, -1, 1.5, "3", None, NAN, True)
"""No number of things, of which there is at least one."""
ANY_COUNT = (-1, 1.5, "3", None, NAN)
"""Neither zero nor a number of things."""
OPTIONAL = (0, -1, 1.5, "3", NAN)
"""None is a default."""
POSITIVE = (0.0, -1.0, NAN, INF, "0.1", None)
FROM_ZERO = (-1.0, NAN, INF, "0.1", None)
SEED = (-1, 1.5, "0", NAN)
NAMES = (0, -2, 1.5, None, [], ["a", "a"])
"""No features: neither a number of them nor names."""
SIZES = ([0], [-3], [1.5], ["8"], None, 8.5)
"""No widths of layers."""
CHANCE = (-0.1, 1.1, NAN, "0.5", None)
COMPILE = (None, "yes", 1, "fused")
DEVICE = ("gpu", "cuda:99", 3.5)
CHECKPOINT = ("", 3)
FEW = torch.tensor([0.5, -0.3, 1.2])


def model(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y), dim=-1):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fit(**arguments: Any) -> Any:
    return inference.fit(**{"pair": (model, AutoNormal(model)), "data": FEW, "steps": 2, "progress": False} | arguments)


GAPS = torch.tensor([[0.5, NAN], [-0.3, 1.0]])


ZEROS = torch.zeros(3, 2)


def binary() -> Any:
    """A Result of an autoregressive pair."""
    return inference.fit(ppl_models.FVSBN(2), ZEROS, steps=2, draws=2, progress=False)


def of_generator() -> Any:
    """A Result of a pair without a likelihood."""
    pair = ppl_models.GAN(2, hidden=(3,))
    return inference.fit(pair, ZEROS, steps=2, objective=objectives.Adversarial(), progress=False)


def local() -> Any:
    """A Result with a latent site per row."""
    pair = ppl_models.VAE(2, 1, hidden=(3,), likelihood="gaussian")
    return inference.fit(pair, torch.nan_to_num(GAPS), steps=2, draws=10, progress=False)


def sample(**arguments: Any) -> Any:
    return inference.sample(**{"pair": model, "data": FEW, "draws": 4, "warmup": 2, "progress": False} | arguments)


def compare(**arguments: Any) -> Any:
    given: dict[str, Any] = {"make_pair": lambda: (model, AutoNormal(model)), "data": FEW, "methods": {"SVI": quick}}
    return inference.compare(**given | arguments)


quick = partial(inference.fit, steps=2, draws=10, progress=False)
"""A method for comparisons."""


def evidence(**arguments: Any) -> Any:
    given: dict[str, Any] = {"pair": (model, AutoNormal(model)), "data": FEW, "k": 2, "progress": False}
    return inference.log_evidence(**given | arguments)


def annealed(**arguments: Any) -> Any:
    given = {"estimator": "annealed", "chains": 2, "temperatures": 2, "leapfrogs": 1}
    return evidence(**given | arguments)


def kernel(make: Any) -> Callable[..., Any]:
    """A run of a kernel with an argument."""
    return lambda **arguments: sample(kernel=partial(make, **arguments), chains=2)


def of_result(name: str, **given: Any) -> Callable[..., Any]:
    """A function or method of a Result, with valid arguments."""

    def call(**arguments: Any) -> Any:
        result = fit()
        function = getattr(inference, name, None)
        return (partial(function, result) if function else getattr(result, name))(**given | arguments)

    return call


def pair(name: str, **given: Any) -> Callable[..., Any]:
    """A pair of the zoo, with the arguments that it needs."""
    make = getattr(ppl_models, name)
    call = lambda **arguments: make(**given | arguments)  # noqa: E731
    call.__name__ = name
    return call


X, Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.randn(20, 2)


def distance(name: str, first: str = "x", second: str = "y", **given: Any) -> Callable[..., Any]:
    """A two-sample statistic of two samples."""
    return lambda **arguments: getattr(two_sample, name)(**{first: X, second: Y} | given | arguments)


SAMPLES = ([1, 2], None, torch.zeros(0, 2), torch.full((20, 2), NAN), torch.zeros(()))
"""No samples: rows of finite numbers."""

TABLE: dict[str, tuple[Callable[..., Any], dict[str, tuple[Any, ...]]]] = {
    "fit": (
        fit,
        {
            "steps": ANY_COUNT,
            "batch": (0, -1, 1.5, "3", 4, 2),
            "learning_rate": (0.0, -1.0, NAN, INF, "0.1"),
            "patience": (0, 1, -1, 1.5, "3"),
            "draws": COUNT,
            "seed": SEED,
            "compile": COMPILE,
            "device": DEVICE,
            "checkpoint": CHECKPOINT,
            "objective": (3, "ELBO", torch.optim.Adam),
            "optimizer": (3, "adam", torch.optim.Adam),
            "pair": (None, 3, "model", (model,), (model, 3), (model, model, model)),
            "data": (FEW[:0], {"x": FEW}, {1: FEW}, "rows"),
        },
    ),
    "sample": (
        sample,
        {
            "draws": (0, 3, -1, 1.5, "10"),
            "warmup": (-1, 1.5, "10", NAN),
            "chains": OPTIONAL,
            "seed": SEED,
            "compile": COMPILE,
            "device": DEVICE,
            "checkpoint": CHECKPOINT,
            "kernel": (3, "NUTS", kernels.NUTS(model)),
            "pair": (None, 3, "model", (model,)),
            "data": (FEW[:0], {"x": FEW}, "rows"),
        },
    ),
    "compare": (
        compare,
        {
            "make_pair": (None, 3, "pair"),
            "methods": ({}, None, [quick], {"SVI": 3}, {1: quick}),
            "seed": SEED,
            "device": DEVICE,
            "checkpoint": CHECKPOINT,
            "truth": (3, {"nu": (FEW, FEW)}, {"mu": FEW}),
        },
    ),
    "log_evidence": (
        evidence,
        {
            "estimator": ("variational", None, 3),
            "k": COUNT,
            "batch": OPTIONAL,
            "seed": SEED,
            "pair": (None, 3, model),
            "data": (FEW[:0], {"x": FEW}),
        },
    ),
    "log_evidence, annealed": (
        annealed,
        {
            "chains": COUNT,
            "temperatures": COUNT,
            "leapfrogs": COUNT,
            "step_size": POSITIVE,
            "start": ("posterior", None),
            "latents": (3, [FEW]),
        },
    ),
    "log_weights": (of_result("log_weights"), {"draws": COUNT, "seed": SEED}),
    "latent_kl": (of_result("latent_kl"), {"seed": SEED}),
    "posterior_predictive": (of_result("posterior_predictive"), {"size": OPTIONAL, "seed": SEED}),
    "pointwise_log_likelihood": (of_result("pointwise_log_likelihood"), {"data": ({"x": FEW}, FEW[:0])}),
    "classify": (of_result("classify", data=FEW), {"label": ("z", "mu", None)}),
    "impute": (
        lambda **arguments: inference.impute(**{"result": local(), "data": GAPS} | arguments),
        {
            "data": ({"y": FEW}, {}, "rows"),
            "draws": COUNT,
            "steps": (1, *COUNT),
            "name": ("z", 3),
            "seed": SEED,
            "result": (fit(),),
        },
    ),
    "compress": (
        lambda **arguments: inference.compress(**{"result": binary(), "data": ZEROS} | arguments),
        {"data": ({"y": ZEROS}, {}, "rows", ZEROS[:0]), "result": (fit(), of_generator())},
    ),
    "decompress": (
        lambda **arguments: inference.decompress(**{"result": binary(), "code": b""} | arguments),
        {"code": (b"", b"ppl1", b"x" * 16, 3, None, "code")},
    ),
    "denoise": (
        lambda **arguments: inference.denoise(**{"result": local(), "data": X[:, :2], "sd": 0.5} | arguments),
        {
            "data": ({"y": X}, {}, "rows", X[:0], X * NAN, X[0]),
            "sd": (*POSITIVE[:-1], None),
            "draws": (1, *COUNT),
            "steps": (1, *COUNT),
            "seed": SEED,
            "result": (of_generator(),),
        },
    ),
    "denoise, binary": (
        lambda **arguments: inference.denoise(**{"result": binary(), "data": ZEROS} | arguments),
        {"flips": (0.0, 1.0, *CHANCE[:-1])},
    ),
    "denoise, grey": (
        lambda **arguments: inference.denoise(**{"result": binary(), "flips": 0.1} | arguments),
        {"data": (ZEROS + 0.5,)},
    ),
    "super_resolve": (
        lambda **arguments: inference.super_resolve(
            **{"result": local(), "data": X[:, :1], "matrix": torch.ones(1, 2)} | arguments
        ),
        {
            "data": ({"y": X}, {}, "rows", X),
            "matrix": (None, 3, torch.ones(2), torch.ones(1, 3), torch.ones(1, 2) * NAN),
            "sd": POSITIVE,
        },
    ),
    "outlier_score": (
        of_result("outlier_score", data=FEW, rate=0.5),
        {"data": ({"x": FEW}, FEW[:0]), "rate": (*CHANCE, 0.0, 0.1), "k": COUNT, "seed": SEED},
    ),
    "draw": (of_result("draw"), {"size": COUNT, "seed": SEED}),
    "extend": (of_result("extend"), {"draws": COUNT}),
    "open_draws": (inference.open_draws, {"folder": (None, 3, "", " ")}),
    "prior_predictive": (
        lambda **arguments: inference.prior_predictive(**{"pair": model, "data": FEW, "draws": 3} | arguments),
        {"draws": COUNT, "size": OPTIONAL, "seed": SEED, "pair": (None, 3)},
    ),
    "pareto_k": (inference.pareto_k, {"log_weights": (FEW[:0], FEW * NAN, torch.zeros(3, 3), None)}),
    "Checkpoint": (
        lambda **arguments: inference.Checkpoint(**{"folder": "runs/a"} | arguments),
        {"folder": ("", 3, None), "every": (-1.0, NAN, INF, "10", None)},
    ),
    "Joint": (
        inference.Joint,
        {"optimizer": (3, "adam", dict), "clip_norm": (0.0, -1.0, NAN, "1"), "clip_value": (0.0, -1.0, NAN, "1")},
    ),
    "IWAE": (objectives.IWAE, {"particles": COUNT}),
    "RWS": (objectives.RWS, {"particles": COUNT, "insomnia": CHANCE}),
    "VIMCO": (objectives.VIMCO, {"particles": (*COUNT, 1)}),
    "BetaELBO": (objectives.BetaELBO, {"beta": FROM_ZERO, "free_bits": FROM_ZERO, "warmup": ANY_COUNT}),
    "Adversarial": (
        objectives.Adversarial,
        {
            "kind": ("wgan", None, 3),
            "penalty": FROM_ZERO,
            "r1": FROM_ZERO,
            "information_weight": FROM_ZERO,
            "weight": FROM_ZERO,
            "bound": (3, "ELBO"),
            "turns": ((0, 1), (1,), 3, (1, 1.5)),
        },
    ),
    "Denoising": (
        lambda **arguments: objectives.Denoising(**{"steps": 10} | arguments),
        {"steps": COUNT, "bound": (-1.0, NAN, INF, "0.1")},
    ),
    "Predictability": (
        lambda **arguments: objectives.Predictability(**{"bound": objectives.Trace_ELBO()} | arguments),
        {"bound": (3, "ELBO", None), "weight": FROM_ZERO, "turns": ((0, 1), (1,), 3)},
    ),
    "Compiled": (objectives.Compiled, {"objective": (3, None, "ELBO")}),
    "ChEES": (
        kernel(kernels.ChEES),
        {
            "max_steps": COUNT,
            "trajectory_length": POSITIVE,
            "step_size": POSITIVE[:-1],
            "target_accept_prob": (0.0, 1.0, -1.0, NAN, "0.8"),
        },
    ),
    "NUTS": (
        kernel(kernels.NUTS),
        {"max_tree_depth": COUNT, "step_size": POSITIVE[:-1], "target_accept_prob": (0.0, 1.0, -1.0, NAN, "0.8")},
    ),
    "Gibbs": (partial(kernels.Gibbs, model), {"num_chains": COUNT}),
    "load": (
        lambda **arguments: ppl_models.load(**{"name": "iris"} | arguments),
        {
            "name": ("irises", "", None, 3),
            "labels": (0, -1, 1.5, "3", 10_000),
            "device": DEVICE,
            "dtype": (torch.long, "float32"),
        },
    ),
    "simulate_modes": (
        lambda **arguments: ppl_models.simulate_modes(**{"name": "ring", "rows": 3} | arguments),
        {"name": ("circle", None), "rows": COUNT, "seed": SEED},
    ),
    "simulate_naive_bayes": (
        lambda **arguments: ppl_models.simulate_naive_bayes(**{"rows": 3} | arguments),
        {"rows": COUNT, "features": COUNT, "classes": COUNT, "seed": SEED, "dtype": (torch.long, "float32")},
    ),
    "find": (lambda pair: ppl_models.find(pair), {"pair": ("", "naive bayes", None)}),
    "classifier_test": (distance("classifier_test"), {"x": SAMPLES, "y": SAMPLES, "folds": (1, *COUNT), "seed": SEED}),
    "energy_distance": (distance("energy_distance"), {"x": SAMPLES, "y": SAMPLES}),
    "mmd": (distance("mmd"), {"x": SAMPLES, "y": SAMPLES, "bandwidths": ((), (0.0,), (NAN,), (-1.0,), 3.0)}),
    "coverage": (distance("coverage", "real", "generated"), {"real": SAMPLES, "generated": SAMPLES, "k": (*COUNT, 20)}),
    "precision": (
        distance("precision", "real", "generated"),
        {"real": SAMPLES, "generated": SAMPLES, "k": (*COUNT, 20)},
    ),
    "recall": (distance("recall", "real", "generated"), {"real": SAMPLES, "generated": SAMPLES, "k": (*COUNT, 20)}),
    "modes": (
        distance("modes", "x", "centres", sd=0.1),
        {"x": SAMPLES, "centres": SAMPLES, "sd": POSITIVE, "within": POSITIVE},
    ),
}

PAIRS: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "GaussianNaiveBayes": (
        {"features": 2},
        {
            "features": NAMES,
            "classes": NAMES,
            "mean": (NAN, INF, "0", None),
            "strength": POSITIVE,
            "shape": POSITIVE,
            "scale": POSITIVE,
        },
    ),
    "BernoulliNaiveBayes": ({"features": 2}, {"features": NAMES, "classes": NAMES, "alpha": FROM_ZERO}),
    "MultinomialNaiveBayes": ({"features": 2}, {"features": NAMES, "alpha": FROM_ZERO, "length": COUNT}),
    "LogisticRegression": (
        {"features": 2},
        {
            "features": NAMES,
            "classes": (1, *NAMES),
            "scale": POSITIVE,
            "intercept_scale": POSITIVE,
            "guide": (3, "AutoNormal"),
        },
    ),
    "NeuralClassifier": (
        {"features": 2},
        {"features": NAMES, "classes": (1, *NAMES), "hidden": COUNT, "scale": POSITIVE},
    ),
    "BayesianNetwork": (
        {"parents": {"a": (), "b": ("a",)}},
        {
            "parents": ({}, None, 3, {"a": ("a",)}, {"a": ("b",), "b": ("a",)}, {"a": ("c",)}),
            "states": (1, 0, 1.5, None, {"a": 2}),
            "tables": ({"a": torch.tensor([0.5, 0.6])}, {"c": torch.tensor([0.5, 0.5])}, {"a": torch.ones(3) / 3}, 3),
            "concentration": POSITIVE,
        },
    ),
    "GaussianMixture": (
        {"features": 2, "components": 2},
        {
            "features": NAMES,
            "components": COUNT,
            "covariance": ("round", None),
            "mean_sd": POSITIVE,
            "scale": POSITIVE,
            "log_scale_sd": POSITIVE,
            "correlation": POSITIVE,
            "floor": FROM_ZERO,
        },
    ),
    "BernoulliMixture": (
        {"features": 2, "components": 2},
        {"features": NAMES, "components": COUNT, "alpha": FROM_ZERO},
    ),
    "FactorAnalysis": ({"features": 3, "factors": 1}, {"features": NAMES, "factors": NAMES}),
    "PPCA": ({"features": 3, "factors": 1}, {"features": NAMES, "factors": (*NAMES, 4)}),
    "Autoencoder": ({"features": 3, "factors": 1}, {"features": NAMES, "factors": NAMES}),
    "FactorialCode": (
        {"features": 3, "units": 2},
        {"features": NAMES, "units": NAMES, "hidden": SIZES, "predictors": SIZES},
    ),
    "MADE": ({"features": 3}, {"features": NAMES, "hidden": SIZES, "orders": COUNT, "seed": SEED}),
    "NADE": ({"features": 3}, {"features": NAMES, "hidden": COUNT}),
    "FVSBN": ({"features": 3}, {"features": NAMES}),
    "MarkovChain": ({"length": 3, "symbols": 2}, {"length": NAMES, "symbols": NAMES}),
    "SigmoidBeliefNet": ({"features": 3}, {"features": NAMES, "layers": ([], *SIZES)}),
    "HelmholtzMachine": ({"features": 3}, {"features": NAMES, "layers": ([], *SIZES), "baseline": ANY_COUNT}),
    "VAE": (
        {"features": 3, "factors": 2},
        {"features": NAMES, "factors": NAMES, "hidden": SIZES, "likelihood": ("poisson", None), "encoder": (3, "mlp")},
    ),
    "HierarchicalVAE": ({"features": 3}, {"features": NAMES, "factors": ([], [3], *SIZES), "between": SIZES}),
    "ConditionalVAE": (
        {"features": 3, "factors": 2, "classes": 2},
        {"features": NAMES, "factors": NAMES, "classes": NAMES},
    ),
    "SemiSupervisedVAE": (
        {"features": 3, "factors": 2, "classes": 2},
        {"features": NAMES, "factors": NAMES, "classes": (1, *NAMES), "hidden": SIZES, "auxiliary": FROM_ZERO},
    ),
    "GAN": (
        {"features": 3},
        {"features": NAMES, "noise": COUNT, "hidden": SIZES, "pack": COUNT, "generator": (3, "mlp")},
    ),
    "ConditionalGAN": ({"features": 3, "classes": 2}, {"features": NAMES, "classes": NAMES, "noise": COUNT}),
    "InfoGAN": ({"features": 3}, {"features": NAMES, "codes": (1, *COUNT), "noise": COUNT, "hidden": SIZES}),
    "BiGAN": ({"features": 3}, {"features": NAMES, "noise": COUNT, "hidden": SIZES}),
    "VAEGAN": ({"features": 3, "factors": 2}, {"features": NAMES, "factors": NAMES, "hidden": SIZES, "pack": COUNT}),
    "AdversarialAutoencoder": ({"features": 3, "factors": 2}, {"features": NAMES, "factors": NAMES, "hidden": SIZES}),
    "CycleGAN": ({"features": (2, 2)}, {"features": ((2,), 2, (0, 2), None), "scale": POSITIVE, "hidden": SIZES}),
    "DiffusionChain": (
        {"features": 3},
        {
            "features": NAMES,
            "steps": (1, *COUNT),
            "schedule": ("quadratic", None, torch.tensor([0.5, 1.5])),
            "prediction": ("image", None),
            "variance": ("large", None),
            "likelihood": ("poisson", None),
            "levels": (1, *COUNT),
            "classes": (0, -1, 1.5, ["a", "a"]),
            "drop": CHANCE,
            "hidden": SIZES,
        },
    ),
}

CASES = [
    *((name, call, argument, values) for name, (call, table) in TABLE.items() for argument, values in table.items()),
    *(
        (name, pair(name, **given), argument, values)
        for name, (given, table) in PAIRS.items()
        for argument, values in table.items()
    ),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir()), "something was written"


def answer(call: Callable[..., Any], argument: str, value: Any) -> str:
    """The error of a call with a bad argument; empty if there is none."""
    try:
        call(**{argument: value})
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def shown(value: Any) -> str:
    return " ".join(repr(value).split())[:40]


@pytest.mark.parametrize(("name", "call", "argument", "values"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_a_bad_argument_is_named(name: str, call: Callable[..., Any], argument: str, values: tuple[Any, ...]) -> None:
    wrong = []
    for value in values:
        said = answer(call, argument, value)
        named = said.startswith(("data: ", "y: ") if argument == "data" else f"{argument}: ")
        if not (named and re.search("expected .*, got |unknown ", said) and "\n" not in said and len(said) < 600):
            wrong.append(f"{shown(value)}: {said or 'taken'}")
    assert not wrong, "\n".join(wrong)


NO_COUNT = ("0", "-1", "1.5", "many", "nan")
NO_SEED = ("-1", "1.5", "one", str(2**32))
NO_PAIR = ("", "naive bayes", "VAEs")
OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "fit": (
        ("fit", "ppca"),
        {
            "--steps": NO_COUNT,
            "--batch": NO_COUNT,
            "--learning-rate": ("0", "-1", "nan", "inf", "fast"),
            "--draws": (*NO_COUNT, "3"),
            "--seed": NO_SEED,
            "--method": ("", "variational", "ChEES"),
            "--data": ("", "irises", "nowhere.csv"),
            "--device": ("gpu", "cuda:99"),
            "--out": ("", " ", "/proc/1/results"),
            "--from": ("nowhere", "."),
            "--step": ("3",),
        },
    ),
    "sample": (
        ("sample", "naive_bayes", "--data", "iris"),
        {
            "--draws": (*NO_COUNT, "3"),
            "--warmup": ("-1", "1.5", "many"),
            "--chains": NO_COUNT,
            "--kernel": ("", "Metropolis"),
            "--seed": NO_SEED,
            "--device": ("gpu",),
            "--out": ("", "/proc/1/results"),
            "--from": ("nowhere", "."),
        },
    ),
    "compare": (
        ("compare", "naive_bayes", "--data", "iris"),
        {
            "--methods": ("", "variational", "exact,", "exact,variational"),
            "--seed": NO_SEED,
            "--device": ("gpu",),
            "--out": ("", "/proc/1/results"),
        },
    ),
    "reproduce": (
        ("reproduce", "gan_ring"),
        {
            "--seeds": NO_COUNT,
            "--seed": NO_SEED[:-1],
            "--jobs": NO_COUNT,
            "--device": ("gpu",),
            "--out": ("", "/proc/1/results"),
        },
    ),
    "predict": (("predict", "."), {"--data": ("", "nowhere.csv", "/proc/1/mem")}),
}
COMMANDS = [
    *(
        ([*begun, option], value)
        for begun, table in OPTIONS.values()
        for option, values in table.items()
        for value in values
    ),
    *(([command], value) for command in ("fit", "sample", "compare", "reproduce", "show") for value in NO_PAIR),
    (["show"], "nowhere"),
    (["predict", "nowhere", "--data"], "rows.csv"),
    (["fit", "ppca", "naive_bayes", "--steps"], "3"),
    (["guess"], "ppca"),
    (["fit", "--from"], "nowhere"),
]


@pytest.mark.parametrize(("begun", "value"), COMMANDS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_bad_option_gets_one_line_and_a_true_exit_code(begun: list[str], value: str) -> None:
    answered = CliRunner().invoke(app, [*begun, value])
    assert answered.exit_code in (1, 2), answered.output
    assert answered.exception is None or isinstance(answered.exception, SystemExit)
    assert not answered.stdout
    lines = answered.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), answered.stderr


def test_there_are_many() -> None:
    assert sum(len(values) for *_, values in CASES) + len(COMMANDS) >= 1000
