"""Files that are whole: a crash, a kill or a full disk leaves the file that was there before."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, writer: Callable[[Path], Any]) -> Path:
    """Write a file so that at any moment the old one or the whole new one stands at its path.

    The writer writes another file in the same folder, of the same suffix and with a name that begins with a dot. It
    takes the place of the old one when all of it is on the disk. If the writer raises an error, that file is removed. A
    program that has the old file open goes on reading the old one.

    Args:
        path: Where the file is to stand. If it is a link, the file that it points to is replaced.
        writer: Writes a file at the path that it is given, and closes it.

    Returns:
        The path.

    Raises:
        OSError: The file cannot be written; so does whatever the writer raises.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = write_whole(Path(folder.name) / "said.txt", lambda path: path.write_text("all of it"))
        >>> path.read_text()
        'all of it'
        >>> folder.cleanup()
    """
    place = Path(path).resolve()
    new = place.with_name(f".{place.stem}.{secrets.token_hex(4)}{place.suffix}")
    try:
        writer(new)
        if place.exists():
            new.chmod(place.stat().st_mode & 0o777)
        _flush(new)
        os.replace(new, place)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The name is on the disk when its folder is.
        _flush(place.parent)
    return Path(path)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
