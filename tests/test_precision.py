"""Mixed precision: products of networks in bfloat16, log densities and sums in float32."""

from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn import functional

from inference import fit, isolated, log_evidence
from inference.checkpoint import CheckpointError
from inference.core.bound import bind
from inference.core.precision import Bfloat16, with_precision
from ppl_models import VAE
from ppl_models.models.pair import nothing

quiet = partial(fit, progress=False, draws=1)
ROUNDING = 2.0**-8
"""Relative rounding of a bfloat16."""


@pytest.mark.parametrize("like", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3, stride=2), nn.ConvTranspose2d(6, 4, 2)])
def test_a_layer_multiplies_in_bfloat16_and_returns_float32(like: nn.Module, alone) -> None:
    x = torch.randn({nn.Linear: (5, 6), nn.Conv1d: (5, 6, 9), nn.ConvTranspose2d: (5, 6, 3, 3)}[type(like)])
    with Bfloat16() as mode:
        found = like(x)
    assert mode.products == 1 and found.dtype == torch.float32
    # The rounding of inputs, weights and the output, of terms that are summed.
    with torch.no_grad():
        size = type(like)(*_shape(like))
        size.load_state_dict({n: p.abs() for n, p in like.state_dict().items()})
        bound = 3 * ROUNDING * size(x.abs())
    assert ((found - like(x)).abs() <= bound).all()
    assert (found != like(x)).any()
    (gradient,) = torch.autograd.grad(found.sum(), like.bias)
    torch.testing.assert_close(gradient, torch.autograd.grad(like(x).sum(), like.bias)[0])


def test_a_product_without_a_bias_is_float32_too() -> None:
    with Bfloat16():
        assert nn.Linear(6, 4, bias=False)(torch.ones(2, 6)).dtype == torch.float32


def _shape(like: nn.Module) -> tuple[int, ...]:
    return (6, 4) if isinstance(like, nn.Linear) else (6, 4, 3, 2) if isinstance(like, nn.Conv1d) else (6, 4, 2)


def network(rows: int) -> tuple[nn.Module, Tensor]:
    with isolated(0):
        return nn.Linear(3, 1), torch.randn(1, 3).expand(rows, 3)


def loss_of(net: nn.Module, x: Tensor, precision: str | None) -> float:
    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=net(x)[:, 0]), obs=torch.ones(len(x)))

    bound = with_precision(bind((model, nothing), x), precision)
    with isolated(0):
        return Trace_ELBO().loss(bound.model, bound.guide, **bound.arguments())


def test_a_sum_of_equal_log_densities_has_the_digits_of_float32() -> None:
    """In bfloat16 it would have two, and a single log density too."""
    net, x = network(100_000)
    weight = net.weight.detach().bfloat16().double()
    logit = (x[0].bfloat16().double() @ weight.mT).bfloat16().double() + net.bias.detach().double()
    expected = 100_000 * float(functional.softplus(-logit))
    assert loss_of(net, x, "bfloat16") == pytest.approx(expected, rel=1e-5)
    single = loss_of(net, x, None)
    assert single != pytest.approx(expected, rel=1e-5) and single == pytest.approx(expected, rel=8 * ROUNDING)


def images() -> Tensor:
    random = torch.Generator().manual_seed(0)
    z, w = torch.randn(300, 2, generator=random), 2 * torch.randn(2, 12, generator=random)
    return (torch.rand(300, 12, generator=random) < (z @ w).sigmoid()).float()


def vae(seed: int = 0) -> VAE:
    with isolated(seed):
        return VAE(12, 2, hidden=(8,))


def test_held_out_bounds_are_those_of_float32_over_seeds() -> None:
    x = images()

    def heldout(seed: int, precision: str | None) -> float:
        result = quiet(vae(seed), x[:200], steps=100, batch=50, learning_rate=0.01, seed=seed, precision=precision)
        assert all(p.dtype == torch.float32 for p in result.params.values())
        return log_evidence(result, x[200:], k=50, seed=seed).mean

    pairs = np.array([[heldout(seed, precision) for precision in (None, "bfloat16")] for seed in range(3)])
    spread = pairs[:, 0].std(ddof=1) / len(pairs) ** 0.5
    assert abs(pairs[:, 1].mean() - pairs[:, 0].mean()) < 4 * max(spread, 0.01)
    assert (pairs[:, 0] != pairs[:, 1]).all()


@pytest.mark.parametrize("mode", ["auto", pytest.param(True, marks=pytest.mark.slow)])
def test_it_runs_as_a_program(mode: bool | str, monkeypatch) -> None:
    monkeypatch.setattr("inference.compiler.policy.TRACE_FIT_STEPS", 1)
    run = partial(quiet, data=images(), steps=20, batch=50, precision="bfloat16")
    eager, compiled = run(vae(), compile=False), run(vae(), compile=mode)
    assert compiled.idata.attrs["execution"] == ("fused" if mode is True else "traced")
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=0.01)


def test_a_checkpoint_is_of_one_precision(tmp_path: Path) -> None:
    run = partial(quiet, data=images(), steps=3, checkpoint=tmp_path / "kept")
    first = run(vae(), precision="bfloat16")
    np.testing.assert_array_equal(run(vae(), precision="bfloat16").losses, first.losses)
    with pytest.raises(CheckpointError, match="precision"):
        run(vae())


def test_what_it_cannot_change_is_refused() -> None:
    x = images()
    with pytest.raises(ValueError, match=r"^precision: expected .*float32 for 'bfloat16', got none.*: float64$"):
        quiet(vae().double(), x.double(), precision="bfloat16")

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"^precision: expected linear or convolutional layers"):
        quiet((model, AutoNormal(model)), x[:, 0], precision="bfloat16")
    with pytest.raises(ValueError, match=r"^precision: expected .*bfloat16.*, got 'float16'"):
        quiet(vae(), x, precision="float16")
