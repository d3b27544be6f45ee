"""The command line: ``ppl-models list | fit | sample | compare | reproduce``."""

from __future__ import annotations

import difflib
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import inference
from inference import COLUMNS, Comparison, Method, Result
from ppl_models import data, ledger
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entries import ZOO, find
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.pictures import save

app = typer.Typer(
    help="A model zoo on Pyro: fit, sample and compare model/guide pairs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


out = Console()


err = Console(stderr=True)


PairName = Annotated[str, typer.Argument(metavar="PAIR", help="A pair of the zoo; `ppl-models list` shows them.")]


DataName = Annotated[str | None, typer.Option("--data", help="A data set by name; default: the pair's own.")]


OutDir = Annotated[Path | None, typer.Option("--out", help="Output directory; default: results/PAIR-DATA.")]


Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]


@contextmanager
def _one_line() -> Iterator[None]:
    """Print errors and warnings as one line each on standard error; errors exit with code 1."""

    def show(message: Any, *_: Any, **__: Any) -> None:
        err.print(f"[yellow]warning:[/] {escape(str(message))}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("once", UserWarning)
        warnings.showwarning = show
        try:
            yield
        except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
            err.print(f"[red]error:[/] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


@app.command("list")
def list_() -> None:
    """List the pairs of the zoo with their data sets and methods."""
    table = Table("pair", "what", "data", "methods", box=None, pad_edge=False)
    for entry in ZOO.values():
        table.add_row(entry.name, entry.title, ", ".join((entry.data, *entry.also)), ", ".join(entry.methods))
    _print_whole(table)


@app.command()
def fit(
    pair: PairName,
    data_name: DataName = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimisation steps; default: the pair's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Minibatch size; default: the pair's, often all rows.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Initial learning rate of the schedule; default: the pair's.")
    ] = None,
    draws: Annotated[int, typer.Option(min=4, help="Posterior draws to keep.")] = 1000,
    seed: Seed = 0,
    out_dir: OutDir = None,
) -> None:
    """Fit a pair by its own objective: variational inference, maximum likelihood or adversarial training."""
    with _one_line():
        entry, dataset, folder = _prepare(pair, data_name, out_dir)
        model = entry.pair(dataset)
        options = {"steps": steps, "batch": batch, "learning_rate": learning_rate}
        chosen = {name: value for name, value in options.items() if value is not None}
        result = entry.fit(model, dataset.train, draws=draws, seed=seed, **chosen)
        _report(result, folder)
        if entry.report:
            _print_whole(_frame(entry.report(model, dataset.test)))
        for path in save(model, dataset.test, dataset.shape, folder) if dataset.shape else ():
            out.print(f"[dim]{path}[/]", highlight=False)


@app.command()
def sample(
    pair: PairName,
    data_name: DataName = None,
    draws: Annotated[int | None, typer.Option(min=4, help="Draws per chain; default: the kernel's.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Warmup draws per chain; default: the kernel's.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Number of chains; default: the kernel's.")] = None,
    kernel: Annotated[str | None, typer.Option(help="ChEES, Gibbs, NUTS or HMC; default: chosen by the model.")] = None,
    seed: Seed = 0,
    out_dir: OutDir = None,
) -> None:
    """Sample a pair's posterior by Markov chains."""
    with _one_line():
        kernels = {n.lower(): n for n in inference.kernels.__all__}
        named = kernel and kernels.get(kernel.lower(), kernel)
        factory = getattr(inference.kernels, _known("kernel", named, inference.kernels.__all__)) if named else None
        entry, dataset, folder = _prepare(pair, data_name, out_dir)
        result = inference.sample(
            entry.pair(dataset), dataset.train, factory, draws=draws, warmup=warmup, chains=chains, seed=seed
        )
        _report(result, folder)


@app.command()
def compare(
    pair: PairName,
    data_name: DataName = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; default: all of the pair.")] = None,
    seed: Seed = 0,
    out_dir: OutDir = None,
) -> None:
    """Compare several methods on one pair: a table, a plot and one ArviZ file per method."""
    with _one_line():
        entry = find(pair)
        names = methods.split(",") if methods else list(entry.methods)
        chosen = {name: entry.methods[_known("method", name, entry.methods)] for name in names}
        entry, dataset, folder = _prepare(pair, data_name, out_dir)
        seeded: dict[str, Method] = {name: partial(method, seed=seed) for name, method in chosen.items()}
        comparison = entry.compare(dataset, seeded, seed=seed)
        _show(comparison, entry, dataset)
        for path in comparison.save(folder):
            out.print(f"[dim]{path}[/]", highlight=False)


@app.command()
def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; omit to list them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A size for tests, seconds instead of hours.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: the recipe's.")] = None,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory of the records.")] = Path("results/ledger"),
) -> None:
    """Reproduce a published figure and append the result to a ledger."""
    with _one_line():
        if name is None:
            for recipe in ledger.RECIPES.values():
                out.print(f"{recipe.name}: {recipe.title}, {recipe.protocol}", highlight=False, soft_wrap=True)
            return
        recipe = ledger.RECIPES[_known("recipe", name, ledger.RECIPES)]
        _check_writable(out_dir)
        record = ledger.reproduce(recipe, out_dir, quick=quick, seeds=seeds)
        out.print(f"[bold]{recipe.name}[/]: {recipe.title}; {recipe.protocol}", highlight=False, soft_wrap=True)
        error = record["standard_error"]
        margin = "" if error is None else f" ± {error:.2f} over {record['seeds']} seeds"
        shown = Table(box=None, pad_edge=False, show_header=False)
        shown.add_row("obtained" + (" (quick: not comparable)" if quick else ""), f"{record['figure']:.2f}{margin}")
        shown.add_row("published", f"{recipe.known}, {recipe.origin}")
        for what, values in record["details"].items():
            if what != "figure":
                shown.add_row(what, ", ".join(f"{v:.2f}" for v in values))
        shown.add_row("seconds", f"{record['seconds']:.0f}")
        _print_whole(shown)
        out.print(f"[dim]{out_dir / (recipe.name + '.jsonl')}[/]", highlight=False, soft_wrap=True)


