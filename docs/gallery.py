"""The gallery: a page per example with its figure, run time, code, and the script and a notebook to download."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from figures import examples, figure_of, record_of


def pages() -> dict[str, str]:
    """All pages and notebooks, by path."""
    found = {"gallery/index.md": index()}
    for script in examples():
        found[f"gallery/{script.stem}.md"] = page(script)
        found[f"gallery/{script.stem}.ipynb"] = json.dumps(notebook(script), indent=1)
    return found


def told(script: Path) -> tuple[str, str]:
    """The question of an example, which is the first sentence of its docstring, and the rest."""
    first, *rest = (ast.get_docstring(ast.parse(script.read_text(encoding="utf8"))) or "").split("\n\n")
    question, mark, more = " ".join(first.split()).partition("? ")
    return f"{question}{mark.strip()}", "\n\n".join([more, *rest]).strip()


def took(script: Path) -> str:
    """How long an example takes, in words."""
    seconds = record_of(script).get("seconds")
    if seconds is None:
        return "not run yet"
    return f"{seconds} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def page(script: Path) -> str:
    """The page of an example."""
    question, rest = told(script)
    figure = f"![{question}](/static/gallery/{script.stem}.png)" if figure_of(script).exists() else ""
    return f"""# {question}

{plain(rest)}

{figure}

{{download}}`Script </../examples/{script.name}>` · {{download}}`Notebook <{script.stem}.ipynb>` · {took(script)} on one
core

From a clone of the repository:

```bash
python examples/{script.name}         # prints a table, writes its figure under results/
python examples/{script.name} --help
```

:::{{literalinclude}} /../examples/{script.name}
:language: python
:::
"""


def plain(text: str) -> str:
    """Plain text in Markdown: what would be emphasis or a formula stays as it is written."""
    return re.sub(r"([*_$<|^])", r"\\\1", text)


def index() -> str:
    """All examples with their figures."""
    return "\n\n".join(
        [
            "# Gallery",
            "One question per script of at most 80 lines, answered by a figure. The times are those of one core. The "
            "build of this site shows the figures that `python -m docs.figures` has made.",
            "::::{grid} 1 1 2 2\n:gutter: 3",
            *map(tile, examples()),
            "::::",
            toctree(p.stem for p in examples()),
        ]
    )


def tile(script: Path) -> str:
    """An example among the others."""
    question, rest = told(script)
    image = f":img-top: /static/gallery/{script.stem}.png\n" if figure_of(script).exists() else ""
    first = re.split(r"(?<=[.?]) (?=[A-Z])", " ".join(rest.split()))[0]
    return f""":::{{grid-item-card}} {question}
:link: {script.stem}
:link-type: doc
{image}
{plain(first)} *{took(script).capitalize()}.*
:::"""


def toctree(names: Iterable[str]) -> str:
    """A hidden table of contents of pages beside this one."""
    return "\n".join(["```{toctree}", ":hidden:", "", *names, "```"])


# ---- Notebooks


def notebook(script: Path) -> dict[str, Any]:
    """A script as a notebook: what it asks, its code, and a call that shows the figure."""
    text = script.read_text(encoding="utf8")
    question, rest = told(script)
    tree = ast.parse(text)
    lines, said, guard = text.splitlines(), tree.body[0].end_lineno or 0, tree.body[-1].lineno
    figure = f"results/{script.stem}.png"
    call = f'from IPython.display import Image\n\nmain(out=Path("results"))\nImage("{figure}")'
    cells = [_cell("markdown", f"# {question}\n\n{plain(rest)}"), _cell("code", "\n".join(lines[said : guard - 1]))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 4,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "cells": [*cells, _cell("code", call)],
    }


def _cell(kind: str, text: str) -> dict[str, Any]:
    source = text.strip().splitlines(keepends=True)
    ran = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": source, **ran}


__all__ = ["pages", "toctree"]
