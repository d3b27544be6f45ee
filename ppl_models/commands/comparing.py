"""``ppl-models compare``: several methods on one pair."""

from __future__ import annotations

from functools import partial

from rich.markup import escape
from rich.table import Table

from inference import COLUMNS, Comparison, Method
from ppl_models.commands.arguments import about, changed, named, prepare
from ppl_models.commands.printing import announce, frame, out, print_whole
from ppl_models.commands.writing import say_page, unfit
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entries import find
from ppl_models.zoo.entry import Entry


def compare(
    pair: str,
    data_name: str | None,
    label: str | None,
    settings: list[str] | None,
    methods: str | None,
    seed: int,
    seeds: int,
    jobs: int,
    device: str,
    checkpoint: str | None,
    out_dir: str | None,
    page: bool,
) -> None:
    """Compare methods on a pair, print their table, and write it with a plot and a folder per method."""
    entry = changed(find(pair), settings)
    asked = list(entry.methods) if methods is None else methods.split(",")
    names = list(dict.fromkeys(named("methods", name.strip(), entry.methods) for name in asked))
    dataset, folder = prepare(entry, data_name, out_dir, device, label)
    seeded: dict[str, Method] = {name: partial(entry.methods[name], seed=seed) for name in names}
    runs = f", {seeds} runs each" if seeds > 1 else ""
    announce(f"comparing {', '.join(names)} on {dataset.name}: {dataset.rows:,} rows{runs}")
    comparison = entry.compare(dataset, seeded, seed=seed, seeds=seeds, jobs=jobs, checkpoint=checkpoint)
    show(comparison, entry, dataset)
    for path in comparison.save(folder, lambda name: about(entry, dataset, name, seed)):
        out.print(f"[dim]{path}[/]", highlight=False, soft_wrap=True)
    if page:
        say_page(comparison, folder, about(entry, dataset, ", ".join(names), seed), entry, dataset)
    failed = [n for n in names if n not in comparison.results or unfit(comparison.results[n])]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def show(comparison: Comparison, entry: Entry, dataset: Dataset) -> None:
    table = comparison.table.dropna(axis=1, how="all")
    out.print(f"[bold]{entry.title}[/] on {dataset.name}: {dataset.rows:,} rows", highlight=False)
    # One column per method: there are too many measures for the width of a terminal.
    shown = table if comparison.errors is None else comparison.shown()
    print_whole(frame(shown.T.rename_axis("measure").reset_index()))
    legend = Table.grid(padding=(0, 2))
    meanings = {column: COLUMNS[column] for column in table.columns}
    for column, meaning in (meanings | ({"truth": entry.source} if comparison.truth else {})).items():
        legend.add_row(column, escape(meaning), style="dim")
    out.print(legend)
    for name, result in comparison.results.items():
        for sentence in result.diagnosis.advice:
            out.print(escape(f"{name}: {sentence}"), highlight=False)
