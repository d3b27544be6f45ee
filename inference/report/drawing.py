"""Panels of one style: matplotlib's SVG, in the colours of the page, light and dark."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from inference.report.blocks import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE, FILL = "#22262b", "#6b7280", "#d5d9df", "#eceff3"
"""Colours of text, of axes, of lines in the background and of areas."""

COLOURS = ("#2f6db3", "#d07a1f", "#2f9468", "#bf4a4a", "#7d5bb0", "#8a6a4a", "#c4609a", "#7f8b2a")
"""Colours of methods and chains."""

_VARIABLES = {
    **{colour: f"var(--c{k})" for k, colour in enumerate(COLOURS)},
    **{INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", FILL: "var(--fill)"},
}

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.3,
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def panel(
    draw: Callable[[Axes], Any],
    title: str,
    alt: str,
    *,
    note: str = "",
    size: tuple[float, float] = (3.5, 2.1),
    wide: bool = False,
) -> Figure:
    """Draw one panel.

    Args:
        draw: Draws into axes.
        title: What it shows.
        alt: Text alternative.
        note: How to read it.
        size: Width and height in inches, of 96 pixels each on the page.
        wide: Whether it takes the whole width of the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(_STYLE):
        canvas = Canvas(figsize=size)
        axes = canvas.add_subplot()
        axes.locator_params(nbins=5)
        draw(axes)
        _fit(canvas, axes)
        written = io.StringIO()
        canvas.savefig(written, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    return Figure(title, alt, inline(written.getvalue(), alt), note, wide)


def _fit(canvas: Any, axes: Axes) -> None:
    """Leave as much space as labels need. Matplotlib's layouts, which measure them, take half of the time of a plot."""
    width, height = canvas.get_size_inches()
    letters = max(map(len, axes.yaxis.get_major_formatter().format_ticks(list(axes.get_yticks()))), default=0)
    left = 0.07 + 0.075 * letters + (0.2 if axes.get_ylabel() else 0.0)
    bottom = 0.4 if axes.get_xlabel() else 0.24
    canvas.subplots_adjust(left / width, bottom / height, 1 - 0.1 / width, 1 - 0.06 / height)


def inline(svg: str, alt: str) -> str:
    """An SVG file as an element of a page: in the page's colours and font, with identifiers of its own."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    own = hashlib.sha1(body.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{own}-", body)
    box = re.search(r'viewBox="([^"]+)"', body)
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="{box[1] if box else ""}"'
    head += ' xmlns:xlink="http://www.w3.org/1999/xlink">'
    body = head + body[body.index(">") + 1 :]
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    # The page's font: matplotlib names its own in each text.
    return re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", body)


def image(pixels: Any, title: str, alt: str, *, scale: int = 3) -> Figure:
    """Pixels (height, width) in [0, 1], 0 black, as a PNG in a data URI, each as a square of ``scale`` pixels."""
    import numpy as np
    from matplotlib.image import imsave

    written = io.BytesIO()
    large = np.kron(np.asarray(pixels, dtype=float).clip(0, 1), np.ones((scale, scale)))
    imsave(written, large, cmap="gray", vmin=0, vmax=1, format="png")
    encoded = base64.b64encode(written.getvalue()).decode()
    return Figure(title, alt, f'<img alt="{escape(alt)}" src="data:image/png;base64,{encoded}">', wide=True)
