r"""Passes over a graph that leave its values unchanged."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def add_input(graph: GraphModule, name: str, before: int = 0) -> Node:
    """Add an input to a graph, before its last ``before``."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    inputs = inputs[: len(inputs) - before]
    with graph.graph.inserting_after(inputs[-1]) if inputs else graph.graph.inserting_before():
        return graph.graph.placeholder(name)


def chains_last(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Turn a function of positions (chains, D) into one of positions (D, chains)."""

    def call(positions: Tensor, *held: Tensor) -> tuple[Tensor, Tensor]:
        energies, gradients = forward(positions.mT, *held)
        return energies, gradients.mT.clone(memory_format=torch.contiguous_format)

    return call


def share_products(graph: GraphModule) -> GraphModule:
    """Use one matrix product where vmap multiplies each chain by the same matrix, mostly the data."""
    aten = torch.ops.aten
    for node in [n for n in graph.graph.nodes if n.target is aten.bmm.default]:
        # A shared matrix was expanded over chains: its first dimension has stride zero.
        which = [k for k in (0, 1) if node.args[k].meta["val"].strides[0] == 0]
        if len(which) != 1:
            continue
        left, right = node.args
        (b, n, m), k = left.meta["val"].shape, right.meta["val"].shape[-1]
        call = graph.graph.call_function
        with graph.graph.inserting_before(node):
            matrix = call(aten.select.int, (node.args[which[0]], 0, 0))
            if which[0] == 0:
                rows = call(aten.reshape.default, (call(aten.transpose.int, (right, 1, 2)), [b * k, m]))
                product = call(aten.mm.default, (rows, call(aten.t.default, (matrix,))))
                out = call(aten.transpose.int, (call(aten.reshape.default, (product, [b, k, n])), 1, 2))
            else:
                product = call(aten.mm.default, (call(aten.reshape.default, (left, [b * n, m])), matrix))
                out = call(aten.reshape.default, (product, [b, n, k]))
            # Later views expect the original memory layout.
            out = call(aten.clone.default, (out,), {"memory_format": torch.contiguous_format})
        node.replace_all_uses_with(out)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def is_view(node: Node) -> bool:
    """Whether a node is a tensor that the graph holds, or a view of another node."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    schema = getattr(node.target, "_schema", None)
    # An in-place operation returns its argument too, but that has no other name.
    views = schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
    return node.op == "get_attr" or views


def out_of_place(graph: GraphModule) -> bool:
    """Replace in-place operations on tensors without views by others; False if one is left."""
    for node in list(graph.graph.nodes):
        if not _writes(node):
            continue
        schema, changed = node.target._schema, node.args[0]
        namespace, _, name = schema.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
        target = getattr(packet, schema.overload_name or "default", None)
        if target is None or changed.op != "call_function" or is_view(changed) or any(map(is_view, changed.users)):
            return False
        value, result = changed.meta["val"], node.meta["val"]
        if value.dtype != result.dtype or value.shape != result.shape:
            return False
        node.target = target
        for user in [u for u in changed.users if node < u]:
            user.replace_input_with(changed, node)
    graph.recompile()
    return True


def simplify(graph: GraphModule) -> GraphModule:
    """Drop copies of names, operations that were made before, and what nobody uses, from a graph without gradients."""
    aten, known = torch.ops.aten, dict[Any, Node]()
    for node in list(graph.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
            continue
        if is_noise(node) or _writes(node):
            continue
        key = node.op, str(node.target), repr((node.args, sorted(node.kwargs.items())))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def is_pure(graph: GraphModule) -> bool:
    """Whether no operation of a graph changes a tensor in place."""
    return not any(map(_writes, graph.graph.nodes))


def _writes(node: Node) -> bool:
    return getattr(getattr(node.target, "_schema", None), "is_mutable", False)


def is_noise(node: Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
