"""The pages that are written by the build: zoo, gallery, ledger and API, from the code and its records."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import gallery
from cards import class_of, picture_of
from gallery import toctree

import inference
import inference.kernels
import inference.objectives
import ppl_models
from inference.core.bound import bind
from inference.report.graph import graph
from ppl_models import ZOO, Entry
from ppl_models.ledger import RECIPES
from ppl_models.ledger.entries import latest, records
from ppl_models.ledger.record import shown_figure

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^(Args|Data|Sites|Attributes|Example|Raises|Returns|Arguments|The other arguments)\b", re.M)
DATA = {
    "COLUMNS": "What each column of the table of a comparison means, by name.",
    "RECIPES": "The recipes of the ledger, by name.",
    "ZOO": "The entries of the zoo, by name.",
}
"""What the public names that are data hold."""
MET = {True: "yes", False: "no", None: "-"}
"""Whether a figure is at or beyond the published one, within two standard errors."""
LEDGER = Path(__file__).parent / "ledger"
"""Pictures of the recipes' runs."""
MISSING = ("| Ng and Jordan's crossings | in the gallery | 3 of 15 data sets are at hand; no table was published |",)
"""What the ledger should have as well."""
PAPER = re.compile(r"^References?: ")


def write(folder: Path) -> None:
    """Write all pages into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = {"zoo/index.md": zoo_index(), "ledger.md": ledger(), "api/index.md": api_index(), **gallery.pages()}
    pages |= {f"zoo/{e.name}.md": card(e) for e in ZOO.values()}
    pages |= {f"api/{name}.md": text for name, text in api().items()}
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")


# ---- The zoo


def head(doc: str) -> list[str]:
    """The paragraphs of a docstring before its sections, without its references."""
    text = SECTION.split(doc, maxsplit=1)[0]
    return [p for p in text.strip().split("\n\n") if p.strip() and not PAPER.match(p)]


def papers(*docs: str) -> list[str]:
    """The references of docstrings, as they say them."""
    return [PAPER.sub("", p.strip()) for doc in docs for p in doc.split("\n\n") if PAPER.match(p.strip())]


def story(entry: Entry) -> tuple[list[str], list[str]]:
    """The generative story of an entry as paragraphs of reStructuredText, and its papers.

    The file of a family says what its pairs share: it follows where the class has no formula of its own, or that of the
    first base class whose file has one.
    """
    kind = class_of(entry)
    docs = [inspect.getdoc(o) or "" for o in (kind, *map(inspect.getmodule, kind.__mro__[:-1]))]
    told = next(k for k, doc in enumerate(docs) if ".. math::" in "\n\n".join(head(doc)))
    paragraphs = head(docs[0]) + (head(docs[told])[1:] if told else [])
    return paragraphs, list(dict.fromkeys(papers(docs[0], docs[max(told, 1)])))


def card(entry: Entry) -> str:
    """The page of an entry: story, data, methods, what it is compared with, code, papers."""
    kind, (paragraphs, references) = class_of(entry), story(entry)
    sets = ", ".join(f"**{n}**" if n == entry.data else n for n in (entry.data, *entry.also))
    body = "\n\n".join([f".. currentmodule:: {kind.__module__}", *paragraphs])
    return f"""# {entry.title}

`{entry.name}` is a pair of the class {{py:class}}`ppl_models.{kind.__name__}`.

## The story

{rst(body)}

{graph_of(entry)}

{picture(entry)}## What comes with it

| | |
| --- | --- |
| data sets | {sets} (the first is the default) |
| methods | {", ".join(entry.methods)} (`ppl-models fit` runs {next(iter(entry.fits))}) |
| compared with | {entry.source} |
| exact posterior | {"known; `compare` shows each error" if entry.truth else "not known in closed form"} |
| [ledger](../ledger.md) | {figures_of(entry)} |

## Run it

```python
from ppl_models import find

entry = find("{entry.name}")
data = entry.load()
result = entry.fit(entry.pair(data), data.train)
```

```bash
ppl-models fit {entry.name}
ppl-models compare {entry.name}
```

## Paper

{rst(chr(10).join(f"- {textwrap.indent(r, '  ').strip()}" for r in references) or "The docstring names none.")}

Arguments, shapes and errors: {{py:class}}`ppl_models.{kind.__name__}`.
"""


def picture(entry: Entry) -> str:
    """What the entry makes, fitted to its default data; nothing where no picture was made."""
    path = picture_of(entry)
    return f"![What {entry.name} makes](../../static/zoo/{path.name})\n\n" if path.exists() else ""


def figures_of(entry: Entry) -> str:
    """The published figures of an entry, and those obtained here."""
    found = latest()
    told = [
        f"`{r.name}`: {shown_figure(found[r.name]) if r.name in found else 'not run'} (published {r.known})"
        for r in RECIPES.values()
        if r.entry == entry.name
    ]
    return "; ".join(told) or "none"


def graph_of(entry: Entry) -> str:
    """The graph of sites and plates as an inline picture; nothing where there are too many sites."""
    data = entry.load()
    # A chain of many steps has a site per step, and its small form has none of its own to show.
    drawn = None if entry.name == "diffusion" else graph(bind(entry.pair(data, **entry.small), data.train))
    if drawn is None:
        return ""
    return f"""<div class="graph">{drawn.image}</div>

