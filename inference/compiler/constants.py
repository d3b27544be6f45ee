r"""Constants of a graph: the tensors that it holds, and what depends on them alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from inference.compiler import policy
from inference.compiler.passes import add_input, is_noise, is_view


def lift_constants(graph: GraphModule, before: int = 0) -> list[Tensor]:
    """Turn the tensors that a graph holds into its last inputs but ``before``, and return them; they may change."""
    held: dict[str, Node] = {}
    for node in _holders(graph):
        name = str(node.target)
        if name not in held:
            held[name] = add_input(graph, f"held_{len(held)}", before)
            held[name].meta = dict(node.meta)
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    tensors = [attrgetter(name)(graph) for name in held]
    graph.recompile()
    return tensors


def pack_constants(
    graph: Callable[..., Any], given: int, held: Sequence[Tensor]
) -> tuple[Callable[[Sequence[Tensor]], list[Tensor]], Callable[..., Any]]:
    """Pack small constants of a graph into one per dtype and device: every round of a loop pays for each input.

    Args:
        graph: A function of positions, ``given`` further arguments, and the constants.
        given: Number of further arguments.
        held: The constants, for their shapes.

    Returns:
        What packs constants of these shapes, and the graph as a function of positions, further arguments, and the
        packed constants.
    """
    shapes = [h.shape for h in held]
    small = [k for k, shape in enumerate(shapes) if shape.numel() <= policy.PACKED_NUMBERS]
    kinds: dict[Any, list[int]] = {}
    for k in small:
        kinds.setdefault((held[k].dtype, held[k].device), []).append(k)
    whole = [k for k in range(len(held)) if k not in small]

    def pack(held: Sequence[Tensor]) -> list[Tensor]:
        packs = [torch.cat([held[k].detach().reshape(-1) for k in chosen]) for chosen in kinds.values()]
        return [*packs, *(held[k].detach() for k in whole)]

    def call(positions: Tensor, *rest: Tensor) -> Any:
        parts: dict[int, Tensor] = dict(zip(whole, rest[given + len(kinds) :], strict=True))
        for chosen, packed in zip(kinds.values(), rest[given:], strict=False):
            pieces = packed.split([shapes[k].numel() for k in chosen])
            parts |= {k: piece.reshape(shapes[k]) for k, piece in zip(chosen, pieces, strict=True)}
        return graph(positions, *rest[:given], *(parts[k] for k in range(len(shapes))))

    return pack, call


def fold_constants(graph: GraphModule, data: Sequence[Tensor] = ()) -> Callable[..., list[Tensor]]:
    """Compute what depends on no input, such as terms of the data alone, once instead of in every leapfrog step.

    Args:
        graph: A graph, which is changed.
        data: Tensors that it may hold.

    Returns:
        A function of tensors in the place of ``data``: what the graph would hold then, in the order of
        :func:`lift_constants`.
    """
    known = constants_of(graph)
    # A view stays in the graph: as a constant it would alias the tensor that it views.
    needed = {n for n in graph.graph.nodes if n not in known}
    for node in reversed(known):
        if is_view(node) and any(u in needed for u in node.users):
            needed.add(node)
    folded = [n for n in known if n.op == "call_function" and n not in needed and any(u in needed for u in n.users)]
    held = [n for n in _holders(graph) if n in needed]
    derive = as_function_of(graph, [*held, *folded], data)
    places = {str(n.target): k for k, n in enumerate(held)}
    for k, node in enumerate(folded):
        name = f"folded_{k}"
        places[name] = len(held) + k
        graph.register_buffer(name, known[node].contiguous())
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    # Checks of the data have been made: they have no users, but an effect that keeps them alive.
    for node in reversed(known):
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    order = [places[name] for name in dict.fromkeys(str(n.target) for n in _holders(graph))]

    def derived(*data: Tensor) -> list[Tensor]:
        values = derive(*data)
        return [values[k].contiguous() if k >= len(held) else values[k] for k in order]

    return derived


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


def as_function_of(graph: GraphModule, wanted: Collection[Node], data: Sequence[Tensor]) -> Callable[..., list[Any]]:
    """Constants of a graph as a function of tensors in the place of some that it holds.

    Args:
        graph: The graph.
        wanted: Nodes that depend on no input.
        data: Tensors that the graph may hold, known by identity.
    """
    needed = set(wanted)
    for node in reversed(graph.graph.nodes):
        needed |= set(node.all_input_nodes) if node in needed else set()
    made, copies = Graph(), dict[Node, Node]()
    places = {id(value): made.placeholder(f"data_{k}") for k, value in enumerate(data)}
    for node in [n for n in graph.graph.nodes if n in needed]:
        value = attrgetter(str(node.target))(graph) if node.op == "get_attr" else None
        copies[node] = places.get(id(value)) or made.node_copy(node, copies.__getitem__)
    made.output([copies[n] for n in wanted])
    call = GraphModule(graph, made)

    def constants(*data: Tensor) -> list[Any]:
        with torch.no_grad():
            return list(call(*data))

    return constants


def held_besides(graph: GraphModule, known: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that a graph holds and that are neither ``known`` nor numbers of the code that it was recorded from."""
    # The operation by which torch.tensor takes numbers.
    literal = torch.ops.aten.lift_fresh_copy.default
    nodes = [n for n in _holders(graph) if not all(u.target is literal for u in n.users)]
    held = [attrgetter(str(n.target))(graph) for n in nodes]
    known_ids = {id(v) for v in known}
    return [v for v in held if id(v) not in known_ids]


def _holders(graph: GraphModule) -> list[Node]:
    """Nodes that stand for tensors which the graph holds."""
    return [n for n in graph.graph.nodes if n.op == "get_attr"]
