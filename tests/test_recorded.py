"""Recorded potentials that are used again: nothing is recorded twice, and whatever changes is seen."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from inference import sample
from inference.compiler import policy, potential
from inference.compiler.recorded import _RECORDED, same
from inference.compiler.watch import Watch
from inference.kernels import NUTS, ChEES
from ppl_models import GaussianNaiveBayes

Y = torch.tensor([0.5, 1.5, -0.3, 2.0]).double()
SCALE, LITTLE = 1.0, 1.0 + 1e-9
"""The scale of the models, and one that a comparison of energies would take for it."""


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    _RECORDED.clear()
    pyro.clear_param_store()
    yield
    _RECORDED.clear()
    pyro.clear_param_store()


@pytest.fixture
def count(monkeypatch) -> Callable[[], int]:
    """How many graphs have been recorded since it was last asked."""
    own, calls = potential.traced, []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return own(*arguments, **named)

    def since() -> int:
        found = len(calls)
        calls.clear()
        return found

    monkeypatch.setattr(potential, "traced", counted)
    return since


def drawn(model: Any, y: Tensor = Y, seed: int = 0, **settings: Any) -> Tensor:
    result = sample(model, {"y": y}, draws=8, warmup=8, seed=seed, progress=False, **{"chains": 2, **settings})
    return next(iter(result.draws.values()))


def agree_with_new(model: Any, count: Callable[[], int], y: Tensor = Y, *, records: bool) -> None:
    """Draws are those of a process that has recorded nothing, and whether a graph was recorded is as it should be."""
    count()
    found = drawn(model, y)
    assert (count() > 0) == records
    _RECORDED.clear()
    assert torch.equal(found, drawn(model, y))
    count()


def normal(scale: Any, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def plain(y: Tensor) -> None:
    normal(SCALE, y)


@pytest.mark.parametrize("settings", [{"chains": 2}, {"chains": 8}], ids=["NUTS", "ChEES"])
def test_a_second_call_records_nothing(settings: dict[str, Any], count) -> None:
    first = drawn(plain, **settings)
    assert count() > 0
    # Equal data are the same data.
    assert torch.equal(first, drawn(plain, Y.clone(), **settings))
    assert not torch.equal(first, drawn(plain, seed=1, **settings))
    assert count() == 0
    drawn(plain, **{**settings, "chains": settings["chains"] + 1})
    assert count() > 0


def test_a_pair_is_known_by_itself(count) -> None:
    x, y = torch.randn(12, 2).double(), torch.arange(12) % 2
    pair = GaussianNaiveBayes(["a", "b"], ["no", "yes"]).double()
    go = partial(sample, pair, {"x": x, "y": y}, draws=4, warmup=4, chains=2, seed=0, progress=False)
    first = go()
    assert count() > 0
    again = go()
    assert count() == 0
    assert all(torch.equal(v, again.draws[n]) for n, v in first.draws.items())


def test_other_data_of_the_same_shape_take_the_place_of_those_in_the_graph(count) -> None:
    drawn(plain)
    # So little more that a comparison of energies would pass over what is left of the first.
    for other in (Y + 1e-9, Y * 2, Y.flip(0), Y):
        agree_with_new(plain, count, other, records=False)
        drawn(plain)
    for other in (Y[:3], Y.float(), Y.repeat(2)[::2], Y.clone().requires_grad_()):
        agree_with_new(plain, count, other, records=True)
        drawn(plain)


def test_data_changed_in_place_are_seen(count) -> None:
    y = Y.clone()
    drawn(plain, y)
    y[0] += 1e-9
    agree_with_new(plain, count, y, records=False)
    y.data[1] += 1e-9
    agree_with_new(plain, count, y, records=False)


WHOLE = torch.tensor([0, 2, 1, 2])
HELD = Y.clone()
NETWORK = nn.Linear(1, 1).double()
MADE: dict[str, Tensor] = {}


@lru_cache
def standardised(y: Tensor) -> Tensor:
    return (y - y.mean()) / y.std()


def by_groups(y: Tensor) -> None:
    with pyro.plate("groups", 3):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu[y], 1.0), obs=y.double())


def by_counts(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(()).double()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def by_moments(y: Tensor) -> None:
    sums = torch.zeros(2).double()
    sums[0] += y.sum()
    sums[1].add_((y * y).sum())
    normal(sums.sum().exp().reciprocal() + 1.0, y / y.std())


def by_mixture(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2).double()), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)


def by_weights_of_a_module(y: Tensor) -> None:
    normal(NETWORK(y[:, None]).squeeze(-1).exp(), y)


def by_a_bound_that_moves(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, torch.ones(()).double()))
    mu = pyro.sample("mu", dist.Uniform(-scale, scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_nested_plates(y: Tensor) -> None:
    with pyro.plate("columns", y.shape[1], dim=-1):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 3.0))
        with pyro.plate("rows", len(y), dim=-2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_kernel_matrix(y: Tensor) -> None:
    length = pyro.sample("length", dist.LogNormal(0.0, torch.ones(()).double()))
    kernel = (-((y[:, None] - y) ** 2) / length).exp() + torch.eye(len(y)).double()
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(y)).double(), kernel), obs=y)


def by_another_name(y: Tensor) -> None:
    normal(1.0, y.data)


def by_mask(y: Tensor) -> None:
    with poutine.mask(mask=y > 0):
        normal(y.abs().mean(), y)


REPLACED = {
    "groups": (by_groups, WHOLE, WHOLE.flip(0)),
    "counts": (by_counts, WHOLE, WHOLE + 1),
    "written in place": (by_moments, Y, Y * 1.1),
    "enumerated": (by_mixture, Y, Y.flip(0) * 2),
    "weights of a module": (by_weights_of_a_module, Y, Y.flip(0)),
    "a bound that moves": (by_a_bound_that_moves, Y, Y.flip(0)),
    "nested plates": (by_nested_plates, Y.reshape(2, 2), Y.flip(0).reshape(2, 2)),
    "float32": (by_nested_plates, Y.reshape(2, 2).float(), Y.flip(0).reshape(2, 2).float()),
    "kernel matrix": (by_kernel_matrix, Y, Y * 1.5),
    "another name": (by_another_name, Y, Y.flip(0)),
    "masked": (by_mask, Y, -Y * 0.9),
}
"""Models with two data sets, of which the second takes the place of the first."""


@pytest.mark.parametrize("name", list(REPLACED))
def test_what_depends_on_the_data_alone_is_computed_anew(name: str, count) -> None:
    model, first, second = REPLACED[name]
    drawn(model, first)
    for y in (second, first, second + (1e-9 if second.dtype == torch.float64 else 0)):
        agree_with_new(model, count, y, records=False)
        drawn(model, first)


def read_as_a_number(y: Tensor) -> None:
    normal(1.0 + float(y[0]) * 1e-9, y)


def read_by_a_branch(y: Tensor) -> None:
    normal(1.0 if y[0] > 0.5 else 1.0 + 1e-9, y)


def read_by_a_mask(y: Tensor) -> None:
    normal(1.0, y[y > 0.5])


def read_as_an_array(y: Tensor) -> None:
    normal(1.0, torch.from_numpy(y.numpy() * 1.0))


def kept_elsewhere(y: Tensor) -> None:
    normal(1.0, standardised(y))


def kept_by_identity(y: Tensor) -> None:
    key = str(id(y))
    if key not in MADE:
        MADE[key] = y * 2
    normal(1.0, MADE[key])


def bounded_by_the_data(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Uniform(torch.zeros(()).double(), y.abs().max()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def bounded_by_a_latent_and_the_data(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, torch.ones(()).double()))
    bound = pyro.sample("bound", dist.Uniform(torch.zeros(()).double(), y.abs().max()))
    mu = pyro.sample("mu", dist.Uniform(-scale, scale + y.abs().max()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0 + bound), obs=y)


def found_elsewhere_too(y: Tensor) -> None:
    normal(1.0, y - 1e-9 * HELD)


@pytest.mark.parametrize(
    "model",
    [
        read_as_a_number,
        read_by_a_branch,
        read_by_a_mask,
        read_as_an_array,
        kept_elsewhere,
        kept_by_identity,
        bounded_by_the_data,
        bounded_by_a_latent_and_the_data,
        found_elsewhere_too,
    ],
)
def test_data_whose_values_had_a_part_in_the_graph_are_not_replaced(model: Any, count) -> None:
    for y in (HELD + 1e-9, 1.5 * HELD.flip(0)):
        # These are the very tensor that a model finds elsewhere too.
        _RECORDED.clear()
        drawn(model, HELD)
        agree_with_new(model, count, y, records=True)


def test_what_another_package_has_kept_of_the_data_is_not_taken_for_other_data(count, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    lines = ("from functools import lru_cache", "@lru_cache", "def centred(y):", "    return y - y.mean()")
    (folder / "keeping_tools_of_a_test.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))
    tools = importlib.import_module("keeping_tools_of_a_test")

    def model(y: Tensor) -> None:
        # So little of it that a comparison of energies would pass over what is left of the first.
        normal(1.0, y + 1e-9 * tools.centred(y))

    drawn(model)
    assert _RECORDED
    agree_with_new(model, count, Y.flip(0), records=True)


def test_bounds_that_other_data_leave_as_they_are_leave_the_graph(count) -> None:
    drawn(bounded_by_the_data)
    agree_with_new(bounded_by_the_data, count, Y.flip(0), records=False)
    # What bounds a support by a latent site is drawn anew in each call.
    drawn(by_a_bound_that_moves)
    count()
    drawn(by_a_bound_that_moves, Y.flip(0), seed=1)
    assert count() == 0


def test_one_tensor_in_two_places_is_not_replaced_by_two(count) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        normal(1.0, y + 1e-9 * x)

    def drawn(x: Tensor, y: Tensor) -> Tensor:
        return sample(model, {"x": x, "y": y}, draws=8, warmup=8, chains=2, seed=0, progress=False).draws["mu"]

    drawn(Y, Y)
    found = drawn(Y * 2, Y)
    _RECORDED.clear()
    assert torch.equal(found, drawn(Y * 2, Y))
    count()
    drawn(Y, Y * 2)
    assert count() == 0


def activated(x: Tensor) -> Tensor:
    return ACTIVATION(x)


ACTIVATION = torch.sin


class Prior:
    scale = 1.0


class Box:
    def __init__(self) -> None:
        self.scale = 1.0


def changes() -> dict[str, tuple[Any, Callable[[], Any]]]:
    """Models, each with what changes it between two calls."""
    prior = dist.Normal(0.0, torch.ones(()).double())
    number, held, mapping, box = [1.0], torch.ones(()).double(), {"scale": 1.0}, Box()
    module, default = nn.Linear(1, 1).double(), 1.0
    nn.init.constant_(module.weight, 1.0)

    def by_module(y: Tensor) -> None:
        normal(module.weight.exp().squeeze(), y)

    def by_prior(y: Tensor) -> None:
        mu = pyro.sample("mu", prior)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def by_default(y: Tensor, scale: float = default) -> None:
        normal(scale, y)

    def by_variable(y: Tensor) -> None:
        nonlocal_scale = float(os.environ.get("SCALE_OF_A_TEST", "1"))
        normal(nonlocal_scale, y)

    def set_default() -> None:
        by_default.__defaults__ = (LITTLE,)

    return {
        "entry of a list": (lambda y: normal(number[0], y), lambda: number.__setitem__(0, LITTLE)),
        "entry of a mapping": (lambda y: normal(mapping["scale"], y), lambda: mapping.update(scale=LITTLE)),
        "attribute": (lambda y: normal(box.scale, y), lambda: setattr(box, "scale", LITTLE)),
        "tensor": (lambda y: normal(held, y), lambda: held.fill_(LITTLE)),
        "memory of a tensor": (lambda y: normal(held * 1.0, y), lambda: held.data.fill_(1 / LITTLE)),
        "prior": (by_prior, lambda: setattr(prior, "scale", prior.scale * LITTLE)),
        "weights": (by_module, lambda: module.weight.data.fill_(LITTLE)),
        "default": (by_default, set_default),
        # Nothing tells of it: the comparison with the model does.
        "environment": (by_variable, lambda: os.environ.update(SCALE_OF_A_TEST="0.5")),
    }


@pytest.mark.parametrize("name", list(changes()))
def test_what_a_model_takes_from_outside_is_watched(name: str, count, monkeypatch) -> None:
    monkeypatch.delenv("SCALE_OF_A_TEST", raising=False)
    model, change = changes()[name]
    drawn(model)
    agree_with_new(model, count, records=False)
    drawn(model)
    change()
    agree_with_new(model, count, records=True)


def test_parameters_of_the_store_are_watched(count) -> None:
    def model(y: Tensor) -> None:
        normal(pyro.param("scale", torch.ones(()).double()), y)

    def energy(y: Tensor = Y) -> float:
        kernel = NUTS(model, num_chains=2, jit_compile=False)
        kernel.setup(0, y)
        return float(kernel._density.run(torch.ones(2, 1).double())[0][0])

    first = energy()
    assert count() > 0 and energy() == first and count() == 0
    assert energy(Y + 1.0) != first and count() == 0
    # Another tensor of the same name, and the same tensor with another value.
    pyro.get_param_store()["scale"] = torch.full((), LITTLE, dtype=torch.float64)
    assert energy() != first and count() > 0
    with torch.no_grad():
        pyro.param("scale").fill_(0.5)
    expected = -dist.Normal(0.0, 3.0).log_prob(torch.ones(())).double() - dist.Normal(1.0, 0.5).log_prob(Y).sum()
    assert energy() == pytest.approx(float(expected), rel=1e-6)


def test_globals_are_watched(count, monkeypatch) -> None:
    drawn(plain)
    monkeypatch.setattr(f"{__name__}.SCALE", LITTLE)
    agree_with_new(plain, count, records=True)


@pytest.mark.parametrize("name", ["ACTIVATION", "Prior"])
def test_a_function_of_torch_or_a_class_in_place_of_another_is_seen(name: str, count, monkeypatch) -> None:
    def model(y: Tensor) -> None:
        # As near to nothing as a comparison of energies can miss.
        normal(Prior.scale + 1e-9 * activated(torch.ones(())), y)

    other = {"ACTIVATION": torch.cos, "Prior": type("Prior", (), {"scale": 1.0 + 1e-9, "__module__": __name__})}
    drawn(model)
    agree_with_new(model, count, records=False)
    drawn(model)
    monkeypatch.setattr(f"{__name__}.{name}", other[name])
    agree_with_new(model, count, records=True)


def test_packages_of_others_are_not_looked_into_but_the_own_is(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    for package in ("own_models_of_a_test", "tools_of_a_test"):
        (folder / f"{package}.py").write_text("import numpy\nHELD = numpy.ones(2)\ndef run():\n    return HELD[0]\n")
    monkeypatch.syspath_prepend(str(folder))
    own, tools = map(importlib.import_module, ("own_models_of_a_test", "tools_of_a_test"))
    assert not Watch(partial(own.run)).whole

    def model() -> Any:
        return tools.run()

    assert Watch(model).whole and not Watch(model, own.run).whole


def test_a_function_defined_again_is_the_same(count) -> None:
    def make(scale: float) -> Callable[[Tensor], None]:
        return lambda y: normal(scale, y)

    drawn(make(1.0))
    agree_with_new(make(1.0), count, records=False)
    agree_with_new(make(LITTLE), count, records=True)
    drawn(lambda y: normal(1.0, y))
    # Constants stand in the code, which is compared as well.
    agree_with_new(lambda y: normal(1.000000001, y), count, records=True)


def test_what_cannot_be_looked_into_is_recorded_anew(count) -> None:
    array, many = np.ones(2), [1.0] * 1000
    for model in (lambda y: normal(float(array[0]), y), lambda y: normal(many[0], y)):
        for _ in range(2):
            agree_with_new(model, count, records=True)
    assert not _RECORDED


def test_handlers_of_the_caller_are_not_passed_over(count) -> None:
    drawn(plain)
    with poutine.scale(scale=2.0):
        agree_with_new(plain, count, records=True)
    assert not _RECORDED


def test_potentials_are_kept_in_a_bounded_number(monkeypatch) -> None:
    monkeypatch.setattr(policy, "RECORDED_POTENTIALS", 2)
    for scale in (1.0, 2.0, 3.0):
        drawn(partial(normal, scale))
    assert len(_RECORDED) == 2
    monkeypatch.setattr(policy, "RECORDED_NUMBERS", 3)
    _RECORDED.clear()
    drawn(plain)
    assert not _RECORDED


def test_a_fused_kernel_leaves_what_is_kept_unfused(count) -> None:
    def kernel(fused: bool) -> ChEES:
        made = ChEES(plain, num_chains=2, jit_compile=fused)
        made.setup(0, Y)
        return made

    assert kernel(fused=True).execution == "fused"
    count()
    again = kernel(fused=False)
    assert count() == 0 and again.execution == "traced"
    assert again._run is not kernel(fused=True)._run


def test_pieces_that_are_compiled_leave_those_that_are_kept_as_they_are(count, monkeypatch) -> None:
    monkeypatch.setattr(policy, "PIECED_NODES", 50)

    def autoregression(y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, torch.ones(()).double()))
        level = torch.zeros(()).double()
        for k in range(len(y)):
            level = (slope * level + 0.1 * y[k]).tanh()
            pyro.sample(f"y_{k}", dist.Normal(level, 1.0), obs=y[k])

    def kernel(y: Tensor = Y) -> NUTS:
        made = NUTS(autoregression, num_chains=2, jit_compile=False)
        made.setup(0, y.repeat(10))
        return made

    def compiled(made: NUTS) -> list[bool]:
        return [p.run != p.graph.forward for p in made._density.pieces._programs.values()]

    first = kernel()
    assert not any(compiled(first)) and count() > 0
    first.fuse(1e9)
    again = kernel()
    assert count() == 0 and any(compiled(first)) and not any(compiled(again))
    again.fuse(1e9)
    third = kernel()
    position = torch.linspace(-1, 1, 2).double()[:, None]
    for one, other in zip(first._density.run(position), third._density.run(position), strict=True):
        torch.testing.assert_close(one, other)
    assert any(compiled(again)) and not any(compiled(third))
    count()
    other = kernel(Y.flip(0))
    assert count() == 0
    _RECORDED.clear()
    new = kernel(Y.flip(0))
    assert count() > 0 and new._density.pieces is not None
    for found, expected in zip(other._density.run(position), new._density.run(position), strict=True):
        assert torch.equal(found, expected)
    assert not torch.allclose(other._density.run(position)[0], first._density.run(position)[0])


def test_same_tells_callables_apart() -> None:
    one, other = (lambda y, s=s: normal(s, y) for s in (1.0, 2.0))
    again = FunctionType(one.__code__, one.__globals__, one.__name__, (1.0,), one.__closure__)
    assert same(one, again) and not same(one, other)
    assert same(partial(one, y=Y), partial(again, y=Y.clone()))
    assert not same(partial(one, y=Y), partial(again, y=Y.float()))
    first, second = Box(), Box()
    assert same([first, {"a": 1.0}], [first, {"a": 1.0}]) and not same(first, second)
    grown = Y.clone().requires_grad_()
    assert same(grown, grown) and not same(grown, Y.clone().requires_grad_())
