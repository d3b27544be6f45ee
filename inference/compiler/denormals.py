r"""Subnormal numbers counted as zero while a fit runs.

Below :math:`10^{-38}` (float32) a CPU takes many times as long for an operation, and long training gets there: the
logits of a pixel that is never on fall below -87, the units that serve it die. XLA always counts such numbers as
zero; torch asks for it thread by thread, and only for the one that calls.
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
    """Count subnormal numbers as zero, in this thread and in those that torch computes with, and no longer after."""
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
    # The flag is a thread's own, and torch hands it on to no other: a parallel region reaches OpenMP's whole team.
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if region is not None:
        each = _REGION(lambda _: torch.set_flush_denormal(on))
        region(each, None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
