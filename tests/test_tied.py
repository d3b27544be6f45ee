"""Parameters with two names in Pyro's store: a step moves them once, as Pyro's SVI and torch alone do."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoIAFNormal
from torch import Tensor
from torch.nn import Linear

from inference import fit
from inference.compiler import policy
from inference.optim import Joint

Y = torch.tensor([1.0, 2.0, 3.0, 2.5, 1.5])
RATE, STEPS = 0.01, 4


def moved_by_torch(falls: bool) -> float:
    """How far Adam moves w in STEPS steps of -log N(y; 2 w y, 1), from w = 1."""
    w = torch.nn.Parameter(torch.ones(()))
    adam = torch.optim.Adam([w], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS, eta_min=RATE / 100)
    for _ in range(STEPS):
        adam.zero_grad()
        (0.5 * (Y - 2 * w * Y).square().sum()).backward()
        adam.step()
        if falls:
            schedule.step()
    return w.item() - 1


@pytest.mark.parametrize("optimizer", ["default", "Adam", "Joint"])
@pytest.mark.parametrize("how", ["eager", "traced", "compiled"])
def test_tied_weights_move_once_a_step(how: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "traced":
        monkeypatch.setattr(policy, "TRACE_FIT_STEPS", 1)
    first, second = Linear(1, 1, bias=False), Linear(1, 1, bias=False)
    torch.nn.init.ones_(first.weight)
    second.weight = first.weight

    def model(y: Tensor) -> None:
        pyro.module("first", first)
        pyro.module("second", second)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((first(y[:, None]) + second(y[:, None]))[:, 0], 1.0), obs=y)

    chosen: dict[str, Any] = {
        "default": None,
        "Adam": pyro.optim.Adam({"lr": RATE}),
        "Joint": Joint(torch.optim.Adam, {"lr": RATE}),
    }
    result = fit(
        (model, lambda y: None),
        Y,
        steps=STEPS,
        learning_rate=RATE,
        optimizer=chosen[optimizer],
        compile={"eager": False, "traced": "auto", "compiled": True}[how],
        progress=False,
    )
    assert result.idata.attrs["execution"] == ("fused" if how == "compiled" else how)
    assert first.weight.item() - 1 == pytest.approx(moved_by_torch(optimizer == "default"), rel=1e-3)
    assert first.weight is second.weight
    assert {n: v.item() for n, v in result.params.items()} == {
        "first.weight": pytest.approx(first.weight.item()),
        "second.weight": pytest.approx(first.weight.item()),
    }


def test_no_parameter_of_a_flow_moves_further_than_a_step_of_adam() -> None:
    """Each entry moves by the learning rate in the first step of Adam; Pyro's flow names its first layer twice."""

    def model(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu.sum(), 1.0), obs=y)

    guide = AutoIAFNormal(model)
    fit((model, guide), Y, steps=0, draws=1, progress=False)
    before = [p.detach().clone() for p in guide.parameters()]
    fit((model, guide), Y, steps=1, learning_rate=RATE, draws=1, progress=False)
    moves = [float((p.detach() - b).abs().max()) for p, b in zip(guide.parameters(), before, strict=True)]
    assert max(moves) == pytest.approx(RATE, rel=1e-3)
