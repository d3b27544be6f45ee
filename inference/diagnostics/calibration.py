r"""Tests of calibration: uniform ranks, envelopes of their distribution function, coverage, and a verdict.

Parameters :math:`\theta` drawn from a prior and data drawn given them make a truth that every posterior can be held
against: its rank among exact posterior draws is uniform, for any function of parameters and data. A rank r among L
independent draws is turned into :math:`u = (r + U) / (L + 1)` with U uniform in (0, 1), ties broken at random. For an
exact posterior u is uniform, whatever L is.

The test of uniformity looks at the distribution function of N values at K points at once. At each point the count is
binomial; a pointwise level :math:`\gamma` is chosen such that all K intervals hold together with the stated
probability. That probability is exact: the counts of a Poisson process, given that there are N, are those of N uniform
values, and the probability that a Poisson process stays within bounds is a chain of convolutions.

References: Talts et al. 2018 (https://arxiv.org/abs/1804.06788; ranks); Säilynoja, Bürkner and Vehtari 2022
(https://doi.org/10.1007/s11222-022-10090-6; envelopes); Modrák et al. 2023 (https://doi.org/10.1214/23-BA1404;
quantities that read the data); Lemos et al. 2023 (https://arxiv.org/abs/2302.03026; TARP); Yao et al. 2018
(https://arxiv.org/abs/1802.02538; VSBC); Säilynoja et al. 2025 (https://arxiv.org/abs/2502.03279; posterior SBC).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from inference.core.lazy import pd, stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 60
"""Points, at most, at which a distribution function is held against its envelope."""


BINS, LEAST_IN_BIN = 20, 10
"""Bins of the chi-square test, at most, and the least number of values expected in one."""


INTERVALS = (0.5, 0.9)
"""Central intervals whose coverage stands in the table."""


JOINT = "log_joint"
"""The log density of parameters and data: sees what no parameter alone sees, and a posterior that ignores the data."""


DISTANCE = "distance"
"""Distance to a random point of the prior, over all quantities: its ranks are the coverage of TARP."""


ROUNDING = 1e-9
"""p-value below which it is no difference from 1."""


CLEAR = 3.0
"""Standard errors of the mean or the spread of the ranks from which the shape of a fault is named."""


def ranks(draws: np.ndarray, truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    r"""Ranks of true values among draws, as numbers in (0, 1) that are uniform for an exact posterior.

    Args:
        draws: Independent draws (L, \*shape).
        truth: True values, (\*shape).
        random: Breaks ties, and spreads each rank evenly over its share of (0, 1).
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return (below + random.integers(0, equal + 1) + random.random(truth.shape)) / (len(draws) + 1)


@lru_cache(maxsize=8)
def _points(count: int) -> np.ndarray:
    """Points in (0, 1) at which the distribution function of so many values is looked at."""
    number = min(count, POINTS)
    return np.arange(1, number + 1) / (number + 1)


@lru_cache(maxsize=8)
def _levels(count: int) -> np.ndarray:
    """Two-sided level (points, count + 1) of each possible number of values below each point: 1 is the middle."""
    numbers, points = np.arange(count + 1), _points(count)[:, None]
    return 2 * np.minimum(stats.binom.cdf(numbers, count, points), stats.binom.sf(numbers - 1, count, points))


