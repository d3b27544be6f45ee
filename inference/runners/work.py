r"""How many threads the steps of a fit are worth, by the work of the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from inference.compiler import policy
from inference.core.handlers import threads_set
from inference.core.private import TorchDispatchMode, lacking, tree_leaves
from inference.runners.base import most_threads

T = TypeVar("T")


class _Largest(TorchDispatchMode):
    """Numbers of the largest operation that is run in the context, with multiplications counted as policy says."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            sizes = [t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            count = flop_registry.get(func._overloadpacket)
            # Two floating point operations are a multiplication and an addition.
            products = count(*args, **kwargs, out_val=out) // 2 if count else 0
            self.numbers = max(self.numbers, products // policy.PRODUCTS_PER_NUMBER, *sizes, 0)
        return out


class Counted(TorchDispatchMode):
    """Counts the operations that are run in the context, as :func:`policy.operations_of` does."""

    def __init__(self) -> None:
        super().__init__()
        self._dispatched = self._numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self._dispatched += 1
        if not func.is_view:
            self._numbers += sum(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    @property
    def operations(self) -> int:
        """How many there were."""
        return policy.operations_of(self._dispatched, self._numbers)


@contextmanager
def threads_by_work(chosen: int | None = None) -> Iterator[Callable[..., Any]]:
    """Give a function that calls another: first in one thread, then in as many as the first call's work is worth.

    Args:
        chosen: Threads that an earlier part of the run has chosen.
    """
    most = most_threads()
    calls = 0 if chosen is None else 1

    def call(function: Callable[..., T], *args: Any) -> T:
        nonlocal calls
        calls += 1
        if most == 1 or calls > 1 or lacking():
            return function(*args)
        with _Largest() as largest:
            out = function(*args)
        torch.set_num_threads(policy.threads_of_fit(largest.numbers, most))
        return out

    with threads_set(chosen or 1):
        yield call
