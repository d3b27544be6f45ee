r"""Flush subnormal numbers to zero while a fit runs.

A CPU takes many times as long for an operation on subnormal numbers (below :math:`10^{-38}` in float32), and long
training produces them: the logit of a pixel that is never on falls below -87, and the units behind it die. XLA always
flushes subnormal numbers; torch can, but only in the thread that asks for it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@contextmanager
def subnormals_flushed() -> Iterator[None]:
    """Flush subnormal numbers to zero within the context, in this thread and in torch's worker threads."""
    flushes = float(torch.full((), 1e-310, dtype=torch.float64) * 2) == 0
    try:
        if not flushes:
            _set(True)
        yield
    finally:
        if not flushes:
            _set(False)


def _set(on: bool) -> None:
    torch.set_flush_denormal(on)
    if sys.platform != "linux" or torch.get_num_threads() == 1:
        return
    # The flag belongs to a thread, and torch sets it in the calling one only: a parallel region reaches OpenMP's team.
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if region is not None:
        body = _REGION(lambda _: torch.set_flush_denormal(on))
        region(body, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
