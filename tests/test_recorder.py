"""Recorded graphs compute what the recorded function computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functionalize

from inference.compiler.capture import Untraceable, traced
from inference.compiler.form import Form


def changed_copy(x: Tensor) -> Tensor:
    made = torch.tensor([1.0, 2.0])
    made += x
    return made


def several_results(x: Tensor) -> dict[str, Any]:
    largest, place = (x[:, None] * torch.arange(3.0)).max(1)
    return {"largest": (largest, place), "nothing": None, "parts": list(x.split(1)), "number": 2}


def gradient(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    # The gradient of exp and of softmax use their results.
    return torch.autograd.grad((leaf.exp() * leaf.softmax(0)).sum(), leaf)[0]


def many_temporaries(x: Tensor) -> Tensor:
    for k in range(200):
        # Each tensor is freed at once, and another takes its address.
        x = (x + float(k)).sin()
    return x


@pytest.mark.parametrize(
    "function",
    [
        changed_copy,
        several_results,
        gradient,
        many_temporaries,
        torch.vmap(lambda row: row.cumsum(0) if row.dim() else row * 2),
        functionalize(lambda x: x.clone().mul_(2).view(-1, 1)),
        lambda x: torch.nn.functional.gelu(x).to(torch.float64)[x.shape[0] - 1],
    ],
)
def test_a_graph_computes_what_the_function_computes(function: Callable[..., Any]) -> None:
    graph = traced(function, torch.tensor([0.5, -0.5]))
    for x in (torch.tensor([0.5, -0.5]), torch.tensor([-1.0, 2.0])):
        for _ in range(2):
            torch.testing.assert_close(graph(x), function(x))


def test_composite_operations_are_taken_apart_under_inference_mode_too() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    with torch.inference_mode():
        graph = traced(torch.nn.functional.linear, x, weight)
    assert not [n for n in graph.graph.nodes if "linear" in str(n.target)]
    torch.testing.assert_close(graph(x, weight), x @ weight.T)


def test_a_tensor_from_outside_is_seen_as_it_is_at_each_call() -> None:
    outside = torch.ones(2)
    graph = traced(lambda x: x + outside, torch.zeros(2))
    outside.fill_(3.0)
    assert graph(torch.zeros(2)).tolist() == [3.0, 3.0]


def test_a_change_of_a_buffer_is_made_by_the_graph_too() -> None:
    norm = nn.BatchNorm1d(2, momentum=1.0)
    with torch.no_grad():
        graph = traced(norm, torch.randn(8, 2))
        x = torch.randn(8, 2)
        graph(x)
    torch.testing.assert_close(norm.running_mean, x.mean(0))


def test_autocast_does_not_hide_that_a_parameter_is_read() -> None:
    """It keeps low-precision copies of parameters: one that was made before the recording would be a constant."""
    weight = nn.Parameter(torch.ones(2, 2))
    x = torch.ones(1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x @ weight
        graph = traced(lambda x: (x @ weight).detach(), x)
    with torch.no_grad():
        weight.fill_(2.0)
    assert graph(x).tolist() == [[4.0, 4.0]]


def test_a_generator_of_the_users_own_is_no_part_of_a_graph() -> None:
    own = torch.Generator().manual_seed(1)
    with pytest.raises(Untraceable, match="an argument of type Generator"):
        traced(lambda x: x + torch.randn(2, generator=own), torch.zeros(2))


def test_nodes_know_the_form_of_their_tensors() -> None:
    graph = traced(lambda x: x.mT.double(), torch.zeros(2, 3))
    (last,) = (n for n in graph.graph.nodes if n.op == "output")
    assert last.args[0].meta["val"] == Form(torch.Size([3, 2]), (1, 3), torch.float64, torch.device("cpu"))


def test_a_graph_that_was_changed_runs_as_changed() -> None:
    graph = traced(lambda x: x + 1, torch.zeros(2))
    kept = graph.forward
    assert graph(torch.zeros(2)).tolist() == [1.0, 1.0]
    (add,) = (n for n in graph.graph.nodes if n.op == "call_function")
    add.args = (add.args[0], 5)
    graph.recompile()
    assert "5" in graph.code
    assert graph(torch.zeros(2)).tolist() == [5.0, 5.0]
    assert kept(torch.zeros(2)).tolist() == [5.0, 5.0]
