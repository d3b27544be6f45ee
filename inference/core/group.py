r"""The processes that run a verb together: torch's default process group, where one is initialised.

Each process has a rank, from 0. Without a group there is one process, of rank 0.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import perf_counter
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor, distributed

from inference.core.checks import reason_of

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds after which a process that waits for another one ends."""


SAMPLED_ROWS = 256
"""Rows of each tensor by which the data of two processes are compared."""


AGREE_STEPS, AGREE_SECONDS = 100, 0.2
"""Steps, or seconds, after which processes agree on whether to write a checkpoint or to stop."""


def ranks() -> tuple[int, int]:
    """The rank of this process, and the number of processes; (0, 1) without a group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def launched(device: str | torch.device = "cpu", timeout: float = TIMEOUT) -> Iterator[bool]:
    """Join the process group of a launcher such as torchrun, if one has started this process.

    Args:
        device: Where the work runs; on cuda each process takes the device of its local rank.
        timeout: Seconds after which a process that waits for another one ends with an error.

    Yields:
        Whether this process writes and prints: the first of its group, or the only one.
    """
    named = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not named or int(os.environ["WORLD_SIZE"]) == 1 or ranks()[1] > 1:
        yield ranks()[0] == 0
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


@contextmanager
def _answered() -> Iterator[None]:
    """Say in one line that another process has ended, or did not answer in time."""
    try:
        yield
    except RuntimeError as error:
        why = reason_of(error)
        raise RuntimeError(
            f"rank {ranks()[0]}: another process of the group has ended or does not answer ({why})"
        ) from error


def reduced(vector: Tensor) -> Tensor:
    """The sum of a vector over all processes, in its place.

    Raises:
        RuntimeError: Another process has ended, or did not answer in time.
    """
    with _answered():
        distributed.all_reduce(vector)
    return vector


def place() -> torch.device:
    """Where the group exchanges tensors: on this process's cuda device for nccl, else on the CPU."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def gathered(value: T) -> list[T]:
    """The value that each process has, by rank; values are numbers, strings, tensors and containers of them."""
    count = ranks()[1]
    if count == 1:
        return [value]
    held: list[Any] = [None] * count
    with _answered():
        distributed.all_gather_object(held, value)
    return held


def from_first(make: Callable[[], T]) -> T:
    """What a function returns in the process of rank 0, in all of them; its error is raised in all of them."""
    rank, count = ranks()
    if count == 1:
        return make()
    held: list[Any] = [None, None]
    if rank == 0:
        try:
            held[0] = make()
        except Exception as error:
            held[1] = error
    with _answered():
        distributed.broadcast_object_list(held)
    if held[1] is not None:
        raise held[1]
    return held[0]


def check_same(what: Mapping[str, Any]) -> None:
    """Raise a ValueError in all processes unless they were called with the same arguments and data.

    Tensors are compared by shape, type and up to ``SAMPLED_ROWS`` rows.
    """
    if ranks()[1] == 1:
        return
    shown = {n: _sample_of(v) if isinstance(v, Tensor) else repr(v) for n, v in what.items()}
    everyone = gathered(shown)
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            expected, got = everyone[0].get(name, "none"), theirs.get(name, "none")
            if got != expected:
                raise ValueError(
                    f"{name}: expected the same in all processes, which share the rows among them; got {expected} on "
                    f"rank 0, {got} on rank {rank}"
                )


def _sample_of(value: Tensor) -> str:
    rows = value[:: max(1, len(value) // SAMPLED_ROWS)] if value.dim() else value
    digest = hashlib.sha256(rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{tuple(value.shape)} {value.dtype} {digest.hexdigest()[:8]}"


def part_ways() -> None:
    """Give each process noise of its own; the first one keeps its random state."""
    rank = ranks()[0]
    if rank:
        pyro.set_rng_seed(int(torch.randint(2**31, (rank,))[-1]))


class Agreement:
    """What all processes do after the same step: write a checkpoint, or stop. One process decides for itself."""

    def __init__(self) -> None:
        self._next, self._step, self._at = 0, 0, perf_counter()

    def __call__(self, step: int, due: bool, pressed: int) -> tuple[bool, bool]:
        """Whether to write a checkpoint, and to stop, now.

        Args:
            step: Number of steps taken; the same in all processes.
            due: Whether this process would write a checkpoint. That of rank 0 counts.
            pressed: How often Ctrl-C was pressed in this process; any counts.
        """
        rank, count = ranks()
        if count == 1:
            return due, pressed > 0
        if step < self._next:
            return False, False
        # The steps that rank 0 takes until they agree again.
        now = perf_counter()
        pace = min(AGREE_STEPS, max(1, int(AGREE_SECONDS * (step - self._step) / max(now - self._at, 1e-9))))
        own = [float(due), float(pressed > 0), float(pace)] if rank == 0 else [0.0, float(pressed > 0), 0.0]
        written, stopped, ahead = reduced(torch.tensor(own, device=place())).tolist()
        self._next, self._step, self._at = step + int(ahead), step, now
        return written > 0, stopped > 0
