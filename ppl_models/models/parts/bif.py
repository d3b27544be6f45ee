"""Reader of the Bayesian interchange format (BIF), the format of the public repositories of Bayesian networks."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor


def read_bif(text: str) -> dict[str, Any]:
    """Arguments of a ``BayesianNetwork`` (``parents``, ``states``, ``tables``) from a BIF text.

    Raises:
        ValueError: The text has no variable, an unknown one, or an incomplete table.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    states = {
        name: re.findall(r"[^\s,]+", listed)
        for name, listed in re.findall(r"variable\s+(\S+)\s*\{[^{}]*?\{([^{}]*)\}", text)
    }
    if not states:
        raise ValueError("source: expected a network in the Bayesian interchange format, got no variable")
    parents: dict[str, list[str]] = {name: [] for name in states}
    tables: dict[str, Tensor] = {}
    for head, body in re.findall(r"probability\s*\(([^)]*)\)\s*\{([^{}]*)\}", text):
        name, *above = re.findall(r"[^\s,|]+", head)
        unknown = [n for n in (name, *above) if n not in states]
        if unknown:
            raise ValueError(f"source: expected known variables in probability ({head.strip()}), got {unknown[0]}")
        parents[name] = above
        shape = [len(states[n]) for n in (*above, name)]
        table = torch.full(shape, torch.nan, dtype=torch.float64)
        rows = re.findall(r"\(([^)]*)\)\s*([^;]*);", body)
        for row, numbers in rows:
            at = tuple(states[n].index(s) for n, s in zip(above, re.findall(r"[^\s,]+", row), strict=True))
            table[at] = _numbers(numbers, name)
        if not rows:
            listed = re.search(r"table([^;]*);", body)
            if listed is None or above:
                raise ValueError(f"source: expected one line per state of the parents of {name}, got none")
            table = _numbers(listed[1], name)
        if bool(table.isnan().any()):
            raise ValueError(f"source: expected one line per state of the parents of {name}, got too few")
        tables[name] = table
    return {"parents": parents, "states": states, "tables": tables}


def _numbers(text: str, name: str) -> Tensor:
    try:
        return torch.tensor([float(v) for v in re.findall(r"[^\s,]+", text)], dtype=torch.float64)
    except ValueError:
        raise ValueError(f"source: expected probabilities of {name}, got {text.strip()!r}") from None
