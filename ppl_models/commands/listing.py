"""``ppl-models list``: the pairs of the zoo."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from rich.table import Table

from ppl_models.commands.printing import print_whole


def entries() -> list[dict[str, Any]]:
    """The entries as in a file that ``python -m ppl_models.zoo`` renews, so that torch need not be imported."""
    return json.loads((files("ppl_models") / "zoo" / "list.json").read_text())


def list_() -> None:
    """Print the pairs with their data sets and methods."""
    shown = Table("pair", "what", "data", "methods", box=None, pad_edge=False)
    for row in entries():
        shown.add_row(row["pair"], row["what"], ", ".join(row["data"]), ", ".join(row["methods"]))
    print_whole(shown)
