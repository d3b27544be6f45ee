r"""Pairs as estimators of scikit-learn: ``PairClassifier``, ``PairDensity`` and ``PairTransformer``.

Each takes the name of an entry of the zoo, or a class of pairs, and runs the entry's own method with its own settings.
They do not change the rows: put ``StandardScaler`` or ``Binarizer`` before them in a pipeline, as the priors of the
pairs suit such data. ``result_`` is the Result of the fit, with its diagnosis, its draws and ``idata``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import cloudpickle
import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, DensityMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from inference import (
    Method,
    Result,
    classify,
    exclusive,
    fit,
    isolated,
    log_evidence,
    pointwise_log_likelihood,
    posterior_predictive,
)
from ppl_models.data.sets import Dataset
from ppl_models.models.pair import Pair
from ppl_models.zoo.entries import ZOO
from ppl_models.zoo.entry import Entry, features, labelled
from ppl_models.zoo.methods import settings as settings_of


class _PairEstimator(BaseEstimator):
    """What the estimators share: a pair that is made for the rows, and fitted by a method."""

    entries: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        entry: str | Entry | Callable[..., Pair] | None = None,
        method: str | Method | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        steps: int | None = None,
        draws: int | None = None,
        random_state: Any = 0,
    ) -> None:
        self.entry = entry
        self.method = method
        self.settings = settings
        self.steps = steps
        self.draws = draws
        self.random_state = random_state

    def _fit(self, rows: np.ndarray, codes: np.ndarray | None = None) -> Self:
        """Make a pair for the rows, and for the codes of their labels if there are any, and fit it."""
        entry = self._entry()
        method, options = self._method(entry, len(rows))
        names = getattr(self, "feature_names_in_", [f"x{k}" for k in range(rows.shape[1])])
        data = {"x": torch.tensor(rows, dtype=entry.dtype)}
        if codes is not None:
            data["y"] = torch.as_tensor(codes, dtype=torch.int64)
        classes = tuple(map(str, getattr(self, "classes_", ())))
        seed = _seed(self.random_state)
        dataset = Dataset("rows", data, {}, tuple(map(str, names)), classes)
        self.pair_ = self._made(entry, dataset, seed)
        self.result_: Result = method(self.pair_, data, seed=seed, progress=False, **options)
        return self

    @exclusive
    def _made(self, entry: Entry, dataset: Dataset, seed: int) -> Any:
        """A pair, which may draw the initial values of its parameters."""
        with isolated(seed):
            return entry.pair(dataset, **(self.settings or {}))

    def _entry(self) -> Entry:
        """The entry by its name, or of its class; an entry with the defaults of ``fit`` for another class."""
        make = self.entries[0] if self.entry is None else self.entry
        if isinstance(make, Entry):
            return make
        if isinstance(make, str) and make in self.entries:
            return ZOO[make]
        if not callable(make):
            raise ValueError(f"entry: expected one of {', '.join(self.entries)}, or a class of pairs, got {make!r}")
        takes = inspect.signature(make).parameters
        own = Entry(
            name=getattr(make, "__name__", type(make).__name__),
            title="",
            make=make,
            data="",
            methods={"SVI": fit},
            source="",
            arguments=lambda dataset: {n: v for n, v in self._named(dataset).items() if n in takes},
            dtype=torch.get_default_dtype(),
        )
        return next((e for e in ZOO.values() if e.make is make), own)

    def _named(self, dataset: Dataset) -> Mapping[str, Any]:
        """Arguments of a class of pairs that depend on the data."""
        return features(dataset)

    def _method(self, entry: Entry, rows: int) -> tuple[Method, dict[str, Any]]:
        """The method, and those of its settings that are given; its minibatches have no more than so many rows."""
        method = entry.fit if self.method is None else self.method
        if isinstance(method, str) and method in entry.methods:
            method = entry.methods[method]
        if not callable(method):
            known = ", ".join(entry.methods)
            raise ValueError(
                f"method: expected one of {known}, or a function such as partial(fit, ...), got {method!r}"
            )
        options = {n: v for n in ("steps", "draws") if (v := getattr(self, n)) is not None}
        for name in options.keys() - settings_of(method):
            raise ValueError(f"{name}: expected None, for the method has no such setting, got {options[name]!r}")
        if (getattr(method, "keywords", {}).get("batch") or 0) > rows:
            options["batch"] = rows
        return method, options

    def _rows(self, x: Any) -> dict[str, Tensor]:
        """New rows as data of the fitted pair."""
        check_is_fitted(self)
        rows = validate_data(self, x, dtype=np.float64, reset=False)
        return {"x": torch.tensor(rows, dtype=self.result_.bound.data["x"].dtype)}

    def __getstate__(self) -> dict[str, Any]:
        # The halves of a pair are wrapped, which pickle alone does not take.
        return {"cloudpickle": cloudpickle.dumps(super().__getstate__())}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        super().__setstate__(cloudpickle.loads(state["cloudpickle"]))


class PairClassifier(ClassifierMixin, _PairEstimator):
    r"""A pair with labels as a classifier. Its probabilities are averaged over the posterior.

    .. math:: p(y \mid x, D) \propto \mathrm{E}_{\theta \mid D}[p(x, y \mid \theta)]

    Args:
        entry: Name of an entry of the zoo (:attr:`entries`), an Entry, or a class of pairs, which is made with
            ``features`` and ``classes``, the names of both. Its model takes x and y. Default: ``naive_bayes``.
        method: Name of one of the entry's methods, or a function from a pair and its data to a Result, such as
            ``partial(fit, batch=100)``. Default: the entry's first one that is no chain.
        settings: Arguments of the pair that replace the entry's own, such as ``{"hidden": 20}``.
        steps: Number of steps. Default: the method's own.
        draws: Number of posterior draws to average over. Default: the method's own.
        random_state: An integer is the seed of the method; a RandomState, or None for NumPy's global one, gives one.

    Attributes:
        classes_: The labels, sorted.
        n_features_in_: Number of features.
        feature_names_in_: Their names, if the rows were a DataFrame.
        pair_: The fitted pair.
        result_: The Result of the fit.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> print(f"{PairClassifier('naive_bayes').fit(x, y).score(x, y):.2f}")
        0.96
    """

    entries = (
        "naive_bayes",
        "bernoulli_naive_bayes",
        "multinomial_naive_bayes",
        "logistic_regression",
        "neural_classifier",
    )

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the pair to rows (N, D) and labels (N,) of any type."""
        rows, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got 1 class ({self.classes_[0]})")
        return self._fit(rows, codes)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (N, K) of the classes of rows (N, D), in the order of ``classes_``."""
        rows = self._rows(X)
        return _numpy(classify(self.result_, rows))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable label (N,) of each row (N, D)."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(-1)]

    def _named(self, dataset: Dataset) -> Mapping[str, Any]:
        return labelled(dataset)


class PairDensity(DensityMixin, _PairEstimator):
    r"""A pair of rows as a density.

    ``score_samples`` is log p(x | D). Parameters with a posterior are averaged over it, :math:`\log \mathrm{E}_{\theta
    \mid D}[p(x \mid \theta)]`; latent variables of a row are integrated out, exactly where the pair can, and otherwise
    (a VAE) by importance sampling, which gives a lower bound in expectation.

    Args:
        entry: Name of an entry of the zoo (:attr:`entries`), an Entry, or a class of pairs, which is made with
            ``features``, the names of the columns. Its model takes x alone. Default: ``gaussian_mixture``.
        particles: Number of particles per row of importance sampling.

    The other arguments and attributes are those of :class:`PairClassifier`, apart from ``classes_``.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.preprocessing import scale
        >>> x = scale(load_iris().data)
        >>> mixture = PairDensity("gaussian_mixture", settings={"components": 2, "covariance": "full"}).fit(x)
        >>> print(f"{mixture.score(x):.1f}", mixture.sample(5).shape)
        -2.2 (5, 4)
    """

    entries = (
        "gaussian_mixture",
        "bernoulli_mixture",
        "factor_analysis",
        "ppca",
        "made",
        "nade",
        "fvsbn",
        "vae",
        "hierarchical_vae",
    )

    def __init__(
        self,
        entry: str | Entry | Callable[..., Pair] | None = None,
        method: str | Method | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        steps: int | None = None,
        draws: int | None = None,
        particles: int = 1000,
        random_state: Any = 0,
    ) -> None:
        super().__init__(entry, method, settings=settings, steps=steps, draws=draws, random_state=random_state)
        self.particles = particles

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the pair to rows (N, D); y is not used."""
        return self._fit(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))

    def score_samples(self, X: Any) -> np.ndarray:
        """Log density (N,) of each row (N, D), in nats; of binary rows their log probability."""
        rows, result = self._rows(X), self.result_
        if self._parameters():
            density = pointwise_log_likelihood(result, rows)
            return _numpy(density.logsumexp(0) - math.log(len(density)))
        known = not result.draws or hasattr(self.pair_, "log_evidence")
        estimator = "exact" if known else "importance"
        return _numpy(log_evidence(result, rows, estimator, k=self.particles, progress=False).values)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log density of rows (N, D), in nats per row; y is not used."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> np.ndarray:
        """Draw rows (n_samples, D) from the posterior predictive distribution.

        Rows alone, as of ``KernelDensity``: most pairs have no component to return beside them.

        Args:
            n_samples: Number of rows.
            random_state: As of the estimator. Default: the estimator's own.
        """
        check_is_fitted(self)
        if not isinstance(n_samples, int | np.integer) or n_samples < 1:
            raise ValueError(f"n_samples: expected an integer of at least 1, got {n_samples!r}")
        seed = _seed(self.random_state if random_state is None else random_state)
        # Each row has its own draw of the parameters, or few rows share one.
        parameters, random = self._parameters(), np.random.default_rng(seed)
        count = min(n_samples, self.result_.size) if parameters else 1
        chosen = random.permutation(self.result_.size)[:count]
        drawn = replace(self.result_, draws={n: v[chosen] for n, v in parameters.items()})
        rows = posterior_predictive(drawn, {}, size=math.ceil(n_samples / count), seed=seed)["x"]
        return _numpy(rows.transpose(0, 1).flatten(0, 1)[:n_samples])

    def _parameters(self) -> dict[str, Tensor]:
        """The posterior draws of what all rows share."""
        sites = self.result_.bound.sites
        return {n: v for n, v in self.result_.draws.items() if "rows" not in sites[n].plates}


