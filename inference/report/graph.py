"""The graph of a model: its sites as nodes, its plates as boxes, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from torch import Tensor
from torch.distributions import Distribution, Transform

from inference.core.bound import BoundPair
from inference.core.handlers import isolated
from inference.report.blocks import Figure

MOST = 30
"""Largest number of sites that are drawn."""

HEIGHT, GAP, STEP, PAD = 30, 22, 74, 16
"""Height of a node, space between nodes, distance of layers and margin of plates, in pixels."""


@dataclass
class Node:
    """A site: its name, parents, plates from the outermost in, role and size, and where it is drawn."""

    name: str
    parents: Sequence[str]
    plates: tuple[str, ...]
    role: str
    layer: int = 0
    x: float = 0.0

    @property
    def width(self) -> float:
        """Width in pixels, by the length of the name."""
        return max(46.0, 8.2 * len(self.name) + 22)

    @property
    def y(self) -> float:
        """Height of the centre."""
        return 40 + STEP * self.layer

    def edge(self, other: Node) -> tuple[float, float]:
        """Where a line to the centre of another node leaves this one."""
        dx, dy = other.x - self.x, other.y - self.y
        scale = 1 / math.hypot(dx / (self.width / 2), dy / (HEIGHT / 2))
        return self.x + scale * dx, self.y + scale * dy


def relations(bound: BoundPair) -> dict[str, Node]:
    """The sites of a model with what they depend on, in the order of a run."""
    with isolated(0), torch.no_grad(), pyro.validation_enabled(False), TrackProvenance(include_deterministic=True):
        nodes = poutine.trace(bound.model).get_trace(**bound.arguments()).nodes
    sizes: dict[str, int] = {}
    for name in bound.sites:
        for frame in nodes[name]["cond_indep_stack"]:
            sizes[frame.name] = sizes.get(frame.name, 0) + 1
    found = {}
    for name, site in bound.sites.items():
        parents = set().union(*map(get_provenance, _tensors(nodes[name]["fn"])))
        # The largest plate is the outermost.
        plates = sorted({f.name for f in nodes[name]["cond_indep_stack"]}, key=lambda p: (-sizes[p], p))
        found[name] = Node(name, [p for p in bound.sites if p in parents - {name}], tuple(plates), site.role)
    return found


def _tensors(held: Any, depth: int = 6) -> Iterator[Tensor]:
    """Tensors that a distribution was made of."""
    if isinstance(held, Tensor):
        yield held
    elif depth and isinstance(held, Distribution | Transform | SimpleNamespace):
        yield from _tensors(list(vars(held).values()), depth - 1)
    elif depth and isinstance(held, list | tuple | dict):
        for part in held.values() if isinstance(held, dict) else held:
            yield from _tensors(part, depth - 1)


def graph(bound: BoundPair) -> Figure | None:
    """The graph of a model; None where it has no sites, or too many to be drawn."""
    if not 0 < len(bound.sites) <= MOST:
        return None
    nodes = relations(bound)
    for node in nodes.values():
        # Sites come in the order of a run: parents before children.
        node.layer = 1 + max((nodes[p].layer for p in node.parents), default=-1)
    width = _place(nodes)
    sizes = {p: n for s in bound.sites.values() for p, n in zip(s.plates, s.shape, strict=False) if p}
    plates = [_plate(p, nodes, sizes) for p in dict.fromkeys(p for n in nodes.values() for p in n.plates)]
    edges = [_edge(nodes[p], n) for n in nodes.values() for p in n.parents]
    height = max(n.y for n in nodes.values()) + 40 + PAD * max(len(n.plates) for n in nodes.values())
    alt = "Graph of the model: " + "; ".join(
        f"{n.name} ({n.role}{', in ' + ' and '.join(n.plates) if n.plates else ''}"
        + (f", from {', '.join(n.parents)})" if n.parents else ")")
        for n in nodes.values()
    )
    parts = "".join([*plates, *edges, *map(_drawn, nodes.values())])
    svg = (
        f'<svg class="graph" role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="width:{width:.0f}px">{parts}</svg>'
    )
    note = "Filled: observed. Dashed outline: computed from others. Boxes: plates, with the number of their elements."
    return Figure("Sites and plates", alt, svg, note, wide=True)


def _place(nodes: Mapping[str, Node]) -> float:
    """Give nodes their places from left to right, those of the same plates together; return the width of all."""
    groups: dict[tuple[str, ...], list[Node]] = {}
    for node in nodes.values():
        groups.setdefault(node.plates, []).append(node)
    # Groups that share plates stand side by side.
    left = 30.0
    for plates in sorted(groups):
        layers: dict[int, list[Node]] = {}
        for node in groups[plates]:
            layers.setdefault(node.layer, []).append(node)
        widths = {k: sum(n.width for n in row) + GAP * (len(row) - 1) for k, row in layers.items()}
        whole = max(widths.values())
        margin = PAD * len(plates)
        for k, row in layers.items():
            at = left + margin + (whole - widths[k]) / 2
            for node in row:
                node.x = at + node.width / 2
                at += node.width + GAP
        left += whole + 2 * margin + GAP
    return left + 8


def _plate(name: str, nodes: Mapping[str, Node], sizes: Mapping[str, int]) -> str:
    inside = [n for n in nodes.values() if name in n.plates]
    depth = min(len(n.plates) - n.plates.index(name) for n in inside)
    margin = PAD * max(1, depth) - 4
    x0, x1 = min(n.x - n.width / 2 for n in inside) - margin, max(n.x + n.width / 2 for n in inside) + margin
    y0, y1 = min(n.y for n in inside) - HEIGHT / 2 - margin, max(n.y for n in inside) + HEIGHT / 2 + margin + 8
    label = f"{name} ({sizes[name]:,})" if name in sizes else name
    lacking = max(0.0, 6.6 * len(label) + 12 - (x1 - x0)) / 2
    x0, x1 = x0 - lacking, x1 + lacking
    return (
        f'<rect class="plate" x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" rx="7"/>'
        f'<text class="plate" x="{x1 - 7:.1f}" y="{y1 - 6:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _edge(start: Node, end: Node) -> str:
    (x0, y0), (x1, y1) = start.edge(end), end.edge(start)
    angle = math.atan2(y1 - y0, x1 - x0)
    wings = [(x1 - 7 * math.cos(angle + s), y1 - 7 * math.sin(angle + s)) for s in (0.4, -0.4)]
    tip = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), *wings))
    return f'<path class="edge" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/><polygon class="tip" points="{tip}"/>'


def _drawn(node: Node) -> str:
    shape = f'class="{node.role}" cx="{node.x:.1f}" cy="{node.y:.1f}" rx="{node.width / 2:.1f}" ry="{HEIGHT / 2}"'
    place = f'x="{node.x:.1f}" y="{node.y + 4:.1f}" text-anchor="middle"'
    return f"<ellipse {shape}/><text {place}>{escape(node.name)}</text>"
