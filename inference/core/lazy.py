r"""Libraries that are imported when they are first used: ArviZ, xarray, pandas and SciPy take as long as torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """Stands for a module until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


def lazy(name: str) -> Any:
    """A module that is imported when something of it is first asked for.

    Example:
        >>> table = lazy("pandas")
        >>> len(table.DataFrame({"a": [1, 2]}))
        2
    """
    return _Lazy(name)
