"""The command line: ``ppl-models list | fit | sample | compare | show | predict | reproduce``."""

from __future__ import annotations

import difflib
import math
import shlex
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import inference
from inference import COLUMNS, Comparison, Method, Result, Saved, isolated, stem_of, write_whole
from ppl_models import data, ledger
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entries import ZOO, find
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import settings
from ppl_models.zoo.pictures import save
from ppl_models.zoo.restore import opened

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: the work failed, an argument is wrong, Ctrl-C."""


class _OneLine(TyperGroup):
    """Commands that answer a wrong argument by one line on standard error, without the usage above it."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("standalone_mode", True):
            return super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        try:
            sys.exit(super().main(*args, standalone_mode=False, **kwargs) or 0)  # type: ignore[misc]
        except Exception as error:
            # The classes of these errors are Typer's own, or in older versions click's.
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ != "NoArgsIsHelpError":
                _complain(error.format_message())
            sys.exit(MISUSED)


app = typer.Typer(
    cls=_OneLine,
    help="A model zoo on Pyro: fit, sample and compare model/guide pairs.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


out = Console()


err = Console(stderr=True)


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"expected a positive number, got {value}")
    return value


PairName = Annotated[str, typer.Argument(metavar="PAIR", help="A pair of the zoo; `ppl-models list` shows them.")]


DataName = Annotated[str | None, typer.Option("--data", help="A data set by name; default: the pair's own.")]


OutDir = Annotated[str | None, typer.Option("--out", help="Output directory; default: results/PAIR-DATA.")]


Device = Annotated[str, typer.Option("--device", help="Where to run, such as cuda.")]


Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", help="Folder from which the same command goes on if it was killed; renewed every half minute."
    ),
]


Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all randomness.")]


def _complain(text: str) -> None:
    err.print(f"[red]error:[/] {escape(' '.join(text.split()))}", highlight=False, soft_wrap=True)


@contextmanager
def _one_line(context: typer.Context) -> Iterator[None]:
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
            _complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
            name, colon, rest = str(error).partition(":")
            misused = isinstance(error, ValueError | TypeError) and name in options
            _complain(f"{options[name]}{colon}{rest}" if misused else str(error) or type(error).__name__)
            raise typer.Exit(MISUSED if misused else FAILED) from None


@app.command("list")
def list_() -> None:
    """List the pairs of the zoo with their data sets and methods; the first data set and method are the default."""
    table = Table("pair", "what", "data", "methods", box=None, pad_edge=False)
    for entry in ZOO.values():
        table.add_row(entry.name, entry.title, ", ".join((entry.data, *entry.also)), ", ".join(entry.methods))
    _print_whole(table)


