r"""Compiled programs on the disk: what was compiled once on a machine is loaded by later processes in milliseconds.

The folder is that of the environment variable ``PPL_MODELS_PROGRAMS``, by default ``ppl-models/programs`` in the user's
folder of caches; an empty variable switches it off. It holds code. So files are read from a folder alone that belongs
to the user and that nobody else can write to, and only as they were written: beside each stands its hash. Deleting the
folder costs no more than compiling again.

A program is found by a hash of all that decides it: the text of its graph, shapes and types, the source of this
package's compiler and kernels, the release of torch, the processor, and the number of threads.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from inference.compiler import policy
from inference.compiler.package import SUFFIX
from inference.core.files import write_whole

VARIABLE = "PPL_MODELS_PROGRAMS"
"""Environment variable that names the folder."""


ABANDONED = 3600
"""Seconds after which a file that is not whole is taken for one that nobody writes."""


SOURCES = ("compiler", "kernels")
"""Folders of this package whose code decides what a program does."""


def folder() -> Path | None:
    """The folder of programs; None where it is switched off, or where others may write."""
    given = os.environ.get(VARIABLE)
    if given is not None and not given.strip():
        return None
    path = Path(given) if given else _caches() / "ppl-models" / "programs"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = path.stat()
    except OSError:
        return None
    owned = not hasattr(os, "getuid") or (about.st_uid == os.getuid() and not about.st_mode & 0o022)
    return path if owned else None


def place(key: Any) -> Path | None:
    """Where the program of a key stands, if it is kept."""
    where = folder()
    return None if where is None else where / f"{_digest(key)}{SUFFIX}"


def holds(key: Any) -> bool:
    """Whether the program of a key is on the disk."""
    path = place(key)
    return path is not None and path.is_file() and _hash_of(path).is_file()


def load(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a reader makes of a program; None where there is none, or none that is whole."""
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != _hash_of(path).read_text():
            return None
        os.utime(path)
        return reader(path)
    except (OSError, RuntimeError, ValueError):
        # A file that another process deletes, or another system's.
        return None


def save(path: Path, made: Path) -> None:
    """Keep a program that was made elsewhere, and its hash; delete those that were not used for the longest time.

    Raises:
        OSError: The file cannot be written.
    """
    write_whole(path, lambda file: shutil.copyfile(made, file))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    write_whole(_hash_of(path), lambda file: file.write_text(digest))
    _shrink(path.parent)


def _shrink(where: Path) -> None:
    """Delete the programs that were not used for the longest time, down to ``policy.STORED_BYTES``."""
    left = policy.STORED_BYTES
    # Another process may delete them at the same time.
    with suppress(OSError):
        for path in where.glob(".*"):
            # Of a process that was killed while it wrote.
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        for path in sorted(where.glob(f"[!.]*{SUFFIX}"), key=lambda p: -p.stat().st_mtime):
            left -= path.stat().st_size
            if left < 0:
                path.unlink(missing_ok=True)
                _hash_of(path).unlink(missing_ok=True)


def _hash_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(key: Any) -> str:
    return hashlib.sha256(repr((key, _decided())).encode()).hexdigest()[:32]


@cache
def _decided() -> tuple[str, ...]:
    """What decides a program besides its key: sources, torch, processor."""
    root, sources = Path(__file__).parent.parent, hashlib.sha256()
    for name in SOURCES:
        for file in sorted((root / name).glob("*.py")):
            sources.update(file.read_bytes())
    with suppress(OSError):
        about = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        lines = [line for line in about if line.startswith(("flags", "Features", "model name"))]
        return sources.hexdigest(), torch.__version__, platform.machine(), *lines
    return sources.hexdigest(), torch.__version__, platform.machine(), platform.processor()


def _caches() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path()
