"""What a page is made of: sections of text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from inference.core.checks import reason_of
from inference.core.lazy import pd


@dataclass(frozen=True)
class Figure:
    """A figure with its text alternative.

    Attributes:
        title: What it shows.
        alt: Text alternative, with the numbers that a reader would take from it.
        image: Inline SVG, or an ``img`` with a data URI.
        note: How to read it; empty if it needs no words.
        wide: Whether it takes the whole width of the page.
    """

    title: str
    alt: str
    image: str
    note: str = ""
    wide: bool = False
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Figures:
    """Figures side by side, as many as the width allows."""

    figures: Sequence[Figure]
    kind: str = field(default="figures", init=False)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the value that it is sorted by, and its class (``good``, ``bad`` or empty)."""

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table that a click on a column sorts.

    Attributes:
        columns: Names of the columns.
        rows: Cells, line by line.
        caption: What it shows.
        meanings: What columns mean, by name.
        prose: Whether its columns hold sentences, which wrap.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    meanings: Sequence[tuple[str, str]] = ()
    prose: bool = False
    kind: str = field(default="table", init=False)

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers, which are set flush right."""
        cells = [row[column] for row in self.rows]
        return any(c.value is not None for c in cells) and all(c.value is not None or c.text == "–" for c in cells)


@dataclass(frozen=True)
class Text:
    """A paragraph of HTML, of a class (``advice``, ``note``, ``code`` or empty)."""

    html: str
    style: str = ""
    kind: str = field(default="text", init=False)


Block = Figure | Figures | Table | Text


@dataclass(frozen=True)
class Section:
    """A section of the page, with an anchor."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def section(anchor: str, title: str, make: Callable[[], Iterable[Block]]) -> Section:
    """A section; where it cannot be made, a sentence that says why."""
    try:
        return Section(anchor, title, list(make()))
    except Exception as error:
        # Any failure: the rest of the page is worth having.
        return Section(anchor, title, [note(f"Left out: {reason_of(error, 300)}.")])


def note(text: str, style: str = "note") -> Text:
    """A paragraph of plain text."""
    return Text(escape(text), style)


def cell(value: Any, mark: str = "") -> Cell:
    """A cell of text, or of a number with four digits."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
        return Cell(escape(str(value)), None, mark)
    return Cell(number(float(value)), None if math.isnan(value) else float(value), mark)


def number(value: float) -> str:
    """A number with four digits, with a true minus sign.

    Example:
        >>> number(0.00012345), number(-3.0), number(float("nan"))
        ('1.234e-04', '−3', '–')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if (value == round(value) and size < 1e7) or 1e4 <= size < 1e6:
        text = f"{value:,.0f}" if size >= 1e4 else f"{value:.0f}"
    elif size < 1e-3 or size >= 1e6:
        text = f"{value:.3e}"
    else:
        text = f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def frame(table: pd.DataFrame, *, caption: str = "", meanings: Sequence[tuple[str, str]] = ()) -> Table:
    """A data frame, its index as the first column."""
    rows = [[cell(name), *map(cell, line)] for name, line in zip(table.index, table.to_numpy(), strict=True)]
    return Table([str(table.index.name or ""), *map(str, table.columns)], rows, caption, meanings)
