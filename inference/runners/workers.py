r"""Tasks side by side in worker processes, which are kept for the next call.

Workers are those of loky, which joblib brings along: each is a new interpreter, on every platform, and nothing is
forked, so that threads, locks and accelerators of this process are none of theirs. What is to run is carried over by
cloudpickle, which takes functions and classes of notebooks, closures and lambdas too. Modules are imported by name: a
change that this process has made in one of them after its import does not reach a worker.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import torch

from inference.core.handlers import threads_set
from inference.runners.base import cores

Say = Callable[[int, str], None]
"""Tells how far a task is: a step, and a text."""

IDLE = 60.0
"""Seconds after which a worker that has nothing to do ends; it holds about 300 MB."""

PAUSE = 0.1
"""Seconds between two looks at how far tasks are."""

ENVIRONMENT = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
"""Of workers. torch is then given as many threads as a task is to have."""

_PROGRESS = np.dtype([("step", "i8"), ("text", "S96")])


class Uncarried(Exception):
    """What is to run cannot be carried to another process."""


class Failed(RuntimeError):
    """A task raised an error, or its process ended."""


def side_by_side(
    run: Callable[[Any, Say], Any],
    tasks: Sequence[Any],
    workers: int,
    *,
    threads: int | None = None,
    show: Callable[[int, int, str], None] = lambda *_: None,
    name: str = "task",
) -> list[Any]:
    """What a function returns for each task, by so many worker processes.

    In a worker, with a single worker, and where the function cannot be carried to another process (a warning says why),
    the tasks run one after another in this process. Workers take over what a program depends on in this process:
    torch's default type and device, Pyro's settings and the filters of warnings.

    Args:
        run: Called with a task and a function that tells how far it is.
        tasks: What to call it with.
        workers: Most processes.
        threads: Threads of torch for each task. Default: as many as there are, in this process; one in a worker.
        show: Called with the number of a task, its step and a text.
        name: What a task is called in messages.

    Raises:
        Failed: A task raised an error, or its process ended. The others are ended.
    """
    workers = min(workers, len(tasks))
    if workers > 1 and not _Held.inside:
        try:
            return _in_processes(run, tasks, workers, threads or 1, show, name)
        except Uncarried as reason:
            what = f"{name}s run one after another, because they cannot be carried to other processes"
            warnings.warn(f"{what}: {reason}", stacklevel=5)
    with threads_set(threads or torch.get_num_threads()):
        return [_named(run, task, k, show, name) for k, task in enumerate(tasks)]


def run_jobs(run: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, name: str) -> list[Any]:
    """What a function returns for each task, by so many workers (-1: one per core); by this process where it is one."""
    workers = min(cores() if jobs < 0 else jobs, len(tasks))
    if workers < 2:
        return [run(task) for task in tasks]
    return side_by_side(lambda task, _: run(task), tasks, workers, threads=max(1, cores() // workers), name=name)


def _named(run: Callable[..., Any], task: Any, k: int, show: Callable[[int, int, str], None], name: str) -> Any:
    try:
        return run(task, lambda step, text: show(k, step, text))
    except Exception as error:
        raise Failed(f"{name} {k}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else traceback.format_exc(limit=-1)


def _in_processes(
    run: Any, tasks: Sequence[Any], workers: int, threads: int, show: Callable[[int, int, str], None], name: str
) -> list[Any]:
    with TemporaryDirectory(prefix="inference-", ignore_cleanup_errors=True) as folder:
        _write(Path(folder), _Work(run, threads), len(tasks))
        progress, results = _progress(folder, "r"), dict[int, Any]()
        try:
            pool = _pool(workers)
            left = {pool.submit(_work, folder, k, task): k for k, task in enumerate(tasks)}
            while left:
                done, _ = wait(left, timeout=PAUSE, return_when=FIRST_COMPLETED)
                for k, (step, text) in enumerate(progress):
                    if step > 0:
                        show(k, int(step), text.decode(errors="ignore"))
                for future in done:
                    running = [k for k in left.values() if progress["step"][k] >= 0]
                    k = left.pop(future)
                    results[k] = _value(future, f"{name} {k}", f"{name} {' or '.join(map(str, running or [k]))}")
        except BaseException:
            # Ctrl-C, too.
            _end_pool()
            raise
    return [results[k] for k in range(len(tasks))]


def _value(future: Any, name: str, running: str) -> Any:
    """What a task returned; its warnings are those of this process."""
    try:
        outcome = future.result()
    except BrokenProcessPool as error:
        codes = " or ".join(sorted(set(re.findall(r"\w+\(-?\d+\)", str(error))))) or "unknown"
        line = f"{running} ended without an answer (exit code: {codes}); the system kills what takes too much memory"
        raise Failed(line) from None
    for kind, text in outcome.warned:
        warnings.warn(f"{name}: {text}", kind, stacklevel=7)
    if outcome.uncarried:
        raise Uncarried(outcome.uncarried)
    if outcome.failed:
        raise Failed(f"{name}: {outcome.failed}")
    return outcome.value


def _write(folder: Path, work: _Work, count: int) -> None:
    """Write what workers read, once for all tasks."""
    import cloudpickle

    try:
        with (folder / "work").open("wb") as file:
            cloudpickle.dump(work, file)
    # Objects refuse in any way they like.
    except Exception as error:
        raise Uncarried(_said(error)) from error
    empty = np.full(count, -1, _PROGRESS["step"]).astype(_PROGRESS)
    (folder / "progress").write_bytes(empty.tobytes())


def _progress(folder: str, mode: Any) -> np.ndarray:
    return np.memmap(Path(folder) / "progress", _PROGRESS, mode)


class _Held:
    """What a process holds between two calls: its workers, or what it works on if it is one.

    Attributes:
        inside: Whether the process is a worker.
        folder: Where the work was read from.
        work: The work, read once for all tasks of a call.
        pool: Its workers.
        workers: How many they are.
        since: When they were started.
    """

    inside = False
    folder = ""
    work: Any = None
    pool: Any = None
    workers = 0
    since = 0.0


def _pool(workers: int) -> Any:
    """So many workers: those of the last call, or new ones where a module's source has changed since they started."""
    if _Held.pool is None or _Held.workers != workers or _changed(_Held.since):
        _new_pool(workers)
    with _interrupts_held():
        # Workers start, again if they were idle for long, with the first task.
        try:
            _Held.pool.submit(os.getpid)
        except BrokenProcessPool:
            # One was killed while it was idle.
            _new_pool(workers)
            _Held.pool.submit(os.getpid)
    return _Held.pool


