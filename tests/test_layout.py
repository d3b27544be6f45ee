"""Graphs rearranged for vectorised loops: the same numbers, fewer operations, dimensions where they are wanted."""

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from inference.compiler import policy
from inference.compiler.capture import traced
from inference.compiler.constants import lift_constants, pack_constants
from inference.compiler.layout import rearrange

ROWS, FEW = 40, 3


def mixture(x: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    scales = scales.expand(5, ROWS, FEW)
    score = -0.5 * ((x[:, None] - means[:, None]) / scales) ** 2 - scales.log()
    return score.logsumexp(-1).sum(1)


def reductions(x: Tensor, means: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    wide = x[:, None] * means[:, None] + scales
    return (
        wide.sum(1),
        wide.sum(2),
        wide.sum(0),
        wide.sum((1, 2)),
        wide.sum(1, keepdim=True) + wide,
        wide.amax(2, keepdim=True) - wide,
        wide.amax(-2),
        wide.logsumexp((0, 2)),
        wide.reshape(5, -1).sin(),
        wide.permute(2, 0, 1) + 1,
        torch.cat([wide, wide.exp()], -1),
        wide[..., 1] * 2,
        torch.where(wide > 0, wide, torch.tensor(0.0, dtype=wide.dtype)),
    )


def softmax(x: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    return (means[:, None].expand(5, ROWS, FEW).log_softmax(-1) * x[:, None]).sum()


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS).double(), torch.randn(5, FEW).double(), torch.rand(5, 1, FEW).double() + 0.5


def operations(graph: GraphModule, name: str) -> list[tuple[int, ...]]:
    """Shapes of the results of an operation."""
    return [tuple(n.meta["val"].shape) for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]


@pytest.mark.parametrize("function", [mixture, reductions, softmax])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_numbers_stay_as_they_are(function, contiguous: bool) -> None:
    inputs = arguments()
    graph = traced(function, *inputs)
    if not contiguous:
        # As what the graph is given may be laid out otherwise than what it was traced with.
        inputs = tuple(v.mT.contiguous().mT if v.dim() > 1 else v for v in inputs)
    again = traced(rearrange(graph), *inputs)
    torch.testing.assert_close(again(*inputs), function(*inputs))


def test_what_repeats_is_computed_once_and_short_dimensions_do_not_stand_last() -> None:
    inputs = arguments()
    plain = traced(mixture, *inputs)
    again = traced(rearrange(plain), *inputs)
    assert operations(plain, "log.default") == [(5, ROWS, FEW)]
    assert operations(again, "log.default") == [(5, 1, FEW)]
    assert operations(plain, "pow") == [(5, ROWS, FEW)]
    assert operations(again, "pow") == [(5, FEW, ROWS)]
    assert operations(again, "logsumexp") == [(5, ROWS)]
    once = traced(rearrange(traced(softmax, *inputs)), *inputs)
    assert operations(once, "_log_softmax") == [(5, 1, FEW)]


def test_small_constants_go_together_by_type_and_large_ones_alone() -> None:
    small, other, large = torch.randn(4, 2).double(), torch.arange(3), torch.randn(policy.PACKED_NUMBERS + 1).double()
    extra = torch.tensor(2.0).double()

    def function(q: Tensor, given: Tensor) -> Tensor:
        return (q * extra * given + small.sum(0)).sum() + (large * q.sum()).sum() + other.sum()

    q, given = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    graph = traced(function, q, given)
    held = lift_constants(graph)
    pack, call = pack_constants(graph, 1, held)
    packs = pack(held)
    sizes = sorted((p.numel(), p.dtype) for p in packs)
    assert len(held) == 4
    assert sizes == sorted([(9, torch.float64), (3, torch.int64), (policy.PACKED_NUMBERS + 1, torch.float64)])
    torch.testing.assert_close(call(q, given, *packs), function(q, given))
