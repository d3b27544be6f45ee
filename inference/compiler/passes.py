r"""Passes over a graph that leave its values unchanged."""

from __future__ import annotations

import operator
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from inference.compiler import policy


def lift_constants(graph: GraphModule, before: int = 0) -> list[Tensor]:
    """Turn the tensors that a graph holds into its last inputs but ``before``, and return them; they may change."""
    held: dict[str, Node] = {}
    for node in [n for n in graph.graph.nodes if n.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            held[name] = add_input(graph, f"held_{len(held)}", before)
            held[name].meta = dict(node.meta)
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    tensors = [attrgetter(name)(graph) for name in held]
    graph.recompile()
    return tensors


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


def pack_constants(
    graph: Callable[..., Any], given: int, held: list[Tensor]
) -> tuple[list[Tensor], Callable[..., Any]]:
    """Pack small constants of a graph into one per dtype and device: every round of a loop pays for each input.

    Args:
        graph: A function of positions, ``given`` further arguments, and the constants.
        given: Number of further arguments.
        held: The constants.

    Returns:
        The packed constants, and the graph as a function of positions, further arguments, and these.
    """
    held = [h.detach() for h in held]
    small = [k for k, h in enumerate(held) if h.numel() <= policy.PACKED_NUMBERS]
    kinds: dict[Any, list[int]] = {}
    for k in small:
        kinds.setdefault((held[k].dtype, held[k].device), []).append(k)
    whole = [k for k in range(len(held)) if k not in small]
    packs = [torch.cat([held[k].reshape(-1) for k in chosen]) for chosen in kinds.values()]

    def call(positions: Tensor, *rest: Tensor) -> Any:
        parts: dict[int, Tensor] = dict(zip(whole, rest[given + len(packs) :], strict=True))
        for chosen, pack in zip(kinds.values(), rest[given:], strict=False):
            pieces = pack.split([held[k].numel() for k in chosen])
            parts |= {k: piece.reshape(held[k].shape) for k, piece in zip(chosen, pieces, strict=True)}
        return graph(positions, *rest[:given], *(parts[k] for k in range(len(held))))

    return [*packs, *(held[k] for k in whole)], call


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


def fold_constants(graph: GraphModule) -> GraphModule:
    """Compute what depends on no input, such as terms of the data alone, once instead of in every leapfrog step."""
    known = constants_of(graph)
    # A view stays in the graph: as a constant it would alias the tensor that it views.
    needed = {n for n in graph.graph.nodes if n not in known}
    for node in reversed(known):
        if is_view(node) and any(u in needed for u in node.users):
            needed.add(node)
    for k, (node, value) in enumerate(known.items()):
        if node.op == "call_function" and node not in needed and any(u in needed for u in node.users):
            graph.register_buffer(f"folded_{k}", value.contiguous())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(f"folded_{k}"))
    # Checks of the data have been made: they have no users, but an effect that keeps them alive.
    for node in reversed(known):
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
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


def constants_of(graph: GraphModule) -> dict[Node, Any]:
    """Values of the nodes that depend on no input, views included."""
    known: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = attrgetter(str(node.target))(graph).detach()
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes) and not is_noise(node):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known


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
