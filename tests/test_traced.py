"""What a trace would freeze: values that are read out of tensors, and values that a run takes from outside itself."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
import os
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS as PyroNUTS
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from inference import fit, sample
from inference.compiler import block, fuse, policy
from inference.compiler.capture import Untraceable, traced
from inference.compiler.objective import Compiled
from inference.compiler.potential import BatchedPotential, CompiledPotential
from inference.compiler.watch import Watch
from inference.core.handlers import isolated

Y = torch.tensor([0.3, -1.2, 2.0, 0.1, -0.7]).double()

READS: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda x: x.tolist() > 1,
    "numpy": lambda x: x.detach().numpy() > 1,
    "array": lambda x: np.asarray(x.detach()) > 1,
    "bool": lambda x: x.item() > 1,
    "int": lambda x: int(x) > 1,
    "float": lambda x: math.exp(x) > 3,
    "complex": lambda x: complex(x).real > 1,
    "index": lambda x: [False, False, True][x.long()],
    "format": lambda x: float(f"{x:.1f}") > 1,
    "repr": lambda x: "2." in str(x.detach()),
    "deepcopy": lambda x: bool(copy.deepcopy(x.detach()) > 1),
    "dlpack": lambda x: np.from_dlpack(x.detach()) > 1,
    "to_dlpack": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())) > 1,
    "a set": lambda x: x.item() in {2.0},
    "a dictionary": lambda x: {2.0: True}.get(x.item(), False),
    "equal": lambda x: torch.equal(x, torch.tensor(2.0)),
    "allclose": lambda x: torch.allclose(x, torch.tensor(2.0)),
    "nonzero": lambda x: len((x > 1).nonzero()) > 0,
    "a boolean index": lambda x: len(x[None][x[None] > 1]) > 0,
    "masked_select": lambda x: len(torch.masked_select(x[None], x[None] > 1)) > 0,
    "unique": lambda x: len(torch.stack([x, torch.tensor(2.0)]).unique()) == 1,
    "repeat_interleave": lambda x: len(torch.ones(1).repeat_interleave(x.long()[None])) > 1,
    "bincount": lambda x: len(torch.bincount(x.long()[None])) > 1,
}


@pytest.mark.parametrize("door", READS)
def test_a_read_of_a_value_is_refused_and_the_line_is_named(door: str) -> None:
    def steered(x: Tensor) -> Tensor:
        return 2 * x if READS[door](x) else 3 * x

    with pytest.raises(Untraceable, match=r"test_traced.py:\d+ \(.*\) reads the value of a tensor by (\w| )+"):
        traced(steered, torch.tensor(0.5))
    assert steered(torch.tensor(2.0)) == 4


def test_a_read_is_refused_though_the_code_catches_the_error() -> None:
    def steered(x: Tensor) -> Tensor:
        try:
            return 2 * x if x.tolist() > 1 else 3 * x
        except RuntimeError:
            return x

    with pytest.raises(Untraceable, match=r"by tolist\(\)"):
        traced(steered, torch.tensor(0.5))


def test_an_error_that_only_a_trace_raises_is_told_as_one() -> None:
    with pytest.raises(Untraceable, match="__round__"):
        traced(lambda x: x * round(x.item()), torch.tensor(0.5))


def test_noise_may_not_be_read() -> None:
    with pytest.raises(Untraceable, match=r"by tolist\(\)"):
        traced(lambda x: x if torch.rand(()).tolist() > 0.5 else 2 * x, torch.tensor(0.5))


def test_what_depends_on_no_input_may_be_read() -> None:
    data = torch.tensor([1.0, 5.0])

    def reads(x: Tensor) -> Tensor:
        groups = int(data.max()) if (data > 0).all() else 0
        names = [f"y_{i.item()}" for i in torch.arange(2)]
        return x * groups * len(names) + len(data[data > 2]) + float(np.asarray(data).sum())

    graph = traced(reads, torch.tensor(0.5))
    assert graph(torch.tensor(2.0)) == reads(torch.tensor(2.0)) == 27
    assert any(t is data for t, _ in graph.meta["read"])


def branching(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    if mu.tolist() > 0:
        pyro.factor("rare", torch.tensor(-20.0).double())
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_a_potential_that_reads_its_draws_is_refused_and_the_line_is_named() -> None:
    with isolated(0):
        start, potential, _, _ = initialize_model(partial(branching, Y))
        for make in (CompiledPotential, partial(BatchedPotential, chains=4)):
            with pytest.raises(Untraceable, match=r"\(if mu.tolist\(\) > 0:\) reads .* by tolist\(\), after site mu"):
                make(potential, start)


@pytest.mark.filterwarnings("ignore:.*cannot be mapped", "ignore:.*diagnosis")
def test_chains_of_a_model_that_reads_its_draws_are_the_eager_chains() -> None:
    run = partial(sample, branching, Y[:1], PyroNUTS, draws=5, warmup=5, chains=1, progress=False)
    with pytest.warns(UserWarning, match=r"eagerly.*test_traced.py:\d+ \(if mu.tolist\(\) > 0:\) reads"):
        compiled = run(compile=True)
    assert compiled.idata.attrs["execution"] == "eager"
    assert torch.equal(compiled.draws["mu"], run(compile=False).draws["mu"])


@pytest.mark.filterwarnings("ignore:.*cannot be mapped")
def test_a_fit_of_a_model_that_reads_its_draws_is_the_eager_fit() -> None:
    def run(compile: bool) -> Any:
        return fit((branching, AutoNormal(branching)), Y, steps=20, draws=10, compile=compile, progress=False)

    with pytest.warns(UserWarning, match=r"test_traced.py:\d+ \(if mu.tolist\(\) > 0:\)"):
        compiled = run(True)
    assert compiled.idata.attrs["execution"] == "eager"
    np.testing.assert_allclose(compiled.losses, run(False).losses, rtol=1e-6)


def losses_agree(model: Any, change: Callable[[int], Any], *arguments: Any, calls: int = 14) -> Compiled:
    """Compare each call with the eager objective, with a change before it."""
    guide, compiled = AutoNormal(model), Compiled(Trace_ELBO(), fuse=False)
    with isolated(0):
        guide(*arguments)
        for call in range(calls):
            change(call)
            noise = torch.get_rng_state()
            got = compiled.loss_and_grads(model, guide, *arguments)
            torch.set_rng_state(noise)
            expected = Trace_ELBO().loss_and_grads(model, guide, *arguments)
            assert type(got) is float
            assert got == pytest.approx(expected, rel=1e-6), call
    return compiled


def scored(mu: Tensor, y: Tensor, beta: float = 1.0) -> None:
    with pyro.poutine.scale(scale=beta), pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def drawn() -> Any:
    return pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))


BETA, BATCH, HELD = 1.0, Y, {"beta": 1.0}
SETTINGS = Namespace(beta=1.0, batch=Y)


class Annealed:
    beta: ClassVar = 1.0

    def __init__(self) -> None:
        self.weights = [1.0, 1.0]

    def __call__(self) -> None:
        scored(drawn(), BATCH, self.beta * self.weights[1])


def of_globals() -> None:
    scored(drawn(), BATCH, BETA * HELD["beta"] * SETTINGS.beta)


def slowly(assign: Callable[[float], Any]) -> Callable[[int], Any]:
    """A value that changes before every fifth call."""
    return lambda call: assign(1.0 + call // 5)


def test_numbers_from_globals_attributes_and_entries_are_not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    here = globals()
    annealed = Annealed()
    for model, assign in (
        (of_globals, lambda b: monkeypatch.setitem(here, "BETA", b)),
        (of_globals, lambda b: monkeypatch.setitem(HELD, "beta", b)),
        (of_globals, lambda b: monkeypatch.setattr(SETTINGS, "beta", b)),
        (annealed, lambda b: monkeypatch.setattr(Annealed, "beta", b)),
        (annealed, lambda b: annealed.weights.__setitem__(1, b)),
    ):
        assert losses_agree(model, slowly(assign)).state == "traced"
        monkeypatch.undo()


@dataclasses.dataclass(slots=True)
class Slotted:
    beta: float = 1.0
    __hidden: float = 1.0

    def hide(self, value: float) -> None:
        self.__hidden = value

    def total(self) -> float:
        return self.beta + self.__hidden


def test_numbers_of_functions_slots_and_queues_are_not_frozen() -> None:
    slotted, queue = Slotted(), collections.deque([1.0])

    def attribute() -> None:
        scored(drawn(), Y, attribute.beta)

    attribute.beta = 1.0
    for model, assign in (
        (attribute, lambda b: setattr(attribute, "beta", b)),
        (lambda: scored(drawn(), Y, slotted.total()), lambda b: setattr(slotted, "beta", b)),
        (lambda: scored(drawn(), Y, slotted.total()), slotted.hide),
        (lambda: scored(drawn(), Y, queue[-1]), lambda b: queue.__setitem__(0, b)),
        (lambda: scored(drawn(), Y, queue[-1]), queue.append),
    ):
        assert losses_agree(model, slowly(assign)).state == "traced"


def test_a_number_of_a_closure_is_not_frozen() -> None:
    beta = 1.0

    def model() -> None:
        scored(drawn(), Y, beta)

    def assign(value: float) -> None:
        nonlocal beta
        beta = value

    assert losses_agree(model, slowly(assign)).state == "traced"


def test_batches_of_a_users_loop_need_no_new_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def rebind(call: int) -> None:
        monkeypatch.setitem(globals(), "BATCH", torch.full((5,), 1.0 + call).double())

    compiled = losses_agree(of_globals, rebind, calls=3 + policy.MAX_TRACES)
    assert compiled.state == "traced"
    assert next(p.calls for p in compiled._programs.values() if p) == 2 + policy.MAX_TRACES


def test_a_batch_of_another_length_and_a_module_that_is_exchanged_are_not_frozen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch, self.inner = Y, nn.Linear(1, 1).double()

        def forward(self) -> None:
            scored(drawn() * self.inner.weight[0, 0].detach(), self.batch)

    net = Net()
    losses_agree(net, slowly(lambda b: setattr(net, "batch", Y[: int(b)])))
    losses_agree(net, slowly(lambda b: setattr(net, "inner", nn.Linear(1, 1).double())))


def test_a_value_that_changes_at_every_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="the global BETA changes again and again: make it an argument, or a tensor"):
        losses_agree(
            of_globals,
            lambda call: monkeypatch.setitem(globals(), "BETA", 1.0 + call),
            calls=4 + policy.MAX_TRACES,
        )


def test_a_counter_of_the_model_is_named() -> None:
    class Counting:
        count = 0

        def __call__(self) -> None:
            self.count += 1
            scored(drawn(), Y, 1.0 / self.count)

    model = Counting()
    guide, compiled = AutoNormal(scored_once), Compiled(Trace_ELBO(), fuse=False)

    def run() -> None:
        for _ in range(4):
            compiled.loss_and_grads(model, guide)

    with isolated(0), pytest.warns(UserWarning, match=r"the run changes Counting.count each time"):
        run()


def scored_once() -> None:
    scored(drawn(), Y)


def test_a_mask_of_a_write_is_watched() -> None:
    """It was recorded as the places that it selects."""
    mask = torch.tensor([True, False])

    def model() -> None:
        scale = torch.ones(2)
        scale[mask] = 3.0
        scored(drawn(), Y, float(scale.sum()))
        pyro.factor("more", -drawn_again() * scale.sum())

    def drawn_again() -> Tensor:
        return pyro.sample("other", dist.Normal(torch.zeros(()), 1.0))

    changes = {5: True, 10: False}
    assert losses_agree(model, lambda call: call in changes and mask[1].fill_(changes[call])).state == "traced"


def test_a_tensor_that_was_read_is_watched() -> None:
    beta = torch.ones(())

    def model() -> None:
        scored(drawn(), Y, float(beta))

    assert losses_agree(model, slowly(beta.fill_)).state == "traced"


@pytest.mark.parametrize(
    "argument",
    [
        {"y": Y, "names": {"a", "b"}, "sizes": np.ones(3)},
        Namespace(y=Y),
        pack_sequence([Y[:3], Y[3:]]),
    ],
    ids=["dict", "Namespace", "PackedSequence"],
)
def test_arguments_of_any_kind_are_traced(argument: Any) -> None:
    def model(argument: Any) -> None:
        y = argument["y"] if isinstance(argument, dict) else getattr(argument, "y", None)
        scored(drawn(), argument.data if y is None else y)

    assert losses_agree(model, lambda _: None, argument).state == "traced"


def test_an_entry_of_an_argument_is_not_frozen() -> None:
    argument = Namespace(y=Y, beta=1.0)

    def model(argument: Any) -> None:
        scored(drawn(), argument.y, argument.beta)

    assert losses_agree(model, slowly(lambda b: setattr(argument, "beta", b)), argument).state == "traced"


def test_arguments_that_are_equal_but_of_another_type_have_programs_of_their_own() -> None:
    def model(scale: Any) -> None:
        scored(drawn(), Y, 1.0 if isinstance(scale, bool) else 2.0 if isinstance(scale, int) else 3.0)

    guide, compiled = AutoNormal(model), Compiled(Trace_ELBO(), fuse=False)
    with isolated(0):
        guide(1)
        for scale in (1, 1, 1.0, 1.0, True, True):
            noise = torch.get_rng_state()
            got = compiled.loss_and_grads(model, guide, scale)
            torch.set_rng_state(noise)
            assert got == pytest.approx(Trace_ELBO().loss_and_grads(model, guide, scale), rel=1e-6)


def test_a_loop_over_a_plate_is_traced() -> None:
    def model() -> None:
        mu = drawn()
        for i in pyro.plate("rows", len(Y)):
            pyro.sample(f"y_{i}", dist.Normal(mu, 1.0), obs=Y[i])

    assert losses_agree(model, lambda _: None).state == "traced"


PRIOR = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


class Mean(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.mu = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self) -> None:
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(self.mu, 1.0).to_event(1), obs=torch.ones(2, 2))


def test_distributions_that_were_built_while_validation_was_on_are_traced() -> None:
    def constant() -> None:
        mu = pyro.sample("mu", PRIOR)
        pyro.sample("y", dist.Normal(mu, 1.0, validate_args=True).to_event(1), obs=torch.ones(2))

    for model in (constant, Mean()):
        assert losses_agree(model, lambda _: None).state == "traced"


def test_a_compiled_loss_can_be_differentiated() -> None:
    def run(elbo: Any) -> list[list[Tensor]]:
        guide, seen = AutoNormal(scored_once), []
        with isolated(0):
            guide()
            for _ in range(5):
                loss = elbo(scored_once, guide)()
                seen.append([loss.detach(), *torch.autograd.grad(3 * loss, list(guide.parameters()))])
        return seen

    compiled = Compiled(Trace_ELBO(), fuse=False)
    torch.testing.assert_close(run(compiled), run(Trace_ELBO()))
    assert compiled.state == "traced"


def test_a_call_leaves_the_graphs_of_its_caller_valid() -> None:
    compiled, guide = Compiled(Trace_ELBO(), fuse=False), AutoNormal(scored_once)
    with isolated(0):
        guide()
        penalty = sum(p.square().sum() for p in guide.parameters())
        for _ in range(3):
            compiled.loss_and_grads(scored_once, guide)
        penalty.backward()
    assert compiled.state == "traced"


class Partly(PyroModule):
    """A linear regression whose slope is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1).double()
        self.net.weight.requires_grad_(False)

    def forward(self, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(()).double()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(self.net(y[:, None])[:, 0], scale), obs=y)


