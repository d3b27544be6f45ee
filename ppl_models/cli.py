"""The command line: ``ppl-models list | fit | sample | compare | verify | show | predict | reproduce``.

Here are the arguments of the commands; ``ppl_models.commands`` does their work and is imported when a command runs, so
that help comes at once.
"""

from __future__ import annotations

import math
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ppl_models.commands.listing import entries
from ppl_models.commands.printing import MISUSED, complain, one_line, out


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
                complain(error.format_message())
            sys.exit(MISUSED)


app = typer.Typer(
    cls=_OneLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"expected a positive number, got {value}")
    return value


def _pairs(begun: str) -> list[str]:
    return [e["pair"] for e in entries() if e["pair"].startswith(begun)]


PairName = Annotated[
    str, typer.Argument(metavar="PAIR", help="A pair of the zoo; `ppl-models list` shows them.", autocompletion=_pairs)
]
PairOrFrom = Annotated[str | None, PairName.__metadata__[0]]
Start = Annotated[str | None, typer.Option("--from", help="Folder of a Result that is to go on, in place of a PAIR.")]
DataName = Annotated[
    str | None, typer.Option("--data", help="A data set by name, or a CSV file; default: the pair's own.")
]
Label = Annotated[str | None, typer.Option("--label", help="Column of the labels in a CSV file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An argument of the pair, such as components=5; may be repeated."),
]
OutDir = Annotated[str | None, typer.Option("--out", help="Output directory; default: results/PAIR-DATA.")]
Device = Annotated[str, typer.Option("--device", help="Where to run, such as cuda.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", help="Folder from which the same command goes on if it was killed; renewed every half minute."
    ),
]
Page = Annotated[bool, typer.Option("--report", help="Write a page about it too, report.html in the output directory.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all randomness.")]


def _version(asked: bool) -> None:
    if asked:
        out.print(f"ppl-models {version('ppl-models')}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """A model zoo on Pyro: fit, sample and compare model/guide pairs."""


def _run(context: typer.Context, module: str) -> None:
    """Run the function of ``ppl_models.commands`` that has the name of the command's."""
    with one_line(context):
        work = import_module(f"ppl_models.commands.{module}")
        getattr(work, context.command.callback.__name__)(**context.params)  # type: ignore[union-attr]


@app.command("list")
def list_(context: typer.Context) -> None:
    """List the pairs of the zoo with their data sets and methods; the first data set and method are the default."""
    _run(context, "listing")


@app.command()
def fit(
    context: typer.Context,
    pair: PairOrFrom = None,
    data_name: DataName = None,
    label: Label = None,
    settings: Settings = None,
    method: Annotated[str | None, typer.Option(help="A method of the pair; default: the first of the list.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimisation steps; default: the method's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Minibatch size; default: the method's.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(callback=_positive, help="Initial learning rate of the schedule; default: the method's."),
    ] = None,
    draws: Annotated[int | None, typer.Option(min=4, help="Posterior draws to keep; default: the method's.")] = None,
    start: Start = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
    page: Page = False,
) -> None:
    """Fit a pair by a method of its own: exact, variational, maximum likelihood or adversarial.

    A fit that was interrupted is written as partial (exit code 130), and so is one that ended or stayed where the loss
    is not finite or higher than at the start (exit code 1). With --from it begins at the parameters of a folder, and
    with a new optimizer.
    """
    _run(context, "fitting")


@app.command()
def sample(
    context: typer.Context,
    pair: PairOrFrom = None,
    data_name: DataName = None,
    label: Label = None,
    settings: Settings = None,
    draws: Annotated[int | None, typer.Option(min=4, help="Draws per chain; default: the kernel's.")] = None,
    warmup: Annotated[int | None, typer.Option(min=0, help="Warmup draws per chain; default: the kernel's.")] = None,
    chains: Annotated[int | None, typer.Option(min=1, help="Number of chains; default: the kernel's.")] = None,
    kernel: Annotated[str | None, typer.Option(help="ChEES, Gibbs, NUTS or HMC; default: chosen by the model.")] = None,
    start: Start = None,
    seed: Seed = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
    page: Page = False,
) -> None:
    """Sample a pair's posterior by Markov chains. With --from, those of a folder go on; the Result has all draws."""
    _run(context, "fitting")


@app.command()
def compare(
    context: typer.Context,
    pair: PairName,
    data_name: DataName = None,
    label: Label = None,
    settings: Settings = None,
    methods: Annotated[str | None, typer.Option(help="Methods, comma-separated; default: all of the pair.")] = None,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, from --seed on: means and errors.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs that go side by side, in processes.")] = 1,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    out_dir: OutDir = None,
    page: Page = False,
) -> None:
    """Compare several methods on one pair: a table, a plot and a folder per method.

    Where a method fails, or its fit ends early, the others are shown and written, and the exit code is 1.
    """
    _run(context, "comparing")


@app.command()
def verify(
    context: typer.Context,
    pair: PairOrFrom = None,
    method: Annotated[str | None, typer.Option(help="Check this method alone; default: all of the pair.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Check all pairs of the zoo.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few rows, short chains, and one method per kind.")] = False,
    seed: Seed = 0,
) -> None:
    """Check a pair against figures from outside: exact posterior, log p(x), bounds by plain Pyro, calibration.

    Each check prints its verdict with its figures; the exit code is 1 if one fails.
    """
    _run(context, "verify")


@app.command()
def show(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder that a command has written.")],
) -> None:
    """Show what a folder holds: each Result in it, how it was made, its summary and its diagnosis."""
    _run(context, "reading")


@app.command()
def predict(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of a Result, from fit or sample.")],
    rows: Annotated[str, typer.Option("--data", help="A CSV file with a column per feature.")],
    out_file: Annotated[str | None, typer.Option("--out", help="CSV file to write; default: standard output.")] = None,
) -> None:
    """Predict new rows from a CSV file: probabilities of classes, or for pairs without labels the log evidence."""
    _run(context, "reading")


@app.command()
def reproduce(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; omit to list them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A size for tests, seconds instead of hours.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; default: the recipe's.")] = None,
    only: Annotated[int | None, typer.Option("--seed", min=0, help="Run this seed alone.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Seeds recorded by other commits count as well.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds that run side by side, in processes.")] = 1,
    device: Device = "cpu",
    again: Annotated[
        bool, typer.Option("--check", help="Evaluate again by the weights on record, and train nothing.")
    ] = False,
    out_dir: Annotated[
        str | None, typer.Option("--out", help="Directory of the records; default: results/ledger.")
    ] = None,
) -> None:
    """Reproduce a published figure and append the result to a ledger.

    Each seed is recorded when it ends, and is not run again; one that was killed goes on. Any number of processes may
    run seeds of one recipe.
    """
    _run(context, "reproducing")


def main() -> None:
    """Entry point of ``python -m ppl_models``."""
    sys.exit(app())
