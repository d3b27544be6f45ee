r"""A long graph as a sequence of short pieces, of which equal ones share one program.

A model that loops over time leaves a graph of thousands of operations, which no compiler takes as a whole. But every
step of the loop leaves the same operations, forward and backward. Here the graph of one chain is cut at the period of
its operations. Each distinct piece is mapped over chains once and compiled once, so that the cost of compiling depends
on the body of the loop and not on its length. What differs between two steps, such as an observation, is an input of
the piece.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from inference.compiler import policy
from inference.compiler.capture import traced
from inference.compiler.constants import as_function_of, constants_of
from inference.compiler.form import Form
from inference.compiler.fuse import fused
from inference.compiler.passes import is_view, out_of_place, share_products, simplify
from inference.compiler.recorder import Recording
from inference.compiler.selections import collect_selections


@dataclass
class _Program:
    """What equal pieces share: operations, their number beyond that of inputs and results, the graph, what runs it."""

    nodes: int
    gain: int
    graph: Recording
    run: Callable[..., Any]
    uses: int = 0


@dataclass(frozen=True)
class _Piece:
    """A program with the places of its inputs and results among the values of the whole."""

    program: _Program
    inputs: tuple[int, ...]
    results: tuple[int, ...]


class Pieces:
    r"""A graph of one chain as a function of many, piece by piece.

    Args:
        graph: A graph of one chain, without in-place operations (see :func:`cut`).
        bounds: Where pieces begin and end among its operations.
        inputs: Its inputs, of many chains: the first dimension is that of chains.
        data: Tensors that the graph holds and others may replace (:meth:`again`).
    """

    def __init__(
        self,
        graph: GraphModule,
        bounds: Sequence[tuple[int, int]],
        inputs: Sequence[Tensor],
        data: Sequence[Tensor] = (),
    ) -> None:
        self._constants = constants_of(graph)
        self._derive = as_function_of(graph, self._constants, data)
        operations = _operations(graph, self._constants)
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self._places = {n: k for k, n in enumerate([*placeholders, *self._constants, *operations])}
        self._start: list[Any] = [None] * len(placeholders) + [*self._constants.values()] + [None] * len(operations)
        self._inputs = len(placeholders)
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        self._outputs = [self._places[n] for n in output.args[0]]
        self._programs: dict[Any, _Program] = {}
        values = self._started(inputs)
        self._pieces = []
        for first, last in bounds:
            piece = self._piece(operations[first:last], values)
            self._run_piece(piece, values)
            self._pieces.append(piece)

    def __call__(self, *inputs: Tensor) -> list[Any]:
        """Results of the graph for inputs of many chains."""
        values = self._started(inputs)
        for piece in self._pieces:
            self._run_piece(piece, values)
        return [values[k] for k in self._outputs]

    @property
    def operations(self) -> int:
        """Operations of a call."""
        return sum(p.program.nodes for p in self._pieces)

    def worth(self, calls: float = policy.PIECE_CALLS) -> list[_Program]:
        """Programs that are to be compiled before so many calls: those that make up most operations."""
        # A stack of hundreds of rows takes a compiler a minute and gains nothing.
        programs = (p for p in self._programs.values() if p.gain > 0)
        long = [p for p in programs if policy.worth_a_piece(p.nodes, p.uses, calls)]
        return sorted(long, key=lambda p: -p.nodes * p.uses)[: policy.PIECE_PROGRAMS]

    @property
    def nodes(self) -> int:
        """Nodes of a single graph that would take as long to compile as the pieces, by ``policy.FUSED_NODES``."""
        return int(sum(p.nodes**2 for p in self.worth()) ** 0.5)

    def fuse(self, *inputs: Tensor, calls: float = policy.PIECE_CALLS) -> None:
        """Compile the programs that are worth it in so many calls, at inputs of the shapes of these."""
        values, chosen = self._started(inputs), {id(p) for p in self.worth(calls)}
        for piece in self._pieces:
            if id(piece.program) in chosen and piece.program.run == piece.program.graph.forward:
                piece.program.run = fused(piece.program.graph, [values[k] for k in piece.inputs])
            self._run_piece(piece, values)

    def again(self, data: Sequence[Tensor] | None = None) -> Pieces:
        """The same pieces, none of them compiled, with tensors in the place of the argument ``data``."""
        made = copy(self)
        if data is not None:
            made._start = list(self._start)
            made._start[self._inputs : self._inputs + len(self._constants)] = self._derive(*data)
        made._programs = {k: replace(p, run=p.graph.forward) for k, p in self._programs.items()}
        renewed = {id(p): made._programs[k] for k, p in self._programs.items()}
        made._pieces = [replace(piece, program=renewed[id(piece.program)]) for piece in self._pieces]
        return made

    def unfuse(self) -> None:
        """Run the graphs of the programs again."""
        for program in self._programs.values():
            program.run = program.graph.forward

    def _started(self, inputs: Sequence[Tensor]) -> list[Any]:
        return [*inputs, *self._start[self._inputs :]]

    def _run_piece(self, piece: _Piece, values: list[Any]) -> None:
        for place, result in zip(piece.results, piece.program.run(*[values[k] for k in piece.inputs]), strict=True):
            values[place] = result

    def _piece(self, operations: Sequence[Node], values: list[Any]) -> _Piece:
        graph, inputs, results = _extracted(operations)
        places = tuple(self._places[n] for n in inputs)
        given = [values[k] for k in places]
        dims = tuple(None if n in self._constants else 0 for n in inputs)
        key = (graph.code, dims, tuple(map(Form.of, given)))
        if key not in self._programs:
            mapped = traced(functionalize(torch.vmap(graph, dims)), *given)
            share_products(simplify(mapped))
            gain = sum(not is_view(n) for n in operations) - len(inputs) - len(results)
            self._programs[key] = _Program(len(operations), gain, mapped, mapped.compiled().forward)
        self._programs[key].uses += 1
        return _Piece(self._programs[key], places, tuple(self._places[n] for n in results))


def cut(graph: GraphModule) -> list[tuple[int, int]] | None:
    """Prepare a graph of one chain in place, and return where to cut it; None if too little of it repeats."""
    if not out_of_place(graph):
        return None
    collect_selections(simplify(graph))
    for node in [n for n in graph.graph.nodes if n.target is operator.getitem]:
        node.args[0].append(node)
    constants = constants_of(graph)
    operations = _operations(graph, constants)
    labels: dict[Any, int] = {}
    numbers = np.array([labels.setdefault(_label(n, constants), len(labels)) for n in operations])
    bounds, covered, end = [], 0, 0
    for first, last, period in sorted(periods(numbers)):
        # What has several results stays together with them: a piece takes and gives tensors.
        first = next((k for k in range(first, last) if operations[k].target is not operator.getitem), last)
        while last < len(operations) and operations[last].target is operator.getitem:
            last -= 1
        bounds += [(end, first)] if end < first else []
        bounds += _grouped(first, last, period)
        covered, end = covered + last - first, last
    bounds += [(end, len(numbers))] if end < len(numbers) else []
    return bounds if covered >= policy.PIECES_COVER * len(numbers) else None


def periods(labels: np.ndarray, first: int = 0) -> list[tuple[int, int, int]]:
    """Stretches of a sequence that repeat themselves at least thrice: where they begin and end, and their periods."""
    best = 0, 0, 0
    for period in range(1, min(policy.PIECE_NODES, len(labels) // 3) + 1):
        broken = np.flatnonzero(labels[period:] != labels[:-period])
        edges = np.concatenate([[-1], broken, [len(labels) - period]])
        lengths = np.diff(edges) - 1
        longest = int(lengths.argmax())
        length = int(lengths[longest])
        # A multiple of the period covers as much.
        if length >= 2 * period and length + period > 1.1 * (best[1] - best[0]):
            begin = int(edges[longest]) + 1
            best = begin, begin + length + period, period
    begin, end, period = best
    if end - begin < policy.PIECE_LEAST:
        return []
    found = [(first + begin, first + end, period)]
    return found + periods(labels[:begin], first) + periods(labels[end:], first + end)


def _grouped(first: int, last: int, period: int) -> list[tuple[int, int]]:
    """Pieces of several periods each, so many that few periods are left over."""
    rounds = (last - first) // period
    most = max(1, min(policy.PIECE_NODES // period, rounds // policy.PIECE_USES))
    each = min(range(max(1, most // 2), most + 1), key=lambda k: (rounds % k, -k))
    size = each * period
    if not rounds:
        return [(first, last)] if first < last else []
    bounds = [(k, k + size) for k in range(first, first + rounds // each * size, size)]
    return bounds + ([(bounds[-1][1], last)] if bounds[-1][1] < last else [])


def _operations(graph: GraphModule, constants: dict[Node, Any]) -> list[Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and n not in constants]


def _label(node: Node, constants: dict[Node, Any]) -> Any:
    """What an operation has in common with the same operation of another round."""
    inputs = tuple((n in constants, n.meta.get("val")) for n in node.all_input_nodes)
    return str(node.target), str(map_arg((node.args, node.kwargs), lambda n: "node")), inputs


def _extracted(operations: Sequence[Node]) -> tuple[GraphModule, list[Node], list[Node]]:
    """Operations as a graph of their own, with the nodes that it needs and the nodes that others need of it."""
    inside = set(operations)
    inputs = list(dict.fromkeys(i for n in operations for i in n.all_input_nodes if i not in inside))
    results = [n for n in operations if any(u not in inside for u in n.users)]
    graph, copies = Graph(), dict[Node, Node]()
    for node in inputs:
        copies[node] = graph.placeholder(f"x{len(copies)}")
    for node in operations:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        # The names of equal pieces are equal.
        copies[node]._rename(f"v{len(copies)}")
    graph.output([copies[n] for n in results])
    return GraphModule({}, graph), inputs, results
