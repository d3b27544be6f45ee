"""The diagnosis of a Result: what the diagnostics say, what they mean and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from inference.core.lazy import pd, xr
from inference.diagnostics.chains import ESS_CHAINS, ESS_PER_CHAIN
from inference.diagnostics.convergence import Diagnosis
from inference.diagnostics.guides import PARETO_K
from inference.report import plots
from inference.report.asked import Reported, is_chains
from inference.report.blocks import Block, Cell, Table, cell, frame, note

LATENTS = 200
"""Lines of the table of latent dimensions."""


def diagnosis(result: Reported) -> Iterator[Block]:
    """What the diagnostics say, what they mean and what to do."""
    found = result.diagnosis
    for sentence in found.advice:
        yield note(sentence, "advice")
    for what in found.unjudged:
        yield note(f"Not judged: {what}.", "advice")
    rows = _chain_rows(result) if is_chains(result) else _guide_rows(result)
    if not found.advice and not found.unjudged:
        yield note("No warning: every check below passes." if rows else "No warning.", "fine")
    if not rows:
        yield note("There is no posterior to judge: see the samples, and the measures of held-out rows.")
    else:
        yield Table(["check", "value", "wanted", "what it means", "what to do if it fails"], rows, prose=True)
    if found.latent_kl is not None:
        table = found.latent_kl.head(LATENTS)
        meanings = [("kl", "nats per row of the guide from the prior"), ("active", "variance of its mean above 0.01")]
        yield frame(table, caption="Information in each dimension of the latent sites", meanings=meanings)


def _row(name: str, value: float, wanted: str, good: bool | None, means: str, remedy: str) -> list[Cell]:
    return [cell(name), cell(value, {True: "good", False: "bad", None: ""}[good]), *map(cell, (wanted, means, remedy))]


def _chain_rows(result: Reported) -> list[list[Cell]]:
    found, group = result.diagnosis, result.groups["sample_stats"]
    return [*_agreement(found, group), *_sizes(found.table, group), *_transitions(found, group)]


def _agreement(found: Diagnosis, group: xr.Dataset) -> Iterator[list[Cell]]:
    if not math.isnan(found.worst_r_hat):
        yield _row(
            "R-hat",
            found.worst_r_hat,
            "about 1.01" if group.sizes["chain"] <= ESS_CHAINS else "about 1.01, more for many short chains",
            found.converged,
            "Spread of all draws over the spread within chains, of the worst quantity: whether the chains agree.",
            "A longer warmup and more draws; look for several modes.",
        )


def _sizes(table: pd.DataFrame, group: xr.Dataset) -> Iterator[list[Cell]]:
    wanted, remedy = (
        ESS_PER_CHAIN * min(group.sizes["chain"], ESS_CHAINS),
        "More draws; reparameterise correlated sites.",
    )
    of_centre = "Independent draws that would tell the centre of the worst quantity as well."
    of_tails = "The same for its 5 % and 95 % quantiles."
    for name, title, means in (
        ("ess_bulk", "Effective sample size", of_centre),
        ("ess_tail", "Effective sample size, tails", of_tails),
    ):
        moving = table.loc[table["sd"] != 0, name].dropna() if name in table else pd.Series(dtype=float)
        if len(moving):
            least = float(moving.min())
            yield _row(title, least, f"{wanted} or more", least >= wanted, means, remedy)


def _transitions(found: Diagnosis, group: xr.Dataset) -> Iterator[list[Cell]]:
    if found.divergences is not None:
        yield _row(
            "Divergent transitions",
            found.divergences,
            f"0 of {group.sizes['chain'] * group.sizes['draw']:,}",
            found.divergences == 0,
            "Trajectories that left the region where the integrator is exact: parts of the posterior are missed.",
            "Raise target_accept_prob; use a non-centred parameterisation.",
        )
    if "energy" in group:
        worst = float(np.nanmin(plots.bfmi(group["energy"].values)))
        means = "How much of the energy's spread one new momentum covers, of the worst chain."
        yield _row("E-BFMI", worst, "0.3 or more", worst >= 0.3, means, "Reparameterise heavy tails and funnels.")
    if "acceptance_rate" in group:
        rate = float(group["acceptance_rate"].mean())
        means = "Mean acceptance of proposals."
        yield _row("Acceptance", rate, "0.6 to 0.95", None, means, "A longer warmup, if it is far outside.")


def _guide_rows(result: Reported) -> list[list[Cell]]:
    found, rows = result.diagnosis, []
    if found.pareto_k is not None:
        rows.append(
            _row(
                "Pareto k",
                found.pareto_k,
                "0.7 or less",
                found.pareto_k <= PARETO_K[1],
                "Tail of the importance weights of the guide's draws: how far the guide is from the posterior.",
                "A richer guide (full covariances where it has none, a flow), or sample().",
            )
        )
    if found.effective is not None:
        rows.append(
            _row(
                "Effective share of weights",
                found.effective,
                "near 1",
                None,
                "Share of the draws that would be left after weighting them to the posterior.",
                "A richer guide; compare the weighted moments.",
            )
        )
    return rows
