"""``ppl-models reproduce``: the recipes of the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from ppl_models import ledger
from ppl_models.commands.arguments import named, writable
from ppl_models.commands.printing import out, print_whole

TOLERANCE = 1e-3
"""Relative difference up to which two evaluations by the same weights agree: half precision, and noise of particles."""


def reproduce(
    recipe: str | None,
    quick: bool,
    seeds: int | None,
    only: int | None,
    missing: bool,
    jobs: int,
    device: str,
    again: bool,
    out_dir: str | None,
) -> None:
    """Run the seeds of a recipe, and show the record; or evaluate it again by the weights that are on record."""
    if recipe is None:
        for each in ledger.RECIPES.values():
            out.print(f"{each.name}: {each.title}, {each.protocol}", highlight=False, soft_wrap=True)
        return
    chosen = ledger.RECIPES[named("recipe", recipe, ledger.RECIPES)]
    if again:
        now, then = ledger.check(chosen, ledger.RECORDS if out_dir is None else Path(out_dir), device=device)
        out.print(f"{chosen.name}: {now:.3f} now, {then:.3f} on record", highlight=False)
        if abs(now - then) > TOLERANCE * max(1.0, abs(then)):
            raise RuntimeError(f"{chosen.name}: expected {then:.3f}, which is on record, got {now:.3f}")
        return
    folder = writable("results/ledger" if out_dir is None else out_dir)
    further: dict[str, Any] = {"only": only, "missing": missing, "jobs": jobs, "device": device}
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
    print_whole(shown)
    out.print(f"[dim]{folder / (chosen.name + '.jsonl')}[/]", highlight=False, soft_wrap=True)