def _new_pool(workers: int) -> None:
    # A second to import. joblib's own pool would take ours for its own where both use the one that loky keeps.
    from joblib.externals.loky import ProcessPoolExecutor

    _end_pool()
    _Held.workers, _Held.since = workers, time.time()
    settings: dict[str, Any] = {"timeout": IDLE, "env": ENVIRONMENT}
    _Held.pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(os.getpid(),), **settings)


def _end_pool() -> None:
    """End the workers, whatever they do."""
    pool, _Held.pool = _Held.pool, None
    if pool is None:
        return
    # loky's own way to kill them loses its thread where tasks wait in its queue (a KeyError).
    for process in list(pool._processes.values()):
        process.terminate()
    pool.shutdown(wait=True)


if hasattr(os, "register_at_fork"):
    # The workers are those of the parent.
    os.register_at_fork(after_in_child=lambda: setattr(_Held, "pool", None))


def start_workers(count: int) -> None:
    """Let so many workers start, which are wanted soon, while this process goes on."""
    if count > 1 and not _Held.inside:
        _pool(count)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait; processes that start meanwhile never see it, not even before they can say so."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _changed(since: float) -> bool:
    """Whether the file of a module that is imported was written since then, as a notebook that reloads it sees."""
    for file in {getattr(m, "__file__", None) for m in list(sys.modules.values())}:
        with suppress(OSError, TypeError, ValueError):
            if os.stat(file).st_mtime > since:  # type: ignore[arg-type]
                return True
    return False


def _begin(parent: int) -> None:
    """Start a worker: Ctrl-C, which reaches every process of a terminal, is for its parent, with which it ends."""
    _Held.inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass
class _Work:
    """What workers run, and the settings of the process that asks for it."""

    run: Callable[[Any, Say], Any]
    threads: int
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    device: torch.device = field(default_factory=torch.get_default_device)
    settings: dict[str, Any] = field(default_factory=pyro.settings.get)
    filters: list[Any] = field(default_factory=lambda: list(warnings.filters))

    @contextmanager
    def surroundings(self) -> Iterator[list[Any]]:
        """Take the settings over, and give the warnings that are caught."""
        torch.set_num_threads(self.threads)
        torch.set_default_dtype(self.dtype)
        if torch.get_default_device() != self.device:
            torch.set_default_device(self.device)
        pyro.settings.set(**self.settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            for action, message, category, module, line in reversed(self.filters):
                texts = [getattr(t, "pattern", t) or "" for t in (message, module)]
                warnings.filterwarnings(action, texts[0], category, texts[1], line)
            yield caught


@dataclass(frozen=True)
class _Outcome:
    """What a task returned, or why it did not, and its warnings."""

    value: Any = None
    failed: str = ""
    uncarried: str = ""
    warned: tuple[tuple[type[Warning], str], ...] = ()


def _work(folder: str, k: int, task: Any) -> _Outcome:
    """Run one task in a worker."""
    import cloudpickle

    if _Held.folder != folder:
        _Held.work, _Held.folder = None, ""
        try:
            _Held.work = cloudpickle.loads((Path(folder) / "work").read_bytes())
        # Whatever an import raises.
        except Exception as error:
            return _Outcome(uncarried=_said(error))
        _Held.folder = folder
    progress, work, last, said = _progress(folder, "r+"), _Held.work, 0.0, (0, "")

    def say(step: int, text: str) -> None:
        nonlocal last, said
        said = step, text
        if time.perf_counter() - last > PAUSE:
            last, progress[k] = time.perf_counter(), (step, text.encode())

    progress["step"][k] = 0
    with work.surroundings() as caught:
        try:
            value, failed = work.run(task, say), ""
        except Exception as error:
            value, failed = None, _said(error)
    progress[k] = (said[0], said[1].encode())
    return _Outcome(value, failed, warned=tuple((w.category, str(w.message)) for w in caught))
