"""Symbols on a stack of bits: a coder by asymmetric numeral systems, of the package constriction.

Probabilities are rounded to multiples of 2^-24, and none is below one of them, so that any symbol can be coded.

Reference: Bamler 2022, "Understanding Entropy Coding With Asymmetric Numeral Systems"
(https://arxiv.org/abs/2201.01741).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

RESERVE = 2
"""Words that the coder itself holds: below them a pop would read zeros that no push can restore."""


class Stack:
    """A stack of symbols.

    Args:
        words: 32-bit words on it.
        sealed: Whether they are arbitrary bits rather than what :meth:`words` gave.
    """

    def __init__(self, words: np.ndarray | None = None, *, sealed: bool = False) -> None:
        self._stream = _library().stream
        coder = self._stream.stack.AnsCoder
        self._coder = coder() if words is None else coder(words, seal=sealed)

    def push(self, symbols: Tensor, probs: Tensor) -> None:
        """Put symbols (n,) on the stack, each with probabilities (n, states)."""
        self._coder.encode_reverse(_integers(symbols), self._stream.model.Categorical(perfect=False), _table(probs))

    def pop(self, probs: Tensor) -> Tensor:
        """Take symbols (n,) off the stack, as they were put there with probabilities (n, states)."""
        return _whole(self._coder.decode(self._stream.model.Categorical(perfect=False), _table(probs)))

    def push_even(self, symbols: Tensor, states: int) -> None:
        """Put symbols (n,) of equal probabilities on the stack."""
        self._coder.encode_reverse(_integers(symbols), self._stream.model.Uniform(states))

    def pop_even(self, count: int, states: int) -> Tensor:
        """Take so many symbols of equal probabilities off the stack."""
        return _whole(self._coder.decode(self._stream.model.Uniform(states), count))

    @property
    def is_low(self) -> bool:
        """Whether so little is left that what was popped may not have been there: it could not be put back."""
        return self._coder.num_words() < RESERVE

    def words(self) -> np.ndarray:
        """What is on the stack, as 32-bit words."""
        return np.asarray(self._coder.get_compressed())


def _library() -> Any:
    try:
        return import_module("constriction")
    except ImportError:
        raise ImportError(
            'compress: expected the package constriction, got none; install it by pip install "ppl-models[compression]"'
        ) from None


def _table(probs: Tensor) -> np.ndarray:
    return np.ascontiguousarray(probs.double().cpu().numpy())


def _integers(symbols: Tensor) -> np.ndarray:
    return np.ascontiguousarray(symbols.cpu().numpy().astype(np.int32))


def _whole(symbols: np.ndarray) -> Tensor:
    return torch.from_numpy(symbols.astype(np.int64))
