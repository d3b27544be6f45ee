r"""One call of an objective, traced: loss and gradients, or a whole step, as one program.

The whole of ``loss_and_grads`` becomes one graph. Its inputs are the parameters by name, the buffers of the modules,
the tensors among the arguments and the tensors that the graph holds.

Tracing would freeze whatever is no input. A new program is traced when shapes, non-tensor arguments, the plain
attributes of the objective, the training mode of a module, or a value that the run takes from outside itself (see
:mod:`inference.compiler.watch`) change. Buffers, and what the objective keeps in the parameter store, are carried
through the program. Anything else is caught by comparing the program with the eager objective at calls that are powers
of two, and at the end of a fit: both draw the same noise, so losses and gradients must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import extract_provenance
from pyro.poutine.runtime import apply_stack
from torch import Tensor
from torch.fx import GraphModule

from inference.compiler.capture import Gradients, Untraceable, collect_gradients, traced
from inference.compiler.closure import reachable
from inference.compiler.constants import lift_constants
from inference.compiler.fuse import fused
from inference.compiler.noise import Draw, Given
from inference.compiler.passes import is_noise
from inference.compiler.watch import PLAIN, Place, Watch
from inference.core.contracts import Objective
from inference.core.handlers import preserved_rng
from inference.core.private import tree_flatten, tree_unflatten
from inference.core.sites import unconstrained

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Relative error up to which a program agrees with the eager objective."""


class Update(Protocol):
    """An optimizer as tensor operations: what a program does with the gradients, and the tensors that this takes."""

    names: list[str]
    moments: list[Tensor]

    @property
    def changing(self) -> list[Tensor]: ...

    @property
    def tensors(self) -> list[Tensor]: ...

    def __call__(self, params: list[Tensor], gradients: Gradients, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class Call:
    """One call of an objective: its tensor arguments, and all else that its program depends on."""

    objective: Any
    model: Any
    guide: Any
    tensors: list[Tensor]
    static: Any

    def key(self) -> tuple[Any, ...]:
        """Key of the program: everything that is a constant in it."""
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in self.tensors)
        attributes = tuple((k, type(v), v) for k, v in Objective.of(self.objective).constants().items())
        return self.model, self.guide, shapes, self.static, attributes, torch.get_default_dtype()

    def run(self, tensors: list[Tensor]) -> Any:
        """Loss of the objective; the gradients are accumulated in the parameters."""
        args, kwargs = join_arguments(tensors, self.static)
        return self.objective.loss_and_grads(self.model, self.guide, *args, **kwargs)

    def roots(self) -> list[Any]:
        """Where the call may take values from that are no inputs of its program."""
        objects = [v.value for v in self.static[0] if isinstance(v, _Same)]
        return [self.model, self.guide, type(self.objective), *objects]

    def turns(self) -> dict[str, Any]:
        """Attributes that cycle (the objective's ``cycle``); each of their values has a program of its own."""
        return {n: getattr(self.objective, n) for n in Objective.of(self.objective).cycle}

    def held(self) -> list[Tensor]:
        """Tensors that the objective keeps as attributes."""
        return Objective.of(self.objective).tensors()


