r"""Several methods on one pair: a table, a plot, and files that ArviZ reads."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from inference import two_sample
from inference.diagnostics import R_HAT, quantity
from inference.likelihood import log_likelihood
from inference.predict import draw_sites, pointwise_log_likelihood
from inference.program import bind, isolated
from inference.queries import classify
from inference.result import Result

Method = Callable[[Any, Any], Result]
Moments = Mapping[str, tuple[Tensor, Tensor]]

PARTICLES = 500
"""Particles of the guide with which a held-out row is scored whose latent sites are its own."""
COLUMNS = {
    "lpd": "log predictive density of a held-out row",
    "lpd_se": "its standard error over rows",
    "accuracy": "share of held-out labels that are right",
    "ece": "expected calibration error of the labels, 10 bins",
    "error_max": "largest error of a posterior mean, in posterior standard deviations",
    "error_rms": "root mean square of those errors",
    "sd_ratio": "geometric mean of standard deviation over the true one",
    "ess": "smallest bulk effective sample size",
    "ess_per_s": "the same a second of running; none where R-hat is above 1.01",
    "r_hat": "largest R-hat",
    "divergences": "divergent transitions",
    "pareto_k": "Pareto k of the guide",
    "energy": "energy distance of generated rows from held-out ones",
    "energy_se": "its standard error over rows",
    "precision": "share of generated rows near held-out ones",
    "recall": "share of held-out rows near generated ones",
    "seconds": "seconds of running, set-up left out",
    "seconds_total": "seconds with set-up",
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of several methods on one pair.

    Attributes:
        table: One row a method; the columns are told in ``COLUMNS``.
        results: The Result of each method that did not fail.
        truth: Mean and standard deviation of each site that they are held against.
    """

    table: pd.DataFrame
    results: dict[str, Result]
    truth: dict[str, tuple[Tensor, Tensor]]

    def plot(self, quantities: int = 12) -> Figure:
        """Draw the methods' posteriors over one another with the truth, and all errors below."""
        return _plot(self, quantities)

    def save(self, directory: str | Path) -> list[Path]:
        """Write ``table.csv`` and, of posteriors, ``posteriors.png`` and one NetCDF a method; return the paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "table.csv"]
        self.table.to_csv(paths[0])
        kept = {name: result for name, result in self.results.items() if result.idata.groups()}
        if kept:
            paths.append(folder / "posteriors.png")
            self.plot().savefig(paths[1], dpi=110)
        for name, result in kept.items():
            stem = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "method"
            taken = [p.stem for p in paths]
            free = next(s for s in (stem, *(f"{stem}_{k}" for k in range(2, len(taken) + 3))) if s not in taken)
            paths.append(folder / f"{free}.nc")
            result.idata.to_netcdf(str(paths[-1]))
        return paths

    def __str__(self) -> str:
        return self.table.dropna(axis=1, how="all").to_string(float_format=lambda v: f"{v:.4g}")


def compare(
    make_pair: Callable[[], Any],
    data: Any,
    methods: Mapping[str, Method],
    *,
    truth: Moments | Callable[[Any, Any], Moments] | None = None,
    heldout: Any = None,
    label: str = "y",
    seed: int = 0,
) -> Comparison:
    r"""Run several methods on one pair and judge them side by side.

    Args:
        make_pair: Builds a fresh pair; called once a method, always from the same random state.
        data: Data of the fit: a tensor or a mapping of names to tensors.
        methods: Callables ``(pair, data) -> Result`` by name, mostly ``partial(fit, ...)`` or
            ``partial(sample, ...)``.
        truth: Mean and standard deviation (each of the site's shape) by site name, or a callable
            ``(pair, data)`` that gives them (an ArithmeticError of it leaves the truth out, with a warning).
        heldout: Rows that were not fitted, by name as ``data``.
        label: Name of the labels, for accuracy and calibration, where ``heldout`` has them.
        seed: Seed that each pair is built from.

    Returns:
        A Comparison. A method that fails has an empty row in its table, and a warning says why.
    """
    if not methods:
        raise ValueError("methods: expected at least one, got none")

    def build() -> Any:
        with isolated(seed):
            return make_pair()

    moments = _moments(truth, build, data)
    results, rows = {}, {}
    for name, method in methods.items():
        try:
            results[name] = method(build(), data)
            rows[name] = _judge(results[name], moments, heldout, label)
        except Exception as error:
            if len(methods) == 1:
                raise
            rows[name] = {}
            warnings.warn(f"{name} failed: {error}", stacklevel=2)
    if not results:
        raise RuntimeError(f"every method failed: {', '.join(methods)}")
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).astype(float)
    return Comparison(table.rename_axis("method"), results, moments)


def _moments(
    truth: Moments | Callable[[Any, Any], Moments] | None, build: Callable[[], Any], data: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    try:
        return dict(truth(build(), data) if callable(truth) else truth or {})
    except ArithmeticError as error:
        warnings.warn(f"truth left out: {error}", stacklevel=3)
        return {}


def _judge(result: Result, truth: Moments, heldout: Any, label: str) -> dict[str, float]:
    run = result.seconds["run"]
    diagnosis = result.diagnosis
    ess, r_hat = diagnosis.min_ess_bulk, diagnosis.worst_r_hat
    row = {
        "ess": ess,
        "ess_per_s": ess / run if r_hat <= R_HAT else math.nan,
        "r_hat": r_hat,
        "divergences": _number(diagnosis.divergences),
        "pareto_k": _number(diagnosis.pareto_k),
        "seconds": run,
        "seconds_total": run + result.seconds["setup"],
    }
    return row | _errors(result, truth) | _heldout_scores(result, heldout, label)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _heldout_scores(result: Result, heldout: Any, label: str) -> dict[str, float]:
    if heldout is None:
        return {}
    if not result.program.observes:
        return _sample_scores(result, heldout)
    try:
        density = _density(result, heldout)
    except (ValueError, RuntimeError) as error:
        # A guide of the fitted rows alone fails in torch, by a shape.
        said = " ".join(str(error).split())[:200]
        warnings.warn(f"held-out rows are not scored: {said}", stacklevel=4)
        return {}
    spread = float(density.std()) if len(density) > 1 else math.nan
    scores = {"lpd": float(density.mean()), "lpd_se": spread / math.sqrt(len(density))}
    site = result.program.sites.get(label)
    if site is None or not site.finite or not isinstance(heldout, Mapping) or label not in heldout:
        return scores
    probabilities, labels = classify(result, heldout, label=label), torch.as_tensor(heldout[label]).long()
    return scores | {
        "accuracy": float((probabilities.argmax(-1) == labels).double().mean()),
        "ece": calibration_error(probabilities, labels),
    }


def _sample_scores(result: Result, heldout: Any) -> dict[str, float]:
    """Generated rows against as many held-out ones, of a model without a likelihood."""
    given = heldout if isinstance(heldout, Mapping) else {next(iter(result.program.data)): heldout}
    made = {n for n, s in result.program.sites.items() if s.role == "deterministic"} & set(given)
    if not made:
        return {}
    name = next(iter(made))
    rest, size = {n: v for n, v in given.items() if n not in made}, len(given[name])
    with isolated(0), result.state():
        drawn = draw_sites(bind(result.program.pair, rest).generator(size), {}, 1)[name][0]
    real = torch.as_tensor(given[name])
    energy = two_sample.energy_distance(real, drawn)
    return {
        "energy": energy.value,
        "energy_se": energy.error,
        "precision": two_sample.precision(real, drawn).value,
        "recall": two_sample.recall(real, drawn).value,
    }


def _density(result: Result, heldout: Any) -> Tensor:
    """Log predictive density of each row; a latent of each row is integrated by particles of the guide."""
    program = result.program
    observed = {p for s in program.select("observed").values() for p in s.plates}
    if program.guided and all((observed - {None}) & set(program.sites[n].plates) for n in program.guided):
        return log_likelihood(result, heldout, k=PARTICLES, progress=False).values
    score = pointwise_log_likelihood(result, heldout)
    return (score.logsumexp(0) - math.log(len(score))).double()


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Expected calibration error (Guo et al. 2017): mean of \|confidence - accuracy\| over confidence bins.

    Args:
        probabilities: Class probabilities (rows, classes).
        labels: Classes (rows,).
        bins: Number of bins of equal width.

    Example:
        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 2)
        0.4
    """
    confidence, guess = probabilities.double().max(-1)
    right = (guess == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    zero = torch.zeros(bins, dtype=torch.double)
    gap = zero.index_add(0, which, confidence) - zero.index_add(0, which, right)
    return float(gap.abs().sum() / len(labels))


def _errors(result: Result, truth: Moments) -> dict[str, float]:
    errors, ratios = _standardised(result, truth)
    if not len(errors):
        return {}
    spread = ratios[ratios > 0]
    return {
        "error_max": float(np.abs(errors).max()),
        "error_rms": float(np.sqrt((errors**2).mean())),
        "sd_ratio": float(np.exp(np.log(spread).mean())) if len(spread) else 0.0,
    }


def _standardised(result: Result, truth: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Errors of all posterior means in posterior standard deviations, and ratios of standard deviations."""
    errors, ratios = [], []
    for name, (mean, sd) in truth.items():
        if name in result.draws:
            drawn, mean, sd = result.draws[name].double(), mean.double(), sd.double()
            errors.append(((drawn.mean(0) - mean) / sd).flatten())
            ratios.append((_sd(drawn) / sd).flatten())
    empty = torch.zeros(0, dtype=torch.double)
    return torch.cat([*errors, empty]).numpy(), torch.cat([*ratios, empty]).numpy()


def _sd(draws: Tensor) -> Tensor:
    """Standard deviation over draws; zero for a single one."""
    return draws.double().std(0) if len(draws) > 1 else torch.zeros_like(draws[0], dtype=torch.double)


def _picks(comparison: Comparison, quantities: int) -> list[tuple[str, int]]:
    """The scalar quantities in which the methods differ most, the sites sharing alike."""
    draws = [r.draws for r in comparison.results.values()]
    names = list(dict.fromkeys(n for d in draws for n in d))
    ranked = []
    for name in names:
        have = [d[name] for d in draws if name in d]
        means = torch.stack([v.double().mean(0).flatten() for v in have])
        spread = torch.stack([_sd(v).flatten() for v in have]).amax(0).clamp_min(1e-12)
        apart = (means.amax(0) - means.amin(0)) / spread
        ranked.append([(name, int(k)) for k in apart.argsort(descending=True)[:quantities]])
    # The sites take turns, so that one with few elements leaves its room to the others.
    turns = [pick for turn in zip_longest(*ranked) for pick in turn if pick is not None]
    return sorted(turns[:quantities], key=lambda pick: names.index(pick[0]))


def _plot(comparison: Comparison, quantities: int) -> Figure:
    picks = _picks(comparison, quantities)
    columns, errors = 4, bool(comparison.truth)
    rows = max(-(-len(picks) // columns), 1 - errors)
    figure = Figure(figsize=(13, 2.5 * rows + 3.2 * errors + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows + errors, columns, height_ratios=[1.0] * rows + [1.3] * errors)
    colours = {n: f"C{k}" for k, n in enumerate(comparison.results)}
    for k, (name, index) in enumerate(picks):
        _plot_density(figure.add_subplot(grid[k // columns, k % columns]), comparison, name, index, colours)
    if errors:
        _plot_errors(figure.add_subplot(grid[rows, :]), comparison, colours)
    seen = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    named = {label: line for label, line in seen.items() if not label.startswith("_")}
    figure.legend(list(named.values()), list(named), loc="outside upper right", ncols=6, frameon=False)
    program = next(iter(comparison.results.values())).program
    figure.suptitle(f"{program.name}: the quantities in which the methods differ most", x=0.01, ha="left")
    return figure


def _plot_density(axes: Axes, comparison: Comparison, name: str, index: int, colours: Mapping[str, str]) -> None:
    if name in comparison.truth:
        mean, sd = (float(v.flatten()[index]) for v in comparison.truth[name])
        axes.axvspan(mean - sd, mean + sd, color="0.9", lw=0)
        axes.axvline(mean, color="0.3", lw=1, ls="--", label="truth: mean, ±1 sd")
    having = {method: result for method, result in comparison.results.items() if name in result.draws}
    for method, result in having.items():
        draws = result.draws[name].double().reshape(result.size, -1)[:, index].cpu().numpy()
        if np.ptp(draws) > 0:
            x, density = az.kde(draws)
            axes.plot(x, density, color=colours[method], lw=1.4, label=method)
        else:
            axes.axvline(draws[0], color=colours[method], lw=1.4, ls=":", label=method)
    array = next(iter(having.values())).idata["posterior"][name]
    place = tuple(map(int, np.unravel_index(index, array.shape[2:]))) if array.shape[2:] else ()
    axes.set_title(quantity(array, place), fontsize=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)


def _plot_errors(axes: Axes, comparison: Comparison, colours: Mapping[str, str]) -> None:
    rng = np.random.default_rng(0)
    axes.axhspan(-0.1, 0.1, color="0.92", lw=0)
    axes.axhline(0, color="0.5", lw=0.8)
    for k, (method, result) in enumerate(comparison.results.items()):
        errors, _ = _standardised(result, comparison.truth)
        axes.scatter(k + rng.uniform(-0.25, 0.25, len(errors)), errors, s=9, color=colours[method], alpha=0.7, lw=0)
    axes.set_xticks(range(len(comparison.results)), list(comparison.results))
    axes.set_ylabel("error of the mean\n(posterior sd)", fontsize=9)
    axes.set_yscale("symlog", linthresh=0.1)
    reach = max(0.2, *(abs(v) for v in axes.get_ylim()))
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if t <= reach]
    axes.set_yticks(
        [*(-t for t in reversed(ticks)), 0, *ticks], [*(f"-{t}" for t in reversed(ticks)), "0", *map(str, ticks)]
    )
    axes.set_yticks([], minor=True)
    axes.set_title("all quantities against the truth; the band is ±0.1", fontsize=9, loc="left")
