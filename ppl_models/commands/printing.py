"""What the commands print: tables, warnings and errors of one line each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed, an argument is wrong, Ctrl-C."""

out = Console()
err = Console(stderr=True)


def announce(work: str) -> None:
    """Say what is about to be done, so that a long run is not silent where it is logged."""
    out.print(f"[dim]{escape(work)}[/]", highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    err.print(f"[red]error:[/] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)


@contextmanager
def one_line(context: typer.Context) -> Iterator[None]:
    """Print errors and warnings as one line each on standard error; errors exit with their code.

    An error that names an option or argument of the command is one of usage.
    """

    def show(message: Any, *_: Any, **__: Any) -> None:
        err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)

    options = {o.lstrip("-").replace("-", "_"): o for p in context.command.params for o in p.opts}
    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except typer.Exit:  # a RuntimeError
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
            name, colon, rest = str(error).partition(":")
            misused = isinstance(error, ValueError | TypeError) and name in options
            complain(f"{options[name]}{colon}{rest}" if misused else str(error) or type(error).__name__)
            raise typer.Exit(MISUSED if misused else FAILED) from None


def print_summary(table: pd.DataFrame) -> None:
    """The first rows of a table of quantities, and how many more there are."""
    shown = table.head(20)
    if len(shown):
        print_whole(frame(shown.reset_index()))
    if len(table) > len(shown):
        out.print(f"[dim]... and {len(table) - len(shown)} more quantities in the file[/]")


def print_whole(table: Table) -> None:
    """Print a table in full, even where its lines are longer than the terminal's."""
    shown = Console(width=max(out.width, out.measure(table, options=out.options.update(max_width=1000)).maximum))
    shown.print(table)


def frame(table: pd.DataFrame) -> Table:
    shown = Table(box=None, pad_edge=False)
    for k, column in enumerate(table.columns):
        shown.add_column(str(column), justify="left" if k == 0 else "right", no_wrap=True)
    for row in table.itertuples(index=False):
        shown.add_row(*(cell(v) for v in row))
    return shown


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
