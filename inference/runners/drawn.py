r"""What chains have drawn: in memory, or in files of a checkpoint, from which the draws of long chains are mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.checkpoint import Checkpoint, CheckpointError
from inference.core.bound import BoundPair
from inference.core.handlers import random_state
from inference.core.private import tree_map
from inference.stored import NAME, Part, count_of, files_of, read_draws, write_draws

GROUP = 25
"""Transitions, at least, whose draws are constrained at once. It is fixed, as the last digits may depend on it."""


HELD = 2**24
"""Bytes of draws that wait for a checkpoint, at most: then there is one."""


IN_MEMORY = 2**26
"""Bytes of draws up to which a Result of chains with a checkpoint has them in memory."""


class Drawn:
    r"""Draws of a batched kernel: blocks as it returns them, joined to groups of constrained values.

    Args:
        kernel: The kernel.
        draws: Draws per chain; further ones, of the last block, are dropped.
    """

    def __init__(self, kernel: Any, draws: int) -> None:
        self.kernel, self.draws = kernel, draws
        self.blocks: list[Any] = []
        self.groups: list[Part] = []
        self.count = 0

    @property
    def made(self) -> int:
        """Draws per chain, with those of blocks that are in no group."""
        return self.count + len(self.blocks) * self.kernel.block

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return False

    def add(self, block: Any) -> None:
        """Take a block of the kernel."""
        self.blocks.append(block)
        if self.made >= self.draws or len(self.blocks) * self.kernel.block >= GROUP:
            self.gather()

    def gather(self) -> None:
        """Make a group of the blocks that are in none."""
        if not self.blocks:
            return
        values, stats = self.kernel.collect(self.blocks)
        left = self.draws - self.count
        # Copies: a group is a part of larger tensors, which would stay.
        kept = ({n: v[:left].transpose(0, 1).cpu().contiguous().numpy() for n, v in d.items()} for d in (values, stats))
        self.groups.append((next(kept), next(kept)))
        self.count += min(left, len(next(iter(values.values()))))
        self.blocks = []

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint, where there is one."""

    def joined(self) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        r"""All draws: values (chains * draws, \*shape), chain after chain, and statistics (chains, draws)."""
        self.gather()
        return self._join(_memory)

    def _parts(self) -> Iterator[Part]:
        while self.groups:
            yield self.groups.pop(0)

    def _join(self, room: Callable[[tuple[int, ...], Any], np.ndarray]) -> tuple[Any, Any]:
        whole: Part = ({}, {})
        at = 0
        for part in self._parts():
            size = 0
            for all_draws, some in zip(whole, part, strict=True):
                for name, value in some.items():
                    chains, size, *shape = value.shape
                    if name not in all_draws:
                        all_draws[name] = room((chains, self.count, *shape), value.dtype)
                    all_draws[name][:, at : at + size] = value
            at += size
        return {n: torch.from_numpy(v).flatten(0, 1) for n, v in whole[0].items()}, whole[1]


class KeptDrawn(Drawn):
    r"""Draws in files of a checkpoint, each of which is written once; memory holds those since the last one.

    Args:
        kernel: The kernel.
        draws: Draws per chain.
        checkpoint: The checkpoint.
        bound: The pair.
        method: Name of the kernel.
    """

    def __init__(self, kernel: Any, draws: int, checkpoint: Checkpoint, bound: BoundPair, method: str) -> None:
        super().__init__(kernel, draws)
        self._checkpoint, self._bound, self._method = checkpoint, bound, method
        self._files = self._written = 0
        self._most = HELD

    def begin(self, asked: Mapping[str, Any]) -> Any:
        """Where the chains are; None if they have not begun.

        Raises:
            CheckpointError: The folder is of another run, or a file is damaged, foreign or missing.
        """
        held = self._checkpoint.begin(asked)
        if held is None:
            for left in files_of(self._checkpoint.folder):
                # Of a run whose checkpoint is gone.
                left.unlink()
            return None
        self._files, self._written = held["files"], held["written"]
        self.count = self._written
        paths = files_of(self._checkpoint.folder)[: self._files]
        if len(paths) < self._files:
            missing = self._checkpoint.folder / NAME.format(len(paths))
            raise CheckpointError(f"checkpoint: {missing}: expected this file, got none")
        try:
            count = count_of(paths)
        except ValueError as error:
            raise CheckpointError(f"checkpoint: {error}") from None
        if count != self._written:
            folder = self._checkpoint.folder
            raise CheckpointError(f"checkpoint: {folder}: expected {self._written} draws in its files, got {count}")
        # Random states are on the CPU, whatever the device.
        held = {**self._here({**held, "random": None}), "random": held["random"]}
        self.blocks = held["blocks"]
        return held

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, or memory asks for one."""
        return self._checkpoint.due or self._size() >= self._most

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write the groups of draws that are new, and then the checkpoint."""
        groups = self.groups
        held = {**state, "blocks": self.blocks, "files": self._files + bool(groups), "written": self.count}
        held["random"] = random_state()
        if self._checkpoint.write(held, self._write if groups else None):
            self._files, self._written, self.groups, self._most = held["files"], self.count, [], HELD
        else:
            self._most = 2 * max(self._size(), HELD)

    def joined(self) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
        r"""All draws: in memory, or where there are many in a file without a name, which goes with the last of them.

        Raises:
            OSError: The disk has no room for this file. The draws stand in the files of the checkpoint.
        """
        self.gather()
        paths = files_of(self._checkpoint.folder)[: self._files]
        size = self._size() + sum(p.stat().st_size for p in paths)
        folder = self._checkpoint.folder if size > IN_MEMORY else None
        return self._join(lambda shape, dtype: _room(shape, dtype, folder))

    def _write(self) -> None:
        parts = [{n: np.concatenate([g[k][n] for g in self.groups], 1) for n in self.groups[0][k]} for k in (0, 1)]
        path = self._checkpoint.folder / NAME.format(self._files)
        write_draws(path, self._bound, (parts[0], parts[1]), self._written, self._method)

    def _parts(self) -> Iterator[Part]:
        for path in files_of(self._checkpoint.folder)[: self._files]:
            yield read_draws(path)
        yield from super()._parts()

    def _size(self) -> int:
        return sum(v.nbytes for part in self.groups for d in part for v in d.values())

    def _here(self, value: Any) -> Any:
        return tree_map(lambda v: v.to(self._bound.device) if isinstance(v, Tensor) else v, value)


def _memory(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in memory of torch's: where it begins decides last digits of what is computed from the draws."""
    return torch.from_numpy(np.empty(0, dtype)).new_empty(shape).numpy()


def _room(shape: tuple[int, ...], dtype: Any, folder: Path | None) -> np.ndarray:
    """An array in memory, or mapped from a new file in a folder that has no name."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if folder is None or not count:
        return _memory(shape, dtype)
    with TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            # Otherwise a full disk would be a signal that ends the process.
            os.posix_fallocate(file.fileno(), 0, count)
        return np.memmap(file, dtype, "r+" if hasattr(os, "posix_fallocate") else "w+", shape=shape)
