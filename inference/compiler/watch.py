r"""Values that a run takes from outside itself, and whether they are still the same.

A traced program holds as constants the numbers, texts and tensors that the user's code finds in closures, globals,
default arguments, attributes of modules, objects and functions, and entries of lists, deques and dictionaries. Here
each such place is remembered with what it held. A call of the program compares identities, which takes about 0.1 us per
place.

Not seen: entries of containers with more than ``LARGEST`` entries, attributes of objects of other libraries (but for
distributions), numbers inside NumPy arrays, files, clocks, the environment, and what C code keeps. The comparison with
the eager run finds these at the calls at which it is made.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, Signature
from operator import getitem
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from inference.compiler.reads import is_foreign, is_library, is_standard

LARGEST, MOST = 256, 4096
"""Entries of a container up to which it is watched, and places that are watched at most."""


PLAIN = (int, float, complex, str, bytes, type(None))
FIXED = (*PLAIN, torch.dtype, torch.device, torch.layout, Parameter, Signature)
SHOWN = ("__repr__", "__str__", "__format__")
HIDDEN = ("__", "_abc_")
_GONE = (ValueError, KeyError, IndexError, AttributeError)
_CONSTANT = (ModuleType, type, BuiltinFunctionType)
_BAGS = (Namespace, SimpleNamespace)
_UNWATCHED = frozenset(
    (
        "training",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
        "_non_persistent_buffers_set",
    )
)


@dataclass(slots=True)
class Place:
    """A place outside a run: how to read it, what it held, and how to call it in a message."""

    get: Callable[..., Any]
    key: tuple[Any, ...]
    value: Any
    name: str

    def now(self) -> Any:
        """What it holds now; the place itself where it is gone."""
        try:
            return self.get(*self.key)
        except _GONE:
            return self


class Watch:
    """The places from which some functions, modules and objects take values.

    Attributes:
        places: The places.
        whole: Whether all of them are known: nothing was met that cannot be looked into, or that is too large, but for
            what functions of other packages use.
    """

    def __init__(self, *roots: Any) -> None:
        self.places: list[Place] = []
        self.whole = True
        self._seen: dict[int, Any] = {}
        self._others = set[int]()
        self._packages = set(_packages(roots))
        self._classes: set[type] = set()
        self._waiting: list[tuple[Any, str]] = [(r, getattr(r, "__name__", type(r).__name__)) for r in roots]
        while self._waiting and len(self.places) < MOST:
            item, name = self._waiting.pop()
            if id(item) not in self._seen:
                self._seen[id(item)] = item
                known = len(self._waiting)
                try:
                    self._visit(item, name)
                except Exception:  # an object that does not let itself be looked at is not watched
                    self._leave_out(item)
                if id(item) in self._others or (isinstance(item, FunctionType) and self._of_others(item.__module__)):
                    self._others |= {id(v) for v, _ in self._waiting[known:]}
        self.whole &= not self._waiting

    def changed(self) -> list[Place]:
        """Places that hold something else than they did."""
        moved = []
        for place in self.places:
            try:
                now = place.get(*place.key)
            except _GONE:
                now = place
            if now is not place.value and not _same(now, place.value):
                moved.append(place)
        return moved

    def holding(self, tensor: Tensor) -> list[Place]:
        """Places that held a tensor."""
        return [p for p in self.places if p.value is tensor]

    def leave(self, places: list[Place]) -> None:
        """Watch these places no longer."""
        self.places = [p for p in self.places if p not in places]

    def _visit(self, item: Any, name: str) -> None:
        if isinstance(item, FunctionType):
            self._function(item, name)
        elif isinstance(item, MethodType):
            self._waiting += [(item.__self__, name), (item.__func__, name)]
        elif isinstance(item, partial):
            self._waiting += [(v, name) for v in (item.func, *item.args, *item.keywords.values())]
        elif isinstance(item, Mapping) and type(item).__module__ in ("builtins", "collections"):
            if len(item) > LARGEST:
                self._leave_out(item)
            else:
                get = dict.get if isinstance(item, dict) else getitem
                self._add(get, item, list(item), item.values(), lambda k: f"{name}[{k!r}]")
                self.places.append(Place(len, (item,), len(item), f"the length of {name}"))
        elif isinstance(item, list | tuple | deque):
            if isinstance(item, tuple) and all(isinstance(v, PLAIN) for v in item):
                return
            if len(item) > LARGEST:
                self._leave_out(item)
            else:
                self._add(getitem, item, range(len(item)), item, lambda k: f"{name}[{k}]")
                if not isinstance(item, tuple):
                    self.places.append(Place(len, (item,), len(item), f"the length of {name}"))
        elif isinstance(item, nn.Module):
            self._module(item)
        elif isinstance(item, type):
            self._class(item)
        elif isinstance(item, Distribution):
            own = {k: v for k, v in vars(item).items() if isinstance(v, (*PLAIN, Tensor, Distribution))}
            self._attributes(item, own)
        elif isinstance(item, _BAGS) or not is_foreign(type(item).__module__):
            self._attributes(item, getattr(item, "__dict__", {}))
            slots = {n: getattr(item, n) for n in _slots(type(item)) if hasattr(item, n)}
            self._add(getattr, item, list(slots), slots.values(), lambda k: f"{type(item).__name__}.{k}")
            self._class(type(item))
        elif is_library(type(item).__module__) and callable(item) and hasattr(item, "__dict__"):
            # A handler around a model, such as poutine.scale.
            self._waiting += [(v, name) for v in vars(item).values() if callable(v)]
        elif not (isinstance(item, FIXED) or is_library(type(item).__module__)):
            self._leave_out(item)

    def _leave_out(self, item: Any) -> None:
        self.whole &= id(item) in self._others

    def _of_others(self, module: str | None) -> bool:
        """Whether a module is another library's than that of the functions which are watched."""
        return is_foreign(module or "") and (module or "").partition(".")[0] not in self._packages

    def _function(self, item: FunctionType, name: str) -> None:
        name = item.__name__ or name
        for cell, variable in zip(item.__closure__ or (), item.__code__.co_freevars, strict=True):
            with contextlib.suppress(ValueError):
                self._put(_content, (cell,), cell.cell_contents, f"{variable} of {name}()")
        if is_library(item.__module__ or "") or is_standard(item.__module__ or ""):
            # Caches of Python's own modules, such as that of ``re``, change at any time.
            self._waiting += [(item.__wrapped__, name)] if hasattr(item, "__wrapped__") else []
            return
        names = list(dict.fromkeys(n for code in _codes(item.__code__) for n in code.co_names))
        known = item.__globals__
        for n in [n for n in names if n in known]:
            self._put(dict.get, (known, n), known[n], f"the global {n}")
            if isinstance(known[n], ModuleType) and not is_foreign(known[n].__name__):
                within = vars(known[n])
                for a in [a for a in names if a in within]:
                    self._put(dict.get, (within, a), within[a], f"{n}.{a}")
        for k, value in enumerate(item.__defaults__ or ()):
            self._put(_default, (item, k), value, f"default {k} of {name}()")
        own = vars(item)
        self._add(dict.get, own, list(own), own.values(), lambda k: f"{name}.{k}")
        for key, value in (item.__kwdefaults__ or {}).items():
            self._put(dict.get, (item.__kwdefaults__, key), value, f"the default of {key} of {name}()")

    def _module(self, item: nn.Module) -> None:
        name = type(item).__name__
        inner = ("_parameters", "_buffers", "_modules")
        for kind in inner:
            entries = vars(item)[kind]
            self._add(dict.get, entries, list(entries), entries.values(), lambda k: f"{name}.{k}")
        plain = {k: v for k, v in vars(item).items() if k not in inner and k not in _UNWATCHED}
        if is_library(type(item).__module__):
            plain = {k: v for k, v in plain.items() if isinstance(v, PLAIN) and not k.startswith("_")}
        self._attributes(item, plain)
        self._class(type(item))

    def _attributes(self, item: Any, known: Mapping[str, Any]) -> None:
        kind = type(item).__name__
        if known:
            self._add(dict.get, vars(item), list(known), known.values(), lambda k: f"{kind}.{k}")

    def _class(self, kind: type) -> None:
        for part in kind.__mro__:
            if is_foreign(part.__module__) or part in self._classes:
                continue
            self._classes.add(part)
            for key, value in vars(part).items():
                value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(value, FunctionType):
                    self._waiting += [(value, key)] if key not in SHOWN else []
                elif not (key.startswith(HIDDEN) or isinstance(value, _CONSTANT) or hasattr(value, "__get__")):
                    self._put(getitem, (vars(part), key), value, f"{part.__name__}.{key}")

    def _add(self, get: Any, owner: Any, keys: Any, values: Any, named: Callable[[Any], str]) -> None:
        for key, value in zip(keys, list(values), strict=True):
            self._put(get, (owner, key), value, named(key))

    def _put(self, get: Callable[..., Any], key: tuple[Any, ...], value: Any, name: str) -> None:
        # A name may come to stand for another function of torch, or for a class that was defined again.
        self.places.append(Place(get, key, value, name))
        own = isinstance(value, type) and not is_foreign(value.__module__)
        if own or not isinstance(value, (*PLAIN, *_CONSTANT, Tensor)):
            self._waiting.append((value, name))


def _packages(items: Any) -> Iterator[str]:
    """Packages of functions, and of those that partial functions hold, but for torch, Pyro and this package."""
    for item in items:
        if isinstance(item, partial):
            yield from _packages((item.func, *item.args))
        elif callable(item):
            module = getattr(item, "__module__", None) or type(item).__module__
            if not is_library(module):
                yield module.partition(".")[0]


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions and comprehensions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _slots(kind: type) -> Iterator[str]:
    """Names of the attributes that the objects of a class hold without a dictionary."""
    for part in kind.__mro__:
        slots = vars(part).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__"):
                hidden = name.startswith("__") and not name.endswith("__")
                yield f"_{part.__name__.lstrip('_')}{name}" if hidden else name


def _content(cell: CellType) -> Any:
    return cell.cell_contents


def _default(function: FunctionType, k: int) -> Any:
    return (function.__defaults__ or ())[k]


def _same(now: Any, before: Any) -> bool:
    """Whether two plain values are equal; nan is equal to itself."""
    plain = isinstance(now, PLAIN) and type(now) is type(before)
    return plain and (now == before or (now != now and before != before))
