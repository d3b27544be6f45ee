r"""Libraries that are imported when they are first used: ArviZ, xarray, pandas and SciPy take as long as torch."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["azb", "azs", "pd", "special", "stats", "xr"]


class _Lazy(ModuleType):
    """Stands for a module until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)


if TYPE_CHECKING:
    import arviz_base as azb
    import arviz_stats as azs
    import pandas as pd
    import xarray as xr
    from scipy import special, stats
else:
    azb, azs = _Lazy("arviz_base"), _Lazy("arviz_stats")
    pd, xr = _Lazy("pandas"), _Lazy("xarray")
    special, stats = _Lazy("scipy.special"), _Lazy("scipy.stats")