@app.command()
def fit(
    context: typer.Context,
    pair: PairName,
    data_name: DataName = None,
    method: Annotated[str | None, typer.Option(help="A method of the pair; default: the first of the list.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimisation steps; default: the method's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Minibatch size; default: the method's.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(callback=_positive, help="Initial learning rate of the schedule; default: the method's."),
    ] = None,
    draws: Annotated[int | None, typer.Option(min=4, help="Posterior draws to keep; default: the method's.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
) -> None:
    """Fit a pair by a method of its own: exact, variational, maximum likelihood or adversarial.

    A fit that was interrupted is written as partial (exit code 130), and so is one that ended or stayed where the loss
    is not finite or higher than at the start (exit code 1).
    """
    with _one_line(context):
        entry = find(pair)
        name = next(iter(entry.fits)) if method is None else _named("method", method, entry.methods)
        if name not in entry.fits:
            raise ValueError(f"method: expected {' or '.join(entry.fits)}, got chains, {name}; use ppl-models sample")
        options: dict[str, Any] = {"steps": steps, "batch": batch, "learning_rate": learning_rate, "draws": draws}
        options["checkpoint"] = checkpoint
        chosen = _taken(name, entry.fits[name], {n: v for n, v in options.items() if v is not None})
        dataset, folder = _prepare(entry, data_name, out_dir, device)
        with isolated(seed):
            model = entry.pair(dataset)
        result = entry.fits[name](model, dataset.train, seed=seed, **chosen)
        _report(result, folder, name, _about(entry, dataset, name, seed))
        _check_whole(result)
        if entry.report:
            _print_whole(_frame(entry.report(model, dataset.test)))
        for path in save(model, dataset.test, dataset.shape, folder) if dataset.shape else ():
            out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)


@app.command()
def sample(
    context: typer.Context,
    pair: PairName,
    data_name: DataName = None,
    draws: Annotated[int | None, typer.Option(min=4, help="Draws per chain; default: the kernel's.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Warmup draws per chain; default: the kernel's.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Number of chains; default: the kernel's.")] = None,
    kernel: Annotated[str | None, typer.Option(help="ChEES, Gibbs, NUTS or HMC; default: chosen by the model.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
) -> None:
    """Sample a pair's posterior by Markov chains."""
    with _one_line(context):
        entry = find(pair)
        named = None if kernel is None else _named("kernel", kernel, inference.kernels.__all__)
        dataset, folder = _prepare(entry, data_name, out_dir, device)
        with isolated(seed):
            model = entry.pair(dataset)
        factory = None if named is None else getattr(inference.kernels, named)
        chosen: dict[str, Any] = {"draws": draws, "warmup": warmup, "chains": chains, "checkpoint": checkpoint}
        result = inference.sample(model, dataset.train, factory, seed=seed, **chosen)
        _report(result, folder, result.method, _about(entry, dataset, "chains", seed))
        _check_whole(result)


@app.command()
def compare(
    context: typer.Context,
    pair: PairName,
    data_name: DataName = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; default: all of the pair.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
) -> None:
    """Compare several methods on one pair: a table, a plot and a folder per method.

    Where a method fails, or its fit ends early, the others are shown and written, and the exit code is 1.
    """
    with _one_line(context):
        entry = find(pair)
        asked = list(entry.methods) if methods is None else methods.split(",")
        names = list(dict.fromkeys(_named("methods", name.strip(), entry.methods) for name in asked))
        dataset, folder = _prepare(entry, data_name, out_dir, device)
        seeded: dict[str, Method] = {name: partial(entry.methods[name], seed=seed) for name in names}
        comparison = entry.compare(dataset, seeded, seed=seed, checkpoint=checkpoint)
        _show(comparison, entry, dataset)
        for path in comparison.save(folder, lambda name: _about(entry, dataset, name, seed)):
            out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)
        failed = [n for n in names if n not in comparison.results or _unfit(comparison.results[n])]
        if failed:
            raise RuntimeError(f"failed: {', '.join(failed)}")


@app.command()
def show(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that a command has written.")],
) -> None:
    """Show what a folder holds: each Result in it, how it was made, its summary and its diagnosis."""
    with _one_line(context):
        for path in Saved.below(folder):
            saved = Saved.read(path)
            shown = Table(box=None, pad_edge=False, show_header=False)
            total = sum(saved.seconds.values())
            took = ", ".join(f"{n} {v:.1f}" for n, v in saved.seconds.items())
            steps, draws = len(saved.tensors["losses"]), next((len(v) for v in saved.part("draws").values()), 0)
            made = {"steps": steps, "draws": draws}
            rows = {"pair": saved.name, **saved.about, "method": saved.method, **{n: v for n, v in made.items() if v}}
            for what, value in {**rows, "seconds": f"{total:.1f} ({took})", **saved.versions}.items():
                shown.add_row(what, escape(str(value)))
            out.print(f"[bold]{escape(str(path))}[/]", highlight=False, soft_wrap=True)
            _print_whole(shown)
            _print_summary(saved.diagnosis.table)
            out.print(escape(str(saved.diagnosis)), highlight=False)


@app.command()
def predict(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a Result, from fit or sample.")],
    rows: Annotated[str, typer.Option("--data", help="A CSV file with a column per feature.")],
    out_file: Annotated[str | None, typer.Option("--out", help="CSV file to write; default: standard output.")] = None,
) -> None:
    """Predict new rows from a CSV file: probabilities of classes, or for pairs without labels the log evidence."""
    with _one_line(context):
        place = _writable(str(Path(out_file).parent)) / Path(out_file).name if out_file else None
        frame = _csv(rows)
        table = opened(folder).predict(frame)
        if place is None:
            sys.stdout.write(table.to_csv(index=False))
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, partial(table.to_csv, index=False))
        out.print(f"[dim]{place}[/]", highlight=False, soft_wrap=True)


def _csv(path: str) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data: expected a CSV file, got {path} ({reason})") from None


@app.command()
def reproduce(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; omit to list them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A size for tests, seconds instead of hours.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: the recipe's.")] = None,
    only: Annotated[int | None, typer.Option("--seed", min=0, help="Run this seed alone.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Seeds recorded by other commits count as well.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds that run side by side, in processes.")] = 1,
    out_dir: Annotated[str, typer.Option("--out", help="Directory of the records.")] = "results/ledger",
) -> None:
    """Reproduce a published figure and append the result to a ledger.

    Each seed is recorded when it ends, and is not run again; one that was killed goes on. Any number of processes may
    run seeds of one recipe.
    """
    with _one_line(context):
        if recipe is None:
            for each in ledger.RECIPES.values():
                out.print(f"{each.name}: {each.title}, {each.protocol}", highlight=False, soft_wrap=True)
            return
        chosen = ledger.RECIPES[_named("recipe", recipe, ledger.RECIPES)]
        folder = _writable(out_dir)
        further: dict[str, Any] = {"only": only, "missing": missing, "jobs": jobs}
        record = ledger.reproduce(chosen, folder, quick=quick, seeds=seeds, **further)
        if record is None:
            out.print(f"[dim]{folder / (chosen.name + '.seeds.jsonl')}[/]", highlight=False, soft_wrap=True)
            return
        out.print(f"[bold]{chosen.name}[/]: {chosen.title}; {chosen.protocol}", highlight=False, soft_wrap=True)
        error = record["standard_error"]
        margin = "" if error is None else f" ± {error:.2f} over {record['seeds']} seeds"
        shown = Table(box=None, pad_edge=False, show_header=False)
        shown.add_row("obtained" + (" (quick: not comparable)" if quick else ""), f"{record['figure']:.2f}{margin}")
        shown.add_row("published", f"{chosen.known}, {chosen.origin}")
        for what, values in record["details"].items():
            if what != "figure":
                shown.add_row(what, ", ".join(f"{v:.2f}" for v in values))
        shown.add_row("seconds", f"{record['seconds']:.0f}")
        _print_whole(shown)
        out.print(f"[dim]{folder / (chosen.name + '.jsonl')}[/]", highlight=False, soft_wrap=True)


def _prepare(entry: Entry, data_name: str | None, out_dir: str | None, device: str) -> tuple[Dataset, Path]:
    """Check the data's name and the output directory, so that errors come before any work, and load the data."""
    if data_name is not None:
        _named("data", data_name, data.names())
    folder = _writable(f"results/{entry.name}-{data_name or entry.data}" if out_dir is None else out_dir)
    return entry.load(data_name, device=device), folder


def _named(what: str, name: str, known: Collection[str]) -> str:
    """The known name that was meant, in its own case."""
    if name in known:
        return name
    alike = [k for k in known if k.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"{what}: unknown {name!r}; {hint}known: {', '.join(known)}")


def _taken(name: str, method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The options, all of which the method has to take."""
    for option in options:
        if option not in settings(method):
            raise ValueError(f"{option}: expected none, for the method {name} has no such setting")
    return options


def _writable(folder: str) -> Path:
    """A folder that can be written to, or made. It is made when there is something to write."""
    if not folder.strip():
        raise ValueError(f"out: expected a folder, got {folder!r}")
    path = Path(folder)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror}") from None
    return path


def _unfit(result: Result) -> str:
    """Why the result of a fit is none: it ended early, or its loss is higher than at the start; empty if it is one."""
    if result.ended:
        return result.ended
    losses, tenth = result.losses, len(result.losses) // 10
    if losses.ndim > 1 or tenth < 10:
        return ""
    first, last = losses[:tenth], losses[-tenth:]
    risen, error = last.mean() - first.mean(), math.sqrt((first.var() + last.var()) / tenth)
    if np.isfinite(last).all() and not risen > 3 * error:
        return ""
    return f"diverged: its loss went from {first.mean():.4g} to {last.mean():.4g}; try a lower learning rate"


def _check_whole(result: Result) -> None:
    """End the command where the fit is none; an interrupted one with the code of an interrupt."""
    if problem := _unfit(result):
        _complain(f"the fit {problem}")
        raise typer.Exit(INTERRUPTED if result.interrupted else FAILED)


def _about(entry: Entry, dataset: Dataset, method: str, seed: int) -> dict[str, Any]:
    """What a folder says of a Result, for :func:`ppl_models.restore`."""
    command = " ".join(["ppl-models", *map(shlex.quote, sys.argv[1:])])
    return {"pair": entry.name, "data": dataset.name, "method": method, "seed": seed, "command": command}


def _report(result: Result, folder: Path, name: str, about: dict[str, Any]) -> None:
    _print_summary(result.summary())
    out.print(escape(str(result)), highlight=False)
    stem = stem_of(name) + ("-partial" if _unfit(result) else "")
    out.print(f"[dim]{result.save(folder / stem, about)}[/]", highlight=False, soft_wrap=True)


def _print_summary(table: pd.DataFrame) -> None:
    """The first rows of a table of quantities, and how many more there are."""
    shown = table.head(20)
    if len(shown):
        _print_whole(_frame(shown.reset_index()))
    if len(table) > len(shown):
        out.print(f"[dim]... and {len(table) - len(shown)} more quantities in the file[/]")


def _show(comparison: Comparison, entry: Entry, dataset: Dataset) -> None:
    table = comparison.table.dropna(axis=1, how="all")
    rows = len(next(iter(dataset.train.values())))
    out.print(f"[bold]{entry.title}[/] on {dataset.name}: {rows} rows", highlight=False)
    # One column per method: there are too many measures for the width of a terminal.
    _print_whole(_frame(table.T.rename_axis("measure").reset_index()))
    legend = Table.grid(padding=(0, 2))
    meanings = {column: COLUMNS[column] for column in table.columns}
    for column, meaning in (meanings | ({"truth": entry.source} if comparison.truth else {})).items():
        legend.add_row(column, escape(meaning), style="dim")
    out.print(legend)
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