def _prepare(pair: str, data_name: str | None, out_dir: Path | None) -> tuple[Entry, Dataset, Path]:
    """Look up names and check the output directory, so that errors come before any work is done."""
    entry = find(pair)
    if data_name is not None:
        _known("data", data_name, data.names())
    folder = out_dir or Path("results") / f"{entry.name}-{data_name or entry.data}"
    _check_writable(folder)
    return entry, entry.load(data_name), folder


def _known(what: str, name: str, known: Any) -> str:
    if name in known:
        return name
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"{what}: unknown {name!r}; {hint}known: {', '.join(known)}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror}") from None


def _report(result: Result, folder: Path) -> None:
    table = result.summary()
    shown = table.head(20)
    if len(shown):
        _print_whole(_frame(shown.reset_index()))
    if len(table) > len(shown):
        out.print(f"[dim]... and {len(table) - len(shown)} more quantities in the file[/]")
    out.print(escape(str(result)), highlight=False)
    path = folder / f"{result.method.split()[0].lower()}.nc"
    if result.idata.groups():
        result.idata.to_netcdf(str(path))
    else:
        path = path.with_suffix(".csv")
        columns = ["guide", "model"] if result.losses.ndim > 1 else ["loss"]
        pd.DataFrame(result.losses, columns=columns).to_csv(path, index_label="step")
    out.print(f"[dim]{path}[/]", highlight=False)


def _show(comparison: Comparison, entry: Entry, dataset: Dataset) -> None:
    table = comparison.table.dropna(axis=1, how="all")
    rows = len(next(iter(dataset.train.values())))
    out.print(f"[bold]{entry.title}[/] on {dataset.name}: {rows} rows", highlight=False)
    # One column per method: there are too many measures for the width of a terminal.
    _print_whole(_frame(table.T.rename_axis("measure").reset_index()))
    for column in table.columns:
        out.print(f"[dim]{column:14}{COLUMNS[column]}[/]", highlight=False)
    if comparison.truth:
        out.print(f"[dim]{'truth':14}{entry.source}[/]", highlight=False)
    for name, result in comparison.results.items():
        for sentence in result.diagnosis.advice:
            out.print(escape(f"{name}: {sentence}"), highlight=False)


def _frame(table: pd.DataFrame) -> Table:
    shown = Table(box=None, pad_edge=False)
    for k, column in enumerate(table.columns):
        shown.add_column(str(column), justify="left" if k == 0 else "right", no_wrap=True)
    for row in table.itertuples(index=False):
        shown.add_row(*(_cell(v) for v in row))
    return shown


def _print_whole(table: Table) -> None:
    """Print a table in full, even where its lines are longer than the terminal's."""
    shown = Console(width=max(out.width, out.measure(table, options=out.options.update(max_width=1000)).maximum))
    shown.print(table)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    if math.isnan(value):
        return "-"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def main() -> None:
    """Entry point of ``python -m ppl_models``."""
    sys.exit(app())