def _decodes(estimator: PairTransformer) -> bool:
    return not hasattr(estimator, "pair_") or hasattr(estimator.pair_, "posterior")


class PairTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _PairEstimator):
    """A pair with latent variables of each row as a transformer.

    ``transform`` gives the posterior mean of the factors of each row; of a mixture the probabilities of its components.

    Args:
        entry: Name of an entry of the zoo (:attr:`entries`), an Entry, or a class of pairs, which is made with
            ``features``, the names of the columns. The pair has ``posterior``, or is a mixture. Default: ``ppca``.

    The other arguments and attributes are those of :class:`PairClassifier`, apart from ``classes_``.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.preprocessing import scale
        >>> x = scale(load_iris().data)
        >>> ppca = PairTransformer("ppca", "closed form").fit(x)
        >>> ppca.transform(x).shape, ppca.inverse_transform(ppca.transform(x)).shape
        ((150, 2), (150, 4))
    """

    entries = (
        "ppca",
        "factor_analysis",
        "autoencoder",
        "factorial_code",
        "vae",
        "hierarchical_vae",
        "adversarial_autoencoder",
        "gaussian_mixture",
        "bernoulli_mixture",
    )

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the pair to rows (N, D); y is not used."""
        self._fit(validate_data(self, X, dtype=np.float64, ensure_min_samples=2))
        self._n_features_out = self._latents({"x": self.result_.bound.data["x"][:1]}).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Posterior means (N, L) of the factors of rows (N, D), or probabilities (N, K) of the components."""
        return self._latents(self._rows(X))

    def _latents(self, rows: dict[str, Tensor]) -> np.ndarray:
        if hasattr(self.pair_, "posterior"):
            return _numpy(_encoded(self.result_, self.pair_, rows["x"]))
        return _numpy(classify(self.result_, rows, label="z"))

    @available_if(_decodes)
    def inverse_transform(self, X: Any) -> np.ndarray:
        """Means (N, D) of the rows given their factors (N, L). Mixtures have none."""
        check_is_fitted(self)
        factors = check_array(X, dtype=np.float64, input_name="X")
        dtype = self.result_.bound.data["x"].dtype
        return _numpy(_decoded(self.result_, self.pair_, torch.tensor(factors, dtype=dtype)))


@exclusive
def _encoded(result: Result, pair: Any, x: Tensor) -> Tensor:
    with result.state():
        return pair.encode(x) if hasattr(pair, "encode") else pair.posterior(x).mean


@exclusive
def _decoded(result: Result, pair: Any, z: Tensor) -> Tensor:
    with result.state():
        return pair.decode(z) if hasattr(pair, "decode") else pair.likelihood(z).mean


def _seed(random_state: Any) -> int:
    """The seed that an integer is, or that a random state of NumPy gives."""
    if isinstance(random_state, int | np.integer):
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
