r"""Let a matrix that cannot be factorised fail alone, in the chain to which it belongs."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node


def failures_to_nan(graph: GraphModule) -> GraphModule:
    """Let a matrix that cannot be factorised give nan, in place of an error that would end all chains.

    In the graph a factorisation returns which matrices have failed, and a check of that raises the error. Without the
    check the trajectory of that chain diverges alone, as it does under Pyro's own kernels. ``torch.cholesky`` raises by
    itself, and takes the place of ``torch.linalg.cholesky`` here; eigenvalues and singular values fail where a matrix
    is not finite, in whose place they get zeros.
    """
    aten = torch.ops.aten
    for node in [n for n in graph.graph.nodes if n.target is aten.cholesky.default]:
        _by_cholesky_ex(graph, node)
    for node in [n for n in graph.graph.nodes if n.target in (aten._linalg_eigh.default, aten._linalg_svd.default)]:
        _of_finite(graph, node)
    for check in [n for n in graph.graph.nodes if n.target is aten._linalg_check_errors.default]:
        failed = check.args[0]
        parts = [n for n in failed.args[0].users if n.target is operator.getitem and n is not failed]
        for part in (n for n in parts if n.meta["val"].dtype.is_floating_point):
            users, shape = list(part.users), list(failed.meta["val"].shape)
            ones = [1] * (len(part.meta["val"].shape) - len(shape))
            with graph.graph.inserting_after(max(part, failed)):
                mask = graph.graph.call_function(aten.reshape.default, (failed, shape + ones))
            with graph.graph.inserting_after(mask):
                marked = graph.graph.call_function(aten.ne.Scalar, (mask, 0))
            with graph.graph.inserting_after(marked):
                out = graph.graph.call_function(aten.masked_fill.Scalar, (part, marked, math.nan))
            for user in users:
                user.replace_input_with(part, out)
        graph.graph.erase_node(check)
    graph.recompile()
    return graph


def _by_cholesky_ex(graph: GraphModule, node: Node) -> None:
    """Put a factorisation that tells which matrices have failed in the place of one that raises."""
    aten, call = torch.ops.aten, graph.graph.call_function
    given: dict[str, Any] = {
        "upper": bool(node.args[1]) if len(node.args) > 1 else bool(node.kwargs.get("upper", False))
    }
    with graph.graph.inserting_before(node):
        both = call(aten.linalg_cholesky_ex.default, (node.args[0],), given)
        factor, failed = (call(operator.getitem, (both, k)) for k in (0, 1))
        failed = call(aten.unsqueeze.default, (call(aten.unsqueeze.default, (failed, -1)), -1))
        out = call(aten.masked_fill.Scalar, (factor, call(aten.ne.Scalar, (failed, 0)), math.nan))
    _replace(graph, node, out)


def _of_finite(graph: GraphModule, node: Node) -> None:
    """Give a decomposition zeros in place of a matrix that is not finite, and nan for what it makes of them."""
    aten, call = torch.ops.aten, graph.graph.call_function
    matrix: Any = node.args[0]
    with graph.graph.inserting_before(node):
        # It is zero where the matrix is finite, and nan elsewhere.
        none = call(aten.mul.Scalar, (matrix, 0.0))
        rows = call(aten.sum.dim_IntList, (none, [-2, -1], True))
        bad = call(aten.ne.Tensor, (rows, rows))
        clean = call(aten.masked_fill.Scalar, (matrix, bad, 0.0))
    node.replace_input_with(matrix, clean)
    for part in [n for n in node.users if n.target is operator.getitem]:
        users, vector = list(part.users), len(part.meta["val"].shape) < len(matrix.meta["val"].shape)
        with graph.graph.inserting_after(part):
            mask = call(aten.squeeze.dim, (bad, -1)) if vector else bad
        with graph.graph.inserting_after(mask if vector else part):
            out = call(aten.masked_fill.Scalar, (part, mask, math.nan))
        for user in users:
            user.replace_input_with(part, out)


def _replace(graph: GraphModule, node: Node, out: Node) -> None:
    """Let another node stand in the place of one."""
    out.meta.update(node.meta)
    node.replace_all_uses_with(out)
    graph.graph.erase_node(node)
