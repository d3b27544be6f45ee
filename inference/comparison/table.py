r"""The table of a comparison, its plot and its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from inference.comparison.posteriors import log_densities, picks, posteriors, quantity
from inference.comparison.progress import progress
from inference.core.files import stem_of, write_whole
from inference.core.handlers import exclusive
from inference.core.lazy import pd
from inference.report.blocks import Table, frame
from inference.report.page import Page, excerpt, method_colours, page_of_comparison
from inference.report.plots import density
from inference.result import Result
from inference.saved import versions_of_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure


COLUMNS = {
    "lpd": "mean log predictive density of held-out rows, in nats",
    "lpd_se": "standard error of lpd over rows",
    "lpd_mc": "Monte Carlo error of lpd (standard error and bias), due to the number of draws",
    "lpd_unreliable": "held-out rows that a few draws decide (Pareto k above 0.7): too low there by an unknown error",
    "lpd_diff": "lpd minus that of the best method",
    "lpd_diff_se": "standard error of lpd_diff, over the same rows, with the Monte Carlo errors",
    "accuracy": "fraction of held-out labels predicted correctly",
    "ece": "expected calibration error of the labels, 10 bins",
    "error_max": "largest error of a posterior mean, in posterior standard deviations",
    "error_floor": "what error_max would be for as many independent draws of the exact posterior (median)",
    "error_rms": "root mean square of the errors of all posterior means",
    "sd_ratio": "geometric mean of the ratios of standard deviations to the true ones; 0 if any is 0",
    "sd_error": "typical factor between a standard deviation and the true one: exp of the rms of the log ratios",
    "coverage_90": "fraction of the parameters that the data were simulated from within central intervals of 90 %",
    "truth_error": "error of the truth, where it is itself an estimate: largest error of a mean, in its sd",
    "ksd": "kernel Stein discrepancy of the draws from the density of the model",
    "ksd_p": "probability of such a ksd for draws of the posterior",
    "loss": "mean loss of the last tenth of the steps: of SVI minus the bound of all rows, in nats",
    "ess": "smallest bulk effective sample size",
    "ess_per_s": "ess per second of running, without set-up; empty if the chains disagree",
    "ess_per_s_total": "ess per second, with set-up; empty if the chains disagree",
    "gradients": "gradient evaluations: steps of a fit; of chains those of the draws that are kept",
    "ess_per_gradient": "ess per gradient evaluation; empty if the chains disagree",
    "r_hat": "largest R-hat",
    "divergences": "number of divergent transitions",
    "pareto_k": "Pareto k of the guide",
    "energy": "energy distance between generated and held-out rows",
    "energy_se": "standard error of energy over rows",
    "precision": "fraction of generated rows close to held-out rows",
    "recall": "fraction of held-out rows close to generated rows",
    "seconds": "running time in seconds, without set-up",
    "seconds_total": "running time in seconds, with set-up",
}
"""Columns of the table and what they mean."""


ROUNDING = 1e-12
"""Standard error over seeds, relative to the mean, up to which figures are equal."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Results of several methods on one pair.

    Attributes:
        table: One row per method; see ``COLUMNS`` for the columns.
        results: Result of each method that did not fail.
        truth: True posterior mean and standard deviation, by site.
        errors: Standard errors of the table over seeds; None for a single seed.
        failed: Why each method that failed did so.
    """

    table: pd.DataFrame
    results: dict[str, Result]
    truth: dict[str, tuple[Tensor, Tensor]]
    errors: pd.DataFrame | None = None
    failed: Mapping[str, str] = field(default_factory=dict)

    def plot(self, quantities: int = 11) -> Figure:
        """Plot the posteriors of all methods with the truth, and below them the errors of all posterior means.

        The first panel is the log density of draws and data. It does not depend on what the data cannot tell, such as
        the signs of factors or the labels of components, in which methods may differ though they agree. Latent sites
        with a value for each observation are shown only where there are no others.

        Args:
            quantities: Maximum number of scalar quantities to show: those in which the methods differ most.
        """
        return posteriors(self, quantities)

    def plot_progress(self) -> Figure:
        """Plot the loss, and the error of the posterior means, against seconds and against gradient evaluations.

        The loss is that of fits, smoothed over a fiftieth of the steps. The error is the largest one of a mean against
        the truth, in true standard deviations: of chains that of the draws until then, of fits one point at their end.
        Without a truth there are the losses alone.
        """
        return progress(self)

    def shown(self) -> pd.DataFrame:
        """The table as text: columns that have values, with standard errors over seeds, and why methods failed."""
        kept = self.table.dropna(axis=1, how="all")
        text = kept.map(lambda v: "" if math.isnan(v) else f"{v:.4g}")
        if self.errors is not None:
            errors = self.errors[list(kept)]
            # Equal figures differ by rounding.
            errors = errors.mask(errors <= ROUNDING * kept.abs(), 0.0)
            text = text + errors.map(lambda v: "" if math.isnan(v) else f" ± {v:.2g}")
        if self.failed:
            text["failed"] = [" ".join(self.failed.get(str(n), "").split()) for n in text.index]
        return text

    def to_csv(self) -> str:
        """The table as CSV with all digits; errors over seeds as columns ``NAME_error``, and why methods failed."""
        table = self.table.dropna(axis=1, how="all")
        if self.errors is not None:
            table = table.join(self.errors[list(table)].add_suffix("_error"))
        if self.failed:
            table = table.assign(failed=[self.failed.get(str(n), "") for n in table.index])
        return table.to_csv()

    def to_markdown(self) -> str:
        """The table in Markdown."""
        text = self.shown()
        lines = [["method", *map(str, text.columns)], ["---", *["---:"] * text.shape[1]]]
        lines += [[str(name), *row] for name, row in zip(text.index, text.to_numpy(), strict=True)]
        return "".join(f"| {' | '.join(str(c).replace('|', chr(92) + '|') for c in line)} |\n" for line in lines)

    def to_latex(self) -> str:
        """The table as a LaTeX ``tabular`` with the rules of booktabs."""
        text = self.shown()
        head = " & ".join(map(_escaped, ["method", *text.columns]))
        body = [" & ".join(map(_escaped, [n, *row])) for n, row in zip(text.index, text.to_numpy(), strict=True)]
        lines = [rf"\begin{{tabular}}{{l{'r' * text.shape[1]}}}", r"\toprule", rf"{head} \\", r"\midrule"]
        lines += [rf"{line} \\" for line in body]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"

    def save(self, directory: str | Path, about: Callable[[str], Mapping[str, Any]] | None = None) -> list[Path]:
        """Write ``table.csv``, ``posteriors.png`` if there are posteriors, and a folder per method.

        The folders are those of ``Result.save``; ``about`` gives what is added to the one of a method.

        Returns:
            The paths of the files.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "table.csv"]
        spread = self.table[[]] if self.errors is None else self.errors.add_suffix("_error")
        write_whole(paths[0], self.table.join(spread).to_csv)
        kept = {name: result for name, result in self.results.items() if result.groups}
        if kept:
            paths.append(folder / "posteriors.png")
            write_whole(paths[1], partial(self.plot().savefig, dpi=110))
        for name, result in self.results.items():
            stem = stem_of(name) or "method"
            taken = [p.stem for p in paths]
            free = next(s for s in (stem, *(f"{stem}_{k}" for k in range(2, len(taken) + 3))) if s not in taken)
            paths.append(result.save(folder / free, about and about(name)))
        return paths

    @exclusive
    def report(
        self, path: str | Path, *, about: Mapping[str, Any] | None = None, shape: tuple[int, int] | None = None
    ) -> Path:
        """Write one HTML page about the comparison, which needs no other file and no network.

        Besides what :meth:`Result.report` shows of each method it has the table, the posteriors over one another with
        the truth, the learning curves and the leave-one-out scores of all methods.

        Args:
            path: Where the page is to stand. It is written whole or not at all.
            about: What made the comparison: ``seed``, ``data``, ``command``, ``title``, and further facts.
            shape: Height and width of an image, for the pictures of pairs of images. Default: a square.

        Returns:
            The path.

        Raises:
            OSError: The page cannot be written.
        """
        return page(self, about, shape).write(path)

    def _repr_html_(self) -> str:
        said = [f"{n}: {line}" for n, r in self.results.items() for line in r.diagnosis.advice]
        return excerpt("Comparison", self.table.dropna(axis=1, how="all"), "\n".join(said))

    def __str__(self) -> str:
        table = self.table.dropna(axis=1, how="all")
        if self.errors is None and not self.failed:
            return table.to_string(float_format=lambda v: f"{v:.4g}")
        return self.shown().to_string()


