"""Progress of long work: a bar in a terminal or a notebook, elsewhere a line every half minute."""

from __future__ import annotations

import sys
from time import time
from typing import Any, TextIO

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

INTERVAL = 30.0
"""Seconds between two lines."""
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {elapsed} so far, {remaining} left{postfix}"


class Bar(tqdm):
    """A bar that can count its first steps apart, for compiling in them would pass for the speed of the others."""

    def advance(self, steps: int) -> None:
        """Count steps; the time of the first ones says nothing of that of others."""
        if self.disable or self.n > self.initial:
            self.update(steps)
        else:
            self.n += steps
            self.last_print_n, self.last_print_t = self.n, time()


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(total: int, name: str, *, shown: bool = True, initial: int = 0) -> Bar:
    """A progress bar; where standard error is a file or a pipe, a line for each ``INTERVAL`` seconds of work."""
    common: dict[str, Any] = {"total": total, "desc": name, "initial": initial, "leave": False, "disable": not shown}
    if not shown or tqdm is not tqdm_asyncio or sys.stderr.isatty():
        return Bar(**common)
    # Each update looks at the clock, for the first may stand for a block of many steps.
    return Bar(
        **common,
        file=_Lines(sys.stderr),
        bar_format=LINE,
        delay=INTERVAL,
        mininterval=INTERVAL,
        maxinterval=INTERVAL,
        miniters=1,
    )
