r"""Scores of a Result: errors against a true posterior, and predictions of held-out rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from inference.comparison.judgement import ksd
from inference.core.bound import BoundPair
from inference.core.checks import reason_of
from inference.core.handlers import REFUSALS, isolated
from inference.core.lazy import azs, special
from inference.diagnostics import two_sample
from inference.diagnostics.guides import PARETO_K
from inference.diagnostics.weights import MIN_DRAWS, pareto_k
from inference.draws.scoring import draw_sites
from inference.evidence.estimate import log_evidence
from inference.predict import classify, pointwise_log_likelihood
from inference.result import Result

Moments = Mapping[str, tuple[Tensor, Tensor]]

EXACT_ROWS = 5000
"""Largest number of held-out rows whose exact density is computed, one by one."""

PARTICLES, LEAST_PARTICLES, PARTICLE_NUMBERS = 500, 4, 300_000_000
"""Particles of the guide per held-out row, for pairs with latent sites per row: at most, at least, and the numbers that
those of all rows may have between."""

WIDE_ROW = 1000
"""Latent numbers per row above which a row has the least number of particles. With so many numbers one particle
outweighs the others, and more of them buy little: a diffusion chain of 100 steps has 6,400 numbers per row of 64, and
its 540 rows take half an hour with 86 particles."""


@dataclass(frozen=True, eq=False)
class Densities:
    """Log predictive densities of held-out rows.

    Attributes:
        values: Log predictive density of each row, (rows,).
        error: Monte Carlo error of their mean: standard error and bias, due to the number of draws; 0 if exact.
        unreliable: Number of rows that a few draws decide, so that their error is unknown; nan if not asked.
    """

    values: Tensor
    error: float
    unreliable: float = math.nan


SETTLED = 10
"""The last of so many parts of the losses is their end."""


def run_scores(result: Result) -> dict[str, float]:
    """What a run says of itself: its loss, chains and guide, and what it cost."""
    run, total = result.seconds["run"], result.seconds["run"] + result.seconds["setup"]
    diagnosis, gradients = result.diagnosis, gradients_of(result)
    ess, losses = diagnosis.min_ess_bulk, result.losses[-max(1, len(result.losses) // SETTLED) :]
    return {
        "loss": float(losses.reshape(len(losses), -1).sum(1).mean()) if len(losses) else math.nan,
        "ess": ess,
        "ess_per_s": ess / run if diagnosis.converged else math.nan,
        "ess_per_s_total": ess / total if diagnosis.converged else math.nan,
        "gradients": gradients,
        "ess_per_gradient": ess / gradients if diagnosis.converged else math.nan,
        "r_hat": diagnosis.worst_r_hat,
        "divergences": _number(diagnosis.divergences),
        "pareto_k": _number(diagnosis.pareto_k),
        "seconds": run,
        "seconds_total": total,
    }


def gradients_of(result: Result) -> float:
    """Gradient evaluations: of chains those of the draws that were kept, of a fit one per step; nan if unknown."""
    stats = result.groups.get("sample_stats")
    if stats is None:
        return float(len(result.losses)) if len(result.losses) else math.nan
    return float(stats["n_steps"].sum()) if "n_steps" in stats else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def stein_scores(result: Result) -> dict[str, float]:
    """Kernel Stein discrepancy and its p-value; a warning says why there is none."""
    try:
        found = ksd(result)
    except (*REFUSALS, ArithmeticError) as error:
        warnings.warn(f"{result.method}: no Stein discrepancy: {reason_of(error)}", stacklevel=5)
        return {}
    return {"ksd": found.value, "ksd_p": found.p}


def drawn_scores(result: Result, drawn: Mapping[str, Tensor]) -> dict[str, float]:
    """Fraction of the parameters that the data were simulated from that lie within central intervals of 90 %."""
    inside = [np.zeros(0, bool)]
    for name, value in drawn.items():
        if name in result.draws:
            # torch.quantile refuses more than 16 million numbers.
            low, high = np.quantile(result.draws[name].double().numpy(), (0.05, 0.95), axis=0)
            true = value.cpu().numpy()
            inside.append(((low <= true) & (true <= high)).ravel())
    known = np.concatenate(inside)
    return {"coverage_90": float(known.mean())} if len(known) else {}


def mean_error(result: Result) -> float:
    """Largest Monte Carlo standard error of a posterior mean, in posterior standard deviations."""
    table = result.diagnosis.table
    table = table[table["sd"] > 0]
    if "mcse_mean" in table:
        return float((table["mcse_mean"] / table["sd"]).max())
    return result.size**-0.5


def heldout_scores(result: Result, heldout: Any, label: str | None) -> tuple[dict[str, float], Densities | None]:
    """Scores of held-out rows: log predictive density, and accuracy and calibration of labels; and the densities."""
    if heldout is None:
        return {}, None
    if not result.bound.observes:
        return sample_scores(result, heldout), None
    try:
        found = _density(result, heldout)
    except (ValueError, RuntimeError) as error:
        # A guide with parameters per fitted row fails in torch with a mismatch of shapes.
        warnings.warn(f"held-out rows are not scored: {reason_of(error)}", stacklevel=4)
        return {}, None
    density = found.values
    sd = float(density.std()) if len(density) > 1 else math.nan
    scores = {
        "lpd": float(density.mean()),
        "lpd_se": sd / math.sqrt(len(density)),
        "lpd_mc": found.error,
        "lpd_unreliable": found.unreliable,
    }
    finite = [n for n, s in result.bound.sites.items() if s.finite]
    name = label or (finite[0] if len(finite) == 1 else "")
    # Labels that the fit drew, row by row, say nothing of other rows.
    if name not in finite or name in result.draws or not isinstance(heldout, Mapping) or name not in heldout:
        return scores, found
    probabilities, labels = classify(result, heldout, label=name), torch.as_tensor(heldout[name]).long().cpu()
    return scores | {
        "accuracy": float((probabilities.argmax(-1) == labels).double().mean()),
        "ece": calibration_error(probabilities, labels),
    }, found


def sample_scores(result: Result, heldout: Any) -> dict[str, float]:
    """Two-sample metrics of generated rows and as many held-out rows, for a model without a likelihood."""
    data = heldout if isinstance(heldout, Mapping) else {next(iter(result.bound.data)): heldout}
    names = [n for n in result.bound.generated if n in data]
    if not names:
        return {}
    generate_like = result.bound.asked.generate_like
    with isolated(0), result.state():
        if generate_like is not None:
            generated = generate_like(**{n: torch.as_tensor(v).to(result.bound.device) for n, v in data.items()})
        else:
            inputs = result.bound.rebound({n: v for n, v in data.items() if n not in names})
            drawn = draw_sites(inputs.generator(len(data[names[0]])), {}, 1)
            generated = {n: drawn[n][0] for n in names}
    scores = [_two_sample(torch.as_tensor(data[n]).to(generated[n].device), generated[n]) for n in names]
    return {k: sum(s[k] for s in scores) / len(scores) for k in scores[0]}


def _two_sample(real: Tensor, generated: Tensor) -> dict[str, float]:
    energy = two_sample.energy_distance(real, generated)
    return {
        "energy": energy.value,
        "energy_se": energy.error,
        "precision": two_sample.precision(real, generated).value,
        "recall": two_sample.recall(real, generated).value,
    }


def paired_differences(densities: Mapping[str, Densities]) -> dict[str, dict[str, float]]:
    """Mean difference of each method's densities from those of the best, row by row, with its standard error.

    The rows are the same for all methods, so the error of the difference is mostly far below that of ``lpd``. It
    includes the Monte Carlo errors of both methods.
    """
    best = max(densities, key=lambda n: float(densities[n].values.mean()), default="")
    found = {}
    for name, own in densities.items():
        if len(own.values) != len(densities[best].values):
            continue
        gap = own.values - densities[best].values
        spread = float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
        noise = 0.0 if name == best else math.hypot(own.error, densities[best].error)
        found[name] = {"lpd_diff": float(gap.mean()), "lpd_diff_se": math.hypot(spread, noise)}
    return found


def monte_carlo_error(score: Tensor, chains: int) -> float:
    r"""Error of the mean over rows of the log of the mean density over draws, due to the number of draws.

    With relative weights :math:`r_{sn} = p(x_n \mid \theta_s) / \bar p(x_n)` the influence of a draw is
    :math:`\mathrm{mean}_n\, r_{sn} - 1`. The standard error is that of its mean over S effective draws, and the bias is
    :math:`-\mathrm{mean}_n \mathrm{Var}_s(r_{sn}) / 2 S`; the error is the root of the sum of their squares.

    Args:
        score: Log densities (S, rows), chains one after another.
        chains: Number of chains.
    """
    count = len(score)
    relative = (score - score.logsumexp(0) + math.log(count)).exp()
    influence = relative.mean(1)
    if not float(influence.var()) > 0:
        return 0.0
    size = count if chains == 1 else float(azs.ess(influence.reshape(chains, -1).cpu().numpy()))
    # Antithetic chains have more effective draws than draws; short ones have no number.
    size = size if math.isfinite(size) else count / chains
    bias = float(relative.var(0).mean()) / 2 / size
    return math.hypot(float(influence.std()) / math.sqrt(size), bias)


def _density(result: Result, heldout: Any) -> Densities:
    """Log predictive density of each row; latent sites per row are integrated out with particles of the guide."""
    bound = result.bound
    observed = {p for s in bound.select("observed").values() for p in s.plates}
    if bound.guided and all((observed - {None}) & set(bound.sites[n].plates) for n in bound.guided):
        evidence = log_evidence(result, heldout, k=_particles(bound, heldout), progress=False)
        # The bias of the logarithm of a mean of weights is minus half its squared error.
        bias = float(evidence.errors.square().mean()) / 2
        return Densities(evidence.values, math.hypot(evidence.monte_carlo_error, bias))
    score = pointwise_log_likelihood(result, heldout).double()
    exact = _exact(result, heldout, score[:2])
    if exact is not None:
        return Densities(exact, 0.0, 0)
    chains = result.groups["posterior"].sizes["chain"] if "sample_stats" in result.groups else 1
    values = score.logsumexp(0) - math.log(len(score))
    return Densities(values, monte_carlo_error(score, chains) if len(score) > 1 else 0.0, _decided_by_few(score))


def _particles(bound: BoundPair, heldout: Any) -> int:
    """Particles for each held-out row, by the numbers that the guide draws for a row and the number of rows."""
    width = sum(torch.Size(bound.sites[n].shape).numel() for n in bound.guided) / max(bound.rows, 1)
    if width > WIDE_ROW:
        return LEAST_PARTICLES
    tensors = heldout.values() if isinstance(heldout, Mapping) else [heldout]
    rows = max((len(v) for v in tensors if isinstance(v, Tensor) and v.dim()), default=1)
    return max(LEAST_PARTICLES, min(PARTICLES, int(PARTICLE_NUMBERS / max(width * rows, 1))))


def _exact(result: Result, heldout: Any, score: Tensor) -> Tensor | None:
    r"""Log predictive density of each row by Bayes' rule, where the guide is the posterior of any data; else None.

    .. math:: p(x_n \mid D) = \frac{p(x_n \mid \theta)\, p(\theta \mid D)}{p(\theta \mid D, x_n)}

    holds at every :math:`\theta` (the candidate's formula: Besag 1989). That it gives the same at two draws shows that
    the guide is the posterior.

    Args:
        result: The Result.
        heldout: New rows.
        score: Log densities of the rows at the first two draws, (2, rows).
    """
    bound, new = result.bound, result.bound.with_data(heldout)
    guide, together = bound.guide, bound.cut
    if guide is None or result.diagnosis.pareto_k != -math.inf or len(score) < 2 or score.shape[1] > EXACT_ROWS:
        return None
    if not together or not together <= set(new.data):
        return None

    def with_row(k: int) -> dict[str, Any]:
        return {n: torch.cat([bound.data[n], new.data[n][k : k + 1]]) for n in together}

    def density(data: Mapping[str, Any]) -> Tensor:
        draws = ({n: v[k].to(bound.device) for n, v in result.draws.items()} for k in range(2))
        traces = [poutine.trace(poutine.condition(guide, data=d)).get_trace(**data) for d in draws]
        return torch.stack([torch.as_tensor(t.log_prob_sum()).double() for t in traces]).cpu()

    with isolated(), result.state(), torch.no_grad():
        own = density(bound.data)
        try:
            rows = [density({**bound.data, **with_row(k)}) for k in range(score.shape[1])]
        except REFUSALS:
            return None
    values = score + own[:, None] - torch.stack(rows, 1)
    precise = all(v.dtype == torch.float64 for v in result.draws.values() if v.is_floating_point())
    rounding = (1e-8 if precise else 1e-5) * max(1.0, float(own.abs().max()))
    return values[0] if torch.allclose(values[0], values[1], rtol=0, atol=rounding) else None


def _decided_by_few(score: Tensor) -> float:
    """Number of rows whose density, a mean over draws (S, rows), has a Pareto k above 0.7."""
    if len(score) < MIN_DRAWS:
        return math.nan
    return sum(pareto_k(row) > PARETO_K[1] for row in score.mT)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Expected calibration error (Guo et al. 2017): mean over rows of \|confidence - accuracy\|, by confidence bin.

    Args:
        probabilities: Class probabilities (rows, classes).
        labels: Classes (rows,).
        bins: Number of bins of equal width.

    Example:
        >>> round(calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 2)
        0.4
    """
    confidence, guess = probabilities.double().max(-1)
    correct = (guess == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    zero = torch.zeros(bins, dtype=torch.double)
    gap = zero.index_add(0, index, confidence) - zero.index_add(0, index, correct)
    return float(gap.abs().sum() / len(labels))


def truth_scores(result: Result, truth: Moments) -> dict[str, float]:
    """Errors of posterior means and ratios of standard deviations, summarised over all quantities."""
    missing = [n for n in truth if n not in result.draws]
    if missing:
        warnings.warn(f"{result.method} draws no {', '.join(missing)}: not compared with the truth", stacklevel=4)
    errors, ratios = standardised_errors(result, truth)
    if not len(errors):
        return {}
    with np.errstate(divide="ignore"):
        logs = np.log(ratios)
    return {
        "error_max": float(np.abs(errors).max()),
        "error_floor": noise_floor(len(errors), result.size) if ratios.any() else math.nan,
        "error_rms": float(np.sqrt((errors**2).mean())),
        "sd_ratio": float(np.exp(logs.mean())),
        "sd_error": float(np.exp(np.sqrt((logs**2).mean()))),
    }


def noise_floor(quantities: int, draws: int) -> float:
    r"""Median of the largest error that independent exact draws would have, in posterior standard deviations.

    Errors of Q independent means are :math:`N(0, 1/S)`: :math:`\Phi^{-1}((1 + 2^{-1/Q}) / 2) / \sqrt S`.

    Example:
        >>> f"{noise_floor(122, 1000):.3f}"
        '0.087'
    """
    return float(special.ndtri((1 + 0.5 ** (1 / quantities)) / 2) / math.sqrt(draws))


def standardised_errors(result: Result, truth: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Errors of posterior means in true standard deviations, and ratios of standard deviations to the true ones."""
    errors, ratios = [], []
    for name, (mean, sd) in truth.items():
        if name in result.draws:
            draws, mean, sd = result.draws[name].double(), mean.double(), sd.double()
            errors.append(((draws.mean(0) - mean) / sd).flatten())
            ratios.append((draws_sd(draws) / sd).flatten())
    empty = torch.zeros(0, dtype=torch.double)
    return torch.cat([*errors, empty]).numpy(), torch.cat([*ratios, empty]).numpy()


def draws_sd(draws: Tensor) -> Tensor:
    """Standard deviation over draws; zero for a single one, and for equal ones, whose own is 1e-17 by rounding."""
    if len(draws) == 1:
        return torch.zeros_like(draws[0], dtype=torch.double)
    return torch.where((draws != draws[0]).any(0), draws.double().std(0), 0.0)
