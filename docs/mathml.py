"""Formulas as MathML, which browsers draw themselves: the site needs no network and no script for them."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

UNKNOWN = re.compile(r"\\[A-Za-z]+")

UPRIGHT = re.compile(r"\\(?:mathrm|operatorname)\{([A-Za-z][A-Za-z ]*)\}")

SPACED = {
    "<mi>&#x0007E;</mi>": '<mo lspace="0.28em" rspace="0.28em">&#x0223C;</mo>',
    "<mo>&#x02016;</mo>": '<mo stretchy="false" lspace="0" rspace="0">&#x02016;</mo>',
    "<mi>log</mi>": '<mi>log</mi><mspace width="0.17em"/>',
}
"""Relations, bars and functions with the spaces and sizes that TeX gives them."""


def mathml(latex: str, display: str) -> str:
    """MathML of a formula. Names set upright stay so: a single letter in ``mi`` would be italic."""
    aligned = display == "block" and "&" in latex and r"\begin" not in latex
    source = rf"\begin{{align*}}{latex}\end{{align*}}" if aligned else latex
    body = convert(UPRIGHT.sub(r"\\text{\1}", source), display=display)
    for wrong, right in SPACED.items():
        body = body.replace(wrong, right)
    unknown = UNKNOWN.search(body)
    if unknown:
        raise ValueError(f"formula: expected commands that can be drawn, got {unknown[0]} in {latex}")
    return body


def inline(translator: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own, which scrolls where it is wider than the page."""
    name = escape(" ".join(node.astext().split()), quote=True)
    body = mathml(node.astext(), "block")
    translator.body.append(f'<div class="formula" tabindex="0" role="group" aria-label="{name}">{body}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
