"""Graphs of loops over time, cut into pieces that repeat."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.fx import GraphModule

from inference import sample
from inference.compiler import policy
from inference.compiler.capture import traced
from inference.compiler.passes import out_of_place, simplify
from inference.compiler.pieces import Pieces, periods
from inference.compiler.potential import BatchedPotential
from inference.compiler.selections import collect_selections
from inference.core.bound import bind
from inference.kernels import NUTS, ChEES
from inference.runners.batched import _Run, kernel_of

CHAINS = 5


def test_the_period_of_a_sequence_is_found_with_where_it_begins_and_ends() -> None:
    ahead, body, behind = [900, 901], [3, 1, 4, 1, 5, 9, 2, 6], [902, 903, 904]
    found = periods(np.array(ahead + 40 * body + behind))
    assert found == [(2, 2 + 40 * len(body), len(body))]


def test_two_loops_have_two_periods() -> None:
    one, two = list(range(7)), list(range(20, 31))
    found = sorted(periods(np.array(30 * one + [99] + 30 * two)))
    assert found == [(0, 210, 7), (211, 541, 11)]


def test_a_sequence_that_does_not_repeat_has_no_period() -> None:
    assert periods(np.arange(500)) == []


def recursion(y: Tensor) -> None:
    """Deviations that depend on the one before, as GARCH(1,1)."""
    level = pyro.sample("level", dist.Normal(torch.zeros(()).to(y), 1.0))
    part = pyro.sample("part", dist.Beta(2 * torch.ones(()).to(y), 2.0))
    sd = y.std()
    for t in range(len(y)):
        if t:
            sd = (0.2 + part * (y[t - 1] - level) ** 2 + 0.3 * sd**2).sqrt()
        pyro.sample(f"y_{t}", dist.Normal(level, sd), obs=y[t])


def rows(y: Tensor) -> None:
    """The rows of a latent matrix, one after another."""
    state = pyro.sample("state", dist.Normal(torch.zeros(len(y), 2).to(y), 1.0).to_event(2))
    last = torch.zeros(2).to(y)
    for t in range(len(y)):
        last = torch.tanh(last + 0.5 * state[t] + 0.1 * last.max(0).values)
        pyro.sample(f"y_{t}", dist.Normal(last.sum(), 1.0), obs=y[t])


def batched(model: Callable[..., Any], steps: int) -> BatchedPotential:
    torch.manual_seed(steps)
    start, potential, _, _ = initialize_model(model, (torch.randn(steps).double(),))
    return BatchedPotential(potential, start, CHAINS)


@pytest.mark.parametrize("model", [recursion, rows])
def test_pieces_have_the_energies_and_gradients_of_the_model(model: Callable[..., Any]) -> None:
    many = batched(model, 30)
    assert many.pieces is not None
    positions = torch.randn(CHAINS, many.dim).double()
    for got, expected in zip(many.run(positions), many._loop(positions), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_longer_loop_has_no_more_distinct_pieces() -> None:
    few, more = (batched(recursion, steps).pieces for steps in (24, 48))
    assert few is not None and more is not None
    assert more.operations > 1.7 * few.operations
    assert len(more.worth()) <= policy.PIECE_PROGRAMS
    assert len(more._programs) <= len(few._programs) + 2


def test_pieces_are_compiled_where_the_calls_ahead_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece saves as long as it takes to compile, or longer; a run asks for as many calls as it makes."""
    pieces = batched(recursion, 30).pieces
    assert pieces is not None
    for calls in (10, 300, 1_500, 50_000):
        for p in pieces.worth(calls):
            assert calls * p.uses * p.nodes * policy.PIECE_GAIN >= policy.PIECE_SECONDS
    assert pieces.worth(1) == []
    assert len(pieces.worth(100)) < len(pieces.worth(1e6))
    asked = []

    def fuse(self: Pieces, *inputs: Tensor, calls: float) -> None:
        asked.append(calls)

    monkeypatch.setattr(Pieces, "fuse", fuse)
    monkeypatch.setattr(policy, "FUSE_POTENTIAL_OPERATIONS", 1)
    for transitions, compile in ((1, "auto"), (4, "auto"), (1, True)):
        kernel = kernel_of(bind(recursion, torch.randn(24).double()), NUTS)
        kernel.num_chains, kernel.jit_compile = 2, False
        _Run(kernel, compile, transitions, 1).setup(transitions)
    assert asked == [2 * kernel.expected, 8 * kernel.expected, policy.PIECE_CALLS]


@pytest.mark.slow
def test_compiled_pieces_have_the_energies_and_gradients_of_the_model() -> None:
    many = batched(recursion, 60)
    assert many.pieces is not None
    positions = torch.randn(CHAINS, many.dim).double()
    with torch.no_grad():
        many.pieces.fuse(positions.mT.contiguous())
    assert any(p.run != p.graph.forward for p in many.pieces.worth())
    for got, expected in zip(many.run(positions), many._loop(positions), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_pieces_with_other_results_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: GraphModule, *_: Any) -> Callable[..., Any]:
        return lambda *inputs: [1.5 * v for v in graph(*inputs)]

    y, size = torch.randn(30).double(), {"draws": 4, "warmup": 4, "chains": 2, "progress": False, "kernel": ChEES}
    expected = sample(recursion, y, **size, compile=False).draws
    monkeypatch.setattr("inference.compiler.pieces.fused", wrong)
    with pytest.warns(UserWarning, match="not fused: a fused transition differs from the traced one in"):
        got = sample(recursion, y, **size, compile=True)
    assert got.idata.attrs["execution"] == "traced"
    for name, draws in expected.items():
        torch.testing.assert_close(got.draws[name], draws, rtol=0, atol=0)


def test_gradients_of_rows_are_stacked() -> None:
    def gradient(x: Tensor) -> tuple[Tensor]:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            total = sum((leaf[t] * (t + 1)).sin().sum() for t in (0, 1, 2, 3, 5)) + leaf.square().sum()
        return torch.autograd.grad(total, leaf)

    x = torch.randn(7, 2)
    graph = collect_selections(simplify(traced(gradient, x)))
    targets = [n.target for n in graph.graph.nodes]
    assert torch.ops.aten.select_backward.default not in targets
    torch.testing.assert_close(graph(x)[0], gradient(x)[0])


def test_operations_in_place_are_replaced_and_later_uses_see_the_change() -> None:
    def change(x: Tensor) -> tuple[Tensor, Tensor]:
        made = x + 1
        before = made * 2
        made.mul_(3)
        return before, made + 0.5

    x = torch.randn(4)
    graph = traced(change, x)
    assert out_of_place(graph)
    assert not any(n.target is torch.ops.aten.mul_.Tensor for n in graph.graph.nodes)
    torch.testing.assert_close(graph(x), list(change(x)) if isinstance(graph(x), list) else change(x))


def test_operations_in_place_on_a_tensor_with_views_are_left() -> None:
    def change(x: Tensor) -> Tensor:
        made = x + 1
        first = made[0]
        made.mul_(3)
        return first + made

    assert not out_of_place(traced(change, torch.randn(4)))