def _escaped(cell: object) -> str:
    """Text of a LaTeX cell."""
    marks = {"\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(marks.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in str(cell))


def page(comparison: Comparison, about: Mapping[str, Any] | None, shape: tuple[int, int] | None) -> Page:
    """The page of a comparison."""
    colours = method_colours(comparison.results)
    densities, truth = log_densities(comparison), dict[str, float]()
    figures = [density("log density of draws and data", densities, colours)] if densities else []
    for name, index in picks(comparison, 11):
        having = {m: r for m, r in comparison.results.items() if name in r.draws}
        draws = {m: r.draws[name].double().reshape(r.size, -1)[:, index].cpu().numpy() for m, r in having.items()}
        known = comparison.truth.get(name)
        moments = None if known is None else (float(known[0].flatten()[index]), float(known[1].flatten()[index]))
        figures.append(density(quantity(next(iter(having.values())), name, index), draws, colours, moments))
    for name, (mean, _) in comparison.truth.items():
        result = next((r for r in comparison.results.values() if name in r.draws), None)
        if result is not None:
            truth |= {quantity(result, name, k): float(v) for k, v in enumerate(mean.flatten())}
    tables = measures(comparison.table)
    return page_of_comparison(comparison.results, tables, figures, truth, versions_of_packages(), about, shape)


GROUPS = {
    "Prediction of held-out rows": ("lpd", "accuracy", "ece"),
    "Against the truth": ("error", "sd_"),
    "Chains and guides": ("ess", "r_hat", "divergences", "pareto_k"),
    "Generated rows": ("energy", "precision", "recall"),
    "Time": ("seconds",),
}
"""Groups of columns of the table in a report, by the beginnings of their names; the rest is another group."""


def measures(table: pd.DataFrame) -> list[Table]:
    """The table of a comparison in parts, each with what its columns mean."""
    left, found = list(table.dropna(axis=1, how="all").columns), []
    for title, beginnings in {**GROUPS, "Further measures": ("",)}.items():
        columns = [c for c in left if c.startswith(beginnings)]
        left = [c for c in left if c not in columns]
        if columns:
            meanings = [(c, COLUMNS[c]) for c in columns if c in COLUMNS]
            found.append(frame(table[columns].rename_axis("method"), caption=title, meanings=meanings))
    return found
