"""Pictures of the zoo: ``python -m docs.cards`` fits the entries whose picture is missing or old.

Each entry is fitted to its default data by its first method. Its picture shows images that the pair makes, or codes of
the rows, or intervals of its parameters; it is kept in docs/static/zoo, and beside it the SHA-256 of the file of the
pair's class. ``python -m docs.cards NAME ...`` fits those entries in any case.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.figures import ROOT, shrink
from inference import Result, write_whole
from ppl_models import ZOO, Dataset, Entry, Pair, load
from ppl_models.zoo.pictures import show

CARDS = ROOT / "docs" / "static" / "zoo"
LARGEST = 40_000
"""Bytes of a picture, at most."""
LINES = 18
"""Quantities in a plot of intervals."""


def class_of(entry: Entry) -> type:
    """The class of an entry's pair."""
    return getattr(entry.make, "__self__", entry.make)


def picture_of(entry: Entry) -> Path:
    """Where the picture of an entry is kept."""
    return CARDS / f"{entry.name}.png"


def digest(entry: Entry) -> str:
    """The SHA-256 of the file of the pair's class."""
    return hashlib.sha256(Path(inspect.getfile(class_of(entry))).read_bytes()).hexdigest()


def current(entry: Entry) -> bool:
    """Whether the picture of an entry is there, and was made by the class as it is now."""
    record = CARDS / f"{entry.name}.json"
    return picture_of(entry).exists() and record.exists() and json.loads(record.read_text())["class"] == digest(entry)


def draw(entry: Entry, data: Dataset, made: Any, result: Result) -> Figure:
    """What a fitted pair makes, or what is known of its parameters."""
    fitted: Any = result.bound.pair
    pair = fitted if isinstance(fitted, Pair) else made
    with torch.no_grad(), result.state():
        grids = pair.pictures(**data.train) if data.shape and hasattr(pair, "pictures") else {}
    codes = next((v.mean(0) for v in result.draws.values() if v.dim() == 3 and v.shape[-1] == 2), None)
    if grids:
        images, title = grids.get("samples") or next(iter(grids.values()))
        rows, columns, _ = images.shape
        figure = Figure(figsize=(5, 5 * rows / columns * data.shape[0] / data.shape[1] + 0.4), layout="constrained")
        show(axes := figure.subplots(), images, data.shape)
    elif codes is not None and "y" not in data.train and len(codes) == len(data.train.get("x", ())):
        figure, title = Figure(figsize=(4.6, 3.4), layout="constrained"), "codes of the rows, by class"
        scatter(axes := figure.subplots(), codes, entry)
    else:
        table = result.summary()
        count = min(LINES, len(table))
        matrix = next((p for p in pair.parameters() if p.dim() == 2), None)
        figure = Figure(figsize=(5, 0.7 + 0.22 * max(count, 5) if count else 5.4), layout="constrained")
        axes = figure.subplots()
        title = intervals(axes, table) if count or matrix is None else heat(axes, pair, matrix)
    axes.set_title("")
    figure.suptitle(f"{data.name}, {next(iter(entry.fits))}:\n{title}", fontsize=9, x=0.01, ha="left")
    return figure


def scatter(axes: Axes, codes: torch.Tensor, entry: Entry) -> None:
    """Codes of rows in the plane, in the colours of their labels, which the pair has not seen."""
    whole = load(entry.data)
    for k, label in enumerate(whole.classes):
        across, up = codes[whole.train["y"] == k].cpu().numpy().T
        axes.scatter(across, up, s=9, label=label)
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="factor 1", ylabel="factor 2")
    axes.spines[["top", "right"]].set_visible(False)


def intervals(axes: Axes, table: Any) -> str:
    """Means and 89 % intervals of quantities, evenly spaced among all."""
    some = table.iloc[np.linspace(0, len(table) - 1, min(LINES, len(table))).round().astype(int)]
    places = np.arange(len(some))
    low, high = (some[f"eti89_{end}"].to_numpy() for end in ("lb", "ub"))
    axes.hlines(places, low, high, color="C0", lw=2)
    axes.plot(some["mean"], places, "o", color="C0", ms=4)
    axes.set_yticks(places, [n if len(n) < 34 else f"{n[:33]}…" for n in some.index], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    point = bool(np.all(low == high))
    every = f"{len(some)} of {len(table):,} quantities" if len(some) < len(table) else "all quantities"
    return f"{'estimates' if point else 'means and 89 % intervals'} of {every}"


def heat(axes: Axes, pair: Any, matrix: torch.Tensor) -> str:
    """Probabilities of the next state, one line per state: the softmax of a parameter."""
    chances = matrix.detach().softmax(-1).cpu().numpy()
    axes.imshow(chances**0.5, cmap="Blues", aspect="equal")
    names = next((v for v in pair.coords.values() if len(v) == len(chances)), [])
    places = [k for k, name in enumerate(names) if len(name) == 1 and name.strip()]
    axes.set_xticks(places, [names[k] for k in places], fontsize=5)
    axes.set_yticks(places, [names[k] for k in places], fontsize=5)
    return "probability (its root) of each next letter, a line per letter"


def run(entry: Entry) -> None:
    """Fit an entry, and keep its picture."""
    digested, data = digest(entry), entry.load()
    torch.manual_seed(0)
    pair = entry.pair(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = entry.fit(pair, data.train, seed=0)
        figure = draw(entry, data, pair, result)
    with tempfile.TemporaryDirectory() as folder:
        figure.savefig(Path(folder) / "card.png", dpi=110)
        shrink(Path(folder) / "card.png", picture_of(entry), LARGEST)
    record = json.dumps({"class": digested}) + "\n"
    write_whole(CARDS / f"{entry.name}.json", lambda p: p.write_text(record, encoding="utf8"))


def main(names: list[str]) -> int:
    """Fit the entries that are named, or else those whose picture is not current."""
    if unknown := [n for n in names if n not in ZOO]:
        sys.exit(f"cards: expected names of entries ({', '.join(ZOO)}), got {', '.join(unknown)}")
    CARDS.mkdir(parents=True, exist_ok=True)
    for entry in [ZOO[n] for n in names] or [e for e in ZOO.values() if not current(e)]:
        print(f"--- {entry.name}", flush=True)
        run(entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
