"""What the commands print and write of a Result, and whether it is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from inference import Comparison, Result, stem_of
from ppl_models.commands.printing import FAILED, INTERRUPTED, complain, out, print_summary
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entry import Entry


def unfit(result: Result) -> str:
    """Why the result of a fit is none: it ended early, or its loss is higher than at the start; empty if it is one."""
    if result.ended:
        return result.ended
    if result.loss_rise is None:
        return ""
    first, last = result.loss_rise
    return f"diverged: its loss went from {first:.4g} to {last:.4g}; try a lower learning rate"


def check_whole(result: Result) -> None:
    """End the command where the fit is none; an interrupted one with the code of an interrupt."""
    if problem := unfit(result):
        complain(f"the fit {problem}")
        raise typer.Exit(INTERRUPTED if result.interrupted else FAILED)


def report(result: Result, folder: Path, name: str, about: dict[str, Any]) -> None:
    """Print a Result, and write it to a folder of its own."""
    print_summary(result.summary())
    out.print(escape(str(result)), highlight=False)
    stem = stem_of(name) + ("-partial" if unfit(result) else "")
    out.print(f"[dim]{result.save(folder / stem, about)}[/]", highlight=False, soft_wrap=True)


def say_page(made: Result | Comparison, folder: Path, about: dict[str, Any], entry: Entry, dataset: Dataset) -> None:
    """Write the page of a Result or a comparison, and say where it stands."""
    told = {"title": entry.title, **about}
    path = made.report(folder / "report.html", about=told, shape=dataset.shape)
    out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)
