"""Slices of one tensor that a loop takes, and the gradients of them, at once."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

FEW = 4
"""Slices of one tensor from which they are taken together."""


def collect_selections(graph: GraphModule) -> GraphModule:
    """Take many slices of one tensor by one operation, and put their gradients together by one.

    A loop over the rows of a tensor selects one row at a time. The gradient of each selection is a tensor of the full
    size that is zero outside of that row, so that adding them takes time quadratic in the number of rows.
    """
    aten, chosen = torch.ops.aten, dict[Any, list[Node]]()
    for node in graph.graph.nodes:
        if node.target is aten.select.int:
            chosen.setdefault((node.args[0], node.args[1]), []).append(node)
    place: Any
    for (source, dim), nodes in chosen.items():
        if len(nodes) < FEW:
            continue
        size = source.meta["val"].shape[dim]
        with graph.graph.inserting_after(source):
            rows = graph.graph.call_function(aten.unbind.int, (source, dim))
        for node in nodes:
            place = node.args[2]
            with graph.graph.inserting_after(rows):
                row = graph.graph.call_function(operator.getitem, (rows, place % size))
            row.meta = dict(node.meta)
            node.replace_all_uses_with(row)
            graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):
        if _adds(node) and not (len(node.users) == 1 and _adds(next(iter(node.users)))):
            _stack_rows(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _adds(node: Node) -> bool:
    return node.target is torch.ops.aten.add.Tensor and len(node.all_input_nodes) == len(node.args) and not node.kwargs


def _stack_rows(graph: GraphModule, total: Node) -> None:
    """Replace the gradients of single rows in a sum by one tensor of all rows."""
    aten, terms, waiting = torch.ops.aten, list[Node](), [total]
    while waiting:
        node = waiting.pop()
        if node is total or (_adds(node) and len(node.users) == 1):
            waiting += node.all_input_nodes if len(node.all_input_nodes) == 2 else []
        else:
            terms.append(node)
    kinds: dict[Any, dict[int, Node]] = {}
    rest: list[Node] = []
    for term in terms:
        if term.target is aten.select_backward.default and len(term.users) == 1:
            arguments: Any = term.args
            gradient, sizes, dim, index = arguments
            rows = kinds.setdefault((tuple(sizes), dim % len(sizes)), {})
            if index % sizes[dim] not in rows:
                rows[index % sizes[dim]] = gradient
                continue
        rest.append(term)
    if not any(len(rows) >= FEW for rows in kinds.values()):
        return
    with graph.graph.inserting_before(total):
        for (sizes, dim), rows in kinds.items():
            some = next(iter(rows.values()))
            zero = graph.graph.call_function(aten.zeros_like.default, (some,)) if len(rows) < sizes[dim] else None
            rest.append(
                graph.graph.call_function(aten.stack.default, ([rows.get(k, zero) for k in range(sizes[dim])], dim))
            )
        made = rest[0]
        for term in rest[1:]:
            made = graph.graph.call_function(aten.add.Tensor, (made, term))
    made.meta = dict(total.meta)
    total.replace_all_uses_with(made)
    graph.graph.erase_node(total)
