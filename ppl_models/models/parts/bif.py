r"""Reader of the Bayesian interchange format (BIF), the format of the public repositories of Bayesian networks.

A block ``probability ( v | a, b )`` lists a row of probabilities for each state of the parents, ``(a1, b1) 0.2, 0.8;``,
a row ``default`` for all states of the parents that are not listed, or one ``table``, in which the states of v vary
slowest and those of the last parent fastest. The bar, commas and quotation marks are optional; comments and properties
are passed over.

Reference: Cozman 1998, "The Interchange Format for Bayesian Networks", version 0.15.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

_TOKEN = re.compile(
    r"""(?:\s|//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)+
    | "(?P<quoted>[^"]*)" | (?P<mark>[{}()\[\];,|]) | (?P<word>(?:[^\s{}()\[\];,|"/]|/(?![/*]))+)""",
    re.VERBOSE,
)


class _Entry(NamedTuple):
    """One line of a block of probabilities: the states of the parents, or ``default`` or ``table``, and its numbers."""

    at: tuple[str, ...] | str
    numbers: list[float]


def read_bif(text: str, largest: int = 2**26) -> dict[str, Any]:
    """Arguments of a ``BayesianNetwork`` (``parents``, ``states``, ``tables``) from a BIF text, in linear time.

    Args:
        text: The content of a file.
        largest: Largest size of all tables together, in numbers.

    Raises:
        ValueError: The text is not in the format or has no variable; a variable, a state or a row is unknown, missing
            or there twice; a row has the wrong number of probabilities, or a table is too large.
    """
    states, blocks = _Reader(text).read()
    if not states:
        raise ValueError("source: expected a network in the Bayesian interchange format, got no variable")
    parents: dict[str, list[str]] = {}
    tables: dict[str, Tensor] = {}
    total = 0
    for (name, *above), entries in blocks:
        unknown = [n for n in (name, *above) if n not in states]
        if unknown:
            head = f"{name} | {', '.join(above)}" if above else name
            raise ValueError(f"source: expected known variables in probability ({head}), got {unknown[0]}")
        if name in tables:
            raise ValueError(f"source: expected one block of probabilities of {name}, got two")
        total += math.prod(len(states[n]) for n in (name, *above))
        if total > largest:
            most = f"at most {largest:.1e} numbers"
            raise ValueError(f"source: expected tables of {most} in all, got {float(total):.1e} with that of {name}")
        parents[name], tables[name] = above, _table(name, above, states, entries)
    missing = [n for n in states if n not in tables]
    if missing:
        raise ValueError(f"source: expected probabilities of every variable, got none of {missing[0]}")
    return {"parents": {n: parents[n] for n in states}, "states": states, "tables": tables}


def _table(name: str, above: Sequence[str], states: Mapping[str, list[str]], entries: list[_Entry]) -> Tensor:
    """The probabilities of a variable (*states of the parents, states) from the lines of its block."""
    shape = [len(states[n]) for n in (*above, name)]
    if any(e.at == "table" for e in entries):
        if len(entries) > 1:
            raise ValueError(f"source: expected one table of {name} or rows, got a table and {len(entries) - 1} lines")
        return _numbers(name, entries[0].numbers, math.prod(shape)).reshape(shape[-1], *shape[:-1]).movedim(0, -1)
    codes = [{s: k for k, s in enumerate(states[n])} for n in above]
    rows: dict[int, Tensor] = {}
    rest: Tensor | None = None
    for at, numbers in entries:
        row = _numbers(name, numbers, shape[-1])
        index = -1 if at == "default" else _row(name, at, above, codes)
        if index in rows or (index < 0 and rest is not None):
            shown = at if isinstance(at, str) else f"({', '.join(at)})"
            raise ValueError(f"source: expected one line per state of the parents of {name}, got {shown} twice")
        if index < 0:
            rest = row
        else:
            rows[index] = row
    count = math.prod(shape[:-1])
    if rest is None and len(rows) < count:
        raise ValueError(
            f"source: expected one line per state of the parents of {name} ({count}), or default, got too few "
            f"({len(rows)})"
        )
    table = torch.empty(count, shape[-1], dtype=torch.float64) if rest is None else rest.repeat(count, 1)
    if rows:
        table[list(rows)] = torch.stack(list(rows.values()))
    return table.reshape(shape)


def _row(name: str, at: Sequence[str], above: Sequence[str], codes: Sequence[Mapping[str, int]]) -> int:
    """The row of a table for states of the parents, by name."""
    if len(at) != len(above):
        raise ValueError(f"source: expected a state of each parent of {name} ({len(above)}), got ({', '.join(at)})")
    index = 0
    for parent, code, state in zip(above, codes, at, strict=True):
        if state not in code:
            raise ValueError(f"source: expected a state of {parent} in a row of {name}, got {state}")
        index = index * len(code) + code[state]
    return index


def _numbers(name: str, numbers: Sequence[float], count: int) -> Tensor:
    if len(numbers) != count:
        raise ValueError(f"source: expected {count} probabilities in each line of {name}, got {len(numbers)}")
    return torch.tensor(numbers, dtype=torch.float64)


class _Reader:
    """The tokens of a text, and how far they have been read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.token, self.mark, self.start = "", False, 0
        self.states: dict[str, list[str]] = {}
        self.blocks: list[tuple[list[str], list[_Entry]]] = []
        self.advance()

    def advance(self) -> str:
        """Go to the next token; return the one before it."""
        before = self.token
        while True:
            self.start = self.at
            if self.at == len(self.text):
                self.token, self.mark = "the end", True
                return before
            found = _TOKEN.match(self.text, self.at)
            if found is None:
                self.refuse("a closing quotation mark or end of a comment", self.text[self.at : self.at + 20])
            self.at = found.end()
            if found.lastgroup is not None:
                self.token, self.mark = found[found.lastgroup], found.lastgroup == "mark"
                return before

    def refuse(self, expected: str, got: str) -> NoReturn:
        line = self.text.count("\n", 0, self.start) + 1
        raise ValueError(f"source: expected {expected} in line {line}, got {' '.join(got.split())!r}")

    def word(self, expected: str) -> str:
        """Take a word, quoted or not."""
        if self.mark:
            self.refuse(expected, self.token)
        return self.advance()

    def take(self, mark: str) -> None:
        """Take a mark."""
        if not (self.mark and self.token == mark):
            self.refuse(f"'{mark}'", self.token)
        self.advance()

    def is_mark(self, marks: str) -> bool:
        return self.mark and self.token in marks

    def words(self, end: str, between: str = ",") -> list[str]:
        """Take words up to a mark, and the mark."""
        taken = []
        while not self.is_mark(end):
            taken.append(self.word(f"a word or '{end}'"))
            while self.is_mark(between):
                self.advance()
        self.take(end)
        return taken

    def read(self) -> tuple[dict[str, list[str]], list[tuple[list[str], list[_Entry]]]]:
        """States by variable; for each block of probabilities its variable with the parents, and its lines."""
        blocks = {"network": self.network, "variable": self.variable, "probability": self.probability}
        while not (self.mark and self.token == "the end"):
            if self.mark or self.token not in blocks:
                self.refuse("network, variable or probability", self.token)
            blocks[self.advance()]()
        return self.states, self.blocks

    def pass_property(self) -> bool:
        """Pass over a property, up to its semicolon."""
        if self.mark or self.token != "property":
            return False
        while not self.is_mark(";"):
            if self.mark and self.token == "the end":
                self.refuse("';' after a property", self.token)
            self.advance()
        self.take(";")
        return True

    def network(self) -> None:
        while not self.is_mark("{"):
            self.word("the name of the network or '{'")
        self.take("{")
        while not self.is_mark("}"):
            if not self.pass_property():
                self.refuse("property or '}'", self.token)
        self.take("}")

    def variable(self) -> None:
        name = self.word("the name of a variable")
        if name in self.states:
            raise ValueError(f"source: expected different variables, got {name} twice")
        self.take("{")
        while not self.is_mark("}"):
            if not self.pass_property():
                self.type_of(name)
        self.take("}")
        if name not in self.states:
            raise ValueError(f"source: expected the states of {name}, got none")

    def type_of(self, name: str) -> None:
        if self.word("type or property") != "type" or self.token != "discrete":
            self.refuse(f"type discrete of {name}", self.token)
        self.advance()
        self.take("[")
        count = self.word("the number of states")
        self.take("]")
        self.take("{")
        states = self.words("}")
        self.take(";")
        if str(len(states)) != count or len(set(states)) < len(states) or name in self.states:
            raise ValueError(f"source: expected {count} different states of {name}, got {', '.join(states) or 'none'}")
        self.states[name] = states

    def probability(self) -> None:
        self.take("(")
        names = self.words(")", between=",|")
        if not names:
            self.refuse("a variable in probability ( )", ")")
        self.take("{")
        entries = []
        while not self.is_mark("}"):
            if not self.pass_property():
                entries.append(self.entry(names[0]))
        self.take("}")
        self.blocks.append((names, entries))

    def entry(self, name: str) -> _Entry:
        at: tuple[str, ...] | str
        if self.is_mark("("):
            self.advance()
            at = tuple(self.words(")"))
        else:
            at = self.word("'(', default or table")
            if at not in ("default", "table"):
                self.refuse("'(', default or table", at)
        numbers = []
        for word in self.words(";"):
            try:
                numbers.append(float(word))
            except ValueError:
                raise ValueError(f"source: expected probabilities of {name}, got {word!r}") from None
        return _Entry(at, numbers)
