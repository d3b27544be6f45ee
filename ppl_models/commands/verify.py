"""``ppl-models verify``: an entry held against figures from outside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from rich.markup import escape

from ppl_models import ledger
from ppl_models.commands.arguments import named
from ppl_models.commands.printing import out
from ppl_models.ledger.record import shown_figure
from ppl_models.zoo.checks import Check
from ppl_models.zoo.checks import verify as checks_of
from ppl_models.zoo.entries import ZOO, find

STYLES = {True: "green", False: "red", None: "dim"}


def verify(pair: str | None, method: str | None, every: bool, quick: bool, seed: int) -> None:
    """Run the checks of a pair, or of all, print a verdict per check, and raise a RuntimeError if one fails."""
    if (pair is None) != every:
        raise ValueError(f"pair: expected one pair, or --all, got {'both' if pair else 'none'}")
    if every and method is not None:
        raise ValueError(f"method: expected none with --all, got {method}")
    entries = [find(pair)] if pair is not None else list(ZOO.values())
    chosen = None if method is None else named("method", method, entries[0].methods)
    failed, count = [], 0
    for entry in entries:
        for check in chain(checks_of(entry, chosen, quick=quick, seed=seed), _published(entry.name)):
            _print(entry.name, check)
            count += check.passed is not None
            failed += [f"{entry.name} ({check.name})"] if check.passed is False else []
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} checks failed: {', '.join(failed)}")
    out.print(f"{count} checks passed", highlight=False)


def _published(name: str) -> Iterator[Check]:
    """Records of the ledger for an entry beside published figures; a figure that is missed is no failure."""
    found = ledger.latest()
    for recipe in ledger.RECIPES.values():
        if recipe.entry == name and recipe.name in found:
            record = found[recipe.name]
            met = recipe.met(record)
            figure = f"{recipe.title} {shown_figure(record)}, published {recipe.known}"
            yield Check(
                f"ledger, {recipe.name}", met or None, figure, {True: "", False: "missed", None: "recorded"}[met]
            )


def _print(name: str, check: Check) -> None:
    verdict = f"[{STYLES[check.passed]}]{check.verdict:<11}[/]"
    out.print(f"{verdict} {name}: {escape(check.name)}: {escape(check.figure)}", highlight=False, soft_wrap=True)
