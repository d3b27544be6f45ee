"""The story of a pair: its docstring, with the formulas as pictures."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from html import escape
from typing import Any

from inference.report.blocks import Text

ENDS = ("Args:", "Attributes:", "Data:", "Example:", "Raises:", "Sites:", "Returns:", "References:")
"""Beginnings of paragraphs at which a docstring turns from the story to the code."""


def story(pair: Any) -> list[Text]:
    """Paragraphs of the docstring of a pair; before them those of its module, where that has formulas."""
    owner = pair[0] if isinstance(pair, tuple) else pair
    owner = getattr(owner, "__self__", getattr(owner, "func", owner))
    kind = owner if inspect.isfunction(owner) else type(owner)
    own = inspect.getdoc(kind) or "" if kind.__module__ not in ("builtins", "functools") else ""
    module = inspect.getdoc(sys.modules.get(kind.__module__)) or ""
    parts = _told(own)
    if ".. math::" in module and not any(".. math::" in p for p in parts):
        parts = [*parts[:1], *_told(module)[1:], *parts[1:]]
    return [_paragraph(p) for p in parts]


def _told(doc: str) -> list[str]:
    """Paragraphs up to the first that is about arguments; a formula stays with its directive."""
    parts: list[str] = []
    for part in re.split(r"\n\s*\n", doc):
        if part.lstrip().startswith(ENDS):
            break
        if parts and parts[-1].strip() == ".. math::":
            parts[-1] = ".. math:: " + part.strip()
        else:
            parts.append(textwrap.dedent(part).strip())
    return [p for p in parts if p]


def _paragraph(part: str) -> Text:
    before, directive, formula = part.partition(".. math::")
    if directive:
        lines = re.split(r"\\\\|\\qquad", " ".join(formula.split()))
        shown = "".join(f"<span>{formula_of(line.strip())}</span>" for line in lines if line.strip(" ,"))
        return Text((f"{_words(before)} " if before.strip() else "") + shown, "math")
    return Text(_words(part))


def _words(text: str) -> str:
    marks = re.split(r"(:math:`[^`]+`|:\w+:`[^`]+`|``[^`]+``|https?://[^\s)>]+)", " ".join(text.split()))
    return "".join(map(_mark, marks))


def _mark(text: str) -> str:
    if text.startswith(":math:"):
        return formula_of(text[7:-1])
    if text.startswith(("``", ":")) and text.endswith("`"):
        return f"<code>{escape(text.strip('`').rpartition('`')[2])}</code>"
    if text.startswith("http"):
        link = text.rstrip(".,;")
        return f'<a href="{escape(link)}">{escape(link)}</a>{escape(text[len(link) :])}'
    return escape(text)


def formula_of(latex: str) -> str:
    """A formula as an inline SVG in the colour of the text, by matplotlib; as code where it cannot read it."""
    from matplotlib import rc_context
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import MathTextParser
    from matplotlib.textpath import TextPath

    source = f"${latex.strip(' ,')}$"
    try:
        with rc_context({"mathtext.fontset": "cm"}):
            font = FontProperties(size=100)
            width, height, depth, _, _ = MathTextParser("path").parse(source, prop=font)
            path = TextPath((0, 0), source, size=100, prop=font)
    except (ValueError, RuntimeError):
        return f"<code>{escape(latex)}</code>"
    steps = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    drawn = []
    for points, code in path.iter_segments(simplify=False, curves=True):
        places = "" if code == 79 else " ".join(f"{v:.0f}" for v in points)
        drawn.append(f"{steps[int(code)]}{places}")
    box = f"-4 {-height - 4:.0f} {width + 8:.0f} {height + depth + 8:.0f}"
    style = f"height:{(height + depth + 8) / 92:.2f}em;vertical-align:-{(depth + 4) / 92:.2f}em"
    return (
        f'<svg class="formula" role="img" aria-label="{escape(latex)}" viewBox="{box}" style="{style}">'
        f'<path transform="scale(1 -1)" d="{"".join(drawn)}"/></svg>'
    )
