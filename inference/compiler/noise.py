r"""Draws of noise as inputs of a recorded computation.

An operation that draws is split into noise that depends on no value, such as standard normal numbers of a given shape,
and what makes its result of them:

- ``normal(mean, std)``: mean + std eps, eps standard normal.
- ``bernoulli(p)``: u < p, u uniform on [0, 1).
- ``multinomial(p, 1)``: the largest of p_k / e_k, e_k standard exponential, as torch's own does it.
- ``normal_``, ``uniform_``, ``exponential_``, ``bernoulli_(0.5)``, ``randint``, ``randperm``, ...: noise as they are.

A recorded program takes the noise as inputs, in the order in which the recorded run drew it. So what a program draws
does not depend on the order in which a compiler runs operations, and a program and the eager computation can be
compared under the same noise on any device. Samplers that reject (Gamma, Poisson, binomial) cannot be split: a program
with one of them draws all of its noise itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inference.compiler.form import Form
from inference.core.private import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Draw:
    """Noise that depends on no value: an operation that fills a tensor of a form, or that makes one."""

    operation: Any
    args: tuple[Any, ...]
    form: Form | None = None

    def __call__(self) -> Tensor:
        """Noise from torch's generator of the device."""
        if self.form is None:
            return self.operation(*self.args)  # type: ignore[no-any-return]
        return self.operation(self.form.empty(), *self.args)  # type: ignore[no-any-return]

    def plainly(self) -> Tensor | None:
        """The same noise by an operation of which inductor draws torch's own numbers; None if there is none."""
        plain = {aten.normal_.default: torch.randn, aten.uniform_.default: torch.rand}.get(self.operation)
        if plain is None or self.args or self.form is None or not self.form.contiguous:
            return None
        return plain(self.form.shape, dtype=self.form.dtype, device=self.form.device)  # type: ignore[operator, no-any-return]

    def into(self, out: Tensor) -> None:
        """Write noise into a tensor of its shape."""
        if self.form is not None and out.stride() == self.form.strides:
            self.operation(out, *self.args)
        else:
            out.copy_(self())


Result = Callable[[Tensor], Any]
"""From noise to the result of the operation that draws."""


FILLS: dict[Any, Any] = {
    aten.normal_functional.default: aten.normal_.default,
    aten.uniform.default: aten.uniform_.default,
    aten.exponential.default: aten.exponential_.default,
    aten.bernoulli.p: aten.bernoulli_.float,
    aten.geometric.default: aten.geometric_.default,
    aten.cauchy.default: aten.cauchy_.default,
    aten.log_normal.default: aten.log_normal_.default,
    getattr(aten.random, "from"): getattr(aten.random_, "from"),
    aten.random.to: aten.random_.to,
    aten.random.default: aten.random_.default,
}
"""Operations that take the form of a tensor and numbers, and those that fill a tensor so in place."""


IN_PLACE = frozenset(FILLS.values())
"""Operations that fill a tensor with noise."""


MAKERS = (
    aten.randn.default,
    aten.rand.default,
    aten.randint.default,
    aten.randint.low,
    aten.randperm.default,
    aten.normal.float_float,
)
"""Operations that make noise of a size."""


LIKE = {aten.randn_like.default: aten.normal_.default, aten.rand_like.default: aten.uniform_.default}
"""Operations that make noise of the form of a tensor, and those that fill a tensor so."""


def split(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Draw, Result] | None:
    """Noise that depends on no value, and what makes the result of an operation of it; None if there is no such noise.

    Args:
        operation: An operation, with the tag of those that draw random numbers.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    if kwargs.get("generator") is not None:
        return None
    if operation in MAKERS:
        return _made(operation, args, kwargs), _itself
    if operation in LIKE:
        return _filled(LIKE[operation], torch.empty_like(args[0], **kwargs)), _itself
    if operation in FILLS:
        return _filled(FILLS[operation], torch.empty_like(args[0]), *args[1:]), _itself
    if operation in IN_PLACE:
        # A tensor that overlaps itself is filled in another order than a new one.
        return _filled(operation, torch.empty_like(args[0]), *args[1:]), args[0].copy_
    rule = RULES.get(operation)
    return None if rule is None else rule(*args, **kwargs)


def _itself(noise: Tensor) -> Tensor:
    return noise


def _made(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draw:
    kept = {k: v for k, v in kwargs.items() if v is not None}
    if operation in (aten.randn.default, aten.rand.default):
        empty = torch.empty(args[0], **kept)
        return _filled(aten.normal_.default if operation is aten.randn.default else aten.uniform_.default, empty)
    return Draw(_Calling(operation, tuple(kept.items())), args)


@dataclass(frozen=True)
class _Calling:
    """An operation with keyword arguments."""

    operation: Any
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Tensor:
        return self.operation(*args, **dict(self.kwargs))  # type: ignore[no-any-return]


def _filled(operation: Any, like: Tensor, *args: Any) -> Draw:
    return Draw(operation, args, Form.of(like))


def _normal(mean: Tensor | float, std: Tensor | float = 1.0, **_: Any) -> tuple[Draw, Result]:
    tensors = [v for v in (mean, std) if isinstance(v, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    like = torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device)
    return _filled(aten.normal_.default, like), lambda noise: noise * std + mean


def _bernoulli(p: Tensor, **_: Any) -> tuple[Draw, Result]:
    like = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    return _filled(aten.uniform_.default, like), lambda noise: (noise < p).to(p.dtype)


def _bernoulli_in_place(out: Tensor, p: Tensor, **_: Any) -> tuple[Draw, Result]:
    draw, result = _bernoulli(p.expand(out.shape))
    return draw, lambda noise: out.copy_(result(noise))


def _multinomial(p: Tensor, count: int, replacement: bool = False, **_: Any) -> tuple[Draw, Result] | None:
    if count != 1:
        return None
    return _filled(aten.exponential_.default, torch.empty_like(p)), lambda noise: (p / noise).argmax(-1, keepdim=True)


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Draw, Result] | None:
    if train is False or p in (0.0, 1.0):
        return None
    kept = _filled(aten.bernoulli_.float, torch.empty_like(x, dtype=torch.bool), 1 - p)
    return kept, lambda noise: (x * noise * (1 / (1 - p)), noise)


RULES: dict[Any, Callable[..., tuple[Draw, Result] | None]] = {
    aten.normal.Tensor_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli_.Tensor: _bernoulli_in_place,
    aten.native_dropout.default: _dropout,
    aten.multinomial.default: _multinomial,
}
"""Operations whose result depends on values, and how they are split."""


class Given(TorchDispatchMode):
    """Replaces draws by given noise, in its order.

    Args:
        draws: The draws that a recorded run has made.
        noise: Noise for each of them.

    Attributes:
        left: Draws that have not been asked for.
    """

    def __init__(self, draws: Iterable[Draw], noise: Iterable[Tensor]) -> None:
        super().__init__()
        self.left = list(zip(draws, noise, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that draws with the next given noise."""
        if torch.Tag.nondeterministic_seeded in func.tags and all(t in (Tensor, nn.Parameter) for t in types):
            parts = split(func, args, kwargs or {})
            # Where the run draws other noise than the recorded one, its results differ, which is what is looked for.
            if parts is not None and self.left and parts[0] == self.left[0][0]:
                # A run may go on to change it in place.
                return parts[1](self.left.pop(0)[1].clone())
        return func(*args, **(kwargs or {}))