@dataclass(eq=False)
class TracedStep:
    """The program of one call: loss and gradients, or with ``update`` a whole step."""

    call: Call
    update: Update | None = None
    names: list[str] = field(init=False)
    calls: int = field(default=0, init=False)
    compared: int = field(default=0, init=False)  # the last call that was compared with the eager objective
    fused: bool = field(default=False, init=False)
    _turned: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.modules = reachable(self.call.model, self.call.guide)
        self.training = self._training()
        self.buffers = [b for m in self.modules for b in m.buffers(recurse=False)]
        self.names = self._parameters()
        if self.update is not None:
            late = [n for n in self.names if n not in self.update.names]
            if late:
                raise Untraceable(f"parameter {late[0]} appears in a later step than the first")
            self.names = self.update.names
        self._form: Any = None
        self._held: list[Tensor] = []
        self.watch = Watch(*self.call.roots())
        self.graph, self._held = self._trace()
        self.draws: list[Draw] = self.graph.meta["draws"]
        self.read: list[tuple[Tensor, int]] = self.graph.meta["read"]
        self._leave_own()
        self._run: Callable[..., Any] = self.graph

    def __call__(self, inputs: list[Tensor], noise: list[Tensor] | None = None) -> tuple[Any, Gradients]:
        """Loss, and the gradient of each parameter (None where the loss does not depend on it), under new noise."""
        with torch.no_grad():
            outputs = self._run(*inputs, *(self.noise() if noise is None else noise))
        self.calls += 1
        single, count, present = self._form
        rest = iter(outputs[count:])
        return outputs[0] if single else tuple(outputs[:count]), [next(rest) if p else None for p in present]

    @property
    def single(self) -> bool:
        """Whether the objective returns one loss, and not a tuple of them."""
        return bool(self._form[0])

    def losses(self, inputs: list[Tensor]) -> Any:
        """The loss, or losses, of a program whose update has used the gradients."""
        return self(inputs)[0]

    @property
    def turning(self) -> bool:
        """Whether the objective has attributes that cycle: its players take turns."""
        return bool(self._turned)

    def turn(self, objective: Any) -> None:
        """Set the attributes that cycle as the objective's own call would."""
        vars(objective).update(self._turned)

    def inputs(self, call: Call) -> list[Tensor]:
        """The tensors of a call in the program's order."""
        store = pyro.get_param_store()._params
        kept = self.update.tensors if self.update else ()
        # A baseline of TraceGraph_ELBO is wrapped by its provenance: a compiler would hold the tensor inside.
        params = (extract_provenance(store[n])[0] for n in self.names)
        return [*params, *self.buffers, *kept, *call.held(), *call.tensors, *self._held]

    def noise(self) -> list[Tensor]:
        """What the program draws in a call, in the order of the eager run: its last inputs."""
        return [draw() for draw in self.draws]

    def fuse(self, inputs: list[Tensor]) -> None:
        """Compile the graph."""
        with preserved_rng():
            self._run = fused(self.graph, [*inputs, *self.noise()])
        self.fused = self._run is not self.graph

    def moving(self, inputs: list[Tensor]) -> list[int]:
        """Indices of the inputs that a step with an update changes; buffers are assumed constant."""
        kept = {id(t) for t in self.update.changing} if self.update else set()
        return [k for k, t in enumerate(inputs) if k < len(self.names) or id(t) in kept]

    def lives(self) -> bool:
        """Whether the program is still valid: its parameters exist, and no module changed its training mode."""
        store = pyro.get_param_store()._params
        return all(n in store for n in self.names) and self.training == self._training()

    def follow(self) -> list[str]:
        """Take over tensors that were put in the place of held ones; return names of other values that changed."""
        lost = [p.name for p in self.watch.changed() if not self._replace(p)]
        return lost + [f"a tensor of shape {tuple(t.shape)} that was read" for t, v in self.read if t._version != v]

    def _replace(self, place: Place) -> bool:
        """Hold the tensor that a place has now instead of the one that it had; False if that cannot be done."""
        old, new = place.value, place.now()
        if new is place.value:
            return True
        if not isinstance(old, Tensor) or type(old) is not type(new) or any(t is old for t, _ in self.read):
            return False
        places = self.watch.holding(old)
        where = [k for k, t in enumerate(self._held) if t is old]
        alike = _kind(old) == _kind(new) and not any(t is new for t in self._held)
        if not where or not alike or any(p.now() is not new for p in places):
            return False
        for k in where:
            self._held[k] = new
        for p in places:
            p.value = new
        return True

    def _leave_own(self) -> None:
        """Watch no longer what the run itself assigns; raise Untraceable if that is a number."""
        own = self.watch.changed()
        for place in own:
            if isinstance(place.value, int | float | str):
                raise Untraceable(f"the run changes {place.name} each time; keep it in a tensor that changes in place")
        self.watch.leave(own)

    def declare(self) -> None:
        """Issue the ``pyro.param`` statements, for effect handlers around the objective (those of ``SVI``)."""
        store = pyro.get_param_store()
        for name in self.names:
            with torch.no_grad():
                value = store[name]
            apply_stack(_message(name, value))

    def due(self, ahead: int = 1) -> bool:
        """Whether one of the next calls is to be compared with the eager objective: calls 1, 2, 4, 8, ..."""
        # The largest power of two up to the last of these calls lies among them.
        return 1 << (self.calls + ahead).bit_length() - 1 > self.calls

    def compare_with_eager(self, call: Call) -> None:
        """Compare with the eager objective under the same noise: loss and gradients.

        A fused program that differs is replaced by its graph, and that is compared: inductor may exchange independent
        draws of samplers that cannot be split into noise and what is made of it.

        Raises:
            Untraceable: They differ.
        """
        try:
            self._compare(call)
        except Untraceable:
            if not self.fused:
                raise
            self._run, self.fused = self.graph, False
            self._compare(call)

    def _compare(self, call: Call) -> None:
        inputs, count = self.inputs(call), self.calls
        with preserved_rng():
            noise = self.noise()
            with preserved_rng(), self.untouched(call):
                with Given(self.draws, noise):
                    losses, gradients = self._eagerly(inputs, call)
                expected = self._outcome(losses, gradients)
            with preserved_rng(), self.untouched(call):
                got = self._outcome(*self(inputs, noise))
        self.calls = count
        rough = self.rounding
        if not close(got[:1], expected[:1], rough) or not close(got[1:], expected[1:], rough):
            raise Untraceable(
                f"at call {count + 1} its loss is {sum(numbers(losses)):.7g}, that of its program {float(got[0]):.7g}, "
                f"or their gradients differ (calls from {self.compared + 1} on may have been wrong): what changes from "
                "step to step must be a tensor, an argument, or an attribute of the objective"
            )
        self.compared = count + 1

    @property
    def rounding(self) -> torch.dtype | None:
        """bfloat16 where part of the graph is: numbers that differ in a last digit may be rounded apart there."""
        values = (n.meta.get("val") for n in self.graph.graph.nodes)
        return torch.bfloat16 if any(getattr(v, "dtype", None) == torch.bfloat16 for v in values) else None

    def _eagerly(self, inputs: Sequence[Tensor], call: Call) -> tuple[Any, Gradients]:
        params = list(inputs[: len(self.names)])
        last = len(inputs) - len(self._held)
        with collect_gradients(params) as gradients, _kept_in_store(params, self.names):
            returned = call.run(list(inputs[last - len(call.tensors) : last]))
            collected = gradients()
        # TraceGraph_ELBO's tensors carry their provenance, which tracing does not see.
        single = not isinstance(returned, tuple)
        losses = tuple(
            torch.as_tensor(extract_provenance(x)[0]).detach() for x in ((returned,) if single else returned)
        )
        if self.update is not None:
            with torch.no_grad():
                self.update(params, collected, torch.stack(losses).sum())
            collected = [None] * len(params)
        return losses[0] if single else losses, collected

    def _outcome(self, losses: Any, gradients: Gradients) -> list[Tensor]:
        """What is compared between two runs of a step: the loss, and gradients or the optimizer's moments."""
        kept = [t.clone() for t in self.update.moments] if self.update else []
        return [torch.tensor(numbers(losses)).sum(), *(g for g in gradients if g is not None), *kept]

    def _parameters(self) -> list[str]:
        """Names of the parameters, by one eager run of the objective without side effects."""
        with preserved_rng(), self.untouched(self.call), poutine.trace(param_only=True) as capture:
            self.call.run(self.call.tensors)
            return list(unconstrained(capture.trace))

    def _training(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self.modules)

    def _trace(self) -> tuple[GraphModule, list[Tensor]]:
        call = self.call
        before = Objective.of(call.objective).constants()
        for lift in (True, False):
            with self.untouched(call):
                graph = traced(self._whole, *self.inputs(call), lift=lift)
                self._turned = call.turns()
            # With a sampler that cannot be split the program draws all of its noise itself, in the order of the run.
            if not any(map(is_noise, graph.graph.nodes)):
                break
        changed = [k for k, v in Objective.of(call.objective).constants().items() if before.get(k) != v]
        vars(call.objective).update(before)
        if changed:
            raise Untraceable(f"the objective changes its attribute {changed[0]} in every step; keep it in a tensor")
        return graph, lift_constants(graph, before=len(graph.meta["draws"]))

    def _whole(self, *inputs: Tensor) -> list[Tensor]:
        """The computation that is traced: losses and gradients, or with an update the losses alone."""
        losses, collected = self._eagerly(inputs, self.call)
        single = isinstance(losses, Tensor)
        losses = (losses,) if single else losses
        self._form = single, len(losses), [g is not None for g in collected]
        return [*losses, *(g for g in collected if g is not None)]

    @contextmanager
    def untouched(self, call: Call | None = None) -> Iterator[None]:
        """Restore parameters, buffers, gradients and the store's entries afterwards."""
        call = call or self.call
        store = pyro.get_param_store()
        entries = dict(store._params)
        kept = self.update.tensors if self.update else []
        tensors = [*entries.values(), *self.buffers, *kept, *call.held()]
        values = [t.detach().clone() for t in tensors]
        turns = call.turns()
        gradients = [(p, p.grad) for p in entries.values()]
        for p, _ in gradients:
            p.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                for t, v in zip(tensors, values, strict=True):
                    # A write would make graphs of the caller invalid that hold the tensor.
                    if not torch.equal(t, v):
                        t.copy_(v)
            vars(call.objective).update(turns)
            for p, g in gradients:
                p.grad = g
            for name, p in entries.items():
                _restore(name, p)


