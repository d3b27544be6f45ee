r"""Lossless compression of rows by a fitted pair: an entropy coder with the probabilities of the model.

A row costs :math:`-\log_2 p(x)` bits. Where the pair gives each column's distribution given the columns before it, the
columns are coded one after another. Where a row has latent variables z and the guide takes new rows, **bits back**
codes (x, z): z is decoded from the code so far by q(z | x), which takes bits off it, then x is encoded by p(x | z) and
z by p(z). The net cost of a row is

.. math:: -\log_2 p(x \mid z) - \log_2 p(z) + \log_2 q(z \mid x)

whose mean over q is the negative ELBO in bits. Continuous z are rounded to the middle of bins of equal prior mass:
a guide that reaches beyond the prior, as one of few steps does, pays for the width of the outermost bins.

Coder and decoder must compute bit-identical probabilities. So both run the same operations on tensors of the same
shapes, in one thread: columns for as many rows at a time as :data:`TOGETHER`, and bits back row by row. What remains is
the machine: a code is for the Result that made it, or one loaded from its folder, with the same version of torch on the
same kind of processor. A checksum tells if they differ. It is no format to keep data in for years.

References: Townsend, Bird and Barber 2019, "Practical Lossless Compression with Latent Variables using Bits Back
Coding" (https://arxiv.org/abs/1901.04866); Frey and Hinton 1997, "Efficient Stochastic Source Coding and an Application
to a Bayesian Network Source Model".
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import bits_back
from inference.coder import Stack
from inference.core.bound import BoundPair
from inference.core.given import by_name, to_tensor
from inference.core.halves import accepted_by, halves_of
from inference.core.handlers import exclusive, isolated, threads_set
from inference.result import Result

TOGETHER = 256
"""Rows whose columns are coded together: part of the format, as other shapes may round otherwise."""

HEADER = struct.Struct("<4sII")
"""Mark of the format, number of rows, checksum of the rows."""
MARK = b"ppl1"


@dataclass(frozen=True, eq=False)
class Compressed:
    """Rows as bytes.

    Attributes:
        data: The code.
        rows: Number of rows.
        columns: Number of columns.
        ideal: Bits per dimension of the model, without what the coder adds: :math:`-\\log_2 p(x)` of the rows, or with
            bits back the net cost of (x, z).
        method: ``in turn``: column by column; ``bits back``: with latent variables.
    """

    data: bytes
    rows: int
    columns: int
    ideal: float
    method: str

    @property
    def bits_per_dimension(self) -> float:
        """Bits of the code per entry of the rows, header included."""
        return 8 * len(self.data) / (self.rows * self.columns)

    def __bytes__(self) -> bytes:
        return self.data

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.columns} columns in {len(self.data)} bytes, {self.bits_per_dimension:.4f} bits "
            f"per dimension ({self.method}; the model's own: {self.ideal:.4f})"
        )


@exclusive
def compress(result: Result, data: Any) -> Compressed:
    """Code rows of finite states without loss, by the probabilities that a fitted pair gives them.

    For autoregressive pairs, mixtures and naive Bayes of binary features, Markov chains and Bayesian networks the
    length is that of the exact density; for pairs with latent variables per row and a guide of new rows, such as VAEs
    of binary rows and Helmholtz machines, it is that of the ELBO (bits back). :func:`decompress` returns the rows, in
    another process too. The code is for this version of torch and this kind of processor, as both ends must compute
    bit-identical probabilities: a checksum tells if they differ. Needs the package constriction, which comes with
    ``pip install "ppl-models[compression]"``.

    Args:
        result: A Result of ``fit`` or ``sample``.
        data: Rows, alone or by name with data that the model conditions on; the latter are not part of the code.

    Returns:
        A Compressed with the code and its bits per dimension.

    Raises:
        ValueError: The rows are continuous, or the pair gives neither conditionals of its columns nor independent
            latent variables of new rows.
        ImportError: constriction is not installed.
    """
    bound, x, name = _bind(result.bound, data)
    with isolated(0), result.state(), threads_set(1):
        if bound.asked.columnwise is not None:
            stack, bits, method = *_push_columns(result, bound, x), "in turn"
        else:
            stack, bits, method = *bits_back.push(bound, x, name), "bits back"
    head = HEADER.pack(MARK, len(x), _checksum(x))
    code = head + stack.words().astype("<u4").tobytes()
    return Compressed(code, len(x), x[0].numel(), bits / x.numel(), method)


@exclusive
def decompress(result: Result, code: Compressed | bytes, data: Any = None) -> Tensor:
    """The rows that :func:`compress` has coded, exactly.

    Args:
        result: The Result that coded them, or one that was loaded from its folder.
        code: The code.
        data: Data by name that the model conditions on, as they were given with the rows.

    Returns:
        Rows (rows, columns).

    Raises:
        ValueError: The code is not of this Result, or was made on a machine that rounds otherwise.
    """
    if not isinstance(code, Compressed | bytes):
        raise ValueError(f"code: expected what compress gave, or its bytes, got {code!r}")
    raw = bytes(code)
    if len(raw) < HEADER.size or not raw.startswith(MARK) or len(raw) % 4:
        raise ValueError(f"code: expected what compress gave, got {len(raw)} bytes of another format")
    _, rows, checksum = HEADER.unpack_from(raw)
    like = result.bound.data[_first(result.bound)]
    others = {} if data is None else by_name(data, accepted_by(halves_of(result.bound.pair)[0])[0])
    bound, x, name = _bind(result.bound, {**others, _first(result.bound): like.new_zeros(rows, *like.shape[1:])})
    stack = Stack(np.frombuffer(raw, "<u4", offset=HEADER.size).astype(np.uint32))
    with isolated(0), result.state(), threads_set(1):
        if bound.asked.columnwise is not None:
            _pop_columns(result, bound, x, stack)
        else:
            bits_back.pop(bound, x, name, stack)
    if _checksum(x) != checksum:
        raise ValueError(
            "code: expected one of this Result, made by the same version of torch on the same kind of machine, got one "
            "whose checksum differs"
        )
    return x.cpu()


def _first(bound: BoundPair) -> str:
    """Name of the data that are coded: the first argument of the model."""
    return next(iter(accepted_by(halves_of(bound.pair)[0])[0]), "x")


def _bind(fitted: BoundPair, data: Any) -> tuple[BoundPair, Tensor, str]:
    """The pair bound to the rows, the rows, and their name."""
    first = _first(fitted)
    given = by_name(data, accepted_by(halves_of(fitted.pair)[0])[0])
    x = to_tensor(given[first], first) if first in given else None
    if not isinstance(x, Tensor) or x.dim() < 2 or not x.numel():
        raise ValueError(f"data: expected rows of {first} to code, got {', '.join(given) or 'none'}")
    bound = fitted.rebound(given)
    continuous = [n for n, s in bound.select("observed").items() if not s.discrete]
    if continuous:
        raise ValueError(
            f"result: expected a model of finite states, got {bound.name}, whose {continuous[0]} is continuous: only "
            "rounded values have a code without loss"
        )
    if not bound.observes:
        raise ValueError(f"result: expected a model with a likelihood, got {bound.name}, which observes nothing")
    return bound, bound.data[first], first


def _in_turn(result: Result, bound: BoundPair, rows: int, answer: Callable[[int, Tensor], Tensor]) -> None:
    """Ask for the states (rows,) of one column after another, given log probabilities (rows, states)."""
    latents = {n: v.to(bound.device) for n, v in result.draws.items()}
    steps: Any = bound.asked.columnwise
    turns = steps(rows, latents=latents)
    try:
        column, weights = next(turns)
        while True:
            weights = weights.double().log_softmax(-1)
            # A row that the model holds impossible has a code as well: its columns are then even.
            even = torch.full_like(weights, -math.log(weights.shape[-1]))
            column, weights = turns.send(answer(column, torch.where(weights.isnan(), even, weights)))
    except StopIteration:
        return


def _push_columns(result: Result, bound: BoundPair, x: Tensor) -> tuple[Stack, float]:
    """Code the rows from the last to the first, for a stack gives the last first."""
    stack, bits = Stack(), 0.0
    for part in reversed(x.split(TOGETHER)):
        turns: list[tuple[Tensor, Tensor]] = []

        def read(column: int, weights: Tensor, part: Tensor = part, turns: Any = turns) -> Tensor:
            turns.append((part[:, column], weights))
            return part[:, column]

        _in_turn(result, bound, len(part), read)
        for states, weights in reversed(turns):
            stack.push(states, weights.exp())
            bits -= float(weights.gather(-1, states[:, None].long()).sum()) / math.log(2)
    return stack, bits


def _pop_columns(result: Result, bound: BoundPair, x: Tensor, stack: Stack) -> None:
    for part in x.split(TOGETHER):

        def read(column: int, weights: Tensor, part: Tensor = part) -> Tensor:
            part[:, column] = stack.pop(weights.exp()).to(part)
            return part[:, column]

        _in_turn(result, bound, len(part), read)


def _checksum(x: Tensor) -> int:
    return zlib.crc32(np.ascontiguousarray(x.cpu().numpy().astype("<i4")).tobytes())
