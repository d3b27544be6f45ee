"""Arguments of the commands, checked before any work."""

from __future__ import annotations

import difflib
import shlex
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from inference import Method
from ppl_models import data
from ppl_models.data.frames import MARK, csv_name, is_csv
from ppl_models.data.sets import Dataset
from ppl_models.zoo.entry import Entry
from ppl_models.zoo.methods import settings


def prepare(
    entry: Entry, data_name: str | None, out_dir: str | None, device: str, label: str | None = None
) -> tuple[Dataset, Path]:
    """Check the data's name and the output directory, so that errors come before any work, and load the data."""
    short = data_name or entry.data
    if data_name is not None and is_csv(data_name):
        path, _, own = data_name.partition(MARK)
        short, data_name = Path(path).stem, csv_name(path, label or own)
    elif label is not None:
        raise ValueError(f"label: expected none beside a data set of the zoo, which has its own, got {label}")
    elif data_name is not None:
        named("data", data_name, data.names())
    folder = writable(f"results/{entry.name}-{short}" if out_dir is None else out_dir)
    return entry.load(data_name, device=device), folder


def changed(entry: Entry, settings: list[str] | None) -> Entry:
    """The entry with arguments of its own replaced: ``components=5``, ``hidden=64,32``.

    Raises:
        ValueError: The entry has no such argument.
    """
    found = {}
    for setting in settings or ():
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise ValueError(f"set: expected NAME=VALUE, got {setting!r}")
        found[named("set", name.strip(), entry.settings)] = value_of(value.strip())
    return replace(entry, overrides={**entry.overrides, **found})


def value_of(text: str) -> Any:
    """A value on the command line: a number, true, false, none, a list of values with commas, or a word.

    Example:
        >>> [value_of(text) for text in ("5", "0.1", "true", "64,32", "gaussian")]
        [5, 0.1, True, (64, 32), 'gaussian']
    """
    if "," in text:
        return tuple(value_of(part.strip()) for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def named(what: str, name: str, known: Collection[str]) -> str:
    """The known name that was meant, in its own case."""
    if name in known:
        return name
    alike = [k for k in known if k.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}; " if near else ""
    raise ValueError(f"{what}: unknown {name!r}; {hint}known: {', '.join(known)}")


def taken(name: str, method: Method, options: dict[str, Any]) -> dict[str, Any]:
    """The options, all of which the method has to take."""
    for option in options:
        if option not in settings(method):
            raise ValueError(f"{option}: expected none, for the method {name} has no such setting")
    return options


def writable(folder: str) -> Path:
    """A folder that can be written to, or made. It is made when there is something to write."""
    if not folder.strip():
        raise ValueError(f"out: expected a folder, got {folder!r}")
    path = Path(folder)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"out: cannot write to {folder}: {error.strerror}") from None
    return path


def about(entry: Entry, dataset: Dataset, method: str, seed: int) -> dict[str, Any]:
    """What a folder says of a Result, for :func:`ppl_models.restore`."""
    command = " ".join(["ppl-models", *map(shlex.quote, sys.argv[1:])])
    known = {"pair": entry.name, "data": dataset.name, "method": method, "seed": seed, "command": command}
    return {**known, **({"set": dict(entry.overrides)} if entry.overrides else {})}
