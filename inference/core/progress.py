"""Progress of long work: a bar in a terminal or a notebook, elsewhere a line every half minute."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm.asyncio import tqdm_asyncio
from tqdm.auto import tqdm

INTERVAL = 30.0
"""Seconds between two lines."""
LINE = "{desc}: {n_fmt} of {total_fmt} ({percentage:.0f} %), {elapsed} so far, {remaining} left{postfix}"


class _Lines:
    """A stream on which each state of a bar is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


def bar(total: int, name: str, *, shown: bool = True, initial: int = 0) -> tqdm:
    """A progress bar; where standard error is a file or a pipe, a line for each ``INTERVAL`` seconds of work."""
    common: dict[str, Any] = {"total": total, "desc": name, "initial": initial, "leave": False, "disable": not shown}
    if not shown or tqdm is not tqdm_asyncio or sys.stderr.isatty():
        return tqdm(**common)
    # Each update looks at the clock, for the first may stand for a block of many steps.
    return tqdm(
        **common,
        file=_Lines(sys.stderr),
        bar_format=LINE,
        delay=INTERVAL,
        mininterval=INTERVAL,
        maxinterval=INTERVAL,
        miniters=1,
    )