@contextmanager
def _kept_in_store(params: list[Tensor], names: list[str]) -> Iterator[None]:
    """Copy values that the objective puts into the parameter store into the tensors that were there."""
    yield
    with torch.no_grad():
        for name, p in zip(names, params, strict=True):
            now = pyro.get_param_store()._params[name]
            if now is not p:
                p.copy_(now.detach())
                _restore(name, p)


def _restore(name: str, param: Tensor) -> None:
    store = pyro.get_param_store()
    if store._params.get(name) is not param:
        store._params[name] = param
        store._param_to_name[param] = name


def _message(name: str, value: Tensor) -> Any:
    return {
        "type": "param",
        "name": name,
        "fn": lambda *_, **__: value,
        "is_observed": False,
        "args": (),
        "kwargs": {},
        "value": value,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": None,
    }


@dataclass(frozen=True)
class _Form:
    """How arguments were nested; equal when their text is."""

    spec: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Form) and repr(self.spec) == repr(other.spec)

    def __hash__(self) -> int:
        return hash(repr(self.spec))


@dataclass(frozen=True, eq=False)
class _Same:
    """An argument that is equal to itself alone: a namespace, a packed sequence, an array."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_BY_VALUE = (*PLAIN, torch.dtype, torch.device, torch.Size)


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], Any]:
    """Split arguments into their tensors and a hashable rest; :func:`join_arguments` is the inverse."""
    leaves: Any = (*args, *kwargs.values())
    form: Any = len(args), tuple(kwargs)
    if any(isinstance(v, list | tuple | dict) for v in leaves):
        leaves, spec = tree_flatten((args, kwargs))
        form = _Form(spec)
    which = tuple(isinstance(v, Tensor) for v in leaves)
    rest = [v for v in leaves if not isinstance(v, Tensor)]
    fixed = tuple(v if isinstance(v, _BY_VALUE) else _Same(v) for v in rest)
    # 1, 1.0 and True are equal, and give tensors of different types.
    return [v for v in leaves if isinstance(v, Tensor)], (fixed, which, form, tuple(map(type, rest)))


def join_arguments(tensors: list[Tensor], static: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments from their tensors and the rest."""
    fixed, which, form, _ = static
    moving, rest = iter(tensors), iter([v.value if isinstance(v, _Same) else v for v in fixed])
    leaves = [next(moving) if w else next(rest) for w in which]
    if isinstance(form, _Form):
        return tree_unflatten(leaves, form.spec)
    count, names = form
    return tuple(leaves[:count]), dict(zip(names, leaves[count:], strict=True))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """All that a program may depend on in a tensor besides its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def numbers(losses: Any) -> list[float]:
    """One loss, or several, as a list of numbers."""
    return [float(x) for x in (losses if isinstance(losses, tuple) else (losses,))]


def close(got: list[Tensor], expected: list[Tensor], dtype: torch.dtype | None = None) -> bool:
    """Whether tensors agree to floating-point error, of a type or of their own, relative to the largest number."""
    largest = max((float(t.nan_to_num(0, 0, 0).abs().max()) for t in expected if t.numel()), default=0.0)
    pairs = zip(got, expected, strict=True)
    return all(
        torch.allclose(a, b.to(a), rtol=tolerance, atol=tolerance * largest, equal_nan=True)
        for a, b in pairs
        for tolerance in [TOLERANCE[dtype or a.dtype]]
    )