*Sites and plates, on the training rows of {entry.data}. {drawn.note}*"""


def rst(text: str) -> str:
    """A block of reStructuredText in a page of Markdown."""
    return f"````{{eval-rst}}\n{text}\n````"


def zoo_index() -> str:
    """All entries, by family."""
    parts = [
        "# The zoo",
        f"{len(ZOO)} entries: each is a pair of a model and a guide with data sets, methods and what its results are "
        "compared with. `ppl-models list` prints the same, and `ppl-models fit NAME` runs the first method on the "
        "default data.",
    ]
    for module, family in groupby(ZOO.values(), lambda e: class_of(e).__module__):
        parts += [f"## {family_of(module)}", "::::{grid} 1 2 2 3\n:gutter: 3", *map(tile, family), "::::"]
    return "\n\n".join([*parts, toctree(ZOO)]) + "\n"


def family_of(module: str) -> str:
    """The first words of the file of a family."""
    said = (inspect.getdoc(importlib.import_module(module)) or "").split("\n")[0]
    return re.split(r"[:.,]", said)[0]


def tile(entry: Entry) -> str:
    """An entry among the others."""
    methods = ", ".join(entry.methods)
    return f""":::{{grid-item-card}} {entry.title}
:link: {entry.name}
:link-type: doc

`{entry.name}` on {entry.data}

{methods}
:::"""


# ---- Figures


def ledger() -> str:
    """Published figures beside ours, and when and where ours were obtained."""
    rows = ["| recipe | date | seeds | seconds | machine | torch | commit |", "| --- " * 7 + "|"]
    for r in (r for r in records() if not r["quick"]):
        cells = (f"`{r['recipe']}`", r["date"], r["seeds"], f"{r['seconds']:,.0f}", r["machine"])
        rows.append(f"| {' | '.join(map(str, (*cells, r['versions']['torch'], r['commit'])))} |")
    nl, found = "\n", latest()
    figures = ["| recipe | figure | published | obtained | seeds | at or beyond |", "| --- " * 6 + "|"]
    for recipe in RECIPES.values():
        record = found.get(recipe.name)
        got = (shown_figure(record), record["seeds"], MET[recipe.met(record)]) if record else ("-", "-", "-")
        cells = f"[`{recipe.name}`](#protocols)", recipe.title, recipe.known, *map(str, got)
        figures.append(f"| {' | '.join(cells)} |")
    protocols = [
        f"`{r.name}`\n: {found.get(r.name, {}).get('protocol', r.protocol)}. {r.origin}.\n" for r in RECIPES.values()
    ]
    open_ones = [r for r in RECIPES.values() if r.limits and (r.name not in found or not r.met(found[r.name]))]
    limits = [f"| `{r.name}` | {'not run' if r.name not in found else 'not met'} | {r.limits} |" for r in open_ones]
    drawn = [f"![{n}: a picture of its run](../ledger/{n}.png)" for n in RECIPES if (LEDGER / f"{n}.png").exists()]
    return f"""# Ledger

{len(RECIPES)} recipes for published figures. `ppl-models reproduce RECIPE` runs one and appends what it obtained;
`--quick` runs it at a size that takes seconds. A dash: not run yet. "Recalled" figures have not been checked against
their source. How to run many seeds: [Many runs](../many_runs.md).

{nl.join(figures)}

## What limits the others

| recipe | | what limits it |
| --- | --- | --- |
{nl.join(limits)}
{nl.join(MISSING)}

## Protocols

{nl.join(protocols)}

## Learning curves and samples

Of the first seed of each recipe, as `ppl-models reproduce` draws it.

{(nl + nl).join(drawn)}

## When and where

{nl.join(rows)}
"""


# ---- API


def api() -> dict[str, str]:
    """Pages of the public names, by name of the page."""
    return {
        "inference": page("inference", inference, "Verbs, results and judgement."),
        "objectives": page("inference.objectives", inference.objectives, "What `fit` minimises."),
        "kernels": page("inference.kernels", inference.kernels, "What `sample` runs."),
        "ppl_models": page("ppl_models", ppl_models, "Pairs, data, the zoo and the ledger."),
    }


def api_index() -> str:
    """The pages of the API."""
    return "\n".join(["# API", "", "The public names. All else may change.", "", "```{toctree}", *api(), "```", ""])


def page(name: str, module: ModuleType, line: str) -> str:
    """The public names of a module: functions first, then classes, data and modules; those of Pyro by name alone."""
    blocks, foreign = [], []
    for public in module.__all__:
        value = getattr(module, public)
        home = getattr(value, "__module__", name) or name
        if home.startswith("pyro."):
            foreign.append(f"`{public}`")
        elif not (isinstance(value, ModuleType) and value.__name__ in ("inference.kernels", "inference.objectives")):
            blocks.append((order(value), public, documented(f"{name}.{public}", value)))
    said = (
        f"Of Pyro itself, as they are: {', '.join(foreign)}; see [its manual](https://docs.pyro.ai)." if foreign else ""
    )
    body = "\n\n".join(text for *_, text in sorted(blocks, key=lambda b: b[:2]))
    return f"# {name}\n\n{line}\n\n{said}\n\n{rst(body)}\n"


def order(value: Any) -> int:
    """Functions, classes, data, modules."""
    return (
        0 if inspect.isfunction(value) else 1 if inspect.isclass(value) else 3 if isinstance(value, ModuleType) else 2
    )


def documented(name: str, value: Any) -> str:
    """The directive that documents a name."""
    if isinstance(value, ModuleType):
        members = ", ".join(public_of(value))
        title = f"{name}\n{'-' * len(name)}"
        return f"{title}\n\n.. automodule:: {value.__name__}\n   :members: {members}"
    if inspect.isclass(value):
        return f".. autoclass:: {name}\n   :members:"
    if callable(value):
        return f".. autofunction:: {name}"
    said = DATA.get(name.rpartition(".")[2], "")
    return f".. py:data:: {name}\n\n   {said}"


def public_of(module: ModuleType) -> Iterator[str]:
    """Names that a module defines itself."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return (n for n in names if getattr(getattr(module, n), "__module__", None) == module.__name__)


__all__ = ["write"]
