"""``ppl-models show`` and ``predict``: what the folders of Results hold, and what their pairs say of new rows."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from inference import Saved, write_whole
from ppl_models.commands.arguments import writable
from ppl_models.commands.printing import out, print_summary, print_whole
from ppl_models.data.frames import read_csv
from ppl_models.zoo.restore import opened


def show(folder: str) -> None:
    """Show each Result in a folder: how it was made, its summary and its diagnosis."""
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
        print_whole(shown)
        print_summary(saved.diagnosis.table)
        out.print(escape(str(saved.diagnosis)), highlight=False)


def predict(folder: str, rows: str, out_file: str | None) -> None:
    """Predict the rows of a CSV file with the pair of a folder."""
    place = writable(str(Path(out_file).parent)) / Path(out_file).name if out_file else None
    frame = read_csv(rows)
    table = opened(folder).predict(frame)
    if place is None:
        sys.stdout.write(table.to_csv(index=False))
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, partial(table.to_csv, index=False))
    out.print(f"[dim]{place}[/]", highlight=False, soft_wrap=True)
