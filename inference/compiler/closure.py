r"""What a function consists of: the functions and modules that it uses, and a hash of its code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch

from inference.compiler.reads import is_library
from inference.core.packing import fingerprints


def reachable(*functions: Any) -> list[torch.nn.Module]:
    """Modules that functions use: themselves, their owners, and the closures and globals of the user's functions."""
    return [item for item in _walk(functions) if isinstance(item, torch.nn.Module)]


def code_of(function: Any) -> str:
    """Hash of what a function does: the code of the user's functions that it uses, and the plain values they take.

    These are numbers, strings, tensors, and lists and mappings of the former, from arguments of a partial function,
    defaults, closures and globals.
    """
    parts: list[str] = []
    for item in _walk((function,)):
        if isinstance(item, partial):
            given = [*item.args, *item.keywords.items()]
        elif isinstance(item, FunctionType) and not is_library(item.__module__ or ""):
            parts.append(_text(item.__code__))
            given = [*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).items(), *_taken(item)]
        else:
            parts.append(type(item).__qualname__)
            continue
        parts += [repr(v) for v in given if is_plain(v)]
        parts += [str(fingerprints({"": v})) for v in given if isinstance(v, torch.Tensor) and not v.requires_grad]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string or None, or a list, tuple or mapping of them."""
    if isinstance(value, dict | list | tuple):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, bool | int | float | str)


def _walk(functions: tuple[Any, ...]) -> list[Any]:
    """Callables that functions use, themselves among them; a library's functions are not looked into."""
    seen: dict[int, Any] = {}
    waiting = list(functions)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or not (isinstance(item, torch.nn.Module) or callable(item)):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.nn.Module):
            waiting += item.children()
            continue
        waiting += [getattr(item, a) for a in ("__self__", "__func__", "__wrapped__", "func", "fn") if hasattr(item, a)]
        waiting += getattr(item, "args", ()) if isinstance(getattr(item, "args", ()), tuple) else ()
        if isinstance(item, FunctionType) and not is_library(item.__module__ or ""):
            waiting += _taken(item)
    return list(seen.values())


def _taken(function: FunctionType) -> list[Any]:
    """What a function takes from its closure and its globals."""
    names = (n for n in function.__code__.co_names if n in function.__globals__)
    return [*_filled(function), *(function.__globals__[n] for n in names)]


def _filled(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            # Assigned later on.
            continue


def _text(code: CodeType) -> str:
    """The code of a function, the same in every process."""
    sorted_sets = (sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts)
    consts = [_text(c) if isinstance(c, CodeType) else repr(c) for c in sorted_sets]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {consts}"