@pytest.mark.parametrize("optimizer", [None, pyro.optim.Adam({"lr": 0.01})], ids=["default", "Pyro's"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_fit_leaves_frozen_parameters(compile: bool, optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fuse, block):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    model = Partly()
    frozen, free = model.net.weight.clone(), model.net.bias.clone()
    pair = (model, AutoNormal(model))
    result = fit(pair, Y, steps=20, draws=10, compile=compile, optimizer=optimizer, progress=False)
    assert result.idata.attrs["execution"] == ("traced" if compile else "eager")
    assert not model.net.weight.requires_grad
    assert torch.equal(model.net.weight, frozen)
    assert not torch.equal(model.net.bias, free)


def test_a_compiled_objective_has_what_the_objective_has() -> None:
    compiled = Compiled(Trace_ELBO(num_particles=7))
    assert compiled.num_particles == 7
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        compiled.nothing_of_that_name  # noqa: B018
    assert not hasattr(Compiled(TraceGraph_ELBO()), "differentiable_loss")


def test_a_fit_is_compared_at_its_end() -> None:
    weight = np.ones(())

    def model(y: Tensor) -> None:
        scored(drawn(), y, float(weight))

    class Late(torch.optim.SGD):
        """Changes a number that nothing watches after step 40, for two parameters: call 32 comes before, 64 after."""

        steps = 0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            Late.steps += 1
            weight.fill(1.0 + (Late.steps > 80))
            return super().step(*args, **kwargs)

    pair = (model, AutoNormal(model))
    with pytest.warns(UserWarning, match=r"calls from 33 on may have been wrong"):
        fit(pair, Y, steps=50, optimizer=pyro.optim.PyroOptim(Late, {"lr": 1e-3}), compile=True, progress=False)


def test_a_cache_that_cannot_be_written_leaves_the_traced_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch has made its folder; what is asked of it later is another one.
    import_module("torch._dynamo")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("inference.compiler.fuse._PROGRAMS", OrderedDict())
    run = partial(fit, (scored_rows, AutoNormal(scored_rows)), Y, draws=10, progress=False)
    with pytest.warns(UserWarning, match=r"runs traced, but not fused \(.*NotADirectoryError: .*file"):
        result = run(steps=70, compile=True)
    assert result.idata.attrs["execution"] == "traced"


def test_a_cache_that_cannot_be_made_is_replaced_before_torch_needs_it(tmp_path: Path) -> None:
    """In a process of its own: torch makes the folder once, when its compiler is first imported."""
    (tmp_path / "file").write_text("no folder")
    work = """
import os, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import inference
import torch
torch.optim.Adam([torch.zeros(1, requires_grad=True)])
print(*[str(w.message) for w in said if "TORCHINDUCTOR_CACHE_DIR" in str(w.message)], sep="|")
print(os.path.isdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")}
    ran = subprocess.run([sys.executable, "-c", work], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said, there = ran.stdout.splitlines()
    assert said.startswith("TORCHINDUCTOR_CACHE_DIR: expected a folder that can be made, got ") and there == "True"
    assert said.count("expected") == 1


def scored_rows(y: Tensor) -> None:
    scored(drawn(), y)


def test_looking_at_the_places_costs_little() -> None:
    watch = Watch(of_globals, Annealed())
    assert 8 < len(watch.places) < 40
    assert not watch.changed()


def test_plain_svi_is_told_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    with isolated(0):
        svi = SVI(Mean(), AutoNormal(Mean()), pyro.optim.Adam({"lr": 0.01}), loss=Compiled(Trace_ELBO(), fuse=False))
        losses = [svi.step() for _ in range(5)]
    assert all(type(x) is float for x in losses)
    assert not [w for w in recwarn if "eagerly" in str(w.message)]


def test_what_was_written_into_a_tensor_is_not_read_as_a_constant() -> None:
    """As ``OrderedLogistic`` does it: nothing but the writes into its views tells that the tensor depends on x."""

    def written(x: Tensor) -> Any:
        table = torch.zeros(2, 2)
        table[:, 0] = x
        return (table / 2).sum().item()

    graph = traced(written, torch.ones(2))
    assert float(graph(torch.tensor([3.0, 5.0]))) == 4.0

    def branching(x: Tensor) -> Tensor:
        table = torch.zeros(2, 2)
        table[0] = x
        return x if bool(table.sum() > 1) else -x

    with pytest.raises(Untraceable, match=r"reads the value of a tensor by bool\(\)"):
        traced(branching, torch.ones(2))


def test_a_tensor_into_whose_view_was_written_is_not_read_itself() -> None:
    def listed(x: Tensor) -> Tensor:
        table = torch.zeros(2)
        table[:1] = x[:1]
        return x * sum(table.tolist())

    with pytest.raises(Untraceable, match=r"reads the value of a tensor by tolist\(\)"):
        traced(listed, torch.ones(2))


@pytest.mark.parametrize(
    "write",
    [
        lambda table, x: torch.mul(x, 2.0, out=table[0]),
        lambda table, x: torch.topk(x, 2, out=(table[0], torch.empty(2, dtype=torch.long))),
        lambda table, x: torch._foreach_copy_([table[1], table[0]], [torch.zeros(2), x]),
    ],
    ids=["out", "several results", "a list of tensors"],
)
def test_writes_by_any_argument_are_followed(write: Callable[..., Any]) -> None:
    def branching(x: Tensor) -> Tensor:
        table = torch.zeros(2, 2)
        write(table, x)
        return x if bool(table.sum() > 1) else -x

    with torch.no_grad(), pytest.raises(Untraceable, match=r"reads the value of a tensor by bool\(\)"):
        traced(branching, torch.ones(2))


def test_constants_that_are_written_in_place_may_be_read() -> None:
    def masked(x: Tensor) -> Tensor:
        weights = torch.zeros(3)
        weights[1:] = 2.0
        return x * weights.sum().item()

    assert traced(masked, torch.ones(2))(torch.tensor([1.0, 2.0])).tolist() == [4.0, 8.0]


def test_a_mask_that_is_written_in_place_selects_what_it_selects_eagerly() -> None:
    """It was computed again from the node that made it, all False."""
    rows = torch.arange(5.0)

    def selected(x: Tensor) -> Tensor:
        mask = torch.zeros(5, dtype=torch.bool)
        mask[1:3] = True
        return (x * rows[mask]).sum()

    assert float(traced(selected, torch.tensor(1.0))(torch.tensor(2.0))) == 6.0


@pytest.mark.parametrize("outside", [True, False])
def test_a_constant_mask_of_a_write_is_recorded_as_the_places_that_it_selects(outside: bool) -> None:
    mask = torch.tensor([True, False, True])

    def written(x: Tensor) -> Tensor:
        table = torch.ones(3)
        if outside:
            table[mask] = x
        else:
            inside = torch.zeros(3, dtype=torch.bool)
            inside[::2] = True
            table[inside] = x
        return table * torch.arange(1.0, 4.0)

    graph = traced(written, torch.zeros(2))
    (put,) = (n for n in graph.graph.nodes if "index_put" in str(n.target))
    assert [n.meta["val"].dtype for n in put.args[1]] == [torch.int64]
    assert graph(torch.tensor([5.0, 7.0])).tolist() == [5.0, 2.0, 21.0]


@pytest.mark.parametrize("value", [0.0, torch.tensor([0.5]), torch.arange(1.0, 3.0)], ids=["number", "tensor", "rows"])
def test_a_mask_of_a_write_that_depends_on_an_input_is_followed(value: Any) -> None:
    def written(x: Tensor) -> Tensor:
        table = x[:, None] * torch.ones(2)
        table[x < 0] = value
        table.mT[:, x > 2] = -1.0
        return table

    graph = traced(written, torch.ones(3))
    for x in (torch.tensor([1.0, -1.0, 3.0]), torch.tensor([-2.0, -1.0, -1.0])):
        torch.testing.assert_close(graph(x), written(x))


def test_chains_of_a_model_that_sets_what_is_negative_to_zero_are_traced(recwarn: pytest.WarningsRecorder) -> None:
    """The posterior has a kink at zero; its mean is that of a quadrature."""

    def rectified(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        mean = a.clone()
        mean[a < 0] = 0.0
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    result = sample(rectified, torch.ones(3).double(), draws=500, warmup=300, progress=False)
    assert result.method == "ChEES"
    assert not [w for w in recwarn if "eager" in str(w.message)]
    grid = torch.linspace(-6, 6, 100_001).double()
    weights = (-(grid**2) / 2 - 2 * (1 - grid.clamp(min=0)) ** 2).softmax(0)
    mean = float((weights * grid).sum())
    sd = float((weights * (grid - mean) ** 2).sum().sqrt())
    assert float((result.draws["a"].mean(0) - mean).abs().max()) < 0.05 * sd
