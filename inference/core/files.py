"""Files that are whole: a crash, a kill or a full disk leaves the file that was there before."""

from __future__ import annotations

import io
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:
    # Windows.
    fcntl = None  # type: ignore[assignment]


def stem_of(name: str) -> str:
    """A name as that of a file: its letters and digits in lower case, with underscores between.

    Example:
        >>> stem_of("SVI (Trace_ELBO)")
        'svi_trace_elbo'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


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
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(new)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if os.name == "posix":
        # The name is on the disk when its folder is.
        _flush(place.parent)
    return Path(path)


def write_folder(path: str | Path, writer: Callable[[Path], Any], mark: str) -> Path:
    """Write a folder of files so that it is there whole or not at all.

    The writer fills another folder beside it, with a name that begins with a dot, which takes its place when all of it
    is on the disk. A folder that is there is replaced if it was written likewise: for an instant it has such a
    name, and a process that is killed then leaves it so.

    Args:
        path: Where the folder is to stand.
        writer: Writes files into the folder that it is given.
        mark: Name of a file that every such folder has. Another folder is not replaced.

    Returns:
        The path.

    Raises:
        FileExistsError: There is a file, or a folder without the mark.
        OSError: The folder cannot be written; so does whatever the writer raises.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = write_folder(Path(folder.name) / "said", lambda f: (f / "it.txt").write_text("all of it"), "it.txt")
        >>> (path / "it.txt").read_text()
        'all of it'
        >>> folder.cleanup()
    """
    place = Path(path).resolve()
    if place.exists() and not (place / mark).is_file():
        raise FileExistsError(f"{path}: expected no file, or a folder with {mark}, got something else, which is kept")
    place.parent.mkdir(parents=True, exist_ok=True)
    new, old = (place.with_name(f".{place.name}.{secrets.token_hex(4)}") for _ in range(2))
    try:
        new.mkdir()
        writer(new)
        for file in (*new.rglob("*"), new):
            if os.name == "posix" or file.is_file():
                _flush(file)
        if place.exists():
            os.replace(place, old)
        os.replace(new, place)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not place.exists():
            os.replace(old, place)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    shutil.rmtree(old, ignore_errors=True)
    if os.name == "posix":
        _flush(place.parent)
    return Path(path)


def lock(path: str | Path) -> int:
    """Take a lock that one process, and one thread of it, can have at a time.

    The system frees it when the process ends, however that is. Where there are no such locks (Windows, some network
    file systems), it is always free.

    Args:
        path: A file, made if it is missing, which says who has the lock. It is not removed.

    Returns:
        An open file: ``os.close`` frees the lock.

    Raises:
        BlockingIOError: Another one has it; the message says who.
        OSError: The file cannot be opened.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> os.close(lock(Path(folder.name) / "lock"))
        >>> folder.cleanup()
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise BlockingIOError(who or "another process") from None
    except OSError:
        return handle
    # On a full disk it says less.
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
    return handle


class Lenient(io.FileIO):
    """A file that takes whatever is written, and says at its end what could not be written.

    HDF5 cannot give a file up: it repeats a write that has failed until the process crashes. Used in a ``with`` block,
    whose end raises the first error.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while len(left) and self._failure is None:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self._failure = error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._failure = self._failure or error
            return self.tell() if size is None else size

    def __exit__(self, *_: object) -> None:
        self.close()
        if self._failure is not None:
            raise self._failure


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
