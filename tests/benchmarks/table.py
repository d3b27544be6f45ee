"""The records as tables (CSV, markdown, terminal) and as one page of plots."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from . import calls, chains, growth, series, start, svi
from .posteriors import POSTERIORS

SUITES: dict[str, Any] = {
    "svi": svi,
    "chains": chains,
    "growth": growth,
    "start": start,
    "series": series,
    "calls": calls,
}
SAID = {
    "svi": "SVI steps, float32: microseconds a step in steady state (median of the rounds, spread between quartiles), "
    "how many times the rate of Pyro's SVI.step, z-score of the loss at the same parameters against Pyro's, seconds "
    "from a new process through the first 300 losses and 300 steps.",
    "chains": "Posteriors, float64: minimum bulk ESS per second of warm runs, warm-up included, compiling excluded, at "
    "R-hat below 1.01 (else none); `ours/it` is the first row's rate over this one's; seconds from a new process "
    "(cold); largest |z| of all means and sds against a long reference run (of so many z-scores; of 162 independent "
    "ones about 3).",
    "growth": "Microseconds of one leapfrog step of all chains, or of one value and gradient, float64.",
    "start": "Seconds from a new process to a minimum bulk ESS: with empty compiler caches (cold), and the second "
    "process on the caches that the first left (warm). JAX keeps no cache by default.",
    "series": "Time series and Gaussian processes, float64, the first run of a process, compiling included: seconds, "
    "minimum bulk ESS per second, largest R-hat, largest error of a mean against the reference in posterior standard "
    "deviations with the noise floor of that error; NumPyro's NUTS (4 chains of 1,000) beside it.",
    "calls": "Whole calls, float64, 400 draws a chain after 400 of warmup: seconds of the first of a process (cold: "
    "empty caches, imports left out) and of later ones (warm), minimum bulk ESS per second of the call at R-hat below "
    "1.01 (else 0), seconds to a minimum ESS of 1,000 at that rate, and of ours the seconds beyond sampling.",
}
OURS = {"svi": "fit", "chains": "sample(pair, data)", "growth": "ours", "start": "sample(pair, data)"}
RATES = {"svi": ("us/step", True), "chains": ("ess/s", False)}
"""The column that is compared with ours, and whether less is better."""
FOREGROUND, BACKGROUND = "#c0392b", "#7f8c9a"


def tables(records: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    made = {}
    for name, suite in SUITES.items():
        mine = [r for r in records if r["suite"] == name]
        if mine:
            frame = pd.DataFrame(suite.rows(mine))
            made[name] = _against_ours(frame, OURS[name], *RATES[name]) if name in RATES else frame
    return made


def _against_ours(frame: pd.DataFrame, ours: str, column: str, less: bool) -> pd.DataFrame:
    if column not in frame:
        return frame
    base = frame[frame["contender"] == ours].set_index("case")[column]
    ratio = frame["case"].map(base) / frame[column]
    frame.insert(list(frame).index(column) + 1, "ours/it", 1 / ratio if less else ratio)
    return frame


def render(records: list[dict[str, Any]], out: Path) -> str:
    """Write everything into a directory; return the markdown."""
    made = tables(records)
    meta = [r for r in records if r["suite"] == "meta"]
    parts = ["# Benchmarks", *(f"{m['suites']}: {m['machine']}; {m['versions']}" for m in meta[-4:])]
    for name, frame in made.items():
        frame.to_csv(out / f"{name}.csv", index=False)
        shown = frame.drop(columns=["family", "unqualified"], errors="ignore")
        parts += [f"## {name}", SAID[name], markdown(shown)]
    text = "\n\n".join(parts) + "\n"
    (out / "benchmarks.md").write_text(text)
    plot(made, out / "benchmarks.png")
    return text


def markdown(frame: pd.DataFrame) -> str:
    lines = [list(map(str, frame.columns)), *([_cell(v) for v in row] for row in frame.itertuples(index=False))]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(made: dict[str, pd.DataFrame], path: Path) -> None:
    """One page: a row of panels for each suite, bars and lines on logarithmic scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn: dict[str, Callable[..., None]] = {"svi": _svi, "chains": _chains, "growth": _growth, "start": _start}
    rows = [n for n in drawn if n in made and _panels(n, made[n])]
    if not rows:
        return
    page = plt.figure(figsize=(19, 3.9 * len(rows)), layout="constrained")
    for name, strip in zip(rows, page.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
        keys = _panels(name, made[name])
        for axis, key in zip(strip.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            drawn[name](axis, key, made[name])
        strip.suptitle(HEADS[name], x=0.01, ha="left", fontsize=13, fontweight="bold")
    page.savefig(path, dpi=110)
    plt.close(page)


HEADS = {
    "svi": "SVI steps per second (more is better)",
    "chains": "Minimum bulk ESS per second, warm, the best setting of each sampler (more is better; hollow: R-hat "
    "above 1.01, does not count)",
    "growth": "Growth of the cost of a gradient, microseconds (less is better)",
    "start": "Seconds from a new process to a minimum ESS (less is better; dark: disk cache warm, light: cold)",
}


def _panels(name: str, frame: pd.DataFrame) -> list[Any]:
    value = {"svi": "us/step", "chains": "unqualified", "growth": "us", "start": "warm"}[name]
    if value not in frame:
        return []
    good = frame[frame[value].notna()]
    if name == "start":
        return sorted(set(zip(good["case"], good["target"], strict=True)))
    order = {"svi": svi.CASES, "chains": POSTERIORS, "growth": growth.AXES}[name]
    return [case for case in order if case in set(good["case"])]


def _bars(axis: Any, labels: list[str], values: list[float], mine: list[bool], title: str, **style: Any) -> None:
    colours = [FOREGROUND if m else BACKGROUND for m in mine]
    filled = style.get("filled", [True] * len(values))
    faces = [c if f else "none" for c, f in zip(colours, filled, strict=True)]
    places = range(len(values))
    axis.barh(places, values, color=faces, edgecolor=colours, height=0.7)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 3, max(values) * 6)
    for place, value in zip(places, values, strict=True):
        axis.text(value * 1.08, place, f" {_cell(value)}", va="center", fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _svi(axis: Any, case: str, frame: pd.DataFrame) -> None:
    part = frame[(frame["case"] == case) & frame["us/step"].notna()]
    names = part["contender"].tolist()
    _bars(axis, names, part["steps/s"].tolist(), [n == OURS["svi"] for n in names], svi.CASES[case].title)


def _chains(axis: Any, case: str, frame: pd.DataFrame) -> None:
    part = frame[(frame["case"] == case) & frame["unqualified"].notna()].copy()
    # A run that does not count stands for its family only where none counts.
    part["score"] = part["ess/s"].fillna(0) * 1e9 + part["unqualified"]
    best = part.loc[part.groupby("family", sort=False)["score"].idxmax()]
    names = best["contender"].tolist()
    title = POSTERIORS[case].title
    mine = [f.startswith("ours") for f in best["family"]]
    _bars(axis, names, best["unqualified"].tolist(), mine, title, filled=best["ess/s"].notna().tolist())


def _growth(axis: Any, case: str, frame: pd.DataFrame) -> None:
    part = frame[(frame["case"] == case) & frame["us"].notna()]
    for name, line in part.groupby("contender", sort=False):
        colour = FOREGROUND if name == OURS["growth"] else BACKGROUND
        axis.plot(line["size"], line["us"], "o-", color=colour, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(case)
    axis.set_title(growth.TITLES[case], fontsize=10)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _start(axis: Any, key: tuple[str, int], frame: pd.DataFrame) -> None:
    case, target = key
    part = frame[(frame["case"] == case) & (frame["target"] == target) & frame["warm"].notna()]
    names = part["contender"].tolist()
    mine = [f.startswith("ours") for f in part["family"]]
    colours = [FOREGROUND if m else BACKGROUND for m in mine]
    axis.barh(range(len(part)), part["cold"], color=colours, alpha=0.3, height=0.7)
    title = f"{POSTERIORS[case].title}, ESS {target:,}"
    _bars(axis, names, part["warm"].tolist(), mine, title)
    axis.set_xlim(part["warm"].min() / 2, part[["warm", "cold"]].to_numpy().max() * 2)