def _bounds(count: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest number of values below each point whose two-sided level is above ``level``."""
    # Equal levels may differ by rounding.
    inside = _levels(count) > level * (1 + 1e-9)
    return inside.argmax(1), count - inside[:, ::-1].argmax(1)


def probability_within(lower: np.ndarray, upper: np.ndarray, points: np.ndarray, count: int) -> float:
    """Probability that the numbers of so many uniform values below all points lie within bounds.

    Args:
        lower: Least number of values below each point, (K,).
        upper: Greatest number of values below each point, (K,).
        points: Ascending points in (0, 1), (K,).
        count: Number of values N.
    """
    state, first, before = np.ones(1), 0, 0.0
    for low, high, point in zip(lower, upper, points, strict=True):
        kernel = stats.poisson.pmf(np.arange(high - first + 1), count * (point - before))
        state = np.convolve(state, kernel)[low - first : high - first + 1]
        first, before = low, point
    rest = stats.poisson.pmf(count - first - np.arange(len(state)), count * (1 - before))
    return float(state @ rest / stats.poisson.pmf(count, count))


def uniformity(values: np.ndarray) -> float:
    """p-value of the hypothesis that values (N,) in (0, 1) are uniform: a simultaneous test at many points."""
    count, points = len(values), _points(len(values))
    below = np.searchsorted(np.sort(values), points, side="right")
    level = float(_levels(count)[np.arange(len(points)), below].min())
    # Bounds at which all levels are above the one that was found.
    lower, upper = _bounds(count, min(level, 1 - 1e-6))
    p = 1 - probability_within(lower, upper, points, count)
    # Far below one the difference is rounding; the sum over points is then nearly the probability, and above it.
    return min(1.0, p if p > ROUNDING else level * len(points))


@lru_cache(maxsize=32)
def envelope(count: int, probability: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, and bounds of the distribution function of N uniform values that all hold together.

    Args:
        count: Number of values N.
        probability: Probability that all bounds hold together.
    """
    points, low, high = _points(count), -12.0, math.log10(1 - probability)
    for _ in range(40):
        middle = (low + high) / 2
        held = probability_within(*_bounds(count, 10**middle), points, count) >= probability
        low, high = (middle, high) if held else (low, middle)
    lower, upper = _bounds(count, 10**low)
    return points, lower / count, upper / count


def symmetry(values: np.ndarray) -> float:
    r"""p-value of the hypothesis that values (N,) in (0, 1) lie symmetrically around one half (VSBC).

    A guide may be too narrow and yet have the right means, on average over data sets: its ranks are then not uniform,
    but symmetric. With values ordered by their distance from one half, the farthest first, the signs of
    :math:`u - 1/2` are those of fair coins. The statistic is the greatest absolute sum of the first signs, which is N
    times the largest difference of the distribution functions of u and of 1 - u.
    """
    signs = np.sign(values - 0.5)[np.argsort(-abs(values - 0.5))]
    reach = int(abs(signs.cumsum()).max())
    # Walks that stay within (-reach, reach): where they are after each step.
    walk = np.zeros(2 * reach + 1)
    walk[reach] = 1.0
    for _ in range(len(values)):
        walk[1:-1] = 0.5 * (walk[:-2] + walk[2:])
        walk[0] = walk[-1] = 0.0
    return max(0.0, float(1 - walk.sum())) if reach else 1.0


def chi_square(values: np.ndarray) -> float:
    """p-value of the chi-square test that values (N,) in (0, 1) are uniform; nan below two bins."""
    bins = min(BINS, len(values) // LEAST_IN_BIN)
    if bins < 2:
        return math.nan
    return float(stats.chisquare(np.histogram(values, bins, (0, 1))[0]).pvalue)


def shape_of(values: np.ndarray, name: str = "") -> str:
    """What is wrong with a posterior, by its ranks (N,) in (0, 1): its place or its width, whichever is clearer."""
    count, centred = len(values), values - 0.5
    shift = float(centred.mean() * math.sqrt(12 * count))
    spread = float(((centred**2).mean() - 1 / 12) * math.sqrt(180 * count))
    if max(abs(shift), abs(spread)) < CLEAR:
        return "of another shape"
    if name == JOINT and abs(shift) >= abs(spread):
        return "too narrow, by its density" if shift < 0 else "too wide or off, by its density"
    if name == DISTANCE and abs(shift) >= abs(spread):
        return "off"
    if abs(shift) >= abs(spread):
        return "too high" if shift < 0 else "too low"
    return "too narrow" if spread > 0 else "too wide"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of true parameters in the posteriors of simulated data.

    Attributes:
        ranks: A column per quantity, a line per simulated data set (per row where rows are independent), in (0, 1):
            uniform for an exact posterior.
        draws: Number of independent draws that each data set was ranked among, (simulations,).
        alpha: Probability that an exact posterior is called not calibrated.
        method: Name of the method.
        pair: Name of the pair.
        failed: What the data sets on which the method failed ended with.
        omitted: Number of quantities left out, of sites with many.
    """

    ranks: pd.DataFrame
    draws: np.ndarray
    alpha: float = 0.05
    method: str = ""
    pair: str = ""
    failed: tuple[str, ...] = field(default=())
    omitted: int = 0

    @cached_property
    def table(self) -> pd.DataFrame:
        """A line per quantity, the least uniform first.

        Columns: ``p``, of the simultaneous test of uniform ranks; ``chi_square``, the p-value of that test;
        ``symmetry``, that of symmetric ranks (VSBC: a low value means a wrong mean); ``coverage_50`` and
        ``coverage_90``, fraction of truths within the central interval; ``shape``, what is wrong, if p is below
        ``alpha`` divided by the number of quantities.
        """
        columns = {str(name): self.ranks[name].to_numpy() for name in self.ranks}
        lines = {name: self._line(name, values) for name, values in columns.items()}
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("quantity").sort_values("p", kind="stable")

    def _line(self, name: str, values: np.ndarray) -> dict[str, float | str]:
        p, inside = uniformity(values), 2 * abs(values - 0.5)
        return {
            "p": p,
            "chi_square": chi_square(values),
            "symmetry": symmetry(values),
            **{f"coverage_{100 * level:.0f}": float((inside <= level).mean()) for level in INTERVALS},
            "shape": shape_of(values, name) if p < self.limit else "",
        }

    @property
    def limit(self) -> float:
        """p-value of a single quantity below which it is not calibrated: ``alpha`` over the number of quantities."""
        return self.alpha / self.ranks.shape[1]

    @property
    def p(self) -> float:
        """p-value of all quantities together: the smallest one times their number (Bonferroni), at most 1."""
        return min(1.0, float(self.table["p"].iloc[0]) * self.ranks.shape[1])

    @property
    def passed(self) -> bool:
        """Whether the ranks of all quantities may be uniform, and the method failed on no data set."""
        return self.p >= self.alpha and not self.failed

    @property
    def verdict(self) -> str:
        """One sentence."""
        faulty, count = self.table[self.table["p"] < self.limit], self.ranks.shape[1]
        wrong = len(faulty)
        of = f"{len(self.ranks)} ranks of each of {count} {'quantity' if count == 1 else 'quantities'}"
        lost = f"; the method failed on {len(self.failed)} data sets: {self.failed[0]}" if self.failed else ""
        if not wrong:
            blind = (
                "" if JOINT in self.ranks else f"; {JOINT} is not among them: a posterior that ignores the data passes"
            )
            said = f"{of} may be uniform (p {_shown(self.p)}){blind}"
            return f"{'Not judged' if self.failed else 'No fault found'}: {said}{lost}."
        # A parameter says more than what sees all of them.
        worst = min(faulty.index, key=lambda n: n in (JOINT, DISTANCE))
        line, error = faulty.loc[worst], math.sqrt(0.09 / len(self.ranks))
        covers = f"its 90 % interval holds the truth in {line['coverage_90']:.0%} of cases (expected 90 ± {error:.1%})"
        others = f"; {wrong} of {count} quantities are wrong" if wrong > 1 else ""
        return f"Not calibrated: {worst} is {line['shape']} (p {_shown(self.p)}), {covers}{others}{lost}."

    def plot(self, quantities: int = 7) -> Figure:
        """Plot the distribution functions of the ranks minus that of uniform ones, the worst first, and the coverage.

        Lines that leave the grey envelope anywhere are not those of uniform ranks. A line that rises first and then
        falls below zero is of a posterior that is too narrow; one that falls first, of one that is too wide; one that
        stays on one side, of one that is off. The last panel is the coverage of central intervals of all parameters.
        """
        from matplotlib.figure import Figure

        names = [str(n) for n in self.table.index[:quantities]]
        columns = len(names) + 1 if len(names) < 5 else 4
        lines = -(-(len(names) + 1) // columns)
        figure = Figure(figsize=(3.3 * columns, 2.6 * lines + 0.7), layout="constrained")
        grid = np.atleast_1d(figure.subplots(lines, columns)).ravel()
        for axes, name in zip(grid, names, strict=False):
            self._plot_difference(axes, name)
        self._plot_coverage(grid[len(names)])
        for axes in grid[len(names) + 1 :]:
            axes.set_visible(False)
        verdict = self.verdict if len(self.verdict) < 120 else self.verdict.partition(", its")[0] + "."
        figure.suptitle(f"{self.method} on {self.pair}. {verdict}", x=0.01, ha="left", fontsize=10)
        return figure

    def _plot_difference(self, axes: Axes, name: str) -> None:
        values = np.sort(self.ranks[name].to_numpy())
        points, lower, upper = envelope(len(values), 1 - self.limit)
        at, bad = np.concatenate([[0.0], points, [1.0]]), self.table["p"][name] < self.limit
        low, high = (np.concatenate([[0.0], bound - points, [0.0]]) for bound in (lower, upper))
        axes.fill_between(at, low, high, color="0.88", lw=0)
        axes.axhline(0, color="0.6", lw=0.8)
        found = np.searchsorted(values, at, side="right") / len(values) - at
        axes.plot(at, found, color="C3" if bad else "C0", lw=1.4)
        said = f"{name}: {self.table['shape'][name]}" if bad else name
        axes.set_title(said, fontsize=9)
        axes.set_xlabel("rank", fontsize=8)
        axes.set_ylabel("ECDF − uniform", fontsize=8)
        axes.tick_params(labelsize=8)

    def _plot_coverage(self, axes: Axes) -> None:
        levels = np.linspace(0, 1, 41)
        axes.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        parameters = [n for n in self.ranks if n not in (JOINT, DISTANCE)]
        for name in parameters:
            inside = 2 * np.abs(self.ranks[name].to_numpy() - 0.5)
            held = (inside[:, None] <= levels).mean(0)
            bad = self.table["p"][name] < self.limit
            axes.plot(levels, held, color="C3" if bad else "C0", lw=1, alpha=0.7 if bad else 0.4)
        axes.set_title(f"coverage of central intervals ({len(parameters)})", fontsize=9)
        axes.set_xlabel("nominal", fontsize=8)
        axes.set_ylabel("found", fontsize=8)
        axes.tick_params(labelsize=8)

    def __str__(self) -> str:
        shown = self.table.to_string(float_format=lambda v: f"{v:.3g}", max_rows=20)
        among = f"ranked among {int(np.median(self.draws))} draws" if len(self.draws) else ""
        left = f"; {self.omitted} further quantities left out" if self.omitted else ""
        return f"{self.verdict}\n{len(self.draws)} data sets, {among}{left}\n{shown}"


def _shown(p: float) -> str:
    return f"below {ROUNDING:.0e}" if p < ROUNDING else f"{p:.2g}"
